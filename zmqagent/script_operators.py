"""Operators by which TorchScript reaches distributed autograd.

In a script ``dist_autograd.backward`` and ``get_gradients`` stand for operators of torch's own, written in C++, which know only
the contexts of torch's own agent. These do the same by way of Python, hence on whichever agent runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor

__all__ = ["NAMESPACE"]

NAMESPACE = "zmqagent"


def _dist_backward(context_id: int, roots: list[Tensor], retain_graph: bool = False) -> None:
    dist_autograd.backward(context_id, roots, retain_graph=retain_graph)


def _get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    gradients: dict[Tensor, Tensor] = dist_autograd.get_gradients(context_id)
    return gradients


def _define() -> Any:
    library = torch.library.Library(NAMESPACE, "DEF")
    # Conservative: the schema does not show that the operators touch more than their arguments, and the compiler would drop a
    # call without a result, or move one.
    library.define("dist_backward(int context_id, Tensor[] roots, bool retain_graph=False) -> ()", "CONSERVATIVE")
    library.define("get_gradients(int context_id) -> Dict(Tensor, Tensor)", "CONSERVATIVE")
    library.impl("dist_backward", _dist_backward, "CompositeImplicitAutograd")
    library.impl("get_gradients", _get_gradients, "CompositeImplicitAutograd")
    return library


# The operators exist as long as this object does.
_library = _define()
