"""Messages to and from a stream of bytes. Pure: no sockets, no threads.

A message is its number of frames and their sizes (`_COUNT`, `_SIZE` each, little-endian), then the frames. A size with the mark
`LENT` is that of a reference to shared memory, which is sent in place of a frame. A message of no frames is an invitation to
share memory, and a reference follows. What references mean is known elsewhere.

Short messages are read many at a time into one block of memory and copied out of it; a long one is read into memory of its own,
each large frame into a block of numpy's, which aligns it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from zmqagent.exceptions import ProtocolError
from zmqagent.transport.base import Frames
from zmqagent.wire.frames import DEFAULT_LIMITS, Limits

__all__ = ["BLOCK_BYTES", "LENT", "REFERENCE_BYTES", "StreamReader", "invitation", "prefix"]

BLOCK_BYTES = 1 << 16
"""How much is read at a time, and how long a message may be to be copied out of that."""

LENT = 1 << 63
"""Marks the size of a reference to shared memory."""

REFERENCE_BYTES = 32
"""The size of such a reference."""

_MAX_VIEWS = 64
"""Frames of a long message that one reading fills; the kernel takes up to 1,024 (IOV_MAX)."""

_COUNT = struct.Struct("<I")
_SIZE = struct.Struct("<Q")


@lru_cache(maxsize=64)
def _sizes(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


def prefix(sizes: Sequence[int]) -> bytes:
    """What goes before frames of ``sizes`` bytes, or references of ``sizes`` with the mark `LENT`."""
    return _COUNT.pack(len(sizes)) + _sizes(len(sizes)).pack(*sizes)


def invitation(reference: bytes) -> bytes:
    """An invitation to share memory, whole."""
    return _COUNT.pack(0) + reference


class StreamReader:
    """Takes messages out of one stream. Fill what `space` gives, then say by `took` how much that was.

    Args:
        on_invitation: what the reference in an invitation is handed to.
        view: gives the memory that a reference in place of a frame means.
        limits: that messages must not exceed.
    """

    def __init__(
        self,
        on_invitation: Callable[[memoryview], None],
        view: Callable[[memoryview], memoryview],
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._on_invitation = on_invitation
        self._view = view
        self._limits = limits
        self._block = memoryview(bytearray(BLOCK_BYTES))
        self._begin = self._end = 0  # what is in the block and no message yet
        self._long: list[memoryview] = []  # the frames of a long message
        self._lent: list[int] = []  # which of them are references
        self._unfilled: list[memoryview] = []  # what is to come of them, in reverse

    def space(self) -> list[memoryview]:
        """Where the next bytes of the stream go, in order; never empty."""
        if self._unfilled:
            return self._unfilled[: -_MAX_VIEWS - 1 : -1]
        return [self._block[self._end :]]

    def took(self, count: int) -> list[Frames]:
        """``count`` bytes, at least one, were put where `space` said. Returns the messages that are complete now.

        Raises:
            ProtocolError: this is no stream of messages, one of them exceeds the limits, or a reference means nothing. The stream
                is of no use any more.
        """
        if self._unfilled:
            return self._filled(count)
        self._end += count
        return self._take_from_block()

    def _filled(self, count: int) -> list[Frames]:
        unfilled = self._unfilled
        while unfilled and count >= unfilled[-1].nbytes:
            count -= unfilled.pop().nbytes
        if unfilled:
            unfilled[-1] = unfilled[-1][count:]
            return []
        whole, self._long = self._long, []
        return [self._resolved(whole, self._lent)]

    def _resolved(self, frames: list[memoryview], lent: list[int]) -> list[memoryview]:
        for i in lent:
            frames[i] = self._view(frames[i])
        return frames

    def _take_from_block(self) -> list[Frames]:
        messages: list[Frames] = []
        while (there := self._end - self._begin) >= _COUNT.size:
            begin = self._begin
            (count,) = _COUNT.unpack_from(self._block, begin)
            if not count:
                if there < _COUNT.size + REFERENCE_BYTES:
                    break
                self._begin += _COUNT.size + REFERENCE_BYTES
                self._on_invitation(self._block[self._begin - REFERENCE_BYTES : self._begin])
                continue
            head = _COUNT.size + count * _SIZE.size
            self._check(count, 0)
            if there < head:
                self._make_room(head)
                break
            sizes: Sequence[int] = _sizes(count).unpack_from(self._block, begin + _COUNT.size)
            body = sum(sizes)
            lent: list[int] = []
            if body >= LENT:
                sizes, lent = _without_marks(sizes)
                body = sum(sizes)
            self._check(count, body)
            if there < head + body and head + body > BLOCK_BYTES:
                self._lent = lent
                self._begin_long(sizes, begin + head)
                return messages
            if there < head + body:
                break
            # One copy for all frames, since the block is used again; it is the receiver's to write to.
            body_begin = begin + head
            self._begin = body_begin + body
            frames = _cut(memoryview(bytearray(self._block[body_begin : self._begin])), sizes)
            messages.append(self._resolved(frames, lent))
        self._compact()
        return messages

    def _begin_long(self, sizes: Sequence[int], begin: int) -> None:
        """From here on a message is read into memory of its own; what there is of it lies in the block from ``begin`` on."""
        self._long = [_memory(size) for size in sizes]
        self._unfilled = [frame for frame in reversed(self._long) if frame.nbytes]
        there = self._block[begin : self._end]
        self._begin = self._end = 0
        while there.nbytes:
            frame = self._unfilled.pop()
            part = min(frame.nbytes, there.nbytes)
            frame[:part] = there[:part]
            there = there[part:]
            if part < frame.nbytes:
                self._unfilled.append(frame[part:])

    def _make_room(self, size: int) -> None:
        """Sees to it that ``size`` bytes fit into the block."""
        if size > self._block.nbytes:
            block = memoryview(bytearray(size))
            there = self._end - self._begin
            block[:there] = self._block[self._begin : self._end]
            self._block, self._begin, self._end = block, 0, there

    def _compact(self) -> None:
        there = self._end - self._begin
        if there and self._begin:
            self._block[:there] = self._block[self._begin : self._end]
        self._begin, self._end = 0, there

    def _check(self, count: int, body: int) -> None:
        if not 0 < count <= self._limits.frames or body > self._limits.message_bytes:
            raise ProtocolError(
                f"a message of {count} frames and {body} bytes arrived; the limits are {self._limits.frames} frames and "
                f"{self._limits.message_bytes} bytes"
            )


def _without_marks(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The sizes without marks, and which of them had one."""
    return [size & ~LENT for size in sizes], [i for i, size in enumerate(sizes) if size & LENT]


def _cut(body: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    frames = []
    begin = 0
    for size in sizes:
        frames.append(body[begin : begin + size])
        begin += size
    return frames


def _memory(size: int) -> memoryview:
    """Fresh memory for one frame; that of a large one is aligned, and not cleared in vain."""
    memory: memoryview = memoryview(bytearray(size)) if size < BLOCK_BYTES else np.empty(size, np.uint8).data
    return memory
