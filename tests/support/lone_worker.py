"""One whole worker in this process, Alice, whose only peer is the test: it writes frames, and reads what Alice sends.

Everything is real but the transport, which is two queues: the agent's threads receive, decode, run and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.codec import Codec
from zmqagent.exceptions import ShutdownError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.rpc.shares import give_back
from zmqagent.transport.base import Event, Frames, PeerRecord, Received, Transport
from zmqagent.transport.hosts import describe_self
from zmqagent.wire.frames import Envelope, decode
from zmqagent.wire.types import Message, WorkerId
from zmqagent.worker import Worker

__all__ = ["ALICE", "BOB", "LoneWorker"]

DEADLINE_S = 30.0
ALICE = describe_self("alice", WorkerId(0), 10, ())
BOB = PeerRecord("bob", WorkerId(1), 20, "elsewhere", 1, ())


class _Queues(Transport):
    """What the test puts in arrives; what is sent comes out."""

    addresses = ()

    def __init__(self) -> None:
        self.arriving: SimpleQueue[Event | None] = SimpleQueue()
        self.sent: SimpleQueue[list[bytes]] = SimpleQueue()

    def connect(self, peer: PeerRecord) -> None:
        """Everybody is connected."""

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        """Nobody is."""

    def send(self, to: WorkerId, frames: Frames) -> None:
        self.sent.put([bytes(frame) for frame in frames])

    def receive(self, timeout: float | None) -> Sequence[Event]:
        try:
            event = self.arriving.get(timeout=timeout)
        except Empty:
            return ()
        return () if event is None else (event,)

    def wake(self) -> None:
        self.arriving.put(None)

    def close(self, linger: float = 1.0) -> None:
        """There is nothing to close."""


class _Empty:
    """The directory of a dynamic group that nobody else is in."""

    def remove(self, incarnation: int) -> Sequence[PeerRecord]:
        return ()


class LoneWorker:
    """Alice, in a dynamic group. ``with LoneWorker() as alice`` ends her threads."""

    def __init__(self) -> None:
        self._transport = _Queues()
        self.agent = ZmqRpcAgent(ALICE, self._transport, ZmqRpcBackendOptions(num_worker_threads=2), roster=_Empty())
        self.worker = Worker(self.agent)
        self.agent.enter([BOB])
        self._numbers = 0

    def __enter__(self) -> LoneWorker:
        callback = self.worker._callback
        self.agent.start(
            callback, self.worker._on_worker_lost, give_back, self.worker._keep_house, on_unreadable=callback.on_unreadable
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.worker._rrefs.close()
        self.worker._contexts.close(ShutdownError("the test is over"))
        self.agent.shutdown()

    def draw(self) -> int:
        """The number of Bob's next call."""
        self._numbers += 1
        return self._numbers - 1

    def deliver(self, frames: list[Any]) -> None:
        """The frames arrive; as ZeroMQ's they are writable memory."""
        self._transport.arriving.put(Received([memoryview(bytearray(frame)) for frame in frames]))

    def sent(self) -> Envelope:
        """The next message that Alice sends."""
        return decode(self._transport.sent.get(timeout=DEADLINE_S))

    def answer_to(self, number: int) -> Message:
        """Alice's answer to Bob's call of this number, the next that she gives; what she asks meanwhile is passed over."""
        envelope = self.sent()
        while envelope.type.is_request:
            envelope = self.sent()
        assert envelope.call_id == number, envelope
        return Codec.message(envelope)

    def has_sent(self) -> bool:
        """Whether Alice has sent anything that was not taken."""
        return not self._transport.sent.empty()

    def refused(self) -> int:
        """How many messages Alice has refused."""
        return int(self.agent.get_metrics()["agent.refused_messages"])

    def state(self) -> dict[str, str]:
        """What Alice holds for others and waits for herself."""
        metrics = self.agent.get_metrics()
        names = ("agent.client_active_calls", "agent.server_active_calls", "agent.server_active_async_calls")
        return {name: metrics[name] for name in names} | self.worker._rrefs.debug_info() | self.worker._contexts.debug_info()


def encode(message: Message, number: int) -> list[bytes]:
    """The frames of a message of Bob's to Alice."""
    frames = Codec(BOB.worker_id, BOB.incarnation).encode(message, number, ALICE.incarnation)
    return [bytes(frame) for frame in frames]
