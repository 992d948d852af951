"""What the contract's tests need of any transport: workers with a record, and a factory for each kind.

A new kind of transport adds its factory to `KINDS` and so takes the whole suite.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from zmqagent.transport import poller
from zmqagent.transport.base import Event, PeerRecord, PeerUp, Received, Transport
from zmqagent.transport.hosts import describe_self
from zmqagent.transport.sockets import SocketTransport
from zmqagent.wire.types import WorkerId

PATIENCE = 30.0
"""Seconds after which a test gives up; nothing is meant to come near it."""

TICK = 0.01
"""Seconds between two looks at what time brings."""

SHARED_MEMORY = 16 << 20
"""Bytes that a worker of kind "local" lends."""

_incarnations = itertools.count(1)


@dataclass
class Worker:
    """A transport together with what its peers know of it."""

    transport: Transport
    record: PeerRecord
    events: deque[Event] = field(default_factory=deque)
    """What came in together with something earlier, and has not been looked at yet."""

    @property
    def id(self) -> WorkerId:
        return self.record.worker_id

    def event(self, patience: float = PATIENCE) -> Event:
        """The next event, whatever it is."""
        deadline = time.monotonic() + patience
        while not self.events and (left := deadline - time.monotonic()) > 0:
            self.events += self.transport.receive(min(left, TICK))
            self.events += self.transport.check()
        if self.events:
            return self.events.popleft()
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


def _local(incarnation: int) -> Transport:
    return SocketTransport(local=True, incarnation=incarnation, shared_memory=SHARED_MEMORY)


def _local_by_turns(incarnation: int) -> Transport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(poller, "READINESS", poller.Turns)
        return SocketTransport(local=True, incarnation=incarnation)


def _ipc(incarnation: int) -> Transport:
    return SocketTransport(ipc=True, incarnation=incarnation)


def _tcp(incarnation: int) -> Transport:
    return SocketTransport(tcp_host="127.0.0.1", incarnation=incarnation)


KINDS: dict[str, Callable[[int], Transport]] = {
    "local": _local,
    "local without epoll": _local_by_turns,
    "ipc": _ipc,
    "tcp": _tcp,
}


def start(kind: str, worker_id: int) -> Worker:
    """A fresh worker of this process."""
    incarnation = next(_incarnations)
    transport = KINDS[kind](incarnation)
    record = describe_self(f"worker{worker_id}", WorkerId(worker_id), incarnation, transport.addresses)
    return Worker(transport, record)


@contextmanager
def receiving(worker: Worker) -> Iterator[None]:
    """Meanwhile somebody receives for ``worker``, as always in an agent, so that what it sends goes out; its events are kept."""
    done = threading.Event()

    def receive() -> None:
        while not done.is_set():
            worker.events += worker.transport.receive(None)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        yield
    finally:
        done.set()
        worker.transport.wake()
        thread.join(PATIENCE)


def introduce(*workers: Worker) -> None:
    """Connects each worker to every other."""
    for a, b in itertools.permutations(workers, 2):
        a.transport.connect(b.record)
