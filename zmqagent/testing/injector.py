"""Stands between a worker and the wire, and does to each message what `Faults` says."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from typing import Any

from zmqagent.agent.detour import Deliver
from zmqagent.exceptions import RpcError, SendFailedError
from zmqagent.testing.faults import Fail, Faults, Send
from zmqagent.testing.options import FaultyZmqRpcBackendOptions
from zmqagent.wire.commands import parse
from zmqagent.wire.frames import decode
from zmqagent.wire.types import Message, WorkerId

__all__ = ["FaultInjector"]

_logger = logging.getLogger(__name__)

_Late = tuple[float, int, WorkerId, list[Any], Deliver]
"""When a message is to leave, its number (no two are compared further), and how to send it."""


class FaultInjector:
    """A `zmqagent.agent.detour.Detour` for the faults that ``options`` ask for.

    The sender never waits for a delay: one thread sends what is late.
    """

    def __init__(self, options: FaultyZmqRpcBackendOptions) -> None:
        self._faults = Faults(options.num_fail_sends, options.messages_to_fail, options.messages_to_delay)
        # Protects all below and the counts of _faults; notified when the thread has something new to look at.
        self._changed = threading.Condition()
        self._late: list[_Late] = []
        self._numbers = itertools.count()
        self._is_stopped = False
        self._is_closed = False
        # Runs _send_late from the first delayed message on, until `close`. A daemon: a process that never shuts down can end.
        self._thread: threading.Thread | None = None

    def send(self, to: WorkerId, frames: list[Any], deliver: Deliver) -> None:
        """See `zmqagent.agent.detour.Detour.send`."""
        message = _innermost(frames)
        with self._changed:
            verdict = Send(0.0) if self._is_stopped else self._faults.judge(to, message)
            if isinstance(verdict, Fail):
                raise SendFailedError(verdict.text)
            if verdict.delay:
                self._hold_back((time.monotonic() + verdict.delay, next(self._numbers), to, frames, deliver))
                return
        deliver(to, frames)

    def stop(self) -> None:
        """Injects no more faults. What is held back already leaves when its time has come."""
        with self._changed:
            self._is_stopped = True

    def close(self) -> None:
        """See `zmqagent.agent.detour.Detour.close`."""
        with self._changed:
            self._is_closed = True
            self._late.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _hold_back(self, late: _Late) -> None:
        if self._is_closed:
            return
        heapq.heappush(self._late, late)
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_late, name="zmqagent-faults", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _send_late(self) -> None:
        while (late := self._next_late()) is not None:
            _, _, to, frames, deliver = late
            try:
                deliver(to, frames)
            except RpcError as error:
                # The call learns by itself of what is wrong: its peer is lost, or this worker shuts down.
                _logger.debug("a message to worker %d was late, and could not be sent any more: %s", to, error)

    def _next_late(self) -> _Late | None:
        """The next message, once its time has come; None once closed."""
        with self._changed:
            while not self._is_closed:
                wait = self._late[0][0] - time.monotonic() if self._late else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._late)
                self._changed.wait(wait)
        return None


def _innermost(frames: list[Any]) -> Message:
    """The message in ``frames``, without the wrappers around it and without its tensors."""
    envelope = decode(frames)
    message = Message(envelope.type, envelope.fields, envelope.payload, envelope.buffers)
    # Only wrappers have an inner message.
    while (inner := getattr(parse(message), "inner", None)) is not None:
        message = inner
    return message
