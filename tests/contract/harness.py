"""What the contract's tests need of any transport: workers with a record, and a factory for each kind.

A new kind of transport adds its factory to `KINDS` and so takes the whole suite.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from zmqagent.transport.base import Event, PeerRecord, PeerUp, Received, Transport
from zmqagent.transport.hosts import describe_self
from zmqagent.transport.sockets import SocketTransport
from zmqagent.wire.types import WorkerId

PATIENCE = 30.0
"""Seconds after which a test gives up; nothing is meant to come near it."""

_incarnations = itertools.count(1)


@dataclass
class Worker:
    """A transport together with what its peers know of it."""

    transport: Transport
    record: PeerRecord

    @property
    def id(self) -> WorkerId:
        return self.record.worker_id

    def event(self, patience: float = PATIENCE) -> Event:
        """The next event, whatever it is."""
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            event = self.transport.receive(left)
            if event is not None:
                return event
        raise AssertionError(f"{self.record.name} received nothing within {patience} s")

    def news(self) -> Event:
        """The next event other than `PeerUp`."""
        event = self.event()
        while isinstance(event, PeerUp):
            event = self.event()
        return event

    def message(self) -> list[bytes]:
        """The frames of the next message; any event but a message and `PeerUp` is an error."""
        event = self.news()
        assert isinstance(event, Received), event
        return [bytes(frame) for frame in event.frames]


def _ipc(incarnation: int) -> Transport:
    return SocketTransport(ipc=True, tcp_host=None, incarnation=incarnation)


def _tcp(incarnation: int) -> Transport:
    return SocketTransport(ipc=False, tcp_host="127.0.0.1", incarnation=incarnation)


KINDS: dict[str, Callable[[int], Transport]] = {"ipc": _ipc, "tcp": _tcp}


def start(kind: str, worker_id: int) -> Worker:
    """A fresh worker of this process."""
    incarnation = next(_incarnations)
    transport = KINDS[kind](incarnation)
    record = describe_self(f"worker{worker_id}", WorkerId(worker_id), incarnation, transport.addresses)
    return Worker(transport, record)


def introduce(*workers: Worker) -> None:
    """Connects each worker to every other."""
    for a, b in itertools.permutations(workers, 2):
        a.transport.connect(b.record)
