"""`zmqagent.rpc.call_future`: who reads an answer, and when."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from zmqagent.agent.base import Reply, UnreadAnswer
from zmqagent.exceptions import WorkerLostError
from zmqagent.rpc import pickler
from zmqagent.rpc.call_future import CallFuture
from zmqagent.wire.commands import Failure, Return
from zmqagent.wire.types import MessageType

DEADLINE_S = 30.0


class Value:
    """What an answer brings; notes where it is unpickled, and in which state."""

    read_on: ClassVar[list[tuple[threading.Thread, bool]]] = []

    def __reduce__(self) -> tuple[Callable[[], Value], tuple[()]]:
        return _unpickled, ()


def _unpickled() -> Value:
    Value.read_on.append((threading.current_thread(), torch.is_grad_enabled()))
    return Value()


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    Value.read_on.clear()


def answer(value: Any) -> UnreadAnswer:
    reply = Return(pickler.dumps(value))
    return UnreadAnswer(MessageType.PYTHON_RET, reply.to_message().fields, lambda: reply)


def wait_with(future: CallFuture, users: ThreadPoolExecutor, count: int = 1) -> list[concurrent.futures.Future[Any]]:
    """Threads that wait for ``future``; the first of them is known to it."""
    waiting = [users.submit(lambda: (future.wait(), threading.current_thread())) for _ in range(count)]
    while future._reader is None:
        threading.Event().wait(0.001)
    return waiting


def test_an_answer_is_read_by_the_thread_that_waits_for_it() -> None:
    future = CallFuture()
    with ThreadPoolExecutor(1) as users, torch.no_grad():
        (waiting,) = wait_with(future, users)
        assert future.take_unread(answer(Value()))
        value, user = waiting.result(DEADLINE_S)
    assert isinstance(value, Value)
    assert future.wait() is value
    assert future.value() is value
    assert Value.read_on == [(user, True)]


def test_all_who_wait_get_the_same_value() -> None:
    future = CallFuture()
    with ThreadPoolExecutor(8) as users:
        waiting = wait_with(future, users, 8)
        assert future.take_unread(answer(Value()))
        assert len({id(each.result(DEADLINE_S)[0]) for each in waiting}) == 1
    assert len(Value.read_on) == 1


def test_an_answer_that_nobody_waits_for_is_left_to_the_agent() -> None:
    """Callbacks, and TorchScript, which waits out of Python's sight, need the value itself."""
    future = CallFuture()
    values: list[Any] = []
    future.add_done_callback(lambda done: values.append(done.value()))
    assert not future.take_unread(answer(Value()))
    assert not future.done()
    future(Return(pickler.dumps(Value())))
    assert [type(value) for value in values] == [Value]
    assert future.wait() is values[0]


@pytest.mark.parametrize(
    "type_", [MessageType.FORWARD_AUTOGRAD_RESP, MessageType.RUN_WITH_PROFILING_RESP, MessageType.REMOTE_RET]
)
def test_an_answer_that_means_more_than_a_value_is_left_to_the_agent(type_: MessageType) -> None:
    def read() -> Reply:
        raise AssertionError

    future = CallFuture()
    with ThreadPoolExecutor(1) as users:
        (waiting,) = wait_with(future, users)
        assert not future.take_unread(UnreadAnswer(type_, (), read))
        future(Return(pickler.dumps("in the end")))
        assert waiting.result(DEADLINE_S)[0] == "in the end"


def test_a_failure_is_raised_to_all_who_wait_each_its_own() -> None:
    future = CallFuture()
    failure = Failure(0, "builtins.ValueError", "On worker1: no", pickler.dumps(ValueError))
    with ThreadPoolExecutor(2) as users:
        waiting = wait_with(future, users, 2)
        assert future.take_unread(UnreadAnswer(MessageType.EXCEPTION, failure.to_message().fields, lambda: failure))
        errors = [each.exception(DEADLINE_S) for each in waiting]
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "On worker1: no")] * 2
    assert errors[0] is not errors[1]


def test_what_ends_the_call_without_an_answer_ends_the_wait() -> None:
    future = CallFuture()
    with ThreadPoolExecutor(1) as users:
        (waiting,) = wait_with(future, users)
        future(WorkerLostError("gone meanwhile"))
        assert isinstance(waiting.exception(DEADLINE_S), WorkerLostError)


def test_whoever_waits_and_whatever_comes_at_the_same_time_meet() -> None:
    """Each round, a wait and an answer race."""
    with ThreadPoolExecutor(2) as threads:
        for number in range(1000):
            future, both = CallFuture(), threading.Barrier(2)

            def receive(future: CallFuture = future, both: threading.Barrier = both, number: int = number) -> None:
                both.wait(DEADLINE_S)
                if not future.take_unread(answer(number)):
                    future(Return(pickler.dumps(number)))

            def wait(future: CallFuture = future, both: threading.Barrier = both) -> Any:
                both.wait(DEADLINE_S)
                return future.wait()

            received, waited = threads.submit(receive), threads.submit(wait)
            assert waited.result(DEADLINE_S) == number
            received.result(DEADLINE_S)


def test_control_c_ends_a_wait_and_the_answer_goes_to_the_next_one() -> None:
    future = CallFuture()

    def interrupt() -> None:
        while future._reader is None:
            threading.Event().wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as users:
        interrupting = users.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            future.wait()
        interrupting.result(DEADLINE_S)
        assert not future.take_unread(answer(1))
        (waiting,) = wait_with(future, users)
        assert future.take_unread(answer(2))
        assert waiting.result(DEADLINE_S)[0] == 2
