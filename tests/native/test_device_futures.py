"""Futures of calls on a device with streams: torch's own code, told by a guard that the fake device has some.

No test waits for a copy by hand: what a use comes behind is read from the orders that were given to streams and events.
The guard is in C++, as torch's own are; these tests alone need a compiler, and so run only when they are named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future, collect_all, wait_all

from tests.integration.dynamic_ranks import Stage, join
from tests.integration.harness import run_ranks, worker
from tests.native import logged_streams
from tests.native.logged_streams import note_use, note_work, take_log, uses_memory, work_behind
from zmqagent.agent.accelerator import ACCELERATOR


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return logged_streams.build(tmp_path_factory.mktemp("guard"))


def lead(guard: str, function: Callable[[], Any]) -> None:
    """Runs ``function()`` on worker0, whose device fake:1 is fake:2 of worker1."""
    run_ranks(partial(_lead_or_serve, guard, function), 2)


def _lead_or_serve(guard: str, function: Callable[[], Any], rank: int, meeting_point: str) -> None:
    logged_streams.install(guard)
    # What was tried to find that out is no part of what follows.
    assert ACCELERATOR.hands_over(torch.device("fake:1"))
    take_log()
    maps = [{"worker1": {1: 2, "cpu": "cpu"}}, {}][rank]
    with worker(rank, 2, meeting_point, device_maps=maps):
        agent: Any = rpc.api._get_current_rpc_agent()
        assert list(agent.devices) == [torch.device("fake", 1 + rank)]
        if rank == 0:
            function()


def made(device: str) -> Tensor:
    return torch.ones(3, device=device)


def _wait_on_a_stream_of_ones_own() -> None:
    future = rpc.rpc_async("worker1", made, args=("fake:2",))
    with torch.Stream(device="fake:1"):
        value = future.wait()
        note_use("waiter", "fake:1")
    assert (str(value.device), value.tolist()) == ("fake:1", [1, 1, 1])
    log = take_log()
    assert "copy-in" in work_behind(log, "waiter")
    assert uses_memory(log, "waiter")


def test_the_stream_of_who_waits_for_a_call_comes_behind_the_copy(guard: str) -> None:
    lead(guard, _wait_on_a_stream_of_ones_own)


def _noted_and_doubled(future: Future[Tensor]) -> Tensor:
    value = future.wait()
    note_use("callback", "fake:1")
    note_work("doubling", "fake:1")
    return value * 2


def _use_callbacks() -> None:
    future = rpc.rpc_async("worker1", made, args=("fake:2",))
    child = future.then(_noted_and_doubled)
    assert child.wait().tolist() == [2, 2, 2]
    note_use("waiter", "fake:1")
    log = take_log()
    assert "copy-in" in work_behind(log, "callback")
    assert uses_memory(log, "callback")
    assert {"copy-in", "doubling"} <= work_behind(log, "waiter")
    # Callbacks have streams of their own, so that they wait for nothing else.
    callbacks, waiters = ({line.split()[2] for line in log if line.startswith(f"used {who} ")} for who in ("callback", "waiter"))
    assert not callbacks & waiters


def test_a_callbacks_stream_comes_behind_the_copy_and_its_readers_behind_the_callback(guard: str) -> None:
    lead(guard, _use_callbacks)


def _noted_sum(future: Future[list[Future[Tensor]]]) -> Tensor:
    values = [each.wait() for each in future.wait()]
    note_use("collector", "fake:1")
    note_work("adding", "fake:1")
    return values[0] + values[1]


def _collect() -> None:
    futures = [rpc.rpc_async("worker1", made, args=("fake:2",)) for _ in range(2)]
    total = collect_all(futures).then(_noted_sum)
    with torch.Stream(device="fake:1"):
        assert total.wait().tolist() == [2, 2, 2]
        note_use("waiter", "fake:1")
    log = take_log()
    assert "copy-in" in work_behind(log, "collector")
    assert {"copy-in", "adding"} <= work_behind(log, "waiter")


def test_a_collection_of_calls_carries_their_devices(guard: str) -> None:
    lead(guard, _collect)


def noted_sum_of(tensor: Tensor) -> Tensor:
    note_use("function", str(tensor.device))
    note_work("adding", str(tensor.device))
    return tensor + 1


def _call_with_a_tensor() -> None:
    note_work("making", "fake:1")
    assert rpc.rpc_sync("worker1", noted_sum_of, args=(made("fake:1"),)).tolist() == [2, 2, 2]
    mine, theirs = take_log(), rpc.rpc_sync("worker1", take_log)
    note_use("reader", "fake:1")
    assert work_behind([*mine, *take_log()], "reader") >= {"making", "copy-out", "copy-in"}
    assert work_behind(theirs, "function") == {"copy-in"}
    assert uses_memory(theirs, "function")
    # It waits neither for other work nor for its own copy back, which comes behind what the function gave its stream.
    out = next(line for line in theirs if line.startswith("work copy-out"))
    place = theirs.index(out)
    stream = out.split()[2]
    assert "adding" in work_behind([*theirs[: place + 1], f"used answer {stream}"], "answer")


def test_a_function_comes_behind_the_copies_of_its_arguments_and_its_answer_behind_it(guard: str) -> None:
    lead(guard, _call_with_a_tensor)


def _complete(future: Future[Tensor], device: str) -> None:
    with torch.Stream(device=device):
        note_work("making", device)
        future.set_result(made(device))


@rpc.functions.async_execution
def made_on_another_stream(device: str) -> Future[Tensor]:
    future: Future[Tensor] = Future(devices=[device])
    rpc.rpc_async("worker0", made, args=("cpu",)).add_done_callback(lambda _: _complete(future, device))
    return future


def note_local_value(rref: Any) -> None:
    note_use("owner", str(rref.local_value().device))


def _keep_what_a_future_brought() -> None:
    rref = rpc.remote("worker1", made_on_another_stream, args=("fake:2",))
    rpc.rpc_sync("worker1", note_local_value, args=(rref,))
    theirs = rpc.rpc_sync("worker1", take_log)
    assert "making" in work_behind(theirs, "owner")
    assert uses_memory(theirs, "owner")
    assert rref.to_here().tolist() == [1, 1, 1]
    assert rpc.rpc_sync("worker1", made_on_another_stream, args=("fake:2",)).tolist() == [1, 1, 1]


def test_an_rrefs_value_from_a_future_is_ready_for_the_owners_other_threads(guard: str) -> None:
    lead(guard, _keep_what_a_future_brought)


class Unpicklable:
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot be pickled again")


class Once:
    """Arrives as something that cannot be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpicklable, ()


def once() -> Once:
    return Once()


def fail() -> None:
    raise ValueError("on purpose")


def _end_in_other_ways() -> None:
    assert isinstance(rpc.rpc_sync("worker1", once), Unpicklable)
    assert rpc.rpc_async("worker1", once).then(lambda future: type(future.wait()).__name__).wait() == "Unpicklable"
    with pytest.raises(ValueError, match="on purpose"):
        rpc.rpc_sync("worker1", fail)
    with pytest.raises(RuntimeError, match=r"ValueError: On WorkerInfo"):
        rpc.rpc_async("worker1", fail).then(lambda future: future.wait()).wait()
    with pytest.raises(ValueError, match="on purpose"):
        wait_all([rpc.rpc_async("worker1", fail), rpc.rpc_async("worker1", made, args=("fake:2",))])
    with pytest.raises(ValueError, match="on purpose"):
        collect_all([rpc.rpc_async("worker1", fail)]).wait()
    with pytest.raises(ValueError, match="on purpose"), torch.autograd.profiler.profile():
        rpc.rpc_sync("worker1", fail)
    with pytest.raises(ValueError, match="on purpose"):
        rpc.remote("worker1", fail).to_here()
    with pytest.raises(ValueError, match=r"device\(s\) fake:3 which are not among the expected device\(s\) fake:1"):
        rpc.rpc_async("worker1", made, args=("fake:2",)).then(lambda future: made("fake:3")).wait()
    meta = rpc.rpc_sync("worker1", torch.ones, args=([2],), kwargs={"device": "meta"})
    assert meta.is_meta


def test_errors_and_what_cannot_be_pickled_again_end_a_call_as_elsewhere(guard: str) -> None:
    lead(guard, _end_in_other_ways)


def _differentiate() -> None:
    x = made("fake:1").requires_grad_()
    with dist_autograd.context() as context:
        y = rpc.rpc_sync("worker1", torch.mul, args=(x, 3))
        take_log()
        dist_autograd.backward(context, [y.sum()])
        gradient = dist_autograd.get_gradients(context)[x]
        note_use("reader", "fake:1")
    assert (str(gradient.device), gradient.tolist()) == ("fake:1", [3, 3, 3])
    assert "copy-in" in work_behind(take_log(), "reader")


def test_gradients_are_there_for_who_reads_them_on_devices_of_any_number(guard: str) -> None:
    lead(guard, _differentiate)


def _join_with_a_map(guard: str, rank: int, meeting_point: str) -> None:
    logged_streams.install(guard)
    stage = Stage(meeting_point)
    if rank == 0:
        join(0, meeting_point)
        agent: Any = rpc.api._get_current_rpc_agent()
        assert list(agent.devices) == []
        stage.reach("founded")
        stage.wait("joined")
        assert list(agent.devices) == [torch.device("fake:3")]
    else:
        stage.wait("founded")
        join(1, meeting_point, device_maps={"worker0": {1: 3}})
        stage.reach("joined")
    rpc.shutdown()


def test_futures_carry_what_the_map_of_a_newcomer_names(guard: str) -> None:
    run_ranks(partial(_join_with_a_map, guard), 2)


def _overlap(guard: str, rank: int, meeting_point: str) -> None:
    logged_streams.install(guard)
    device = torch.device("fake:1")
    own = torch.Stream(device=device)
    with own:
        first = ACCELERATOR.beside(device)
        first.__enter__()
    second = ACCELERATOR.beside(device)
    with second:
        first.__exit__(None, None, None)
        assert torch.accelerator.current_stream(device) == own
    assert torch.accelerator.current_stream(device).stream_id == 0


def test_uses_of_the_side_stream_that_overlap_each_give_back_what_they_found(guard: str) -> None:
    run_ranks(partial(_overlap, guard), 1)
