"""An accelerator that does everything as late as it may: what a stream was given is done when somebody waits for it.

So a copy that nobody waits for has not happened, memory that is used again too early has other contents, and ``log`` tells what
happened in which order. Its tensors are those of `tests.support.fake_device`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LateAccelerator", "LateEvent"]

_GARBAGE = 0xAB

_Stream = tuple[torch.device, str]


class LateAccelerator:
    """Each device has a main stream, which is current at first, and a side stream.

    Args:
        pins: whether there is pinned memory.
        hands_over: whether there are side streams, and threads hand over work that is under way.
    """

    def __init__(self, *, pins: bool = True, hands_over: bool = True) -> None:
        self.log: list[str] = []
        self.pinned_sizes: list[int] = []
        self._pins = pins
        self._hands_over = hands_over
        self._given: dict[_Stream, list[Callable[[], Any]]] = {}
        self._done: dict[_Stream, int] = {}
        self._current: dict[torch.device, str] = {}

    def hands_over(self, device: torch.device) -> bool:
        return self._hands_over

    def pinned(self, nbytes: int) -> Tensor | None:
        if not self._pins:
            return None
        self.pinned_sizes.append(nbytes)
        return torch.full((nbytes,), _GARBAGE, dtype=torch.uint8)

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        if not self._hands_over:
            yield
            return
        self._current[device] = "side"
        yield
        del self._current[device]

    def start_copy(self, source: Tensor, destination: Tensor) -> None:
        device = source.device if source.device.type != "cpu" else destination.device
        self.give(device, f"copy from {source.device} to {destination.device}", lambda: destination.copy_(source))

    def record(self, device: torch.device) -> LateEvent:
        stream = self._stream(device)
        self.log.append(f"record on {_name(stream)}")
        return LateEvent(self, stream, len(self._given[stream]))

    def wait_for(self, event: LateEvent, device: torch.device) -> None:
        self.give(device, f"{_name(self._stream(device))} waits for {_name(event.stream)}", event.run)

    def note_use(self, tensor: Tensor) -> None:
        self.log.append(f"{_name(self._stream(tensor.device))} uses {tensor.numel()} bytes")

    def give(self, device: torch.device, what: str, work: Callable[[], Any]) -> None:
        """Gives ``work`` to the current stream of ``device``."""
        self.log.append(what)
        self._given.setdefault(self._stream(device), []).append(work)

    def run(self, stream: _Stream, until: int) -> None:
        """Does what comes before place ``until`` in ``stream``."""
        while (place := self._done.get(stream, 0)) < until:
            self._done[stream] = place + 1
            self._given[stream][place]()

    def has_done(self, stream: _Stream, until: int) -> bool:
        return self._done.get(stream, 0) >= until

    def _stream(self, device: torch.device) -> _Stream:
        return device, self._current.get(device, "main")


def _name(stream: _Stream) -> str:
    device, which = stream
    return f"{device} {which}"


@dataclass
class LateEvent:
    """A place in a stream. To wait for it is what makes the work before it happen."""

    accelerator: LateAccelerator
    stream: _Stream
    place: int

    def run(self) -> None:
        self.accelerator.run(self.stream, self.place)

    def query(self) -> bool:
        return self.accelerator.has_done(self.stream, self.place)

    def synchronize(self) -> None:
        self.accelerator.log.append(f"thread waits for {_name(self.stream)}")
        self.run()
