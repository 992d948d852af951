"""Carries messages between workers of one host: a Unix stream socket for each direction.

Fewer threads take part in a message than with ZeroMQ: the sender's own thread writes it, and the thread that the kernel wakes for
it reads it and runs what it asks for. The socket lies in a directory that only its owner can enter.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from zmqagent.exceptions import ProtocolError
from zmqagent.transport.base import Event, PeerRecord, Received
from zmqagent.transport.carrier import Carrier
from zmqagent.transport.endpoints import SocketDirectory, stream_path
from zmqagent.transport.hosts import host_identity
from zmqagent.transport.lending import ANCILLARY_BYTES, Borrower, Lender
from zmqagent.transport.local_link import LocalLink
from zmqagent.transport.poller import Poller, Source
from zmqagent.transport.stream import StreamReader

__all__ = ["LocalCarrier"]

_logger = logging.getLogger(__name__)

_BACKLOG = 4096
"""Connections that the kernel accepts before this worker does: more than there are peers on one host."""

_PAUSE_WITHOUT_DESCRIPTORS = 0.05
"""Seconds until the next try to accept a connection, if the process has no descriptor for it just now."""


class LocalCarrier(Carrier):
    """See `Carrier`.

    Args:
        poller: whose threads accept, read, and write what the kernel does not take at once.
        shared_memory: how many bytes are lent to peers at most.
    """

    def __init__(self, poller: Poller, shared_memory: int) -> None:
        self._poller = poller
        self._lender = Lender(shared_memory)
        self._host = host_identity()
        self._directory = SocketDirectory()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            self._listener.bind(self._directory.socket_path)
            self._listener.listen(_BACKLOG)
        except BaseException:
            self._listener.close()
            self._directory.remove()
            raise
        # Protects the two collections; held for a step at a time.
        self._lock = threading.Lock()
        self._inbound: set[_Inbound] = set()
        self._links: set[LocalLink] = set()
        self._accepting = Source(self._listener.fileno(), self._accept)
        poller.add(self._accepting)

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self._directory.stream_address,)

    def reaches(self, peer: PeerRecord) -> bool:
        return self._path(peer) is not None

    def link(self, peer: PeerRecord) -> LocalLink:
        link = LocalLink(peer, self._path(peer), self._poller, self._lender, self._links.discard)
        with self._lock:
            self._links.add(link)
        return link

    def tidy(self) -> None:
        self._lender.tidy(time.monotonic())

    def close(self, deadline: float) -> None:
        with self._lock:
            links = list(self._links)
        for link in links:
            link.drain(deadline)
        self._poller.remove(self._accepting)
        with self._accepting.lock:
            self._listener.close()
        with self._lock:
            inbound = list(self._inbound)
        for each in inbound:
            with each.source.lock:
                self._hang_up(each)
        self._lender.close()
        self._directory.remove()

    def _path(self, peer: PeerRecord) -> str | None:
        if peer.host != self._host:
            return None
        return next((path for address in peer.addresses if (path := stream_path(address))), None)

    # On the threads that receive, each with its source's lock.

    def _accept(self) -> Sequence[Event]:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return ()  # The peer has given it up.
        except OSError as error:
            _logger.warning("could not accept a connection just now: %s", error)
            time.sleep(_PAUSE_WITHOUT_DESCRIPTORS)
            return ()
        inbound = _Inbound(connection, self._hang_up)
        with self._lock:
            self._inbound.add(inbound)
        self._poller.add(inbound.source)
        return ()

    def _hang_up(self, inbound: _Inbound) -> None:
        with self._lock:
            self._inbound.discard(inbound)
        self._poller.remove(inbound.source)
        inbound.close()


class _Inbound:
    """A connection on which a peer sends. ``hang_up`` is called with it when there is no more to come."""

    def __init__(self, connection: socket.socket, hang_up: Callable[[_Inbound], None]) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.source = Source(connection.fileno(), self._read)
        self._hang_up = hang_up
        self._borrower = Borrower()
        self._reader = StreamReader(self._borrower.invited, self._borrower.view)

    def close(self) -> None:
        """Nothing more is read."""
        self.connection.close()
        self._borrower.close()

    def _read(self) -> Sequence[Event]:
        space = self._reader.space()
        try:
            count, beside, _, _ = self.connection.recvmsg_into(space, ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            if beside:
                self._borrower.take_ancillary(beside)
            if count:
                return [Received(frames) for frames in self._reader.took(count)]
        except BlockingIOError:
            return ()
        except (ProtocolError, MemoryError, OSError) as error:
            _logger.warning("hung up on a peer on this host: %s", error)
        # What is left of a message that breaks off has no meaning.
        self._hang_up(self)
        return ()
