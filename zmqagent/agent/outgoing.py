"""Tensors on their way out: what each one is, and which memory travels for it.

`Outgoing` describes the tensors of one message, then copies each piece of memory that they touch once. Views that share memory
go into one piece, of which no more is sent than they touch; a view that leaves most of its memory out and is alone in it goes as
a contiguous copy. Small pieces share one buffer, so that a message with hundreds of biases has few frames.
"""

from __future__ import annotations

from typing import Any

import torch

from zmqagent.agent.buffers import SMALL, Allocate, freeze_bytes, freeze_elements
from zmqagent.agent.devices import Target
from zmqagent.agent.streams import CopiesOut
from zmqagent.agent.strides import View, contiguous, pieces
from zmqagent.agent.tensor_kinds import (
    COALESCED,
    CONJUGATE,
    DTYPE_NAMES,
    LAYOUT_NAMES,
    NEGATIVE,
    REQUIRES_GRAD,
    Description,
    Kind,
)
from zmqagent.exceptions import NotPicklableError

__all__ = ["Outgoing", "settle"]


class _Part:
    """A strided tensor, or a strided part of another, on its way out. `Outgoing.freeze` finds it a place: the elements at
    ``offset`` with ``strides`` in the ``size`` bytes of buffer ``buffer`` from ``start`` on."""

    __slots__ = ("buffer", "device", "dtype", "flags", "offset", "size", "start", "storage", "strides", "view")

    def __init__(self, dtype: str, flags: int, device: str, view: View, storage: torch.UntypedStorage) -> None:
        self.dtype = dtype
        self.flags = flags
        self.device = device
        self.view = view
        self.storage = storage
        self.strides = view.strides
        self.offset = self.buffer = self.start = self.size = 0

    def description(self) -> Description:
        sizes = self.view.sizes
        place = (self.offset, self.buffer, self.start, self.size)
        return (Kind.DENSE, self.dtype, self.flags, self.device, sizes, self.strides, *place)


def settle(description: Any) -> Any:
    """``description`` with the parts in it replaced by their own descriptions."""
    if type(description) is _Part:
        return description.description()
    return tuple([settle(item) if type(item) is _Part else item for item in description])


class Outgoing:
    """The tensors of one message on their way out."""

    def __init__(self, target: Target, copies: CopiesOut, allocate: Allocate) -> None:
        self._target = target
        self._copies = copies
        self._allocate = allocate
        self._by_storage: dict[int, list[_Part]] = {}
        self._small: list[bytes | memoryview] = []
        self._small_parts: list[_Part] = []
        self._small_size = 0
        self._buffers: list[bytes | memoryview] = []

    def describe(self, tensor: torch.Tensor) -> Any:
        """The description of ``tensor``, with `_Part` objects in it that have no place yet."""
        _refuse_wrappers(tensor)
        layout = tensor.layout
        flags = REQUIRES_GRAD if tensor.requires_grad else 0
        plain = tensor.detach() if flags else tensor
        if plain.is_meta:
            if layout is not torch.strided or plain.is_quantized:
                raise NotPicklableError("a meta tensor that is sparse or quantized cannot be sent; plain ones can")
            return (Kind.META, _dtype_name(plain), flags, tuple(plain.size()), plain.stride())
        if layout is torch.strided:
            return self._quantized(plain) if plain.is_quantized else self._dense(plain, flags)
        if layout is torch.sparse_coo:
            flags |= COALESCED if plain.is_coalesced() else 0
            indices = self._dense(plain._indices().contiguous())
            return (Kind.COO, flags, tuple(plain.size()), indices, self._dense(plain._values()))
        name = LAYOUT_NAMES.get(layout)
        if name is None:
            raise NotPicklableError(f"a tensor of layout {layout} cannot be sent; convert it with to_dense() first")
        by_rows = name in ("csr", "bsr")
        outer = plain.crow_indices() if by_rows else plain.ccol_indices()
        inner = plain.col_indices() if by_rows else plain.row_indices()
        parts = (self._dense(outer.contiguous()), self._dense(inner.contiguous()), self._dense(plain.values()))
        return (Kind.COMPRESSED, name, flags, tuple(plain.size()), *parts)

    def _dense(self, tensor: torch.Tensor, flags: int = 0) -> _Part:
        name = _dtype_name(tensor)
        if tensor.is_conj():
            flags |= CONJUGATE
        if tensor.is_neg():
            flags |= NEGATIVE
        device = tensor.device
        target = self._target(device)
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError as error:
            raise NotPicklableError(f"a tensor without memory of its own cannot be sent: {error}") from error
        view = View(tensor.itemsize, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))
        part = _Part(name, flags, "" if target == "cpu" else target, view, storage)
        if tensor.numel():
            if view.end > storage.nbytes():
                raise NotPicklableError(
                    f"a tensor that needs {view.end} bytes has a storage of {storage.nbytes()}: was it resized?"
                )
            self._by_storage.setdefault(storage._cdata, []).append(part)
        return part

    def _quantized(self, tensor: torch.Tensor) -> Any:
        part = self._dense(tensor)
        if tensor.qscheme() is torch.per_tensor_affine:
            return (Kind.PER_TENSOR, part, tensor.q_scale(), tensor.q_zero_point())
        scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return (Kind.PER_CHANNEL, part, tensor.q_per_channel_axis(), self._dense(scales), self._dense(zero_points))

    def freeze(self) -> list[bytes | memoryview]:
        """Copies what the parts touch, gives each its place, and returns the buffers."""
        for parts in self._by_storage.values():
            if len(parts) == 1:
                self._freeze_together(parts)
                continue
            for group in pieces([part.view for part in parts]):
                self._freeze_together([parts[i] for i in group])
        self._copies.finish()
        if self._small:
            for part in self._small_parts:
                part.buffer = len(self._buffers)
            self._buffers.append(self._small[0] if len(self._small) == 1 else b"".join(self._small))
        return self._buffers

    def _freeze_together(self, parts: list[_Part]) -> None:
        """Copies one piece of a storage, which ``parts`` share, so that they share the copy."""
        first = parts[0]
        view, storage = first.view, first.storage
        if view.is_wasteful and all(part.view == view for part in parts):
            memory: bytes | memoryview = freeze_elements(
                storage, view.itemsize, view.sizes, view.strides, view.offset, self._copies, self._allocate
            )
            self._place(parts, memory)
            for part in parts:
                part.strides = contiguous(view.sizes)
            return
        begin, end, itemsize = view.begin, view.end, view.itemsize
        for part in parts[1:]:
            begin, end = min(begin, part.view.begin), max(end, part.view.end)
            itemsize = max(itemsize, part.view.itemsize)
        # Views of other dtypes stay whole elements away from the begin.
        begin -= begin % itemsize
        self._place(parts, freeze_bytes(storage, begin, end - begin, self._copies, self._allocate))
        for part in parts:
            part.offset = part.view.offset - begin // part.view.itemsize

    def _place(self, parts: list[_Part], memory: bytes | memoryview) -> None:
        size = len(memory)
        small = size <= SMALL
        for part in parts:
            part.size = size
            part.start = self._small_size if small else 0
            part.buffer = len(self._buffers)
        if small:
            self._small.append(memory)
            self._small_parts += parts
            self._small_size += size
        else:
            self._buffers.append(memory)


def _refuse_wrappers(tensor: torch.Tensor) -> None:
    """Raises for tensors that are more than their own memory. A subclass that only adds methods is sent as a plain tensor."""
    kind = type(tensor)
    # A class that handles its own operations holds its data elsewhere: fake, wrapped, jagged and distributed tensors do.
    if not issubclass(kind, torch.Tensor) or kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise NotPicklableError(f"a {name} cannot be sent as a tensor; send the tensors it is made of")
    if tensor.is_nested:
        raise NotPicklableError("a nested tensor cannot be sent; send unbind() of it, or to_padded_tensor()")


def _dtype_name(tensor: torch.Tensor) -> str:
    name = DTYPE_NAMES.get(tensor.dtype)
    if name is None:
        raise NotPicklableError(f"a tensor of dtype {tensor.dtype} cannot be sent; convert it first")
    return name
