"""Watches peers on other hosts by one connection each, on which nothing is ever sent but ZMTP heartbeats.

The connection leads to the endpoint that takes the peer's messages, so a worker needs one port only, yet it is a TCP connection
of its own: however much data waits on the others, a heartbeat waits for none of it. libzmq's I/O threads send and answer the
heartbeats (ZMTP 3.1, PING and PONG) even while Python runs nothing; a monitor reports what becomes of each connection. One that
broke is made again by libzmq: only if that fails for a while is the peer taken for dead.

All connections share one control socket, so a peer costs one descriptor.
"""

from __future__ import annotations

import selectors
import struct
from dataclasses import dataclass

import zmq

from zmqagent.transport.base import PeerDown, PeerEvent, PeerRecord, PeerSuspected, PeerUp
from zmqagent.wire.types import WorkerId

__all__ = ["FIRST_CONNECTION_GRACE", "HEARTBEAT_INTERVAL", "HEARTBEAT_TIMEOUT", "RECONNECTION_GRACE", "ConnectionWatch"]

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""

HEARTBEAT_TIMEOUT = 5.0
"""Seconds without a sign of the peer after which its connection counts as broken."""

RECONNECTION_GRACE = 2.0
"""Seconds in which a broken connection has to stand again."""

FIRST_CONNECTION_GRACE = 10.0
"""Seconds in which the first connection has to stand: a lost first packet alone costs one, and then two more."""

_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
# A monitor's first frame: the event's number and its value, here the descriptor (zmq_socket_monitor(3)).
_EVENT_FRAME = struct.Struct("=Hi")


@dataclass(slots=True)
class _Connection:
    """``fd`` tells it from the connection before, whose reports may come late. ``deadline`` is set while it does not stand."""

    peer: PeerRecord
    deadline: float | None
    grace: float
    fd: int = -1


class ConnectionWatch:
    """The peers on other hosts. Used by one thread at a time. Without a ``context`` no other host can be reached."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]] | None, selector: selectors.BaseSelector) -> None:
        self._context = context
        self._selector = selector
        self._control: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._by_address: dict[str, _Connection] = {}
        self._addresses: dict[WorkerId, str] = {}
        self._found: list[PeerEvent] = []

    def add(self, peer: PeerRecord, now: float) -> None:
        """Watches ``peer``; `PeerUp` follows once the connection stands."""
        address = next((a for a in peer.addresses if a.startswith("tcp://")), None)
        if address is None:
            reason = f"it runs on another host and listens on no TCP address, only on {', '.join(peer.addresses) or 'nothing'}"
            self._found.append(PeerDown(peer.worker_id, peer.incarnation, reason))
            return
        if self._context is None:
            reason = "it runs on another host, and this worker was told to reach none (by its option transport)"
            self._found.append(PeerDown(peer.worker_id, peer.incarnation, reason))
            return
        if address in self._by_address:
            self._give_up(self._by_address[address], f"its address {address} belongs to worker {peer.name!r} now")
        self._addresses[peer.worker_id] = address
        self._by_address[address] = _Connection(peer, now + FIRST_CONNECTION_GRACE, FIRST_CONNECTION_GRACE)
        control = self._control or self._open(self._context)
        # Only connections made from now on are concerned; an IPv6 socket would not do where the kernel has no IPv6.
        control.setsockopt(zmq.IPV6, int("[" in address))
        control.connect(address)

    def remove(self, worker_id: WorkerId) -> None:
        """Ends one watch; unknown ids are ignored."""
        address = self._addresses.pop(worker_id, None)
        if address is not None and self._control is not None:
            del self._by_address[address]
            self._control.disconnect(address)

    def check(self, now: float) -> None:
        """Gives up the connections whose grace is over."""
        late = [c for c in self._by_address.values() if c.deadline is not None and now >= c.deadline]
        for connection in late:
            address = self._addresses[connection.peer.worker_id]
            what = f"there was no connection to {address} for {connection.grace:g} s: it, its host or the network is down"
            self._give_up(connection, what)

    def next_check(self) -> float | None:
        """When `check` has something to do; None for never."""
        return min((c.deadline for c in self._by_address.values() if c.deadline is not None), default=None)

    def take(self) -> list[PeerEvent]:
        """What was found since the last time."""
        found, self._found = self._found, []
        return found

    def close(self) -> None:
        """Ends all watches."""
        if self._control is not None and self._monitor is not None:
            self._selector.unregister(self._monitor)
            self._control.disable_monitor()
            self._monitor.close(linger=0)
            self._control.close(linger=0)
            self._control = self._monitor = None
        self._by_address.clear()
        self._addresses.clear()

    def _give_up(self, connection: _Connection, reason: str) -> None:
        peer = connection.peer
        self.remove(peer.worker_id)
        self._found.append(PeerDown(peer.worker_id, peer.incarnation, reason))

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        control = context.socket(zmq.PUSH)
        control.setsockopt(zmq.LINGER, 0)
        control.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_INTERVAL * 1000))
        control.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(HEARTBEAT_TIMEOUT * 1000))
        # The peer, too, drops the connection to a host that has vanished.
        control.setsockopt(zmq.HEARTBEAT_TTL, int(HEARTBEAT_TIMEOUT * 1000))
        # A stopped process still accepts connections, by its kernel, and never answers on them.
        control.setsockopt(zmq.HANDSHAKE_IVL, int(RECONNECTION_GRACE * 1000))
        self._monitor = control.get_monitor_socket(_EVENTS)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._selector.register(self._monitor, selectors.EVENT_READ, self._readable)
        self._control = control
        # Making the socket may have taken in its descriptor's first signal.
        self._readable(0.0)
        return control

    def _readable(self, now: float) -> None:
        """Reads all reports: the monitor's descriptor is readable again only after it was emptied."""
        assert self._monitor is not None
        while True:
            try:
                head, address = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event, value = _EVENT_FRAME.unpack(head)
            connection = self._by_address.get(address.decode())
            if connection is not None:
                self._report(connection, event, value, now)

    def _report(self, connection: _Connection, event: int, fd: int, now: float) -> None:
        peer = connection.peer
        if event == zmq.EVENT_CONNECTED:
            connection.fd = fd
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            connection.deadline = None
            self._found.append(PeerUp(peer.worker_id, peer.incarnation))
        elif connection.deadline is None and fd == connection.fd:
            connection.grace = RECONNECTION_GRACE
            connection.deadline = now + RECONNECTION_GRACE
            self._found.append(PeerSuspected(peer.worker_id, peer.incarnation, "its connection broke, or its heartbeats ceased"))
