"""Profiled calls between real processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch.autograd.profiler_legacy import profile
from torch.profiler import ProfilerActivity

from tests.integration.harness import on_group, run_ranks, worker
from zmqagent.exceptions import NotPicklableError


def doubled(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.profiler.record_function("## doubling ##"):
        return torch.mul(x, 2)


def fails(x: torch.Tensor) -> None:
    torch.mul(x, 2)
    raise ValueError("it failed")


def doubled_by(name: str, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = rpc.rpc_sync(name, doubled, args=(x,))
    return result


@rpc.functions.async_execution
def doubled_by_later(name: str, x: torch.Tensor) -> Any:
    return rpc.rpc_async(name, doubled, args=(x,)).then(lambda future: torch.neg(future.wait()))


@torch.jit.script
def script_doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, 2)


def forked(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    """The future of ``function(x)``, which ``torch.jit.fork`` runs on a thread that has this one's profiler."""
    # The compiler takes no strings for types here.
    function.__annotations__.update(x=torch.Tensor, **{"return": torch.Tensor})
    called = torch.jit.ignore(function)

    @torch.jit.script
    def forks(x: torch.Tensor):  # type: ignore[no-untyped-def]
        return torch.jit.fork(called, x)

    return forks(x)


def shown(profiled: Any) -> dict[str, Any]:
    return {event.name: event for event in profiled.function_events}


def profiled_call(wanted: dict[str, bool], function: Callable[..., Any], *args: Any) -> list[tuple[str, int, bool, Any, int]]:
    """What the profile of one call shows: name, node, is it remote, shapes, memory."""
    with profile(**wanted) as profiled:
        rpc.rpc_async("worker1", function, args=args).wait()
    return [
        (event.name, event.node_id, event.is_remote, event.input_shapes, event.cpu_memory_usage)
        for event in profiled.function_events
    ]


def test_what_a_builtin_does_on_the_callee_is_shown() -> None:
    events = on_group(profiled_call, {"record_shapes": True, "profile_memory": True}, torch.add, torch.ones(2), torch.ones(2))
    call = "rpc_async#aten::add(worker0 -> worker1)"
    assert (call, 0, False, [], 0) in events
    assert (f"{call}#remote_op: aten::add", 1, True, [[2], [2], []], 8) in events


def test_what_a_function_does_on_the_callee_is_shown() -> None:
    events = on_group(profiled_call, {}, doubled, torch.ones(2))
    by_name = {name: (node, is_remote) for name, node, is_remote, *_ in events}
    call = "rpc_async#doubled(worker0 -> worker1)"
    assert by_name[call] == (0, False)
    assert by_name[f"{call}#remote_op: ## doubling ##"] == (1, True)
    assert by_name[f"{call}#remote_op: aten::mul"] == (1, True)


def _profiled_script() -> list[Any]:
    return profiled_call({}, script_doubled, torch.ones(2))


def test_what_a_script_function_does_on_the_callee_is_shown() -> None:
    names = [name for name, *_ in on_group(_profiled_script)]
    (call,) = [name for name in names if "remote_op" not in name]
    assert call.endswith("script_doubled(worker0 -> worker1)")
    assert f"{call}#remote_op: aten::mul" in names


@pytest.mark.parametrize("function", [doubled_by, doubled_by_later])
def test_calls_of_the_callee_are_shown_with_what_they_do(function: Callable[..., Any]) -> None:
    events = on_group(profiled_call, {}, function, "worker2", torch.ones(2), world_size=3)
    by_name = {name: (node, is_remote) for name, node, is_remote, *_ in events}
    is_later = function is doubled_by_later
    call = f"rpc_async#{function.__name__}(worker0 -> worker1)"
    nested = f"{call}#remote_op: rpc_{'async' if is_later else 'sync'}#doubled(worker1 -> worker2)"
    assert by_name[call] == (0, False)
    assert by_name[nested] == (1, True)
    assert by_name[f"{nested}#remote_op: aten::mul"] == (2, True)
    assert (f"{call}#remote_op: aten::neg" in by_name) is is_later


def _with_callback() -> list[str]:
    with profile() as profiled:
        rpc.rpc_async("worker1", doubled, args=(torch.ones(2),)).then(lambda future: torch.neg(future.wait())).wait()
    return list(shown(profiled))


def test_callbacks_of_a_profiled_calls_future_are_shown() -> None:
    assert "aten::neg" in on_group(_with_callback)


def _two_at_once() -> list[list[str]]:
    def profiled(function: Callable[..., Any]) -> list[str]:
        with profile() as events:
            for _ in range(20):
                rpc.rpc_sync("worker1", function, args=(torch.ones(2), 1))
        return [event.name for event in events.function_events]

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(profiled, [torch.add, torch.mul]))


def test_two_who_profile_at_once_see_their_own_calls() -> None:
    for events, operator in zip(on_group(_two_at_once), ("aten::add", "aten::mul"), strict=True):
        call = f"rpc_sync#{operator}(worker0 -> worker1)"
        assert [name for name in events if name.startswith("rpc")].count(call) == 20
        assert events.count(f"{call}#remote_op: {operator}") == 20
        assert {name.partition("#remote_op")[0] for name in events if name.startswith("rpc")} == {call}


def _everybody_profiles(rank: int, meeting_point: str) -> int:
    with worker(rank, 3, meeting_point), profile() as profiled:
        for _ in range(10):
            rpc.rpc_sync(f"worker{(rank + 1) % 3}", doubled, args=(torch.ones(2),))
    return sum(event.is_remote and event.name.endswith("aten::mul") for event in profiled.function_events)


def test_a_profile_that_outlives_its_worker_shows_what_the_callees_did() -> None:
    assert run_ranks(_everybody_profiles, 3) == [10, 10, 10]


def _failing() -> tuple[str, list[str], list[str]]:
    x = torch.ones(2)
    with profile() as failed:
        try:
            rpc.rpc_sync("worker1", fails, args=(x,))
        except ValueError as error:
            text = str(error)
    with profile() as later:
        rpc.rpc_sync("worker1", doubled, args=(torch.ones(2),))
    return text, list(shown(failed)), list(shown(later))


def test_a_profiled_function_that_raises_fails_its_call_and_the_next_is_profiled_as_ever() -> None:
    text, failed, later = on_group(_failing)
    assert "it failed" in text
    assert {"rpc_sync#fails(worker0 -> worker1)", "rpc_sync#fails(worker0 -> worker1)#remote_op: aten::mul"} <= set(failed)
    assert "rpc_sync#doubled(worker0 -> worker1)#remote_op: aten::mul" in later


def _ended_by_hand() -> str:
    with profile(), torch.autograd.profiler.record_function("by hand") as record:
        future = record._call_end_callbacks_on_future(rpc.rpc_async("worker1", fails, args=(torch.ones(2),)))
        try:
            future.wait()
        except ValueError as error:
            return str(error)
    return "no error"


def test_a_future_that_ends_a_users_own_event_raises_as_the_calls() -> None:
    assert "it failed" in on_group(_ended_by_hand)


def call_within(x: torch.Tensor) -> torch.Tensor:
    return doubled_by("worker1", x)


def _forked_call() -> list[str]:
    with profile() as profiled:
        forked(call_within, torch.zeros(1)).wait()
    return list(shown(profiled))


def test_calls_of_a_forked_function_are_shown() -> None:
    call = "rpc_sync#doubled(worker0 -> worker1)"
    assert {call, f"{call}#remote_op: aten::mul"} <= set(on_group(_forked_call))


def _in_a_context() -> list[str]:
    x = torch.ones(2, requires_grad=True)
    with profile() as profiled, dist_autograd.context() as context_id:
        y = rpc.remote("worker1", doubled, args=(x,)).to_here()
        dist_autograd.backward(context_id, [y.sum()])
        assert dist_autograd.get_gradients(context_id)[x].tolist() == [2, 2]
    return list(shown(profiled))


def test_calls_in_an_autograd_context_are_shown() -> None:
    assert "rpc_remote#doubled(worker0 -> worker1)#remote_op: aten::mul" in on_group(_in_a_context)


def _rows(server: Any) -> list[str]:
    return [row.key for row in server.local_value().key_averages()]


def _served() -> list[str]:
    server = rpc.remote("worker1", rpc._server_process_global_profile)
    server.rpc_sync().__enter__()
    x = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", doubled, args=(x,))
        dist_autograd.backward(context_id, [y.sum()])
    with profile():
        rpc.rpc_sync("worker1", torch.neg, args=(x,))
    server.rpc_sync().__exit__(None, None, None)
    rows: list[str] = rpc.rpc_sync("worker1", _rows, args=(server,))
    return rows


def test_the_server_process_global_profiler_shows_calls_backward_passes_and_what_callers_profile() -> None:
    assert {"aten::mul", "MulBackward0", "aten::neg"} <= set(on_group(_served))


def _entered(profiler: Any) -> Any:
    profiler.__enter__()
    return profiler


def _profiles_what_it_serves(rank: int, meeting_point: str, begins_before: bool, backend: str) -> int:
    """How often the other worker's calls added, as the profile shows that ends after this one has shut down."""
    profiler = _entered(rpc._server_process_global_profile()) if begins_before else None
    with worker(rank, 2, meeting_point, backend=backend):
        profiler = profiler or _entered(rpc._server_process_global_profile())
        rpc.api._wait_all_workers()
        for _ in range(3):
            rpc.rpc_sync(f"worker{1 - rank}", torch.add, args=(torch.ones(1), 1))
    profiler.__exit__(None, None, None)
    return sum(event.name == "aten::add" for event in profiler.function_events)


@pytest.mark.parametrize(("begins_before", "backend"), [(True, "ZMQ"), (False, "ZMQ"), (True, "TENSORPIPE")])
def test_the_server_process_global_profiler_may_begin_before_and_end_after_the_worker(begins_before: bool, backend: str) -> None:
    assert run_ranks(_profiles_what_it_serves, 2, begins_before, backend) == [3, 3]


# Kineto.


_gate = threading.Event()


def pass_gate(x: torch.Tensor) -> torch.Tensor:
    _gate.wait()
    return x


def open_gate() -> None:
    _gate.set()


def _trace(profiled: Any, directory: str) -> dict[str, dict[str, Any]]:
    path = Path(directory) / "trace.json"
    profiled.export_chrome_trace(str(path))
    return {event["name"]: event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"}


def _traced(directory: str, wanted: dict[str, bool]) -> dict[str, dict[str, Any]]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], **wanted) as profiled:
        future = rpc.rpc_async("worker1", pass_gate, args=(torch.ones(250_000),))
        torch.zeros(3)
        rpc.rpc_sync("worker1", open_gate)
        future.wait()
        torch.neg(torch.ones(1))
        rpc.remote("worker1", torch.add, args=(torch.ones(2), 1)).to_here()
    return _trace(profiled, directory)


def test_under_kineto_each_call_is_a_span_with_its_peer_and_size(tmp_path: Path) -> None:
    trace = on_group(_traced, str(tmp_path), {})
    (gate,) = [name for name in trace if name.startswith("rpc#pass_gate(worker0 -> worker1) 1 MB")]
    for name in ("open_gate", "aten::add", "RRef.to_here"):
        assert [span for span in trace if span.startswith(f"rpc#{name}(worker0 -> worker1) ") and span.endswith(" B")]
    begin, end = trace[gate]["ts"], trace[gate]["ts"] + trace[gate]["dur"]
    assert begin <= trace["aten::zeros"]["ts"] <= end <= trace["aten::neg"]["ts"]


def test_under_kineto_the_exact_size_is_an_input_if_shapes_are_recorded(tmp_path: Path) -> None:
    trace = on_group(_traced, str(tmp_path), {"record_shapes": True})
    (gate,) = [event for name, event in trace.items() if name.startswith("rpc#pass_gate")]
    (size,) = gate["args"]["Concrete Inputs"]
    assert 1_000_000 < int(size) < 1_001_000


def _outlasting(directory: str) -> tuple[list[dict[str, Any]], float]:
    x = torch.ones(1)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        future = rpc.rpc_async("worker1", pass_gate, args=(x,))
    rpc.rpc_sync("worker1", open_gate)
    value = future.wait()
    # What the end of the call must not touch: the memory of a profile that is over.
    assert len(list(profiled.events())) == 1
    return list(_trace(profiled, directory).values()), value.item()


def test_the_span_of_a_call_that_goes_on_ends_with_the_trace(tmp_path: Path) -> None:
    events, value = on_group(_outlasting, str(tmp_path))
    (span,) = [event for event in events if event["name"].startswith("rpc#pass_gate(worker0 -> worker1)")]
    assert "finished" not in span["args"]
    assert value == 1


def _failing_under_kineto() -> list[str]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiled:
        with pytest.raises(ValueError, match="it failed"):
            rpc.rpc_sync("worker1", fails, args=(torch.ones(2),))
        with pytest.raises(NotPicklableError):
            rpc.rpc_sync("worker1", doubled, args=(lambda: None,))
        rpc.rpc_sync("worker1", doubled, args=(torch.ones(2),))
    return [event.name for event in profiled.events() if event.name.startswith("rpc#")]


def test_under_kineto_calls_that_fail_leave_the_profiler_usable() -> None:
    failed, later = on_group(_failing_under_kineto)
    assert failed.startswith("rpc#fails(")
    assert later.startswith("rpc#doubled(")


_has_called, _is_over = threading.Event(), threading.Event()


def call_within_and_after(x: torch.Tensor) -> torch.Tensor:
    x = rpc.rpc_sync("worker1", torch.add, args=(x, 1))
    _has_called.set()
    _is_over.wait()
    for _ in range(20):
        x = rpc.rpc_sync("worker1", torch.add, args=(x, 1))
    return x


def _forked_call_outlasting() -> tuple[float, list[str]]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiled:
        future = forked(call_within_and_after, torch.zeros(1))
        _has_called.wait()
    _is_over.set()
    value = future.wait().item()
    return value, [event.name for event in profiled.events() if event.name.startswith("rpc#")]


def test_calls_of_a_forked_function_that_outlasts_the_trace_are_made_without_spans() -> None:
    assert on_group(_forked_call_outlasting) == (21, [])
