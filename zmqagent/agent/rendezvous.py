"""How the workers of a static group find each other: through the store that ``init_rpc`` hands over.

Every worker claims its rank, publishes a card under it, and reads the cards of all others. A worker that cannot join publishes
why, so that the others fail at once with the cause instead of waiting for their timeout. Nothing here is used once the group
stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import msgpack

from zmqagent.exceptions import RendezvousError
from zmqagent.transport.base import PeerRecord

__all__ = ["Rendezvous", "Store"]

_logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05

_REFUSAL = "zmqagent/refusal"
"""The key of the first refusal; whoever waits for a card looks for it too."""


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...


class Rendezvous:
    """One worker's side of the exchange.

    Args:
        store: the group's store, with a prefix of this group's own.
        name, rank, world_size: of this worker and its group.
        timeout: seconds that the whole exchange may take; 0 for no limit.
    """

    def __init__(self, store: Store, name: str, rank: int, world_size: int, timeout: float) -> None:
        self._store = store
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout if timeout else float("inf")

    def hosts(self, host: str) -> list[str]:
        """Claims the rank, publishes this worker's host identity and returns everyone's, by rank.

        Raises:
            RendezvousError: the rank is taken, somebody did not come in time, or somebody could not join.
        """
        if self._store.add(f"zmqagent/rank/{self._rank}", 1) != 1:
            raise RendezvousError(
                f"worker {self._name!r} claims rank {self._rank}, which another worker of the group has claimed before it: give "
                f"each of the {self._world_size} workers a rank of its own"
            )
        return [card["host"] for card in self._exchange("host", {"host": host})]

    def records(self, record: PeerRecord) -> list[PeerRecord]:
        """Publishes this worker's record and returns everyone's, by rank.

        Raises:
            RendezvousError: somebody did not come in time, or could not join.
        """
        cards = self._exchange("record", asdict(record))
        return [PeerRecord(**{**card, "addresses": tuple(card["addresses"])}) for card in cards]

    @contextmanager
    def refusing_on_failure(self) -> Iterator[None]:
        """Whatever the body raises, be it ^C, is told to the others by `refuse`."""
        try:
            yield
        except BaseException as error:
            try:
                self.refuse(error)
            except Exception as fault:
                # The store itself may be what failed. The others learn that from theirs.
                _logger.debug("the others are not told that worker %r cannot join: %s", self._name, fault)
            raise

    def refuse(self, error: BaseException) -> None:
        """Tells the others that this worker cannot join, and why. Only the first refusal counts: others follow from it."""
        if not self._store.check([_REFUSAL]):
            text = f"{type(error).__name__}: {error}"
            self._store.set(_REFUSAL, _to_text({"rank": self._rank, "name": self._name, "error": text}))

    def _key(self, stage: str, rank: int) -> str:
        return f"zmqagent/{stage}/{rank}"

    def _exchange(self, stage: str, card: dict[str, Any]) -> list[dict[str, Any]]:
        self._store.set(self._key(stage, self._rank), _to_text(card))
        return [self._card(stage, rank) for rank in range(self._world_size)]

    def _card(self, stage: str, rank: int) -> dict[str, Any]:
        """Waits for one worker's card. The store's own wait would not see ^C, so this asks again and again, ever more slowly."""
        key = self._key(stage, rank)
        pause = _FIRST_PAUSE
        while not self._store.check([key]):
            if self._store.check([_REFUSAL]):
                refusal = _from_text(self._store.get(_REFUSAL))
                raise RendezvousError(
                    f"worker {refusal['name']!r} (rank {refusal['rank']}) could not join the group: {refusal['error']}"
                )
            if time.monotonic() > self._deadline:
                raise RendezvousError(self._missing(stage))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return _from_text(self._store.get(key))

    def _missing(self, stage: str) -> str:
        ranks = [rank for rank in range(self._world_size) if not self._store.check([self._key(stage, rank)])]
        return (
            f"worker {self._name!r} (rank {self._rank}) waited {self._timeout:g} s in init_rpc, and of {self._world_size} "
            f"workers those with rank {', '.join(map(str, ranks))} did not come. Check that they were started, with the same "
            "init_method and world_size, or give them more time with rpc_timeout."
        )


def _to_text(card: dict[str, Any]) -> str:
    # torch's stores take text only; hexadecimal is safe in all of them.
    packed: bytes = msgpack.packb(card)
    return packed.hex()


def _from_text(text: bytes) -> dict[str, Any]:
    card: dict[str, Any] = msgpack.unpackb(bytes.fromhex(text.decode()))
    return card
