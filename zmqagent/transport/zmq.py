"""The transport over ZeroMQ: Unix sockets to peers on the same host, TCP to others.

Sockets. Each transport has one context, hence one libzmq I/O thread. One PULL socket takes in all messages and belongs to whoever
receives. One PUSH socket a peer, opened at the first message, sends; each moves between threads behind a lock of its own, so that
no two peers wait for each other. Liveness has sockets of its own (`liveness`). All queues are unbounded (high-water marks of 0,
here and in `link`), since a message is sent whole or not at all: how much may be under way is the agent's to limit.

Locks, each held briefly (but ``_receiving``), in the order in which they may be nested:

* ``_receiving`` is held through `receive`; `close` takes it once, to be sure that nobody receives.
* ``_lock`` protects the table of peers and the sockets that part from it.
* A link's ``_lock`` protects that peer's PUSH socket.

Threads: none of its own. What other threads want of the receiving one (watch a peer, forget one) waits in a queue of notes.
"""

from __future__ import annotations

import atexit
import os
import selectors
import threading
import time
from queue import SimpleQueue

import zmq
import zmq.utils.garbage  # For its exit handler to be registered before, and hence run after, the one at the end of this file.

from zmqagent.exceptions import InvalidOptionError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import Event, Frames, PeerDown, PeerRecord, Received, Transport
from zmqagent.transport.endpoints import SocketDirectory, is_wildcard, tcp_endpoint
from zmqagent.transport.hosts import host_identity
from zmqagent.transport.link import Link, TornError, ZmqContext, ZmqSocket, as_part
from zmqagent.transport.liveness import Liveness
from zmqagent.transport.waker import Waker
from zmqagent.wire.frames import DEFAULT_LIMITS
from zmqagent.wire.types import WorkerId

__all__ = ["ZmqTransport"]

_PARTING = 10.0
"""Seconds in which a socket that was taken out of use may still send what it had accepted."""

_MESSAGES_IN_A_ROW = 64
"""After so many, `receive` looks at the peers' lives though more messages wait."""

_MAX_SOCKETS = 1 << 15
"""libzmq's own limit of 1,023 is too low for one socket a peer; the table takes eight bytes an entry."""


class ZmqTransport(Transport):
    """See `Transport`. At least one of ``ipc`` and ``tcp_host`` must be asked for, or no peer could reach this one.

    Args:
        ipc: listen on a Unix socket, for peers on the same host.
        tcp_host: listen on this address (or name) of this machine, which is also what peers are told; None for no TCP.
        incarnation: of this worker; only names the transport in `repr`.
        tcp_port: 0 takes any free port.
        bind_host: listen on this address instead of ``tcp_host``; ``"0.0.0.0"`` or ``"::"`` for all interfaces.

    Raises:
        InvalidOptionError: nothing to listen on, or an address that is not this machine's or already in use.
    """

    def __init__(
        self, *, ipc: bool, tcp_host: str | None, incarnation: int, tcp_port: int = 0, bind_host: str | None = None
    ) -> None:
        if not ipc and tcp_host is None:
            raise InvalidOptionError("a transport must listen on a Unix socket (ipc) or an address of this machine (tcp_host)")
        self._incarnation = incarnation
        self._owner = os.getpid()
        self._host = host_identity()
        self._context: ZmqContext = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._context.linger = 0
        self._directory = SocketDirectory() if ipc else None
        self._pull: ZmqSocket = self._context.socket(zmq.PULL)
        self._pull.setsockopt(zmq.RCVHWM, 0)
        # A frame is refused by its header, before libzmq takes memory for it; its connection is closed.
        self._pull.setsockopt(zmq.MAXMSGSIZE, DEFAULT_LIMITS.message_bytes)
        # A host that vanished leaves its connections here; the kernel finds out.
        self._pull.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            self._addresses = tuple(self._bind(tcp_host, tcp_port, bind_host))
        except BaseException:
            self._context.destroy(linger=0)
            if self._directory is not None:
                self._directory.remove()
            raise

        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ, self._awake)
        self._selector.register(self._pull, selectors.EVENT_READ, _nothing_but_wake)
        self._liveness = Liveness(self._context, self._selector, self._host)
        self._row = 0

        self._links: dict[WorkerId, Link] = {}
        self._parting: list[tuple[float, ZmqSocket]] = []
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._notes: SimpleQueue[PeerRecord | WorkerId] = SimpleQueue()
        self._woken = False
        self._closed = False
        _open_transports.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._links)} peers"
        return f"<ZmqTransport {self._incarnation:x} at {' '.join(self._addresses)}, {state}>"

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    def connect(self, peer: PeerRecord) -> None:
        self._check_process()
        with self._lock:
            self._check_open()
            known = self._links.get(peer.worker_id)
            if known is not None and known.peer.incarnation == peer.incarnation:
                return
            self._links[peer.worker_id] = Link(peer, self._context, self._host)
            if known is not None:
                # Nobody is there to read what the old incarnation was sent.
                known.end(WorkerLostError, "was replaced by a newer incarnation of itself")
            self._reap(time.monotonic())
            self._notes.put(peer)
        self._waker.set()

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        self._check_process()
        with self._lock:
            self._check_open()
            now = time.monotonic()
            self._reap(now)
            link = self._links.get(worker_id)
            if link is None or link.peer.incarnation != incarnation:
                return
            del self._links[worker_id]
            self._part(now, link.end(UnknownWorkerError, "was disconnected", keep=True))
            self._notes.put(worker_id)
        self._waker.set()

    def send(self, to: WorkerId, frames: Frames) -> None:
        self._check_process()
        self._check_open()
        link = self._links.get(to)
        if link is None:
            known = ", ".join(str(worker_id) for worker_id in sorted(self._links)) or "none"
            raise UnknownWorkerError(f"worker {to} is not connected to this transport; connected are: {known}")
        try:
            link.send([as_part(frame) for frame in frames])
        except TornError as torn:
            with self._lock:
                self._part(time.monotonic(), torn.socket)
            raise torn.cause from None

    def receive(self, timeout: float | None) -> Event | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._receiving:
            while not (self._closed or os.getpid() != self._owner):
                if self._woken:
                    self._woken = False
                    return None
                self._take_notes()
                drained = False
                if self._row < _MESSAGES_IN_A_ROW:
                    frames = self._receive_message()
                    if frames is not None:
                        self._row += 1
                        return Received(frames)
                    drained = True
                self._row = 0
                event = self._liveness.next_event(time.monotonic(), drained=drained)
                if event is not None:
                    if isinstance(event, PeerDown):
                        self._mark_down(event)
                    return event
                if self._wait(deadline if drained else 0.0) and drained:
                    return None
        return None

    def wake(self) -> None:
        if os.getpid() == self._owner:
            self._woken = True
            self._waker.set()

    def close(self, linger: float = 1.0) -> None:
        if os.getpid() != self._owner:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._waker.set()
        linger_ms = int(linger * 1000)
        with self._receiving, self._lock:
            for link in self._links.values():
                socket = link.end(ShutdownError, "cannot be reached: this worker's transport is closed", keep=True)
                self._part(0.0, socket)
            for _, socket in self._parting:
                socket.close(linger=linger_ms)
            self._parting.clear()
            self._liveness.close()
            self._selector.close()
            self._waker.close()
            # Waits for the lingering sockets, libzmq's thread and nothing else.
            self._context.destroy(linger=0)
            if self._directory is not None:
                self._directory.remove()
            _open_transports.discard(self)

    # -- construction

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

    # -- receiving: the caller holds _receiving

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

    def _wait(self, deadline: float | None) -> bool:
        """Waits for anything to happen, and calls whom it concerns; True if nothing did before ``deadline``.

        The PULL socket's descriptor may be waited for like any other, since `_receive_message` has just found nothing and thereby
        cleared it (ZMQ_FD in zmq_getsockopt(3)).
        """
        now = time.monotonic()
        check = self._liveness.next_check()
        until = min((t for t in (deadline, check) if t is not None), default=None)
        ready = self._selector.select(None if until is None else max(0.0, until - now))
        now = time.monotonic()
        for key, _ in ready:
            key.data(now)
        return not ready and deadline is not None and now >= deadline

    def _awake(self, _now: float) -> None:
        self._waker.clear()

    def _take_notes(self) -> None:
        while not self._notes.empty():  # Nobody else takes any.
            note = self._notes.get()
            if isinstance(note, PeerRecord):
                self._liveness.watch(note, time.monotonic())
            else:
                self._liveness.forget(note)

    def _mark_down(self, event: PeerDown) -> None:
        with self._lock:
            link = self._links.get(event.worker_id)
        if link is not None and link.peer.incarnation == event.incarnation:
            # Its queue would be kept for ever.
            link.end(WorkerLostError, f"is lost: {event.reason}")

    # -- parting sockets: the caller holds _lock

    def _part(self, now: float, socket: ZmqSocket | None) -> None:
        if socket is not None:
            self._parting.append((now + _PARTING, socket))

    def _reap(self, now: float) -> None:
        """Closes the sockets whose time is over. (Closed earlier with a linger time, they could hold up `close` as long.)"""
        for _, socket in [p for p in self._parting if p[0] <= now]:
            socket.close(linger=0)
        self._parting = [p for p in self._parting if p[0] > now]

    # -- what makes a call impossible

    def _check_open(self) -> None:
        if self._closed:
            raise ShutdownError("this worker's transport is closed: it was shut down")

    def _check_process(self) -> None:
        # Before any lock: one that another thread held at the fork is never released in the child.
        if os.getpid() != self._owner:
            raise ShutdownError(
                f"this process was forked from worker process {self._owner} and has none of its connections; call init_rpc here, "
                "under a name of its own, or start processes by spawn"
            )


def _nothing_but_wake(_now: float) -> None:
    """For the descriptor of the PULL socket: the next round receives."""


# Keeps a transport that nobody closes until the interpreter ends. The collector must not find one: it may end a context before
# the context's sockets, and libzmq then waits for those for ever.
_open_transports: set[ZmqTransport] = set()


@atexit.register
def _close_all() -> None:
    # Before pyzmq's own handler: that one frees the memory of frames which libzmq may still be sending.
    for transport in list(_open_transports):
        transport.close(linger=0)
