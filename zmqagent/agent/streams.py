"""Copies between accelerators and main memory, ordered by streams and events.

A copy out is given to the current stream of the device that it reads, and so comes behind the work that makes the tensor; a copy
in to that of the device that it writes. Nobody waits for a single copy: those of one message are under way together, through
pinned memory, and one event for each device, behind the last of them, tells when they are done. What else a device does is not
waited for.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["ACCELERATOR", "Accelerator", "Copies", "Event", "TorchAccelerator"]

_CPU = torch.device("cpu")


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Waits until all that comes before it in its stream is done."""


class Accelerator(Protocol):
    """What copies need of the machine's accelerators."""

    def pinned(self, nbytes: int) -> torch.Tensor | None:
        """Main memory that the accelerators read and write by themselves, from a pool; None if there is no such memory."""

    def start_copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Gives a copy to the current stream of whichever of both is on an accelerator; it may be done later."""

    def record(self, device: torch.device) -> Event:
        """An event behind all that the current stream of ``device`` has been given."""


class TorchAccelerator:
    """The accelerator that torch found. Threads that ask at the same time find the same answers."""

    def __init__(self) -> None:
        self._can_pin = True
        self._has_events: dict[str, bool] = {}

    def pinned(self, nbytes: int) -> torch.Tensor | None:
        """See `Accelerator`; the pool is torch's own, which gives memory out again when the copies that use it are done."""
        if not self._can_pin:
            return None
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=_CPU, pin_memory=True)
        except RuntimeError:
            # Not every type of accelerator has it, and then copies go through other memory.
            self._can_pin = False
            return None

    def start_copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """See `Accelerator`. On a type of device without events the copy is done when this returns."""
        device = source.device if destination.device.type == "cpu" else destination.device
        destination.copy_(source, non_blocking=self.knows_events(device))

    def record(self, device: torch.device) -> Event:
        """See `Accelerator`."""
        return _recorded(device) if self.knows_events(device) else _Done()

    def knows_events(self, device: torch.device) -> bool:
        """Whether work on such a device goes on while its caller does."""
        known = self._has_events.get(device.type)
        if known is None:
            try:
                _recorded(device).synchronize()
                known = True
            except RuntimeError:
                # Those of backends that are written in Python have none.
                known = False
            self._has_events[device.type] = known
        return known


def _recorded(device: torch.device) -> torch.Event:
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


class _Done:
    def synchronize(self) -> None:
        """Nothing is under way."""


ACCELERATOR = TorchAccelerator()


class Copies:
    """The copies that one message takes. Used by one thread, whose current streams they go to."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        # What copies under way read is kept for as long as they are.
        self._under_way: dict[torch.device, list[torch.Tensor]] = {}

    def start_out(self, view: torch.Tensor) -> memoryview:
        """The bytes of ``view``, which is on an accelerator, contiguous in main memory; they are there after `finish`."""
        nbytes = view.numel() * view.itemsize
        memory = self._accelerator.pinned(nbytes)
        if memory is None:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=_CPU)
        self._start(view.device, view, memory.view(view.dtype).view(view.size()))
        return memory.numpy().data

    def start_in(self, received: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The bytes of ``received``, which is in main memory, on an accelerator. What the calling thread's current stream does
        with them comes behind the copy; all else has to wait for `finish`."""
        staged = self._accelerator.pinned(received.numel())
        if staged is not None:
            received = staged.copy_(received)
        arrived = torch.empty(received.numel(), dtype=torch.uint8, device=device)
        self._start(device, received, arrived)
        return arrived

    def _start(self, device: torch.device, source: torch.Tensor, destination: torch.Tensor) -> None:
        self._accelerator.start_copy(source, destination)
        self._under_way.setdefault(device, []).append(source)

    def finish(self) -> None:
        """Waits until the copies are done."""
        for event in [self._accelerator.record(device) for device in self._under_way]:
            event.synchronize()
        self._under_way.clear()
