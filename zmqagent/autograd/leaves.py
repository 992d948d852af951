"""Exclusive use of leaf tensors while a backward pass accumulates into them.

Hooks on parameters, and what data-parallel reducers hang on them, run only if torch's engine executes the real ``AccumulateGrad``
nodes, and those write to ``.grad``. A distributed pass must leave ``.grad`` alone: its gradients belong to a context. So for the
length of one engine call the ``.grad`` of every leaf is the context's gradient, and nobody else may do the same to that leaf
meanwhile. While it lasts, user code that reads ``.grad`` elsewhere sees the context's gradient.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEAVES", "LeafQueues", "gradients_in_place", "memory_of_their_own"]


class _Turn:
    """One user of a set of leaves."""

    __slots__ = ("thread",)

    def __init__(self, thread: int) -> None:
        self.thread = thread


class LeafQueues:
    """A queue for each leaf; a pass enters the queues of all its leaves in one step and runs when it heads them all.

    Because the queues are entered together, any two passes stand in the same order in every queue that they share: nobody waits
    in a circle, and nobody is overtaken for ever. A pass that starts inside another one on the same thread (a hook that calls
    ``backward``) goes to the front of the queues that its thread heads already.
    """

    def __init__(self) -> None:
        # Protects _queues. Waiters are passes, on whichever threads run them; each wait ends when the passes ahead leave.
        self._changed = threading.Condition()
        self._queues: dict[int, deque[_Turn]] = {}

    @contextmanager
    def hold(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Runs the body while no other thread holds any of ``leaves``."""
        turn = _Turn(threading.get_ident())
        keys = [id(leaf) for leaf in leaves]
        with self._changed:
            for key in keys:
                queue = self._queues.setdefault(key, deque())
                if queue and queue[0].thread == turn.thread:
                    queue.appendleft(turn)
                else:
                    queue.append(turn)
        try:
            with self._changed:
                while any(self._queues[key][0] is not turn for key in keys):
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                for key in keys:
                    queue = self._queues[key]
                    queue.remove(turn)
                    if not queue:
                        del self._queues[key]
                self._changed.notify_all()


LEAVES = LeafQueues()
"""For the whole process, as parameters are: several workers may live in one process and share them."""


@contextmanager
def gradients_in_place(leaves: Sequence[Tensor], gradients: MutableMapping[Tensor, Tensor]) -> Iterator[None]:
    """Runs the body while the ``.grad`` of each of ``leaves`` is its entry in ``gradients``; takes over what is there afterwards.

    All leaves are swapped before the body and none inside it: a reducer reads the ``.grad`` of other leaves than the one whose
    hook calls it.

    Args:
        leaves: the leaves, each once.
        gradients: the context's gradient of each leaf that has one.
    """
    with LEAVES.hold(leaves):
        users = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = gradients.get(leaf)
        try:
            yield
        finally:
            for leaf, user in zip(leaves, users, strict=True):
                gradient = leaf.grad
                leaf.grad = user
                if gradient is None:
                    gradients.pop(leaf, None)
                else:
                    gradients[leaf] = gradient


@contextmanager
def memory_of_their_own(nodes: Sequence[Any]) -> Iterator[None]:
    """Keeps two leaves from getting gradients in the same memory while the body runs the engine.

    An ``AccumulateGrad`` node takes a gradient over, uncopied, if nobody else refers to the tensor. A function may return one
    tensor, or two on the same memory, for several inputs; what is added to one leaf's gradient later would then show in the
    other's. So a second gradient in the same memory is held until the end, and its leaf makes a copy. A gradient that shares
    nothing is taken over as ever.

    Args:
        nodes: the leaves' ``AccumulateGrad`` nodes, each once.
    """
    claimed: set[int] = set()
    held: list[Tensor] = []

    def claim(gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if gradient is None or gradient.layout != torch.strided:
            return
        memory = gradient.untyped_storage().data_ptr()
        if memory in claimed:
            held.append(gradient)
        claimed.add(memory)

    with ExitStack() as hooks:
        if len(nodes) > 1:
            for node in nodes:
                hooks.enter_context(node.register_prehook(claim))
        yield
