"""Groups that workers join and leave while others run (``init_rpc`` without ``world_size``): who comes, goes, and comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc

from tests.integration.dynamic_ranks import PATIENCE_S, Stage, add, die, free_port, join, names, train
from tests.integration.harness import run_ranks
from zmqagent.exceptions import RRefUsageError, UnknownWorkerError, WorkerLostError


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
    found = run_ranks(_leave_the_store, 3, free_port())
    assert found[1:] == [(2, ["worker1", "worker2"]), (3, ["worker1", "worker2"])]


def _serve_the_store_and_come_back(rank: int, meeting_point: str, port: int) -> Any:
    stage, address = Stage(meeting_point), f"tcp://127.0.0.1:{port}"
    if rank:
        stage.wait("begun")
    join(rank, address)
    stage.reach("joined" if rank else "begun")
    stage.wait("joined")
    if rank == 0:
        rpc.shutdown()
        join(rank, address)
        stage.reach("back")
    stage.wait("back")
    found = rpc.rpc_sync(f"worker{1 - rank}", add, args=(rank, 1)), names()
    stage.reach(f"done{rank}")
    stage.wait("done0", "done1")
    rpc.shutdown()
    return found


def test_the_worker_that_serves_the_store_may_come_back() -> None:
    found = run_ranks(_serve_the_store_and_come_back, 2, free_port())
    assert found == [(1, ["worker0", "worker1"]), (2, ["worker0", "worker1"])]


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
    assert run_ranks(_outlive_the_store, 3, free_port(), dying=(0,))[1:] == [2, 3]


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
    found += [new.to_here().item(), names(), rpc.rpc_sync("worker1", pass_on, args=(new,)).to_here().item(), train("worker1")]
    del new
    rpc.shutdown()
    stage.reach("over")
    return found


def pass_on(value: Any) -> Any:
    return value


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


# Leaving gracefully.

_entered, _released = threading.Event(), threading.Event()


def block() -> str:
    _entered.set()
    assert _released.wait(PATIENCE_S)
    return "done"


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
        assert _entered.wait(PATIENCE_S)
        releasing = threading.Thread(target=lambda: (stage.wait("refused"), _released.set()))
        releasing.start()
        rpc.shutdown()
        stage.reach("left")
        releasing.join()
        return held.owner_name()
    stage.wait("holding")
    under_way = rpc.rpc_async("worker0", block)
    refusal = _be_refused("worker0")
    stage.reach("refused")
    found = [under_way.wait(), "is leaving the group and takes no more calls" in refusal]
    stage.wait("left")
    found.append(rpc._rref_context_get_debug_info()["num_owner_rrefs"])
    rpc.shutdown()
    return found


def _be_refused(worker: str) -> str:
    """Calls ``worker`` until it takes no more calls."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            rpc.rpc_sync(worker, add, args=(1, 1))
        except WorkerLostError as error:
            return str(error)
    raise AssertionError(f"{worker} goes on taking calls")


def test_who_leaves_ends_what_it_serves_refuses_more_and_gives_back_its_rrefs() -> None:
    assert run_ranks(_leave_while_serving, 2) == ["worker1", ["done", True, "0"]]


def _leak(rank: int, meeting_point: str) -> Any:
    """Rank 1 leaves, though rank 0 holds an RRef to a value of its, and says that this is an error."""
    stage = Stage(meeting_point)
    join(rank, meeting_point)
    stage.reach(f"joined{rank}")
    stage.wait("joined0", "joined1")
    if rank == 1:
        stage.wait("held")
        rpc.api._ignore_rref_leak = False
        with pytest.raises(RRefUsageError, match="Leaking RRef"):
            rpc.shutdown(timeout=0.2)
        stage.reach("left")
        return rpc.api._is_current_rpc_agent_set()
    held = rpc.remote("worker1", add, args=(1, 1))
    assert held.to_here() == 2
    stage.reach("held")
    stage.wait("left")
    with pytest.raises(WorkerLostError, match="has left the group"):
        held.to_here()
    rpc.shutdown()
    return rpc.api._is_current_rpc_agent_set()


def test_values_that_others_still_refer_to_are_leaks_where_leaks_are_errors() -> None:
    assert run_ranks(_leak, 2) == [False, False]


def _be_alone(rank: int, meeting_point: str) -> Any:
    join(rank, meeting_point)
    with pytest.raises(UnknownWorkerError, match="could not find destination 'worker7' in the group"):
        rpc.rpc_sync("worker7", add, args=(1, 1))
    rpc.shutdown()
    join(rank, meeting_point)
    rpc.shutdown()
    return rpc.api._is_current_rpc_agent_set()


def test_a_group_of_one_can_begin_again() -> None:
    assert run_ranks(_be_alone, 1) == [False]
