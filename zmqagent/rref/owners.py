"""The owner's half of the RRef protocol: which RRefs this worker owns, and which forks of them live elsewhere.

Pure. To the owner a fork is unknown, known, or deleted. A value is kept while a fork is known, or while somebody waits for the
value of an RRef whose ``remote`` call has not arrived yet. Deleted forks are remembered for a while, since a copy of an older
message may still be on its way and must not bring them back to life.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from zmqagent.exceptions import RpcError, RRefCreationError, RRefUsageError, WorkerLostError
from zmqagent.rref.events import (
    FailOwner,
    ForkRequested,
    Instruction,
    MintedFork,
    OwnerCreated,
    OwnerFetched,
    OwnerForked,
    OwnerUnpickled,
    Refuse,
    Release,
    SelfRemoteEnded,
    Send,
    UserDeleted,
)
from zmqagent.wire.commands import RRefChildAccept
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = ["CREATION_TIMED_OUT", "MESSAGE_LIFETIME", "OwnerLedger", "Tombstones"]

CREATION_TIMED_OUT = (
    "RRef creation via rpc.remote() timed out, and it is possible that the RRef on the owner node does not exist."
)
"""torch's text for an RRef whose ``remote`` call got no answer in time."""

MESSAGE_LIFETIME = 120.0
"""Seconds for which a copy of a message may still turn up: the retries of one control message span 13 s, the rest is margin."""

_MOST_TOMBSTONES = 100_000
"""At the highest rate one worker reaches (about 7,000 calls a second) this many deletions still span a message's retries."""


class Tombstones:
    """Keys that are gone, each remembered for ``lifetime`` seconds, and never more than ``capacity`` of them."""

    def __init__(self, lifetime: float = MESSAGE_LIFETIME, capacity: int = _MOST_TOMBSTONES) -> None:
        self._lifetime = lifetime
        self._capacity = capacity
        self._ends: dict[Hashable, float] = {}  # in the order of insertion, hence of expiry

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ends

    def add(self, key: Hashable, now: float) -> None:
        """Remembers ``key`` from ``now`` on, and forgets what is due."""
        self._ends.pop(key, None)
        self._ends[key] = now + self._lifetime
        self.expire(now)
        if len(self._ends) > self._capacity:
            del self._ends[next(iter(self._ends))]

    def discard(self, key: Hashable) -> None:
        """Forgets ``key``."""
        self._ends.pop(key, None)

    def expire(self, now: float) -> None:
        """Forgets what is older than its lifetime."""
        while self._ends:
            oldest = next(iter(self._ends))
            if self._ends[oldest] > now:
                return
            del self._ends[oldest]


@dataclass(slots=True)
class _Fork:
    holder: WorkerId | None  # None: pickled, but not known yet for whom
    requested: bool = False  # came by RREF_FORK_REQUEST, of which copies may follow


@dataclass(slots=True)
class _Record:
    owner: object = None
    created: bool = False
    awaited: bool = False  # somebody waits for the creation; ends by the creation or by `abandoned`
    abandoned: bool = False  # the creator gave up on its remote(), or died: the creation need not come any more
    forks: dict[ForkId, _Fork] = field(default_factory=dict)


class OwnerLedger:
    """The RRefs that worker ``worker_id`` owns. ``lost`` is the protocol's set of dead workers, shared and read only here."""

    def __init__(self, worker_id: WorkerId, lost: set[WorkerId]) -> None:
        self._worker_id = worker_id
        self._lost = lost
        self._records: dict[RRefId, _Record] = {}
        self._deleted_forks = Tombstones()
        self._gone = Tombstones()  # RRefs whose last fork died; only for quick and clear errors

    # ---------------------------------------------------------------------------------------------------------- queries

    @property
    def owner_count(self) -> int:
        """RRefs that exist and are kept for their forks."""
        return sum(record.created for record in self._records.values())

    @property
    def fork_count(self) -> int:
        """Known forks of all RRefs."""
        return sum(len(record.forks) for record in self._records.values())

    def forks(self) -> list[MintedFork]:
        """All known forks."""
        return [MintedFork(rref_id, fork_id) for rref_id, record in self._records.items() for fork_id in record.forks]

    def keeps(self, rref_id: RRefId) -> bool:
        """Whether the RRef is kept for somebody."""
        return rref_id in self._records

    # ----------------------------------------------------------------------------------------------------------- events

    def forked(self, event: OwnerForked, now: float) -> list[Instruction]:
        """Registers the fork while it is pickled, so that no control message is needed for it."""
        record = self._record(event.rref_id, event.owner)
        record.created = record.created or event.created
        record.forks[event.fork_id] = _Fork(holder=None)
        self._gone.discard(event.rref_id)
        return []

    def created(self, event: OwnerCreated, now: float) -> list[Instruction]:
        """The ``remote`` call is here: the creator's fork becomes known, unless it was deleted meanwhile."""
        if event.rref_id not in self._records and event.rref_id in self._gone:
            return []
        record = self._record(event.rref_id, event.owner)
        first_time = not record.created
        record.created = True
        record.awaited = False
        # A call to oneself registered its fork when it was made; if that is gone, the caller has given up on the call.
        to_itself = tuple(event.fork_id) == tuple(event.rref_id)
        if first_time and not to_itself and event.fork_id not in self._deleted_forks and event.source not in self._lost:
            record.forks[event.fork_id] = _Fork(holder=event.source)
        return self._settle(event.rref_id, record, now)

    def fetched(self, event: OwnerFetched, now: float) -> list[Instruction]:
        """Keeps a place for the value if the ``remote`` call is still on its way."""
        return [] if event.created else self._await(event.rref_id, event.owner)

    def unpickled(self, event: OwnerUnpickled, now: float) -> list[Instruction]:
        """The owner got its own RRef: the fork id is a phantom that no user will ever hold."""
        instructions = [] if event.created else self._await(event.rref_id, event.owner)
        if event.parent == self._worker_id:
            return instructions + self.deleted(UserDeleted(event.rref_id, event.fork_id), now)
        # Even a refused RRef frees its parent, which would wait forever otherwise.
        return [*instructions, Send(event.parent, RRefChildAccept(event.fork_id))]

    def requested(self, event: ForkRequested, now: float) -> list[Instruction]:
        """A new user; copies of the request, also those that come after the user's deletion, change nothing."""
        record = self._records.get(event.rref_id)
        if event.fork_id in self._deleted_forks or (record is not None and event.fork_id in record.forks):
            return []
        if event.source in self._lost:
            return [Refuse(WorkerLostError(f"worker {event.source} was declared dead before it asked for a share in an RRef"))]
        if record is None and event.rref_id in self._gone:
            return [Refuse(self._gone_error(event.rref_id))]
        record = self._record(event.rref_id)
        record.forks[event.fork_id] = _Fork(holder=event.source, requested=True)
        return []

    def deleted(self, event: UserDeleted, now: float) -> list[Instruction]:
        """A user died (G1)."""
        record = self._records.get(event.rref_id)
        if record is not None and event.fork_id in record.forks:
            if record.forks.pop(event.fork_id).requested:
                self._deleted_forks.add(event.fork_id, now)
            return self._settle(event.rref_id, record, now)
        if event.fork_id.created_on == self._worker_id or event.fork_id in self._deleted_forks:
            return []  # a second copy
        self._deleted_forks.add(event.fork_id, now)
        if record is not None and record.created:
            return []
        # Users delete a fork only when the owner has answered for it, with one exception: a creator whose remote() failed.
        if record is None:
            self._gone.add(event.rref_id, now)
            return []
        return self._abandon(event.rref_id, record, RRefCreationError(CREATION_TIMED_OUT), now)

    def self_remote_ended(self, event: SelfRemoteEnded, now: float) -> list[Instruction]:
        """The fork that kept the value during a call to oneself has done its work."""
        record = self._records.get(event.rref_id)
        failures: list[Instruction] = []
        if record is not None and event.error is not None:
            failures.append(FailOwner(record.owner, event.error))
        return failures + self.deleted(UserDeleted(event.rref_id, ForkId(*event.rref_id)), now)

    def sent(self, fork: MintedFork, to: WorkerId, now: float) -> list[Instruction]:
        """Notes who holds ``fork``, so that the holder's death ends it."""
        record = self._records.get(fork.rref_id)
        if record is None or fork.fork_id not in record.forks:
            return []
        if to in self._lost:
            return self.deleted(UserDeleted(*fork), now)
        record.forks[fork.fork_id].holder = to
        return []

    def cancelled(self, fork: MintedFork, now: float) -> list[Instruction]:
        """``fork`` never left this worker."""
        return self.deleted(UserDeleted(*fork), now)

    def lost(self, worker: WorkerId, error: RpcError, now: float) -> list[Instruction]:
        """Drops the forks that ``worker`` held, and the hope for what it was about to create."""
        instructions: list[Instruction] = []
        for rref_id, record in list(self._records.items()):
            for fork_id in [fork_id for fork_id, fork in record.forks.items() if fork.holder == worker]:
                del record.forks[fork_id]
            if rref_id.created_on == worker and not record.created:
                instructions += self._abandon(rref_id, record, error, now)
            else:
                instructions += self._settle(rref_id, record, now)
        return instructions

    def close(self, error: RpcError) -> list[Instruction]:
        """Lets everything go; who waits for a value that has not even been created gets ``error``."""
        records, self._records = self._records, {}
        failures = [FailOwner(record.owner, error) for record in records.values() if record.awaited]
        return [*failures, *(Release(record.owner) for record in records.values())]

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _record(self, rref_id: RRefId, owner: object = None) -> _Record:
        record = self._records.setdefault(rref_id, _Record())
        if owner is not None:
            record.owner = owner
        return record

    def _await(self, rref_id: RRefId, owner: object) -> list[Instruction]:
        record = self._records.get(rref_id)
        if record is None and rref_id in self._gone:
            return [Refuse(self._gone_error(rref_id))]
        if record is not None and record.abandoned:
            return [Refuse(RRefCreationError(CREATION_TIMED_OUT))]
        self._record(rref_id, owner).awaited = True
        return []

    def _abandon(self, rref_id: RRefId, record: _Record, error: RpcError, now: float) -> list[Instruction]:
        failures: list[Instruction] = [FailOwner(record.owner, error)] if record.awaited else []
        record.abandoned = True
        record.awaited = False
        return failures + self._settle(rref_id, record, now)

    def _settle(self, rref_id: RRefId, record: _Record, now: float) -> list[Instruction]:
        if record.forks or record.awaited:
            return []
        del self._records[rref_id]
        if record.created or record.abandoned:
            self._gone.add(rref_id, now)
        return [Release(record.owner)]

    def _gone_error(self, rref_id: RRefId) -> RRefUsageError:
        return RRefUsageError(
            f"OwnerRRef(rref_id={rref_id}) on worker {self._worker_id} has been deleted: all its users were dropped, or the "
            "workers that held them died. Keep an RRef to it for as long as its value is needed."
        )
