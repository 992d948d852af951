"""What runs in a dynamic group: backward passes and gatherings of workers that came at different times."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

from tests.integration.dynamic_ranks import PATIENCE_S, Stage, die, join
from tests.integration.harness import run_ranks
from zmqagent.exceptions import WorkerLostError


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
        rpc.api._wait_all_workers(20)
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
    rpc.api._barrier({"worker0", "worker1"})
    stage.wait("joined3")
    found.append(rpc.api._all_gather(f"from {rank}"))
    rpc.api._wait_all_workers(20)
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
