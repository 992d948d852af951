"""How the workers of a static group find each other: through the store that ``init_rpc`` hands over.

Every worker publishes a card under its rank and reads the cards of all others. A worker that cannot join publishes why, so that
the others fail at once with the cause instead of waiting for their timeout. Nothing here is used once the group stands.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Protocol

import msgpack

from zmqagent.exceptions import RendezvousError
from zmqagent.transport.base import PeerRecord

__all__ = ["Rendezvous", "Store"]

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.05


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


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
        """Publishes this worker's host identity and returns everyone's, by rank."""
        return [card["host"] for card in self._exchange("host", {"host": host})]

    def records(self, record: PeerRecord) -> list[PeerRecord]:
        """Publishes this worker's record and returns everyone's, by rank."""
        return [
            PeerRecord(**{**card, "addresses": tuple(card["addresses"])}) for card in self._exchange("record", asdict(record))
        ]

    def refuse(self, error: Exception) -> None:
        """Tells the others that this worker cannot join, and why."""
        text = f"{type(error).__name__}: {error}"
        # Whoever has not got that far yet finds the reason in the first card it reads.
        for stage in ("host", "record"):
            if not self._store.check([self._key(stage, self._rank)]):
                self._publish(stage, {"error": text, "name": self._name})

    def _key(self, stage: str, rank: int) -> str:
        return f"zmqagent/{stage}/{rank}"

    def _publish(self, stage: str, card: dict[str, object]) -> None:
        # torch's stores take text only; hexadecimal is safe in all of them.
        self._store.set(self._key(stage, self._rank), msgpack.packb(card).hex())

    def _exchange(self, stage: str, values: dict[str, Any]) -> list[dict[str, Any]]:
        self._publish(stage, {"values": values, "name": self._name})
        return [self._card(stage, rank) for rank in range(self._world_size)]

    def _card(self, stage: str, rank: int) -> dict[str, Any]:
        self._wait(stage, rank)
        card = msgpack.unpackb(bytes.fromhex(self._store.get(self._key(stage, rank)).decode()))
        if "error" in card:
            raise RendezvousError(f"worker {card['name']!r} (rank {rank}) could not join the group: {card['error']}")
        return card["values"]  # type: ignore[no-any-return]

    def _wait(self, stage: str, rank: int) -> None:
        """Waits for one worker's card. The store's own wait would not see ^C, so this asks again and again, ever more slowly."""
        pause = _FIRST_PAUSE
        while not self._store.check([self._key(stage, rank)]):
            if time.monotonic() > self._deadline:
                raise RendezvousError(self._missing(stage))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _missing(self, stage: str) -> str:
        ranks = [rank for rank in range(self._world_size) if not self._store.check([self._key(stage, rank)])]
        return (
            f"worker {self._name!r} (rank {self._rank}) waited {self._timeout:g} s in init_rpc, and of {self._world_size} workers "
            f"those with rank {', '.join(map(str, ranks))} did not come. Check that they were started, with the same init_method and "
            "world_size, or give them more time with rpc_timeout."
        )
