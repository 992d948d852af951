"""Runs the autograd graph of one worker, stage by stage, each node and each hook exactly once.

`plan` says which part can run; this file holds the gradients that have reached the border between what has run and what has
not, and runs the parts by torch's engine wherever that is able to, and node by node where it is not. One thread at a time.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from zmqagent.autograd.functions import RECV_NODE, NoGradient
from zmqagent.autograd.leaves import gradients_in_place, memory_of_their_own
from zmqagent.autograd.plan import Edge, Node, Plan, Stage
from zmqagent.autograd.stepping import add, run_node, run_recv, stepping_on

__all__ = ["StagedGraph"]

_LEAF_NODE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class StagedGraph:
    """A worker's part of one backward pass.

    Args:
        roots: for each root the edges through which its gradients enter, one gradient an edge.
        gradients: where the leaves' gradients accumulate; updated by the last stage.
        retain_graph: whether the graph can be run again.
    """

    def __init__(self, roots: Sequence[Sequence[Edge]], gradients: MutableMapping[Tensor, Tensor], retain_graph: bool) -> None:
        self._roots = roots
        self._gradients = gradients
        self._retain_graph = retain_graph
        self._plan = Plan(roots, _LEAF_NODE, RECV_NODE)
        self._run_recvs: set[Node] = set()
        # The border: what has flowed into nodes that have not run. None says that an undefined gradient has: it has no value, and
        # yet the node must run.
        self._sums: dict[Edge, Tensor | None] = {}

    @property
    def is_finished(self) -> bool:
        """True once every node has run."""
        return self._plan.is_finished

    def arrive(self, root: int, gradients: Sequence[Tensor]) -> None:
        """Takes in the gradients of root number ``root``."""
        for edge, gradient in zip(self._roots[root], gradients, strict=True):
            self._flow_into(edge, gradient)
        self._plan.arrive(root)

    def step(self) -> bool:
        """Runs the next stage; False if none can run now."""
        stage = self._plan.next_stage()
        if stage is None:
            return False
        if stage.is_last:
            self._run_rest()
        elif self._suits_the_engine(stage):
            self._run_by_engine(stage)
        else:
            self._run_by_nodes(stage.nodes)
        self._run_recvs.update(stage.recvs)
        return True

    def _flow_into(self, edge: Edge, gradient: Tensor | None) -> None:
        self._sums[edge] = add(self._sums.get(edge), gradient)

    def _suits_the_engine(self, stage: Stage) -> bool:
        """Whether one engine call can run ``stage`` and hand out what leaves it.

        It can if every edge that leaves ends in a leaf: nothing lies behind a leaf. And the leaf must have no tensor hooks: the
        engine would show them the part of the sum that this stage contributes.
        """
        if any(type(node) is not _LEAF_NODE or node.variable._backward_hooks for node, _ in stage.leaving):
            return False
        nodes = set(stage.nodes)
        return all(gradient is not None for (node, _), gradient in self._sums.items() if node in nodes)

    def _run_by_engine(self, stage: Stage) -> None:
        nodes = set(stage.nodes)
        starts = [edge for edge in self._sums if edge[0] in nodes]
        flowing = [self._sums.pop(edge) for edge in starts]
        leaving = [*stage.leaving, *map(_anchor_of, stage.recvs)]
        results = torch.autograd.grad(
            [GradientEdge(*edge) for edge in starts],
            [GradientEdge(*edge) for edge in leaving],
            flowing,
            retain_graph=self._retain_graph,
            allow_unused=True,
        )
        for edge, result in zip(stage.leaving, results, strict=False):
            self._flow_into(edge, result)

    def _run_by_nodes(self, nodes: Sequence[Node]) -> None:
        with stepping_on(self._sums):
            for node in nodes:
                inputs = [self._sums.pop((node, number), None) for number in range(len(node._input_metadata))]
                if type(node) is RECV_NODE:
                    run_recv(node, inputs, self._retain_graph)
                else:
                    for edge, gradient in run_node(node, inputs, self._plan.edges_of(node)):
                        self._flow_into(edge, gradient)

    def _run_rest(self) -> None:
        """The last stage: one engine call that also accumulates into all leaves."""
        recvs = [recv for recv in self._plan.recvs if recv not in self._run_recvs]
        if any(gradient is None and type(node) is not _LEAF_NODE for (node, _), gradient in self._sums.items()):
            # The engine starts from gradients that exist. Rare: a function returned None for an input, at the border of a stage.
            self._run_by_nodes([node for node in self._plan.rest() if type(node) is not _LEAF_NODE])
        ends = [GradientEdge(leaf, 0) for leaf in self._plan.leaves] + [GradientEdge(*_anchor_of(recv)) for recv in recvs]
        starts: list[Any] = []
        flowing: list[Tensor] = []
        for (node, number), gradient in self._sums.items():
            if gradient is not None:
                starts.append(GradientEdge(node, number))
                flowing.append(gradient)
            elif node.variable.requires_grad:
                # Hooks on a parameter run even if nothing reaches it but undefined gradients; a reducer counts on that.
                starts.append(source := NoGradient.apply(node.variable))  # type: ignore[no-untyped-call]
                flowing.append(torch.zeros_like(source))
        self._sums.clear()
        variables = list({id(leaf.variable): leaf.variable for leaf in self._plan.leaves}.values())
        with gradients_in_place(variables, self._gradients), memory_of_their_own(self._plan.leaves):
            if starts and ends:
                torch.autograd.backward(starts, flowing, retain_graph=self._retain_graph, inputs=ends)


def _anchor_of(recv: Node) -> Edge:
    """The one edge behind a recv; asking the engine for it makes it run the recv."""
    edge: Edge = recv.next_functions[0]
    return edge
