"""`zmqagent.rpc.call_future`: who reads an answer, and when."""

from __future__ import annotations

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
from zmqagent.wire.types import ForkData, MessageType

DEADLINE_S = 30.0
SHARE: ForkData = (0, 0, 1, 0, 2, 0, "")


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


def test_an_answer_is_read_by_whoever_waits_and_once() -> None:
    future = CallFuture()
    with ThreadPoolExecutor(1) as receiver:
        assert receiver.submit(future.take_unread, answer(Value())).result(DEADLINE_S)
    assert future.done()
    assert Value.read_on == []
    with torch.no_grad():
        value = future.wait()
    assert isinstance(value, Value)
    assert future.wait() is value
    assert future.value() is value
    assert Value.read_on == [(threading.current_thread(), True)]


def test_all_who_wait_get_the_same_value() -> None:
    future = CallFuture()
    with ThreadPoolExecutor(8) as users:
        waiting = [users.submit(future.wait) for _ in range(8)]
        assert future.take_unread(answer(Value()))
        assert len({id(each.result(DEADLINE_S)) for each in waiting}) == 1
    assert len(Value.read_on) == 1


@pytest.mark.parametrize("add", [CallFuture.then, CallFuture.add_done_callback])
def test_an_answer_that_callbacks_wait_for_is_left_to_a_thread_that_may_run_them(add: Callable[..., Any]) -> None:
    future = CallFuture()
    values: list[Any] = []
    add(future, lambda done: values.append(done.value()))
    assert not future.take_unread(answer(Value()))
    assert not future.done()
    future(Return(pickler.dumps(Value())))
    assert [type(value) for value in values] == [Value]


def test_a_callback_that_comes_later_gets_the_value() -> None:
    future = CallFuture()
    assert future.take_unread(answer("value"))
    assert future.then(lambda done: done.wait()).wait() == "value"


def test_a_callback_that_comes_while_the_answer_is_taken_does_not_run_on_the_thread_that_receives() -> None:
    future = _Paused()
    ran_on: list[threading.Thread] = []
    with ThreadPoolExecutor(1) as receiver:
        received = receiver.submit(lambda: (future.take_unread(answer(1)), threading.current_thread()))
        assert future.is_being_taken.wait(DEADLINE_S)
        future.add_done_callback(lambda _: ran_on.append(threading.current_thread()))
        future.may_go_on.set()
        assert received.result(DEADLINE_S)[0]
    assert ran_on == [threading.current_thread()]


class _Paused(CallFuture):
    """A future whose taking of an answer stops half-way, until somebody looks whether it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.is_being_taken, self.may_go_on = threading.Event(), threading.Event()

    def set_result(self, result: Any) -> None:
        self.is_being_taken.set()
        assert self.may_go_on.wait(DEADLINE_S)
        super().set_result(result)

    def done(self) -> bool:
        self.may_go_on.set()
        return super().done()


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        (MessageType.PYTHON_RET, Return(pickler.dumps(1), (SHARE,)).to_message().fields),
        (MessageType.FORWARD_AUTOGRAD_RESP, ()),
        (MessageType.RUN_WITH_PROFILING_RESP, ()),
        (MessageType.REMOTE_RET, ()),
    ],
)
def test_an_answer_that_means_more_than_a_value_is_not_left_unread(type_: MessageType, fields: tuple[Any, ...]) -> None:
    def read() -> Reply:
        raise AssertionError

    future = CallFuture()
    assert not future.take_unread(UnreadAnswer(type_, fields, read))
    assert not future.done()


def test_a_failure_is_raised_at_each_wait_anew() -> None:
    future = CallFuture()
    failure = Failure(0, "builtins.ValueError", "On worker1: no", pickler.dumps(ValueError))
    assert future.take_unread(UnreadAnswer(MessageType.EXCEPTION, failure.to_message().fields, lambda: failure))
    raised = []
    for _ in range(2):
        with pytest.raises(ValueError, match="On worker1: no") as info:
            future.wait()
        raised.append(info.value)
    assert raised[0] is not raised[1]


def test_what_cannot_be_read_is_raised_to_whoever_waits() -> None:
    future = CallFuture()
    assert future.take_unread(UnreadAnswer(MessageType.PYTHON_RET, ((),), lambda: WorkerLostError("gone meanwhile")))
    with pytest.raises(WorkerLostError, match="gone meanwhile"):
        future.wait()


def test_control_c_while_the_users_thread_reads_is_the_users() -> None:
    future = CallFuture()
    assert future.take_unread(answer(_Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        future.wait()
    assert future.wait() == "read at last"


class _Interrupting:
    """Its first unpickling is broken off by ^C."""

    tries = 0

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return _interrupted, ()


def _interrupted() -> str:
    _Interrupting.tries += 1
    if _Interrupting.tries == 1:
        raise KeyboardInterrupt
    return "read at last"
