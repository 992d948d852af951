"""Runs single nodes of the autograd graph, the way torch's engine would.

torch's engine runs whole graphs, and cannot be told to stop at an edge behind which another such edge lies: it then runs the
node in between as well. Where a stage has such a border, its nodes are called one by one from here, with what the engine does
around each call: tensor hooks before, undefined gradients made zeros where the node expects that, results brought to the shape
and type of the input they go to. ``Node.register_hook`` and ``register_prehook`` are the engine's own and do not fire here, and
tensor hooks fire only for gradients that are defined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from zmqagent.agent.accelerator import ACCELERATOR
from zmqagent.autograd.plan import Edge, Node

__all__ = ["add", "run_node", "run_recv", "stepping_on"]


def add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be undefined; changes neither, as others may hold them."""
    if old is None or new is None:
        return new if old is None else old
    # A sparse tensor plus a dense one is defined only with the dense one first.
    return new + old if old.layout != torch.strided and new.layout == torch.strided else old + new


def run_node(node: Node, gradients: Sequence[Tensor | None], edges: Sequence[Edge]) -> Iterator[tuple[Edge, Tensor | None]]:
    """Runs ``node`` and yields what flows along each of its ``edges`` that leads somewhere."""
    hooked = _after_tensor_hooks(node, gradients)
    with torch.no_grad():
        if isinstance(node, BackwardCFunction):
            results: Sequence[Tensor | None] = _run_python(node, hooked)
            wanted = [edge for edge in edges if edge[0] is not None]
        else:
            results = _as_tuple(node(*hooked))
            wanted = list(edges)
        if len(results) != len(wanted):
            raise RuntimeError(f"{node.name()} returned {len(results)} gradients for {len(wanted)} inputs")
        for edge, result in zip(wanted, results, strict=True):
            if edge[0] is not None:
                yield edge, _fitted(result, edge)


def run_recv(node: Node, gradients: Sequence[Tensor | None], retain_graph: bool) -> None:
    """Runs a recv by the engine, which can be done: behind it lies nothing but its anchor."""
    roots = {number: gradient for number, gradient in enumerate(gradients) if gradient is not None}
    if not roots:
        # Something has to flow in for the engine to run the node; it fills up the other inputs itself.
        roots = {0: _zeros(node._input_metadata[0])}
    torch.autograd.grad(
        [GradientEdge(node, number) for number in roots],
        [GradientEdge(anchor, number) for anchor, number in node.next_functions if anchor is not None],
        list(roots.values()),
        retain_graph=retain_graph,
        allow_unused=True,
    )


def _after_tensor_hooks(node: Node, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``gradients`` as the hooks on the node's output tensors leave them.

    Asking the engine for the gradient of the very edges that it starts from runs those hooks and nothing else.
    """
    hooked = list(gradients)
    defined = [number for number, gradient in enumerate(gradients) if gradient is not None]
    if defined:
        edges = [GradientEdge(node, number) for number in defined]
        values = torch.autograd.grad(edges, edges, [gradients[number] for number in defined], retain_graph=True)
        for number, value in zip(defined, values, strict=True):
            hooked[number] = value
    return hooked


def _run_python(node: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Calls a `torch.autograd.Function` and returns its results for the inputs that require grad.

    Zeros stand in for undefined gradients also where the function asked for None (``set_materialize_grads(False)`` cannot be read
    back): the values are the same.
    """
    filled = [
        _zeros(metadata) if gradient is None else gradient
        for gradient, metadata in zip(gradients, node._input_metadata, strict=True)
    ]
    needed = node.needs_input_grad
    results = _as_tuple(node.apply(*filled))
    if len(results) < len(needed):
        raise RuntimeError(
            f"function {node.name()} returned an incorrect number of gradients (expected {len(needed)}, got {len(results)})"
        )
    # Further results are allowed if they are None, as in torch.
    return [result for result, is_needed in zip(results, needed, strict=False) if is_needed]


def _fitted(gradient: Tensor | None, edge: Edge) -> Tensor | None:
    """``gradient`` with the shape, type and device that the input it flows to has; the engine allows the same differences."""
    if gradient is None:
        return None
    node, number = edge
    metadata = node._input_metadata[number]
    shape = torch.Size(metadata.shape)
    if gradient.shape != shape:
        gradient = gradient.sum_to_size(shape)
    if gradient.dtype != metadata.dtype or gradient.device != metadata.device:
        gradient = gradient.to(device=metadata.device, dtype=metadata.dtype)
    return gradient


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(torch.Size(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def _as_tuple(results: Any) -> tuple[Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)


@contextmanager
def stepping_on(gradients: Mapping[Edge, Tensor | None]) -> Iterator[None]:
    """Selects an accelerator that the gradients are on, if any, and orders the steps behind all that these devices were given
    before, and what comes after behind the steps. The body changes ``gradients``.

    The engine knows on which stream each node ran forward; Python cannot ask for that, so a stepped part waits for all streams.
    """
    devices = _accelerators(gradients.values())
    if not devices:
        yield
        return
    _wait_for(devices)
    with torch.accelerator.device_index(devices[0].index):
        yield
    # Steps may have gone on to other devices.
    _wait_for(_accelerators(gradients.values()))


def _accelerators(gradients: Iterable[Tensor | None]) -> list[torch.device]:
    devices = dict.fromkeys(gradient.device for gradient in gradients if gradient is not None)
    return [device for device in devices if device.type not in ("cpu", "meta")]


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if ACCELERATOR.knows_events(device):
            torch.accelerator.synchronize(device)
