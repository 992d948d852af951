"""Memory that goes out and memory that comes in: frozen copies, and received buffers that may be written to.

Nothing here knows of messages or tensors' meaning. What is sent is copied once, at the call, so that whatever the user does to
the original afterwards changes neither what is sent nor what is sent again. Large copies release the GIL. They are made by one
thread: torch's own copies start a team of threads for each thread that calls, which then compete for the cores.

Received frames are ZeroMQ's own memory. They are writable and stay alive with any view of them, but small ones lie at odd
addresses within a larger block, which they would keep alive: those are copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pickle import PickleBuffer

import numpy as np
import torch

from zmqagent.agent.streams import CopiesOut
from zmqagent.agent.strides import contiguous
from zmqagent.exceptions import NotPicklableError

__all__ = [
    "ALIGNMENT",
    "CPU",
    "LENDABLE",
    "SMALL",
    "Allocate",
    "freeze_buffers",
    "freeze_bytes",
    "freeze_elements",
    "freeze_memory",
    "from_heap",
    "receive_bytes",
    "receive_tensor",
    "writable",
]

SMALL = 4096
"""Up to so many bytes a copy is cheaper than what it saves."""

LENDABLE = 128 << 10
"""From so many bytes on, memory that need not be copied again is worth being asked for. Measured: below, it saves less than the
15 microseconds that lending takes on both sides."""

ALIGNMENT = 8
"""What an address must be a multiple of if its use is unknown. Large ZeroMQ frames lie 8 bytes beyond multiples of 16."""


CPU = torch.device("cpu")
"""Where a default device set by the user must not reach."""

# Dtypes that every device can copy, to move the bits of any other dtype of the same size.
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


Allocate = Callable[[int], memoryview | None]
"""Gives writable memory of so many bytes that its receiver can use without a copy, or None if there is no such memory now."""


def from_heap(size: int) -> None:
    """An `Allocate` that has none."""


def freeze_bytes(
    storage: torch.UntypedStorage, begin: int, size: int, copies: CopiesOut, allocate: Allocate
) -> bytes | memoryview:
    """A copy, in main memory, of ``size`` bytes of a storage on any device; ``begin + size`` must not exceed it. What comes from
    an accelerator is there when ``copies`` have finished."""
    if storage.device.type != "cpu":
        return freeze_elements(storage, 1, (size,), (1,), begin, copies, allocate)
    if size <= SMALL:
        return ctypes.string_at(storage.data_ptr() + begin, size)
    return freeze_memory(storage.data_ptr() + begin, size, allocate)


def freeze_memory(address: int, size: int, allocate: Allocate) -> memoryview:
    """A copy of main memory."""
    copy, frame = _room(size, allocate)
    ctypes.memmove(copy.data_ptr(), address, size)
    return frame


def _room(size: int, allocate: Allocate) -> tuple[torch.Tensor, memoryview]:
    """Memory for a copy, as a tensor of bytes and as the frame that is sent."""
    frame = allocate(size) if size >= LENDABLE else None
    if frame is not None:
        return torch.frombuffer(frame, dtype=torch.uint8), frame
    copy = torch.empty(size, dtype=torch.uint8, device=CPU)
    return copy, copy.numpy().data


def freeze_elements(
    storage: torch.UntypedStorage,
    itemsize: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    copies: CopiesOut,
    allocate: Allocate,
) -> memoryview:
    """A contiguous copy, in main memory, of the elements that a strided view of a storage on any device has. What comes from an
    accelerator is there when ``copies`` have finished."""
    dtype = _RAW[itemsize]
    view = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, tuple(sizes), tuple(strides))
    if storage.device.type != "cpu":
        return copies.start(view)
    copy, frame = _room(view.numel() * itemsize, allocate)
    copy.view(dtype).view(view.size()).copy_(view)
    return frame


def freeze_buffers(buffers: Iterable[PickleBuffer]) -> list[bytes | memoryview]:
    """Flat copies of a pickle's out-of-band buffers (pickle protocol 5).

    Raises:
        NotPicklableError: a buffer's memory is in more than one piece.
    """
    return [_freeze(buffer) for buffer in buffers]


def _freeze(buffer: PickleBuffer) -> bytes | memoryview:
    try:
        raw = buffer.raw()
    except BufferError as error:
        raise NotPicklableError(f"an out-of-band buffer of a pickle must lie in one piece: {error}") from error
    if raw.nbytes <= SMALL:
        return bytes(raw)
    copy: memoryview = np.frombuffer(raw, dtype=np.uint8).copy().data
    return copy


def writable(buffer: memoryview | bytes) -> memoryview:
    """The same bytes in memory that may be written to and is aligned to `ALIGNMENT`; copied only where it must be."""
    view = memoryview(buffer)
    if view.nbytes <= SMALL:
        return memoryview(bytearray(view))
    array = np.frombuffer(view, dtype=np.uint8)
    if view.readonly or array.__array_interface__["data"][0] % ALIGNMENT:
        view = array.copy().data
    return view


def receive_bytes(buffer: memoryview, alignment: int) -> torch.Tensor:
    """The same bytes as a tensor: ``buffer``'s own memory if that is large, writable and aligned, else a copy in torch's own."""
    if buffer.nbytes > SMALL and not buffer.readonly:
        received = torch.frombuffer(buffer, dtype=torch.uint8)
        if received.data_ptr() % max(alignment, ALIGNMENT) == 0:
            return received
    copy = torch.empty(buffer.nbytes, dtype=torch.uint8, device=CPU)
    # A pointer into read-only memory is to be had from numpy only; for little, a copy of the bytes is cheaper.
    source = bytes(buffer) if buffer.nbytes <= SMALL else np.frombuffer(buffer, dtype=np.uint8).ctypes.data
    ctypes.memmove(copy.data_ptr(), source, buffer.nbytes)
    return copy


def receive_tensor(buffer: memoryview, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """`receive_bytes` as a contiguous tensor that has all of ``buffer``, which is as large as such a tensor."""
    size = buffer.nbytes
    if size <= SMALL:
        copy = torch.empty(sizes, dtype=dtype, device=CPU)
        ctypes.memmove(copy.data_ptr(), bytes(buffer), size)
        return copy
    storage = receive_bytes(buffer, dtype.itemsize).untyped_storage()
    return torch.empty(0, dtype=dtype, device=CPU).set_(storage, 0, sizes, contiguous(sizes))
