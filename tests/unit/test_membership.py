"""The group's membership and its barriers, driven event by event."""

from __future__ import annotations

from typing import Any

import pytest

from zmqagent.agent.membership import Membership
from zmqagent.agent.membership_events import (
    Acknowledge,
    Announcement,
    AnnouncementAnswered,
    AnnouncementBegun,
    AnnouncementEnded,
    BarrierEntered,
    BarrierUnanswered,
    Connect,
    Disconnect,
    FailBarrier,
    GroupEnding,
    Instruction,
    Joined,
    Leaving,
    Lost,
    MemberState,
    PassBarrier,
    Reached,
    SaidGoodbye,
    SayGoodbye,
    SendAnnouncement,
    SendBarrier,
    Suspected,
    WorkerCame,
    WorkerGone,
)
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId


def record(worker_id: int, *, incarnation: int = 0, name: str | None = None) -> PeerRecord:
    return PeerRecord(name or f"worker{worker_id}", WorkerId(worker_id), incarnation or 100 + worker_id, "host", 1, ("ipc://x",))


def group(me: int, size: int = 3) -> Membership:
    membership = Membership(WorkerId(me))
    for worker_id in range(size):
        membership.handle(Joined(record(worker_id)), 0.0)
    return membership


def lost(worker_id: int, incarnation: int = 0) -> Lost:
    return Lost(WorkerId(worker_id), incarnation or 100 + worker_id, "its process ended")


def goodbye(worker_id: int, incarnation: int = 0) -> SaidGoodbye:
    return SaidGoodbye(WorkerId(worker_id), incarnation or 100 + worker_id, "shutdown")


def enter(membership: Membership, worker_id: int, value: int = 1, *, tag: str = "t", token: object = None) -> list[Instruction]:
    return membership.handle(BarrierEntered(WorkerId(worker_id), tag, value, token or f"token{worker_id}"), 1.0)


def state(membership: Membership, worker_id: int) -> MemberState:
    return membership.find(WorkerId(worker_id)).state


def only(instructions: list[Instruction], kind: type) -> list[Any]:
    return [i for i in instructions if isinstance(i, kind)]


class TestJoining:
    def test_members_that_join_are_connected_to_but_not_this_worker_itself(self) -> None:
        membership = Membership(WorkerId(0))
        assert membership.handle(Joined(record(0)), 0.0) == []
        assert membership.handle(Joined(record(1)), 0.0) == [Connect(record(1))]
        assert [m.record.worker_id for m in membership.members] == [0, 1]

    def test_joining_twice_changes_nothing(self) -> None:
        membership = group(0)
        before = membership.members
        assert membership.handle(Joined(record(1)), 9.0) == []
        assert membership.members == before

    def test_a_new_incarnation_takes_the_place_of_the_living_old_one(self) -> None:
        membership = group(0)
        gone, connect = membership.handle(Joined(record(1, incarnation=7, name="again")), 5.0)
        assert isinstance(gone, WorkerGone)
        assert (gone.record, gone.expected) == (record(1), False)
        assert connect == Connect(record(1, incarnation=7, name="again"))
        assert membership.find("again").state is MemberState.UP
        with pytest.raises(UnknownWorkerError):
            membership.find("worker1")

    def test_a_new_incarnation_of_a_lost_worker_joins_without_a_second_verdict(self) -> None:
        membership = group(0)
        membership.handle(lost(1), 1.0)
        assert membership.handle(Joined(record(1, incarnation=7)), 2.0) == [Connect(record(1, incarnation=7))]
        assert state(membership, 1) is MemberState.UP

    def test_a_name_in_use_is_refused_and_nothing_changes(self) -> None:
        membership = group(0)
        before = membership.members
        text = "RPC worker name worker1 is not unique. Workers 1 and 9 share the same name."
        with pytest.raises(InvalidOptionError, match=text):
            membership.handle(Joined(record(9, name="worker1")), 1.0)
        assert membership.members == before

    def test_the_name_of_a_worker_that_is_gone_can_be_taken_by_another(self) -> None:
        membership = group(0)
        membership.handle(lost(1), 1.0)
        membership.handle(Joined(record(9, name="worker1")), 2.0)
        membership.handle(Joined(record(1, incarnation=7, name="back")), 3.0)
        assert membership.find("worker1").record.worker_id == 9
        assert membership.find("back").record.worker_id == 1


class TestLookup:
    def test_members_are_found_by_id_and_by_name(self) -> None:
        membership = group(0)
        assert membership.find(WorkerId(1)) is membership.find("worker1")
        assert membership.destination("worker1") == record(1)
        assert membership.name_of(WorkerId(1)) == "worker1"

    @pytest.mark.parametrize("whom", ["nobody", WorkerId(7)])
    def test_an_unknown_destination_is_refused_with_the_names_there_are(self, whom: Any) -> None:
        with pytest.raises(UnknownWorkerError, match=r"could not find destination .*'worker0' \(0\), 'worker1' \(1\)"):
            group(0).find(whom)

    def test_an_empty_group_says_so(self) -> None:
        with pytest.raises(UnknownWorkerError, match="nobody yet"):
            Membership(WorkerId(0)).find("worker0")

    def test_something_that_is_no_name_and_no_id_is_refused(self) -> None:
        with pytest.raises(InvalidTypeError, match="not by a float"):
            group(0).find(1.5)  # type: ignore[arg-type]

    def test_an_unknown_id_has_a_readable_stand_in(self) -> None:
        assert group(0).name_of(WorkerId(9)) == "<unknown worker 9>"

    def test_a_lost_worker_is_found_but_is_no_destination(self) -> None:
        membership = group(0)
        membership.handle(lost(1), 1.0)
        assert membership.find("worker1").reason == "its process ended"
        with pytest.raises(WorkerLostError, match=r"worker 'worker1' \(1\) is lost: its process ended"):
            membership.destination("worker1")


class TestVerdicts:
    def test_a_loss_is_told_once(self) -> None:
        membership = group(0)
        (gone,) = membership.handle(lost(1), 4.0)
        assert isinstance(gone, WorkerGone)
        assert (gone.record, gone.expected) == (record(1), False)
        assert "is lost: its process ended" in str(gone.error)
        assert membership.find(WorkerId(1)).since == 4.0
        assert membership.handle(lost(1), 5.0) == []

    def test_a_stale_loss_does_not_touch_the_present_incarnation(self) -> None:
        membership = group(0)
        assert membership.handle(lost(1, incarnation=6), 1.0) == []
        assert membership.handle(lost(9), 1.0) == []
        assert state(membership, 1) is MemberState.UP

    def test_a_suspected_worker_stays_a_destination_and_comes_back(self) -> None:
        membership = group(0)
        assert membership.handle(Suspected(WorkerId(1), 101, "silent"), 1.0) == []
        assert state(membership, 1) is MemberState.SUSPECTED
        assert membership.destination("worker1") == record(1)
        assert membership.handle(Reached(WorkerId(1), 101), 2.0) == []
        assert state(membership, 1) is MemberState.UP
        assert membership.find("worker1").reason == ""

    def test_a_lost_worker_does_not_come_back_under_the_same_incarnation(self) -> None:
        membership = group(0)
        membership.handle(lost(1), 1.0)
        membership.handle(Reached(WorkerId(1), 101), 2.0)
        assert state(membership, 1) is MemberState.LOST

    def test_a_goodbye_ends_what_waits_and_is_no_loss(self) -> None:
        membership = group(0)
        disconnect, gone = membership.handle(goodbye(1), 1.0)
        assert isinstance(gone, WorkerGone)
        assert gone.expected
        assert "has left the group: shutdown" in str(gone.error)
        assert disconnect == Disconnect(WorkerId(1), 101)
        assert state(membership, 1) is MemberState.LEFT
        assert membership.handle(goodbye(1), 2.0) == []

    def test_a_death_after_the_goodbye_is_not_told(self) -> None:
        membership = group(0)
        membership.handle(goodbye(1), 1.0)
        assert membership.handle(lost(1), 2.0) == []

    def test_a_death_after_the_last_barrier_counts_as_leaving(self) -> None:
        membership = group(0)
        assert membership.handle(GroupEnding(), 1.0) == []
        (gone,) = only(membership.handle(lost(1), 2.0), WorkerGone)
        assert gone.expected
        assert state(membership, 1) is MemberState.LEFT

    def test_messages_are_taken_from_the_present_incarnation_until_it_is_lost(self) -> None:
        membership = group(0)
        assert membership.accepts(WorkerId(1), 101)
        assert not membership.accepts(WorkerId(1), 6)
        assert not membership.accepts(WorkerId(9), 109)
        membership.handle(goodbye(1), 1.0)
        assert membership.accepts(WorkerId(1), 101)
        membership.handle(lost(2), 1.0)
        assert not membership.accepts(WorkerId(2), 102)


class TestBarrier:
    def test_all_pass_with_the_sum_once_all_have_come(self) -> None:
        leader = group(0)
        assert enter(leader, 1, 10) == []
        assert enter(leader, 0, 1) == []
        assert enter(leader, 2, 100) == [PassBarrier("token1", 111), PassBarrier("token0", 111), PassBarrier("token2", 111)]

    def test_a_follower_sends_to_the_leader(self) -> None:
        assert enter(group(1), 1, 5) == [SendBarrier(WorkerId(0), "t", 5, "token1")]

    def test_tags_are_barriers_of_their_own(self) -> None:
        leader = group(0, size=2)
        assert enter(leader, 0, tag="a") == []
        assert enter(leader, 1, tag="b") == []
        assert only(enter(leader, 1, tag="a"), PassBarrier) == [PassBarrier("token0", 2), PassBarrier("token1", 2)]

    def test_a_request_that_comes_again_counts_once_and_is_answered_each_time(self) -> None:
        leader = group(0, size=2)
        enter(leader, 1, 5, token="first")
        enter(leader, 1, 5, token="again")
        assert enter(leader, 0, 1) == [PassBarrier("first", 6), PassBarrier("again", 6), PassBarrier("token0", 6)]
        assert enter(leader, 1, 5, token="late") == [PassBarrier("late", 6)]

    def test_only_the_latest_totals_are_kept(self) -> None:
        leader = group(0, size=1)
        for number in range(65):
            enter(leader, 0, tag=str(number))
        assert enter(leader, 0, 7, tag="1") == [PassBarrier("token0", 1)]
        assert enter(leader, 0, 7, tag="0") == [PassBarrier("token0", 7)]

    def test_a_loss_fails_the_barrier_for_all_who_have_come_and_who_come_later(self) -> None:
        leader = group(0)
        enter(leader, 0)
        enter(leader, 2)
        gone, *failures = leader.handle(lost(1), 1.0)
        assert isinstance(gone, WorkerGone)
        assert [f.token for f in failures if isinstance(f, FailBarrier)] == ["token0", "token2"]
        (late,) = enter(leader, 2, tag="next")
        assert isinstance(late, FailBarrier)
        assert isinstance(late.error, WorkerLostError)
        assert "'worker1' (1) is lost" in str(late.error)

    def test_a_follower_does_not_wait_when_someone_is_lost(self) -> None:
        follower = group(1)
        follower.handle(lost(0), 1.0)
        (failure,) = enter(follower, 1)
        assert isinstance(failure, FailBarrier)
        assert "'worker0' (0) is lost" in str(failure.error)

    def test_who_has_left_is_not_waited_for(self) -> None:
        leader = group(0)
        enter(leader, 0, 1)
        enter(leader, 1, 10)
        passed = only(leader.handle(goodbye(2), 1.0), PassBarrier)
        assert passed == [PassBarrier("token0", 11), PassBarrier("token1", 11)]

    def test_who_came_and_then_left_is_counted_and_not_answered(self) -> None:
        leader = group(0)
        enter(leader, 2, 100)
        leader.handle(goodbye(2), 1.0)
        enter(leader, 1, 10)
        assert enter(leader, 0, 1) == [PassBarrier("token1", 111), PassBarrier("token0", 111)]

    def test_a_barrier_of_a_stranger_is_refused(self) -> None:
        (failure,) = enter(group(0), 9)
        assert isinstance(failure, FailBarrier)
        assert isinstance(failure.error, UnknownWorkerError)

    def test_a_worker_that_came_back_can_pass_though_its_predecessor_was_lost(self) -> None:
        leader = group(0, size=2)
        leader.handle(lost(1), 1.0)
        leader.handle(Joined(record(1, incarnation=7)), 2.0)
        enter(leader, 0)
        assert len(only(enter(leader, 1), PassBarrier)) == 2

    def test_when_the_leader_leaves_the_next_one_leads(self) -> None:
        second, third = group(1), group(2)
        (asked,) = enter(second, 1, 10)
        (other,) = enter(third, 2, 100)
        assert isinstance(asked, SendBarrier)
        assert isinstance(other, SendBarrier)
        third.handle(goodbye(0), 1.0)
        assert third.handle(BarrierUnanswered(other, WorkerLostError("left")), 1.0) == [
            SendBarrier(WorkerId(1), "t", 100, "token2")
        ]
        # It reaches the second before the leader's goodbye does, and must wait for it.
        assert enter(second, 2, 100) == []
        second.handle(goodbye(0), 1.0)
        assert second.leader == 1
        passed = second.handle(BarrierUnanswered(asked, WorkerLostError("left")), 1.0)
        assert passed == [PassBarrier("token2", 110), PassBarrier("token1", 110)]

    def test_a_request_that_fails_while_the_leader_stays_fails_the_barrier(self) -> None:
        follower = group(1)
        (asked,) = enter(follower, 1)
        assert isinstance(asked, SendBarrier)
        error = WorkerLostError("gone")
        assert follower.handle(BarrierUnanswered(asked, error), 1.0) == [FailBarrier("token1", error)]


class TestLeaving:
    def test_leaving_says_goodbye_to_those_who_are_still_there(self) -> None:
        membership = group(1, size=4)
        membership.handle(lost(2), 1.0)
        assert membership.handle(Leaving("shutdown"), 2.0) == [SayGoodbye((WorkerId(0), WorkerId(3)), "shutdown")]
        assert state(membership, 1) is MemberState.LEFT
        assert membership.find(WorkerId(1)).since == 2.0

    def test_the_last_one_leaves_silently(self) -> None:
        membership = group(0, size=1)
        assert membership.handle(Leaving("shutdown"), 1.0) == []
        assert membership.leader == 0

    def test_a_leader_that_leaves_fails_its_own_barrier_and_leaves_the_others_to_the_next(self) -> None:
        leader = group(0)
        enter(leader, 0)
        enter(leader, 1)
        failure, farewell = leader.handle(Leaving("no more work"), 1.0)
        assert isinstance(failure, FailBarrier)
        assert failure.token == "token0"
        assert isinstance(failure.error, ShutdownError)
        assert "no more work" in str(failure.error)
        assert isinstance(farewell, SayGoodbye)

    def test_a_death_while_leaving_is_expected(self) -> None:
        membership = group(0)
        membership.handle(Leaving("shutdown"), 1.0)
        (gone,) = only(membership.handle(lost(1), 2.0), WorkerGone)
        assert gone.expected


def newcomer(worker_id: int, ordinal: int, *, name: str | None = None) -> PeerRecord:
    """One of a dynamic group; its incarnation tells it from others of its name or id."""
    return PeerRecord(name or f"worker{worker_id}", WorkerId(worker_id), 1000 + ordinal, "host", 1, ("ipc://x",), 0, ordinal)


def dynamic_group(me: int = 0, size: int = 3) -> Membership:
    membership = Membership(WorkerId(me))
    for worker_id in [me, *(other for other in range(size) if other != me)]:
        membership.handle(Joined(newcomer(worker_id, worker_id + 1)), 0.0)
    return membership


class TestDynamicGroups:
    def test_a_newcomer_is_connected_to_before_it_is_told_of(self) -> None:
        record = newcomer(3, 4)
        assert dynamic_group().handle(Joined(record), 1.0) == [Connect(record), WorkerCame(record)]

    @pytest.mark.parametrize("record", [newcomer(1, 9, name="other"), newcomer(9, 9, name="worker1")])
    def test_a_newcomer_takes_the_place_of_who_had_its_name_or_id(self, record: PeerRecord) -> None:
        membership = dynamic_group()
        gone, connect, came = membership.handle(Joined(record), 1.0)
        assert isinstance(gone, WorkerGone)
        assert gone.record == newcomer(1, 2)
        assert [connect, came] == [Connect(record), WorkerCame(record)]
        assert membership.find(record.name).record == membership.find(record.worker_id).record == record

    @pytest.mark.parametrize("record", [newcomer(1, 1, name="other"), newcomer(9, 1, name="worker1")])
    @pytest.mark.parametrize("is_gone", [False, True])
    def test_one_that_comes_late_does_not_take_the_place_of_its_successor(self, record: PeerRecord, is_gone: bool) -> None:
        membership = dynamic_group()
        if is_gone:
            membership.handle(lost(1, incarnation=1002), 1.0)
        before = membership.members
        assert membership.handle(Joined(record), 2.0) == []
        assert membership.members == before

    @pytest.mark.parametrize("record", [newcomer(0, 9), newcomer(9, 9, name="worker0")])
    def test_nobody_takes_the_place_of_this_worker_itself(self, record: PeerRecord) -> None:
        membership = dynamic_group()
        assert membership.handle(Joined(record), 1.0) == []
        assert membership.find("worker0").record == membership.find(WorkerId(0)).record == newcomer(0, 1)

    def test_an_announcement_goes_to_all_who_are_there_and_ends_with_the_last_answer(self) -> None:
        membership = dynamic_group()
        assert membership.handle(AnnouncementBegun(Announcement.JOIN, "token"), 1.0) == [
            SendAnnouncement(Announcement.JOIN, newcomer(1, 2)),
            SendAnnouncement(Announcement.JOIN, newcomer(2, 3)),
        ]
        assert [str(member) for member in membership.untold(Announcement.JOIN)] == ["'worker1' (1)", "'worker2' (2)"]
        assert answered(membership, 2) == []
        assert answered(membership, 2) == []
        assert answered(membership, 1, incarnation=7) == []
        assert answered(membership, 1) == [AnnouncementEnded("token")]
        assert membership.untold(Announcement.JOIN) == ()
        assert answered(membership, 1) == []

    def test_an_announcement_to_nobody_is_over_at_once(self) -> None:
        membership = dynamic_group(size=1)
        assert membership.handle(AnnouncementBegun(Announcement.JOIN, "token"), 1.0) == [AnnouncementEnded("token")]

    @pytest.mark.parametrize("end", [lost(1, incarnation=1002), goodbye(1, incarnation=1002), Joined(newcomer(1, 9))])
    def test_who_goes_need_not_answer(self, end: Any) -> None:
        membership = dynamic_group(size=2)
        membership.handle(AnnouncementBegun(Announcement.JOIN, "token"), 1.0)
        assert only(membership.handle(end, 2.0), AnnouncementEnded) == [AnnouncementEnded("token")]

    def test_one_that_joins_meanwhile_need_not_be_told(self) -> None:
        membership = dynamic_group(size=2)
        membership.handle(AnnouncementBegun(Announcement.JOIN, "token"), 1.0)
        membership.handle(Joined(newcomer(2, 3)), 1.0)
        assert answered(membership, 1) == [AnnouncementEnded("token")]

    def test_a_departure_is_acknowledged_before_the_way_back_is_gone(self) -> None:
        membership = dynamic_group()
        leaving = SaidGoodbye(WorkerId(1), 1002, "shutdown", "token")
        acknowledge, disconnect, gone = membership.handle(leaving, 1.0)
        assert acknowledge == Acknowledge("token")
        assert disconnect == Disconnect(WorkerId(1), 1002)
        assert isinstance(gone, WorkerGone)
        assert gone.expected
        assert membership.handle(leaving, 2.0) == [Acknowledge("token")]

    def test_one_whose_goodbye_came_first_does_not_join_any_more(self) -> None:
        membership = dynamic_group()
        membership.handle(SaidGoodbye(WorkerId(3), 1004, "could not join", "token"), 1.0)
        assert membership.handle(Joined(newcomer(3, 4)), 2.0) == []
        assert membership.handle(Joined(newcomer(3, 5)), 2.0) != []

    def test_who_knows_that_this_worker_leaves_hears_no_goodbye(self) -> None:
        membership = dynamic_group()
        membership.handle(AnnouncementBegun(Announcement.LEAVE, "token"), 1.0)
        answered(membership, 1, Announcement.LEAVE)
        assert membership.handle(Leaving("shutdown"), 2.0) == [SayGoodbye((WorkerId(2),), "shutdown")]


def answered(
    membership: Membership, worker_id: int, what: Announcement = Announcement.JOIN, *, incarnation: int = 0
) -> list[Instruction]:
    return membership.handle(AnnouncementAnswered(what, WorkerId(worker_id), incarnation or 1001 + worker_id), 1.0)
