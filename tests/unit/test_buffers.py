"""`zmqagent.agent.buffers`: out-of-band buffers are frozen when they are sent, and writable when they arrive."""

from __future__ import annotations

import pickle
from pickle import PickleBuffer
from typing import Any

import numpy as np
import pytest

from zmqagent.agent.buffers import ALIGNMENT, SMALL, freeze_buffers, writable
from zmqagent.exceptions import NotPicklableError

LARGE = 2 * SMALL


def dump(value: Any) -> tuple[bytes, list[bytes | memoryview]]:
    buffers: list[PickleBuffer] = []
    return pickle.dumps(value, protocol=5, buffer_callback=buffers.append), freeze_buffers(buffers)


@pytest.mark.parametrize("size", [0, 3, LARGE])
@pytest.mark.parametrize("dtype", ["?", "i1", ">i4", "u8", "f2", "f8", "c16", "S5", "U3", "i4,f8"])
def test_arrays_of_every_dtype_travel_out_of_band_and_arrive_writable(dtype: str, size: int) -> None:
    array = np.zeros(size, dtype=dtype)
    array[1:2] = np.ones(1, dtype=dtype)
    payload, buffers = dump(array)
    assert len(payload) < 300
    assert sum(map(len, buffers)) == array.nbytes
    got = pickle.loads(payload, buffers=[writable(bytes(buffer)) for buffer in buffers])
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)
    assert got.flags.writeable
    assert got.flags.aligned


def test_arrays_in_column_order_keep_their_order() -> None:
    array = np.asfortranarray(np.arange(LARGE * 2.0).reshape(2, -1))
    payload, buffers = dump(array)
    got = pickle.loads(payload, buffers=map(writable, buffers))
    assert got.flags.f_contiguous
    assert np.array_equal(got, array)


@pytest.mark.parametrize("size", [3, LARGE])
def test_buffers_are_frozen_at_the_call(size: int) -> None:
    array = np.zeros(size)
    payload, buffers = dump(array)
    array[:] = 1
    assert not pickle.loads(payload, buffers=buffers).any()


def test_a_buffer_in_several_pieces_is_refused() -> None:
    with pytest.raises(NotPicklableError, match="must lie in one piece"):
        freeze_buffers([PickleBuffer(np.arange(10)[::2])])


@pytest.mark.parametrize(
    ("size", "shift", "read_only", "copied"),
    [(LARGE, 0, False, False), (LARGE, 1, False, True), (LARGE, 0, True, True), (SMALL, 0, False, True)],
)
def test_only_large_writable_aligned_buffers_are_used_as_they_are(size: int, shift: int, read_only: bool, copied: bool) -> None:
    room = np.arange(size + 128, dtype=np.uint8)
    begin = -room.ctypes.data % 64 + shift
    part = room[begin : begin + size]
    got = writable(part.data.toreadonly() if read_only else part.data)
    arrived = np.frombuffer(got, dtype=np.uint8)
    assert (arrived.ctypes.data != part.ctypes.data) == copied
    assert arrived.ctypes.data % ALIGNMENT == 0
    assert not got.readonly
    assert np.array_equal(arrived, part)
