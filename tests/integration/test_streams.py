"""Copies to and from accelerators, on one whose copies are done as late as can be: when somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.integration.harness import run_ranks
from tests.support import fake_device
from zmqagent.agent.streams import ACCELERATOR
from zmqagent.agent.tensors import pack, unpack

_GARBAGE = 0xAB


class LateAccelerator:
    """Each device has one stream, which does nothing until an event in it is waited for. ``log`` tells what happened in order."""

    def __init__(self, *, pins: bool = True) -> None:
        self.log: list[str] = []
        self._pins = pins
        self._streams: dict[torch.device, list[Callable[[], Any]]] = {}

    def pinned(self, nbytes: int) -> Tensor | None:
        return torch.full((nbytes,), _GARBAGE, dtype=torch.uint8) if self._pins else None

    def start_copy(self, source: Tensor, destination: Tensor) -> None:
        device = source.device if source.device.type != "cpu" else destination.device
        self.give(device, f"copy from {source.device} to {destination.device}", lambda: destination.copy_(source))

    def record(self, device: torch.device) -> LateEvent:
        self.log.append(f"record on {device}")
        return LateEvent(self, device, list(self._streams[device]))

    def give(self, device: torch.device, what: str, work: Callable[[], Any]) -> None:
        """Gives ``work`` to the stream of ``device``."""
        self.log.append(what)
        self._streams.setdefault(device, []).append(work)

    def run(self, device: torch.device, until: list[Callable[[], Any]]) -> None:
        for work in until:
            if work in self._streams[device]:
                self._streams[device].remove(work)
                work()


@dataclass
class LateEvent:
    accelerator: LateAccelerator
    device: torch.device
    before: list[Callable[[], Any]] = field(default_factory=list)

    def synchronize(self) -> None:
        self.accelerator.log.append(f"wait for {self.device}")
        self.accelerator.run(self.device, self.before)


def views(frames: list[Any]) -> list[memoryview]:
    return [memoryview(frame) for frame in frames]


def device_of(number: int) -> torch.device:
    return torch.device("fake", number)


def _send(rank: int, meeting_point: str) -> None:
    fake_device.install()
    for pins in (True, False):
        late = LateAccelerator(pins=pins)
        made = torch.zeros(3000, device="fake:1")
        late.give(made.device, "work", lambda made=made: made.fill_(7))
        # A large one, two small ones that share a buffer, and a view that leaves most of its memory out.
        spread = torch.arange(40_000.0).to("fake:2").view(200, 200)[:, 3]
        sent = [made, torch.arange(3.0).to("fake:2"), spread, torch.ones(2)]
        descriptions, buffers = pack(sent, lambda device: torch.device("cpu"), late)
        copies = ["copy from fake:1 to cpu", *["copy from fake:2 to cpu"] * 2]
        events = ["record on fake:1", "record on fake:2", "wait for fake:1", "wait for fake:2"]
        assert late.log == ["work", *copies, *events]
        arrived = unpack(descriptions, views(buffers))
        assert torch.equal(arrived[0], torch.full((3000,), 7.0))
        assert all(torch.equal(there, here.cpu()) for there, here in zip(arrived[1:], sent[1:], strict=True))


def test_a_message_waits_once_a_device_for_the_work_and_the_copies_out_of_it() -> None:
    run_ranks(_send, 1)


def _next_of(targets: list[torch.device], device: torch.device) -> torch.device:
    return targets.pop()


def _receive(rank: int, meeting_point: str) -> None:
    fake_device.install()
    for pins in (True, False):
        late = LateAccelerator(pins=pins)
        sent = [torch.arange(3000.0), torch.arange(4.0), torch.arange(5), torch.ones(2)]
        targets = [torch.device("cpu"), device_of(1), device_of(2), device_of(1)]
        descriptions, buffers = pack(sent, partial(_next_of, targets))
        arrived = unpack(descriptions, views(buffers), late)
        copies = [f"copy from cpu to fake:{number}" for number in (1, 2, 1)]
        events = ["record on fake:1", "record on fake:2", "wait for fake:1", "wait for fake:2"]
        assert late.log == [*copies, *events]
        assert [str(tensor.device) for tensor in arrived] == ["fake:1", "fake:2", "fake:1", "cpu"]
        assert all(torch.equal(there.cpu(), here) for there, here in zip(arrived, sent, strict=True))


def test_tensors_are_handed_on_when_the_copies_to_their_devices_are_done() -> None:
    run_ranks(_receive, 1)


def _use_torchs_accelerator(rank: int, meeting_point: str) -> None:
    fake_device.install()
    source = torch.arange(8, dtype=torch.uint8)
    destination = torch.zeros(8, dtype=torch.uint8, device="fake:0")
    ACCELERATOR.start_copy(source, destination)
    ACCELERATOR.record(destination.device).synchronize()
    assert torch.equal(destination.cpu(), source)
    # An accelerator without pinned memory is asked once.
    assert ACCELERATOR.pinned(8) is None
    assert ACCELERATOR.pinned(8) is None


def test_torchs_accelerator_does_without_events_and_pinned_memory_where_there_are_none() -> None:
    run_ranks(_use_torchs_accelerator, 1)
