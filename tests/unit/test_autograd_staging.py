"""The staged engine alone, on random local graphs, against one plain backward over all roots.

Each program is built twice from one seed: once with recvs and staged, its roots arriving in random order, and once with plain
leaves in the recvs' places. Everything observable must agree: gradients of leaves, what each recv sends, how often each custom
function, tensor hook and parameter hook ran and on what values, and ``.grad`` of tensors that retain it.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from zmqagent.autograd.functions import Wire, receive_tensors
from zmqagent.autograd.staging import StagedGraph
from zmqagent.wire.types import AutogradMetadata, WorkerId

PROGRAMS = 2000
"""How many random programs are run; about 8 ms each."""

SHAPE = (2, 2)


class Log:
    """What happened while a program ran backward."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.values: dict[str, list[Tensor | None]] = {}

    def note(self, name: str, value: Tensor | None = None) -> None:
        self.calls[name] += 1
        self.values.setdefault(name, []).append(None if value is None else value.detach().to_dense().clone())


class TwoToTwo(torch.autograd.Function):
    """Two inputs, a number between them, two outputs; counts its calls."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, scale: float, b: Tensor, log: Log, name: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        ctx.scale, ctx.log, ctx.name = scale, log, name
        return a * b * scale, a - b

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        ctx.log.note(ctx.name, g + 2 * h)
        a, b = ctx.saved_tensors
        return g * b * ctx.scale + h, None, g * a * ctx.scale - h, None, None


class PartlyUndefined(torch.autograd.Function):
    """Returns no gradient for its first input."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, log: Log, name: str) -> tuple[Tensor, Tensor]:
        ctx.log, ctx.name = log, name
        return a * 1, b * 3

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        ctx.log.note(ctx.name)
        return None, h * 3, None, None


class BroadcastGradient(torch.autograd.Function):
    """Returns a gradient of another shape and type than its input has; the engine brings it into form."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.sum(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.to(torch.float32).expand(3, *SHAPE)


def random_tensor(rng: random.Random) -> Tensor:
    return torch.tensor([rng.uniform(-1, 1) for _ in range(4)], dtype=torch.float64).reshape(SHAPE)


def doubled(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient * 2


class Program:
    """One random program: leaves, tensors that arrive, operations on them, and tensors that leave as roots.

    The same ``seed`` always makes the same program; ``receive`` makes the tensors that arrive.
    """

    def __init__(self, seed: int, receive: Callable[[int, list[Tensor]], list[Tensor]]) -> None:
        self.log = Log()
        self._rng = rng = random.Random(seed)
        self._receive = receive
        self._accumulators: list[Any] = []
        self._functions = 0
        self.retained: list[Tensor] = []
        self.leaves = [random_tensor(rng).requires_grad_() for _ in range(rng.randint(1, 4))]
        for number, leaf in enumerate(self.leaves):
            self._hang_hooks_on(leaf, f"leaf{number}")
        self._pool = list(self.leaves)
        self.received: list[list[Tensor]] = []
        self.roots: list[list[Tensor]] = []
        for _ in range(rng.randint(3, 30)):
            self._grow()
        for _ in range(rng.randint(1, 6)):
            self._send()
        self.gradients = [[random_tensor(rng).reshape(-1)[: t.numel()].reshape(t.shape) for t in root] for root in self.roots]

    def _pick(self) -> Tensor:
        # Recent tensors more often, so that graphs get deep.
        return self._pool[-1 - min(int(self._rng.expovariate(0.2)), len(self._pool) - 1)]

    def _hang_hooks_on(self, leaf: Tensor, name: str) -> None:
        rng, log = self._rng, self.log
        if rng.random() < 0.15:
            leaf.register_hook(lambda g: log.note(f"{name} hook", g))
        if rng.random() < 0.1:
            leaf.register_hook(doubled)
        if rng.random() < 0.2:
            leaf.register_post_accumulate_grad_hook(lambda p: log.note(f"{name} post-accumulate", p.grad))
        if rng.random() < 0.2:
            node = get_gradient_edge(leaf).node
            node.register_hook(lambda *_: log.note(f"{name} node"))
            self._accumulators.append(node)

    def _grow(self) -> None:
        rng = self._rng
        kind = max(rng.randrange(-2, 13), 0)
        a, b = self._pick(), self._pick()
        name = f"f{len(self._pool)}"
        new: Sequence[Tensor]
        if kind == 0:
            new = self._receive(len(self.received), [random_tensor(rng) for _ in range(rng.randint(1, 3))])
            self.received.append(list(new))
        elif kind == 1:
            new = TwoToTwo.apply(a, rng.uniform(-1, 1), b, self.log, name)
        elif kind == 2:
            new = TwoToTwo.apply(a, rng.uniform(-1, 1), b.detach(), self.log, name)
        elif kind == 3 and rng.random() < 0.3:
            new = PartlyUndefined.apply(a, b, self.log, name)
        elif kind == 4:
            new = torch.stack([a, b]).unbind(0)
        elif kind == 5:
            new = [(a * 1).mul_(b)]
        elif kind == 6:
            new = [BroadcastGradient.apply(a) + b]
        elif kind == 7:
            weight = self.leaves[rng.randrange(len(self.leaves))]
            new = [torch.nn.functional.embedding(torch.tensor([0, 1]), weight, sparse=True) * a]
        elif kind == 8:
            hooked = a.sin() + b
            # torch calls tensor hooks with None too; a stepped node does not.
            hooked.register_hook(lambda g: None if g is None else self.log.note(f"{name} hook", g))
            new = [hooked]
        elif kind == 9:
            halved = a * 0.5
            halved.register_hook(doubled)
            new = [halved]
        elif kind == 10:
            kept = a * b
            kept.retain_grad()
            self.retained.append(kept)
            new = [kept]
        elif kind == 11:
            new = [a @ self.leaves[rng.randrange(len(self.leaves))]]
        else:
            new = [a * b + a.cos()]
        # Values stay small, so that gradients can be compared to 1e-9.
        self._pool.extend(tensor.sin() if tensor.detach().abs().max() > 1.5 else tensor for tensor in new)

    def _send(self) -> None:
        # From anywhere, so that a recv is often reached by some roots and not by others: that is what makes stages.
        tensors = self._rng.choices(self._pool, k=self._rng.choice([1, 1, 2]))
        self.roots.append(tensors if self._rng.random() < 0.8 else [tensors[0].sum()])


class FakeContext:
    """What a recv asks of its context."""

    is_released = False

    def __init__(self) -> None:
        self.sent: dict[int, list[Tensor]] = {}
        self.times_sent: Counter[int] = Counter()

    def gradient_sender(self, wire: Wire, gradients: Sequence[Tensor]) -> None:
        self.times_sent[wire.metadata.message_id] += 1
        assert not any(gradient.requires_grad for gradient in gradients), "backward was recorded"
        self.sent[wire.metadata.message_id] = [gradient.detach().clone() for gradient in gradients]

    def receive(self, number: int, tensors: list[Tensor]) -> list[Tensor]:
        wire = Wire(weakref.ref(self), AutogradMetadata(0, number), WorkerId(1), None)
        return receive_tensors(wire, [tensor.requires_grad_() for tensor in tensors])[1]


def as_edges(root: list[Tensor]) -> list[tuple[Any, int]]:
    return [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, root)]


def run_plainly(seed: int) -> Program:
    """The program with leaves in the recvs' places, and one backward."""
    program = Program(seed, lambda number, tensors: [tensor.requires_grad_() * 1 for tensor in tensors])
    for received in program.received:
        for tensor in received:
            tensor.retain_grad()
    roots = [tensor for root in program.roots for tensor in root]
    torch.autograd.backward(roots, [gradient for root in program.gradients for gradient in root])
    return program


def run_staged(seed: int, context: FakeContext, gradients: dict[Tensor, Tensor], retain_graph: bool = False) -> Program:
    """The program with recvs, its roots arriving in random order, everything run as soon as it can."""
    program = Program(seed, context.receive)
    graph = StagedGraph([as_edges(root) for root in program.roots], gradients, retain_graph)
    order = list(range(len(program.roots)))
    random.Random(~seed).shuffle(order)
    for root in order:
        graph.arrive(root, program.gradients[root])
        while graph.step():
            pass
    assert graph.is_finished
    return program


def assert_same(staged: Tensor | None, plain: Tensor | None, what: str) -> None:
    assert (staged is None) == (plain is None), f"{what}: staged {staged}, plain {plain}"
    if staged is not None and plain is not None:
        plain = plain.to_dense()
        scale = max(1.0, plain.abs().max().item())
        torch.testing.assert_close(staged.to_dense(), plain, rtol=0, atol=1e-9 * scale, msg=lambda text: f"{what}: {text}")


def compare(seed: int) -> None:
    context = FakeContext()
    gradients: dict[Tensor, Tensor] = {}
    plain = run_plainly(seed)
    staged = run_staged(seed, context, gradients)
    for number, (leaf, plain_leaf) in enumerate(zip(staged.leaves, plain.leaves, strict=True)):
        assert leaf.grad is None, "a pass left something in .grad"
        assert_same(gradients.get(leaf), plain_leaf.grad, f"leaf {number}")
    assert all(times == 1 for times in context.times_sent.values()), f"recvs ran {context.times_sent} times"
    for number, received in enumerate(plain.received):
        expected = [tensor.grad for tensor in received]
        if number not in context.sent:
            assert expected == [None] * len(expected), f"recv {number} has not run"
            continue
        for sent, value in zip(context.sent[number], expected, strict=True):
            assert_same(sent, torch.zeros(SHAPE, dtype=torch.float64) if value is None else value, f"recv {number}")
    assert staged.log.calls == plain.log.calls, "functions and hooks ran as often"
    for name, values in plain.log.values.items():
        for one, other in zip(staged.log.values[name], values, strict=True):
            assert_same(one, other, name)
    for one, other in zip(staged.retained, plain.retained, strict=True):
        assert_same(one.grad, other.grad, "retained gradient")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_staged_runs_equal_one_plain_backward_on_random_graphs() -> None:
    first = random.randrange(1 << 40)
    print(f"seeds from {first}")
    for seed in range(first, first + PROGRAMS):
        try:
            compare(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_hooks_run_on_a_parameter_that_a_stage_gives_no_gradient() -> None:
    """A reducer counts on being called for every parameter, also if the only gradient that reaches it is undefined."""
    context, log = FakeContext(), Log()
    (arrived,) = context.receive(0, [torch.ones(1)])
    parameter, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    node = get_gradient_edge(parameter).node
    node.register_hook(lambda *_: log.note("hook"))
    first = PartlyUndefined.apply(parameter, arrived, log, "function")[1]
    gradients: dict[Tensor, Tensor] = {}
    graph = StagedGraph([as_edges([first]), as_edges([other * 2])], gradients, False)
    graph.arrive(0, [torch.ones(1)])
    assert graph.step()
    assert (context.sent[0][0].item(), graph.step(), log.calls["hook"]) == (3.0, False, 0)
    graph.arrive(1, [torch.ones(1)])
    assert graph.step()
    assert log.calls == {"function": 1, "hook": 1}
    assert {leaf: gradient.item() for leaf, gradient in gradients.items()} == {other: 2.0}


def test_a_stage_that_borders_on_nodes_runs_them_no_second_time() -> None:
    """A weight on both sides of a cut: an edge leaves the stage to a node, and another one to the weight behind that node."""
    context, log = FakeContext(), Log()
    weight = torch.tensor([3.0], requires_grad=True)
    before, _ = TwoToTwo.apply(weight, 1.0, weight, log, "before the cut")
    (arrived,) = context.receive(0, [torch.tensor([2.0])])
    loss = before * weight * arrived
    gradients: dict[Tensor, Tensor] = {}
    graph = StagedGraph([as_edges([loss]), as_edges([before])], gradients, False)
    graph.arrive(0, [torch.ones(1)])
    assert graph.step()
    assert (context.sent[0][0].item(), log.calls) == (27.0, {})
    graph.arrive(1, context.sent[0])
    assert graph.step()
    assert (graph.is_finished, log.calls) == (True, {"before the cut": 1})
    # d(w^3 * r) / dw, and 27 times d(w^2) / dw.
    assert gradients[weight].item() == 3 * 9 * 2 + 27 * 2 * 3
