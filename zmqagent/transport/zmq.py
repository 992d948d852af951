"""Carries messages by ZeroMQ: Unix sockets to peers on the same host, TCP to others.

Each carrier has one context, hence one libzmq I/O thread. One PULL socket takes in all messages. One PUSH socket a peer, opened
at the first message, sends; each moves between threads behind a lock of its own, so that no two peers wait for each other. All
queues are unbounded (high-water marks of 0, here and in `zmq_link`), since a message is sent whole or not at all: how much may
be under way is the agent's to limit.

Locks: ``_lock`` protects the sockets that part; the lock of the source ``_inbound`` makes one thread at a time read the PULL
socket; a link's lock protects that peer's PUSH socket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import zmq
import zmq.utils.garbage  # For its exit handler to be registered before, and hence run after, the one of `sockets`.

from zmqagent.exceptions import InvalidOptionError
from zmqagent.transport.base import Event, PeerRecord, Received
from zmqagent.transport.carrier import Carrier
from zmqagent.transport.endpoints import SocketDirectory, is_wildcard, reachable_address, tcp_endpoint
from zmqagent.transport.hosts import host_identity
from zmqagent.transport.poller import Poller, Source
from zmqagent.transport.zmq_link import ZmqContext, ZmqLink, ZmqSocket
from zmqagent.wire.frames import DEFAULT_LIMITS

__all__ = ["ZmqCarrier"]

_PARTING = 10.0
"""Seconds in which a socket that was taken out of use may still send what it had accepted."""

_MESSAGES_IN_A_ROW = 64
"""So many are handed over at a time."""

_MAX_SOCKETS = 1 << 15
"""libzmq's own limit of 1,023 is too low for one socket a peer; the table takes eight bytes an entry."""


class ZmqCarrier(Carrier):
    """See `Carrier`, and `SocketTransport` for the other arguments and what is raised.

    Args:
        poller: whose threads receive.
    """

    def __init__(self, poller: Poller, *, ipc: bool, tcp_host: str | None, tcp_port: int, bind_host: str | None) -> None:
        self._poller = poller
        self._host = host_identity()
        self.context: ZmqContext = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self.context.linger = 0
        self._directory = SocketDirectory() if ipc else None
        self._pull: ZmqSocket = self.context.socket(zmq.PULL)
        self._pull.setsockopt(zmq.RCVHWM, 0)
        # A frame is refused by its header, before libzmq takes memory for it; its connection is closed.
        self._pull.setsockopt(zmq.MAXMSGSIZE, DEFAULT_LIMITS.message_bytes)
        # A host that vanished leaves its connections here; the kernel finds out.
        self._pull.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            self._addresses = tuple(self._bind(tcp_host, tcp_port, bind_host))
        except BaseException:
            self.context.destroy(linger=0)
            if self._directory is not None:
                self._directory.remove()
            raise
        self._lock = threading.Lock()
        self._parting: list[tuple[float, ZmqSocket]] = []
        self._inbound = Source(self._pull.fileno(), self._read)
        poller.add(self._inbound)

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    def reaches(self, peer: PeerRecord) -> bool:
        return reachable_address(peer, self._host) is not None

    def link(self, peer: PeerRecord) -> ZmqLink:
        self._part(None)
        return ZmqLink(peer, self.context, self._host, self._part)

    def close(self, deadline: float) -> None:
        self._poller.remove(self._inbound)
        linger_ms = max(0, int((deadline - time.monotonic()) * 1000))
        with self._inbound.lock, self._lock:
            for _, socket in self._parting:
                socket.close(linger=linger_ms)
            self._parting.clear()
            # Waits for the lingering sockets, libzmq's thread and nothing else.
            self.context.destroy(linger=0)
        if self._directory is not None:
            self._directory.remove()

    def _bind(self, tcp_host: str | None, tcp_port: int, bind_host: str | None) -> list[str]:
        addresses = []
        if self._directory is not None:
            self._listen(self._directory.endpoint)
            addresses.append(self._directory.endpoint)
        if tcp_host is not None:
            if is_wildcard(tcp_host):
                raise InvalidOptionError(
                    f"peers cannot connect to {tcp_host!r}: give the address that they reach as tcp_host, and {tcp_host!r} as "
                    "bind_host to listen on all interfaces"
                )
            self._listen(tcp_endpoint(bind_host or tcp_host, tcp_port))
            port = int(self._pull.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
            addresses.append(tcp_endpoint(tcp_host, port))
        return addresses

    def _listen(self, endpoint: str) -> None:
        self._pull.setsockopt(zmq.IPV6, int("[" in endpoint))
        try:
            self._pull.bind(endpoint)
        except zmq.ZMQError as error:
            raise InvalidOptionError(
                f"cannot listen on {endpoint}: {error.strerror}. Give an address of this machine, and a free port (0 for any)."
            ) from error

    def _read(self) -> Sequence[Event]:
        messages: list[Event] = []
        for _ in range(_MESSAGES_IN_A_ROW):
            frames = self._receive_message()
            if frames is None:
                self._inbound.writing = False
                return messages
            messages.append(Received(frames))
        # For what has arrived its descriptor does not become readable again (ZMQ_FD in zmq_getsockopt(3)). It is always writable.
        self._inbound.writing = True
        return messages

    def _receive_message(self) -> list[memoryview] | None:
        """One whole message, or None if none has arrived. libzmq gives out no part before it has the last."""
        try:
            frame = self._pull.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        frames = [frame.buffer]
        while frame.more:
            frame = self._pull.recv(zmq.NOBLOCK, copy=False)
            frames.append(frame.buffer)
        return frames

    def _part(self, socket: ZmqSocket | None) -> None:
        """Takes a socket out of use, and closes those whose time is over. (Closed earlier with a linger time, they could hold up
        `close` as long.)"""
        now = time.monotonic()
        with self._lock:
            for _, old in [p for p in self._parting if p[0] <= now]:
                old.close(linger=0)
            self._parting = [p for p in self._parting if p[0] > now]
            if socket is not None:
                self._parting.append((now + _PARTING, socket))
