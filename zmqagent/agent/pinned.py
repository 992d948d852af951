"""Pinned memory that bytes pass through between main memory and accelerators, from a pool.

To pin memory takes far longer than to copy through it, so buffers are kept and lent again: one that a device reads when the event
behind that copy is done, one that a device has written to when nobody holds its bytes any more. Their sizes are powers of two.
All together stay below a limit; beyond it copies go through ordinary memory.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from queue import SimpleQueue

import torch

from zmqagent.agent.accelerator import ACCELERATOR, Accelerator, Event

__all__ = ["LIMIT", "PINNED", "Lent", "PinnedPool"]

LIMIT = 256 << 20
"""Bytes that a process pins at most."""

_SMALLEST = 4096
"""Bytes of the smallest buffer: the unit in which memory is pinned."""


class Lent:
    """Pinned memory on loan. Whoever has it calls one of `PinnedPool.give_back` and `PinnedPool.bytes_of`, once."""

    __slots__ = ("block", "memory")

    def __init__(self, block: torch.Tensor, nbytes: int) -> None:
        self.block = block
        self.memory = block[:nbytes]


class PinnedPool:
    """The pool of one process. All methods may be called from any thread.

    Args:
        accelerator: where the memory comes from.
        limit: bytes that are pinned at most.
    """

    def __init__(self, accelerator: Accelerator, limit: int = LIMIT) -> None:
        self.accelerator = accelerator
        self._limit = limit
        # Protects the three below; held for single steps, never while memory is pinned or a copy is waited for.
        self._lock = threading.Lock()
        self._idle: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._read: list[tuple[Event, torch.Tensor]] = []
        self._size = 0
        # Filled by finalizers, which may run in the middle of anything: they do nothing else.
        self._let_go: SimpleQueue[torch.Tensor] = SimpleQueue()

    @property
    def size(self) -> int:
        """Bytes that are pinned now, lent or not."""
        return self._size

    def lend(self, nbytes: int) -> Lent | None:
        """``nbytes`` of pinned memory; None if the limit is reached or there is no such memory."""
        size = max(_SMALLEST, 1 << (nbytes - 1).bit_length())
        with self._lock:
            self._collect()
            if self._idle[size]:
                return Lent(self._idle[size].pop(), nbytes)
            if not self._make_room(size):
                return None
            self._size += size
        # Whoever is first to send may do so in inference mode, and those after it outside could not write to such memory.
        with torch.inference_mode(False):
            block = self.accelerator.pinned(size)
        if block is None:
            with self._lock:
                self._size -= size
            return None
        return Lent(block, nbytes)

    def give_back(self, lent: Lent, event: Event) -> None:
        """Takes memory back that a device reads; it is lent again once ``event``, behind that copy, is done."""
        with self._lock:
            self._read.append((event, lent.block))

    def bytes_of(self, lent: Lent) -> memoryview:
        """The bytes of memory that a device has written to. The memory is lent again when nobody has a view of them any more."""
        array = lent.memory.numpy()
        weakref.finalize(array, self._let_go.put, lent.block).atexit = False
        return array.data

    def _collect(self) -> None:
        """Makes idle what is no longer in use."""
        while not self._let_go.empty():
            self._rest(self._let_go.get())
        under_way = []
        for event, block in self._read:
            if event.query():
                self._rest(block)
            else:
                under_way.append((event, block))
        self._read = under_way

    def _rest(self, block: torch.Tensor) -> None:
        self._idle[block.numel()].append(block)

    def _make_room(self, size: int) -> bool:
        """Gives up idle buffers, large ones first, until ``size`` more bytes fit below the limit; False if they never do."""
        for blocks in [self._idle[kept] for kept in sorted(self._idle, reverse=True)]:
            while blocks and self._size + size > self._limit:
                self._size -= blocks.pop().numel()
        return self._size + size <= self._limit


PINNED = PinnedPool(ACCELERATOR)
