"""Groups that workers join and leave while others run (``init_rpc`` without ``world_size``).

The ranks tell each other how far they are through events kept in the file system, so that no RPC is needed for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
import torch.distributed as dist
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

import zmqagent
from tests.integration.harness import run_ranks
from zmqagent.exceptions import InvalidOptionError, RendezvousError, UnknownWorkerError, WorkerLostError

PATIENCE_S = 30.0


class Stage:
    """What the ranks have reached; each mark is an empty file."""

    def __init__(self, meeting_point: str) -> None:
        self._directory = Path(urlparse(meeting_point).path).parent

    def reach(self, mark: str) -> None:
        """Says that ``mark`` is reached."""
        (self._directory / mark).touch()

    def wait(self, *marks: str) -> None:
        """Waits until all ``marks`` are reached."""
        deadline = time.monotonic() + PATIENCE_S
        while not all((self._directory / mark).exists() for mark in marks):
            assert time.monotonic() < deadline, f"{marks} was not reached"
            time.sleep(0.002)


def join(rank: int, meeting_point: str, name: str = "", **options: Any) -> None:
    """Joins the group as ``worker<rank>``."""
    options.setdefault("rpc_timeout", 20)
    rpc.init_rpc(
        name or f"worker{rank}",
        backend=rpc.BackendType.ZMQ,
        rank=rank,
        rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, **options),
    )


def add(x: Any, y: Any) -> Any:
    return x + y


def names() -> list[str]:
    return [info.name for info in rpc.api._get_current_rpc_agent().get_worker_infos()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Coming and going.


def _come_late(rank: int, meeting_point: str, transport: str) -> Any:
    stage = Stage(meeting_point)
    if rank:
        stage.wait(f"ready{rank - 1}")
    join(rank, meeting_point, name=f"my-worker-{rank}", transport=transport)
    # At once, without any barrier: whoever is there knows the newcomer before it knows itself that it has joined.
    forth = [rpc.rpc_sync(f"my-worker-{other}", add, args=(torch.ones(2), other)).tolist() for other in range(rank + 1)]
    back = [rpc.rpc_sync(f"my-worker-{other}", call_back, args=(f"my-worker-{rank}",)) for other in range(rank)]
    stage.reach(f"ready{rank}")
    stage.wait(*(f"ready{other}" for other in range(3)))
    everyone = names()
    stage.reach(f"seen{rank}")
    stage.wait(*(f"seen{other}" for other in range(3)))
    rpc.shutdown()
    return forth, back, everyone


def call_back(caller: str) -> int:
    return int(rpc.rpc_sync(caller, add, args=(40, 2)))


@pytest.mark.parametrize("transport", ["auto", "tcp", "ipc"])
def test_a_late_worker_can_call_and_be_called_at_once_whatever_its_name(transport: str) -> None:
    everyone = ["my-worker-0", "my-worker-1", "my-worker-2"]
    for rank, found in enumerate(run_ranks(_come_late, 3, transport)):
        assert found == ([[1.0 + other] * 2 for other in range(rank + 1)], [42] * rank, everyone)


def _leave(rank: int, meeting_point: str, leaver: int) -> Any:
    stage = Stage(meeting_point)
    join(rank, meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1", "joined2")
    if rank == leaver:
        rpc.shutdown()
        stage.reach("left")
        stage.wait("over")
        return None
    stage.wait("left")
    other = f"worker{3 - rank - leaver}"
    found = [names() == [f"worker{number}" for number in range(3) if number != leaver]]
    rref = rpc.remote(f"worker{leaver}", add, args=(1, 1))
    for call in (partial(rpc.rpc_sync, f"worker{leaver}", add, args=(1, 1)), rref.to_here):
        with pytest.raises(WorkerLostError, match=rf"worker 'worker{leaver}' \({leaver}\) has left the group: it shut down"):
            call()
    found.append(rpc.rpc_sync(other, add, args=(1, 1)) == 2)
    stage.reach(f"done{rank}")
    stage.wait(*(f"done{number}" for number in range(3) if number != leaver))
    rpc.shutdown()
    if rank == max(number for number in range(3) if number != leaver):
        stage.reach("over")
    return found


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_any_worker_may_leave_and_the_others_go_on(leaver: int) -> None:
    found = run_ranks(_leave, 3, leaver)
    assert [one for rank, one in enumerate(found) if rank != leaver] == [[True, True]] * 2


def _leave_the_store(rank: int, meeting_point: str, port: int) -> Any:
    """Rank 0 serves the store, leaves, and lives on; rank 2 joins later."""
    stage, address = Stage(meeting_point), f"tcp://127.0.0.1:{port}"
    if rank == 0:
        join(rank, address)
        stage.reach("begun")
        stage.wait("joined1")
        rpc.shutdown()
        stage.reach("left")
        stage.wait("over")
        return None
    if rank == 1:
        stage.wait("begun")
        join(rank, address)
        stage.reach("joined1")
    else:
        stage.wait("left")
        join(rank, address)
        stage.reach("joined2")
    stage.wait("joined2")
    found = rpc.rpc_sync(f"worker{3 - rank}", add, args=(rank, 1)), names()
    stage.reach(f"done{rank}")
    stage.wait("done1", "done2")
    rpc.shutdown()
    stage.reach("over")
    return found


def test_the_worker_that_serves_the_store_may_leave_as_long_as_its_process_lives() -> None:
    found = run_ranks(_leave_the_store, 3, _free_port())
    assert found[1:] == [(2, ["worker1", "worker2"]), (3, ["worker1", "worker2"])]


def _outlive_the_store(rank: int, meeting_point: str, port: int) -> Any:
    stage, address = Stage(meeting_point), f"tcp://127.0.0.1:{port}"
    if rank == 0:
        join(rank, address)
        stage.reach("begun")
        stage.wait("joined1", "joined2")
        os.kill(os.getpid(), signal.SIGKILL)
    stage.wait("begun")
    join(rank, address)
    stage.reach(f"joined{rank}")
    stage.wait("joined1", "joined2")
    with pytest.raises(WorkerLostError):
        rpc.rpc_sync("worker0", block)
    found = rpc.rpc_sync(f"worker{3 - rank}", add, args=(rank, 1))
    stage.reach(f"done{rank}")
    stage.wait("done1", "done2")
    rpc.shutdown()
    return found


def test_when_the_process_that_serves_the_store_dies_the_others_go_on_and_can_leave() -> None:
    assert run_ranks(_outlive_the_store, 3, _free_port(), dying=(0,))[1:] == [2, 3]


def _come_back(rank: int, meeting_point: str, first_end: str) -> Any:
    """Rank 1 leaves and comes back under its name and rank, from the same process. Rank 0 keeps what it had of the first life."""
    stage = Stage(meeting_point)
    if rank == 1:
        stage.wait("begun")
        join(rank, meeting_point)
        stage.reach("first life")
        stage.wait("used")
        rpc.shutdown(graceful=first_end == "graceful")
        join(rank, meeting_point)
        stage.reach("second life")
        stage.wait("over")
        rpc.shutdown()
        return None
    join(rank, meeting_point)
    stage.reach("begun")
    stage.wait("first life")
    old = rpc.remote("worker1", add, args=(1, 1))
    found = [old.to_here(), old.owner().name]
    stage.reach("used")
    stage.wait("second life")
    with pytest.raises(WorkerLostError):
        old.to_here()
    new = rpc.remote("worker1", add, args=(torch.ones(1), 1))
    found += [new.to_here().item(), names(), rpc.rpc_sync("worker1", pass_on, args=(new,)).to_here().item(), _train("worker1")]
    del new
    rpc.shutdown()
    stage.reach("over")
    return found


def pass_on(value: Any) -> Any:
    return value


def _train(worker: str) -> float:
    with dist_autograd.context() as context:
        x = torch.ones(1, requires_grad=True)
        dist_autograd.backward(context, [rpc.rpc_sync(worker, torch.mul, args=(x, 3.0)).sum()])
        return float(dist_autograd.get_gradients(context)[x].item())


@pytest.mark.parametrize("first_end", ["graceful", "abrupt"])
def test_a_worker_that_has_left_may_come_back_under_its_name_and_rank(first_end: str) -> None:
    found = run_ranks(_come_back, 2, first_end)[0]
    assert found == [2, "worker1", 2.0, ["worker0", "worker1"], 2.0, 3.0]


def _replace_the_dead(rank: int, meeting_point: str) -> Any:
    """Rank 1 is killed; rank 2 takes its name, with its rank."""
    stage = Stage(meeting_point)
    if rank == 2:
        stage.wait("dead")
    join(min(rank, 1), meeting_point)
    stage.reach(f"joined{rank}")
    if rank == 0:
        stage.wait("joined1")
        with pytest.raises(WorkerLostError):
            rpc.rpc_sync("worker1", die)
        stage.reach("dead")
    stage.wait("joined2")
    found = rpc.rpc_sync(f"worker{1 - min(rank, 1)}", add, args=(rank, 1)), names()
    stage.reach(f"done{rank}")
    stage.wait("done0", "done2")
    rpc.shutdown()
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_process_may_take_the_place_of_one_that_died() -> None:
    found = run_ranks(_replace_the_dead, 3, dying=(1,))
    assert [found[0], found[2]] == [(1, ["worker0", "worker1"]), (3, ["worker0", "worker1"])]


def _all_at_once(rank: int, meeting_point: str) -> Any:
    join(rank, meeting_point)
    stage = Stage(meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait(*(f"joined{other}" for other in range(6)))
    found = [rpc.rpc_sync(f"worker{other}", add, args=(rank, other)) for other in range(6)], names()
    stage.reach(f"done{rank}")
    stage.wait(*(f"done{other}" for other in range(6)))
    rpc.shutdown()
    return found


def test_many_join_and_leave_at_once() -> None:
    everyone = [f"worker{other}" for other in range(6)]
    assert run_ranks(_all_at_once, 6) == [([rank + other for other in range(6)], everyone) for rank in range(6)]


# Joins that fail.


def _fail_to_join(rank: int, meeting_point: str, name: str, claimed: int) -> Any:
    stage = Stage(meeting_point)
    if rank == 1:
        stage.wait("begun")
        with pytest.raises(InvalidOptionError) as caught:
            join(claimed, meeting_point, name=name)
        assert not rpc.api._is_current_rpc_agent_set()
        # The group is not held up: neither is this process, which may try again.
        join(1, meeting_point)
        found: Any = str(caught.value), rpc.rpc_sync("worker0", add, args=(1, 1))
        stage.reach("joined")
    else:
        join(rank, meeting_point)
        stage.reach("begun")
        stage.wait("joined")
        found = rpc.rpc_sync("worker1", add, args=(1, 1)), names()
    stage.reach(f"done{rank}")
    stage.wait("done0", "done1")
    rpc.shutdown()
    return found


@pytest.mark.parametrize(
    ("name", "claimed", "text"),
    [
        ("worker0", 5, "RPC worker name worker0 is not unique. Workers 0 and 5 share the same name."),
        ("another", 0, "Worker id 0 is not unique. Workers worker0 and another share it: give each its own rank."),
    ],
)
def test_a_name_or_rank_that_is_taken_is_refused_and_holds_up_nobody(name: str, claimed: int, text: str) -> None:
    refused, other = reversed(run_ranks(_fail_to_join, 2, name, claimed))
    assert refused == (text, 2)
    assert other == (2, ["worker0", "worker1"])


def _die_while_joining(rank: int, meeting_point: str) -> Any:
    """Rank 1 dies when it is in the directory and has told nobody."""
    from zmqagent.agent.admission import Admission

    stage = Stage(meeting_point)
    if rank == 1:
        stage.wait("begun")
        stage.reach("dying")
        Admission.join = lambda self, timeout: die()  # type: ignore[method-assign]
        join(rank, meeting_point)
    if rank == 2:
        stage.wait("dying")
        _wait_for_death_of(rank=1, meeting_point=meeting_point)
    join(rank, meeting_point)
    stage.reach("begun" if rank == 0 else "joined2")
    stage.wait("joined2")
    found = rpc.rpc_sync(f"worker{2 - rank}", add, args=(rank, 1)), names()
    stage.reach(f"done{rank}")
    stage.wait("done0", "done2")
    rpc.shutdown()
    return found


def _wait_for_death_of(rank: int, meeting_point: str) -> None:
    from zmqagent.agent.directory import Directory
    from zmqagent.transport.probe import has_ended

    store = dist.FileStore(urlparse(meeting_point).path, -1)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        records = Directory.from_text(store.compare_set("zmqagent/directory", "", "").decode()).records
        if any(record.worker_id == rank and has_ended(record) for record in records):
            return
        time.sleep(0.002)
    raise AssertionError("it lives")


def test_a_worker_that_dies_while_it_joins_holds_up_nobody() -> None:
    found = run_ranks(_die_while_joining, 3, dying=(1,))
    assert [found[0], found[2]] == [(1, ["worker0", "worker2"]), (3, ["worker0", "worker2"])]


def _join_beside_a_stopped_one(rank: int, meeting_point: str) -> Any:
    stage = Stage(meeting_point)
    if rank == 0:
        join(rank, meeting_point)
        stage.reach("begun")
        stage.wait("go on")
        stage.wait("left1")
        found = names()
        rpc.shutdown()
        return found
    stage.wait("begun")
    agent_pid = _pid_of(0, meeting_point)
    os.kill(agent_pid, signal.SIGSTOP)
    try:
        with pytest.raises(RendezvousError, match=r"waited 0.5 s in init_rpc for an answer of 'worker0' \(0\)"):
            join(rank, meeting_point, rpc_timeout=0.5)
    finally:
        os.kill(agent_pid, signal.SIGCONT)
    stage.reach("go on")
    join(rank, meeting_point)
    found = names()
    rpc.shutdown()
    stage.reach("left1")
    return found


def _pid_of(rank: int, meeting_point: str) -> int:
    from zmqagent.agent.directory import Directory

    store = dist.FileStore(urlparse(meeting_point).path, -1)
    records = Directory.from_text(store.compare_set("zmqagent/directory", "", "").decode()).records
    return next(record.pid for record in records if record.worker_id == rank)


def test_a_member_that_does_not_answer_is_named_and_the_join_leaves_nothing_behind() -> None:
    assert run_ranks(_join_beside_a_stopped_one, 2) == [["worker0"], ["worker0", "worker1"]]


# Static and dynamic, and ranks.

MIXED = "RPC group mixes statically and dynamically initialized members which is not supported."


def _mix(rank: int, meeting_point: str, first: str) -> Any:
    stage = Stage(meeting_point)

    def enter(kind: str) -> None:
        rpc.init_rpc(
            f"worker{rank}",
            backend=rpc.BackendType.ZMQ,
            rank=rank,
            world_size=None if kind == "dynamic" else 2 if first == "dynamic" else 1,
            rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, rpc_timeout=20),
        )

    if rank == 0:
        enter(first)
        stage.reach("begun")
        stage.wait("refused")
        rpc.shutdown()
        return None
    stage.wait("begun")
    with pytest.raises(RendezvousError) as caught:
        enter("static" if first == "dynamic" else "dynamic")
    stage.reach("refused")
    return MIXED in str(caught.value)


@pytest.mark.parametrize("first", ["static", "dynamic"])
def test_static_and_dynamic_members_do_not_mix(first: str) -> None:
    assert run_ranks(_mix, 2, first)[1] is True


def _draw(rank: int, meeting_point: str) -> Any:
    stage = Stage(meeting_point)
    options = zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, draw_rank=True)
    rpc.init_rpc(f"worker-{'abc'[rank]}", backend=rpc.BackendType.ZMQ, rpc_backend_options=options)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1", "joined2")
    agent = rpc.api._get_current_rpc_agent()
    found = rpc.get_worker_info().id, sorted(info.id for info in agent.get_worker_infos()), _train("worker-a")
    stage.reach(f"done{rank}")
    stage.wait("done0", "done1", "done2")
    rpc.shutdown()
    return found


def test_ranks_can_be_drawn_from_the_store() -> None:
    found = run_ranks(_draw, 3)
    assert sorted(rank for rank, *_ in found) == [0, 1, 2]
    assert [rest for _, *rest in found] == [[[0, 1, 2], 3.0]] * 3


def test_without_a_rank_torchs_error_is_kept(tmp_path: Path) -> None:
    options = zmqagent.ZmqRpcBackendOptions(init_method=f"file://{tmp_path}/meet")
    with pytest.raises(ValueError, match="rank parameter missing"):
        rpc.init_rpc("worker", backend=rpc.BackendType.ZMQ, rpc_backend_options=options)


# What runs in such a group.


def multiply(x: torch.Tensor, factor: float, *further: str) -> torch.Tensor:
    """Through all of ``further``, one after the other."""
    y = x * factor
    return rpc.rpc_sync(further[0], multiply, args=(y, factor + 1, *further[1:])) if further else y  # type: ignore[no-any-return]


def _train_together(rank: int, meeting_point: str) -> Any:
    stage = Stage(meeting_point)
    if rank:
        stage.wait(f"joined{rank - 1}")
    join(rank, meeting_point)
    found = []
    with dist_autograd.context() as context:
        x = torch.ones(1, requires_grad=True)
        others = [f"worker{other}" for other in range(rank)]
        loss = multiply(x, 2.0, *others)
        dist_autograd.backward(context, [loss.sum()])
        found.append(dist_autograd.get_gradients(context)[x].item())
    stage.reach(f"joined{rank}")
    stage.wait("joined2")
    with dist_autograd.context() as context:
        x = torch.ones(1, requires_grad=True)
        loss = multiply(x, 2.0, *(f"worker{other}" for other in (2, 1, 0) if other != rank))
        dist_autograd.backward(context, [loss.sum()])
        found.append(dist_autograd.get_gradients(context)[x].item())
    stage.reach(f"done{rank}")
    stage.wait("done0", "done1", "done2")
    rpc.shutdown()
    return found


def test_backward_passes_go_through_workers_that_joined_at_different_times() -> None:
    assert run_ranks(_train_together, 3) == [[2.0, 24.0], [6.0, 24.0], [24.0, 24.0]]


def _gather(rank: int, meeting_point: str) -> Any:
    """Three join; rank 2 leaves while the others gather; rank 3 joins later."""
    stage = Stage(meeting_point)
    if rank == 3:
        stage.wait("left2")
        join(rank, meeting_point)
        stage.reach("joined3")
        found = [rpc.api._all_gather("from 3")]
        rpc.shutdown()
        return found
    join(rank, meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1", "joined2")
    found = [rpc.api._all_gather(rank)]
    if rank == 2:
        rpc.shutdown()
        stage.reach("left2")
        return found
    found.append(rpc.api._all_gather(torch.ones(1) * rank))
    found.append(rpc.api._all_gather(rank, {"worker0", "worker1"}, timeout=20))
    stage.wait("joined3")
    found.append(rpc.api._all_gather(f"from {rank}"))
    rpc.shutdown()
    return found


def test_all_gather_asks_those_who_are_there() -> None:
    everyone = {"worker0": 0, "worker1": 1, "worker2": 2}
    two = {"worker0": 0, "worker1": 1}
    last = {"worker0": "from 0", "worker1": "from 1", "worker3": "from 3"}
    found = run_ranks(_gather, 4)
    assert found[0] == found[1] == [everyone, two, two, last]
    assert found[2:] == [[everyone], [last]]


def _gather_with_one_that_goes(rank: int, meeting_point: str, how: str, names_given: bool) -> Any:
    """Rank 0, the leader, goes while the others wait in a gathering."""
    stage = Stage(meeting_point)
    if rank:
        stage.wait("joined0")
    join(rank, meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1", "joined2")
    if rank == 0:
        _wait_until_two_have_come()
        if how == "dies":
            die()
        rpc.shutdown()
        return None
    try:
        found: Any = rpc.api._all_gather(rank, {"worker0", "worker1", "worker2"} if names_given else None)
    except WorkerLostError as error:
        found = "worker0" in str(error)
    stage.reach(f"done{rank}")
    stage.wait("done1", "done2")
    rpc.shutdown()
    return found


def _wait_until_two_have_come() -> None:
    from zmqagent.rpc.gathering import Gatherings

    assert Gatherings.current is not None
    deadline = time.monotonic() + PATIENCE_S
    while not any(len(gathering.objects) == 2 for gathering in Gatherings.current._pending.values()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("how", "names_given", "expected"),
    [
        ("leaves", False, {"worker1": 1, "worker2": 2}),
        ("leaves", True, True),
        ("dies", False, True),
        ("dies", True, True),
    ],
)
def test_a_gathering_whose_leader_goes_ends(how: str, names_given: bool, expected: Any) -> None:
    dying = (0,) if how == "dies" else ()
    assert run_ranks(_gather_with_one_that_goes, 3, how, names_given, dying=dying)[1:] == [expected] * 2


# Leaving gracefully.

_entered, _released = threading.Event(), threading.Event()


def block() -> str:
    _entered.set()
    assert _released.wait(PATIENCE_S)
    return "done"


def wait_until_entered() -> bool:
    return _entered.wait(PATIENCE_S)


def _leave_while_serving(rank: int, meeting_point: str) -> Any:
    """Rank 0 leaves while it serves a call of rank 1 and holds an RRef of its."""
    stage = Stage(meeting_point)
    join(rank, meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1")
    if rank == 0:
        held = rpc.remote("worker1", add, args=(1, 1))
        assert held.to_here() == 2
        stage.reach("holding")
        assert wait_until_entered()
        rpc.shutdown()
        stage.reach("left")
        return held.owner_name()
    stage.wait("holding")
    under_way = rpc.rpc_async("worker0", block)
    found: list[Any] = [_refusal("worker0")]
    stage.reach("refused")
    found.append(under_way.wait())
    stage.wait("left")
    found.append(rpc._rref_context_get_debug_info()["num_owner_rrefs"])
    rpc.shutdown()
    return found


def _refusal(worker: str) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            rpc.rpc_sync(worker, add, args=(1, 1))
        except WorkerLostError as error:
            return "is leaving the group and takes no more calls" in str(error) and "refused"  # type: ignore[return-value]
    return "never refused"


def _release_when_refused(stage: Stage) -> Callable[[], None]:
    def run() -> None:
        stage.wait("refused")
        _released.set()

    return run


def _leave_while_serving_and_released(rank: int, meeting_point: str) -> Any:
    helper = threading.Thread(target=_release_when_refused(Stage(meeting_point)))
    helper.start()
    try:
        return _leave_while_serving(rank, meeting_point)
    finally:
        with contextlib.suppress(RuntimeError):
            helper.join()


def test_who_leaves_ends_what_it_serves_refuses_more_and_gives_back_its_rrefs() -> None:
    assert run_ranks(_leave_while_serving_and_released, 2) == ["worker1", ["refused", "done", "0"]]


def _be_unknown(rank: int, meeting_point: str) -> Any:
    join(rank, meeting_point)
    with pytest.raises(UnknownWorkerError, match="could not find destination 'worker7' in the group"):
        rpc.rpc_sync("worker7", add, args=(1, 1))
    rpc.shutdown()
    join(rank, meeting_point)
    rpc.shutdown()
    return rpc.api._is_current_rpc_agent_set()


def test_a_group_of_one_can_begin_again() -> None:
    assert run_ranks(_be_unknown, 1) == [False]
