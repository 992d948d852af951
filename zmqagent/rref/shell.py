"""The lock around `RRefProtocol`, and the hands that do what it says.

Each step takes the lock, lets the protocol handle one event, unlocks, and then acts: sends control messages, fails owners,
resumes user functions. What the protocol gives up dies after the lock is released, since finalizers of values are user code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, cast

from zmqagent.agent.base import Reply, Requester
from zmqagent.exceptions import RpcError, RpcTimeoutError, RRefUsageError, ShutdownError, WorkerLostError
from zmqagent.rref.events import Answered, Event, FailOwner, Instruction, Outcome, Refuse, Resume, Send, UserDropped
from zmqagent.rref.protocol import RRefProtocol
from zmqagent.rref.rref import OwnerRRef
from zmqagent.wire.commands import Ack, Failure, RRefUserDelete
from zmqagent.wire.types import ForkId

__all__ = ["OnConfirmed", "ProtocolShell"]

_logger = logging.getLogger(__name__)

OnConfirmed = Callable[["RpcError | None"], None]
"""The token of a wait for confirmation: called when the wait is over."""

E = TypeVar("E", bound=Event)


class ProtocolShell:
    """Runs one worker's `RRefProtocol`. All methods may be called from any thread.

    A thread of its own waits for the fork ids that dying users leave in ``notes``, and starts their deletion; `close` ends it.
    """

    def __init__(self, requester: Requester, first_local_id: int, clock: Callable[[], float]) -> None:
        self._requester = requester
        self._clock = clock
        # Protects the protocol, and whatever callers of `locked` keep in step with it. Held for one event at a time, never while
        # anything outside is called. Reentrant only so that `locked` notices a finalizer that garbage collection runs inside it.
        self._lock = threading.RLock()
        self._busy = False
        # On the same lock: notified after each event while somebody waits, at shutdown.
        self._changed = threading.Condition(self._lock)
        self._waiters = 0
        self._protocol = RRefProtocol(requester.worker_id, first_local_id)
        self.notes: SimpleQueue[ForkId | threading.Event | None] = SimpleQueue()
        # Runs _follow_notes until `close` leaves None among the notes. A daemon: a process that never shuts RPC down can end.
        self._follower = threading.Thread(target=self._follow_notes, name="zmqagent-rref-notes", daemon=True)
        self._follower.start()

    @contextmanager
    def locked(self) -> Iterator[RRefProtocol]:
        """The protocol, for queries and for `RRefProtocol.draw`.

        Raises:
            RRefUsageError: this thread holds the lock already.
        """
        with self._lock:
            if self._busy:
                raise RRefUsageError(
                    "an RRef was used by a finalizer that the garbage collector ran in the middle of another RRef's bookkeeping. "
                    "Do not use RRefs in __del__ of objects that are part of a reference cycle."
                )
            self._busy = True
            try:
                yield self._protocol
            finally:
                self._busy = False

    def handle(self, event: Event) -> None:
        """Lets the protocol handle ``event``, and does what follows from it.

        Raises:
            RpcError: the protocol refuses the event.
        """
        self.step(lambda _: event)

    def step(self, make_event: Callable[[RRefProtocol], E]) -> E:
        """`handle`, for an event that has to be made while the lock is held; returns it.

        Raises:
            RpcError: the protocol refuses the event.
        """
        with self.locked() as protocol:
            event = make_event(protocol)
            instructions = protocol.handle(event, self._clock())
            if self._waiters:
                self._changed.notify_all()
        self._act(instructions)
        return event

    def wait_until(self, condition: Callable[[RRefProtocol], bool], timeout: float) -> bool:
        """Waits until ``condition`` holds, for at most ``timeout`` seconds; says whether it does."""
        with self._changed:
            self._waiters += 1
            try:
                # Condition.wait runs in Python, where ^C is seen.
                return self._changed.wait_for(lambda: condition(self._protocol), timeout)
            finally:
                self._waiters -= 1

    def drain(self) -> None:
        """Returns once all notes left so far have been handled."""
        if threading.current_thread() is self._follower:
            return
        passed = threading.Event()
        self.notes.put(passed)
        # The thread ends at shutdown only, and then there is nothing to report any more.
        while self._follower.is_alive() and not passed.wait(0.1):
            pass

    def close(self) -> None:
        """Ends the thread. The protocol is closed by its own event."""
        self.notes.put(None)
        if threading.current_thread() is not self._follower:
            self._follower.join()

    def _follow_notes(self) -> None:
        while (note := self.notes.get()) is not None:
            if isinstance(note, threading.Event):
                note.set()
                continue
            try:
                self.handle(UserDropped(note))
            except Exception:
                # One deletion that fails must not end all that follow.
                _logger.exception("cannot delete the user %s", note)

    # Acts.

    def _act(self, instructions: list[Instruction]) -> None:
        """Does what ``instructions`` say, user functions last: they may take their time. (Owners released die with the list.)"""
        for send in [i for i in instructions if isinstance(i, Send)]:
            self._send(send)
        for failure in [i for i in instructions if isinstance(i, FailOwner)]:
            cast(OwnerRRef, failure.owner).fail_creation(failure.error)
        for resume in [i for i in instructions if isinstance(i, Resume)]:
            cast(OnConfirmed, resume.token)(resume.error)
        for refusal in [i for i in instructions if isinstance(i, Refuse)]:
            raise refusal.error

    def _send(self, sent: Send) -> None:
        try:
            self._requester.request(sent.to, sent.command.to_message(), partial(self._on_reply, sent), retry=True)
        except RpcError as error:
            self._on_reply(sent, error)

    def _on_reply(self, sent: Send, reply: Reply) -> None:
        if isinstance(reply, Ack):
            self.handle(Answered(sent, Outcome.DELIVERED))
            return
        command = type(sent.command).__name__
        worker = self._requester.worker_name(sent.to)
        if isinstance(reply, RpcTimeoutError):
            _logger.warning("%s did not answer %s in time, and has not been declared dead: sending it again", worker, command)
            self.handle(Answered(sent, Outcome.TIMED_OUT, reply))
            return
        if isinstance(reply, RpcError):
            error = reply
        elif isinstance(reply, Failure):
            error = RRefUsageError(f"{worker} did not accept {command}: {reply.text}")
        else:
            error = RRefUsageError(f"{worker} answered {command} with {type(reply).__name__} instead of Ack")
        if isinstance(sent.command, RRefUserDelete) and not isinstance(error, WorkerLostError | ShutdownError):
            _logger.warning("%s may keep a value that nobody uses any more: %s", worker, error)
        self.handle(Answered(sent, Outcome.FAILED, error))
