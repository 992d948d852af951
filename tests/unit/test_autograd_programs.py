"""Random programs that call across three workers, nested and concurrent: gradients as if all had run in one process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tests.support.autograd_network import Network, Worker

WORKERS = 3
PROGRAMS = 60
"""How many random programs are run; about 0.1 s each."""

PARAMETERS = 2
SHAPE = (2, 2)


def random_tensor(rng: random.Random) -> Tensor:
    return torch.tensor([rng.uniform(-1, 1) for _ in range(4)], dtype=torch.float64).reshape(SHAPE)


class Program:
    """A random tree of calls. What crosses to another worker is always used there, since the engine waits for its gradient."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = random.Random(seed)
        self.parameters = [[random_tensor(rng).requires_grad_() for _ in range(PARAMETERS)] for _ in range(WORKERS)]
        self.inputs = [random_tensor(rng).requires_grad_() for _ in range(2)]

    def run(self, worker: Worker | None, at: int, seed: int, depth: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The part that runs on worker number ``at``; without ``worker`` the calls stay in this process."""
        rng = random.Random(seed)
        weight = rng.choice(self.parameters[at])
        held = sum((tensor.sin() for tensor in tensors), start=weight.cos())
        calls = []
        for number in range(0 if depth == 0 else rng.randint(1, 3)):
            to, inner = rng.randrange(WORKERS), hash((seed, number))
            arguments = [held * weight + random_tensor(rng) for _ in range(rng.randint(1, 2))]
            if rng.random() < 0.3:
                # Sent on as it came.
                arguments.append(tensors[0])

            def part(there: Worker | None, *received: Tensor, to: int = to, inner: int = inner) -> list[Tensor]:
                return self.run(there, to, inner, depth - 1, received)

            if worker is None:
                calls.append(lambda part=part, arguments=arguments: part(None, *arguments))
            else:
                calls.append(worker.call(to, part, *arguments).result)
            if rng.random() < 0.5:
                # One after the other: what comes back goes into the next call.
                held = held + sum((result.sin() for result in calls.pop()()), start=weight * 1)
        for wait in calls:
            held = (held * rng.choice(self.parameters[at])).sin() + sum(result * 0.5 for result in wait())
        return [held * random_tensor(rng) for _ in range(rng.randint(1, 2))]

    def loss(self, worker: Worker | None, at: int) -> Tensor:
        return sum((tensor.sum() for tensor in self.run(worker, at, self._seed, 3, self.inputs)), start=torch.zeros(()))

    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *(leaf for leaves in self.parameters for leaf in leaves)]


def gradients_of_one_context(program: Program, network: Network, at: int) -> list[Tensor | None]:
    """Runs the program from worker ``at`` in a context of its own and collects what all workers accumulated."""
    worker = network.workers[at]
    lease = worker.container.new_context()
    context_id = lease._context_id()
    loss = program.loss(worker, at)
    worker.engine.backward(context_id, [loss])
    found: dict[Tensor, Tensor] = {}
    for other in network.workers:
        context = other.container.find_context(context_id)
        for leaf, gradient in context.gradients().items() if context is not None else ():
            assert leaf not in found or at_home(program, leaf) is None
            found[leaf] = gradient
    worker.container.release_context(context_id)
    return [found.get(leaf) for leaf in program.leaves()]


def at_home(program: Program, leaf: Tensor) -> int | None:
    """The worker whose parameter ``leaf`` is."""
    return next((at for at, leaves in enumerate(program.parameters) if any(leaf is other for other in leaves)), None)


def expected_gradients(program: Program, at: int) -> list[Tensor | None]:
    return list(torch.autograd.grad(program.loss(None, at), program.leaves(), allow_unused=True))


def compare(seed: int) -> None:
    program = Program(seed)
    expected = [expected_gradients(program, at) for at in range(WORKERS)]
    with Network(WORKERS, seed) as network, ThreadPoolExecutor(WORKERS) as users:
        results = list(users.map(lambda at: gradients_of_one_context(program, network, at), range(WORKERS)))
        network.settle()
        for worker in network.workers:
            assert worker.container.debug_info() == {"num_current_backward_passes": "0", "num_autograd_contexts": "0"}
    for result, wanted in zip(results, expected, strict=True):
        for got, want in zip(result, wanted, strict=True):
            assert (got is None) == (want is None)
            if got is not None and want is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * max(1.0, want.abs().max().item()))
    assert all(leaf.grad is None for leaf in program.leaves())


def test_gradients_equal_those_of_one_process() -> None:
    first = random.randrange(1 << 40)
    print(f"seeds from {first}")
    for seed in range(first, first + PROGRAMS):
        try:
            compare(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
