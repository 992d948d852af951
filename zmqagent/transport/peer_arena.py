"""What another worker on this host has lent to this one; see `shared_memory`.

Fork. What a process has borrowed when it forks is used by two processes from then on, each of which may write to it. It is mapped
anew as private, copy on write, so that neither sees what the other writes, and its slot is pinned: the owner never gets it back.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref

import numpy as np

from zmqagent.exceptions import ProtocolError
from zmqagent.transport.shared_memory import DATA_BEGIN, MAX_SLOTS, PINNED, Reference, check_seals, map_private, words_of

__all__ = ["PeerArena"]

_logger = logging.getLogger(__name__)


class PeerArena:
    """Another worker's arena. It lives as long as anything in it is used.

    Args:
        fd: the descriptor that came from the arena's owner; it belongs to this object from now on.

    Raises:
        ProtocolError: the descriptor is none of an arena.
        OSError: there is no room to map it.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._size = check_seals(fd)
            self._memory = mmap.mmap(fd, self._size)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self._words = words_of(self._memory)
        self._address: int = self._words.ctypes.data
        # By slot. Who takes an entry out, in one step of the interpreter, decides what becomes of the slot.
        self._borrowed: dict[int, Reference] = {}
        _arenas.add(self)

    def view(self, reference: Reference) -> memoryview:
        """The memory that was lent by ``reference``, writable; it goes back to its owner when the last view of it dies.

        Raises:
            ProtocolError: the arena has no such slot, or this process still uses it.
        """
        slot, loan, offset, size = reference
        is_inside = slot < MAX_SLOTS and DATA_BEGIN <= offset < self._size and 0 < size <= self._size - offset
        if not is_inside or offset % mmap.PAGESIZE or not 0 < loan < PINNED:
            raise ProtocolError(f"{reference} is no place in shared memory of {self._size} bytes")
        with _forking:
            if slot in self._borrowed:
                raise ProtocolError(f"{reference} arrived while {self._borrowed[slot]} was still in use")
            # Views of a view refer to this array, so its life is theirs.
            array = np.frombuffer(self._memory, np.uint8, size, offset)
            # It also keeps this arena, which the next one to look at the words needs. At exit the array may still be in use.
            weakref.finalize(array, self._give_back, slot).atexit = False
            self._borrowed[slot] = reference
        return array.data

    def _give_back(self, slot: int) -> None:
        """A finalizer. What is not in the table any more was pinned."""
        reference = self._borrowed.pop(slot, None)
        if reference is not None:
            self._words[slot] = reference.loan

    def _pin(self) -> None:
        """Before a fork, in the parent."""
        while self._borrowed:
            try:
                slot, reference = self._borrowed.popitem()
            except KeyError:
                return  # The last one was given back just now.
            self._words[slot] = reference.loan | PINNED
            size = -(-reference.size // mmap.PAGESIZE) * mmap.PAGESIZE
            try:
                map_private(self._address + reference.offset, size, self._fd, reference.offset)
            except OSError as error:
                _logger.warning("a process that is forked now shares a received tensor with this one: %s", error)


_arenas: weakref.WeakSet[PeerArena] = weakref.WeakSet()
# Held through a fork, and while something borrowed gets its entry: what has none when the process forks would not be pinned.
# Finalizers take no part in it.
_forking = threading.Lock()


def _before_fork() -> None:
    _forking.acquire()
    for arena in list(_arenas):
        arena._pin()


os.register_at_fork(before=_before_fork, after_in_parent=_forking.release, after_in_child=_forking.release)
