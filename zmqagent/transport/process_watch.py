"""Watches peers on this host as processes: the kernel tells at once when one ends, and no message is exchanged.

On Linux each process is held by a pidfd (pidfd_open(2)), which becomes readable at its end. Elsewhere, and where a sandbox
forbids pidfds, the process is asked for every `POLL_INTERVAL`.
"""

from __future__ import annotations

import os
import select
import selectors
from functools import partial

from zmqagent.transport.base import PeerDown, PeerEvent, PeerRecord, PeerUp
from zmqagent.transport.hosts import process_start
from zmqagent.wire.types import WorkerId

__all__ = ["POLL_INTERVAL", "ProcessWatch", "has_ended", "is_process"]

POLL_INTERVAL = 0.2
"""Seconds between two looks at the processes that have no pidfd."""


class ProcessWatch:
    """The peers on this host. Used by one thread at a time."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._fds: dict[WorkerId, int] = {}
        self._polled: dict[WorkerId, PeerRecord] = {}
        self._next_look = 0.0
        self._found: list[PeerEvent] = []

    def add(self, peer: PeerRecord, now: float) -> None:
        """Watches ``peer`` and finds at once whether it lives."""
        try:
            fd = _open(peer.pid)
        except ProcessLookupError:
            self._ended(peer)
            return
        # The descriptor first, then the comparison: from the first on, the pid cannot pass to another process unnoticed.
        if not is_process(peer):
            if fd is not None:
                os.close(fd)
            self._ended(peer)
            return
        if fd is not None:
            self._fds[peer.worker_id] = fd
            self._selector.register(fd, selectors.EVENT_READ, partial(self._gone, peer))
        else:
            self._polled[peer.worker_id] = peer
            self._next_look = now + POLL_INTERVAL
        self._found.append(PeerUp(peer.worker_id, peer.incarnation))

    def remove(self, worker_id: WorkerId) -> None:
        """Ends one watch; unknown ids are ignored."""
        self._polled.pop(worker_id, None)
        fd = self._fds.pop(worker_id, None)
        if fd is not None:
            self._selector.unregister(fd)
            os.close(fd)

    def check(self, now: float) -> None:
        """Looks at the processes that no descriptor tells of."""
        if not self._polled or now < self._next_look:
            return
        self._next_look = now + POLL_INTERVAL
        for peer in list(self._polled.values()):
            if not is_process(peer):
                self._gone(peer, now)

    def next_check(self) -> float | None:
        """When `check` has something to do; None for never."""
        return self._next_look if self._polled else None

    def take(self) -> list[PeerEvent]:
        """What was found since the last time."""
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Ends all watches."""
        for worker_id in [*self._fds, *self._polled]:
            self.remove(worker_id)

    def _gone(self, peer: PeerRecord, _now: float) -> None:
        self.remove(peer.worker_id)
        self._ended(peer)

    def _ended(self, peer: PeerRecord) -> None:
        self._found.append(PeerDown(peer.worker_id, peer.incarnation, f"its process {peer.pid} on this host has ended"))


def _open(pid: int) -> int | None:
    """A descriptor for the process; None where there are none.

    Raises:
        ProcessLookupError: there is no such process.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        # The kernel is too old, a sandbox says no, or descriptors have run out: polling does without.
        return None


def is_process(peer: PeerRecord) -> bool:
    """Whether the peer's pid still names the peer's process."""
    try:
        os.kill(peer.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # Another user's process, and alive.
    return peer.started == 0 or process_start(peer.pid) in (peer.started, 0)


def has_ended(peer: PeerRecord) -> bool:
    """Whether the peer's process runs no more; a zombie does not, though it still has its pid."""
    if not is_process(peer):
        return True
    try:
        fd = _open(peer.pid)
    except ProcessLookupError:
        return True
    if fd is None:
        return False
    try:
        # Readable once all of the process has ended (pidfd_open(2)).
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(fd)
