"""Backward passes over a few workers: what comes out, how they end, and what they say when they fail."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.autograd.profiler import profile

from tests.support.autograd_network import Call, Network, Worker
from zmqagent.autograd import engine as engine_module
from zmqagent.autograd.container import ContextLease
from zmqagent.exceptions import (
    AutogradContextError,
    BackwardError,
    InvalidTypeError,
    RemoteBackwardError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.wire.commands import AbortBackward, BackwardAutograd, Failure, parse
from zmqagent.wire.types import AutogradMetadata, Message, MessageType, WorkerId

WAIT = 30.0
"""Seconds after which something that must happen is taken to hang."""


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients_of(worker: Worker, lease: ContextLease) -> dict[Tensor, Tensor]:
    return worker.container.retrieve_context(lease._context_id()).gradients()


def product_with(weight: Tensor) -> Any:
    return lambda worker, *tensors: [tensor * weight for tensor in tensors]


class Fault(torch.autograd.Function):
    """Fails in backward while ``is_on``."""

    is_on = True

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Fault.is_on:
            raise ValueError("Simulate error on backward pass")
        return gradient


@pytest.fixture(autouse=True)
def _faults_are_on() -> None:
    Fault.is_on = True


class Answers:
    """Collects what a request is answered with."""

    def __init__(self) -> None:
        self.future: Future[Message] = Future()

    def __call__(self, message: Message) -> None:
        self.future.set_result(message)

    def error(self) -> str:
        answer = parse(self.future.result(WAIT))
        assert isinstance(answer, Failure)
        return answer.text


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


# How it ends when something fails.


def chain(network: Network, route: Sequence[int], start: Tensor) -> Tensor:
    """Calls each worker of ``route`` from the one before; the last one's backward fails."""

    def hop(there: Worker, tensor: Tensor, left: Sequence[int]) -> list[Tensor]:
        if not left:
            return [Fault.apply(tensor * 2)]
        return [there.call(left[0], lambda next_one, t: hop(next_one, t, left[1:]), tensor * 3).result(WAIT)[0] * 5]

    return hop(network.workers[0], start, route)[0]


def test_an_error_deep_in_a_chain_names_each_hop_and_ends_the_pass_everywhere() -> None:
    with Network(3, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        start = weights(1.0)
        result = chain(network, [1, 2], start)
        for _ in range(5):
            with pytest.raises(RemoteBackwardError, match=r"^Error on Node 1: Error on Node 2: Simulate error on backward pass$"):
                worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=True)
            network.settle()
            assert [other.engine.passes_under_way() for other in network.workers] == [0, 0, 0]
        Fault.is_on = False
        worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=True)
        assert gradients_of(worker, lease)[start].item() == 3 * 3 * 2 * 5 * 5


def test_passes_that_follow_a_failure_at_once_are_not_hurt_by_its_aborts() -> None:
    with Network(3, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        start = weights(1.0)
        result = chain(network, [1, 2, 0, 2], start)
        expected = 0.0
        for number in range(60):
            Fault.is_on = number % 2 == 0
            if Fault.is_on:
                with pytest.raises(RemoteBackwardError):
                    worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=True)
            else:
                worker.engine.backward(lease._context_id(), [result.sum()], retain_graph=True)
                expected += (3 * 5) ** 4 * 2
                assert gradients_of(worker, lease)[start].item() == expected


def test_an_error_on_the_opener_says_so_and_keeps_its_cause() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        failing = Fault.apply(weights(1.0))
        (result,) = worker.call(1, product_with(weights(3.0)), failing).result(WAIT)
        with pytest.raises(RemoteBackwardError, match=r"Error on Node [01]: .*Simulate error on backward pass") as caught:
            worker.engine.backward(lease._context_id(), [result.sum()])
        assert isinstance(caught.value.__cause__, ValueError) or "Error on Node 1: Error on Node 0" in str(caught.value)
        network.settle()
        assert network.workers[1].engine.passes_under_way() == 0


@pytest.fixture
def waiting() -> Any:
    """A pass on worker 0 that waits for gradients of a call whose result is not used."""
    with Network(3, 0) as network, ThreadPoolExecutor(1) as user:
        worker = network.workers[0]
        leases: Future[int] = Future()

        def run() -> None:
            lease = worker.container.new_context()
            a = weights(1.0)
            worker.call(1, product_with(weights(3.0)), a).result(WAIT)
            leases.set_result(lease._context_id())
            worker.engine.backward(lease._context_id(), [(a * a).sum()])

        outcome = user.submit(run)
        context_id = leases.result(WAIT)
        while worker.engine.passes_under_way() == 0:
            assert not outcome.done()
        yield network, context_id, outcome
        worker.engine.close()


def test_a_send_whose_result_is_not_used_keeps_the_pass_waiting_and_is_named_once(
    waiting: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, context_id, outcome = waiting
    monkeypatch.setattr(engine_module, "_PATIENCE", 0.0)
    with caplog.at_level(logging.WARNING, logger="zmqagent.autograd.engine"):
        network.workers[0].engine.report_overdue()
        network.workers[0].engine.report_overdue()
    (record,) = caplog.records
    assert re.search(rf"autograd context {context_id} .* from worker1 \(worker 1\) .* message id 0", record.getMessage())
    assert not outcome.done()
    assert network.workers[0].container.debug_info()["num_current_backward_passes"] == "1"


def test_releasing_the_context_ends_a_waiting_pass(waiting: Any) -> None:
    network, context_id, outcome = waiting
    network.workers[0].container.release_context(context_id)
    assert isinstance(outcome.exception(WAIT), AutogradContextError)


def test_the_death_of_a_worker_whose_gradients_are_missing_ends_the_pass(waiting: Any) -> None:
    network, _, outcome = waiting
    network.lose(WorkerId(2))
    assert not outcome.done()
    network.lose(WorkerId(1))
    assert isinstance(outcome.exception(WAIT), WorkerLostError)


def test_shutdown_ends_a_waiting_pass_and_refuses_new_ones(waiting: Any) -> None:
    network, context_id, outcome = waiting
    network.workers[0].engine.close(ShutdownError("over"))
    assert isinstance(outcome.exception(WAIT), ShutdownError)
    with pytest.raises(ShutdownError):
        network.workers[0].engine.backward(context_id, [weights(1.0).sum()])


def test_a_pass_that_would_need_a_dead_worker_fails_at_once() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        network.lose(WorkerId(1))
        with pytest.raises(WorkerLostError, match="worker 1 died"):
            worker.engine.backward(lease._context_id(), [result.sum()])


def test_the_death_of_the_opener_ends_its_pass_and_its_context_elsewhere() -> None:
    """Worker 1 is drawn in, and waits for gradients that only worker 0 could send."""
    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        weight = weights(3.0)
        worker.call(1, product_with(weight), weights(2.0)).result(WAIT)
        worker.call(1, product_with(weight), weights(2.0)).result(WAIT)
        context_id = lease._context_id()
        message_id = next(iter(other.container.retrieve_context(context_id)._send_functions()))
        answers = Answers()
        command = BackwardAutograd(AutogradMetadata(context_id, message_id), 1 << 16, False, [torch.ones(1, dtype=torch.float64)])
        other.engine.on_backward(WorkerId(0), command, answers)
        assert other.engine.passes_under_way() == 1
        network.lose(WorkerId(0))
        assert "worker 0 died" in answers.error()
        assert other.container.debug_info() == {"num_current_backward_passes": "0", "num_autograd_contexts": "0"}


def test_a_newer_pass_takes_the_place_of_an_older_one_that_waits() -> None:
    with Network(2, 0) as network:
        worker, other = network.workers
        lease = worker.container.new_context()
        weight = weights(3.0)
        first = worker.call(1, product_with(weight), torch.ones(1)).result(WAIT)[0]
        second = worker.call(1, product_with(weight), torch.ones(1)).result(WAIT)[0]
        context_id = lease._context_id()
        message_id = next(iter(other.container.retrieve_context(context_id)._send_functions()))
        answers = Answers()
        ones = [torch.ones(1, dtype=torch.float64)]
        stale = BackwardAutograd(AutogradMetadata(context_id, message_id), (1 << 16) | 0, True, ones)
        other.engine.on_backward(WorkerId(0), stale, answers)
        worker.container.retrieve_context(context_id).passes.draw(WorkerId(0))
        worker.engine.backward(context_id, [(first + second).sum()], retain_graph=True)
        assert "a newer backward pass" in answers.error()
        assert gradients_of(other, lease)[weight].item() == 2.0


def test_a_pass_has_the_graph_of_its_context_to_itself_while_it_runs() -> None:
    """A pass that was ended may still be inside a user's function when the next one comes."""
    free: list[bool] = []
    with Network(1, 0) as network:
        (worker,) = network.workers
        lease = worker.container.new_context()
        leaf = weights(1.0)
        leaf.register_hook(lambda _: free.append(lease.context.passes.turn.acquire(blocking=False)))
        worker.engine.backward(lease._context_id(), [leaf.sum()])
        assert free == [False]
        assert not lease.context.passes.turn.locked()


def test_an_abort_is_passed_on_once_and_is_harmless_if_nothing_is_known() -> None:
    seen: list[tuple[int, int]] = []

    def watch(call: Call) -> None:
        if call.message.type is MessageType.ABORT_BACKWARD_REQ:
            seen.append((call.source, call.to))

    with Network(3, 0, watch) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        chain(network, [1, 2], weights(1.0))
        network.workers[1].engine.on_abort(AbortBackward(lease._context_id(), 5 << 16, "why"), Answers())
        network.workers[1].engine.on_abort(AbortBackward(12345, 5 << 16, "why"), Answers())
        network.settle()
        assert sorted(seen) == [(0, 1), (1, 0), (1, 2), (2, 1)]


def test_an_interrupt_ends_the_wait_and_the_pass() -> None:
    """^C while the opener waits for an answer."""
    interrupted = threading.Event()

    def hold_up(call: Call) -> None:
        if call.message.type is MessageType.BACKWARD_AUTOGRAD_REQ:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert interrupted.wait(WAIT)

    with Network(2, 0, hold_up) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        with pytest.raises(KeyboardInterrupt):
            worker.engine.backward(lease._context_id(), [result.sum()])
        interrupted.set()
        assert worker.engine.passes_under_way() == 0
        network.settle()
        assert network.workers[1].engine.passes_under_way() == 0


def test_a_context_released_from_inside_backward_ends_the_pass() -> None:
    with Network(2, 0) as network:
        worker = network.workers[0]
        lease = worker.container.new_context()
        (result,) = worker.call(1, product_with(weights(3.0)), weights(2.0)).result(WAIT)
        result.register_hook(lambda _: worker.container.release_context(lease._context_id()))
        with pytest.raises(AutogradContextError, match="Autograd context no longer valid"):
            worker.engine.backward(lease._context_id(), [result.sum()])
