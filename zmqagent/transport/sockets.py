"""The transport of real workers: peers, links to them, who lives, and the threads that receive.

How messages are carried is the business of `Carrier`: by Unix stream sockets to peers on the same host (`local`), by ZeroMQ to
any (`zmq`). A worker may have both, and each peer is reached by the first that reaches it.

Locks, each held briefly:

* ``_lock`` protects the table of peers.
* The lock of the source ``_lives`` makes one thread at a time look after the peers' lives.

Threads: none of its own. What other threads want of who looks after the peers (watch one, forget one) waits in a queue of
notes.
"""

from __future__ import annotations

import atexit
import os
import selectors
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

from zmqagent.exceptions import InvalidOptionError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import Event, Frames, PeerDown, PeerEvent, PeerRecord, Transport
from zmqagent.transport.carrier import Carrier, Link
from zmqagent.transport.hosts import host_identity
from zmqagent.transport.liveness import Liveness
from zmqagent.transport.local import LocalCarrier
from zmqagent.transport.poller import Poller, Source
from zmqagent.transport.waker import Waker
from zmqagent.transport.zmq import ZmqCarrier
from zmqagent.wire.types import WorkerId

__all__ = ["SocketTransport"]


_HELD_FOR = 0.0005
"""Seconds for which a thread that runs what it received has its peer's connection for itself."""


class SocketTransport(Transport):
    """See `Transport`. At least one of ``local``, ``ipc`` and ``tcp_host`` must be asked for, or no peer could reach this one.

    Args:
        local: listen on a Unix stream socket, for peers on the same host.
        ipc: the same by ZeroMQ.
        tcp_host: listen on this address (or name) of this machine, which is also what peers are told; None for no TCP.
        incarnation: of this worker; only names the transport in `repr`.
        tcp_port: 0 takes any free port.
        bind_host: listen on this address instead of ``tcp_host``; ``"0.0.0.0"`` or ``"::"`` for all interfaces.
        shared_memory: how many bytes this worker lends, at most, to peers that it reaches by ``local``.

    Raises:
        InvalidOptionError: nothing to listen on, or an address that is not this machine's or already in use.
    """

    def __init__(
        self,
        *,
        incarnation: int,
        local: bool = False,
        ipc: bool = False,
        tcp_host: str | None = None,
        tcp_port: int = 0,
        bind_host: str | None = None,
        shared_memory: int = 0,
    ) -> None:
        if not (local or ipc) and tcp_host is None:
            raise InvalidOptionError(
                "a transport must listen on a Unix socket (local, ipc) or on an address of this machine (tcp_host)"
            )
        self._incarnation = incarnation
        self._owner = os.getpid()
        self._poller = Poller()
        self._carriers: list[Carrier] = []
        context = None
        try:
            if local:
                self._carriers.append(LocalCarrier(self._poller, shared_memory))
            if ipc or tcp_host is not None:
                by_zmq = ZmqCarrier(self._poller, ipc=ipc, tcp_host=tcp_host, tcp_port=tcp_port, bind_host=bind_host)
                self._carriers.append(by_zmq)
                context = by_zmq.context
        except BaseException:
            self._close_carriers(0.0)
            raise
        self._addresses = tuple(address for carrier in self._carriers for address in carrier.addresses)

        self._selector = selectors.DefaultSelector()
        self._noted = Waker()
        self._selector.register(self._noted, selectors.EVENT_READ, lambda now: self._noted.clear())
        self._liveness = Liveness(context, self._selector, host_identity())
        self._next_check: float | None = None
        self._notes: SimpleQueue[PeerRecord | WorkerId] = SimpleQueue()
        self._lives = Source(self._selector.fileno(), self._look_after_peers)
        self._poller.add(self._lives)

        self._lock = threading.Lock()
        self._links: dict[WorkerId, Link] = {}
        self._closed = False
        _open_transports.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._links)} peers"
        return f"<SocketTransport {self._incarnation:x} at {' '.join(self._addresses)}, {state}>"

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
            # If none reaches it, the last one says so when something is sent.
            carrier = next((c for c in self._carriers if c.reaches(peer)), self._carriers[-1])
            self._links[peer.worker_id] = carrier.link(peer)
            if known is not None:
                # Nobody is there to read what the old incarnation was sent.
                known.end(WorkerLostError, "was replaced by a newer incarnation of itself")
            self._note(peer)

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        self._check_process()
        with self._lock:
            self._check_open()
            link = self._links.get(worker_id)
            if link is None or link.peer.incarnation != incarnation:
                return
            del self._links[worker_id]
            link.end(UnknownWorkerError, "was disconnected", keep=True)
            self._note(worker_id)

    def allocate(self, to: WorkerId, size: int) -> memoryview | None:
        link = self._links.get(to)
        return None if link is None or os.getpid() != self._owner else link.allocate(size)

    def send(self, to: WorkerId, frames: Frames) -> None:
        self._check_process()
        self._check_open()
        link = self._links.get(to)
        if link is None:
            known = ", ".join(str(worker_id) for worker_id in sorted(self._links)) or "none"
            raise UnknownWorkerError(f"worker {to} is not connected to this transport; connected are: {known}")
        link.send(frames)

    def receive(self, timeout: float | None) -> Sequence[Event]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (self._closed or os.getpid() != self._owner):
            events = self._poller.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if events or events is None:
                return events or ()
            if deadline is not None and time.monotonic() >= deadline:
                break
        return ()

    def let_go(self) -> None:
        self._poller.let_go()

    def check(self) -> Sequence[Event]:
        now = time.monotonic()
        self._poller.let_go_overdue(now - _HELD_FOR)
        if self._closed or self._next_check is None or now < self._next_check or os.getpid() != self._owner:
            return ()
        # What has arrived goes before the news that no more will come.
        arrived = self._poller.wait(0.0)
        # Whoever calls this does not wait again soon.
        self._poller.let_go()
        if arrived is None:
            self._poller.wake()
        with self._lives.lock:
            events = [] if self._closed else self._take_events(time.monotonic(), drained=not arrived)
        return [*(arrived or ()), *events]

    def tidy(self) -> None:
        if not self._closed and os.getpid() == self._owner:
            for carrier in self._carriers:
                carrier.tidy()

    def wake(self) -> None:
        if os.getpid() == self._owner:
            self._poller.wake()

    def close(self, linger: float = 1.0) -> None:
        if os.getpid() != self._owner:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._links.values())
        self._poller.close()
        for link in links:
            link.end(ShutdownError, "cannot be reached: this worker's transport is closed", keep=True)
        with self._lives.lock:
            self._liveness.close()
            self._selector.close()
            self._noted.close()
        self._close_carriers(time.monotonic() + linger)
        _open_transports.discard(self)

    def _close_carriers(self, deadline: float) -> None:
        for carrier in self._carriers:
            carrier.close(deadline)
        self._poller.close()

    # -- the peers' lives: the caller holds _lives.lock

    def _look_after_peers(self) -> list[PeerEvent]:
        now = time.monotonic()
        if self._closed:
            return []
        for key, _ in self._selector.select(0):
            key.data(now)
        while not self._notes.empty():
            note = self._notes.get()
            if isinstance(note, PeerRecord):
                self._liveness.watch(note, now)
            else:
                self._liveness.forget(note)
        return self._take_events(now, drained=False)

    def _take_events(self, now: float, *, drained: bool) -> list[PeerEvent]:
        events = []
        while (event := self._liveness.next_event(now, drained=drained)) is not None:
            if isinstance(event, PeerDown):
                self._mark_down(event)
            events.append(event)
        self._next_check = self._liveness.next_check()
        return events

    def _note(self, note: PeerRecord | WorkerId) -> None:
        self._notes.put(note)
        self._noted.set()

    def _mark_down(self, event: PeerDown) -> None:
        with self._lock:
            link = self._links.get(event.worker_id)
        if link is not None and link.peer.incarnation == event.incarnation:
            # Its queue would be kept for ever.
            link.end(WorkerLostError, f"is lost: {event.reason}")

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


# Keeps a transport that nobody closes until the interpreter ends. The collector must not find one: it may end a context before
# the context's sockets, and libzmq then waits for those for ever.
_open_transports: set[SocketTransport] = set()


@atexit.register
def _close_all() -> None:
    # Before pyzmq's own handler: that one frees the memory of frames which libzmq may still be sending.
    for transport in list(_open_transports):
        transport.close(linger=0)
