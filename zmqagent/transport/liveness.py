"""Which peers live: the watches of all peers, and when their verdicts may be told.

Peers on this host are watched as processes (`ProcessWatch`), others by a connection kept for nothing else (`ConnectionWatch`).
Data sockets say nothing about life: a peer that is slow to read looks like a dead one.

There are no locks in here: one thread at a time uses it.
"""

from __future__ import annotations

import selectors
from collections import deque
from dataclasses import dataclass

import zmq

from zmqagent.transport.base import PeerDown, PeerEvent, PeerRecord
from zmqagent.transport.connection_watch import ConnectionWatch
from zmqagent.transport.process_watch import ProcessWatch
from zmqagent.wire.types import WorkerId

__all__ = ["LAST_WORDS", "SETTLE", "Liveness"]

SETTLE = 0.1
"""Seconds between a death and its report, in which libzmq's thread takes in what the peer's sockets still held, and others run
what has been received: a goodbye, or the answer that let the peer go. On a busy machine either thread may be late by tens of
milliseconds; 5 ms were too few in one of some 1,200 shutdowns of four workers on two loaded cores."""

LAST_WORDS = 1.0
"""Seconds after which a death is reported even though messages, maybe those of others, never ceased to come."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A death, to be told once all is received and ``quiet_from`` has passed, or by ``latest`` in any case."""

    down: PeerDown
    quiet_from: float
    latest: float


class Liveness:
    """The watches of one transport.

    Args:
        context: for the control socket towards other hosts; None if this worker reaches none.
        selector: an entry's ``data`` is to be called with the time once its descriptor is readable.
        host: this process's `host_identity`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]] | None, selector: selectors.BaseSelector, host: str) -> None:
        self._host = host
        self._processes = ProcessWatch(selector)
        self._connections = ConnectionWatch(context, selector)
        self._events: deque[PeerEvent] = deque()
        self._verdicts: list[_Verdict] = []

    def watch(self, peer: PeerRecord, now: float) -> None:
        """Watches ``peer`` from now on, instead of an older incarnation."""
        self.forget(peer.worker_id)
        if peer.host == self._host:
            self._processes.add(peer, now)
        else:
            self._connections.add(peer, now)

    def forget(self, worker_id: WorkerId) -> None:
        """Ends the watch, and drops what was found but not told yet. Unknown ids are ignored."""
        self._processes.remove(worker_id)
        self._connections.remove(worker_id)
        self._events = deque(e for e in self._collected() if e.worker_id != worker_id)
        self._verdicts = [v for v in self._verdicts if v.down.worker_id != worker_id]

    def next_event(self, now: float, *, drained: bool) -> PeerEvent | None:
        """What there is to tell now. ``drained``: everything that had arrived has been received."""
        self._processes.check(now)
        self._connections.check(now)
        events = self._collected()
        while events:
            event = events.popleft()
            if not isinstance(event, PeerDown):
                return event
            self._verdicts.append(_Verdict(event, now + SETTLE, now + LAST_WORDS))
        for verdict in self._verdicts:
            if now >= verdict.latest or (drained and now >= verdict.quiet_from):
                self._verdicts.remove(verdict)
                return verdict.down
        return None

    def next_check(self) -> float | None:
        """When `next_event` should be asked again though nothing has happened; None for never."""
        times = [v.quiet_from for v in self._verdicts]
        times += [t for t in (self._processes.next_check(), self._connections.next_check()) if t is not None]
        return min(times, default=None)

    def close(self) -> None:
        """Ends all watches."""
        self._processes.close()
        self._connections.close()

    def _collected(self) -> deque[PeerEvent]:
        self._events += self._processes.take()
        self._events += self._connections.take()
        return self._events
