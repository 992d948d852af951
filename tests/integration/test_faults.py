"""FAULTY_ZMQ between real processes: what fails is told, what is late times out, and what is sent again leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch.distributed.rpc import _rref_context_get_debug_info

from tests.integration.harness import run_ranks, worker
from zmqagent.exceptions import RpcTimeoutError, RRefCreationError, SendFailedError
from zmqagent.testing import stop_faults

PATIENCE_S = 30.0
_calls: list[str] = []


@torch.jit.script
def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + tensor


def note(name: str) -> int:
    """Notes a call; how many there were by now."""
    _calls.append(name)
    return len(_calls)


def outcome_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the class is what is asked for
        function(*args, **kwargs)
    return type(caught.value), str(caught.value)


def eventually(function: Callable[[], Any], wanted: Any) -> Any:
    """What ``function`` returns, asked again until that is ``wanted`` or the time is up."""
    deadline = time.monotonic() + PATIENCE_S
    while (got := function()) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    return got


def with_faults(function: Callable[[], Any], *, world_size: int = 2, everywhere: bool = False, **faults: Any) -> Any:
    """What ``function()`` returned on worker0, on which alone, or ``everywhere``, the faults are injected."""
    return run_ranks(partial(_lead_or_serve, function, world_size, everywhere, faults), world_size)[0]


def _lead_or_serve(
    function: Callable[[], Any], world_size: int, everywhere: bool, faults: dict[str, Any], rank: int, meeting_point: str
) -> Any:
    options = {"backend": "FAULTY_ZMQ", **faults} if everywhere or rank == 0 else {}
    with worker(rank, world_size, meeting_point, **options), contextlib.ExitStack() as end:
        if not everywhere:
            end.callback(stop_faults)
        return function() if rank == 0 else None


# Calls that fail.


def _call_until_it_succeeds() -> list[Any]:
    failures = [outcome_of(rpc.rpc_async("worker1", note, args=("first",)).wait) for _ in range(2)]
    of_another = outcome_of(rpc.rpc_sync, "worker1", note, args=("second",))
    with dist_autograd.context():
        in_a_context = outcome_of(rpc.rpc_sync, "worker1", note, args=("third",))
    return [failures, of_another, in_a_context, rpc.rpc_sync("worker1", note, args=("first",))]


def test_a_call_fails_as_often_as_asked_and_its_function_runs_only_once_it_succeeds() -> None:
    failures, of_another, in_a_context, served = with_faults(
        _call_until_it_succeeds, num_fail_sends=2, messages_to_fail=["PYTHON_CALL"]
    )
    assert [kind for kind, _ in (*failures, of_another, in_a_context)] == [SendFailedError] * 4
    assert [text for _, text in (*failures, of_another, in_a_context)] == [
        f"Send attempt failed intentionally for a PYTHON_CALL to worker 1 ({count} of 2)" for count in (1, 2, 1, 1)
    ]
    assert served == 1


@pytest.mark.parametrize(("to", "name"), [("worker1", "other"), ("worker0", "itself")])
@pytest.mark.parametrize("message", ["SCRIPT_REMOTE_CALL", "PYTHON_REMOTE_CALL"])
def test_an_rref_whose_creation_failed_says_so_wherever_it_is_used(message: str, to: str, name: str) -> None:
    outcomes = with_faults(partial(_use_what_was_not_created, message, to), num_fail_sends=1, messages_to_fail=[message])
    assert outcomes.pop("creation")[0] is SendFailedError
    for use, (kind, text) in outcomes.items():
        assert kind is RRefCreationError, use
        assert text.startswith(f"RRef creation via rpc.remote() failed: Send attempt failed intentionally for a {message}"), use


def _use_what_was_not_created(message: str, to: str) -> dict[str, Any]:
    if message == "SCRIPT_REMOTE_CALL":
        rref = rpc.remote(to, torch.add, args=(torch.ones(1), 1))
    else:
        rref = rpc.remote(to, note, args=("never",))
    return {
        "creation": outcome_of(rref._get_future().wait),
        "to_here": outcome_of(rref.to_here),
        "argument": outcome_of(rpc.rpc_sync, "worker1", str, args=(rref,)),
        "argument of TorchScript": outcome_of(rpc.rpc_sync, "worker1", _double, args=(rref,)),
    }


def value_of(rref: rpc.RRef[Any]) -> Any:
    return rref.to_here()


def _repeat_until_it_succeeds(to: str) -> list[Any]:
    failures: list[Any] = [outcome_of(rpc.remote(to, note, args=("created",))._get_future().wait) for _ in range(2)]
    rref = rpc.remote(to, note, args=("created",))
    created = rref.to_here()
    failures += [outcome_of(rpc.rpc_sync, "worker1", value_of, args=(rref,)) for _ in range(2)]
    return [failures, created, rpc.rpc_sync("worker1", value_of, args=(rref,))]


@pytest.mark.parametrize(("to", "rank"), [("worker1", 1), ("worker0", 0)])
def test_a_repeated_creation_and_a_repeated_call_with_an_rref_succeed_in_the_end(to: str, rank: int) -> None:
    failures, created, passed_on = with_faults(
        partial(_repeat_until_it_succeeds, to), num_fail_sends=2, messages_to_fail=["PYTHON_REMOTE_CALL", "PYTHON_CALL"]
    )
    assert failures == [
        (SendFailedError, f"Send attempt failed intentionally for a {message} to worker {receiver} ({count} of 2)")
        for message, receiver in (("PYTHON_REMOTE_CALL", rank), ("PYTHON_CALL", 1))
        for count in (1, 2)
    ]
    assert (created, passed_on) == (1, 1)


def _backward() -> list[Any]:
    weight = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as by_rref:
        rref = rpc.remote("worker1", torch.sum, args=(weight,))
        failure_by_rref = outcome_of(rref.backward, by_rref)
        # The same message once more; the gradients come from worker1, which has no faults.
        rref.backward(by_rref)
        gradients = [dist_autograd.get_gradients(by_rref)[weight].tolist()]
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", torch.add, args=(weight, 1)).sum()
        failure = outcome_of(dist_autograd.backward, context_id, [loss], retain_graph=True)
        dist_autograd.backward(context_id, [loss], retain_graph=True)
        gradients.append(dist_autograd.get_gradients(context_id)[weight].tolist())
    return [failure_by_rref, failure, gradients]


def test_gradients_that_cannot_be_sent_fail_the_pass_and_the_next_one_runs() -> None:
    (kind_by_rref, by_rref), (kind, text), gradients = with_faults(
        _backward, num_fail_sends=1, messages_to_fail=["BACKWARD_AUTOGRAD_REQ", "RREF_BACKWARD_REQ"]
    )
    assert kind_by_rref is SendFailedError
    assert by_rref == "Send attempt failed intentionally for a RREF_BACKWARD_REQ to worker 1 (1 of 1)"
    assert issubclass(kind, RuntimeError)
    assert "Send attempt failed intentionally for a BACKWARD_AUTOGRAD_REQ to worker 1 (1 of 1)" in text
    assert gradients == [[1.0, 1.0]] * 2


def _start_with_torchs_options(rank: int, meeting_point: str) -> Any:
    torch._C._faulty_agent_init()
    options = torch._C._distributed_rpc_testing.FaultyTensorPipeRpcBackendOptions(
        num_worker_threads=4,
        rpc_timeout=20.0,
        init_method=meeting_point,
        messages_to_fail=["PYTHON_CALL"],
        messages_to_delay={},
        num_fail_sends=1,
    )
    rpc.init_rpc("alone", backend=rpc.BackendType.FAULTY_ZMQ, rank=rank, world_size=1, rpc_backend_options=options)
    failure = outcome_of(rpc.rpc_sync, "alone", note, args=("call",))
    served = rpc.rpc_sync("alone", note, args=("call",))
    stop_faults()
    rpc.shutdown()
    return failure, served


def test_a_worker_with_the_options_of_torchs_faulty_backend_injects_their_faults() -> None:
    ((failure, served),) = run_ranks(_start_with_torchs_options, 1)
    assert failure == (SendFailedError, "Send attempt failed intentionally for a PYTHON_CALL to worker 0 (1 of 1)")
    assert served == 1


# Calls that are late.


def _call_in_haste_and_with_patience() -> list[Any]:
    hasty = outcome_of(rpc.rpc_sync, "worker1", torch.add, args=(torch.ones(2), 1), timeout=0.05)
    of_a_script = outcome_of(rpc.rpc_sync, "worker1", _double, args=(torch.ones(2),), timeout=0.05)
    to_itself = outcome_of(rpc.rpc_sync, "worker0", torch.add, args=(torch.ones(2), 1), timeout=0.05)
    patient = rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1), timeout=0)
    return [(hasty, of_a_script, to_itself), patient.tolist()]


def test_a_late_call_times_out_unless_it_is_given_the_time() -> None:
    outcomes, patient = with_faults(_call_in_haste_and_with_patience, messages_to_delay={"SCRIPT_CALL": 0.5})
    for kind, text in outcomes:
        assert kind is RpcTimeoutError
        assert "RPC ran for more than set timeout (50 ms) and will now be marked with an error" in text
    assert patient == [2.0, 2.0]


def _create_and_fetch_late() -> list[Any]:
    rref = rpc.remote("worker1", note, args=("created",), timeout=0.01)
    creation = outcome_of(rref._get_future().wait)
    given_up = outcome_of(rref.to_here)
    del rref
    in_time = rpc.remote("worker1", note, args=("created",))
    fetch = outcome_of(in_time.to_here, 0.01)
    return [creation, given_up, fetch, in_time.to_here() in (1, 2)]


def test_a_late_creation_and_a_late_fetch_are_told_apart_and_leave_nothing_behind() -> None:
    creation, given_up, fetch, came = with_faults(
        _create_and_fetch_late, messages_to_delay={"PYTHON_REMOTE_CALL": 0.3, "SCRIPT_RREF_FETCH_CALL": 0.3}
    )
    assert creation[0] is RpcTimeoutError
    assert given_up[0] is RRefCreationError
    assert "timed out, and it is possible that the RRef on the owner node does not exist" in given_up[1]
    assert fetch[0] is RpcTimeoutError
    assert came


def _leave_at_once() -> str:
    rpc.remote("worker0", note, args=("too late",), timeout=0.01)
    return rpc.rpc_async("worker1", torch.add, args=(torch.ones(1), 1), timeout=0.01) and "left"


def test_shutdown_does_not_wait_for_what_is_late() -> None:
    hour = 3600.0
    assert with_faults(_leave_at_once, messages_to_delay={"PYTHON_REMOTE_CALL": hour, "SCRIPT_CALL": hour}) == "left"


# Control messages: sent again by the agent itself, whatever becomes of the first tries.


def add_to(rref: rpc.RRef[torch.Tensor], value: float) -> list[float]:
    return list((rref.to_here() + value).tolist())


def _counters() -> list[str]:
    info = _rref_context_get_debug_info()
    return [info[name] for name in ("num_owner_rrefs", "num_forks", "num_pending_users", "num_pending_futures")]


def _share() -> list[Any]:
    rref = rpc.remote("worker1", torch.add, args=(torch.ones(2), 1))
    sums = rpc.rpc_sync("worker2", add_to, args=(rref, 3.0))
    held = rpc.rpc_sync("worker1", _counters)[:1]
    del rref
    gc.collect()
    return [sums, held, *(eventually(partial(rpc.rpc_sync, to, _counters), ["0"] * 4) for to in ("worker1", "worker2"))]


@pytest.mark.parametrize("message", ["RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT", "RREF_USER_DELETE"])
def test_a_control_message_that_fails_twice_is_sent_again_and_nothing_leaks(message: str) -> None:
    sums, held, *left = with_faults(_share, world_size=3, everywhere=True, num_fail_sends=2, messages_to_fail=[message])
    assert sums == [5.0, 5.0]
    assert held == ["1"]
    assert left == [["0"] * 4] * 2


def _num_contexts() -> str:
    return str(dist_autograd._get_debug_info()["num_autograd_contexts"])


def _visit() -> list[str]:
    with dist_autograd.context():
        rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2, requires_grad=True), 1))
        there = rpc.rpc_sync("worker1", _num_contexts)
    return [there, eventually(lambda: rpc.rpc_sync("worker1", _num_contexts), "0")]


def test_a_clean_up_of_an_autograd_context_that_fails_twice_comes_all_the_same() -> None:
    faults = {"num_fail_sends": 2, "messages_to_fail": ["CLEANUP_AUTOGRAD_CONTEXT_REQ"]}
    assert with_faults(_visit, everywhere=True, **faults) == ["1", "0"]
