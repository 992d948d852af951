"""Tells torch which tensors the result of a future consists of.

A future that carries devices makes whoever takes its value wait, by events, for the streams that its tensors come from. So when
it is completed torch asks which these are, and finds out by pickling the value. The tensors of an answer are known: it need not
be pickled again, which would copy what else is in it and may not be possible. And a `Failed`, which has none, cannot be pickled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch._jit_internal import _TensorExtractor
from torch.futures import Future

from zmqagent.rpc.failures import Failed

__all__ = ["TensorExtractor", "set_result"]


class _Known(threading.local):
    """What the calling thread completes a future with, until torch has asked for its tensors."""

    result: tuple[Any, list[torch.Tensor]] | None = None


_known = _Known()


def set_result(future: Future[Any], value: Any, tensors: Iterable[torch.Tensor]) -> None:
    """``future.set_result(value)``, where the tensors in ``value`` are ``tensors``."""
    # A future's devices are of one type, which torch compares with every tensor but those on the CPU.
    _known.result = value, [tensor for tensor in tensors if tensor.device.type not in ("cpu", "meta")]
    try:
        future.set_result(value)
    finally:
        _known.result = None


class TensorExtractor(_TensorExtractor):
    """Stands for torch's class of that name while a worker runs."""

    def dump(self, obj: Any) -> None:
        """Finds the tensors in ``obj``."""
        known, _known.result = _known.result, None
        # It may be another value: a future without devices asks for nothing, but its callbacks complete others.
        if known is not None and known[0] is obj:
            self.tensors.extend(known[1])
        else:
            super().dump(obj)

    def persistent_id(self, obj: Any) -> str | None:
        """Not None for what need not be looked into."""
        if isinstance(obj, Failed):
            return ""
        marked: str | None = super().persistent_id(obj)  # type: ignore[no-untyped-call]
        return marked
