"""An in-memory network with a clock of its own that loses, delays, copies and reorders messages as a seed decides.

For simulation: no threads, no sockets, no real time. The same seed and the same calls give the same events in the same order.
Time passes only by `Network.advance`, or while `InprocTransport.receive` waits; so a wait of hours takes no time, and one that
nothing can end returns at once.

    >>> network = Network(seed=1)
    >>> a, b = (network.transport(record(i)) for i in range(2))
    >>> b.connect(a.record); a.connect(b.record)
    >>> a.send(WorkerId(1), [b"hello"])
    >>> b.receive(timeout=1.0)
    (PeerUp(worker_id=0, incarnation=0),)
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zmqagent.exceptions import InvalidTypeError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import Event, Frames, PeerDown, PeerRecord, PeerUp, Received, Transport
from zmqagent.wire.types import WorkerId

__all__ = ["Faults", "InprocTransport", "Network", "record"]


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad the network is. Probabilities are per message; without ``reorder`` each link keeps its order."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    min_delay: float = 0.001
    """Seconds."""
    max_delay: float = 0.01
    """Seconds."""


_PERFECT = Faults()

_Peer = tuple[WorkerId, int]
"""A worker id and the incarnation of it."""


def record(worker_id: int, incarnation: int = 0) -> PeerRecord:
    """What a worker of such a network publishes of itself."""
    address = f"inproc://{worker_id}/{incarnation}"
    return PeerRecord(f"worker{worker_id}", WorkerId(worker_id), incarnation, "inproc", worker_id, (address,))


class Network:
    """What connects the transports made by `transport`. ``faults`` may be changed at any time."""

    def __init__(self, seed: int, faults: Faults = _PERFECT) -> None:
        self.faults = faults
        self.now = 0.0
        self._random = random.Random(seed)
        self._transports: dict[_Peer, InprocTransport] = {}
        self._cut: set[frozenset[WorkerId]] = set()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0  # orders what is due at the same time
        self._last_on_link: dict[tuple[_Peer, _Peer], float] = {}

    def transport(self, own: PeerRecord) -> InprocTransport:
        """The end of the network at which the worker ``own`` sits.

        Raises:
            ValueError: this incarnation of the worker has one already.
        """
        peer = (own.worker_id, own.incarnation)
        if peer in self._transports:
            raise ValueError(f"{own.name}, incarnation {own.incarnation}, is on this network already")
        transport = self._transports[peer] = InprocTransport(self, own)
        for other in list(self._transports.values()):
            other._greet(transport)
        return transport

    # Time.

    def next_due(self) -> float | None:
        """When the next thing happens; None if nothing is under way."""
        return self._due[0][0] if self._due else None

    def advance(self, seconds: float) -> None:
        """Lets ``seconds`` pass: all that becomes due in them arrives."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.step()
        self.now = until

    def step(self) -> bool:
        """Lets time pass until the next thing happens; False if nothing is under way."""
        if not self._due:
            return False
        self.now, _, act = heapq.heappop(self._due)
        act()
        return True

    def call_later(self, seconds: float, act: Callable[[], None]) -> None:
        """Runs ``act`` once ``seconds`` have passed: a timer on this network's clock."""
        self._schedule(self.now + seconds, act)

    # Faults made on purpose.

    def kill(self, worker_id: WorkerId, reason: str = "killed") -> None:
        """Ends the worker at once. What it sent may still arrive until its peers learn of its death, some time later."""
        for transport in [t for t in self._transports.values() if t.record.worker_id == worker_id]:
            self._remove(transport, reason)

    def cut(self, a: WorkerId, b: WorkerId) -> None:
        """Loses all that is sent between two workers from now on; neither learns of it."""
        self._cut.add(frozenset((a, b)))

    def heal(self) -> None:
        """Undoes all `cut`\\ s."""
        self._cut.clear()

    # For the transports.

    def _carry(self, source: InprocTransport, to: PeerRecord, frames: Frames) -> None:
        sender, receiver = source._peer, (to.worker_id, to.incarnation)
        faults = self.faults
        copies = 2 if self._random.random() < faults.duplicate else 1
        for _ in range(copies):
            # All draws are made for every message, so that one fault more or less does not change all that follows.
            lost = self._random.random() < faults.drop
            overtakes = self._random.random() < faults.reorder
            due = self.now + self._random.uniform(faults.min_delay, faults.max_delay)
            if not overtakes:
                due = max(due, self._last_on_link.get((sender, receiver), 0.0))
                self._last_on_link[sender, receiver] = due
            if not lost and frozenset((sender[0], receiver[0])) not in self._cut:
                self._schedule(due, lambda: self._arrive(sender, receiver, frames))

    def _arrive(self, sender: _Peer, receiver: _Peer, frames: Frames) -> None:
        transport = self._transports.get(receiver)
        if transport is not None:
            transport._arrived(sender, frames)

    def _remove(self, gone: InprocTransport, reason: str) -> None:
        gone._closed = True
        del self._transports[gone._peer]
        for other in self._transports.values():
            # After all that was on its way, so that nothing comes from the dead once they are declared dead.
            due = max(self.now + self.faults.max_delay, self._last_on_link.get((gone._peer, other._peer), 0.0))
            self._schedule(due, lambda other=other: other._peer_gone(gone.record, reason))  # type: ignore[misc]

    def _reachable(self, peer: PeerRecord) -> InprocTransport | None:
        return self._transports.get((peer.worker_id, peer.incarnation))

    def _schedule(self, due: float, act: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (due, self._scheduled, act))


class InprocTransport(Transport):
    """One worker's end of a `Network`. For one thread, in which the whole network runs."""

    def __init__(self, network: Network, own: PeerRecord) -> None:
        self.record = own
        self._network = network
        self._peer: _Peer = (own.worker_id, own.incarnation)
        self._connected: dict[WorkerId, PeerRecord] = {}
        self._down: dict[WorkerId, str] = {}
        self._inbox: deque[Event] = deque()
        self._woken = False
        self._closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.record.addresses

    def connect(self, peer: PeerRecord) -> None:
        self._connected[peer.worker_id] = peer
        self._down.pop(peer.worker_id, None)
        other = self._network._reachable(peer)
        if other is not None:
            self._greet(other)

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        peer = self._connected.get(worker_id)
        if peer is not None and peer.incarnation == incarnation:
            del self._connected[worker_id]
            self._down.pop(worker_id, None)

    def send(self, to: WorkerId, frames: Frames) -> None:
        if self._closed:
            raise ShutdownError(f"the transport of {self.record.name} is closed")
        peer = self._connected.get(to)
        if peer is None:
            raise UnknownWorkerError(f"{self.record.name} is not connected to worker {to}")
        if to in self._down:
            raise WorkerLostError(f"{peer.name} is gone: {self._down[to]}")
        self._network._carry(self, peer, _snapshot(frames))

    def receive(self, timeout: float | None) -> Sequence[Event]:
        """See `Transport.receive`. Waiting moves the network's clock; a wait that nothing can end returns at once."""
        end = None if timeout is None else self._network.now + timeout
        while not self._inbox and not self._woken and not self._closed:
            due = self._network.next_due()
            if due is None or (end is not None and due > end):
                break
            self._network.step()
        if self._woken or self._closed:
            self._woken = False
            return ()
        if self._inbox:
            return (self._inbox.popleft(),)
        if end is not None:
            self._network.now = max(self._network.now, end)
        return ()

    def wake(self) -> None:
        self._woken = True

    def close(self, linger: float = 1.0) -> None:
        if not self._closed:
            self._inbox.clear()
            self._network._remove(self, "closed its transport")

    # For the network.

    def _greet(self, other: InprocTransport) -> None:
        """``other`` can be reached from now on: says so if it is a peer of this one."""
        peer = self._connected.get(other.record.worker_id)
        if peer is not None and peer.incarnation == other.record.incarnation and other is not self:
            self._inbox.append(PeerUp(peer.worker_id, peer.incarnation))

    def _arrived(self, sender: _Peer, frames: Frames) -> None:
        peer = self._connected.get(sender[0])
        if peer is None or (peer.incarnation == sender[1] and sender[0] not in self._down):
            self._inbox.append(Received(frames))

    def _peer_gone(self, gone: PeerRecord, reason: str) -> None:
        peer = self._connected.get(gone.worker_id)
        if peer is not None and peer.incarnation == gone.incarnation:
            self._down[gone.worker_id] = reason
            self._inbox.append(PeerDown(gone.worker_id, gone.incarnation, reason))


def _snapshot(frames: Frames) -> tuple[bytes, ...]:
    """The frames' bytes as they are now: sender and receiver share no memory, as on a real network."""
    if not frames:
        raise InvalidTypeError("a message has at least one frame")
    try:
        views = [memoryview(frame) for frame in frames]
    except TypeError as error:
        raise InvalidTypeError(f"a frame is no buffer: {error}") from error
    if not all(view.c_contiguous for view in views):
        raise InvalidTypeError("a frame is no contiguous buffer")
    return tuple(bytes(view) for view in views)
