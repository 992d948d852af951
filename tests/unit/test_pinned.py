"""`zmqagent.agent.pinned`: pinned memory is lent again when nobody uses it any more, and never more than the limit."""

from __future__ import annotations

import gc

import torch

from tests.support.late_accelerator import LateAccelerator, LateEvent
from zmqagent.agent.pinned import Lent, PinnedPool

DEVICE = torch.device("cuda:0")


def lend(pool: PinnedPool, nbytes: int) -> Lent:
    lent = pool.lend(nbytes)
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
    pool = PinnedPool(late)
    first = lend(pool, 3)
    first.memory.fill_(1)
    read, event = begin_to_read(late, first)
    pool.give_back(first, event)
    second = lend(pool, 3)
    second.memory.fill_(2)
    event.synchronize()
    assert read == [[1, 1, 1]]
    third = lend(pool, 4)
    assert third.memory.data_ptr() == first.memory.data_ptr() != second.memory.data_ptr()
    assert late.pinned_sizes == [4096, 4096]


def test_memory_whose_bytes_somebody_holds_is_not_lent_again() -> None:
    late = LateAccelerator()
    pool = PinnedPool(late)
    lent = lend(pool, 5000)
    address = lent.memory.data_ptr()
    part = pool.bytes_of(lent)[10:20]
    del lent
    gc.collect()
    assert lend(pool, 5000).memory.data_ptr() != address
    part.release()
    del part
    gc.collect()
    assert lend(pool, 8000).memory.data_ptr() == address
    assert late.pinned_sizes == [8192, 8192]


def test_no_more_is_pinned_than_the_limit_allows() -> None:
    late = LateAccelerator()
    pool = PinnedPool(late, limit=3 * 4096)
    kept = [lend(pool, 4096) for _ in range(3)]
    assert pool.lend(1) is None
    assert pool.lend(4 * 4096) is None
    assert pool.size == 3 * 4096
    _, event = begin_to_read(late, kept[0])
    pool.give_back(kept[0], event)
    assert pool.lend(1) is None
    event.synchronize()
    lend(pool, 1)
    assert late.pinned_sizes == [4096] * 3


def test_idle_memory_of_other_sizes_makes_room() -> None:
    late = LateAccelerator()
    pool = PinnedPool(late, limit=4 * 4096)
    for nbytes in (4096, 2 * 4096):
        lent = lend(pool, nbytes)
        _, event = begin_to_read(late, lent)
        pool.give_back(lent, event)
        event.synchronize()
    lend(pool, 3 * 4096)
    assert late.pinned_sizes == [4096, 2 * 4096, 4 * 4096]
    assert pool.size == 4 * 4096


def test_without_pinned_memory_nothing_is_lent_and_nothing_counted() -> None:
    pool = PinnedPool(LateAccelerator(pins=False))
    assert pool.lend(1) is None
    assert pool.size == 0


def test_memory_pinned_in_inference_mode_is_good_outside() -> None:
    late = LateAccelerator()
    with torch.inference_mode():
        lent = lend(PinnedPool(late), 3)
    lent.memory.copy_(torch.ones(3))
    assert lent.memory.tolist() == [1, 1, 1]
