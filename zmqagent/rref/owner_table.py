"""The `OwnerRRef` objects of one worker: one for each id, for as long as anybody needs it."""

from __future__ import annotations

from weakref import WeakValueDictionary

from zmqagent.rref.rref import OwnerRRef
from zmqagent.rref.shell import ProtocolShell
from zmqagent.wire.types import RRefId, WorkerId

__all__ = ["OwnerTable"]


class OwnerTable:
    """Finds them by id."""

    def __init__(self, worker_id: WorkerId, shell: ProtocolShell) -> None:
        self._me = worker_id
        self._shell = shell
        # Every one that anybody refers to, so that one id never has two of them. Protected by the shell's lock.
        self._all: WeakValueDictionary[RRefId, OwnerRRef] = WeakValueDictionary()
        # Those whose function still runs: fetches that wait for the value must not lose it when the last user goes.
        # Changed in single steps of the interpreter.
        self._running: dict[RRefId, OwnerRRef] = {}

    def get(self, rref_id: RRefId, *, created: bool) -> OwnerRRef:
        """The one of ``rref_id``, made if need be. The caller holds the lock."""
        owner = self._all.get(rref_id)
        if owner is None:
            owner = self._all[rref_id] = OwnerRRef(self._me, rref_id, created=created)
        owner.created = owner.created or created
        return owner

    def keep_while_running(self, owner: OwnerRRef) -> None:
        """Keeps ``owner`` until it has a value or an error."""
        self._running[owner.rref_id] = owner
        owner.add_callback(self._forget_running)

    def let_go(self) -> list[OwnerRRef]:
        """Keeps none any more, and returns all there are."""
        with self._shell.locked():
            self._running.clear()
            return list(self._all.values())

    def _forget_running(self, owner: OwnerRRef) -> None:
        self._running.pop(owner.rref_id, None)
