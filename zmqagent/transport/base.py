"""What the agent needs of a transport: lists of buffers to a peer, and events back.

A transport knows nothing of messages, calls, RRefs or autograd: it moves frames and tells which peers can be reached. All
implementations pass the same suite (``tests/contract``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zmqagent.wire.types import WorkerId

__all__ = ["Event", "Frames", "PeerDown", "PeerEvent", "PeerRecord", "PeerSuspected", "PeerUp", "Received", "Transport"]

Frames = Sequence[Any]
"""The frames of one message: objects with the buffer protocol, in order."""


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What a worker publishes of itself, and all that others need to reach it.

    ``incarnation`` is a random 63-bit number drawn at start: a worker that comes back under its old name and id is another
    peer. ``host`` names machine, boot and process-id namespace, so that two workers know whether they share a kernel; ``pid``
    means something to peers with an equal ``host`` only. ``addresses`` are the transport's own endpoints, best first. ``started``
    is when the process started, in the kernel's ticks (0: unknown): it tells the process from a later one with the same ``pid``.
    ``ordinal`` is the worker's place in the order in which the members of a dynamic group joined, from 1 on; 0 in a static group.
    ``devices`` is what the worker tells of its devices, as text that the agent's layer writes and reads.
    """

    name: str
    worker_id: WorkerId
    incarnation: int
    host: str
    pid: int
    addresses: tuple[str, ...]
    started: int = 0
    ordinal: int = 0
    devices: str = ""


@dataclass(frozen=True, slots=True)
class Received:
    """A whole message came in. The frames belong to the receiver: their memory stays as it is while they are referenced."""

    frames: Frames


@dataclass(frozen=True, slots=True)
class PeerUp:
    """The peer lives and can be reached: reported once after `Transport.connect`, and again after each `PeerSuspected`."""

    worker_id: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class PeerSuspected:
    """The peer cannot be reached just now, by ``reason``; `PeerUp` or `PeerDown` follows."""

    worker_id: WorkerId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The peer is gone for good, by ``reason``; nothing more comes from this incarnation."""

    worker_id: WorkerId
    incarnation: int
    reason: str


PeerEvent = PeerUp | PeerSuspected | PeerDown
Event = Received | PeerEvent


class Transport(ABC):
    """Moves frames between the workers of a group.

    `send`, `connect`, `disconnect`, `receive` and `wake` may be called from any thread at any time. What arrives goes to one of
    the threads that receive.
    """

    @property
    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """The endpoints under which peers reach this transport, best first; fixed from construction on."""

    @abstractmethod
    def connect(self, peer: PeerRecord) -> None:
        """Makes ``peer`` known: from now on `send` reaches it, and its death is reported. Never blocks; the connection itself may
        be made later. An older incarnation of the same worker id is forgotten."""

    @abstractmethod
    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        """Forgets a peer. Nothing happens if that is not connected, or another incarnation of it is. What was accepted by `send`
        before still goes out if the peer lives."""

    def allocate(self, to: WorkerId, size: int) -> memoryview | None:
        """Writable memory of ``size`` > 0 bytes that may be one frame of one message to ``to``, which then takes it as it is: it
        belongs to the receiver, and must not be sent a second time. None if this transport has none such for that peer just now.
        """
        return None

    @abstractmethod
    def send(self, to: WorkerId, frames: Frames) -> None:
        """Sends one message of at least one frame, whole or not at all. The frames' memory must never change afterwards: the
        transport may hold on to it. What cannot go out at once does as long as somebody receives.

        Raises:
            UnknownWorkerError: ``to`` is not connected.
            WorkerLostError: ``to`` was reported down, or a newer incarnation took its place meanwhile, or none of its addresses
                can be reached from here.
            InvalidTypeError: a frame is no contiguous buffer.
            SendFailedError: this worker lacks the means just now; the next message may go out.
            ShutdownError: the transport is closed.
        """

    @abstractmethod
    def receive(self, timeout: float | None) -> Sequence[Event]:
        """The next events, in the order in which they came; none after ``timeout`` seconds (None: no limit), after `wake`, and
        once closed."""

    def let_go(self) -> None:
        """The calling thread, which may have received something, may be about to wait: others are to receive what comes
        meanwhile. What comes the same way as the last events may wait for this, for the thread's next `receive`, or for `check`.
        """
        return

    def check(self) -> Sequence[Event]:
        """What time alone has brought, such as a death that can be told now. To be called some 50 times a second, and every
        millisecond while threads run what they received."""
        return ()

    def tidy(self) -> None:
        """Lets go of what has not been needed for a while. To be called about once a second."""
        return None

    @abstractmethod
    def wake(self) -> None:
        """Makes a `receive` that waits now, or else the next one, return at once."""

    @abstractmethod
    def close(self, linger: float = 1.0) -> None:
        """Sends what was accepted, for at most ``linger`` seconds, then frees sockets, files and threads. Idempotent. Every
        `receive` returns."""
