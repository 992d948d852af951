"""What a user may start a backward pass from: the checks of torch's distributed engine, in its order and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from zmqagent.autograd.plan import Edge
from zmqagent.exceptions import BackwardError, InvalidTypeError

__all__ = ["check_arguments", "root_edges"]


def check_arguments(context_id: Any, roots: Any, retain_graph: Any) -> None:
    """Raises `InvalidTypeError` if these are not what ``backward`` takes."""
    is_id = isinstance(context_id, int) and not isinstance(context_id, bool)
    are_tensors = isinstance(roots, (list, tuple)) and all(isinstance(root, Tensor) for root in roots)
    if not is_id or not are_tensors or not isinstance(retain_graph, bool):
        raise InvalidTypeError(
            "backward(): incompatible function arguments. "
            "It takes (context_id: int, roots: list[Tensor], retain_graph: bool = False), "
            f"not ({type(context_id).__name__}, {type(roots).__name__}, {type(retain_graph).__name__})"
        )


def root_edges(roots: Sequence[Tensor]) -> list[Edge]:
    """The edges at which the gradients of ``roots`` enter the graph.

    Raises:
        BackwardError: there are none, or one of them requires no grad, is no scalar, or was computed from nothing.
    """
    if not roots:
        raise BackwardError("No tensors provided for gradient computation.")
    for number, root in enumerate(roots):
        if not root.requires_grad:
            raise BackwardError(f"requires_grad not set on root {number}")
        if root.numel() != 1:
            raise BackwardError(f"root {number} is not a scalar, all roots need to be scalar")
        if root.grad_fn is None:
            raise BackwardError(f"root {number} does not have a valid gradient function.")
    return [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, roots)]
