"""Memory that passes between the processes of one host: what an `Arena` and the `PeerArena` on the other side agree on.

A worker owns one arena and lends it out in slots. The sender copies a tensor once, into a slot; the receiver's tensor is that
memory. An arena is one memfd, which has no name: nothing is left of it once the processes that map it have ended, however they
end. Its size is sealed, so that nobody can shrink it under a reader. The kernel provides pages as they are first written to, and
they count towards a memory limit like any others. Where that is exceeded the kernel ends a process, as it does for ordinary
memory; no error is to be had instead, also not by reserving the pages beforehand.

How a slot comes back. At the arena's begin lies one word for each slot. The receiver's finalizer stores the loan's number there,
which takes no lock and no message; the owner compares the words with the loans under way whenever it is asked for memory. Loans
are numbered through, so that the word of an earlier loan means nothing.

The workers of a group trust each other to keep to their slots: whoever maps an arena can write to all of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zmqagent.exceptions import ProtocolError

__all__ = [
    "DATA_BEGIN",
    "MAX_SLOTS",
    "PINNED",
    "Reference",
    "check_seals",
    "create",
    "is_supported",
    "map_private",
    "remove_pages",
    "words_of",
]

MAX_SLOTS = 4096
"""How many slots an arena may have in use."""

DATA_BEGIN = -(-MAX_SLOTS * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
"""Where the slots begin, behind the words."""

PINNED = 1 << 63
"""Set in the word of a slot that will never come back: a process that had borrowed it has forked. Above all loan numbers."""

_SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_MAP_FIXED = 0x10  # mmap(2); the same on all of Linux's architectures but two
_MAP_FAILED = ctypes.c_void_p(-1).value
_REFERENCE = struct.Struct("<4Q")


class Reference(NamedTuple):
    """What is sent in place of the bytes in a slot. ``loan`` is this loan's number; ``offset`` and ``size`` are bytes."""

    slot: int
    loan: int
    offset: int
    size: int

    def pack(self) -> bytes:
        """The form in which it is sent."""
        return _REFERENCE.pack(*self)

    @classmethod
    def unpack(cls, data: Any) -> Reference:
        """What `pack` was called on.

        Raises:
            ProtocolError: something else made ``data``.
        """
        try:
            return cls(*_REFERENCE.unpack(data))
        except struct.error as error:
            raise ProtocolError(f"a reference to shared memory has {_REFERENCE.size} bytes: {error}") from error


def is_supported() -> bool:
    """Whether this system has memory of this kind. It is Linux's own."""
    return hasattr(os, "memfd_create") and hasattr(mmap, "MADV_REMOVE") and all(hasattr(fcntl, seal) for seal in _SEALS)


def create(size: int) -> int:
    """The descriptor of fresh memory, whose size cannot change. No page of it is taken yet.

    Raises:
        OSError: the process may not have that much, or has no descriptor left.
    """
    fd = os.memfd_create("zmqagent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _all_seals())
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_seals(fd: int) -> int:
    """The size of memory that another process made by `create`.

    Raises:
        ProtocolError: it was made otherwise, and might shrink while it is read.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise ProtocolError(f"a descriptor arrived that is no shared memory: {error.strerror}") from error
    if seals & _all_seals() != _all_seals() or size < DATA_BEGIN:
        raise ProtocolError(f"shared memory of {size} bytes with seals {seals:#x} arrived, whose size is not certain")
    return size


def _all_seals() -> int:
    seals = 0
    for seal in _SEALS:
        seals |= getattr(fcntl, seal)
    return seals


def words_of(memory: mmap.mmap) -> npt.NDArray[np.uint64]:
    """The words of an arena, one for each slot."""
    return np.frombuffer(memory, np.uint64, MAX_SLOTS)


def remove_pages(address: int, size: int) -> None:
    """Gives whole pages of shared memory back to the kernel; they read as zeros afterwards. Takes about 0.2 ms a megabyte,
    without the GIL.

    Raises:
        OSError: the kernel says no.
    """
    if _libc.madvise(address, size, mmap.MADV_REMOVE):
        _raise("madvise")


def map_private(address: int, size: int, fd: int, offset: int) -> None:
    """Puts a private mapping of the same pages in place of a shared one: what is written there from now on stays in this process,
    and in one that is forked from it.

    Raises:
        OSError: the kernel says no.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, size, protection, mmap.MAP_PRIVATE | _MAP_FIXED, fd, offset) == _MAP_FAILED:
        _raise("mmap")


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
