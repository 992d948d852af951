"""Who is let into a dynamic group, under which rank; and that a join that fails holds up nobody."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch.distributed as dist
import torch.distributed.rpc as rpc

import zmqagent
from tests.integration.dynamic_ranks import PATIENCE_S, Stage, add, die, join, names, train
from tests.integration.harness import run_ranks
from zmqagent.exceptions import InvalidOptionError, RendezvousError


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
    found = rpc.get_worker_info().id, sorted(info.id for info in agent.get_worker_infos()), train("worker-a")
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
