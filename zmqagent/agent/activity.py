"""How much a worker has under way: its own calls, and the requests of others that it serves."""

from __future__ import annotations

import threading

from zmqagent.wire.types import MessageType

__all__ = ["Activity", "weight"]

_UNCOUNTED = frozenset({MessageType.BARRIER_REQ, MessageType.GOODBYE, MessageType.JOIN_REQ, MessageType.LEAVE_REQ})
"""No calls: whoever waits at a barrier is idle."""


def weight(request: MessageType) -> int:
    """1 for requests that count as calls, 0 for others."""
    return int(request not in _UNCOUNTED)


class Activity:
    """The counts of one worker. All methods may be called from any thread."""

    def __init__(self) -> None:
        # Protects the counts: calls whose callbacks have not returned, requests that have not been answered, and those among them
        # whose handler has returned.
        self._lock = threading.Lock()
        # On the same lock: notified when a count changes and somebody waits.
        self._changed = threading.Condition(self._lock)
        self._waiters = 0
        self._client = 0
        self._server = 0
        self._deferred = 0

    def count_client(self, change: int) -> None:
        """Changes the number of calls of this worker."""
        with self._lock:
            self._client += change
            if self._waiters:
                self._changed.notify_all()

    def count_server(self, active: int, deferred: int) -> None:
        """Changes the number of requests under way, and of those among them whose handler has returned."""
        with self._lock:
            self._server += active
            self._deferred += deferred
            if self._waiters:
                self._changed.notify_all()

    def active(self) -> tuple[int, int]:
        """How many calls of this worker, and how many requests of others, are under way."""
        with self._lock:
            return self._client, self._server

    def active_async(self) -> int:
        """How many of the requests under way wait for something other than their handler, such as a future."""
        with self._lock:
            return self._deferred

    def busy(self) -> int:
        """How many calls of this worker, and handlers of requests, are under way. A request that waits for something else is left
        out: as long as anybody waits for its answer, it is a call of that worker; and if nobody does, it may never end."""
        with self._lock:
            return self._client + self._server - self._deferred

    def wait_until_idle(self, timeout: float, *, serving: bool = False) -> bool:
        """Waits, for at most ``timeout`` seconds, until no call of this worker is under way and, if it is ``serving``, none of
        others here either; says whether that is so."""
        with self._lock:
            self._waiters += 1
            try:
                return self._changed.wait_for(lambda: not (self._client or (serving and self._server)), timeout)
            finally:
                self._waiters -= 1
