"""`zmqagent.rpc.user_code`: functions are found by name, and end with a value or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.futures import Future

from zmqagent.exceptions import CalleeError, InvalidTypeError
from zmqagent.rpc.user_code import on_future, on_result, resolve_script_function

# What a call names.


@torch.jit.script
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_operator_and_a_script_function_are_found_by_name() -> None:
    assert resolve_script_function("aten::add", True)(torch.ones(1), 2).item() == 3
    found = resolve_script_function(torch._jit_internal._qualified_name(doubled), False)
    assert found(torch.ones(1)).item() == 2


@pytest.mark.parametrize(("name", "is_builtin"), [("aten::no_such", True), ("no_such", True), ("__torch__.no.such", False)])
def test_a_name_that_nothing_has_is_told(name: str, is_builtin: bool) -> None:
    with pytest.raises(CalleeError, match=name):
        resolve_script_function(name, is_builtin)


# How a function ends.


def ends_of(function: Callable[[], Any], is_async: bool = False) -> list[tuple[Any, BaseException | None]]:
    ends: list[tuple[Any, BaseException | None]] = []

    def done(value: Any, error: BaseException | None) -> None:
        ends.append((value, error))

    if is_async:
        on_future(function, done, nullcontext())
    else:
        on_result(function, done)
    return ends


def test_a_value_ends_a_call_at_once() -> None:
    assert ends_of(lambda: 5) == [(5, None)]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_whatever_a_function_raises_ends_its_call_and_no_thread(kind: type[BaseException]) -> None:
    error = kind("3")

    def function() -> None:
        raise error

    assert ends_of(function) == [(None, error)]


def test_a_future_ends_an_asynchronous_call_when_it_is_done() -> None:
    future: Future[int] = Future()
    ends = ends_of(lambda: future, is_async=True)
    assert ends == []
    future.set_result(7)
    assert ends == [(7, None)]


@contextmanager
def noting(log: list[Any]) -> Iterator[None]:
    log.append("in")
    yield
    log.append("out")


def test_what_a_future_brings_is_taken_over_on_the_streams_of_the_function() -> None:
    future: Future[int] = Future()
    log: list[Any] = []
    on_future(lambda: future, lambda value, error: log.append((value, error)), noting(log))
    assert log == []
    future.set_result(7)
    assert log == ["in", (7, None), "out"]


def test_a_future_that_fails_ends_an_asynchronous_call_with_its_error() -> None:
    future: Future[int] = Future()
    ends = ends_of(lambda: future, is_async=True)
    future.set_exception(KeyError("why"))
    ((value, error),) = ends
    assert value is None
    assert isinstance(error, KeyError)


def test_an_asynchronous_function_without_a_future_is_told_in_torchs_words() -> None:
    ((_, error),) = ends_of(lambda: 5, is_async=True)
    assert isinstance(error, InvalidTypeError)
    assert "Functions decorated with @rpc.async_function must return a torch.futures.Future object, but got" in str(error)
