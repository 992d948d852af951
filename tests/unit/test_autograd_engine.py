"""Backward passes over a few workers: what comes out, and what they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.autograd.profiler import profile

from tests.support.autograd_network import Network, Worker
from tests.support.autograd_passes import WAIT, Answers, gradients_of, product_with, weights
from zmqagent.exceptions import (
    AutogradContextError,
    BackwardError,
    InvalidTypeError,
    RemoteBackwardError,
)
from zmqagent.wire.commands import BackwardAutograd
from zmqagent.wire.types import AutogradMetadata, WorkerId

# What comes out.


def test_a_local_graph_needs_no_other_worker() -> None:
    with Network(1, 0) as network:
        (worker,) = network.workers
        lease = worker.container.new_context()
        a, b = weights(1.0, 2.0), weights(3.0, 4.0)
        a.grad = users = torch.zeros(2, dtype=torch.float64)
        worker.engine.backward(lease._context_id(), [(a * b).sum(), a.sum()])
        found = gradients_of(worker, lease)
        assert (found[a].tolist(), found[b].tolist()) == ([4.0, 5.0], [1.0, 2.0])
        assert (a.grad is users, users.tolist(), b.grad) == (True, [0.0, 0.0], None)


def test_gradients_arrive_on_every_worker_and_accumulate_over_passes() -> None:
    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        mine, theirs = weights(2.0), weights(3.0)
        (result,) = worker.call(1, product_with(theirs), mine).result(WAIT)
        for times in (1, 2):
            worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=times == 1)
            assert gradients_of(worker, lease)[mine].item() == 3.0 * times
            assert gradients_of(other, lease)[theirs].item() == 2.0 * times


def test_a_second_pass_without_retain_graph_fails_as_in_torch() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        worker.engine.backward(lease._context_id(), [result.sum()])
        with pytest.raises(RemoteBackwardError, match="Trying to backward through the graph a second time"):
            worker.engine.backward(lease._context_id(), [result.sum()])


@pytest.mark.parametrize("rounds", [1, 5])
def test_calls_back_and_forth_do_not_wait_for_each_other(rounds: int) -> None:
    """Each worker needs gradients from the other before it can finish, several times over."""
    weight = [weights(1.5), weights(0.5)]

    def bounce(worker: Worker | None, at: int, left: int, tensor: Tensor) -> list[Tensor]:
        held = tensor * weight[at] + weight[at]
        if left:
            if worker is None:
                (back,) = bounce(None, 1 - at, left - 1, held)
            else:
                (back,) = worker.call(1 - at, lambda there, t: bounce(there, 1 - at, left - 1, t), held).result(WAIT)
            held = held * back + weight[at]
        return [held]

    start = weights(0.3)
    expected = torch.autograd.grad(bounce(None, 0, rounds, start)[0].sum(), [start, *weight])
    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        worker.engine.backward(lease._context_id(), [bounce(worker, 0, rounds, start)[0].sum()])
        mine, theirs = gradients_of(worker, lease), gradients_of(other, lease)
        torch.testing.assert_close([mine[start], mine[weight[0]], theirs[weight[1]]], list(expected))


def test_a_worker_may_call_itself() -> None:
    with Network(1, 0) as network:
        (worker,) = network.workers
        lease = worker.container.new_context()
        a, b = weights(2.0), weights(3.0)
        (result,) = worker.call(0, product_with(b), a).result(WAIT)
        worker.engine.backward(lease._context_id(), [result.sum()])
        found = gradients_of(worker, lease)
        assert (found[a].item(), found[b].item()) == (3.0, 2.0)


def test_results_that_go_unused_get_zeros() -> None:
    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        mine, used, unused = weights(2.0), weights(3.0), weights(4.0)
        result, _ = worker.call(1, lambda _, t: [t * used, t * unused], mine).result(WAIT)
        worker.engine.backward(lease._context_id(), [result.sum()])
        found = gradients_of(other, lease)
        assert (found[used].item(), found[unused].item()) == (2.0, 0.0)
        assert gradients_of(worker, lease)[mine].item() == 3.0


def test_sparse_gradients_stay_sparse_and_accumulate() -> None:
    table = torch.ones(10, 2, requires_grad=True)
    rows = torch.tensor([1, 4, 4])

    def look_up(worker: Worker, scale: Tensor) -> list[Tensor]:
        return [torch.nn.functional.embedding(rows, table, sparse=True) * scale]

    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        (result,) = worker.call(1, look_up, torch.ones(1, requires_grad=True)).result(WAIT)
        for _ in range(2):
            worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=True)
        gradient = gradients_of(other, lease)[table]
        assert gradient.is_sparse
        assert gradient.to_dense()[:, 0].tolist() == [0, 2, 0, 0, 4, 0, 0, 0, 0, 0]


def test_hooks_of_parameters_run_once_and_see_the_gradients_of_all_leaves() -> None:
    """A data-parallel reducer hangs on the accumulator of each parameter and, from the last one, reads the others' ``.grad``."""
    one, two = weights(2.0), weights(3.0)
    seen: list[tuple[float, float]] = []

    def reduce(*_: object) -> None:
        if one.grad is not None and two.grad is not None:
            seen.append((one.grad.item(), two.grad.item()))
            one.grad.mul_(10)

    nodes = [get_gradient_edge(leaf).node for leaf in (one, two)]
    for node in nodes:
        node.register_hook(reduce)
    with Network(1, 0) as network:
        (worker,) = network.workers
        lease = worker.container.new_context()
        worker.engine.backward(lease._context_id(), [(one * two).sum()])
        assert seen == [(3.0, 2.0)]
        assert gradients_of(worker, lease)[one].item() == 30.0


def test_contexts_in_parallel_do_not_mix_their_gradients() -> None:
    shared = weights(1.0, 2.0)

    def train(worker: Worker, scale: float) -> float:
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(shared), weights(scale, scale)).result(WAIT)
        worker.engine.backward(lease._context_id(), [result.sum()])
        gradient = gradients_of(worker.network.workers[1], lease)[shared]
        worker.container.release_context(lease._context_id())
        return gradient[0].item()

    with Network(2, 0) as network, ThreadPoolExecutor(8) as users:
        scales = [float(number) for number in range(40)]
        assert list(users.map(lambda scale: train(network.workers[0], scale), scales)) == scales
        assert shared.grad is None


def test_the_profiler_sees_the_pass_and_its_send_and_recv() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        with profile() as profiled:
            worker.engine.backward(lease._context_id(), [result.sum()])
        names = [event.name for event in profiled.function_events]
        for name in ("SendRpcBackward", "RecvRpcBackward", "backward"):
            assert names.count(f"torch::distributed::autograd::{name}") == 1, name


# What it refuses.


@pytest.mark.parametrize(
    ("roots", "text"),
    [
        ([], "No tensors provided for gradient computation."),
        ([torch.rand(3, 3)], "requires_grad not set on"),
        ([torch.rand(3, 3, requires_grad=True)], "is not a scalar, all roots need to be scalar"),
        ([torch.rand(1, requires_grad=True)], "does not have a valid gradient function"),
    ],
)
def test_roots_that_cannot_start_a_pass(roots: list[Tensor], text: str) -> None:
    with Network(1, 0) as network:
        lease = network.workers[0].container.new_context()
        with pytest.raises(BackwardError, match=text):
            network.workers[0].engine.backward(lease._context_id(), roots)


@pytest.mark.parametrize("arguments", [(1, None), (None, None), (True, []), (1, [3]), (1, [torch.ones(1)], 2)])
def test_arguments_of_the_wrong_type(arguments: tuple[Any, ...]) -> None:
    with Network(1, 0) as network, pytest.raises(InvalidTypeError, match="incompatible function arguments"):
        network.workers[0].engine.backward(*arguments)


def test_an_unknown_context() -> None:
    with Network(1, 0) as network, pytest.raises(AutogradContextError, match="Could not find autograd context with id: 100"):
        network.workers[0].engine.backward(100, [weights(1.0).sum()])


def test_a_second_pass_of_a_context_while_one_is_under_way() -> None:
    errors = []

    def again(_: Tensor) -> None:
        try:
            with torch.enable_grad():
                worker.engine.backward(lease._context_id(), [weights(1.0).sum()])
        except BackwardError as error:
            errors.append(str(error))

    with Network(1, 0) as network:
        (worker,) = network.workers
        lease = worker.container.new_context()
        leaf = weights(1.0)
        leaf.register_hook(again)
        worker.engine.backward(lease._context_id(), [leaf.sum()])
        assert len(errors) == 1
        assert "is under way on this worker" in errors[0]


def test_torchs_own_backward_over_a_recv_says_what_to_call() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        with pytest.raises(BackwardError, match=r"call torch\.distributed\.autograd\.backward with context id"):
            result.sum().backward()
        worker.container.release_context(lease._context_id())
        with pytest.raises(AutogradContextError, match="Autograd context no longer valid! This usually means"):
            result.sum().backward()


def test_gradients_that_belong_nowhere_are_answered_by_an_error() -> None:
    def deliver(metadata: AutogradMetadata, pass_id: int, count: int = 1) -> str:
        answers = Answers()
        network.workers[1].engine.on_backward(
            WorkerId(0), BackwardAutograd(metadata, pass_id, True, [torch.ones(1, dtype=torch.float64)] * count), answers
        )
        return answers.error()

    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        context_id = lease._context_id()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        (message_id,) = other.container.retrieve_context(context_id)._send_functions()
        metadata = AutogradMetadata(context_id, message_id)
        assert "Error on Node 1: Could not find autograd context with id: 77" in deliver(AutogradMetadata(77, 1), 1 << 16)
        text = deliver(AutogradMetadata(context_id, 99), 1 << 16)
        assert "Could not find send function for autograd message id: 99" in text
        worker.engine.backward(context_id, [result.sum()], retain_graph=True)
        assert "is over on this worker" in deliver(metadata, 1 << 16)
        assert "2 gradients came" in deliver(metadata, 9 << 16 | 5, count=2)
        assert other.engine.passes_under_way() == 0
        worker.engine.backward(context_id, [result.sum()], retain_graph=True)
