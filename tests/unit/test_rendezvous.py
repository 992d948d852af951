"""`zmqagent.agent.rendezvous`: all workers find each other, or all learn why not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from zmqagent.agent.rendezvous import Rendezvous
from zmqagent.exceptions import InvalidOptionError, RendezvousError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

DEADLINE_S = 30.0
Connect = Callable[[], dist.Store]


@pytest.fixture(params=["hash", "file"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Connect:
    """Connects one worker to the group's store."""
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"))
    store = dist.HashStore()
    return lambda: store


def record(rank: int) -> PeerRecord:
    return PeerRecord(f"worker{rank}", WorkerId(rank), (1 << 63) - 1 - rank, "host", 4711 + rank, ("ipc:a", "tcp:b"), 99 + rank)


def meet(store: dist.Store, rank: int, world_size: int, timeout: float = DEADLINE_S) -> tuple[list[str], list[PeerRecord]]:
    rendezvous = Rendezvous(store, f"worker{rank}", rank, world_size, timeout)
    try:
        return rendezvous.hosts(f"host{rank}"), rendezvous.records(record(rank))
    except RendezvousError as error:
        rendezvous.refuse(error)
        raise


def at_once(world_size: int, join: Callable[[int], Any]) -> list[Future[Any]]:
    with ThreadPoolExecutor(world_size) as threads:
        return [threads.submit(join, rank) for rank in range(world_size)]


def test_everyone_gets_everything_that_everyone_published(connect: Connect) -> None:
    hosts = [f"host{rank}" for rank in range(4)]
    records = [record(rank) for rank in range(4)]
    for future in at_once(4, lambda rank: meet(connect(), rank, 4)):
        assert future.result() == (hosts, records)


def test_without_a_timeout_a_group_meets_too() -> None:
    assert meet(dist.HashStore(), 0, 1, timeout=0) == (["host0"], [record(0)])


def test_who_did_not_come_is_named_by_rank(connect: Connect) -> None:
    with pytest.raises(RendezvousError) as caught:
        meet(connect(), 1, 4, timeout=1e-3)
    text = str(caught.value)
    assert "worker 'worker1' (rank 1) waited 0.001 s in init_rpc" in text
    assert "of 4 workers those with rank 0, 2, 3 did not come" in text
    assert "rpc_timeout" in text


@pytest.mark.parametrize("rank", [0, 2])
def test_one_that_refuses_ends_the_wait_of_all_others_though_another_has_not_come(rank: int, connect: Connect) -> None:
    """Without a timeout: nothing else could end it."""

    def join(other: int) -> tuple[list[str], list[PeerRecord]]:
        if other == rank:
            Rendezvous(connect(), "bad name!", rank, 4, 0).refuse(InvalidOptionError("such a name is illegal"))
        return meet(connect(), other, 4, timeout=0)

    for future in at_once(3, join):
        error = future.exception()
        assert isinstance(error, RendezvousError)
        told = f"worker 'bad name!' (rank {rank}) could not join the group: InvalidOptionError: such a name is illegal"
        assert str(error) == told


def test_one_that_refuses_after_the_first_stage_ends_the_second(connect: Connect) -> None:
    def join(rank: int) -> tuple[list[str], list[PeerRecord]]:
        if rank:
            return meet(connect(), rank, 2, timeout=0)
        rendezvous = Rendezvous(connect(), "worker0", 0, 2, 0)
        hosts = rendezvous.hosts("host0")
        rendezvous.refuse(InvalidOptionError("cannot listen there"))
        return hosts, []

    refused, met = at_once(2, join)
    assert refused.result() == (["host0", "host1"], [])
    assert "cannot listen there" in str(met.exception())


def test_the_first_refusal_is_what_everyone_learns(connect: Connect) -> None:
    for rank in (2, 1):
        Rendezvous(connect(), f"worker{rank}", rank, 3, 0).refuse(ValueError(f"reason {rank}"))
    with pytest.raises(RendezvousError, match=r"'worker2' .* reason 2"):
        meet(connect(), 0, 3, timeout=0)


class Broken(Exception):
    """Nothing that this package raises."""


@pytest.mark.parametrize("kind", [Broken, KeyboardInterrupt])
def test_whatever_keeps_one_from_joining_is_told_to_those_who_wait(kind: type[BaseException], connect: Connect) -> None:
    def fail() -> None:
        rendezvous = Rendezvous(connect(), "worker1", 1, 2, DEADLINE_S)
        with rendezvous.refusing_on_failure():
            rendezvous.hosts("host1")
            raise kind("out of luck")

    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(meet, connect(), 0, 2)
        with pytest.raises(kind, match="out of luck"):
            fail()
        with pytest.raises(
            RendezvousError, match=rf"'worker1' \(rank 1\) could not join the group: {kind.__name__}: out of luck"
        ):
            waits.result()


def test_a_store_that_fails_does_not_hide_what_failed_before_it() -> None:
    class Gone(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("the store is gone")

    with pytest.raises(Broken), Rendezvous(Gone(), "worker0", 0, 1, DEADLINE_S).refusing_on_failure():
        raise Broken


def test_two_that_claim_one_rank_are_told_so_and_so_are_those_who_wait(connect: Connect) -> None:
    """Three workers, of which two say that they are rank 0, so that nobody is rank 1."""

    def join(number: int) -> object:
        return meet(connect(), (0, 0, 2)[number], 3, timeout=0)

    errors = [str(future.exception()) for future in at_once(3, join)]
    own = "worker 'worker0' claims rank 0, which another worker of the group has claimed before it: give each of the 3 workers"
    assert sorted(own in error for error in errors) == [True, True, True]
    assert sorted(error.startswith(own) for error in errors) == [False, False, True]
    assert sorted("(rank 0) could not join the group: RendezvousError: " in error for error in errors) == [False, True, True]


def test_one_worker_does_not_claim_the_rank_of_another(connect: Connect) -> None:
    assert [future.result()[0] for future in at_once(2, lambda rank: meet(connect(), rank, 2))] == [["host0", "host1"]] * 2


class InterruptedStore:
    """A store at which ^C is pressed when the worker has looked in vain twice."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.looks = 0

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def add(self, key: str, amount: int) -> int:
        return self.store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        self.looks += keys == ["zmqagent/host/1"]
        if self.looks == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return self.store.check(keys)


def test_ctrl_c_ends_the_wait() -> None:
    with pytest.raises(KeyboardInterrupt):
        Rendezvous(InterruptedStore(), "worker0", 0, 2, 0).hosts("host0")
