"""The shell around `Membership`: the lock it is called under, and the hands that do what it says.

What the machine wants sent, and what follows from who comes and goes, is others' business: `Group` reports it through the
callbacks it is given.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from zmqagent.agent import membership_events as events
from zmqagent.agent.membership import Membership
from zmqagent.agent.membership_events import (
    Acknowledge,
    Announcement,
    AnnouncementEnded,
    Connect,
    Disconnect,
    FailBarrier,
    Member,
    PassBarrier,
    SayGoodbye,
    SendAnnouncement,
    SendBarrier,
    WorkerCame,
    WorkerGone,
)
from zmqagent.exceptions import RpcError
from zmqagent.transport.base import PeerDown, PeerEvent, PeerRecord, PeerSuspected, Transport
from zmqagent.wire.types import WorkerId

__all__ = ["BarrierToken", "Group"]

_logger = logging.getLogger(__name__)

BarrierToken = Callable[["int | RpcError"], None]
"""Takes what became of one worker's wait at a barrier: the sum of all values, or why the barrier cannot be passed."""


class Group:
    """The members of a group, as one worker sees them. All methods may be called from any thread.

    Args:
        me: this worker.
        transport: is told of peers that come and go.
        on_came: called with `WorkerCame` when another worker has joined a dynamic group.
        on_gone: called with `WorkerGone` when nothing more can come from a peer.
        send_announcement: called with `SendAnnouncement` when a member is to be told that this worker joined or leaves.
        send_barrier: called with `SendBarrier` when the barrier's leader is to be asked.
        say_goodbye: called with `SayGoodbye` when this worker leaves.
    """

    def __init__(
        self,
        me: PeerRecord,
        transport: Transport,
        *,
        on_came: Callable[[WorkerCame], None],
        on_gone: Callable[[WorkerGone], None],
        send_announcement: Callable[[SendAnnouncement], None],
        send_barrier: Callable[[SendBarrier], None],
        say_goodbye: Callable[[SayGoodbye], None],
    ) -> None:
        self._me = me
        self._transport = transport
        self._on_came = on_came
        self._on_gone = on_gone
        self._send_announcement = send_announcement
        self._send_barrier = send_barrier
        self._say_goodbye = say_goodbye
        # Protects the machine while it handles one event, and keeps its state while `reach` acts by it; instructions are carried
        # out after it is let go.
        self._lock = threading.Lock()
        self._membership = Membership(me.worker_id)

    # Lookups read immutable entries, without the lock.

    def destination(self, worker: WorkerId | str) -> PeerRecord:
        """The record of a member that can be sent to. Raises as `Membership.destination`."""
        return self._membership.destination(worker)

    def reach(self, worker: WorkerId) -> PeerRecord:
        """As `destination`, and the transport knows the peer when this returns: whoever changed its state last may still be about
        to tell the transport. Raises as `Membership.destination`."""
        # Under the lock, so that whatever the machine has the transport do about a later state is done after this.
        with self._lock:
            record = self._membership.destination(worker)
            self._transport.connect(record)
        return record

    def find(self, worker: WorkerId | str) -> Member:
        """A member, whatever its state. Raises as `Membership.find`."""
        return self._membership.find(worker)

    def members(self) -> tuple[Member, ...]:
        """All members, by id."""
        return self._membership.members

    def name_of(self, worker_id: WorkerId) -> str:
        """A member's name, or a stand-in."""
        return self._membership.name_of(worker_id)

    def untold(self, what: Announcement) -> tuple[Member, ...]:
        """Who has not answered yet to what this worker announces."""
        with self._lock:
            return self._membership.untold(what)

    def accepts(self, worker_id: WorkerId, incarnation: int) -> bool:
        """Whether messages of this incarnation are taken in."""
        return self._membership.accepts(worker_id, incarnation)

    # Events.

    def join(self, record: PeerRecord) -> None:
        """A worker, or this one itself (first of all), is a member from now on."""
        self._handle(events.Joined(record))

    def on_peer_event(self, event: PeerEvent) -> None:
        """The transport knows something new of a peer."""
        if isinstance(event, PeerDown):
            self._handle(events.Lost(event.worker_id, event.incarnation, event.reason))
        elif isinstance(event, PeerSuspected):
            _logger.warning("worker %s cannot be reached just now: %s", self.name_of(event.worker_id), event.reason)
            self._handle(events.Suspected(event.worker_id, event.incarnation, event.reason))
        else:
            self._handle(events.Reached(event.worker_id, event.incarnation))

    def on_goodbye(
        self, worker_id: WorkerId, incarnation: int, reason: str, acknowledge: Callable[[], None] | None = None
    ) -> None:
        """A peer told that it shuts down. ``acknowledge`` is called once that is known here, while it can still be sent to."""
        self._handle(events.SaidGoodbye(worker_id, incarnation, reason, acknowledge))

    def announce(self, what: Announcement, ended: Callable[[], None]) -> None:
        """This worker tells all others that it joined or leaves; ``ended`` is called when all have answered who are not gone."""
        self._handle(events.AnnouncementBegun(what, ended))

    def on_announcement_answered(self, what: Announcement, peer: PeerRecord) -> None:
        """A peer has taken note of what was announced."""
        self._handle(events.AnnouncementAnswered(what, peer.worker_id, peer.incarnation))

    def enter_barrier(self, worker_id: WorkerId, tag: str, value: int, token: BarrierToken) -> None:
        """A worker, or this one itself, has come to the barrier ``tag``; ``token`` is called once with what became of it."""
        self._handle(events.BarrierEntered(worker_id, tag, value, token))

    def barrier_unanswered(self, request: SendBarrier, error: RpcError) -> None:
        """What ``send_barrier`` was to ask for has failed."""
        self._handle(events.BarrierUnanswered(request, error))

    def end(self) -> None:
        """The last barrier was passed: from now on peers may go."""
        self._handle(events.GroupEnding())

    def leave(self, reason: str) -> None:
        """This worker goes, and says so."""
        self._handle(events.Leaving(reason))

    def _handle(self, event: events.Event) -> None:
        with self._lock:
            instructions = self._membership.handle(event, time.monotonic())
        for instruction in instructions:
            self._act(instruction)

    def _act(self, instruction: events.Instruction) -> None:
        match instruction:
            case Connect(record=record):
                self._transport.connect(record)
            case Disconnect(worker_id=worker_id, incarnation=incarnation):
                self._transport.disconnect(worker_id, incarnation)
            case WorkerCame():
                self._on_came(instruction)
            case WorkerGone():
                if not instruction.expected:
                    _logger.warning("%s", instruction.error)
                self._on_gone(instruction)
            case SendAnnouncement():
                self._send_announcement(instruction)
            case AnnouncementEnded(token=token) | Acknowledge(token=token):
                _call(token)
            case SendBarrier():
                self._send_barrier(instruction)
            case PassBarrier(token=token, total=total):
                _call(token, total)
            case FailBarrier(token=token, error=error):
                _call(token, error)
            case SayGoodbye():
                self._say_goodbye(instruction)


def _call(token: object, *outcome: int | RpcError) -> None:
    assert callable(token)
    token(*outcome)
