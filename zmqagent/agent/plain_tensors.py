"""The short way out for the most common tensors: dense, contiguous, to and from the CPU, each alone in its memory.

A message with none but such tensors skips what `Outgoing` does to find out which memory tensors share, and their descriptions say
only what does not follow from the rest. The small ones lie one behind another in the last buffer, each large one has its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from zmqagent.agent.buffers import CPU, SMALL, Allocate, freeze_memory
from zmqagent.agent.devices import Target
from zmqagent.agent.strides import contiguous
from zmqagent.agent.tensor_kinds import PLAIN_DTYPES, REQUIRES_GRAD, Description, Kind

__all__ = ["pack_plain"]

_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
# Other classes may hold their data elsewhere, and a subclass may hide what it does.
_CLASSES = (torch.Tensor, torch.nn.Parameter)


def pack_plain(
    tensors: Sequence[torch.Tensor], target: Target, allocate: Allocate
) -> tuple[tuple[Description, ...], list[bytes | memoryview]] | None:
    """See `zmqagent.agent.tensors.pack`; None if not all of ``tensors`` are plain."""
    if not all(map(_is_plain, tensors)) or _share_memory(tensors) or target(CPU) != "cpu":
        return None
    descriptions: list[Description] = []
    buffers: list[bytes | memoryview] = []
    small: list[bytes] = []
    start = 0
    small_buffer = sum([tensor.nbytes > SMALL for tensor in tensors])
    for tensor in tensors:
        size = tensor.nbytes
        if size > SMALL:
            place = (len(buffers), 0)
            buffers.append(freeze_memory(tensor.data_ptr(), size, allocate))
        else:
            place = (small_buffer, start)
            small.append(ctypes.string_at(tensor.data_ptr(), size))
            start += size
        flags = REQUIRES_GRAD if tensor.requires_grad else 0
        descriptions.append((Kind.PLAIN, _NAMES[tensor.dtype], flags, tuple(tensor.size()), *place))
    if start:
        buffers.append(small[0] if len(small) == 1 else b"".join(small))
    return tuple(descriptions), buffers


def _is_plain(tensor: torch.Tensor) -> bool:
    if type(tensor) not in _CLASSES or not tensor.is_cpu or tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
        return False
    if tensor.is_conj() or tensor.is_neg() or tensor.is_nested or not tensor.is_contiguous():
        return False
    sizes = tensor.size()
    # Dimensions of these sizes may have any stride.
    if (0 in sizes or 1 in sizes) and tensor.stride() != contiguous(sizes):
        return False
    return _has_memory(tensor)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether all that ``tensor`` says it has is there: it may be wrapped by a transformation, or its storage resized."""
    if not torch._C._has_storage(tensor):
        return False
    storage = tensor.untyped_storage()
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    return end <= storage.nbytes() and (tensor.data_ptr() != 0 or not tensor.nbytes)


def _share_memory(tensors: Sequence[torch.Tensor]) -> bool:
    return len(tensors) > 1 and len({tensor.untyped_storage()._cdata for tensor in tensors}) < len(tensors)
