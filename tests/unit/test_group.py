"""`zmqagent.agent.group`: each event reaches the machine, and what the machine says is done, with no lock held."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from zmqagent.agent.group import Group
from zmqagent.agent.membership_events import (
    Announcement,
    MemberState,
    SayGoodbye,
    SendAnnouncement,
    SendBarrier,
    WorkerCame,
    WorkerGone,
)
from zmqagent.exceptions import RpcError, RpcTimeoutError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import Event, Frames, PeerDown, PeerRecord, PeerSuspected, PeerUp, Transport
from zmqagent.wire.types import WorkerId

ALICE, BOB, CAROL = (
    PeerRecord(name, WorkerId(number), 10 + number, "host", 1, ()) for number, name in enumerate(("alice", "bob", "carol"))
)


class Switchboard(Transport):
    """Notes who is connected."""

    addresses = ()

    def __init__(self) -> None:
        self.connected: list[WorkerId] = []
        self.on_connect: Callable[[], object] = lambda: None

    def connect(self, peer: PeerRecord) -> None:
        self.on_connect()
        self.connected.append(peer.worker_id)

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        self.connected.remove(worker_id)

    def send(self, to: WorkerId, frames: Frames) -> None:
        raise AssertionError("a group sends nothing by itself")

    def receive(self, timeout: float | None) -> Sequence[Event]:
        return ()

    def wake(self) -> None:
        """Nobody receives."""

    def close(self, linger: float = 1.0) -> None:
        """There is nothing to close."""


class View:
    """The group as one worker sees it, and what it asked for."""

    def __init__(self, me: PeerRecord) -> None:
        self.transport = Switchboard()
        self.came: list[WorkerCame] = []
        self.gone: list[WorkerGone] = []
        self.announcements: list[SendAnnouncement] = []
        self.sent: list[SendBarrier] = []
        self.goodbyes: list[SayGoodbye] = []
        self.outcomes: list[int | RpcError] = []
        self.group = Group(
            me,
            self.transport,
            on_came=self.came.append,
            on_gone=self.gone.append,
            send_announcement=self.announcements.append,
            send_barrier=self.sent.append,
            say_goodbye=self.goodbyes.append,
        )
        for record in (me, ALICE, BOB, CAROL):
            self.group.join(record)

    def enter(self, worker_id: WorkerId, value: int = 0) -> None:
        self.group.enter_barrier(worker_id, "tag", value, self.outcomes.append)

    def state(self, record: PeerRecord) -> MemberState:
        return self.group.find(record.worker_id).state


def test_all_but_this_worker_are_connected_and_found() -> None:
    view = View(BOB)
    assert view.transport.connected == [ALICE.worker_id, CAROL.worker_id]
    assert [member.record for member in view.group.members()] == [ALICE, BOB, CAROL]
    assert view.group.destination("carol") is CAROL
    assert view.group.name_of(WorkerId(9)) == "<unknown worker 9>"
    with pytest.raises(UnknownWorkerError):
        view.group.find("dave")


def test_what_the_transport_reports_changes_the_member(caplog: pytest.LogCaptureFixture) -> None:
    view = View(ALICE)
    view.group.on_peer_event(PeerSuspected(BOB.worker_id, BOB.incarnation, "no heartbeat"))
    assert view.state(BOB) is MemberState.SUSPECTED
    assert "worker bob cannot be reached just now: no heartbeat" in caplog.text
    view.group.on_peer_event(PeerUp(BOB.worker_id, BOB.incarnation))
    assert view.state(BOB) is MemberState.UP
    view.group.on_peer_event(PeerDown(BOB.worker_id, BOB.incarnation, "killed"))
    assert view.state(BOB) is MemberState.LOST
    assert [(gone.record, gone.expected) for gone in view.gone] == [(BOB, False)]
    assert "killed" in caplog.records[-1].message
    assert not view.group.accepts(BOB.worker_id, BOB.incarnation)
    with pytest.raises(WorkerLostError):
        view.group.destination("bob")


def test_a_goodbye_disconnects_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    view = View(ALICE)
    view.group.on_goodbye(BOB.worker_id, BOB.incarnation, "it shut down")
    assert [(gone.record, gone.expected) for gone in view.gone] == [(BOB, True)]
    assert view.transport.connected == [CAROL.worker_id]
    assert caplog.records == []


def test_the_leader_answers_everyone_when_all_have_come() -> None:
    view = View(ALICE)
    for record in (BOB, ALICE):
        view.enter(record.worker_id, 2)
        assert view.outcomes == []
    view.enter(CAROL.worker_id, 3)
    assert view.outcomes == [7, 7, 7]


def test_the_loss_of_one_fails_the_barrier_for_the_others() -> None:
    view = View(ALICE)
    view.enter(BOB.worker_id)
    view.group.on_peer_event(PeerDown(CAROL.worker_id, CAROL.incarnation, "killed"))
    (outcome,) = view.outcomes
    assert isinstance(outcome, WorkerLostError)


def test_others_ask_the_leader_and_the_next_one_when_it_has_left() -> None:
    view = View(CAROL)
    view.enter(CAROL.worker_id, 5)
    (asked,) = view.sent
    assert (asked.leader, asked.tag, asked.value) == (ALICE.worker_id, "tag", 5)
    view.group.on_goodbye(ALICE.worker_id, ALICE.incarnation, "it shut down")
    view.group.barrier_unanswered(asked, WorkerLostError("alice has left"))
    assert view.sent[1].leader == BOB.worker_id
    view.group.barrier_unanswered(view.sent[1], RpcTimeoutError("no answer"))
    (outcome,) = view.outcomes
    assert isinstance(outcome, RpcTimeoutError)


def test_leaving_says_goodbye_and_ends_this_worker_s_waits() -> None:
    view = View(ALICE)
    view.enter(ALICE.worker_id)
    view.group.leave("it shut down")
    assert view.goodbyes == [SayGoodbye((BOB.worker_id, CAROL.worker_id), "it shut down")]
    (outcome,) = view.outcomes
    assert isinstance(outcome, ShutdownError)


def test_once_the_group_ends_nobody_is_lost() -> None:
    view = View(ALICE)
    view.group.end()
    view.group.on_peer_event(PeerDown(BOB.worker_id, BOB.incarnation, "exited"))
    assert view.state(BOB) is MemberState.LEFT
    assert view.gone[0].expected


def test_what_it_calls_may_call_back() -> None:
    """The lock is let go before anything is carried out; with it held, this would never end."""
    view = View(ALICE)
    view.transport.on_connect = lambda: view.group.on_peer_event(PeerUp(BOB.worker_id, BOB.incarnation))
    dave = PeerRecord("dave", WorkerId(3), 13, "host", 1, ())
    view.group.join(dave)
    assert view.transport.connected[-1] == dave.worker_id


def test_one_that_joins_later_is_told_of_when_it_can_be_sent_to() -> None:
    view = View(ALICE)
    dave = PeerRecord("dave", WorkerId(3), 13, "host", 1, (), ordinal=4)
    view.group.join(dave)
    assert view.came == [WorkerCame(dave)]
    assert view.transport.connected[-1] == dave.worker_id


def test_an_announcement_ends_when_everyone_has_answered() -> None:
    view, ended = View(ALICE), []
    view.group.announce(Announcement.LEAVE, lambda: ended.append(True))
    assert [sent.to for sent in view.announcements] == [BOB, CAROL]
    view.group.on_announcement_answered(Announcement.LEAVE, BOB)
    assert [str(member) for member in view.group.untold(Announcement.LEAVE)] == ["'carol' (2)"]
    assert ended == []
    view.group.on_announcement_answered(Announcement.LEAVE, CAROL)
    assert ended == [True]


def test_a_goodbye_is_acknowledged_while_the_peer_can_still_be_sent_to() -> None:
    view, connected = View(ALICE), []
    view.group.on_goodbye(BOB.worker_id, BOB.incarnation, "it shut down", lambda: connected.extend(view.transport.connected))
    assert connected == [BOB.worker_id, CAROL.worker_id]
    assert view.transport.connected == [CAROL.worker_id]
