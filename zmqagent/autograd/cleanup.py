"""Tells other workers of contexts that have ended, those that end shortly after one another in one message.

A training step opens a context and ends it. Nobody waits for the clean-up, and a message costs both sides as much time as a good
part of the step: told at once and one by one, it would compete with the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from queue import SimpleQueue

from zmqagent.agent.base import Reply, Requester
from zmqagent.exceptions import RpcError
from zmqagent.wire.commands import CleanupContexts
from zmqagent.wire.types import WorkerId

__all__ = ["CleanupMessages", "GatheredCleanups"]

_logger = logging.getLogger(__name__)

_GATHER = 0.02
"""Seconds from the end of a context until it is told, along with the ends of all contexts since."""

_MOST_AT_ONCE = 256
"""So many contexts, at most, are told of in one message."""


class CleanupMessages:
    """Tells of each context at once. All methods may be called from any thread."""

    def __init__(self, requester: Requester) -> None:
        self._requester = requester

    def tell(self, workers: Iterable[WorkerId], context_id: int) -> None:
        """``workers`` are to erase the context."""
        for worker_id in workers:
            self._send(worker_id, (context_id,))

    def close(self) -> None:
        """Tells what is left to be told, and then nothing more. Idempotent."""

    def _send(self, worker_id: WorkerId, context_ids: tuple[int, ...]) -> None:
        try:
            self._requester.request(worker_id, CleanupContexts(context_ids).to_message(), _log_failure, retry=True)
        except RpcError as fault:
            # The peer left or this worker shuts down: the contexts end there by themselves.
            _logger.debug("no clean-up of autograd contexts %s sent to worker %d: %s", context_ids, worker_id, fault)


class GatheredCleanups(CleanupMessages):
    """Tells of contexts a moment later, together, from a thread of its own that begins at the first and ends by `close`."""

    def __init__(self, requester: Requester) -> None:
        super().__init__(requester)
        self._notes: SimpleQueue[tuple[WorkerId, int] | None] = SimpleQueue()
        # Keeps two that end a context from both starting the thread, and `close` from missing one that starts.
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def tell(self, workers: Iterable[WorkerId], context_id: int) -> None:
        notes = [(worker_id, context_id) for worker_id in workers]
        if notes and self._thread is None:
            self._start()
        for note in notes:
            self._notes.put(note)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_closed:
                # A daemon: a process that never shuts RPC down can end.
                self._thread = threading.Thread(target=self._follow, name="zmqagent-autograd-cleanup", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._notes.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _follow(self) -> None:
        is_open = True
        while is_open:
            notes = [self._notes.get()]
            if notes[0] is not None:
                time.sleep(_GATHER)
            # Nobody else takes notes.
            while not self._notes.empty() and len(notes) < _MOST_AT_ONCE:
                notes.append(self._notes.get())
            due: defaultdict[WorkerId, list[int]] = defaultdict(list)
            for worker_id, context_id in filter(None, notes):
                due[worker_id].append(context_id)
            for worker_id, context_ids in due.items():
                self._send(worker_id, tuple(context_ids))
            is_open = None not in notes


def _log_failure(reply: Reply) -> None:
    if isinstance(reply, RpcError):
        _logger.debug("a clean-up of autograd contexts was not answered: %s", reply)
