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

Dynamic groups. Who may join is decided by the group's directory, which gives each newcomer an ordinal, and hands it the records
of all who came before. It then announces itself to these, and only to these: of any two members the later one tells the earlier.
Whoever leaves announces that as well. An announcement is over when everyone has answered who is not gone by then. Messages have
no order, so a newcomer may be heard of before the end of the member whose name or id it took: of two such, the greater ordinal is
right.

Barriers. The member with the lowest id that has not left leads. Everyone sends it a request, and it answers all with the sum of
their values as soon as everyone has come who has not left. If a member was lost, before or meanwhile, nobody can pass: all get a
`WorkerLostError`. If the leader itself leaves, its followers turn to the next. A tag names one barrier; a request that comes
again for one that was passed gets the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from zmqagent.agent.checks import check_group
from zmqagent.agent.membership_events import (
    Acknowledge,
    Announcement,
    AnnouncementAnswered,
    AnnouncementBegun,
    AnnouncementEnded,
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
    SendAnnouncement,
    SendBarrier,
    Suspected,
    WorkerCame,
    WorkerGone,
)
from zmqagent.exceptions import InvalidTypeError, RpcError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["Membership"]

_KEPT = 64

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class _Telling:
    """An announcement under way: whom it still awaits, by id and incarnation, and the token to hand back."""

    token: object
    awaited: set[tuple[WorkerId, int]]


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
        self._tellings: dict[Announcement, _Telling] = {}
        self._informed: set[tuple[WorkerId, int]] = set()  # that this worker leaves
        self._overtaken: dict[tuple[WorkerId, int], None] = {}  # said goodbye before they were heard of
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

    def untold(self, what: Announcement) -> tuple[Member, ...]:
        """Who has not answered yet to what this worker announces."""
        telling = self._tellings.get(what)
        return tuple(m for m in self.members if telling is not None and _key(m.record) in telling.awaited)

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
            case AnnouncementBegun():
                return self._announce(event)
            case AnnouncementAnswered():
                return self._told(event.what, (event.worker_id, event.incarnation))
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
        if (old is not None and old.record.incarnation == record.incarnation) or _key(record) in self._overtaken:
            return []
        if record.ordinal:
            rivals = [m for m in self.members if m.record.name == record.name or m is old]
            if any(m.record.ordinal > record.ordinal or m.record.worker_id == self._me for m in rivals):
                return []
        else:
            rivals = [] if old is None else [old]
        present = [m.record for m in self.members if not m.state.is_gone and m not in rivals]
        check_group([*present, record])
        done: list[Instruction] = []
        for rival in rivals:
            reason = "it was started again under its old name" if rival is old else f"{record.name!r} is another worker now"
            done += self._lose(Lost(rival.record.worker_id, rival.record.incarnation, reason), now)
        if old is not None and self._ids.get(old.record.name) == record.worker_id:
            del self._ids[old.record.name]
        self._members[record.worker_id] = Member(record, MemberState.UP, now)
        self._ids[record.name] = record.worker_id
        if record.worker_id != self._me:
            done.append(Connect(record))
            if record.ordinal:
                done.append(WorkerCame(record))
        return done

    def _lose(self, event: Lost, now: float) -> list[Instruction]:
        if self._ending:
            # The peer was through, and only its goodbye was lost.
            return self._see_off(SaidGoodbye(event.worker_id, event.incarnation, event.reason), now)
        member = self._change(event.worker_id, event.incarnation, MemberState.LOST, now, event.reason)
        if member is None:
            return []
        return [WorkerGone(member.record, _gone(member), expected=False), *self._without(member)]

    def _see_off(self, event: SaidGoodbye, now: float) -> list[Instruction]:
        member = self._change(event.worker_id, event.incarnation, MemberState.LEFT, now, event.reason)
        answer: list[Instruction] = [] if event.token is None else [Acknowledge(event.token)]
        if member is None:
            if self._present(event.worker_id, event.incarnation) is None:
                _remember(self._overtaken, (event.worker_id, event.incarnation), None)
            return answer
        # In this order: a call that begins in between is either refused by the transport, or found and failed by what follows.
        gone: list[Instruction] = [
            Disconnect(event.worker_id, event.incarnation),
            WorkerGone(member.record, _gone(member), expected=True),
        ]
        return [*answer, *gone, *self._without(member)]

    def _without(self, member: Member) -> list[Instruction]:
        """What need not wait for ``member`` any more."""
        told = [done for what in list(self._tellings) for done in self._told(what, _key(member.record))]
        return [*told, *self._settle_barriers()]

    # -- announcements

    def _announce(self, event: AnnouncementBegun) -> list[Instruction]:
        others = [m.record for m in self.members if not m.state.is_gone and m.record.worker_id != self._me]
        if not others:
            return [AnnouncementEnded(event.token)]
        self._tellings[event.what] = _Telling(event.token, {_key(record) for record in others})
        return [SendAnnouncement(event.what, record) for record in others]

    def _told(self, what: Announcement, whom: tuple[WorkerId, int]) -> list[Instruction]:
        telling = self._tellings.get(what)
        if telling is None or whom not in telling.awaited:
            return []
        telling.awaited.remove(whom)
        if what is Announcement.LEAVE:
            self._informed.add(whom)
        if telling.awaited:
            return []
        del self._tellings[what]
        return [AnnouncementEnded(telling.token)]

    def _leave(self, reason: str, now: float) -> list[Instruction]:
        self._ending = True
        # The others' requests need no answer: this worker's goodbye ends them, and sends them on to the next leader.
        error = ShutdownError(f"worker {self.name_of(self._me)!r} shuts down: {reason}")
        mine = [token for g in self._gatherings.values() for worker_id, token in g.tokens if worker_id == self._me]
        done: list[Instruction] = [FailBarrier(token, error) for token in mine]
        self._gatherings.clear()
        others = tuple(
            m.record.worker_id
            for m in self.members
            if not m.state.is_gone and m.record.worker_id != self._me and _key(m.record) not in self._informed
        )
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
                _remember(self._totals, tag, total)
                done += [PassBarrier(token, total) for worker_id, token in gathering.tokens if worker_id in awaited]
            else:
                continue
            del self._gatherings[tag]
        return done

    def _first_lost(self) -> Member | None:
        return next((m for m in self.members if m.state is MemberState.LOST), None)


def _key(record: PeerRecord) -> tuple[WorkerId, int]:
    return record.worker_id, record.incarnation


def _remember(memory: dict[K, V], key: K, value: V) -> None:
    """Keeps the latest few."""
    memory[key] = value
    if len(memory) > _KEPT:
        del memory[next(iter(memory))]


def _gone(member: Member) -> WorkerLostError:
    what = "has left the group" if member.state is MemberState.LEFT else "is lost"
    return WorkerLostError(f"worker {member} {what}: {member.reason}")
