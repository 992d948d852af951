"""Tensors on their way in: nothing is believed that was sent.

`Incoming` checks all descriptions of one message against its buffers, then takes its memory to where it belongs, and only then
builds the first tensor. torch itself checks what needs the data: the indices of sparse tensors, the scales of quantized ones.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from zmqagent.agent.buffers import CPU, receive_bytes, receive_tensor
from zmqagent.agent.pinned import PinnedPool
from zmqagent.agent.streams import CopiesIn
from zmqagent.agent.strides import extent
from zmqagent.agent.tensor_kinds import (
    COALESCED,
    CONJUGATE,
    DTYPES,
    LAYOUTS,
    NEGATIVE,
    PLAIN_DTYPES,
    QUANTIZED_DTYPES,
    REQUIRES_GRAD,
    Kind,
)
from zmqagent.exceptions import ProtocolError
from zmqagent.wire.types import MAX_INT, shown

__all__ = ["Builder", "Incoming"]

Builder = Callable[[], torch.Tensor]
_T = TypeVar("_T")

# torch's own limit for most operations (TensorIterator); a shape beyond it is of no use.
_MAX_DIMENSIONS = 64


class _Piece(NamedTuple):
    """Memory that tensors may share: so many bytes of a buffer, to lie on a device."""

    buffer: int
    start: int
    size: int
    device: str


class _Strided(NamedTuple):
    """A strided tensor that has been checked; ``piece`` is None if it has no elements."""

    dtype: torch.dtype
    flags: int
    device: torch.device
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    piece: _Piece | None


class Incoming:
    """The tensors of one message on their way in. `check` every description, then `check_rest`, `place` and run the builders."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._unclaimed = [buffer.nbytes for buffer in buffers]
        self._alignments: dict[_Piece, int] = {}
        self._storages: dict[_Piece, torch.UntypedStorage] = {}

    def check(self, description: Any) -> Builder:
        """What will build the tensor that ``description`` means.

        Raises:
            ProtocolError: it means none, or not with these buffers.
        """
        kind = description[0] if type(description) is tuple and description else None
        check = _CHECKS.get(kind) if type(kind) is int else None
        if check is None:
            raise ProtocolError(f"tensor kind {shown(kind)} is unknown to this version of zmqagent")
        return check(self, description)

    def check_rest(self) -> None:
        """Raises `ProtocolError` if more bytes came than the tensors that were checked consist of."""
        left = sum(self._unclaimed)
        if left:
            raise ProtocolError(f"{left} bytes arrived that belong to no tensor")

    def place(self, pool: PinnedPool) -> None:
        """Takes what belongs to the tensors that were checked to where it is to lie. Builders run behind the copies: some of them
        look at the data."""
        if not self._alignments:
            return
        with CopiesIn(pool) as copies:
            for piece, alignment in self._alignments.items():
                received = receive_bytes(self._buffers[piece.buffer][piece.start : piece.start + piece.size], alignment)
                device = _device(piece.device)
                placed = received if device == CPU else copies.start(received, device)
                self._storages[piece] = placed.untyped_storage()

    def _dense(self, description: Any) -> Builder:
        strided = self._strided(description, DTYPES, REQUIRES_GRAD | CONJUGATE | NEGATIVE)
        if strided.dtype is torch.complex32:
            return lambda: _without_first_warning("complex32", lambda: self._build(strided))
        return lambda: self._build(strided)

    def _plain(self, description: Any) -> Builder:
        name, flags, sizes, buffer, start = _take(description, 5)
        dtype = _dtype(name, PLAIN_DTYPES)
        _check_flags(flags, REQUIRES_GRAD, dtype)
        size = _check_sizes(sizes) * dtype.itemsize
        _require(_natural((buffer, start)), "places in buffers are not negative")
        if not size:
            return lambda: _with_grad(torch.empty(sizes, dtype=dtype, device=CPU), flags)
        self._check_place(buffer, start, size)
        self._claim(buffer, size)
        memory = self._buffers[buffer][start : start + size]
        return lambda: _with_grad(receive_tensor(memory, dtype, sizes), flags)

    def _meta(self, description: Any) -> Builder:
        name, flags, sizes, strides = _take(description, 4)
        dtype = _dtype(name, DTYPES)
        _check_flags(flags, REQUIRES_GRAD)
        _check_sizes(sizes)
        _check_strides(sizes, strides)
        _require(extent(sizes, strides) * dtype.itemsize <= MAX_INT, "sizes have a limit")
        return lambda: _with_grad(torch.empty_strided(sizes, strides, dtype=dtype, device="meta"), flags)

    def _coo(self, description: Any) -> Builder:
        flags, sizes, indices, values = _take(description, 4)
        _check_flags(flags, REQUIRES_GRAD | COALESCED)
        _check_sizes(sizes)
        i, v = self._index(indices), self._part(values)
        return lambda: _with_grad(
            torch.sparse_coo_tensor(
                self._build(i), self._build(v), sizes, is_coalesced=bool(flags & COALESCED), check_invariants=True
            ),
            flags,
        )

    def _compressed(self, description: Any) -> Builder:
        name, flags, sizes, compressed, plain, values = _take(description, 6)
        layout = LAYOUTS.get(name) if type(name) is str else None
        if layout is None:
            raise ProtocolError(f"sparse layout {shown(name)} is unknown to this version of zmqagent")
        _check_flags(flags, REQUIRES_GRAD)
        _check_sizes(sizes)
        c, p, v = self._index(compressed), self._index(plain), self._part(values)

        def build() -> torch.Tensor:
            parts = self._build(c), self._build(p), self._build(v)
            return torch.sparse_compressed_tensor(*parts, sizes, layout=layout, check_invariants=True)

        return lambda: _with_grad(_without_first_warning("compressed", build), flags)

    def _per_tensor(self, description: Any) -> Builder:
        data, scale, zero_point = _take(description, 3)
        _require(type(scale) is float and type(zero_point) is int, "a quantized tensor has a scale and a zero point")
        strided = self._part(data, QUANTIZED_DTYPES)

        def build() -> torch.Tensor:
            empty = torch._empty_affine_quantized(
                (0,), scale=scale, zero_point=zero_point, dtype=strided.dtype, device=strided.device
            )
            return self._fill(empty, strided)

        return lambda: _without_first_warning("quantized", build)

    def _per_channel(self, description: Any) -> Builder:
        data, axis, scales, zero_points = _take(description, 4)
        strided = self._part(data, QUANTIZED_DTYPES)
        _require(type(axis) is int and 0 <= axis < len(strided.sizes), "the axis of a quantized tensor is one of its dimensions")
        s, z = self._index(scales), self._index(zero_points)
        channels = (strided.sizes[axis],)
        _require(s.sizes == channels and z.sizes == channels, "a quantized tensor has a scale and a zero point for each channel")
        # Memory comes later; only the axis must be there for torch to compare it with the scales.
        sizes = [size if dimension == axis else 0 for dimension, size in enumerate(strided.sizes)]

        def build() -> torch.Tensor:
            empty = torch._empty_per_channel_affine_quantized(
                sizes, scales=self._build(s), zero_points=self._build(z), axis=axis, dtype=strided.dtype, device=strided.device
            )
            return self._fill(empty, strided)

        return lambda: _without_first_warning("quantized", build)

    def _part(self, description: Any, dtypes: Mapping[str, torch.dtype] = DTYPES) -> _Strided:
        """A strided part of a tensor of another kind."""
        _require(type(description) is tuple and description[:1] == (Kind.DENSE,), "its parts are strided")
        return self._strided(description, dtypes, CONJUGATE | NEGATIVE if dtypes is DTYPES else 0)

    def _index(self, description: Any) -> _Strided:
        """A part whose elements torch goes through one by one, so that each must have arrived. (Those of other parts may lie in
        one place, however many they are: ``expand`` makes such tensors.)"""
        part = self._part(description)
        arrived = part.piece.size if part.piece is not None else 0
        _require(math.prod(part.sizes) * part.dtype.itemsize <= arrived, "indices and scales do not overlap in memory")
        return part

    def _strided(self, description: Any, dtypes: Mapping[str, torch.dtype], allowed_flags: int) -> _Strided:
        name, flags, device, sizes, strides, offset, buffer, start, size = _take(description, 9)
        dtype = _dtype(name, dtypes)
        _check_flags(flags, allowed_flags, dtype)
        _check_sizes(sizes)
        _check_strides(sizes, strides)
        _require(_natural((offset, buffer, start, size)) and type(device) is str, "places in buffers are not negative")
        span = extent(sizes, strides)
        piece = None
        if span:
            self._check_place(buffer, start, size)
            if (offset + span) * dtype.itemsize > size:
                raise ProtocolError(f"a tensor needs {(offset + span) * dtype.itemsize} bytes, and {size} arrived for it")
            piece = _Piece(buffer, start, size, device)
            if piece not in self._alignments:
                self._claim(buffer, size)
            self._alignments[piece] = max(self._alignments.get(piece, 1), dtype.itemsize)
        return _Strided(dtype, flags, _device(device), sizes, strides, offset, piece)

    def _check_place(self, buffer: int, start: int, size: int) -> None:
        if buffer >= len(self._buffers) or start + size > self._buffers[buffer].nbytes:
            raise ProtocolError(f"a tensor lies in bytes {start} to {start + size} of buffer {buffer}, which did not arrive")

    def _claim(self, buffer: int, size: int) -> None:
        """Notes that bytes are used. Pieces may not overlap, or a short message could ask for many copies of a long buffer."""
        self._unclaimed[buffer] -= size
        _require(self._unclaimed[buffer] >= 0, "pieces of memory do not overlap")

    def _build(self, strided: _Strided) -> torch.Tensor:
        tensor = self._fill(torch.empty(0, dtype=strided.dtype, device=strided.device), strided)
        if strided.flags & CONJUGATE:
            torch._C._set_conj(tensor, True)
        if strided.flags & NEGATIVE:
            torch._C._set_neg(tensor, True)
        return _with_grad(tensor, strided.flags)

    def _fill(self, empty: torch.Tensor, strided: _Strided) -> torch.Tensor:
        """Gives ``empty`` its shape and its memory."""
        if strided.piece is None:
            return empty.set_(empty.untyped_storage(), 0, strided.sizes, strided.strides)
        return empty.set_(self._storages[strided.piece], strided.offset, strided.sizes, strided.strides)


_CHECKS: dict[int, Callable[[Incoming, Any], Builder]] = {
    Kind.DENSE: Incoming._dense,
    Kind.META: Incoming._meta,
    Kind.COO: Incoming._coo,
    Kind.COMPRESSED: Incoming._compressed,
    Kind.PER_TENSOR: Incoming._per_tensor,
    Kind.PER_CHANNEL: Incoming._per_channel,
    Kind.PLAIN: Incoming._plain,
}


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ProtocolError(f"a description of a tensor breaks the rule: {rule}")


def _take(description: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """What follows the kind."""
    _require(len(description) == count + 1, f"kind {description[0]} has {count} values")
    return description[1:]


def _natural(values: tuple[Any, ...]) -> bool:
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_INT:
            return False
    return True


def _check_sizes(sizes: Any) -> int:
    """How many elements there are of these sizes."""
    _require(type(sizes) is tuple and len(sizes) <= _MAX_DIMENSIONS and _natural(sizes), "sizes are not negative")
    count: int = math.prod(sizes)
    _require(count <= MAX_INT, "sizes have a limit")
    return count


def _check_strides(sizes: tuple[int, ...], strides: Any) -> None:
    _require(type(strides) is tuple and len(strides) == len(sizes) and _natural(strides), "each size has its stride")


def _check_flags(flags: Any, allowed: int, dtype: torch.dtype | None = None) -> None:
    _require(type(flags) is int and flags & allowed == flags, "its kind has these flags")
    if dtype is not None and flags:
        differentiable = dtype.is_floating_point or dtype.is_complex
        _require(differentiable or not flags & REQUIRES_GRAD, "tensors that require grad are floating-point or complex")
        _require(dtype.is_complex or not flags & CONJUGATE, "the conjugate bit is for complex tensors")


def _dtype(name: Any, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    dtype = dtypes.get(name) if type(name) is str else None
    if dtype is None:
        raise ProtocolError(f"dtype {shown(name)} is unknown to this version of zmqagent, or wrong for this kind of tensor")
    return dtype


def _device(name: str) -> torch.device:
    if not name:
        return CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProtocolError(f"a tensor is meant for device {shown(name)}, which torch does not know") from error
    if device.type == "cpu":
        return CPU
    if device.type != "meta":
        accelerator = torch.accelerator.current_accelerator()
        mine = accelerator is not None and device.type == accelerator.type
        if not mine or (device.index or 0) >= torch.accelerator.device_count():
            raise ProtocolError(f"a tensor is meant for device {device}, which this worker does not have")
    return device


def _with_grad(tensor: torch.Tensor, flags: int) -> torch.Tensor:
    return tensor.requires_grad_() if flags & REQUIRES_GRAD else tensor


# Which kinds torch has warned of. The lock lets one thread at a time change the process-wide warning filters; it is held while
# one tensor is built, by whichever thread builds the first of its kind.
_warned: set[str] = set()
_warned_lock = threading.Lock()


def _without_first_warning(kind: str, build: Callable[[], _T]) -> _T:
    """Runs ``build``. torch warns once a process of some kinds of tensor, and the sender's user has read that: here it would come
    from a thread without a user, and where warnings are errors the message would be lost."""
    if kind in _warned:
        return build()
    with _warned_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = build()
    _warned.add(kind)
    return built
