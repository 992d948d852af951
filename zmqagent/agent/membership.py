"""Who is in the group, who is reachable, who is gone; and the barrier that all members pass together.

Pure: a machine that takes events and returns instructions (`Membership.handle`), for the agent to carry out once it has let go of
the lock that it calls the machine under.

A member is named by worker id and incarnation. An event about any other incarnation than the present one is stale, and ignored.
The states::

    Joined ──► UP ◄──────► SUSPECTED          Suspected, Reached: back and forth
               │               │
               ├───────────────┴──► LOST      Lost
               └───────────────┴──► LEFT      SaidGoodbye; Lost, too, once the group is ending

From LOST and LEFT no way leads back, but the worker may join again under a new incarnation.

Barriers. The member with the lowest id that has not left leads. Everyone sends it a request, and it answers all with the sum of
their values as soon as everyone has come who has not left. If a member was lost, before or meanwhile, nobody can pass: all get a
`WorkerLostError`. If the leader itself leaves, its followers turn to the next. A tag names one barrier; a request that comes
again for one that was passed gets the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from zmqagent.agent.membership_events import (
    BarrierEntered,
    BarrierUnanswered,
    Connect,
    Disconnect,
    Event,
    FailBarrier,
    GroupEnding,
    Instruction,
    Joined,
    Lost,
    Member,
    MemberState,
    PassBarrier,
    Reached,
    SaidGoodbye,
    SayGoodbye,
    SendBarrier,
    Suspected,
    WorkerGone,
)
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError, RpcError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["Membership", "check_group", "check_name", "check_worker_id"]

_NAME = re.compile(r"[A-Za-z0-9\-_:]+")
_NAME_LIMIT = 128
_MAX_WORKER_ID = (1 << 15) - 1
_TAGS_KEPT = 64


@dataclass(slots=True)
class _Gathering:
    """Who has come to one barrier: each one's value, and the tokens to answer (several if a request came again)."""

    values: dict[WorkerId, int] = field(default_factory=dict)
    tokens: list[tuple[WorkerId, object]] = field(default_factory=list)


class Membership:
    """The group as one worker, ``me``, sees it. ``me`` joins first, like everyone else by `Joined`."""

    def __init__(self, me: WorkerId) -> None:
        self._me = me
        self._members: dict[WorkerId, Member] = {}
        self._ids: dict[str, WorkerId] = {}
        self._gatherings: dict[str, _Gathering] = {}
        self._totals: dict[str, int] = {}
        self._ending = False

    # -- lookups

    @property
    def members(self) -> tuple[Member, ...]:
        """All members, by id; those that are gone too."""
        return tuple(self._members[worker_id] for worker_id in sorted(self._members))

    def find(self, worker: WorkerId | str) -> Member:
        """A member by id or by name, whatever its state.

        Raises:
            UnknownWorkerError: there is no such member.
            InvalidTypeError: ``worker`` is neither an id nor a name.
        """
        if isinstance(worker, str):
            worker_id = self._ids.get(worker)
            found = None if worker_id is None else self._members[worker_id]
        elif isinstance(worker, int):
            found = self._members.get(worker)
        else:
            raise InvalidTypeError(f"a worker is named by its name or its id, not by a {type(worker).__name__}")
        if found is None:
            names = ", ".join(map(str, self.members)) or "nobody yet"
            raise UnknownWorkerError(f"could not find destination {worker!r} in the group; its members are: {names}")
        return found

    def destination(self, worker: WorkerId | str) -> PeerRecord:
        """The record of a member that a message can be sent to.

        Raises:
            UnknownWorkerError, InvalidTypeError: as `find`.
            WorkerLostError: the member is gone.
        """
        member = self.find(worker)
        if member.state.is_gone:
            raise _gone(member)
        return member.record

    def name_of(self, worker_id: WorkerId) -> str:
        """The member's name; a readable stand-in if the id is unknown."""
        member = self._members.get(worker_id)
        return member.record.name if member else f"<unknown worker {worker_id}>"

    def accepts(self, worker_id: WorkerId, incarnation: int) -> bool:
        """Whether a message from this incarnation is to be taken in: it is the present one, and was not declared lost.

        A member that said goodbye may still be heard: its last messages and its goodbye have no order.
        """
        member = self._present(worker_id, incarnation)
        return member is not None and member.state is not MemberState.LOST

    @property
    def leader(self) -> WorkerId:
        """Who leads barriers: the lowest id that has not left. All members agree on it once all goodbyes have arrived."""
        return min((m.record.worker_id for m in self._members.values() if m.state is not MemberState.LEFT), default=self._me)

    # -- the machine

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Takes in one event that happened at ``now`` (seconds, of any clock that never goes back).

        Raises:
            InvalidOptionError: a `Joined` whose name or id is illegal or taken; nothing has changed then.
        """
        match event:
            case Joined():
                return self._join(event.record, now)
            case Reached():
                self._change(event.worker_id, event.incarnation, MemberState.UP, now, "")
                return []
            case Suspected():
                self._change(event.worker_id, event.incarnation, MemberState.SUSPECTED, now, event.reason)
                return []
            case Lost():
                return self._lose(event, now)
            case SaidGoodbye():
                return self._see_off(event, now)
            case BarrierEntered():
                return self._enter(event)
            case BarrierUnanswered():
                return self._retry_barrier(event)
            case GroupEnding():
                self._ending = True
                return []
        return self._leave(event.reason, now)

    def _join(self, record: PeerRecord, now: float) -> list[Instruction]:
        old = self._members.get(record.worker_id)
        if old is not None and old.record.incarnation == record.incarnation:
            return []
        check_group([m.record for m in self.members if not m.state.is_gone and m is not old] + [record])
        done: list[Instruction] = []
        if old is not None and not old.state.is_gone:
            done += self._lose(Lost(record.worker_id, old.record.incarnation, "it was started again under its old name"), now)
        if old is not None and self._ids.get(old.record.name) == record.worker_id:
            del self._ids[old.record.name]
        self._members[record.worker_id] = Member(record, MemberState.UP, now)
        self._ids[record.name] = record.worker_id
        if record.worker_id != self._me:
            done.append(Connect(record))
        return done

    def _lose(self, event: Lost, now: float) -> list[Instruction]:
        if self._ending:
            # The peer was through, and only its goodbye was lost.
            return self._see_off(SaidGoodbye(event.worker_id, event.incarnation, event.reason), now)
        member = self._change(event.worker_id, event.incarnation, MemberState.LOST, now, event.reason)
        if member is None:
            return []
        return [WorkerGone(member.record, _gone(member), expected=False), *self._settle_barriers()]

    def _see_off(self, event: SaidGoodbye, now: float) -> list[Instruction]:
        member = self._change(event.worker_id, event.incarnation, MemberState.LEFT, now, event.reason)
        if member is None:
            return []
        # In this order: a call that begins in between is either refused by the transport, or found and failed by what follows.
        return [Disconnect(event.worker_id), WorkerGone(member.record, _gone(member), expected=True), *self._settle_barriers()]

    def _leave(self, reason: str, now: float) -> list[Instruction]:
        self._ending = True
        # The others' requests need no answer: this worker's goodbye ends them, and sends them on to the next leader.
        error = ShutdownError(f"worker {self.name_of(self._me)!r} shuts down: {reason}")
        mine = [token for g in self._gatherings.values() for worker_id, token in g.tokens if worker_id == self._me]
        done: list[Instruction] = [FailBarrier(token, error) for token in mine]
        self._gatherings.clear()
        others = tuple(m.record.worker_id for m in self.members if not m.state.is_gone and m.record.worker_id != self._me)
        self._members[self._me] = replace(self._members[self._me], state=MemberState.LEFT, since=now, reason=reason)
        return [*done, SayGoodbye(others, reason)] if others else done

    def _change(self, worker_id: WorkerId, incarnation: int, state: MemberState, now: float, reason: str) -> Member | None:
        """Moves a member on; None if the event is stale, or changes nothing."""
        member = self._present(worker_id, incarnation)
        if member is None or member.state.is_gone or member.state is state:
            return None
        self._members[worker_id] = changed = replace(member, state=state, since=now, reason=reason)
        return changed

    def _present(self, worker_id: WorkerId, incarnation: int) -> Member | None:
        member = self._members.get(worker_id)
        return member if member is not None and member.record.incarnation == incarnation else None

    # -- barriers

    def _enter(self, event: BarrierEntered) -> list[Instruction]:
        if event.tag in self._totals:
            return [PassBarrier(event.token, self._totals[event.tag])]
        try:
            self.destination(event.worker_id)
        except RpcError as error:
            return [FailBarrier(event.token, error)]
        lost = self._first_lost()
        if lost is not None:
            return [FailBarrier(event.token, _gone(lost))]
        if self.leader != self._me and event.worker_id == self._me:
            return [SendBarrier(self.leader, event.tag, event.value, event.token)]
        # Others who come here though someone else seems to lead have heard its goodbye, which is still on its way to this worker.
        gathering = self._gatherings.setdefault(event.tag, _Gathering())
        gathering.values[event.worker_id] = event.value
        gathering.tokens.append((event.worker_id, event.token))
        return self._settle_barriers()

    def _retry_barrier(self, event: BarrierUnanswered) -> list[Instruction]:
        asked = event.request
        if self.find(asked.leader).state is MemberState.LEFT:
            return self._enter(BarrierEntered(self._me, asked.tag, asked.value, asked.token))
        return [FailBarrier(asked.token, event.error)]

    def _settle_barriers(self) -> list[Instruction]:
        """Ends the barriers that nobody can pass any more, and those to which everyone has come."""
        done: list[Instruction] = []
        lost = self._first_lost()
        awaited = {m.record.worker_id for m in self._members.values() if m.state is not MemberState.LEFT}
        for tag, gathering in list(self._gatherings.items()):
            if lost is not None:
                done += [FailBarrier(token, _gone(lost)) for _, token in gathering.tokens]
            elif awaited <= gathering.values.keys():
                total = sum(gathering.values.values())
                self._remember(tag, total)
                done += [PassBarrier(token, total) for worker_id, token in gathering.tokens if worker_id in awaited]
            else:
                continue
            del self._gatherings[tag]
        return done

    def _first_lost(self) -> Member | None:
        return next((m for m in self.members if m.state is MemberState.LOST), None)

    def _remember(self, tag: str, total: int) -> None:
        self._totals[tag] = total
        if len(self._totals) > _TAGS_KEPT:
            del self._totals[next(iter(self._totals))]


def _gone(member: Member) -> WorkerLostError:
    what = "has left the group" if member.state is MemberState.LEFT else "is lost"
    return WorkerLostError(f"worker {member} {what}: {member.reason}")


def check_name(name: str) -> None:
    """Checks a worker's name, by torch's rules.

    Raises:
        InvalidTypeError: ``name`` is no text.
        InvalidOptionError: it is empty, too long, or has other signs than letters, digits, "-", "_" and ":".
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"a worker's name is a str, not a {type(name).__name__}")
    if not _NAME.fullmatch(name) or len(name) >= _NAME_LIMIT:
        raise InvalidOptionError(
            f"Worker name must match ^[A-Za-z0-9-_:]*$, and must be non-empty and shorter than {_NAME_LIMIT} chars, "
            f"but got {name}"
        )


def check_worker_id(worker_id: int, world_size: int | None = None) -> None:
    """Checks a worker's id against the ids of an int16 and, in a static group, against the group's size.

    Raises:
        InvalidTypeError: ``worker_id`` is no int.
        InvalidOptionError: it is out of range.
    """
    if type(worker_id) is not int:
        raise InvalidTypeError(f"a worker's id (its rank) is an int, not a {type(worker_id).__name__}")
    limit = _MAX_WORKER_ID + 1 if world_size is None else min(world_size, _MAX_WORKER_ID + 1)
    if not 0 <= worker_id < limit:
        raise InvalidOptionError(f"a worker's id (its rank) must be at least 0 and less than {limit}, but got {worker_id}")


def check_group(records: Collection[PeerRecord], world_size: int | None = None) -> None:
    """Checks the records of workers that want to be one group.

    Raises:
        InvalidTypeError: a name or an id of the wrong type.
        InvalidOptionError: an illegal name or id, or one that two workers share.
    """
    for record in records:
        check_name(record.name)
        check_worker_id(record.worker_id, world_size)
    _check_distinct(records)


def _check_distinct(records: Iterable[PeerRecord]) -> None:
    by_name: dict[str, WorkerId] = {}
    by_id: dict[WorkerId, str] = {}
    for name, worker_id in ((r.name, r.worker_id) for r in records):
        if worker_id in by_id:
            raise InvalidOptionError(
                f"Worker id {worker_id} is not unique. Workers {by_id[worker_id]} and {name} share it: give each its own rank."
            )
        if name in by_name:
            raise InvalidOptionError(
                f"RPC worker name {name} is not unique. Workers {by_name[name]} and {worker_id} share the same name."
            )
        by_name[name] = worker_id
        by_id[worker_id] = name
