"""Copies to and from accelerators, on one whose copies are done as late as can be: when somebody waits for them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tests.integration.harness import run_ranks
from tests.support import fake_device
from tests.support.late_accelerator import LateAccelerator
from zmqagent.agent.accelerator import ACCELERATOR
from zmqagent.agent.pinned import PinnedPool
from zmqagent.agent.streams import CopiesOut
from zmqagent.agent.tensors import pack, unpack


def views(frames: list[Any]) -> list[memoryview]:
    return [memoryview(frame) for frame in frames]


def device_of(number: int) -> torch.device:
    return torch.device("fake", number)


def _to_cpu(device: torch.device) -> str:
    return "cpu"


def _send(rank: int, meeting_point: str) -> None:
    fake_device.install()
    for pins in (True, False):
        late = LateAccelerator(pins=pins)
        made = torch.zeros(3000, device="fake:1")
        late.give(made.device, "work", lambda made=made: made.fill_(7))
        # A large one, two small ones that share a buffer, and a view that leaves most of its memory out.
        spread = torch.arange(40_000.0).to("fake:2").view(200, 200)[:, 3]
        sent = [made, torch.arange(3.0).to("fake:2"), spread, torch.ones(2)]
        descriptions, buffers = pack(sent, _to_cpu, PinnedPool(late))
        copies = ["copy from fake:1 to cpu", *["copy from fake:2 to cpu"] * 2]
        records = ["record on fake:1 main", "record on fake:2 main"]
        waits = ["thread waits for fake:1 main", "thread waits for fake:2 main"]
        assert late.log == ["work", *copies, *records, *waits]
        arrived = unpack(descriptions, views(buffers))
        assert torch.equal(arrived[0], torch.full((3000,), 7.0))
        assert all(torch.equal(there, here.cpu()) for there, here in zip(arrived[1:], sent[1:], strict=True))


def test_a_message_waits_once_a_device_for_the_work_and_the_copies_out_of_it() -> None:
    run_ranks(_send, 1)


def _send_twice(rank: int, meeting_point: str) -> None:
    fake_device.install()
    late = LateAccelerator()
    pool = PinnedPool(late)
    first, second = (torch.full((3000,), value, device="fake:0") for value in (1.0, 2.0))
    descriptions, kept = pack([first], _to_cpu, pool)
    pack([second], _to_cpu, pool)
    # The bytes of the second message have been dropped, those of the first are still to be sent.
    pack([second], _to_cpu, pool)
    assert late.pinned_sizes == [16384, 16384]
    assert torch.equal(unpack(descriptions, views(kept))[0], torch.ones(3000))


def test_what_is_to_be_sent_keeps_its_pinned_memory() -> None:
    run_ranks(_send_twice, 1)


def _fail_to_send(rank: int, meeting_point: str) -> None:
    fake_device.install()
    late = LateAccelerator()
    pool = PinnedPool(late)
    made = torch.ones(3000, device="fake:0")
    with contextlib.suppress(KeyError), CopiesOut(pool) as copies:
        copies.start(made)
        # Nobody has the bytes any more, and the device has not yet written them.
        pool.lend(12000)
        raise KeyError
    assert late.pinned_sizes == [16384, 16384]
    assert late.log[-1] == "thread waits for fake:0 main"


def test_pinned_memory_of_a_message_that_fails_is_kept_until_the_device_has_written_to_it() -> None:
    run_ranks(_fail_to_send, 1)


def _packed(sent: list[torch.Tensor], *targets: str) -> tuple[Any, list[memoryview]]:
    """A message whose tensors are for ``targets``."""
    # Each tensor comes from a device of its own, so that a map can say where it goes.
    here = [device_of(number) for number in range(len(sent))]
    device_map = dict(zip(here, targets, strict=True))
    moved = [tensor.to(device) for tensor, device in zip(sent, here, strict=True)]
    descriptions, buffers = pack(moved, device_map.__getitem__)
    return descriptions, views(buffers)


SENT = [torch.arange(3000.0), torch.arange(4.0), torch.arange(5), torch.ones(2)]
TARGETS = ("fake:1", "fake:2", "fake:1", "cpu")


def _receive(rank: int, meeting_point: str) -> None:
    fake_device.install()
    late = LateAccelerator()
    pool = PinnedPool(late)
    late.give(device_of(1), "earlier work", lambda: None)
    packed = _packed(SENT, *TARGETS)
    arrived = unpack(*packed, pool)
    assert [str(tensor.device) for tensor in arrived] == ["fake:1", "fake:2", "fake:1", "cpu"]
    assert late.log == [
        "earlier work",
        *(f"copy from cpu to fake:{number}" for number in (1, 2, 1)),
        "record on fake:1 side",
        "fake:1 main waits for fake:1 side",
        "fake:1 main uses 12000 bytes",
        "fake:1 main uses 40 bytes",
        "record on fake:2 side",
        "fake:2 main waits for fake:2 side",
        "fake:2 main uses 16 bytes",
    ]
    # Other messages come through while these copies are under way: their pinned memory is other memory.
    others = unpack(*_packed([torch.full((3000,), 5.0), torch.ones(4), torch.ones(5)], *["fake:1"] * 3), pool)
    used: list[bool] = []
    for number in (1, 2):
        late.give(device_of(number), "use", lambda: used.append(True))
        late.record(device_of(number)).synchronize()
    assert used == [True, True]
    assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, SENT, strict=True))
    assert torch.equal(others[0].cpu(), torch.full((3000,), 5.0))
    assert len(late.pinned_sizes) == 6
    unpack(*packed, pool)
    assert len(late.pinned_sizes) == 6


def test_what_the_receiver_computes_waits_for_the_copies_and_they_for_nothing() -> None:
    run_ranks(_receive, 1)


def _receive_whole(rank: int, meeting_point: str) -> None:
    fake_device.install()
    for late in (LateAccelerator(hands_over=False), LateAccelerator(pins=False), LateAccelerator(pins=False, hands_over=False)):
        arrived = unpack(*_packed(SENT, *TARGETS), PinnedPool(late))
        # Where the copy reads what arrived, that must not be gone before; and without side streams nobody else would wait.
        assert sum(entry.startswith("thread waits") for entry in late.log) == 2
        assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, SENT, strict=True))


def test_the_thread_waits_where_nobody_else_would_or_where_memory_is_not_staged() -> None:
    run_ranks(_receive_whole, 1)


def _receive_sparse(rank: int, meeting_point: str) -> None:
    fake_device.install()
    late = LateAccelerator(hands_over=False)
    sent = torch.eye(3).to_sparse()
    build = torch.sparse_coo_tensor
    seen: list[str] = []

    # No operator of sparse tensors exists for the fake device.
    def build_on_cpu(indices: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.extend([*late.log, *map(str, (indices.device, values.device))])
        return build(indices.cpu(), values.cpu(), *args, **kwargs)

    torch.sparse_coo_tensor = build_on_cpu
    descriptions, buffers = pack([sent], lambda device: str(device_of(0)))
    (arrived,) = unpack(descriptions, views(buffers), PinnedPool(late))
    assert torch.equal(arrived.to_dense(), torch.eye(3))
    assert seen[-3:] == ["thread waits for fake:0 main", "fake:0", "fake:0"]


def test_a_tensor_whose_build_looks_at_its_data_is_built_behind_the_copies() -> None:
    run_ranks(_receive_sparse, 1)


def _use_torchs_accelerator(rank: int, meeting_point: str) -> None:
    fake_device.install()
    source = torch.arange(8, dtype=torch.uint8)
    destination = torch.zeros(8, dtype=torch.uint8, device="fake:3")
    # Its futures cannot run callbacks, for want of a pool of streams.
    assert not ACCELERATOR.hands_over(destination.device)
    with ACCELERATOR.beside(destination.device):
        ACCELERATOR.start_copy(source, destination)
        event = ACCELERATOR.record(destination.device)
    assert event.query()
    event.synchronize()
    assert torch.equal(destination.cpu(), source)
    # An accelerator without pinned memory is asked once.
    assert ACCELERATOR.pinned(8) is None
    assert ACCELERATOR.pinned(8) is None


def test_torchs_accelerator_does_without_streams_and_pinned_memory_where_there_are_none() -> None:
    run_ranks(_use_torchs_accelerator, 1)
