"""Dynamic groups in one process: real directories and membership machines, a made-up store, network and death.

Every life of a worker is a `Life`; it is one of many that may want the same name or id. The store exchanges values atomically,
and between a life's reading and its exchange anything may happen. The network delays, copies and reorders, and delivers
everything in the end; what is meant for a life that is over is dropped. Deaths are noticed at some later time, by each peer on
its own.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from zmqagent.agent import membership_events as ev
from zmqagent.agent.directory import Directory
from zmqagent.agent.membership import Membership
from zmqagent.agent.membership_events import Announcement
from zmqagent.exceptions import InvalidOptionError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["Life", "Phase", "World"]

NAMES = ("a", "b-1", "c", "d")


class Phase(enum.Enum):
    """How far a life is."""

    ENTERING = "entering"
    REFUSED = "refused"
    ANNOUNCING = "announcing"
    MEMBER = "member"
    DEPARTING = "departing"
    LEAVING = "leaving"
    OVER = "over"
    DEAD = "dead"


RUNNING = (Phase.ANNOUNCING, Phase.MEMBER, Phase.DEPARTING, Phase.LEAVING)
"""Serves what it is sent."""


@dataclass
class Life:
    """One life of one worker."""

    record: PeerRecord
    phase: Phase = Phase.ENTERING
    read: Directory | None = None
    view: Membership = field(default_factory=lambda: Membership(WorkerId(0)))
    links: dict[WorkerId, int] = field(default_factory=dict)  # the incarnation that each id leads to
    was_told_of: list[str] = field(default_factory=list)

    def present(self) -> set[int]:
        """The incarnations that it takes for members."""
        return {member.record.incarnation for member in self.view.members if not member.state.is_gone}


@dataclass(frozen=True)
class _Message:
    to: int  # an incarnation
    kind: str
    source: PeerRecord


class World:
    """Plays one seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.directory = Directory()
        self.lives: dict[int, Life] = {}
        self._network: list[_Message] = []
        self._unnoticed: list[tuple[int, PeerRecord]] = []  # (who will notice, whose death)

    # What happens.

    def start(self) -> None:
        """A worker wants to join."""
        incarnation = len(self.lives) + 1
        worker_id = WorkerId(self.chance.choice([-1, 0, 1, 2, 3]))
        self.lives[incarnation] = Life(PeerRecord(self.chance.choice(NAMES), worker_id, incarnation, "host", 1, ()))

    def act(self) -> bool:
        """One random step of anything that is under way; False if nothing is."""
        steps: list[Callable[[], None]] = []
        for life in self.lives.values():
            if life.phase is Phase.ENTERING:
                steps.append(lambda life=life: self._enter(life))
            elif life.phase is Phase.DEPARTING:
                steps.append(lambda life=life: self._depart(life))
        steps += [self._deliver] * min(len(self._network), 4)
        steps += [self._notice] * bool(self._unnoticed)
        if not steps:
            return False
        self.chance.choice(steps)()
        return True

    def leave(self) -> None:
        """A member leaves; or a newcomer gives up, which is the same."""
        running = [life for life in self.lives.values() if life.phase in (Phase.ANNOUNCING, Phase.MEMBER)]
        if running:
            life = self.chance.choice(running)
            life.phase, life.read = Phase.DEPARTING, None

    def kill(self) -> None:
        """Some process dies, whatever it was doing."""
        living = [life for life in self.lives.values() if life.phase in (Phase.ENTERING, *RUNNING)]
        if living:
            victim = self.chance.choice(living)
            victim.phase = Phase.DEAD
            for life in self.lives.values():
                if life.phase in RUNNING and life.links.get(victim.record.worker_id) == victim.record.incarnation:
                    self._unnoticed.append((life.record.incarnation, victim.record))

    def give_up_leaving(self) -> None:
        """The time is up for those who leave and wait for answers that cannot reach them any more, since another has their id."""
        for life in self.lives.values():
            if life.phase is Phase.LEAVING:
                life.phase = Phase.OVER

    # The store.

    def _exchange(self, expected: Directory, desired: Directory) -> bool:
        if self.directory.to_text() != expected.to_text():
            return False
        self.directory = Directory.from_text(desired.to_text())
        return True

    def _enter(self, life: Life) -> None:
        if life.read is None:
            life.read = self.directory
            return
        dead = {r.incarnation for r in life.read.rivals(life.record) if self.lives[r.incarnation].phase is Phase.DEAD}
        try:
            wanted, admitted = life.read.admit(life.record, dead)
        except InvalidOptionError:
            life.phase = Phase.REFUSED
            return
        if not self._exchange(life.read, wanted):
            life.read = self.directory
            return
        life.record, life.phase = admitted, Phase.ANNOUNCING
        life.view = Membership(admitted.worker_id)
        for record in (admitted, *wanted.records[:-1]):
            self._handle(life, ev.Joined(record))
        self._handle(life, ev.AnnouncementBegun(Announcement.JOIN, Phase.MEMBER))

    def _depart(self, life: Life) -> None:
        if life.read is None:
            life.read = self.directory
            return
        wanted = life.read.remove(life.record.incarnation)
        if wanted is not life.read and not self._exchange(life.read, wanted):
            life.read = self.directory
            return
        life.phase = Phase.LEAVING
        for record in wanted.records:
            self._handle(life, ev.Joined(record))
        self._handle(life, ev.AnnouncementBegun(Announcement.LEAVE, Phase.OVER))

    # The network.

    def _send(self, to: int, kind: str, source: PeerRecord) -> None:
        self._network += [_Message(to, kind, source)] * self.chance.choice([1, 1, 2])

    def _deliver(self) -> None:
        message = self._network.pop(self.chance.randrange(len(self._network)))
        life = self.lives[message.to]
        if life.phase not in RUNNING:
            return
        source = message.source
        match message.kind:
            case "join":
                self._handle(life, ev.Joined(source))
                self._answer(life, source, "joined")
            case "leave":
                self._handle(life, ev.SaidGoodbye(source.worker_id, source.incarnation, "shutdown", source))
            case "joined":
                self._handle(life, ev.AnnouncementAnswered(Announcement.JOIN, source.worker_id, source.incarnation))
            case "left":
                self._handle(life, ev.AnnouncementAnswered(Announcement.LEAVE, source.worker_id, source.incarnation))

    def _answer(self, life: Life, to: PeerRecord, kind: str) -> None:
        if life.links.get(to.worker_id) == to.incarnation:
            self._send(to.incarnation, kind, life.record)

    def _notice(self) -> None:
        observer, dead = self._unnoticed.pop(self.chance.randrange(len(self._unnoticed)))
        life = self.lives[observer]
        if life.phase in RUNNING:
            self._handle(life, ev.Lost(dead.worker_id, dead.incarnation, "killed"))
            # What `Admission.forget` does.
            self.directory = self.directory.remove(dead.incarnation)

    def _handle(self, life: Life, event: ev.Event) -> None:
        for instruction in life.view.handle(event, 0.0):
            match instruction:
                case ev.Connect(record=record):
                    life.links[record.worker_id] = record.incarnation
                    if self.lives[record.incarnation].phase is Phase.DEAD:
                        self._unnoticed.append((life.record.incarnation, record))
                case ev.Disconnect(worker_id=worker_id, incarnation=incarnation):
                    if life.links.get(worker_id) == incarnation:
                        del life.links[worker_id]
                case ev.SendAnnouncement(what=what, to=to):
                    self._send(to.incarnation, what.value, life.record)
                case ev.Acknowledge(token=PeerRecord() as source):
                    self._answer(life, source, "left")
                case ev.AnnouncementEnded(token=Phase.MEMBER):
                    life.phase = Phase.MEMBER if life.phase is Phase.ANNOUNCING else life.phase
                case ev.AnnouncementEnded():
                    life.phase = Phase.OVER
                case ev.WorkerCame(record=record):
                    life.was_told_of.append(f"+{record.incarnation}")
                case ev.WorkerGone(record=record):
                    life.was_told_of.append(f"-{record.incarnation}")

    # What must hold.

    def check(self) -> None:
        """At every moment: members know each other, nobody takes a living member for gone, no name stands for two."""
        members = [life for life in self.lives.values() if life.phase is Phase.MEMBER]
        for life in members:
            present = life.present()
            missing = [other.record for other in members if other.record.incarnation not in present]
            assert not missing, f"{life.record} does not know {missing}"
            names = [member.record.name for member in life.view.members if not member.state.is_gone]
            assert len(set(names)) == len(names), f"{life.record} sees a name twice: {names}"
        for life in self.lives.values():
            assert len(set(life.was_told_of)) == len(life.was_told_of), f"{life.record} was told twice: {life.was_told_of}"

    def check_at_rest(self) -> None:
        """When nothing is under way: every join is over, and all see the same members, as does the store."""
        members = {life.record.incarnation for life in self.lives.values() if life.phase is Phase.MEMBER}
        waiting = [life.record for life in self.lives.values() if life.phase in (Phase.ENTERING, Phase.ANNOUNCING)]
        assert not waiting, f"still joining: {waiting}"
        listed = {record.incarnation for record in self.directory.records}
        dead = {incarnation for incarnation, life in self.lives.items() if life.phase is Phase.DEAD}
        # One that died when nobody was there to notice is found dead by the next that comes.
        assert listed - dead == members
        assert not members or listed == members, f"{listed - members} died, and everybody knows"
        for incarnation in members:
            assert self.lives[incarnation].present() == members
