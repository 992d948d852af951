"""Which part of a worker's autograd graph can run when.

A backward pass enters the graph of one worker through several *roots*: the loss, and every send function of the context, each
of which waits for gradients from another worker. Those gradients may themselves depend on what this worker has yet to send
through its *recvs*, so the graph cannot wait for all roots and then run at once. A `Plan` cuts it into stages that run every
node exactly once:

- a stage that is not the last consists of the recvs whose roots have all arrived while others are missing, and of all nodes
  between the roots and them that have not run yet;
- the last stage is everything else, once all roots are there.

The nodes of a stage are closed towards the roots: whatever flows into them is complete when they run. This file only looks at
the shape of the graph (``next_functions``). It runs nothing, adds no gradients, and knows no I/O, threads or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Edge", "Node", "Plan", "Stage"]

Node = Any
"""A node of the autograd graph: hashable by identity, with ``next_functions``. Its Python object is the same for as long as one
reference to it is kept, which a `Plan` does for all nodes."""

Edge = tuple[Node, int]
"""An input of a node: the node, and the number of the input."""

_NO_EDGES: tuple[Edge, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """What is to run next.

    ``nodes`` are in topological order, roots first, and end in ``recvs`` (which are among them). ``leaving`` are the edges that
    lead out of the stage, each once. All three are empty in the last stage, which is simply the rest.
    """

    is_last: bool
    nodes: Sequence[Node] = ()
    recvs: Sequence[Node] = ()
    leaving: Sequence[Edge] = ()


class Plan:
    """The graph below a set of roots, and how much of it has been given out to run.

    Args:
        roots: for each root the edges through which its gradients enter.
        leaf_type: the type of the nodes that accumulate gradients; they end the graph.
        recv_type: the type of the nodes that send gradients to other workers; they end the graph too.

    The constructor visits each node once (about 1 µs a node). Order and reachability cost about as much again and are worked out
    only if a root is missing when a stage is asked for; a pass with a single root never needs them.
    """

    def __init__(self, roots: Sequence[Sequence[Edge]], leaf_type: type, recv_type: type) -> None:
        self.leaves: list[Node] = []
        self.recvs: list[Node] = []
        self._roots = roots
        self._missing = (1 << len(roots)) - 1
        self._given: set[Node] = set()
        self._is_finished = False
        self._pending: list[Node] | None = None
        self._ends = (leaf_type, recv_type)
        self._in_degree: dict[Node, int] = {}
        self._scan(leaf_type, recv_type)
        # Filled by _prepare.
        self._position: dict[Node, int] = {}
        self._reached_by: dict[Node, int] = {}
        self._parents: dict[Node, list[Node]] = {}

    def _scan(self, leaf_type: type, recv_type: type) -> None:
        """Finds all nodes and counts the edges into each."""
        in_degree = self._in_degree
        stack = list({node: None for edges in self._roots for node, _ in edges})
        for node in stack:
            in_degree[node] = 0
        while stack:
            node = stack.pop()
            kind = type(node)
            if kind is leaf_type:
                self.leaves.append(node)
                continue
            if kind is recv_type:
                self.recvs.append(node)
                continue
            # Not kept: so many tuples more would set off full garbage collections, which take longer than the pass.
            for child, _ in node.next_functions:
                if child is None:
                    continue
                if child in in_degree:
                    in_degree[child] += 1
                else:
                    in_degree[child] = 1
                    stack.append(child)

    def __len__(self) -> int:
        return len(self._in_degree)

    @property
    def is_finished(self) -> bool:
        """True once the last stage has been given out."""
        return self._is_finished

    def edges_of(self, node: Node) -> tuple[Edge, ...]:
        """The node's ``next_functions``; none for leaves and recvs, where the graph of this worker ends."""
        edges: tuple[Edge, ...] = _NO_EDGES if type(node) in self._ends else node.next_functions
        return edges

    def arrive(self, root: int) -> None:
        """Notes that the gradients of root number ``root`` are there."""
        self._missing &= ~(1 << root)

    def next_stage(self) -> Stage | None:
        """The next part that can run, which counts as run from now on; None if nothing can run before another root arrives."""
        if self._is_finished:
            return None
        if not self._missing:
            self._is_finished = True
            return Stage(is_last=True)
        if self._pending is None:
            self._prepare()
            self._pending = list(self.recvs)
        ready = [recv for recv in self._pending if not self._reached_by[recv] & self._missing]
        if not ready:
            return None
        self._pending = [recv for recv in self._pending if self._reached_by[recv] & self._missing]
        nodes = sorted(self._ancestors(ready), key=self._position.__getitem__)
        self._given.update(nodes)
        # All that flows into a given node has run before or is in this stage, so what is not given leads out.
        edges = [edge for node in nodes for edge in self.edges_of(node) if edge[0] is not None and edge[0] not in self._given]
        return Stage(is_last=False, nodes=nodes, recvs=ready, leaving=list(dict.fromkeys(edges)))

    def rest(self) -> list[Node]:
        """All nodes that no stage but the last contains, in topological order."""
        if not self._position:
            self._prepare()
        return [node for node in self._position if node not in self._given]

    def _ancestors(self, nodes: Iterable[Node]) -> set[Node]:
        """``nodes`` and all nodes towards the roots that have not been given out."""
        found = set(nodes)
        stack = list(found)
        while stack:
            for parent in self._parents.get(stack.pop(), ()):
                if parent not in found and parent not in self._given:
                    found.add(parent)
                    stack.append(parent)
        return found

    def _prepare(self) -> None:
        """Topological order (Kahn, 1962), and for each node its parents and the set of roots that reach it, as bits."""
        reached_by = self._reached_by
        for number, edges in enumerate(self._roots):
            for node, _ in edges:
                reached_by[node] = reached_by.get(node, 0) | 1 << number
        waiting = dict(self._in_degree)
        ready = [node for node, count in waiting.items() if not count]
        while ready:
            node = ready.pop()
            self._position[node] = len(self._position)
            roots = reached_by[node]
            for child, _ in self.edges_of(node):
                if child is None:
                    continue
                reached_by[child] = reached_by.get(child, 0) | roots
                self._parents.setdefault(child, []).append(node)
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
