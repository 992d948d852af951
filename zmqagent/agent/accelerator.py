"""What the agent needs of the machine's accelerators, and the accelerator that torch found.

`Accelerator` is all that copies and staging know of streams, events and pinned memory, so that tests can take its place and
check the order of events on machines that have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch.futures import Future

__all__ = ["ACCELERATOR", "Accelerator", "Event", "TorchAccelerator", "current_streams"]

_CPU = torch.device("cpu")


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether all that comes before it in its stream is done."""

    def synchronize(self) -> None:
        """Waits until all that comes before it in its stream is done."""


class Accelerator(Protocol):
    """Streams, events and pinned memory. A thread's current stream of a device is what it gives that device's work to."""

    def hands_over(self, device: torch.device) -> bool:
        """Whether threads hand each other work on such a device that is not done yet: it has side streams and events, its
        memory notes which streams use it, and a `torch.futures.Future` can name it."""

    def pinned(self, nbytes: int) -> torch.Tensor | None:
        """New main memory that the accelerators read and write by themselves; None if there is no such memory."""

    def beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Makes another stream of ``device``, that nobody computes on, the calling thread's current one in the body. On a device
        that does not hand over nothing changes."""

    def start_copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Gives a copy to the current stream of whichever of both is on an accelerator; it may be done later."""

    def record(self, device: torch.device) -> Event:
        """An event behind all that the current stream of ``device`` has been given."""

    def wait_for(self, event: Event, device: torch.device) -> None:
        """Has what the current stream of ``device`` is given from now on come behind ``event``; nobody else waits."""

    def note_use(self, tensor: torch.Tensor) -> None:
        """Keeps the memory of ``tensor``, once that is freed, until its device's current stream has done what it was given."""


class TorchAccelerator:
    """The accelerator that torch found. Threads that ask at the same time find the same answers."""

    def __init__(self) -> None:
        self._can_pin = True
        self._has_events: dict[str, bool] = {}
        self._hands_over: dict[str, bool] = {}
        self._sides: dict[torch.device, torch.Stream] = {}

    def hands_over(self, device: torch.device) -> bool:
        """See `Accelerator`. Asked of a type of device for the first time, it tries all that this takes."""
        known = self._hands_over.get(device.type)
        if known is None:
            known = self._hands_over[device.type] = _does_hand_over(device)
        return known

    def pinned(self, nbytes: int) -> torch.Tensor | None:
        """See `Accelerator`."""
        if not self._can_pin:
            return None
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=_CPU, pin_memory=True)
        except RuntimeError:
            # Not every type of accelerator has it, and then copies go through other memory.
            self._can_pin = False
            return None

    def beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """See `Accelerator`. One stream a device serves all threads: its copies share the way to the device anyhow."""
        if not self.hands_over(device):
            return nullcontext()
        side = self._sides.get(device) or self._sides.setdefault(device, torch.Stream(device=device))
        # The same stream by another object: in it torch keeps what was current before, and threads that share one mix that up.
        return torch.Stream(stream_id=side.stream_id, device_index=side.device_index, device_type=side.device_type)

    def start_copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """See `Accelerator`. On a type of device without events the copy is done when this returns."""
        device = source.device if destination.device.type == "cpu" else destination.device
        destination.copy_(source, non_blocking=self.knows_events(device))

    def record(self, device: torch.device) -> Event:
        """See `Accelerator`."""
        return _recorded(device) if self.knows_events(device) else _Done()

    def wait_for(self, event: Event, device: torch.device) -> None:
        """See `Accelerator`."""
        torch.accelerator.current_stream(device).wait_event(event)  # type: ignore[arg-type]  # one of `record`

    def note_use(self, tensor: torch.Tensor) -> None:
        """See `Accelerator`."""
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))

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
    def query(self) -> bool:
        """Nothing is under way."""
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""


def _does_hand_over(device: torch.device) -> bool:
    try:
        future: Future[Any] = Future(devices=[device])
        # Without a tensor at first: where futures know nothing of streams, they may not know of the device's index either.
        future.set_result(None)
        future.then(lambda _: None).wait()
        with torch.Stream(device=device):
            tensor = torch.empty(1, dtype=torch.uint8, device=device)
            _recorded(device).synchronize()
        tensor.record_stream(torch.accelerator.current_stream(device))
    except (RuntimeError, ValueError):
        return False
    return True


def current_streams(devices: Sequence[torch.device]) -> AbstractContextManager[None]:
    """Makes the calling thread's current streams of ``devices`` current in a body that runs later, perhaps on another thread."""
    return _on([torch.accelerator.current_stream(device) for device in devices]) if devices else nullcontext()


@contextmanager
def _on(streams: Sequence[torch.Stream]) -> Iterator[None]:
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream)
        yield


ACCELERATOR = TorchAccelerator()
