"""Which thread-local state functions, callbacks and the unpickling of answers run in, whichever thread of the pool runs them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc

from tests.integration.harness import on_group

State = tuple[bool, bool, str]

INITIAL: State = (True, False, "cpu")


def state(*_: object) -> State:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.empty(0).device.type


class ToldWhenUnpickled:
    """Arrives as the state in which it was unpickled."""

    def __reduce__(self) -> Any:
        return state, ()


_permits = threading.Semaphore(0)


def permit() -> None:
    _permits.release()


def wait_for_permit() -> None:
    _permits.acquire()


def _states_of_a_call_made_in(grad_mode: bool, autocast: bool, device: str) -> tuple[State, dict[str, State]]:
    with torch.set_grad_enabled(grad_mode), torch.autocast("cpu", enabled=autocast), torch.device(device):
        made_in = state()
        call = rpc.rpc_async("worker1", wait_for_permit)
        then = call.then(state)
        unpickled = rpc.rpc_async("worker1", ToldWhenUnpickled)
        fetched = rpc.remote("worker1", ToldWhenUnpickled)
    # The callback was given to a call under way: it runs on the thread that takes the answer.
    rpc.rpc_sync("worker1", permit)
    return made_in, {"then": then.wait(), "unpickled": unpickled.wait(), "fetched": _fetched_in(made_in, fetched)}


def _fetched_in(made_in: State, rref: Any) -> State:
    grad_mode, autocast, device = made_in
    with torch.set_grad_enabled(grad_mode), torch.autocast("cpu", enabled=autocast), torch.device(device):
        return rref.to_here()


@pytest.mark.parametrize("made_in", [INITIAL, (False, False, "cpu"), (True, True, "cpu"), (True, False, "meta")], ids=str)
def test_what_an_answer_sets_off_runs_in_the_state_in_which_the_call_was_made(made_in: State) -> None:
    expected, found = on_group(_states_of_a_call_made_in, *made_in)
    assert expected == made_in
    assert found == dict.fromkeys(found, made_in)


def _functions_see_the_initial_state() -> list[State]:
    with torch.no_grad(), torch.autocast("cpu"), torch.device("meta"):
        return [rpc.rpc_sync(to, state) for to in ("worker0", "worker1")]


def test_a_function_starts_from_the_initial_state_wherever_it_was_called() -> None:
    assert on_group(_functions_see_the_initial_state) == [INITIAL, INITIAL]


def leave_a_default_device() -> None:
    torch.set_default_device("meta")


def _call_after_somebody_who_does_not_clean_up() -> list[Any]:
    # More calls than threads, so that whichever serves the next has served one of these.
    for _ in range(20):
        rpc.rpc_sync("worker1", leave_a_default_device)
    sparse = torch.eye(2).to_sparse()
    return [rpc.rpc_sync("worker1", state), rpc.rpc_sync("worker1", torch.Tensor.to_dense, args=(sparse,)).tolist()]


def test_what_a_function_leaves_behind_does_not_reach_the_next() -> None:
    assert on_group(_call_after_somebody_who_does_not_clean_up) == [INITIAL, [[1, 0], [0, 1]]]
