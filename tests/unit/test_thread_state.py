"""`zmqagent.rpc.thread_state`: the state of a thread is cleaned, taken along and restored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from zmqagent.rpc.thread_state import ThreadState, clean_state, current_state, in_state


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


def _raise_in_a_clean_state() -> None:
    with clean_state():
        assert _state() == CLEAN
        raise ValueError("within")


def test_all_at_once_are_cleaned_also_when_the_body_raises() -> None:
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), _Mode(), torch.device("meta"):
        dirty = _state()
        with pytest.raises(ValueError, match="within"):
            _raise_in_a_clean_state()
        assert _state() == dirty


def _leave_dirt_behind() -> None:
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch._C._push_on_torch_function_stack(_Mode())


def test_what_a_body_leaves_behind_is_removed() -> None:
    with clean_state():
        _leave_dirt_behind()
        assert _state() != CLEAN
    assert current_state() == ThreadState()


def test_tensors_made_in_a_clean_state_record_a_graph() -> None:
    with torch.no_grad(), clean_state():
        assert (torch.ones(1, requires_grad=True) * 2).requires_grad


@pytest.mark.parametrize("dirt", DIRT)
def test_a_state_can_be_taken_to_another_thread(dirt: str) -> None:
    def body(own: Callable[[], AbstractContextManager[Any]]) -> None:
        with own(), in_state(taken):
            seen.append((_state(), current_state()))

    with DIRT[dirt]():
        taken, expected = current_state(), _state()
    seen: list[Any] = []
    for own in DIRT.values():
        thread = threading.Thread(target=body, args=(own,))
        thread.start()
        thread.join()
    assert seen == [(expected, taken)] * len(DIRT)
    assert current_state() == ThreadState()


def test_function_modes_keep_their_order() -> None:
    first, second = _Mode(), _Mode()
    with first, second:
        taken = current_state()
    with in_state(taken):
        assert current_state().function_modes == (first, second)
