"""What happens to the membership of a group, and what is to be done about it: the vocabulary of `Membership`. Pure.

A member is named by worker id and incarnation: a worker that comes back under its old name and id is another member.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from zmqagent.exceptions import RpcError, WorkerLostError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = [
    "Acknowledge",
    "Announcement",
    "AnnouncementAnswered",
    "AnnouncementBegun",
    "AnnouncementEnded",
    "BarrierEntered",
    "BarrierUnanswered",
    "Connect",
    "Disconnect",
    "Event",
    "FailBarrier",
    "GroupEnding",
    "Instruction",
    "Joined",
    "Leaving",
    "Lost",
    "Member",
    "MemberState",
    "PassBarrier",
    "Reached",
    "SaidGoodbye",
    "SayGoodbye",
    "SendAnnouncement",
    "SendBarrier",
    "Suspected",
    "WorkerCame",
    "WorkerGone",
]


class MemberState(enum.Enum):
    """What is known of a member."""

    UP = "up"
    SUSPECTED = "suspected"
    LOST = "lost"
    LEFT = "left"

    @property
    def is_gone(self) -> bool:
        """Whether nothing more is to be expected of this incarnation."""
        return self in (MemberState.LOST, MemberState.LEFT)


@dataclass(frozen=True, slots=True)
class Member:
    """One member; ``since`` is the time of its last change of state, and ``reason`` what that change was for."""

    record: PeerRecord
    state: MemberState
    since: float
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.record.name!r} ({self.record.worker_id})"


class Announcement(enum.Enum):
    """What a worker of a dynamic group tells each of the others, who answer."""

    JOIN = "join"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is in the group from now on, maybe instead of an older incarnation of itself.

    In a dynamic group it takes the place of every member of its name or id that joined before it: those must have left, or died,
    or it could not have joined. One that somebody has taken the place of already is ignored.
    """

    record: PeerRecord


@dataclass(frozen=True, slots=True)
class Reached:
    """The worker lives and can be reached."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Suspected:
    """The worker cannot be reached just now."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is dead, or counts as such."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaidGoodbye:
    """The worker told that it shuts down. It waits for an answer if there is a ``token`` to answer with."""

    worker_id: WorkerId
    incarnation: int
    reason: str
    token: object = None


@dataclass(frozen=True, slots=True)
class AnnouncementBegun:
    """This worker is to tell all members that it joined or leaves; `AnnouncementEnded` hands ``token`` back."""

    what: Announcement
    token: object


@dataclass(frozen=True, slots=True)
class AnnouncementAnswered:
    """A member has taken note of what this worker announced."""

    what: Announcement
    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class BarrierEntered:
    """A member, maybe this worker itself, has come to the barrier ``tag``; ``token`` is handed back with the answer."""

    worker_id: WorkerId
    tag: str
    value: int
    token: object


@dataclass(frozen=True, slots=True)
class GroupEnding:
    """The last barrier is passed: whoever ends from now on was expected to."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """This worker shuts down."""

    reason: str


@dataclass(frozen=True, slots=True)
class BarrierUnanswered:
    """What `SendBarrier` asked for has failed with ``error``."""

    request: SendBarrier
    error: RpcError


Event = (
    Joined
    | Reached
    | Suspected
    | Lost
    | SaidGoodbye
    | AnnouncementBegun
    | AnnouncementAnswered
    | BarrierEntered
    | BarrierUnanswered
    | GroupEnding
    | Leaving
)


@dataclass(frozen=True, slots=True)
class Connect:
    """Make the peer known to the transport."""

    record: PeerRecord


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Let the transport forget this incarnation of the peer; its next one may be connected already when that is carried out."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerCame:
    """The worker is a member from now on, and can be sent to."""

    record: PeerRecord


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """Nothing more comes from this incarnation: all that waits for it ends with ``error``. ``expected``: it left as announced."""

    record: PeerRecord
    error: WorkerLostError
    expected: bool


@dataclass(frozen=True, slots=True)
class SendAnnouncement:
    """Tell the member ``to``. Its answer is an `AnnouncementAnswered`."""

    what: Announcement
    to: PeerRecord


@dataclass(frozen=True, slots=True)
class AnnouncementEnded:
    """Hand back ``token``: every member has answered, or is gone."""

    token: object


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Answer ``token``: the goodbye has been taken note of."""

    token: object


@dataclass(frozen=True, slots=True)
class SendBarrier:
    """Ask ``leader`` to let this worker pass the barrier. Its answer is for ``token``, a failure is a `BarrierUnanswered`."""

    leader: WorkerId
    tag: str
    value: int
    token: object


@dataclass(frozen=True, slots=True)
class PassBarrier:
    """Answer ``token``: all have come."""

    token: object
    total: int


@dataclass(frozen=True, slots=True)
class FailBarrier:
    """Answer ``token``: the barrier cannot be passed."""

    token: object
    error: RpcError


@dataclass(frozen=True, slots=True)
class SayGoodbye:
    """Tell the members in ``to`` that this worker shuts down."""

    to: tuple[WorkerId, ...]
    reason: str


Instruction = (
    Connect
    | Disconnect
    | WorkerCame
    | WorkerGone
    | SendAnnouncement
    | AnnouncementEnded
    | Acknowledge
    | SendBarrier
    | PassBarrier
    | FailBarrier
    | SayGoodbye
)
