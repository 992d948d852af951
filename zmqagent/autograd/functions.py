"""The two nodes that stand in the autograd graph where a message crossed from one worker to another.

A pair shares one message id. `SendRpcBackward` stands where tensors left: a root of this worker's graph, which gets its gradients
from the other worker. `RecvRpcBackward` stands where they arrived: a leaf of this worker's graph, which sends the gradients
that reach it to where the tensors came from. How they travel, and in which pass, is the engine's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from zmqagent.agent.devices import DeviceMap
from zmqagent.exceptions import AutogradContextError, BackwardError
from zmqagent.wire.types import AutogradMetadata, WorkerId

__all__ = [
    "CONTEXT_GONE",
    "RECV_NODE",
    "GradientSender",
    "NoGradient",
    "RecvRpcBackward",
    "SendRpcBackward",
    "Wire",
    "receive_tensors",
]

CONTEXT_GONE = (
    "Autograd context no longer valid! This usually means the autograd context was cleaned up by a different thread "
    "due to an error before RecvRpcBackward had a chance to run"
)


class SendRpcBackward:
    """Where tensors were sent off: the edges of those that require grad, in the order of the message.

    Not a node that torch's engine runs: the gradients enter the graph at its edges. It answers to the questions that one may ask
    a node (`name`, `next_functions`).
    """

    __slots__ = ("_edges", "message_id", "peer")

    def __init__(self, message_id: int, peer: WorkerId, tensors: Sequence[Tensor]) -> None:
        self.message_id = message_id
        self.peer = peer
        # The edges of Python functions carry a token that keeps the graph alive, so the edges themselves are kept.
        self._edges: tuple[GradientEdge, ...] = tuple(map(_edge_of, tensors))

    def name(self) -> str:
        """torch's name for this node."""
        return "torch::distributed::autograd::SendRpcBackward"

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        """The (node, input number) of each tensor that was sent and requires grad."""
        return tuple((edge.node, edge.output_nr) for edge in self._edges)

    def placed(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """``gradients``, one for each edge, each on the device that its tensor was sent from.

        They are there already unless two devices here lead to one there: a tensor on the CPU stays there without a map, and one
        on an accelerator may be mapped to the CPU.
        """
        return [
            gradient.to(edge.node._input_metadata[edge.output_nr].device)
            for edge, gradient in zip(self._edges, gradients, strict=True)
        ]

    def __repr__(self) -> str:
        return f"<SendRpcBackward message_id={self.message_id} peer={self.peer} edges={len(self._edges)}>"


def _edge_of(tensor: Tensor) -> GradientEdge:
    """Where the gradient of ``tensor`` enters its graph, with what keeps that graph alive."""
    if tensor.layout is torch.strided:
        return get_gradient_edge(tensor)
    # torch's own function takes a view of the tensor, which sparse ones do not have.
    with torch.enable_grad():
        successor = (tensor.unsqueeze(0) if tensor.layout is torch.sparse_coo else tensor.clone()).grad_fn
    assert successor is not None  # the tensor requires grad
    node, output_nr = successor.next_functions[0]
    assert node is not None
    return GradientEdge(node, output_nr, ownership_token=successor)


GradientSender = Callable[["Wire", Sequence[Tensor]], None]
"""Sends gradients over a wire, as part of the pass that is running."""


class _Context(Protocol):
    """What a recv needs to know of its context."""

    @property
    def is_released(self) -> bool: ...

    @property
    def gradient_sender(self) -> GradientSender | None: ...


@dataclass(frozen=True, slots=True)
class Wire:
    """How a recv gets its gradients to the send that it belongs to.

    ``context`` is weak because the context holds the recv. ``device_map`` leads from this worker's devices to the other's; None
    stands for this worker's own map.
    """

    context: weakref.ReferenceType[_Context]
    metadata: AutogradMetadata
    source: WorkerId
    device_map: DeviceMap | None

    def send(self, gradients: Sequence[Tensor]) -> None:
        """Sends ``gradients`` off.

        Raises:
            AutogradContextError: the context is gone.
            BackwardError: no distributed pass is running, so this is torch's own ``backward``.
        """
        context = self.context()
        if context is None or context.is_released:
            raise AutogradContextError(CONTEXT_GONE)
        sender = context.gradient_sender
        if sender is None:
            raise BackwardError(
                f"the graph continues on worker {self.source}, where torch's own backward cannot go: "
                f"call torch.distributed.autograd.backward with context id {self.metadata.context_id}"
            )
        sender(self, gradients)


class RecvRpcBackward(torch.autograd.Function):
    """Where tensors arrived; its backward sends the gradients to the worker they came from."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, wire: Wire, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns ``tensors`` themselves. They come in a sequence because inputs would come out as views, which refuse in-place
        operations; ``anchor`` is what makes torch record the node at all."""
        ctx.wire = wire
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        """Sends ``gradients``; torch has made zeros of those that are undefined."""
        ctx.wire.send(gradients)
        return None, None, None


RECV_NODE: type = RecvRpcBackward._backward_cls
"""The type of the nodes that `RecvRpcBackward` puts into the graph."""

# The name under which torch's own node is known to profilers and to whoever looks at a graph.
RECV_NODE.__name__ = "torch::distributed::autograd::RecvRpcBackward"


def receive_tensors(wire: Wire, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Joins received ``tensors``, which all require grad, to the graph: their recv node, and the tensors to hand on.

    They require grad from here on whatever grad mode the calling thread is in, as torch has it.
    """
    # A view (tensors that share storage arrive as such) would refuse in-place operations.
    leaves = [tensor.detach() if tensor._is_view() else tensor for tensor in tensors]
    with torch.inference_mode(False):  # switches grad mode on as well
        anchor = torch.empty(0, requires_grad=True)
        received = RecvRpcBackward.apply(anchor, wire, leaves)  # type: ignore[no-untyped-call]
    return received[0].grad_fn, list(received)


class NoGradient(torch.autograd.Function):
    """A source of undefined gradients: what flows out of its backward is None."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None
