"""What happens to RRefs on one worker, and what is to be done about it: the vocabulary of `RRefProtocol`.

Pure. An event is a fact that the shell reports to the machine; an instruction is an act that the machine wants done. Owner
objects, wait tokens and errors travel through as opaque values: the machine keeps them alive and hands them back, it never calls
them.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from zmqagent.exceptions import RpcError
from zmqagent.wire.commands import RRefChildAccept, RRefForkRequest, RRefUserDelete
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = [
    "AllUsersDropped",
    "Answered",
    "ChildAccepted",
    "Closed",
    "ConfirmationAwaited",
    "ControlCommand",
    "CreationConfirmed",
    "CreationFailed",
    "Event",
    "FailOwner",
    "ForkRequested",
    "ForksCancelled",
    "ForksSent",
    "Instruction",
    "MintedFork",
    "Outcome",
    "OwnerCreated",
    "OwnerFetched",
    "OwnerForked",
    "OwnerUnpickled",
    "Refuse",
    "Release",
    "Resume",
    "SelfRemoteEnded",
    "Send",
    "UserCreated",
    "UserDeleted",
    "UserDropped",
    "UserForked",
    "UserUnpickled",
    "WorkerJoined",
    "WorkerLost",
]

ControlCommand = RRefUserDelete | RRefForkRequest | RRefChildAccept
"""The control messages of the protocol: idempotent, answered by an `Ack`, sent again until they are."""


class MintedFork(NamedTuple):
    """A fork id that was drawn while pickling, and the RRef it belongs to."""

    rref_id: RRefId
    fork_id: ForkId


class Outcome(enum.Enum):
    """How a control message ended."""

    DELIVERED = enum.auto()
    TIMED_OUT = enum.auto()
    """All retries are used up; the peer may live and may have received it."""
    FAILED = enum.auto()
    """The peer is dead, refused, or cannot be reached any more: sending again is of no use."""


# --------------------------------------------------------------------------------------------------- events at the owner


@frozen
class OwnerForked:
    """The owner pickled its RRef. ``created``: the RRef exists already (False: this worker has only heard of it so far)."""

    rref_id: RRefId
    fork_id: ForkId
    owner: object
    created: bool


@frozen
class OwnerCreated:
    """The ``remote`` call of ``source`` arrived. For a call to oneself ``fork_id`` equals ``rref_id``."""

    rref_id: RRefId
    fork_id: ForkId
    source: WorkerId
    owner: object


@frozen
class OwnerFetched:
    """Somebody asks for the value."""

    rref_id: RRefId
    owner: object
    created: bool


@frozen
class OwnerUnpickled:
    """``parent`` sent the RRef to its owner, which is this worker."""

    rref_id: RRefId
    fork_id: ForkId
    parent: WorkerId
    owner: object
    created: bool


@frozen
class ForkRequested:
    """RREF_FORK_REQUEST arrived from ``source``, who holds the fork."""

    rref_id: RRefId
    fork_id: ForkId
    source: WorkerId


@frozen
class UserDeleted:
    """RREF_USER_DELETE arrived."""

    rref_id: RRefId
    fork_id: ForkId


@frozen
class SelfRemoteEnded:
    """A ``remote`` call to oneself was answered, or failed with ``error``."""

    rref_id: RRefId
    error: RpcError | None


# ---------------------------------------------------------------------------------------------------- events at a user


@frozen
class UserCreated:
    """``remote`` was called here; ``owner`` will run the function."""

    rref_id: RRefId
    fork_id: ForkId
    owner: WorkerId


@frozen
class CreationConfirmed:
    """The ``remote`` call that created the user was answered: the owner knows the fork."""

    fork_id: ForkId


@frozen
class CreationFailed:
    """The ``remote`` call that created the user has failed. The owner may or may not have seen it, or may see it yet."""

    fork_id: ForkId
    error: RpcError


@frozen
class UserUnpickled:
    """``parent`` sent this worker a share in an RRef of ``owner``."""

    rref_id: RRefId
    fork_id: ForkId
    owner: WorkerId
    parent: WorkerId


@frozen
class UserForked:
    """The user ``fork_id`` was pickled; ``child_id`` names the share given away."""

    fork_id: ForkId
    child_id: ForkId


@frozen
class ChildAccepted:
    """RREF_CHILD_ACCEPT arrived: the owner knows the child."""

    fork_id: ForkId


@frozen
class UserDropped:
    """Nobody on this worker refers to the user any more."""

    fork_id: ForkId


@frozen
class AllUsersDropped:
    """Shutdown: every user counts as dropped, whoever may still refer to it."""


@frozen
class ConfirmationAwaited:
    """A user function may start once ``forks`` are confirmed; `Resume` will carry ``token``."""

    token: object
    forks: tuple[ForkId, ...]


# ------------------------------------------------------------------------------------------------------- events at both


@frozen
class ForksSent:
    """The message that holds ``forks`` was handed to the transport for ``to``: from now on ``to`` holds them."""

    forks: tuple[MintedFork, ...]
    to: WorkerId


@frozen
class ForksCancelled:
    """The message that held ``forks`` was never sent."""

    forks: tuple[MintedFork, ...]


@frozen
class WorkerLost:
    """``worker`` died or left; nothing more comes from it."""

    worker: WorkerId
    error: RpcError


@frozen
class WorkerJoined:
    """A new process uses the id ``worker`` from now on."""

    worker: WorkerId


@frozen
class Closed:
    """RPC shuts down on this worker; everything that waits ends with ``error``."""

    error: RpcError


# -------------------------------------------------------------------------------------------------------- instructions


@frozen
class Send:
    """Send ``command`` to ``to``, with retries, and report the end by `Answered`."""

    to: WorkerId
    command: ControlCommand


@frozen
class Resume:
    """The wait ``token`` is over: all confirmed, or one failed with ``error``."""

    token: object
    error: RpcError | None


@frozen
class FailOwner:
    """``owner`` will never get a value: give it ``error``."""

    owner: object
    error: RpcError


@frozen
class Release:
    """The machine no longer keeps ``owner`` alive. It is handed out so that the value dies outside the shell's lock."""

    owner: object


@frozen
class Refuse:
    """The event is not accepted: raise ``error`` to whoever reported it."""

    error: RpcError


Instruction = Send | Resume | FailOwner | Release | Refuse


@frozen
class Answered:
    """The control message ``sent`` ended. ``error`` says why if it was not delivered."""

    sent: Send
    outcome: Outcome
    error: RpcError | None = None


Event = (
    OwnerForked
    | OwnerCreated
    | OwnerFetched
    | OwnerUnpickled
    | ForkRequested
    | UserDeleted
    | SelfRemoteEnded
    | UserCreated
    | CreationConfirmed
    | CreationFailed
    | UserUnpickled
    | UserForked
    | ChildAccepted
    | UserDropped
    | AllUsersDropped
    | ConfirmationAwaited
    | ForksSent
    | ForksCancelled
    | WorkerLost
    | WorkerJoined
    | Closed
    | Answered
)
