"""The futures of calls, whose answers are read by the thread that waits for them, if there is one.

An answer is unpickled, and its tensors are copied, by the thread that wants the value: it has to be woken in any case, and the
one that received the answer is free for the next. If nobody waits yet, a thread of the agent reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch.futures import Future

from zmqagent.agent.base import Reply, ReplyTaker, UnreadAnswer
from zmqagent.rpc.failures import unwrapped
from zmqagent.rpc.results import complete
from zmqagent.rpc.thread_state import clean_state
from zmqagent.wire.types import MessageType

__all__ = ["CallFuture"]

_LEFT_TO_WHO_WAITS = frozenset({MessageType.PYTHON_RET, MessageType.EXCEPTION})
"""Answers that are nothing but a value, or an exception in its place."""


class CallFuture(Future[Any], ReplyTaker):
    """The future of one call; its reply completes it.

    Args:
        devices: see `zmqagent.rpc.failures.new_future`.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        names: list[int | str | torch.device] = list(devices)
        super().__init__(devices=names)
        self._set_unwrap_func(unwrapped)
        # Orders who waits and who brings the reply; protects the three fields below.
        self._lock = threading.Lock()
        self._reader: threading.Lock | None = None  # held until there is something for the first thread that waits
        self._unread: UnreadAnswer | None = None
        self._has_come = False

    def wait(self) -> Any:
        """See `torch.futures.Future`. Unlike there, ^C ends it at once."""
        if not self.done():
            self._wait_as_reader()
        return super().wait()

    def _wait_as_reader(self) -> None:
        """Waits in Python, unless another thread does already, and completes the future with what comes."""
        reader = threading.Lock()
        reader.acquire()
        try:
            with self._lock:
                if self._reader is not None or self._has_come:
                    return
                self._reader = reader
            reader.acquire()
        finally:
            with self._lock:
                if self._reader is reader:
                    self._reader = None
                    unread, self._unread = self._unread, None
                else:
                    unread = None
            if unread is not None:
                with clean_state():
                    complete(self, unread.read())

    def __call__(self, reply: Reply) -> None:
        complete(self, reply)
        with self._lock:
            self._has_come = True
            if self._reader is not None:
                self._reader.release()

    def take_unread(self, answer: UnreadAnswer) -> bool:
        if answer.type not in _LEFT_TO_WHO_WAITS:
            return False
        with self._lock:
            if self._reader is None:
                return False
            self._unread = answer
            self._has_come = True
            self._reader.release()
        return True
