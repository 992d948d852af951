"""Who is in a dynamic group, as the group's store knows it: one immutable value, which is exchanged as a whole.

Pure. Whoever joins or leaves makes a new value out of the present one and puts it in its place by one compare-and-set. So there
is no lock that a process could take to its grave, and no half of a join: a worker is in the directory or it is not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import msgpack

from zmqagent.agent.checks import MAX_WORKER_ID, check_group
from zmqagent.exceptions import InvalidOptionError, RendezvousError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["UNDRAWN", "Directory"]

UNDRAWN = WorkerId(-1)
"""The id of a newcomer that is to be given one."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The members of a group, in the order in which they joined.

    ``changes`` counts all changes ever made, so that no value comes twice: a compare-and-set never takes a later value for the
    one it has read. ``next_id`` is greater than every id that a member ever had.
    """

    changes: int = 0
    next_id: int = 0
    records: tuple[PeerRecord, ...] = ()

    def rivals(self, newcomer: PeerRecord) -> tuple[PeerRecord, ...]:
        """The members that stand in ``newcomer``'s way: those of its name or its id."""
        return tuple(r for r in self.records if newcomer.name == r.name or newcomer.worker_id == r.worker_id)

    def admit(self, newcomer: PeerRecord, gone: Collection[int] = ()) -> tuple[Directory, PeerRecord]:
        """The directory with ``newcomer`` in it, and its record as it stands there: with its place in the order of all joins, and
        with an id if it came `UNDRAWN`. Members whose incarnation is in ``gone`` have died, and are left out.

        Raises:
            InvalidOptionError: its name or id is illegal, or a member has it.
        """
        records = tuple(record for record in self.records if record.incarnation not in gone)
        worker_id = self._draw(records) if newcomer.worker_id == UNDRAWN else newcomer.worker_id
        admitted = replace(newcomer, worker_id=worker_id, ordinal=self.changes + 1)
        check_group([*records, admitted])
        return Directory(self.changes + 1, max(self.next_id, worker_id + 1), (*records, admitted)), admitted

    def remove(self, incarnation: int) -> Directory:
        """The directory without one member; the same one if it is not there."""
        records = tuple(record for record in self.records if record.incarnation != incarnation)
        return self if records == self.records else Directory(self.changes + 1, self.next_id, records)

    def _draw(self, records: Collection[PeerRecord]) -> WorkerId:
        """An id that nobody ever had, as long as there are any."""
        if self.next_id <= MAX_WORKER_ID:
            return WorkerId(self.next_id)
        taken = {record.worker_id for record in records}
        free = next((number for number in range(MAX_WORKER_ID + 1) if number not in taken), None)
        if free is None:
            raise InvalidOptionError(f"the group is full: it has {len(taken)} workers, and there are no more ids")
        return WorkerId(free)

    def to_text(self) -> str:
        """The form in which stores keep it; empty for the value that nothing has changed yet."""
        if not self.changes:
            return ""
        # torch's stores take text only; hexadecimal is safe in all of them.
        packed: bytes = msgpack.packb([self.changes, self.next_id, [asdict(record) for record in self.records]])
        return packed.hex()

    @classmethod
    def from_text(cls, text: str) -> Directory:
        """The value that `to_text` gave.

        Raises:
            RendezvousError: something else wrote it.
        """
        if not text:
            return cls()
        try:
            changes, next_id, cards = msgpack.unpackb(bytes.fromhex(text))
            records = tuple(PeerRecord(**{**card, "addresses": tuple(card["addresses"])}) for card in cards)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise RendezvousError(
                f"the store holds a list of workers that this version of zmqagent cannot read ({error}): have all workers use "
                "one version, or meet at another store"
            ) from error
        return cls(changes, next_id, records)
