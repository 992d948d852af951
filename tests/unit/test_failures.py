"""`zmqagent.rpc.failures`: an exception goes to the caller with its type and its whole text, whatever it is."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from typing import Any

import pytest
import torch

from zmqagent import exceptions
from zmqagent.exceptions import (
    CalleeError,
    NotPicklableError,
    RemoteUserError,
    RpcError,
    RRefCreationError,
    ScriptError,
    WorkerLostError,
)
from zmqagent.rpc import failures
from zmqagent.rpc.failures import Failed, new_future
from zmqagent.wire.commands import Failure, Pickled

WORKER = "WorkerInfo(id=1, name=worker1)"


def describe(error: BaseException) -> Failure:
    """As on the callee: the exception was raised there."""
    try:
        raise error
    except BaseException as raised:
        return failures.describe_exception(raised, WORKER)


class WantsTwo(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)


class ExitsWhenMade(Exception):
    def __new__(cls, *args: Any) -> Any:
        return "no exception at all" if args and str(args[0]).startswith("On ") else super().__new__(cls, *args)


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, TypeError, OSError, ZeroDivisionError, AssertionError, NotImplementedError]
)
def test_an_exception_arrives_as_its_own_type_in_torchs_words(kind: type[Exception]) -> None:
    error = failures.rebuild(describe(kind("why")))
    assert type(error) is kind
    text = error.args[0]
    assert text.startswith(f"On {WORKER}:\n{kind.__name__}('why')\nTraceback (most recent call last):\n")
    assert "in describe" in text


@pytest.mark.parametrize("message", ["grüße", "世界 \U0001f600", "two\nlines", "C:\\users\\x", "\ud800 alone", "\\"])
def test_text_of_any_kind_arrives_whole(message: str) -> None:
    error = failures.rebuild(describe(ValueError(message)))
    assert message in error.args[0]


class NoSuchShard(KeyError):
    """A subclass, as users have them."""


@pytest.mark.parametrize("kind", [KeyError, NoSuchShard])
def test_a_key_error_reads_as_well_as_any_other_however_often_it_is_passed_on(kind: type[KeyError]) -> None:
    first = failures.rebuild(describe(kind("no\\such\nkey")))
    assert type(first) is kind
    assert str(first) == first.args[0]
    again = failures.rebuild(describe(pickle.loads(pickle.dumps(copy.copy(first)))))
    for text in (str(again), "".join(traceback.format_exception(again))):
        assert str(first) in text
        assert r"\n" not in text.replace(r"\nkey", "")


def test_the_text_is_logged_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "zmqagent"):
        failure = describe(ValueError("seen here"))
    assert [record.getMessage() for record in caplog.records] == [failure.text]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_addressed_to_the_process_never_ends_the_callers(kind: type[BaseException]) -> None:
    error = failures.rebuild(describe(kind("3")))
    assert type(error) is RemoteUserError
    assert kind.__name__ in str(error)


def test_a_constructor_that_wants_other_arguments_leaves_the_text() -> None:
    error = failures.rebuild(describe(WantsTwo("one", "two")))
    assert type(error) is RemoteUserError
    assert "Failed to create original exception type" in str(error)
    assert "('one', 'two')" in str(error)


def test_a_type_that_makes_something_else_leaves_the_text() -> None:
    error = failures.rebuild(describe(ExitsWhenMade("odd")))
    assert type(error) is RemoteUserError
    assert "odd" in str(error)


def test_a_local_type_is_named() -> None:
    class Local(Exception):
        pass

    failure = describe(Local("within"))
    assert not failure.body.payload
    error = failures.rebuild(failure)
    assert type(error) is RemoteUserError
    assert "Local" in str(error)
    assert "within" in str(error)


def test_a_type_that_is_unknown_here_is_named() -> None:
    failure = Failure(0, "their.module.Unknown", "the text", Pickled(b"ctheir.module\nUnknown\n."))
    error = failures.rebuild(failure)
    assert type(error) is RemoteUserError
    assert "their.module.Unknown" in str(error)
    assert "the text" in str(error)


@pytest.mark.parametrize("name", [name for name in exceptions.__all__ if name not in ("error_class", "RpcError")])
def test_an_error_of_this_package_bears_its_code(name: str) -> None:
    kind = getattr(exceptions, name)
    failure = failures.describe_error(kind("text"), WORKER)
    assert failure.code == kind.code
    assert failure.text == f"On {WORKER}: text"


@pytest.mark.parametrize("error", [ValueError("told"), KeyError("told"), ScriptError("told"), WantsTwo("told", "twice")])
def test_what_an_owner_keeps_is_told_once(error: Exception) -> None:
    kept = failures.rebuild(describe(error))
    again = failures.rebuild(failures.describe_kept(kept, WORKER))
    assert type(again) is type(kept)
    assert again.args == kept.args
    assert str(again).count(f"On {WORKER}") == 1


def test_an_owner_without_a_value_tells_why() -> None:
    assert failures.describe_kept(NotPicklableError("x"), WORKER).code == NotPicklableError.code
    assert failures.describe_kept(None, WORKER).code == RRefCreationError.code


@pytest.mark.parametrize("cause", [WorkerLostError("gone"), Failure(CalleeError.code, "CalleeError", "text")])
def test_each_wait_raises_an_exception_of_its_own(cause: Failure | RpcError) -> None:
    future = new_future()
    future.set_result(Failed.by(cause))
    raised: list[BaseException] = []
    for read in (future.wait, future.wait, future.value):
        with pytest.raises(RuntimeError) as caught:
            read()
        raised.append(caught.value)
    assert len({id(error) for error in raised}) == 3
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in raised[:2]}) == 1


def test_the_cause_of_an_error_is_kept() -> None:
    error = WorkerLostError("gone")
    error.__cause__ = OSError("why")
    future = new_future()
    future.set_result(Failed.by(error))
    with pytest.raises(WorkerLostError, match="gone") as caught:
        future.wait()
    assert caught.value.__cause__ is error.__cause__


def test_a_future_carries_the_devices_that_it_is_given() -> None:
    future = new_future([torch.device("meta:0")])
    future.set_result(5)
    assert future.wait() == 5
    # torch takes a stream of each device for a callback, and this device has none.
    with pytest.raises(RuntimeError, match="acquiring a stream from pool"):
        future.then(lambda done: done)
