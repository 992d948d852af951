"""What is true of a simulated group and its RRefs, and an observer who compares it with what the machines believe."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from zmqagent.exceptions import RpcError
from zmqagent.rref import events as ev
from zmqagent.rref.protocol import Counts, RRefProtocol
from zmqagent.transport.inproc import InprocTransport
from zmqagent.wire.commands import RRefUserDelete
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = ["Done", "Handle", "Observer", "Owner", "Request", "User", "Worker"]

Done = Callable[[Any, "RpcError | None"], None]


class Observer:
    """Sees all workers at once."""

    def __init__(self) -> None:
        self.deaths = False
        self.live_users: dict[RRefId, set[ForkId]] = defaultdict(set)
        self.in_flight: dict[RRefId, set[ForkId]] = defaultdict(set)
        self.parent: dict[ForkId, ForkId] = {}
        self.children: dict[ForkId, set[ForkId]] = defaultdict(set)  # minted, not cancelled
        self.known: set[ForkId] = set()  # the owner has (or had) heard of it
        self.deleted: set[ForkId] = set()  # the owner has heard of its end
        self.ever_users: set[ForkId] = set()
        self.created: set[RRefId] = set()
        self.given_up: set[RRefId] = set()  # their remote() failed
        self.cancelled: set[ForkId] = set()
        self.owner_of: dict[RRefId, WorkerId] = {}
        self.workers: dict[WorkerId, Worker] = {}

    def _note_what_the_owner_knows(self, event: ev.Event) -> None:
        match event:
            case ev.OwnerForked() | ev.ForkRequested():
                self.known.add(event.fork_id)
            case ev.OwnerCreated():
                self.known.add(event.fork_id)
                self.created.add(event.rref_id)
            case ev.UserDeleted():
                self.deleted.add(event.fork_id)
            case _:
                pass

    def _check_send(self, sent: ev.Send) -> None:
        """A user's last word must come late enough."""
        command = sent.command
        if self.deaths or not isinstance(command, RRefUserDelete):
            return
        unknown = self.children[command.fork_id] - self.known
        assert not unknown, f"G2: {command} is sent before the owner knows of {unknown}"
        excused = command.rref_id in self.given_up or command.fork_id in self.cancelled
        assert excused or command.fork_id in self.known, f"{command} is sent before its confirmation"

    def _excuse(self, excused: bool, error: RpcError) -> None:
        """A refusal is right only if somebody died, gave up, or has not unpickled what it was sent."""
        assert excused, f"a living RRef was refused: {error}"

    def check(self) -> None:
        """While a user lives, or is on its way, the owner keeps the value."""
        if self.deaths:
            return
        for rref_id in self.created:
            if self.live_users[rref_id] or self.in_flight[rref_id]:
                keeps = self.workers[self.owner_of[rref_id]].protocol.keeps(rref_id)
                assert keeps, f"the owner dropped {rref_id} while {self.live_users[rref_id] | self.in_flight[rref_id]} live"

    def under_way(self) -> list[str]:
        """The calls without an answer, and what is left on each worker."""
        left = [f"worker{w.id}: {w.protocol.counts}, {w.running} running" for w in self.workers.values()]
        calls = [(*pickle.loads(r.frame)[1:], r.to) for w in self.workers.values() for r in w.requests.values()]
        return left + [str(call) for call in calls]

    def check_drained(self) -> None:
        """At the end nothing is left anywhere, and the owners have heard of every user's end (G1)."""
        for worker in self.workers.values():
            if worker.alive:
                counts = worker.protocol.counts
                assert counts == Counts(0, 0, 0, 0, 0, 0), f"worker{worker.id} is left with {counts}, {worker.protocol.leaks()}"
                assert worker.running == 0, f"worker{worker.id}: {worker.running} functions or fetches never went on"
                assert not worker.requests, f"worker{worker.id}: calls without an answer"
        if not self.deaths:
            assert self.ever_users <= self.deleted, f"G1: no owner heard of the end of {self.ever_users - self.deleted}"


class Owner:
    """A value, or the place for one: a list of the handles that the value contains."""

    def __init__(self, rref_id: RRefId) -> None:
        self.rref_id = rref_id
        self.created = False
        self.outcome: tuple[list[Handle] | None, RpcError | None] | None = None
        self.waiting: list[Callable[[list[Handle] | None, RpcError | None], None]] = []

    def finish(self, value: list[Handle] | None, error: RpcError | None) -> None:
        if self.outcome is None:
            self.outcome = (value, error)
            waiting, self.waiting = self.waiting, []
            for callback in waiting:
                callback(value, error)

    def when_ready(self, callback: Callable[[list[Handle] | None, RpcError | None], None]) -> None:
        if self.outcome is None:
            self.waiting.append(callback)
        else:
            callback(*self.outcome)


@dataclass(eq=False)
class User:
    """A share in another worker's RRef; its end leaves a note."""

    observer: Observer
    at: WorkerId
    owner: WorkerId
    rref_id: RRefId
    fork_id: ForkId

    def __post_init__(self) -> None:
        self.observer.live_users[self.rref_id].add(self.fork_id)
        self.observer.ever_users.add(self.fork_id)

    def __del__(self) -> None:
        self.observer.live_users[self.rref_id].discard(self.fork_id)
        self.observer.workers[self.at].notes.append(self.fork_id)


Handle = Owner | User


@dataclass
class Request:
    """A message that is sent until it is answered."""

    to: WorkerId
    frame: bytes
    done: Done
    tries_left: int | None
    pause: float = 0.4  # longer than most round trips, so that copies stay within reason


@dataclass
class Worker:
    """One member of the group."""

    id: WorkerId
    transport: InprocTransport
    protocol: RRefProtocol
    held: list[Handle] = field(default_factory=list)
    notes: list[ForkId] = field(default_factory=list)
    owners: WeakValueDictionary[RRefId, Owner] = field(default_factory=WeakValueDictionary)
    requests: dict[int, Request] = field(default_factory=dict)
    answers: dict[tuple[WorkerId, int], bytes | None] = field(default_factory=dict)
    running: int = 0  # user functions that wait for confirmations, or run
    next_request: int = 0
    alive: bool = True

    def owner(self, rref_id: RRefId) -> Owner:
        found = self.owners.get(rref_id)
        if found is None:
            found = self.owners[rref_id] = Owner(rref_id)
        return found
