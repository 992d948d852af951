"""`zmqagent.rpc.futures` and `results`: many futures end together, or with the first error; a reply ends one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch.futures import Future

from zmqagent.exceptions import CalleeError, ProtocolError, WorkerLostError
from zmqagent.rpc import pickler
from zmqagent.rpc.failures import Failed, new_future
from zmqagent.rpc.futures import collect_all, wait_all
from zmqagent.rpc.results import complete
from zmqagent.wire.commands import Ack, Pickled, Return


def _futures(count: int) -> list[Future[Any]]:
    return [new_future() for _ in range(count)]


def test_the_collection_is_done_when_the_last_is_and_keeps_the_order() -> None:
    futures = _futures(3)
    collected = collect_all(futures)
    for number in (2, 0, 1):
        assert not collected.done()
        futures[number].set_result(number)
    assert [future.wait() for future in collected.wait()] == [0, 1, 2]
    assert wait_all(futures) == [0, 1, 2]


def test_nothing_is_done_at_once() -> None:
    assert collect_all([]).wait() == []
    assert wait_all([]) == []


def test_the_first_error_ends_the_collection_though_others_wait() -> None:
    futures = _futures(3)
    collected = collect_all(futures)
    futures[1].set_result(Failed.by(WorkerLostError("the first")))
    assert collected.done()
    with pytest.raises(WorkerLostError, match="the first"):
        collected.wait()
    futures[0].set_result(Failed.by(CalleeError("too late")))
    futures[2].set_result(1)
    with pytest.raises(WorkerLostError, match="the first"):
        collected.wait()


def test_torchs_own_futures_may_be_among_them() -> None:
    failing: Future[Any] = Future()
    failing.set_exception(KeyError("torch's own"))
    with pytest.raises(KeyError, match="torch's own"):
        wait_all([new_future(), failing])


def test_futures_that_end_at_once_on_many_threads_end_the_collection_once() -> None:
    for _ in range(50):
        futures = _futures(8)
        collected = collect_all(futures)
        start = threading.Barrier(8)

        def end(future: Future[Any], number: int, start: threading.Barrier = start) -> None:
            start.wait()
            future.set_result(Failed.by(WorkerLostError("x")) if number % 2 else number)

        threads = [threading.Thread(target=end, args=(future, number)) for number, future in enumerate(futures)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(WorkerLostError):
            collected.wait()


def test_a_reply_ends_its_future() -> None:
    future = new_future()
    complete(future, Return(pickler.dumps({"a": 1})))
    assert future.wait() == {"a": 1}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (WorkerLostError("gone"), WorkerLostError),
        (Return(Pickled(b"garbage")), CalleeError),
        (Ack(), ProtocolError),
    ],
)
def test_a_reply_that_is_no_value_makes_wait_raise(reply: Any, kind: type[Exception]) -> None:
    future = new_future()
    complete(future, reply)
    with pytest.raises(kind):
        future.wait()
