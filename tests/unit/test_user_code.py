"""`zmqagent.rpc.user_code`: functions start from a clean state, are found by name, and end with a value or an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.futures import Future
from torch.overrides import TorchFunctionMode

from zmqagent.exceptions import CalleeError, InvalidTypeError
from zmqagent.rpc.user_code import clean_state, on_result, resolve_script_function


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
        torch.empty(0).device.type,
    )


CLEAN = (True, False, False, 0, "cpu")

DIRT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "function mode": _Mode,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("dirt", DIRT)
def test_the_body_sees_a_clean_state_and_the_thread_gets_its_own_back(dirt: str) -> None:
    with DIRT[dirt]():
        dirty = _state()
        assert dirty != CLEAN
        with clean_state():
            assert _state() == CLEAN
        assert _state() == dirty
    assert _state() == CLEAN


@clean_state()
def _raise_in_a_clean_state() -> None:
    assert _state() == CLEAN
    raise ValueError("within")


def test_all_at_once_are_cleaned_also_when_the_body_raises() -> None:
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), _Mode(), torch.device("meta"):
        dirty = _state()
        with pytest.raises(ValueError, match="within"):
            _raise_in_a_clean_state()
        assert _state() == dirty


def test_what_a_body_leaves_behind_does_not_reach_the_next() -> None:
    seen = []

    def serve() -> None:
        with clean_state():
            torch.set_grad_enabled(False)
        with clean_state():
            seen.append(_state())

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert seen == [CLEAN]


def test_tensors_made_in_a_clean_state_record_a_graph() -> None:
    with torch.no_grad(), clean_state():
        assert (torch.ones(1, requires_grad=True) * 2).grad_fn is not None


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
    on_result(function, is_async, lambda value, error: ends.append((value, error)))
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
