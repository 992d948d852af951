"""How workers begin and end: every way to meet, again after shutdown, beside TENSORPIPE, without grace, and by death."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc

import zmqagent
from tests.integration.harness import on_group, run_ranks, worker
from zmqagent.exceptions import UnreadableCallError, WorkerLostError


def add(x: Any, y: Any) -> Any:
    return x + y


def my_pid() -> int:
    return os.getpid()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _call_around(rank: int, world_size: int) -> Any:
    return rpc.rpc_sync(f"worker{(rank + 1) % world_size}", add, args=(torch.ones(2), rank)).tolist()


# Every way to meet.


def _meet(rank: int, meeting_point: str, init_method: str) -> Any:
    with worker(rank, 2, init_method or meeting_point):
        return _call_around(rank, 2)


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_workers_meet_at_a_file_or_a_port(scheme: str) -> None:
    init_method = f"tcp://127.0.0.1:{_free_port()}" if scheme == "tcp" else ""
    assert run_ranks(_meet, 2, init_method) == [[1.0, 1.0], [2.0, 2.0]]


def _meet_by_environment(rank: int, meeting_point: str, port: int, transport: str) -> Any:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = zmqagent.ZmqRpcBackendOptions(transport=transport)  # type: ignore[arg-type]
    rpc.init_rpc(f"worker{rank}", backend=rpc.BackendType.ZMQ, rank=rank, world_size=2, rpc_backend_options=options)
    value = _call_around(rank, 2)
    (address, *_) = rpc.api._get_current_rpc_agent()._me.addresses
    rpc.shutdown()
    return value, address.partition(":")[0]


@pytest.mark.parametrize(("transport", "scheme"), [("auto", "unix"), ("local", "unix"), ("ipc", "ipc"), ("tcp", "tcp")])
def test_workers_meet_by_the_environment_and_talk_over_the_chosen_transport(transport: str, scheme: str) -> None:
    found = run_ranks(_meet_by_environment, 2, _free_port(), transport)
    assert found == [([1.0, 1.0], scheme), ([2.0, 2.0], scheme)]


def _tensorpipe_options(rank: int, meeting_point: str) -> Any:
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=3, rpc_timeout=7, init_method=meeting_point)
    rpc.init_rpc(f"worker{rank}", backend=rpc.BackendType.ZMQ, rank=rank, world_size=2, rpc_backend_options=options)
    value = _call_around(rank, 2)
    agent = rpc.api._get_current_rpc_agent()
    found = value, type(agent).__name__, rpc.get_rpc_timeout(), agent.get_metrics()["agent.thread_pool_size"]
    rpc.shutdown()
    return found


def test_tensorpipes_options_are_taken_over() -> None:
    expected = ("ZmqRpcAgent", 7.0, "3")
    assert run_ranks(_tensorpipe_options, 2) == [([1.0, 1.0], *expected), ([2.0, 2.0], *expected)]


# What is left.


def _descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # The listing's own.
    return found


def _left_after_shutdown(rank: int, meeting_point: str) -> list[Any]:
    def live(number: int) -> None:
        with worker(rank, 2, f"{meeting_point}{number}"):
            _call_around(rank, 2)
            kept = rpc.remote(f"worker{1 - rank}", add, args=(torch.ones(1), 1))
            kept.to_here()
            del kept

    # What torch itself opens once stays open: only what the second life leaves is counted.
    live(0)
    before = _descriptors(), threading.active_count(), len(os.listdir("/proc/self/task"))
    live(1)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    # The kernel's thread outlives Python's by a moment.
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > before[2] and time.monotonic() < deadline:
        time.sleep(0.01)
    after = _descriptors(), threading.active_count(), len(os.listdir("/proc/self/task"))
    return [sorted(after[0] - before[0]), after[1] - before[1], max(0, after[2] - before[2]), children]


def test_a_life_leaves_no_thread_no_descriptor_and_no_process() -> None:
    for left in run_ranks(_left_after_shutdown, 2):
        assert left == [[], 0, 0, ""]


def _alone(rank: int, meeting_point: str) -> list[Any]:
    found = []
    for number in range(3):
        with worker(0, 1, f"{meeting_point}{number}"):
            rref = rpc.remote("worker0", add, args=(number, 1))
            found.append([rref.to_here(), rpc.rpc_sync("worker0", add, args=(1, 1)), len(rpc.get_worker_info().name)])
            del rref
    return found


def test_a_group_of_one_lives_again_and_again() -> None:
    assert run_ranks(_alone, 1) == [[[1, 2, 7], [2, 2, 7], [3, 2, 7]]]


def _init_tensorpipe(rank: int, meeting_point: str) -> None:
    rpc.init_rpc(
        f"worker{rank}",
        backend=rpc.BackendType.TENSORPIPE,
        rank=rank,
        world_size=2,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(init_method=meeting_point),
    )


def _train(rank: int) -> list[float]:
    with torch.distributed.autograd.context() as context:
        x = torch.ones(1, requires_grad=True)
        loss = rpc.rpc_sync(f"worker{1 - rank}", torch.mul, args=(x, 3.0)).sum()
        torch.distributed.autograd.backward(context, [loss])
        return [gradient.item() for gradient in torch.distributed.autograd.get_gradients(context).values()]


def _alternate(rank: int, meeting_point: str) -> list[Any]:
    found = []
    for number, backend in enumerate(["TENSORPIPE", "ZMQ", "TENSORPIPE", "ZMQ"]):
        if backend == "ZMQ":
            with worker(rank, 2, f"{meeting_point}{number}"):
                found.append((type(rpc.api._get_current_rpc_agent()).__name__, _call_around(rank, 2), _train(rank)))
        else:
            _init_tensorpipe(rank, f"{meeting_point}{number}")
            found.append((type(rpc.api._get_current_rpc_agent()).__name__, _call_around(rank, 2), _train(rank)))
            rpc.shutdown()
    return found


def test_zmq_and_tensorpipe_take_turns_in_one_process() -> None:
    for rank, found in enumerate(run_ranks(_alternate, 2)):
        value = [rank + 1.0, rank + 1.0]
        assert found == [(name, value, [3.0]) for name in ("TensorPipeAgent", "ZmqRpcAgent") * 2]


# Ends.


_entered = threading.Event()


def block() -> None:
    _entered.set()
    threading.Event().wait()


def wait_until_entered() -> bool:
    return _entered.wait(20)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _outlive(rank: int, meeting_point: str) -> list[Any] | None:
    rpc.init_rpc(
        f"worker{rank}",
        backend=rpc.BackendType.ZMQ,
        rank=rank,
        world_size=3,
        rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, rpc_timeout=0),
    )
    if rank:
        # Killed, or served until worker0 has seen enough; it may leave before its answer does.
        with contextlib.suppress(WorkerLostError):
            rpc.rpc_sync("worker0", hold)
        rpc.shutdown(graceful=False)
        return None
    rref = rpc.remote("worker1", add, args=(1, 2))
    rref.to_here()
    pending = [rpc.rpc_async("worker1", block), rpc.rpc_async("worker1", block)]
    creating = rpc.remote("worker1", block)
    rpc.rpc_sync("worker1", wait_until_entered)
    last = rpc.rpc_async("worker1", die)
    found: list[Any] = []
    for wait in (*(future.wait for future in (*pending, last)), creating.to_here, rref.to_here):
        with pytest.raises(WorkerLostError) as caught:
            wait()
        found.append("worker1" in str(caught.value))
    with pytest.raises(WorkerLostError):
        rpc.rpc_sync("worker1", add, args=(1, 2))
    found.append(rpc.rpc_sync("worker2", add, args=(1, 2)))
    _released.set()
    rpc.shutdown(graceful=False)
    return found


_released = threading.Event()


def hold() -> None:
    _released.wait()


def test_calls_to_a_killed_worker_fail_at_once_and_name_it_while_others_are_served() -> None:
    assert run_ranks(_outlive, 3, dying=(1,))[0] == [True, True, True, True, True, 3]


def _drain(rank: int, meeting_point: str) -> dict[str, str]:
    with worker(rank, 3, meeting_point):
        others = [f"worker{other}" for other in range(3) if other != rank]
        rrefs = [rpc.remote(other, add, args=(torch.ones(2), rank)) for other in others for _ in range(5)]
        # Through every kind of fork: to its owner, to a third worker, and back as a result.
        back = [rpc.rpc_sync(other, pass_on, args=(rref,)) for rref in rrefs for other in others]
        values = [rref.to_here().tolist() for rref in back]
        assert values == [[rank + 1.0, rank + 1.0]] * 20
        # Leaks are errors at shutdown (`worker` says so).
        del rrefs, back
    return rpc_debug_info()


def pass_on(rref: Any) -> Any:
    return rref


def rpc_debug_info() -> dict[str, str]:
    return {"is_set": str(rpc.api._is_current_rpc_agent_set())}


def test_rrefs_that_went_everywhere_have_all_drained_at_shutdown() -> None:
    assert run_ranks(_drain, 3) == [{"is_set": "False"}] * 3


def _describe_the_group() -> list[Any]:
    agent = rpc.api._get_current_rpc_agent()
    infos = [(info.name, info.id) for info in agent.get_worker_infos()]
    keys = sorted(key for key in agent.get_metrics() if key.startswith("agent."))
    return [infos, rpc.get_worker_info().name, rpc.get_worker_info("worker2").id, "agent.thread_pool_size" in keys]


def test_the_group_can_be_asked_about() -> None:
    assert on_group(_describe_the_group, world_size=3) == [[("worker0", 0), ("worker1", 1), ("worker2", 2)], "worker0", 2, True]


def _name_no_backend(rank: int, meeting_point: str) -> str:
    rpc.init_rpc(
        f"worker{rank}",
        rank=rank,
        world_size=2,
        rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point),
    )
    agent = type(rpc.api._get_current_rpc_agent()).__name__
    assert rpc.rpc_sync(f"worker{1 - rank}", add, args=(1, 2)) == 3
    rpc.shutdown()
    return agent


def test_the_options_alone_choose_the_backend() -> None:
    assert run_ranks(_name_no_backend, 2) == ["ZmqRpcAgent"] * 2


class Unreadable:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def _send_what_cannot_be_read() -> dict[str, str]:
    rref = rpc.RRef(torch.ones(1))
    with pytest.raises(UnreadableCallError, match="no number"):
        rpc.rpc_sync("worker1", add, args=(Unreadable(), rref))
    return dict(rpc._rref_context_get_debug_info())


def test_shares_in_a_call_that_nobody_could_read_are_taken_back() -> None:
    info = on_group(_send_what_cannot_be_read, world_size=2)
    assert (info["num_forks"], info["num_owner_rrefs"]) == ("0", "0")
