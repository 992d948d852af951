"""The Remote Reference Protocol on one worker: events in, instructions out.

Pure: no sockets, threads, clocks or torch; the time comes in with each event. `RRefContext` holds the lock around it and carries
out what it says.

Assumed of the network: messages are lost, delayed, copied and reordered; a dead worker is declared dead once and for all. Calls
of user functions arrive at most once; control messages are sent again until they are answered, so all of them are idempotent.

Guaranteed:

- **G1** the owner learns of the death of every user that it knows, or may come to know.
- **G2** a user is not deleted before the owner has confirmed every child that was forked from it.

Together: while any user lives, or is on its way inside a message, the owner keeps the value. The four ways to get a share:

1. *Creator* (``remote``): usable at once; the answer to the call confirms it. A call to oneself keeps the value by a fork whose
   id equals the RRef's, until the call is answered.
2. *User to owner*: the fork id is a phantom that only keeps the parent alive until the owner's RREF_CHILD_ACCEPT.
3. *Owner to user*: registered while it is pickled, no control messages. (Owner to itself: taken back when it is unpickled.)
4. *User to user*: the child asks the owner by RREF_FORK_REQUEST; once answered, it frees its parent by RREF_CHILD_ACCEPT, and the
   user function that waits for the argument runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zmqagent.exceptions import RpcError
from zmqagent.rref.events import (
    AllUsersDropped,
    Answered,
    ChildAccepted,
    Closed,
    ConfirmationAwaited,
    CreationConfirmed,
    CreationFailed,
    Event,
    ForkRequested,
    ForksCancelled,
    ForksSent,
    Instruction,
    MintedFork,
    Outcome,
    OwnerCreated,
    OwnerFetched,
    OwnerForked,
    OwnerUnpickled,
    Refuse,
    Resume,
    SelfRemoteEnded,
    Send,
    UserCreated,
    UserDeleted,
    UserDropped,
    UserForked,
    UserUnpickled,
    WorkerJoined,
    WorkerLost,
)
from zmqagent.rref.owners import OwnerLedger
from zmqagent.rref.users import UserLedger, UserState
from zmqagent.wire.commands import RRefForkRequest
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = ["Counts", "RRefProtocol"]


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is alive or under way; all zero once every RRef is gone."""

    owners: int
    forks: int
    pending_users: int
    pending_children: int
    unanswered: int
    """Control messages that have not been answered."""
    users: int

    @property
    def is_settled(self) -> bool:
        """Whether owners have confirmed all users here, and all children that were forked from them."""
        return not self.pending_users and not self.pending_children

    @property
    def has_no_users(self) -> bool:
        """Whether this worker uses no RRef of others, and they have been told."""
        return not self.users and not self.unanswered

    @property
    def is_empty(self) -> bool:
        """Whether this worker uses no RRef of others, and others none of its own."""
        return not self.users and not self.owners and not self.forks and not self.unanswered


class RRefProtocol:
    """One worker's part in the protocol. Not thread-safe: whoever calls it holds a lock."""

    def __init__(self, worker_id: WorkerId, first_local_id: int = 0) -> None:
        self.worker_id = worker_id
        self._next_id = first_local_id
        self._lost: set[WorkerId] = set()
        self._owners = OwnerLedger(worker_id, self._lost)
        self._users = UserLedger(self._lost)
        self._unanswered = 0
        self._closed: RpcError | None = None
        self._handlers: dict[type, Callable[[Any, float], list[Instruction]]] = {
            OwnerForked: self._owners.forked,
            OwnerCreated: self._owners.created,
            OwnerFetched: self._owners.fetched,
            OwnerUnpickled: self._owners.unpickled,
            ForkRequested: self._owners.requested,
            UserDeleted: self._owners.deleted,
            SelfRemoteEnded: self._owners.self_remote_ended,
            UserCreated: lambda event, _: self._users.created(event),
            CreationConfirmed: lambda event, _: self._users.confirmed(event.fork_id),
            CreationFailed: lambda event, _: self._users.failed(event.fork_id, event.error),
            UserUnpickled: lambda event, _: self._users.unpickled(event),
            UserForked: lambda event, _: self._users.forked(event.fork_id, event.child_id),
            ChildAccepted: lambda event, _: self._users.accepted(event.fork_id),
            UserDropped: lambda event, _: self._users.dropped(event.fork_id),
            AllUsersDropped: lambda _event, _now: self._users.all_dropped(),
            ConfirmationAwaited: lambda event, _: self._users.awaited(event),
            ForksSent: self._forks_sent,
            ForksCancelled: self._forks_cancelled,
            WorkerLost: self._worker_lost,
            WorkerJoined: self._worker_joined,
            Closed: self._close,
            Answered: self._answered,
        }

    def draw(self) -> int:
        """The next local id. RRef ids and fork ids come from one counter; ``remote`` draws the RRef's first."""
        self._next_id += 1
        return self._next_id - 1

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Takes note of ``event`` at time ``now`` (seconds, never going back) and says what is to be done about it.

        At most one `Refuse` is among the instructions; the others are to be carried out even then.
        """
        if self._closed is not None:
            return self._when_closed(event, self._closed)
        instructions = self._handlers[type(event)](event, now)
        if instructions:
            self._unanswered += sum(isinstance(instruction, Send) for instruction in instructions)
        return instructions

    # ---------------------------------------------------------------------------------------------------------- queries

    @property
    def counts(self) -> Counts:
        """What is alive or under way."""
        return Counts(
            owners=self._owners.owner_count,
            forks=self._owners.fork_count,
            pending_users=self._users.pending_count,
            pending_children=self._users.child_count,
            unanswered=self._unanswered,
            users=self._users.user_count,
        )

    @property
    def is_closed(self) -> bool:
        """Whether `Closed` has been handled."""
        return self._closed is not None

    def user_state(self, fork_id: ForkId) -> tuple[UserState, RpcError | None]:
        """How a user stands with its owner, and what went wrong if it failed."""
        return self._users.state(fork_id)

    def keeps(self, rref_id: RRefId) -> bool:
        """Whether this worker, as the owner, keeps the RRef for some user."""
        return self._owners.keeps(rref_id)

    def leaks(self) -> list[MintedFork]:
        """The forks that the owner still keeps values for."""
        return self._owners.forks()

    # ----------------------------------------------------------------------------------------------------------- events

    def _forks_sent(self, event: ForksSent, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for fork in event.forks:
            instructions += self._owners.sent(fork, event.to, now)
            instructions += self._users.sent(fork, event.to)
        return instructions

    def _forks_cancelled(self, event: ForksCancelled, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        for fork in event.forks:
            instructions += self._owners.cancelled(fork, now)
            instructions += self._users.accepted(fork.fork_id)
        return instructions

    def _worker_lost(self, event: WorkerLost, now: float) -> list[Instruction]:
        self._lost.add(event.worker)
        return self._owners.lost(event.worker, event.error, now) + self._users.lost(event.worker, event.error)

    def _worker_joined(self, event: WorkerJoined, now: float) -> list[Instruction]:
        self._lost.discard(event.worker)
        return []

    def _answered(self, event: Answered, now: float) -> list[Instruction]:
        self._unanswered -= 1
        if event.outcome is Outcome.TIMED_OUT:
            # The peer has not been declared dead, so it may come back: giving up would break G1 or G2.
            return [event.sent]
        if not isinstance(event.sent.command, RRefForkRequest):
            return []
        fork_id = event.sent.command.fork_id
        if event.outcome is Outcome.FAILED:
            return self._users.failed(fork_id, event.error or RpcError(f"the owner did not accept {event.sent.command}"))
        return self._users.confirmed(fork_id)

    def _close(self, event: Closed, now: float) -> list[Instruction]:
        self._closed = event.error
        self._unanswered = 0
        return self._owners.close(event.error) + self._users.close(event.error)

    @staticmethod
    def _when_closed(event: Event, error: RpcError) -> list[Instruction]:
        match event:
            case ConfirmationAwaited(token=token):
                return [Resume(token, error)]
            case OwnerForked() | OwnerCreated() | OwnerFetched() | OwnerUnpickled() | ForkRequested():
                return [Refuse(type(error)(*error.args))]
            case UserCreated() | UserUnpickled() | UserForked():
                return [Refuse(type(error)(*error.args))]
            case _:
                return []  # what ended with the shutdown
