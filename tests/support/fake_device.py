"""An accelerator whose memory is ordinary memory, so that machines without one test where tensors lie and how they move.

`install` gives torch's device type for out-of-tree backends the name "fake" and as many devices as asked for. Its tensors are
real: DLPack, which brings memory of foreign devices in, gets a piece of main memory and is told that it is the device's.
What is computed on them is computed by the CPU's kernels on the same memory. torch's hooks for backends in Python count one
device only, so that autograd works on ``fake:0``, and all else on any of them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["TYPE", "install", "on_copy"]

TYPE = "fake"

_OUT_OF_TREE = 12
"""DLPack's type for devices that it does not know (kDLExtDev)."""

_UNSIGNED = 1
"""DLPack's code for unsigned integers (kDLUInt)."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Module:
    """``torch.fake``."""

    def __init__(self, count: int) -> None:
        self._count = count

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return self._count

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws the CPU's numbers."""


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Block(ctypes.Structure):
    """What lies before a tensor's memory, in one piece with it: torch calls C's own ``free``, in whatever state Python is."""

    _fields_ = (("managed", _DLManagedTensor), ("size", ctypes.c_int64), ("stride", ctypes.c_int64))


_HEAD = -(-ctypes.sizeof(_Block) // 64) * 64


def _allocate(nbytes: int, index: int) -> torch.Tensor:
    """So many bytes of device ``index``."""
    address = _libc.malloc(_HEAD + nbytes)
    block = _Block.from_address(address)
    block.size, block.stride = nbytes, 1
    sizes, strides = (address + getattr(_Block, name).offset for name in ("size", "stride"))
    block.managed.tensor = _DLTensor(address + _HEAD, _OUT_OF_TREE, index, 1, _UNSIGNED, 8, 1, sizes, strides, 0)
    block.managed.deleter = ctypes.cast(_libc.free, ctypes.c_void_p)
    return torch.from_dlpack(_new_capsule(address, b"dltensor", None))


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == TYPE


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU in the same memory."""
    storage = tensor.untyped_storage()
    memory = torch.empty(0, dtype=torch.uint8, device="cpu")
    if storage.nbytes():
        memory = torch.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return empty.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _as_strided_on(device: torch.device, like: torch.Tensor) -> torch.Tensor:
    """A new tensor on a fake device, as ``like`` on the CPU is."""
    nbytes = like.untyped_storage().nbytes()
    moved = _allocate(nbytes, device.index or 0)
    _on_cpu(moved).untyped_storage().copy_(like.untyped_storage())
    empty = moved.view(like.dtype) if nbytes % like.itemsize == 0 else moved
    return _on_the_same_memory(torch.ops.aten.as_strided.default, empty, like.size(), like.stride(), like.storage_offset())


def _on_the_same_memory(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the CPU's kernel of an operator that looks at no element: it does not ask what device it works on."""
    return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


_tell_of_copies: list[Callable[[torch.Tensor, torch.Tensor], None]] = []


def on_copy(tell: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """Has ``tell(source, destination)`` called for each copy from, to and between fake devices, on the thread that makes it."""
    _tell_of_copies.append(tell)


def _copy(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    for tell in _tell_of_copies:
        tell(source, destination)
    here = _on_cpu(source) if _is_fake(source) else source
    (_on_cpu(destination) if _is_fake(destination) else destination).copy_(here)
    return destination


def _compute(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs any other operator on the CPU, and takes what is new in its result to the device."""
    devices = {value.device for value in tree_leaves((args, kwargs)) if _is_fake(value)}
    if kwargs.get("device") is not None:
        devices = {torch.device(kwargs["device"])}
        kwargs["device"] = torch.device("cpu")
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, devices))}")
    (device,) = devices
    originals: dict[int, torch.Tensor] = {}

    def to_cpu(value: Any) -> Any:
        if not _is_fake(value):
            return value
        moved = _on_cpu(value)
        originals[id(moved)] = value
        return moved

    def to_device(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        original = originals.get(id(value))
        if original is None:
            return _as_strided_on(device, value)
        if original.size() != value.size():
            # An operator has found its ``out`` argument too small.
            original.set_(_as_strided_on(device, value))
        return original

    args, kwargs = tree_map(to_cpu, (args, kwargs))
    return tree_map(to_device, operator(*args, **kwargs))


_VIEWS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "set_.source_Storage_storage_offset",
    "set_.source_Storage",
    "set_.source_Tensor",
)

# Kept for as long as the process lives: an operator's kernel goes with its library.
_library = torch.library.Library("aten", "IMPL")
_fallback = torch.library.Library("_", "IMPL")


@functools.cache
def install(count: int = 4) -> None:
    """Makes ``fake:0`` to ``fake:<count - 1>`` exist in this process, for good: not in a process that runs other tests."""
    _setup_privateuseone_for_python_backend(TYPE, _Module(count))
    for name in _VIEWS:
        operator, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, operator)
        kernel = functools.partial(_on_the_same_memory, getattr(packet, overload or "default"))
        _library.impl(name, kernel, "PrivateUse1")
    _library.impl("_copy_from", _copy, "PrivateUse1")
    _fallback.fallback(_compute, "PrivateUse1")
