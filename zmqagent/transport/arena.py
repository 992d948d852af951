"""The memory that one worker lends to the others on its host; see `shared_memory`."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Hashable
from functools import partial
from typing import Any

import numpy as np

from zmqagent.exceptions import SendFailedError
from zmqagent.transport.shared_memory import DATA_BEGIN, MAX_SLOTS, PINNED, Reference, create, remove_pages, words_of
from zmqagent.transport.slots import Slots

__all__ = ["Arena"]

_NOT_LENT = (1 << 64) - 1
"""In the table of loans: no word ever holds it."""

_WARM_SECONDS = 10.0
"""Memory that was allocated within this time, or twice as long, stays with the arena when it is free."""

_TRIM_BYTES = 16 << 20
"""Given back to the kernel at a time, while nobody can allocate."""


class _Slot:
    """Memory in use, from its allocation on. It has a number while it is in use, and a ``loan`` from when it is lent on (else 0).
    ``buffer`` watches over the owner's own view of it."""

    __slots__ = ("buffer", "holder", "loan", "number", "offset", "taken")

    def __init__(self, number: int, offset: int, taken: int, holder: Hashable) -> None:
        self.number = number
        self.offset = offset
        self.taken = taken
        self.holder = holder
        self.loan = 0
        self.buffer: weakref.ref[Any] | None = None


class Arena:
    """See the module. All methods may be called from any thread. ``holder`` is whoever memory is meant for, or lent to.

    Args:
        size: of the memory to lend, in bytes. One holder gets at most half of it, so that one who keeps all that it is lent does
            not leave the others without.

    Raises:
        OSError: the process may not have that much.
    """

    def __init__(self, size: int) -> None:
        end = DATA_BEGIN + size // mmap.PAGESIZE * mmap.PAGESIZE
        self.fd = create(end)
        try:
            self._memory = mmap.mmap(self.fd, end)
        except BaseException:
            os.close(self.fd)
            raise
        self._owner = os.getpid()
        self._share = (end - DATA_BEGIN) // 2
        self._words = words_of(self._memory)
        self._address: int = self._words.ctypes.data
        # Protects all fields below but _buffers and _dropped; held for steps of arithmetic, and while pages are given back.
        self._lock = threading.Lock()
        self._is_closed = False
        self._slots = Slots(DATA_BEGIN, end, mmap.PAGESIZE)
        self._numbers = list(reversed(range(MAX_SLOTS)))
        self._next_loan = itertools.count(1)
        self._loans = np.full(MAX_SLOTS, _NOT_LENT, np.uint64)
        self._lent: dict[int, _Slot] = {}
        self._held: dict[Hashable, int] = {}
        self._touched = DATA_BEGIN  # nothing beyond has pages
        self._peaks = (DATA_BEGIN, DATA_BEGIN)  # of what was allocated in the last stretch of _WARM_SECONDS, and in this one
        self._stretch_ends = 0.0
        # By id, the slots whose memory this process has a view of. One step of the interpreter puts an item in or takes it out.
        self._buffers: dict[int, _Slot] = {}
        # Slots whose views have died before they were lent; filled by finalizers.
        self._dropped: deque[_Slot] = deque()

    def allocate(self, holder: Hashable, size: int) -> memoryview | None:
        """Writable memory of ``size`` > 0 bytes to be lent to ``holder``; it begins with a page. If the last view of it dies
        before it was lent, it is free again. None if there is no room, or ``holder`` has its share already."""
        if os.getpid() != self._owner:
            return None
        with self._lock:
            self._take_back()
            taken = self._slots.rounded(size)
            held = self._held.get(holder, 0) + taken
            if self._is_closed or not self._numbers or held > self._share:
                return None
            offset = self._slots.allocate(size)
            if offset is None:
                return None
            self._held[holder] = held
            slot = _Slot(self._numbers.pop(), offset, taken, holder)
            self._touched = max(self._touched, offset + taken)
            self._peaks = (self._peaks[0], max(self._peaks[1], offset + taken))
        # Views of a view refer to this array, so its life is theirs.
        array = np.frombuffer(self._memory, np.uint8, size, offset)
        slot.buffer = weakref.ref(array, partial(self._died, id(array)))
        self._buffers[id(array)] = slot
        return array.data

    def lend(self, frame: memoryview, holder: Hashable) -> Reference | None:
        """Lends to ``holder`` the memory that is all of ``frame``, which belongs to it from now on. None if `allocate` made none
        such.

        Raises:
            SendFailedError: it was lent before, so that what is in it now is another's.
        """
        slot = self._buffers.get(id(frame.obj))
        if slot is None or frame.nbytes != len(frame.obj):  # type: ignore[arg-type]
            return None
        with self._lock:
            if slot.loan:
                raise SendFailedError("shared memory can be sent once, and this has been lent already: copy the tensor again")
            slot.loan = next(self._next_loan)
            self._count(slot.holder, -slot.taken)
            self._count(holder, slot.taken)
            slot.holder = holder
            self._lent[slot.number] = slot
            self._loans[slot.number] = slot.loan
        return Reference(slot.number, slot.loan, slot.offset, frame.nbytes)

    def recall(self, frame: memoryview) -> None:
        """Undoes `lend`: the reference to all of ``frame`` went to nobody. Its bytes are what they were."""
        slot = self._buffers[id(frame.obj)]
        with self._lock:
            del self._lent[slot.number]
            self._loans[slot.number] = _NOT_LENT
            slot.loan = 0

    def is_back(self, reference: Reference) -> bool:
        """Whether what was lent by ``reference`` has been given back."""
        with self._lock:
            self._take_back()
            slot = self._lent.get(reference.slot)
            return slot is None or slot.loan != reference.loan

    def reclaim(self, holder: Hashable) -> None:
        """Takes back all that was lent to ``holder``, whose process has ended, but for what a process that was forked from it may
        still use."""
        with self._lock:
            for slot in [slot for slot in self._lent.values() if slot.holder == holder]:
                if not int(self._words[slot.number]) & PINNED:
                    self._free(slot)

    def holders(self) -> set[Hashable]:
        """Whom something is lent to."""
        with self._lock:
            self._take_back()
            return {slot.holder for slot in self._lent.values()}

    def in_use(self) -> int:
        """How many bytes are lent or about to be."""
        with self._lock:
            self._take_back()
            return sum(self._held.values())

    def trim(self, now: float) -> None:
        """Gives back to the kernel some of the pages that have been free for a while; to be called about once a second."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._take_back()
            if now >= self._stretch_ends:
                self._peaks = (self._peaks[1], DATA_BEGIN)
                self._stretch_ends = now + _WARM_SECONDS
            begin = max(*self._peaks, self._touched - _TRIM_BYTES)
            if self._is_closed or begin >= self._touched:
                return
            # The lock is kept: memory that is allocated meanwhile would be lost.
            for start, end in self._slots.gaps_between(begin, self._touched):
                remove_pages(self._address + start, end - start)
            self._touched = begin

    def close(self) -> None:
        """Nothing more is allocated, and the descriptor is closed. What was lent stays with its holders. Idempotent."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.fd)

    def _died(self, key: int, _: Any) -> None:
        """A finalizer: the views of some memory are gone."""
        slot = self._buffers.pop(key)
        if not slot.loan:
            self._dropped.append(slot)

    # The caller holds the lock.

    def _take_back(self) -> None:
        while self._dropped:
            self._free(self._dropped.popleft())
        for number in np.flatnonzero(self._words == self._loans):
            self._free(self._lent[int(number)])

    def _free(self, slot: _Slot) -> None:
        if self._lent.pop(slot.number, None) is not None:
            self._loans[slot.number] = _NOT_LENT
        self._slots.free(slot.offset)
        self._numbers.append(slot.number)
        self._count(slot.holder, -slot.taken)
        # What lies above may have been trimmed already.
        self._touched = max(self._touched, slot.offset + slot.taken)

    def _count(self, holder: Hashable, change: int) -> None:
        held = self._held.get(holder, 0) + change
        if held:
            self._held[holder] = held
        else:
            self._held.pop(holder, None)
