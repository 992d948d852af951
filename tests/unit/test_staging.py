"""`zmqagent.agent.staging`: pinned memory is lent again when nobody uses it any more, and never more than the limit."""

from __future__ import annotations

import gc

import torch

from tests.support.late_accelerator import LateAccelerator, LateEvent
from zmqagent.agent.staging import Lent, Staging

DEVICE = torch.device("cuda:0")


def lend(staging: Staging, nbytes: int) -> Lent:
    lent = staging.lend(nbytes)
    assert lent is not None
    assert (lent.memory.numel(), lent.memory.dtype) == (nbytes, torch.uint8)
    return lent


def begin_to_read(late: LateAccelerator, lent: Lent) -> tuple[list[list[int]], LateEvent]:
    """Has the device read ``lent`` later: what it will have read, and the event behind that."""
    read: list[list[int]] = []
    late.give(DEVICE, "read", lambda: read.append(lent.memory.tolist()))
    return read, late.record(DEVICE)


def test_memory_that_a_device_reads_is_lent_again_when_the_event_behind_the_copy_is_done() -> None:
    late = LateAccelerator()
    staging = Staging(late)
    first = lend(staging, 3)
    first.memory.fill_(1)
    read, event = begin_to_read(late, first)
    staging.give_back(first, event)
    second = lend(staging, 3)
    second.memory.fill_(2)
    event.synchronize()
    assert read == [[1, 1, 1]]
    third = lend(staging, 4)
    assert third.memory.data_ptr() == first.memory.data_ptr() != second.memory.data_ptr()
    assert late.pinned_sizes == [4096, 4096]


def test_memory_whose_bytes_somebody_holds_is_not_lent_again() -> None:
    late = LateAccelerator()
    staging = Staging(late)
    lent = lend(staging, 5000)
    address = lent.memory.data_ptr()
    part = staging.bytes_of(lent)[10:20]
    del lent
    gc.collect()
    assert lend(staging, 5000).memory.data_ptr() != address
    part.release()
    del part
    gc.collect()
    assert lend(staging, 8000).memory.data_ptr() == address
    assert late.pinned_sizes == [8192, 8192]


def test_no_more_is_pinned_than_the_limit_allows() -> None:
    late = LateAccelerator()
    staging = Staging(late, limit=3 * 4096)
    kept = [lend(staging, 4096) for _ in range(3)]
    assert staging.lend(1) is None
    assert staging.lend(4 * 4096) is None
    assert staging.size == 3 * 4096
    _, event = begin_to_read(late, kept[0])
    staging.give_back(kept[0], event)
    assert staging.lend(1) is None
    event.synchronize()
    lend(staging, 1)
    assert late.pinned_sizes == [4096] * 3


def test_idle_memory_of_other_sizes_makes_room() -> None:
    late = LateAccelerator()
    staging = Staging(late, limit=4 * 4096)
    for nbytes in (4096, 2 * 4096):
        lent = lend(staging, nbytes)
        _, event = begin_to_read(late, lent)
        staging.give_back(lent, event)
        event.synchronize()
    lend(staging, 3 * 4096)
    assert late.pinned_sizes == [4096, 2 * 4096, 4 * 4096]
    assert staging.size == 4 * 4096


def test_without_pinned_memory_nothing_is_lent_and_nothing_counted() -> None:
    staging = Staging(LateAccelerator(pins=False))
    assert staging.lend(1) is None
    assert staging.size == 0
