"""Backward passes over a few workers: how they end when something fails, and what they say."""

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

from tests.support.autograd_network import Call, Network, Worker
from tests.support.autograd_passes import WAIT, Answers, gradients_of, product_with, weights
from zmqagent.autograd import engine as engine_module
from zmqagent.exceptions import (
    AutogradContextError,
    RemoteBackwardError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.wire.commands import AbortBackward, BackwardAutograd
from zmqagent.wire.types import AutogradMetadata, MessageType, WorkerId


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
        # The gradients that the other worker may send back, before it is told of the end, are none of this.
        if call.message.type is MessageType.BACKWARD_AUTOGRAD_REQ and not interrupted.is_set():
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
