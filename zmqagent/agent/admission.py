"""How one worker joins its dynamic group, learns of others that join and leave, and leaves it.

Joining: it is in the directory already (`Roster.enter`) and serves; now it announces itself to everyone who came before, and is
in the group when all of these have answered. Leaving: out of the directory first, so that nobody who joins from then on knows it;
then everybody who does is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

from zmqagent.agent.base import Reply, Respond
from zmqagent.agent.exchange import Exchange
from zmqagent.agent.executor import Task
from zmqagent.agent.group import Group
from zmqagent.agent.membership_events import Announcement, SendAnnouncement
from zmqagent.exceptions import (
    InvalidOptionError,
    ProtocolError,
    RendezvousError,
    RpcError,
    RpcTimeoutError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.transport.base import PeerRecord, Transport
from zmqagent.wire.commands import Ack, Join, Leave, parse
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["Admission", "Departures"]

_logger = logging.getLogger(__name__)

_USER_CALLS = frozenset(
    {
        MessageType.SCRIPT_CALL,
        MessageType.PYTHON_CALL,
        MessageType.SCRIPT_REMOTE_CALL,
        MessageType.PYTHON_REMOTE_CALL,
        MessageType.PYTHON_RREF_FETCH_CALL,
        MessageType.FORWARD_AUTOGRAD_REQ,
        MessageType.RUN_WITH_PROFILING_REQ,
        MessageType.RREF_BACKWARD_REQ,
    }
)
"""What a worker that leaves does not begin any more. All other requests belong to something that has begun before."""

_FAREWELL = 5.0
"""Seconds that a worker which leaves waits for the others to take note, at most. A member that has stopped must not keep it."""


class Departures(Protocol):
    """What a leaving worker needs of the `Roster`."""

    def remove(self, incarnation: int) -> Sequence[PeerRecord]:
        """Takes a member out of the directory and returns those who are left."""


class Admission:
    """One worker's joining and leaving. All methods may be called from any thread.

    Args:
        me: this worker.
        group: its view of the group.
        transport: for answers to those whom the group does not take in.
        exchange: for what is announced.
        roster: keeps the directory.
        tell: runs a task after all news of other workers that were told before.
    """

    def __init__(
        self,
        me: PeerRecord,
        group: Group,
        transport: Transport,
        exchange: Exchange,
        roster: Departures,
        tell: Callable[[Task], None],
    ) -> None:
        self._me = me
        self._group = group
        self._transport = transport
        self._exchange = exchange
        self._roster = roster
        self._tell = tell
        self._is_leaving = False
        self._has_departed = False
        # Notified when an announcement ends, one way or the other.
        self._changed = threading.Condition()
        self._ended: set[Announcement] = set()
        self._refusal: RpcError | None = None
        # By id, the incarnation that was told it cannot join and has not said goodbye. Single steps of the interpreter change it.
        self._refused: dict[WorkerId, int] = {}

    # This worker joins.

    def join(self, timeout: float) -> None:
        """Tells all members that this worker has joined; returns once they know. ``timeout`` in seconds, 0 for none.

        Raises:
            RendezvousError: a member did not answer in time, or would not have this worker.
        """
        if not self._announce(Announcement.JOIN, timeout):
            missing = ", ".join(map(str, self._group.untold(Announcement.JOIN)))
            raise RendezvousError(
                f"worker {self._me.name!r} waited {timeout:g} s in init_rpc for an answer of {missing}: they are alive, but "
                "stopped or cut off. End them, or give them more time with rpc_timeout."
            )
        if self._refusal is not None:
            raise RendezvousError(f"worker {self._me.name!r} could not join: {self._refusal}") from self._refusal

    def _announce(self, what: Announcement, timeout: float) -> bool:
        self._group.announce(what, partial(self._end, what))
        with self._changed:
            # Python's own wait, which ^C ends.
            return self._changed.wait_for(lambda: what in self._ended, timeout or None)

    def _end(self, what: Announcement) -> None:
        with self._changed:
            self._ended.add(what)
            self._changed.notify_all()

    def send(self, announcement: SendAnnouncement) -> None:
        """Tells one member; again and again, until it answers, is gone, or the announcement is over."""
        what, peer = announcement.what, announcement.to
        message = Join(**asdict(self._me)) if what is Announcement.JOIN else Leave(self._me.incarnation, "it shut down")
        on_reply = partial(self._on_reply, announcement)
        try:
            self._exchange.request(peer, message.to_message(), on_reply, timeout=0, retry=True)
        except RpcError as error:
            on_reply(error)

    def _on_reply(self, announcement: SendAnnouncement, reply: Reply) -> None:
        what, peer = announcement.what, announcement.to
        if isinstance(reply, Ack):
            self._group.on_announcement_answered(what, peer)
        elif isinstance(reply, RpcTimeoutError):
            if what not in self._ended:
                self.send(announcement)
        elif isinstance(reply, WorkerLostError | ShutdownError):
            # Its end counts as an answer, and is reported by itself.
            _logger.debug("worker %d was not told that this one %ss: %s", peer.worker_id, what.value, reply)
        else:
            self._refusal = reply if isinstance(reply, RpcError) else ProtocolError(f"answered by {reply!r:.100}")
            self._end(what)

    # This worker leaves.

    def refuse_calls(self) -> None:
        """From now on `check` refuses."""
        self._is_leaving = True

    def check(self, source: WorkerId, message: Message) -> None:
        """Raises `WorkerLostError` for a call of another worker that would begin while this one leaves."""
        if self._is_leaving and message.type in _USER_CALLS and source != self._me.worker_id:
            raise WorkerLostError(f"worker {self._me.name!r} ({self._me.worker_id}) is leaving the group and takes no more calls")

    def leave(self, deadline: float) -> None:
        """Has everybody know that this worker leaves; by ``deadline`` (of the monotonic clock) at the latest."""
        self._end(Announcement.JOIN)
        self.depart()
        if not self._announce(Announcement.LEAVE, min(_FAREWELL, max(0.001, deadline - time.monotonic()))):
            missing = ", ".join(map(str, self._group.untold(Announcement.LEAVE)))
            _logger.warning("worker %s leaves, and %s did not answer to that", self._me.name, missing)

    def depart(self) -> None:
        """Takes this worker out of the directory, and learns of those who joined but have not announced themselves yet: they
        would wait for its answer."""
        if not self._has_departed:
            self._has_departed = True
            for record in self._roster.remove(self._me.incarnation):
                self._group.join(record)

    # Others do.

    def serve(self, source: WorkerId, message: Message, respond: Respond) -> None:
        """Serves the announcement of another worker."""
        command = parse(message)
        if isinstance(command, Join):
            newcomer = PeerRecord(**{**asdict(command), "worker_id": WorkerId(command.worker_id)})
            try:
                self._group.join(newcomer)
            except (InvalidOptionError, ProtocolError) as error:
                _logger.warning("worker %s does not take in worker %d: %s", self._me.name, source, error)
                self._prepare_refusal(newcomer)
                raise

            def answer() -> None:
                respond(Ack(MessageType.JOIN_RESP).to_message())

            # The newcomer may call at once when it gets this, so the layers above are to have heard of it.
            self._tell(answer)
        elif isinstance(command, Leave):

            def acknowledge() -> None:
                respond(Ack(MessageType.LEAVE_RESP).to_message())

            self._group.on_goodbye(source, command.incarnation, command.reason, acknowledge)
            self._end_refusal(source, command.incarnation)

    def _prepare_refusal(self, newcomer: PeerRecord) -> None:
        """Makes it possible to answer ``newcomer``, now and when it says goodbye, though it is no member."""
        if not self._is_member(newcomer.worker_id):
            self._refused[newcomer.worker_id] = newcomer.incarnation
            self._transport.connect(newcomer)

    def _end_refusal(self, source: WorkerId, incarnation: int) -> None:
        if self._refused.get(source) == incarnation:
            del self._refused[source]
            self._transport.disconnect(source, incarnation)

    def _is_member(self, worker_id: WorkerId) -> bool:
        """Whether the transport's connection to ``worker_id`` is that of a member."""
        return any(m.record.worker_id == worker_id and not m.state.is_gone for m in self._group.members())

    def forget(self, record: PeerRecord) -> None:
        """A member was lost: its name and id are free for others."""
        self._roster.remove(record.incarnation)
