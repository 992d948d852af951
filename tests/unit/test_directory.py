"""`zmqagent.agent.directory`: who is let in, under which id, and that no value comes twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqagent.agent.checks import MAX_WORKER_ID
from zmqagent.agent.directory import UNDRAWN, Directory
from zmqagent.exceptions import InvalidOptionError, RendezvousError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId


def record(name: str, worker_id: int = UNDRAWN, incarnation: int = 0) -> PeerRecord:
    return PeerRecord(name, WorkerId(worker_id), incarnation or sum(name.encode()), "host", 4711, ("ipc://a", "tcp://b:1"), 99)


def directory(*records: PeerRecord) -> Directory:
    present = Directory()
    for newcomer in records:
        present, _ = present.admit(newcomer)
    return present


def test_members_stand_in_the_order_in_which_they_joined() -> None:
    present, admitted = directory(record("b", 5), record("a", 2)).admit(record("c", 3))
    assert [(r.name, r.worker_id, r.ordinal) for r in present.records] == [("b", 5, 1), ("a", 2, 2), ("c", 3, 3)]
    assert admitted == present.records[-1]


@pytest.mark.parametrize(
    ("newcomer", "text"),
    [
        (record("a", 7), "RPC worker name a is not unique. Workers 0 and 7 share the same name."),
        (record("z", 0), "Worker id 0 is not unique. Workers a and z share it"),
        (record("no name", 7), "Worker name must match"),
        (record("z", MAX_WORKER_ID + 1), "must be at least 0 and less than"),
    ],
)
def test_a_name_or_id_that_is_illegal_or_taken_is_refused(newcomer: PeerRecord, text: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        directory(record("a", 0), record("b", 1)).admit(newcomer)
    assert text in str(caught.value)


def test_the_place_of_one_that_died_is_free_and_it_is_left_out() -> None:
    present = directory(record("a", 0, 10), record("b", 1, 11))
    newcomer = record("a", 1, 12)
    assert [rival.incarnation for rival in present.rivals(newcomer)] == [10, 11]
    after, _ = present.admit(newcomer, gone={10, 11})
    assert [r.incarnation for r in after.records] == [12]


def test_a_drawn_id_is_one_that_nobody_has_had() -> None:
    present = directory(record("a", 4), record("b"))
    assert [r.worker_id for r in present.records] == [4, 5]
    _, admitted = present.remove(present.records[-1].incarnation).admit(record("c"))
    assert admitted.worker_id == 6


def test_when_all_ids_have_been_used_a_free_one_is_drawn() -> None:
    _, admitted = directory(record("a", MAX_WORKER_ID), record("b", 0)).admit(record("c"))
    assert admitted.worker_id == 1


def test_a_full_group_says_so() -> None:
    everyone = tuple(record(f"w{number}", number, number + 1) for number in range(MAX_WORKER_ID + 1))
    with pytest.raises(InvalidOptionError, match="the group is full: it has 32768 workers"):
        Directory(9, MAX_WORKER_ID + 1, everyone).admit(record("c"))


def test_removing_one_that_is_not_there_changes_nothing() -> None:
    present = directory(record("a", 0, 10))
    assert present.remove(11) is present
    assert present.remove(10).records == ()


@given(st.lists(st.sampled_from("abcd"), max_size=20))
def test_no_value_comes_twice_and_each_survives_the_store(names: list[str]) -> None:
    """Joins and departures in any order: each name that comes up joins, or leaves if it is there."""
    present, seen = Directory(), {Directory().to_text()}
    for number, name in enumerate(names, start=1):
        member = next((r for r in present.records if r.name == name), None)
        present = present.remove(member.incarnation) if member else present.admit(record(name, UNDRAWN, number))[0]
        text = present.to_text()
        assert text not in seen
        seen.add(text)
        assert Directory.from_text(text) == present


@pytest.mark.parametrize("text", ["zz", "00", "93010203", "c1"])
def test_what_others_have_written_is_refused(text: str) -> None:
    with pytest.raises(RendezvousError, match="cannot read"):
        Directory.from_text(text)
