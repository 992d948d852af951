"""The user's half of the RRef protocol: the shares in other workers' RRefs that this worker holds.

Pure. A user tells the owner of its death (G1), but not before the owner has confirmed it, and not before the owner has confirmed
every child that was forked from it (G2). A user that is dropped earlier stays on record until then.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from zmqagent.exceptions import RpcError, RRefUsageError, WorkerLostError
from zmqagent.rref.events import ConfirmationAwaited, Instruction, MintedFork, Refuse, Resume, Send, UserCreated, UserUnpickled
from zmqagent.wire.commands import RRefChildAccept, RRefForkRequest, RRefUserDelete
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = ["UserLedger", "UserState"]


class UserState(enum.Enum):
    """How a user stands with its owner."""

    PENDING = enum.auto()
    """The owner has not answered yet."""
    CONFIRMED = enum.auto()
    """The owner knows this fork."""
    FAILED = enum.auto()
    """The owner may never have heard of this fork."""
    ORPHANED = enum.auto()
    """The owner is dead."""
    DELETED = enum.auto()
    """Dropped, or never heard of."""


@dataclass(slots=True)
class _User:
    rref_id: RRefId
    fork_id: ForkId
    owner: WorkerId
    parent: WorkerId | None  # whom to tell of the confirmation; None: the creator, or forked by the owner itself
    state: UserState
    error: RpcError | None = None
    dropped: bool = False
    children: set[ForkId] = field(default_factory=set)


@dataclass(slots=True)
class _Child:
    parent: ForkId
    holder: WorkerId | None = None  # None: pickled, but not known yet for whom


@dataclass(slots=True, eq=False)
class _Wait:
    token: object
    remaining: set[ForkId]


class UserLedger:
    """The users on one worker. ``lost`` is the protocol's set of dead workers, shared and read only here."""

    def __init__(self, lost: set[WorkerId]) -> None:
        self._lost = lost
        self._users: dict[ForkId, _User] = {}
        self._children: dict[ForkId, _Child] = {}  # given away, and not yet known to the owner
        self._waits: dict[ForkId, list[_Wait]] = {}

    # ---------------------------------------------------------------------------------------------------------- queries

    @property
    def pending_count(self) -> int:
        """Users that their owner has not confirmed yet."""
        return sum(user.state is UserState.PENDING for user in self._users.values())

    @property
    def user_count(self) -> int:
        """Users on record, dropped ones that may not be deleted yet included."""
        return len(self._users)

    @property
    def child_count(self) -> int:
        """Forks given away that the owner has not confirmed yet."""
        return len(self._children)

    def state(self, fork_id: ForkId) -> tuple[UserState, RpcError | None]:
        """How the user stands, and what went wrong if it failed."""
        user = self._users.get(fork_id)
        if user is None or user.dropped:
            return UserState.DELETED, None
        return user.state, user.error

    # ----------------------------------------------------------------------------------------------------------- events

    def created(self, event: UserCreated) -> list[Instruction]:
        """Scenario 1, the creator: usable at once."""
        self._users[event.fork_id] = _User(event.rref_id, event.fork_id, event.owner, None, UserState.PENDING)
        return []

    def unpickled(self, event: UserUnpickled) -> list[Instruction]:
        """Scenario 3, from the owner, who knows the fork; or 4, from another user: ask the owner."""
        if event.fork_id in self._users:
            return [Refuse(RRefUsageError(f"the fork {event.fork_id} of RRef {event.rref_id} was unpickled twice"))]
        if event.parent == event.owner:
            user = _User(event.rref_id, event.fork_id, event.owner, None, UserState.CONFIRMED)
        else:
            user = _User(event.rref_id, event.fork_id, event.owner, event.parent, UserState.PENDING)
        self._users[event.fork_id] = user
        if event.owner in self._lost:
            user.state = UserState.ORPHANED
            user.error = WorkerLostError(f"worker {event.owner}, the owner of RRef {event.rref_id}, was declared dead")
            return []
        if user.state is UserState.CONFIRMED:
            return []
        return [Send(user.owner, RRefForkRequest(user.rref_id, user.fork_id))]

    def forked(self, fork_id: ForkId, child_id: ForkId) -> list[Instruction]:
        """A share is being given away: the parent must outlive the child's confirmation (G2)."""
        user = self._users.get(fork_id)
        if user is None or user.dropped:
            return [Refuse(RRefUsageError(f"the user {fork_id} has been deleted. Cannot call fork an UserRRef after deletion."))]
        user.children.add(child_id)
        self._children[child_id] = _Child(fork_id)
        return []

    def accepted(self, child_id: ForkId) -> list[Instruction]:
        """The owner knows the child, or the child will never be: the parent need not wait for it."""
        child = self._children.pop(child_id, None)
        if child is None:
            return []  # a second copy
        user = self._users[child.parent]
        user.children.remove(child_id)
        return self._delete_if_due(user)

    def confirmed(self, fork_id: ForkId) -> list[Instruction]:
        """The owner has answered for this user."""
        return self._conclude(fork_id, UserState.CONFIRMED, None)

    def failed(self, fork_id: ForkId, error: RpcError) -> list[Instruction]:
        """The owner has not answered for this user, or has refused it."""
        return self._conclude(fork_id, UserState.FAILED, error)

    def dropped(self, fork_id: ForkId) -> list[Instruction]:
        """Nobody refers to the user any more."""
        user = self._users.get(fork_id)
        if user is None:
            return []  # deleted before, at shutdown
        user.dropped = True
        return self._delete_if_due(user)

    def all_dropped(self) -> list[Instruction]:
        """Every user goes as soon as the rules allow it."""
        return [instruction for fork_id in list(self._users) for instruction in self.dropped(fork_id)]

    def awaited(self, event: ConfirmationAwaited) -> list[Instruction]:
        """Starts a wait, or ends it at once. Users that are gone already need no confirmation."""
        remaining: set[ForkId] = set()
        for fork_id in event.forks:
            user = self._users.get(fork_id)
            if user is not None and user.error is not None:
                return [Resume(event.token, user.error)]
            if user is not None and user.state is UserState.PENDING:
                remaining.add(fork_id)
        if not remaining:
            return [Resume(event.token, None)]
        wait = _Wait(event.token, remaining)
        for fork_id in remaining:
            self._waits.setdefault(fork_id, []).append(wait)
        return []

    def sent(self, fork: MintedFork, to: WorkerId) -> list[Instruction]:
        """Notes who holds the child, so that the holder's death frees the parent."""
        child = self._children.get(fork.fork_id)
        if child is None:
            return []
        if to in self._lost:
            return self.accepted(fork.fork_id)
        child.holder = to
        return []

    def lost(self, worker: WorkerId, error: RpcError) -> list[Instruction]:
        """Children on ``worker`` will never be confirmed; RRefs that it owned are no more."""
        instructions: list[Instruction] = []
        for user in [user for user in self._users.values() if user.owner == worker]:
            for child_id in user.children:
                del self._children[child_id]
            user.children.clear()
            user.state = UserState.ORPHANED
            user.error = error
            instructions += self._resume(user.fork_id, error)
            instructions += self._delete_if_due(user)
        for child_id in [child_id for child_id, child in self._children.items() if child.holder == worker]:
            instructions += self.accepted(child_id)
        return instructions

    def close(self, error: RpcError) -> list[Instruction]:
        """Forgets all users; who waits for one gets ``error``."""
        self._users.clear()
        self._children.clear()
        return [instruction for fork_id in list(self._waits) for instruction in self._resume(fork_id, error)]

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _conclude(self, fork_id: ForkId, state: UserState, error: RpcError | None) -> list[Instruction]:
        user = self._users.get(fork_id)
        if user is None or user.state is not UserState.PENDING:
            return []
        user.state = state
        user.error = error
        instructions = self._resume(fork_id, error)
        if user.parent is not None:
            instructions.append(Send(user.parent, RRefChildAccept(fork_id)))
        return instructions + self._delete_if_due(user)

    def _delete_if_due(self, user: _User) -> list[Instruction]:
        if not user.dropped or user.children or user.state is UserState.PENDING:
            return []
        del self._users[user.fork_id]
        if user.state is UserState.ORPHANED:
            return []
        # A failed user tells the owner too: its remote() may yet arrive there.
        return [Send(user.owner, RRefUserDelete(user.rref_id, user.fork_id))]

    def _resume(self, fork_id: ForkId, error: RpcError | None) -> list[Instruction]:
        instructions: list[Instruction] = []
        for wait in self._waits.pop(fork_id, ()):
            wait.remaining.discard(fork_id)
            if error is not None:
                for other in wait.remaining:
                    self._waits[other].remove(wait)
                instructions.append(Resume(wait.token, error))
            elif not wait.remaining:
                instructions.append(Resume(wait.token, None))
        return instructions
