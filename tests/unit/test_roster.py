"""`zmqagent.agent.roster`: joining and leaving by compare-and-set, whatever comes in between, on every kind of store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from zmqagent.agent.directory import UNDRAWN
from zmqagent.agent.roster import Roster, Store, check_dynamic, check_static, directory_store
from zmqagent.exceptions import InvalidOptionError, RendezvousError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

Connect = Callable[[], dist.Store]


@pytest.fixture(params=["hash", "file", "tcp"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Connect:
    """Connects one worker to the group's store."""
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), -1)
    if request.param == "hash":
        store: dist.Store = dist.HashStore()
        return lambda: store
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def record(number: int, *, worker_id: int | None = None, name: str = "") -> PeerRecord:
    return PeerRecord(
        name or f"worker-{number}", WorkerId(number if worker_id is None else worker_id), 100 + number, "host", 1, ("ipc://a",)
    )


def roster(store: Store, gone: tuple[int, ...] = (), timeout: float = 0.0) -> Roster:
    return Roster(store, timeout, lambda peer: peer.incarnation in gone)


def test_each_newcomer_gets_those_who_came_before(connect: Connect) -> None:
    first, others = roster(connect()).enter(record(5))
    assert (first.worker_id, first.ordinal, others) == (5, 1, ())
    second, others = roster(connect()).enter(record(3))
    assert (second.ordinal, others) == (2, (first,))


def test_of_many_at_once_each_sees_exactly_those_before_it(connect: Connect) -> None:
    with ThreadPoolExecutor(8) as threads:
        entered = list(threads.map(lambda number: roster(connect()).enter(record(number, worker_id=UNDRAWN)), range(8)))
    everyone = sorted((me for me, _ in entered), key=lambda me: me.ordinal)
    assert [me.ordinal for me in everyone] == list(range(1, 9))
    assert sorted(me.worker_id for me in everyone) == list(range(8))
    for me, others in entered:
        assert list(others) == everyone[: me.ordinal - 1]


def test_who_leaves_gets_those_who_stay_and_is_not_seen_again(connect: Connect) -> None:
    first, second = (roster(connect()).enter(record(number))[0] for number in (0, 1))
    assert roster(connect()).remove(first.incarnation) == (second,)
    assert roster(connect()).remove(first.incarnation) == (second,)
    assert roster(connect()).enter(record(2))[1] == (second,)


def test_a_living_rival_is_respected_and_a_dead_one_replaced(connect: Connect) -> None:
    roster(connect()).enter(record(0, name="a"))
    with pytest.raises(InvalidOptionError, match="name a is not unique"):
        roster(connect()).enter(record(1, name="a"))
    me, others = roster(connect(), gone=(100,)).enter(record(1, name="a"))
    assert (me.worker_id, others) == (1, ())


class BusyStore:
    """A store in which another worker joins just before each of this one's first attempts to join."""

    def __init__(self, times: int) -> None:
        self.store = dist.HashStore()
        self._left = times

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._left and expected != desired:
            self._left -= 1
            roster(self.store).enter(record(50 + self._left))
        return self.store.compare_set(key, expected, desired)


def test_a_join_is_tried_again_when_another_came_first() -> None:
    _, others = roster(BusyStore(3)).enter(record(0))
    assert [other.worker_id for other in others] == [52, 51, 50]


def test_a_join_that_is_always_outrun_ends_by_its_timeout() -> None:
    with pytest.raises(RendezvousError, match="'worker-0' could not join within 1e-09 s: others kept joining and leaving"):
        roster(BusyStore(30_000), timeout=1e-9).enter(record(0))


class LostStore:
    """A store whose server is gone."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise dist.DistNetworkError("Connection was likely closed.\nframe #0: stack")


def test_a_store_that_is_gone_fails_joins_and_lets_others_leave(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RendezvousError, match=r"any more: Connection was likely closed\. The process") as caught:
        roster(LostStore()).enter(record(0))
    assert "stack" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert roster(LostStore()).remove(100) == ()
    assert "could not be taken out of the list" in caplog.text


def test_the_prefix_of_init_rpc_is_no_part_of_the_directorys_place() -> None:
    store = dist.HashStore()
    first, second = dist.PrefixStore("rpc_prefix_0", store), dist.PrefixStore("rpc_prefix_1", store)
    roster(directory_store(first)).enter(record(0))
    assert [other.name for other in roster(directory_store(second)).enter(record(1))[1]] == ["worker-0"]
    assert directory_store(store) is store


def test_dynamic_workers_are_refused_where_static_ones_met() -> None:
    store = dist.PrefixStore("rpc_prefix_0", dist.HashStore())
    check_dynamic(store)
    check_static(store, lambda peer: False)
    with pytest.raises(RendezvousError, match="RPC group mixes statically and dynamically initialized members"):
        check_dynamic(store)


def test_static_workers_are_refused_where_dynamic_ones_live() -> None:
    store = dist.PrefixStore("rpc_prefix_0", dist.HashStore())
    roster(directory_store(store)).enter(record(0))
    with pytest.raises(RendezvousError, match="which is not supported"):
        check_static(store, lambda peer: False)
    check_static(store, lambda peer: True)
