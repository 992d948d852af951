"""How the workers of a dynamic group find each other: the directory that the store of ``init_rpc`` keeps for them.

Nobody waits for anybody here. A join and a departure are one compare-and-set each, repeated if another came in between; since
somebody always succeeds, no worker that fails or dies holds up the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist

from zmqagent.agent.directory import Directory
from zmqagent.exceptions import RendezvousError
from zmqagent.transport.base import PeerRecord

__all__ = ["MIXED", "Roster", "Store", "check_dynamic", "check_static", "directory_store"]

MIXED = (
    "RPC group mixes statically and dynamically initialized members which is not supported. Static group size is given by "
    "world_size: give it to all workers, or to none."
)
"""torch's text, and what to do."""

_logger = logging.getLogger(__name__)

_DIRECTORY = "zmqagent/directory"
_STATIC = "zmqagent/static"
"""Set by workers of static groups, where dynamic ones look for it."""


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Roster:
    """One worker's access to the directory. All methods may be called from any thread.

    Args:
        store: the store that all workers of the group, and no other group, reach.
        timeout: seconds that `enter` may take; 0 for no limit.
        has_ended: tells whether the process behind a record has.
    """

    def __init__(self, store: Store, timeout: float, has_ended: Callable[[PeerRecord], bool]) -> None:
        self._store = store
        self._timeout = timeout
        self._has_ended = has_ended

    def enter(self, newcomer: PeerRecord) -> tuple[PeerRecord, tuple[PeerRecord, ...]]:
        """Puts ``newcomer`` into the directory. A former member of its name or id has to have left, or to have ended.

        Returns:
            its record, complete with its place in the order of joins and with an id; and the members that joined before it.

        Raises:
            InvalidOptionError: its name or id is illegal, or a living member has it.
            RendezvousError: the store cannot be reached, or so many others joined meanwhile that the time was up.
        """
        deadline = time.monotonic() + self._timeout if self._timeout else float("inf")
        gone: set[int] = set()
        present = self._read()
        while True:
            gone |= {rival.incarnation for rival in present.rivals(newcomer) if self._has_ended(rival)}
            wanted, admitted = present.admit(newcomer, gone)
            found = self._exchange(present, wanted)
            if found == wanted:
                return admitted, wanted.records[:-1]
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"worker {newcomer.name!r} could not join within {self._timeout:g} s: others kept joining and leaving. Give "
                    "it more time with rpc_timeout."
                )
            present = found

    def remove(self, incarnation: int) -> tuple[PeerRecord, ...]:
        """Takes a member out of the directory, if it is there, and returns those who are left: nobody who joins later knows it.

        If the store cannot be reached any more, this is logged and nobody is returned: nobody can join any more either.
        """
        try:
            present = self._read()
            while (wanted := present.remove(incarnation)) is not present:
                found = self._exchange(present, wanted)
                present = wanted if found == wanted else found
        except RendezvousError as error:
            _logger.warning("a worker that is gone could not be taken out of the list of workers: %s", error)
            return ()
        return present.records

    def _read(self) -> Directory:
        # An exchange that changes nothing; unlike `get` it does not wait for the key.
        return self._exchange(Directory(), Directory())

    def _exchange(self, expected: Directory, desired: Directory) -> Directory:
        """Puts ``desired`` in the place of ``expected``; returns what is there afterwards."""
        return _exchange(self._store, expected, desired)


def directory_store(store: dist.Store) -> dist.Store:
    """The part of ``init_rpc``'s store that all workers of a group reach.

    torch adds a prefix that counts the calls of ``init_rpc`` in each process: one that comes back, or that was in another group
    before, would look for the others in vain.
    """
    return store.underlying_store if isinstance(store, dist.PrefixStore) else store


def check_dynamic(store: dist.Store) -> None:
    """For a worker without ``world_size``: raises `RendezvousError` if the group is static."""
    if store.check([_STATIC]):
        raise RendezvousError(MIXED)


def check_static(store: dist.Store, has_ended: Callable[[PeerRecord], bool]) -> None:
    """For a worker with ``world_size``: raises `RendezvousError` if the group is dynamic; otherwise it is static from now on."""
    store.set(_STATIC, "1")
    directory = _exchange(directory_store(store), Directory(), Directory())
    if not all(has_ended(record) for record in directory.records):
        raise RendezvousError(MIXED)


def _exchange(store: Store, expected: Directory, desired: Directory) -> Directory:
    try:
        text = store.compare_set(_DIRECTORY, expected.to_text(), desired.to_text())
    except (RuntimeError, OSError) as error:
        # torch appends the stack in C++.
        reason = str(error).partition("\n")[0]
        raise RendezvousError(
            f"the store at which the workers meet cannot be reached any more: {reason} The process that hosts it (rank 0, with "
            "tcp:// and env://) has to live for as long as workers are to join."
        ) from error
    return Directory.from_text(text.decode())
