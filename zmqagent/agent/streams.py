"""Copies between accelerators and main memory, ordered by streams and events.

A copy out is given to the current stream of the device that it reads, and so comes behind the work that makes the tensor; its
message leaves when the copies out for it are done. A copy in is given to a stream of its own, so that it neither waits for what
the device computes nor holds that up; the receiving thread's current stream waits for it, and the thread does not. In both
directions the copies of one message are under way together, through pinned memory, and one event for each device, behind the
last of them, tells when they are done. A device as a whole is never waited for.
"""

from __future__ import annotations

import ctypes
from types import TracebackType

import torch

from zmqagent.agent.pinned import Lent, PinnedPool

__all__ = ["CopiesIn", "CopiesOut"]

_CPU = torch.device("cpu")


class CopiesOut:
    """The copies that a message takes on its way out. Used by one thread, as a context manager, whose end waits for them."""

    def __init__(self, pool: PinnedPool) -> None:
        self._pool = pool
        self._accelerator = pool.accelerator
        # What copies under way read and write is kept for as long as they are.
        self._under_way: dict[torch.device, list[object]] = {}

    def __enter__(self) -> CopiesOut:
        return self

    def start(self, view: torch.Tensor) -> memoryview:
        """The bytes of ``view``, which is on an accelerator, contiguous in main memory; they are there after `finish`."""
        nbytes = view.numel() * view.itemsize
        lent = self._pool.lend(nbytes)
        memory = torch.empty(nbytes, dtype=torch.uint8, device=_CPU) if lent is None else lent.memory
        frozen = memory.numpy().data if lent is None else self._pool.bytes_of(lent)
        self._under_way.setdefault(view.device, []).append((view, frozen))
        self._accelerator.start_copy(view, memory.view(view.dtype).view(view.size()))
        return frozen

    def finish(self) -> None:
        """Waits until the copies are done."""
        for event in [self._accelerator.record(device) for device in self._under_way]:
            event.synchronize()
        self._under_way.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()


class CopiesIn:
    """The copies that a message takes on its way in. Used by one thread, as a context manager: what the current streams of that
    thread are given after its end comes behind the copies. On devices that do not hand over, they are done then."""

    def __init__(self, pool: PinnedPool) -> None:
        self._pool = pool
        self._accelerator = pool.accelerator
        # By device: what each copy reads, and what it writes.
        self._under_way: dict[torch.device, list[tuple[Lent | torch.Tensor, torch.Tensor]]] = {}

    def __enter__(self) -> CopiesIn:
        return self

    def start(self, received: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The bytes of ``received``, which is in main memory, on an accelerator; to be used after the end."""
        with self._accelerator.beside(device):
            # Memory of the side stream: that of another would have to wait until that stream has done with it.
            arrived = torch.empty(received.numel(), dtype=torch.uint8, device=device)
            lent = self._pool.lend(received.numel())
            self._under_way.setdefault(device, []).append((received if lent is None else lent, arrived))
            if lent is not None:
                ctypes.memmove(lent.memory.data_ptr(), received.data_ptr(), received.numel())
                received = lent.memory
            self._accelerator.start_copy(received, arrived)
        return arrived

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for device, copies in self._under_way.items():
            with self._accelerator.beside(device):
                event = self._accelerator.record(device)
            lent = [source for source, _ in copies if isinstance(source, Lent)]
            for each in lent:
                self._pool.give_back(each, event)
            hands_over = self._accelerator.hands_over(device)
            if not hands_over or len(lent) < len(copies):
                # Ordinary memory is the sender's, or torch's, to use again as soon as nobody refers to it.
                event.synchronize()
            if hands_over:
                self._accelerator.wait_for(event, device)
                for _, arrived in copies:
                    self._accelerator.note_use(arrived)
        self._under_way.clear()
