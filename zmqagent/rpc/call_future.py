"""The futures of calls, whose answers are read by whoever waits for them.

An answer is unpickled, and its tensors are copied, by the thread that wants the value: it has to wait in any case, and the thread
that received the answer is free for the next. Callbacks want the value at once; then a thread of the agent reads it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.futures import Future

from zmqagent.agent.base import Reply, ReplyTaker, UnreadAnswer
from zmqagent.rpc.failures import unwrapped
from zmqagent.rpc.results import complete, value_of
from zmqagent.rpc.thread_state import clean_state
from zmqagent.wire.types import MessageType

__all__ = ["CallFuture"]

_S = TypeVar("_S")

_NO_SHARES = ((),)
"""The fields of a `Return` without RRefs, whose shares would have to be claimed even if nobody ever wanted the value."""


class CallFuture(Future[Any], ReplyTaker):
    """The future of one call: is completed by its reply.

    Args:
        devices: see `zmqagent.rpc.failures.new_future`.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        names: list[int | str | torch.device] = list(devices)
        super().__init__(devices=names)
        self._set_unwrap_func(unwrapped)
        # Whether the value is wanted as soon as the future is complete: by callbacks, or by torch, which looks for its tensors.
        self._is_eager = bool(names)
        self._is_being_taken = False

    def wait(self) -> Any:
        """See `torch.futures.Future`."""
        value = super().wait()
        return value.get() if type(value) is _Unread else value

    def value(self) -> Any:
        """See `torch.futures.Future`."""
        value = super().value()
        return value.get() if type(value) is _Unread else value

    def then(self, callback: Callable[[Future[Any]], _S]) -> Future[_S]:
        """See `torch.futures.Future`."""
        self.expect_callbacks()
        return super().then(callback)

    def add_done_callback(self, callback: Callable[[Future[Any]], None]) -> None:
        """See `torch.futures.Future`."""
        self.expect_callbacks()
        super().add_done_callback(callback)

    def expect_callbacks(self) -> None:
        """To be called before a callback is added: it must not run on the thread that receives the answer."""
        self._is_eager = True
        # Of this flag and that each side sets its own before it looks at the other's: one of them sees both.
        while self._is_being_taken and not self.done():
            time.sleep(0)  # The other side is between two lines.

    def __call__(self, reply: Reply) -> None:
        complete(self, reply)

    def take_unread(self, answer: UnreadAnswer) -> bool:
        if answer.type is not MessageType.EXCEPTION and (
            answer.type is not MessageType.PYTHON_RET or answer.fields != _NO_SHARES
        ):
            return False
        self._is_being_taken = True
        if self._is_eager:
            self._is_being_taken = False
            return False
        self.set_result(_Unread(answer))
        return True


class _Unread:
    """A value that is read when it is first asked for."""

    __slots__ = ("_answer", "_lock", "_value")

    def __init__(self, answer: UnreadAnswer) -> None:
        self._answer: UnreadAnswer | None = answer
        self._value: Any = None
        # Has several threads that ask at once get the same value; held while user code unpickles it.
        self._lock = threading.Lock()

    def get(self) -> Any:
        """The value, or the exception in its place."""
        with self._lock:
            if self._answer is not None:
                with clean_state():
                    self._value = value_of(self._answer.read())
                self._answer = None
        return unwrapped(self._value)
