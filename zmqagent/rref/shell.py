"""The lock around `RRefProtocol`, and the hands that do what it says.

Each step takes the lock, lets the protocol handle one event, unlocks, and then acts: sends control messages, fails owners,
resumes user functions. What the protocol gives up dies after the lock is released, since finalizers of values are user code.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, cast

from zmqagent.agent.base import Reply, Requester
from zmqagent.exceptions import RpcError, RpcTimeoutError, RRefUsageError, ShutdownError, WorkerLostError
from zmqagent.rref.events import Answered, Event, FailOwner, Instruction, Outcome, Refuse, Resume, Send, UserDropped
from zmqagent.rref.protocol import RRefProtocol
from zmqagent.rref.rref import OwnerRRef
from zmqagent.wire.commands import Ack, Failure, RRefUserDelete, RRefUserDeletes
from zmqagent.wire.types import ForkId, WorkerId

__all__ = ["OnConfirmed", "ProtocolShell"]

_logger = logging.getLogger(__name__)

OnConfirmed = Callable[["RpcError | None"], None]
"""The token of a wait for confirmation: called when the wait is over."""

E = TypeVar("E", bound=Event)

_GATHER = 0.005
"""Seconds from a user's death until its deletion begins, along with those of all users that have died meanwhile."""

_MOST_AT_ONCE = 256
"""So many deaths are taken note of in one hold of the lock, and told in one message."""


class ProtocolShell:
    """Runs one worker's `RRefProtocol`. All methods may be called from any thread.

    A thread of its own waits for the fork ids that dying users leave in ``notes``, and starts their deletion, many at a time;
    `close` ends it.
    """

    def __init__(self, requester: Requester, first_local_id: int, clock: Callable[[], float]) -> None:
        self._requester = requester
        self._clock = clock
        # Protects the protocol, and whatever callers of `locked` keep in step with it. Held for one event, or a bounded number of
        # them, never while anything outside is called. Reentrant only so that a finalizer that garbage collection runs inside it
        # is noticed.
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
            self._enter()
            try:
                yield self._protocol
            finally:
                self._busy = False

    def _enter(self) -> None:
        """Marks the protocol as in use, with the lock held."""
        if self._busy:
            raise RRefUsageError(
                "an RRef was used by a finalizer that the garbage collector ran in the middle of another RRef's bookkeeping. "
                "Do not use RRefs in __del__ of objects that are part of a reference cycle."
            )
        self._busy = True

    def handle(self, *events: Event) -> None:
        """Lets the protocol handle ``events``, and does what follows from them.

        Raises:
            RpcError: the protocol refuses one of them; only an event that comes alone can be.
        """
        instructions: list[Instruction] = []
        with self._lock:
            self._enter()
            try:
                now = self._clock()
                for event in events:
                    instructions += self._protocol.handle(event, now)
            finally:
                self._busy = False
            self._tell_waiters()
        self._act(instructions)

    def step(self, make_event: Callable[[RRefProtocol], E]) -> E:
        """`handle`, for an event that has to be made while the lock is held; returns it.

        Raises:
            RpcError: the protocol refuses the event.
        """
        with self._lock:
            self._enter()
            try:
                event = make_event(self._protocol)
                instructions = self._protocol.handle(event, self._clock())
            finally:
                self._busy = False
            self._tell_waiters()
        self._act(instructions)
        return event

    def _tell_waiters(self) -> None:
        if self._waiters:
            self._changed.notify_all()

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
        is_open = True
        while is_open:
            notes = [self.notes.get()]
            if isinstance(notes[0], ForkId):
                # Users often die one after the other: fewer wake-ups, and fewer messages.
                time.sleep(_GATHER)
            # Nobody else takes notes.
            while not self.notes.empty() and len(notes) < _MOST_AT_ONCE:
                notes.append(self.notes.get())
            self._drop([note for note in notes if isinstance(note, ForkId)])
            for note in notes:
                if isinstance(note, threading.Event):
                    note.set()
            is_open = None not in notes

    def _drop(self, users: list[ForkId]) -> None:
        try:
            self.handle(*map(UserDropped, users))
        except Exception:
            # A deletion that fails must not end all that follow.
            _logger.exception("cannot delete the users %s", users)

    # Acts.

    def _act(self, instructions: list[Instruction]) -> None:
        """Does what ``instructions`` say, user functions last: they may take their time. (Owners released die with the list.)"""
        if not instructions:
            return
        for sends in _by_message([i for i in instructions if isinstance(i, Send)]):
            self._send(sends)
        for failure in [i for i in instructions if isinstance(i, FailOwner)]:
            cast(OwnerRRef, failure.owner).fail_creation(failure.error)
        for resume in [i for i in instructions if isinstance(i, Resume)]:
            cast(OnConfirmed, resume.token)(resume.error)
        for refusal in [i for i in instructions if isinstance(i, Refuse)]:
            raise refusal.error

    def _send(self, sends: Sequence[Send]) -> None:
        """Sends what travels in one message."""
        command = sends[0].command
        if isinstance(command, RRefUserDelete):
            message = RRefUserDeletes(tuple([cast(RRefUserDelete, sent.command) for sent in sends])).to_message()
        else:
            message = command.to_message()
        try:
            self._requester.request(sends[0].to, message, partial(self._on_reply, sends), retry=True)
        except RpcError as error:
            self._on_reply(sends, error)

    def _on_reply(self, sends: Sequence[Send], reply: Reply) -> None:
        if isinstance(reply, Ack):
            self.handle(*[Answered(sent, Outcome.DELIVERED) for sent in sends])
            return
        command = type(sends[0].command).__name__
        worker = self._requester.worker_name(sends[0].to)
        if isinstance(reply, RpcTimeoutError):
            _logger.warning("%s did not answer %s in time, and has not been declared dead: sending it again", worker, command)
            self.handle(*[Answered(sent, Outcome.TIMED_OUT, reply) for sent in sends])
            return
        if isinstance(reply, RpcError):
            error = reply
        elif isinstance(reply, Failure):
            error = RRefUsageError(f"{worker} did not accept {command}: {reply.text}")
        else:
            error = RRefUsageError(f"{worker} answered {command} with {type(reply).__name__} instead of Ack")
        if isinstance(sends[0].command, RRefUserDelete) and not isinstance(error, WorkerLostError | ShutdownError):
            _logger.warning("%s may keep values that nobody uses any more: %s", worker, error)
        self.handle(*[Answered(sent, Outcome.FAILED, error) for sent in sends])


def _by_message(sends: Sequence[Send]) -> list[list[Send]]:
    """``sends`` by what travels together: the deletions for one owner, of which many may be due, and everything else alone."""
    if len(sends) < 2:
        return [[*sends]] if sends else []
    deletions: defaultdict[WorkerId, list[Send]] = defaultdict(list)
    others: list[list[Send]] = []
    for sent in sends:
        if isinstance(sent.command, RRefUserDelete):
            deletions[sent.to].append(sent)
        else:
            others.append([sent])
    parts = [due[i : i + _MOST_AT_ONCE] for due in deletions.values() for i in range(0, len(due), _MOST_AT_ONCE)]
    return [*others, *parts]
