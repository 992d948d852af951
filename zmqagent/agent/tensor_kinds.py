"""The words that descriptions of tensors are made of; both sides of a message read them here.

Descriptions travel in a message's header, so they hold plain values only. A strided tensor's is::

    (DENSE, dtype, flags, device, sizes, strides, offset, buffer, start, size)

``buffer``, ``start`` and ``size`` (in bytes) name a piece of memory; tensors that name the same piece share it. ``offset`` and
``strides`` count elements in it, ``device`` is where the tensor is to arrive ("" for the CPU). The other kinds are made of it::

    (META, dtype, flags, sizes, strides)
    (COO, flags, sizes, indices, values)
    (COMPRESSED, layout, flags, sizes, compressed indices, plain indices, values)
    (PER_TENSOR, quantized data, scale, zero point)
    (PER_CHANNEL, quantized data, axis, scales, zero points)

One that is contiguous, on the CPU and alone in its memory may be described by less: its elements lie from ``start`` on::

    (PLAIN, dtype, flags, sizes, buffer, start)
"""

from __future__ import annotations

from typing import Any, Final

import torch

__all__ = [
    "COALESCED",
    "CONJUGATE",
    "DTYPES",
    "DTYPE_NAMES",
    "LAYOUTS",
    "LAYOUT_NAMES",
    "NEGATIVE",
    "PLAIN_DTYPES",
    "QUANTIZED_DTYPES",
    "REQUIRES_GRAD",
    "Description",
    "Kind",
]

Description = tuple[Any, ...]


class Kind:
    """How a tensor holds its elements. Plain numbers: they go into the header as they are."""

    DENSE: Final = 0
    META: Final = 1
    COO: Final = 2
    COMPRESSED: Final = 3
    PER_TENSOR: Final = 4
    PER_CHANNEL: Final = 5
    PLAIN: Final = 6


REQUIRES_GRAD = 1
CONJUGATE = 2
NEGATIVE = 4
COALESCED = 8

# Those of less than a byte an element lie as torch packs them, and no operations exist for most of them: only bits are moved.
_DTYPES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex32 complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 "
    "bits8 bits16 bits1x8 bits2x4 bits4x2 uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7"
)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES.split()}
QUANTIZED_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("qint8", "quint8", "qint32")}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in (DTYPES | QUANTIZED_DTYPES).items()}

PLAIN_DTYPES = {name: dtype for name, dtype in DTYPES.items() if dtype is not torch.complex32}
"""Those of `Kind.PLAIN`: torch does not warn of them."""

LAYOUTS: dict[str, torch.layout] = {
    "csr": torch.sparse_csr,
    "csc": torch.sparse_csc,
    "bsr": torch.sparse_bsr,
    "bsc": torch.sparse_bsc,
}
LAYOUT_NAMES: dict[torch.layout, str] = {layout: name for name, layout in LAYOUTS.items()}
