"""`zmqagent.rpc.gathering`: what the leader decides as members come, join, leave and die; the rest is tested with processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed.rpc import WorkerInfo

from zmqagent.agent.membership_events import Member, MemberState
from zmqagent.exceptions import (
    InvalidOptionError,
    NotInitializedError,
    RpcTimeoutError,
    ShutdownError,
    UnknownWorkerError,
    WorkerLostError,
)
from zmqagent.rpc.gathering import Gatherings, contribute
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId


class Agent:
    """The group as worker ``a`` sees it; ``a`` joined first."""

    def __init__(self, *names: str) -> None:
        self.members: dict[str, Member] = {}
        self.former: list[Member] = []
        for name in names:
            self.put(name)

    def put(self, name: str, state: MemberState = MemberState.UP) -> None:
        number = ord(name) - ord("a")
        record = PeerRecord(name, WorkerId(number), 100 + number, "host", 1, (), ordinal=number + 1)
        self.members[name] = Member(record, state, 0.0, "it shut down")

    def get_members(self) -> tuple[Member, ...]:
        return (*self.former, *self.members.values())

    def find_member(self, name: str) -> Member:
        if name not in self.members:
            raise UnknownWorkerError(f"could not find destination {name}")
        return self.members[name]

    def replace(self, name: str) -> None:
        """Worker ``name`` has left and come back under another id."""
        record = self.members[name].record
        self.former.append(Member(record, MemberState.LEFT, 0.0, "it shut down"))
        again = replace(record, worker_id=WorkerId(50), incarnation=150, ordinal=50)
        self.members[name] = Member(again, MemberState.UP, 0.0)

    def get_worker_infos(self) -> list[WorkerInfo]:
        return [WorkerInfo(m.record.name, m.record.worker_id) for m in self.members.values() if not m.state.is_gone]

    def get_worker_info(self) -> WorkerInfo:
        return WorkerInfo("a", 0)


class Group:
    """Gatherings that worker ``a`` leads, and what the others were told."""

    def __init__(self, *names: str) -> None:
        self.agent = Agent(*names)
        self.gatherings = Gatherings(self.agent)  # type: ignore[arg-type]
        self.told: dict[str, Any] = {}

    def give(self, name: str, *names: str) -> None:
        self.gatherings.take(names, name, name.upper(), lambda outcome: self.told.update({name: outcome}))

    def change(self, name: str, state: MemberState = MemberState.UP) -> None:
        self.agent.put(name, state)
        self.gatherings.on_change()


@pytest.fixture
def group() -> Iterator[Group]:
    yield Group("a", "b", "c")
    Gatherings.current = None


def test_everyone_gets_everything_when_all_have_come(group: Group) -> None:
    group.give("b")
    group.give("c")
    assert group.told == {}
    assert group.gatherings.gather("A") == {"a": "A", "b": "B", "c": "C"}
    assert [outcome.objects for outcome in group.told.values()] == [{"a": "A", "b": "B", "c": "C"}] * 2


def test_one_gathering_follows_another(group: Group) -> None:
    for _ in range(2):
        group.give("b")
        group.give("c")
        assert group.gatherings.gather("A") == {"a": "A", "b": "B", "c": "C"}


def test_who_leaves_is_not_waited_for_and_who_joins_is(group: Group) -> None:
    group.give("a")
    group.give("b")
    group.change("d")
    group.change("c", MemberState.LEFT)
    assert group.told == {}
    group.give("d")
    assert group.told["a"].objects == {"a": "A", "b": "B", "d": "D"}


def test_who_gave_and_died_is_not_among_the_objects(group: Group) -> None:
    group.give("c")
    group.give("a")
    group.change("c", MemberState.LOST)
    group.give("b")
    assert group.told["a"].objects == {"a": "A", "b": "B"}


def test_gatherings_of_different_workers_do_not_mix(group: Group) -> None:
    group.give("b")
    group.give("b", "a", "b")
    assert group.gatherings.gather("A", {"b", "a"}) == {"a": "A", "b": "B"}
    group.give("c")
    assert group.gatherings.gather("A") == {"a": "A", "b": "B", "c": "C"}


@pytest.mark.parametrize("state", [MemberState.LEFT, MemberState.LOST])
def test_the_end_of_one_that_was_named_ends_the_gathering(group: Group, state: MemberState) -> None:
    group.give("b", "a", "b", "c")
    group.change("c", state)
    assert isinstance(group.told["b"].error, WorkerLostError)
    with pytest.raises(WorkerLostError, match=r"worker 'c' \(2\) is not in the group any more: it shut down"):
        group.gatherings.gather("A", ["a", "b", "c"])


def test_one_that_came_back_under_another_id_is_who_its_name_means(group: Group) -> None:
    group.agent.replace("b")
    group.give("b", "a", "b")
    assert group.gatherings.gather("A", ["a", "b"]) == {"a": "A", "b": "B"}


def test_a_former_member_leads_no_gathering_of_its_name(group: Group) -> None:
    group.agent.replace("a")
    # Worker b joined before a came back, and leads.
    leader = group.gatherings._leader(("a", "b"))
    assert leader.record.name == "b"


def test_one_whose_name_nobody_bears_any_more_ends_the_gathering(group: Group) -> None:
    group.give("b", "a", "b", "c")
    del group.agent.members["c"]
    group.gatherings.on_change()
    assert isinstance(group.told["b"].error, WorkerLostError)


def test_one_that_the_leader_has_not_heard_of_yet_is_waited_for(group: Group) -> None:
    group.give("b", "a", "b", "d")
    group.give("a", "a", "b", "d")
    assert group.told == {}
    group.change("d")
    group.give("d", "a", "b", "d")
    assert group.told["a"].objects == {"a": "A", "b": "B", "d": "D"}


def test_names_have_to_be_members_and_hold_this_worker(group: Group) -> None:
    with pytest.raises(InvalidOptionError, match="worker 'a' takes no part in a gathering of b, c"):
        group.gatherings.gather("A", ["b", "c"])
    with pytest.raises(UnknownWorkerError, match="could not find destination z"):
        group.gatherings.gather("A", ["a", "z"])


def test_a_gathering_that_takes_too_long_ends_for_all_in_torchs_words(group: Group) -> None:
    group.give("b")
    with pytest.raises(RpcTimeoutError, match=r"Followers \['c'\] timed out in _all_gather after 0\.01 seconds"):
        group.gatherings.gather("A", timeout=0.01)
    assert isinstance(group.told["b"].error, RpcTimeoutError)
    # The next one begins anew.
    group.give("b")
    group.give("c")
    assert group.gatherings.gather("A", timeout=20) == {"a": "A", "b": "B", "c": "C"}


def test_a_gathering_that_ends_as_its_time_is_up_is_not_given_up(group: Group) -> None:
    """It is decided, and its leader about to be told, when the leader's own wait ends; the next one has begun."""
    told: list[Any] = []
    group.gatherings.take((), "a", "A", told.append)
    group.give("b")
    group.give("c")
    group.give("b")
    group.gatherings._give_up((), told.append, 1.0)
    assert [outcome.objects for outcome in told] == [{"a": "A", "b": "B", "c": "C"}]
    group.give("c")
    assert group.gatherings.gather("A") == {"a": "A", "b": "B", "c": "C"}


def test_a_leader_that_leaves_sends_the_others_on_and_lets_itself_go(group: Group) -> None:
    raised: list[BaseException] = []

    def gather() -> None:
        try:
            group.gatherings.gather("A")
        except ShutdownError as error:
            raised.append(error)

    group.give("b")
    thread = threading.Thread(target=gather)
    thread.start()
    with group.gatherings._changed:
        assert group.gatherings._changed.wait_for(lambda: len(group.gatherings._pending[()].objects) == 2, 20)
    group.gatherings.close()
    thread.join(20)
    assert [str(error) for error in raised] == ["worker 'a' leaves the group, and takes part in no gathering any more"]
    assert (group.told["b"].objects, group.told["b"].error) == (None, None)
    group.give("c")
    assert (group.told["c"].objects, group.told["c"].error) == (None, None)


def test_where_no_worker_of_a_dynamic_group_runs_nobody_takes_part() -> None:
    assert Gatherings.current is None
    with pytest.raises(NotInitializedError):
        contribute((), "b", "B")
