"""How shared memory is agreed upon between two workers of one host, over the connection on which one sends to the other.

The sender invites: with the arena's descriptor it sends a reference to a first slot. A receiver that could map the arena gives
that slot back at once, and so has accepted; from then on memory is lent to it. One that could not (it has no descriptors or no
address space left) says nothing, and gets bytes, as before. Each connection begins anew.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Iterable, Sequence

from zmqagent.exceptions import ProtocolError
from zmqagent.transport.arena import Arena
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.peer_arena import PeerArena
from zmqagent.transport.process_watch import has_ended
from zmqagent.transport.shared_memory import Reference, is_supported
from zmqagent.transport.stream import invitation
from zmqagent.wire.types import WorkerId

__all__ = ["ANCILLARY_BYTES", "Borrower", "Lender", "Loans"]

_DESCRIPTOR = struct.Struct("i")

ANCILLARY_BYTES = socket.CMSG_LEN(_DESCRIPTOR.size)
"""What comes beside the bytes of a connection: one descriptor at a time."""

_logger = logging.getLogger(__name__)

_Holder = tuple[WorkerId, int]
"""A worker's id and incarnation."""


class Lender:
    """The arena of one worker, made when memory is first asked for.

    Args:
        size: of the arena, in bytes; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self._size = size if is_supported() else 0
        # Protects the fields below; held while the arena is made.
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._peers: dict[_Holder, PeerRecord] = {}

    def arena_for(self, peer: PeerRecord) -> Arena | None:
        """The arena, out of which something is to be lent to ``peer``; None if there is none."""
        with self._lock:
            if self._arena is None and self._size:
                self._arena = self._make()
            if self._arena is not None:
                self._peers[(peer.worker_id, peer.incarnation)] = peer
            return self._arena

    def _make(self) -> Arena | None:
        try:
            return Arena(self._size)
        except OSError as error:
            self._size = 0
            _logger.warning("no memory is shared with workers on this host, since there is none to be had: %s", error)
            return None

    def tidy(self, now: float) -> None:
        """Takes back what was lent to processes that have ended, and gives what has been free for a while to the kernel."""
        with self._lock:
            arena = self._arena
            peers = dict(self._peers)
        if arena is None:
            return
        holders = arena.holders()
        for holder, peer in peers.items():
            if has_ended(peer):
                if holder in holders:
                    arena.reclaim(holder)
                with self._lock:
                    self._peers.pop(holder, None)
        arena.trim(now)

    def close(self) -> None:
        """Nothing more is lent."""
        with self._lock:
            self._size = 0
            if self._arena is not None:
                self._arena.close()


class Loans:
    """What is lent over one connection. Used by one thread at a time."""

    def __init__(self, lender: Lender, peer: PeerRecord) -> None:
        self._lender = lender
        self._peer = peer
        self._holder = (peer.worker_id, peer.incarnation)
        self._arena: Arena | None = None
        self._invitation: Reference | None = None
        self._is_accepted = False

    def allocate(self, size: int, connection: socket.socket | None) -> memoryview | None:
        """See `Transport.allocate`. Invites the peer if that was not done; ``connection`` is None if something is half written to
        it just now."""
        if not self._is_accepted and not self._ask(connection):
            return None
        assert self._arena is not None
        return self._arena.allocate(self._holder, size)

    def _ask(self, connection: socket.socket | None) -> bool:
        """Whether the peer takes memory."""
        if self._arena is None:
            self._arena = self._lender.arena_for(self._peer)
            if self._arena is None:
                return False
        if self._invitation is None:
            if connection is not None:
                self._invitation = self._invite(connection, self._arena)
            return False
        self._is_accepted = self._arena.is_back(self._invitation)
        return self._is_accepted

    def _invite(self, connection: socket.socket, arena: Arena) -> Reference | None:
        memory = arena.allocate(self._holder, 1)
        reference = None if memory is None else arena.lend(memory, self._holder)
        if memory is None or reference is None:
            return None
        try:
            # So little goes out as a whole or not at all.
            socket.send_fds(connection, [invitation(reference.pack())], [arena.fd])
        except OSError as error:
            arena.recall(memory)
            _logger.debug("could not offer memory to worker %s: %s", self._peer.name, error)
            return None
        return reference

    def lend(self, views: Sequence[memoryview]) -> dict[int, memoryview]:
        """What goes in place of those among ``views`` that lie in the arena, by their index."""
        if not self._is_accepted:
            return {}
        assert self._arena is not None
        references = {}
        for i, view in enumerate(views):
            reference = self._arena.lend(view, self._holder)
            if reference is not None:
                references[i] = memoryview(reference.pack())
        return references

    def recall(self, views: Iterable[memoryview]) -> None:
        """Takes back what `lend` had lent: it did not get to the peer."""
        for view in views:
            assert self._arena is not None
            self._arena.recall(view)


class Borrower:
    """What is borrowed over one connection. Used by one thread at a time, and closed by whoever closes the connection."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._arena: PeerArena | None = None

    def take_ancillary(self, data: Sequence[tuple[int, int, bytes]]) -> None:
        """Takes what came beside the bytes of the connection."""
        for level, kind, content in data:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._close_descriptor()
                (self._descriptor,) = _DESCRIPTOR.unpack_from(content)

    def invited(self, content: memoryview) -> None:
        """Accepts, if it can be done, the invitation whose descriptor came before.

        Raises:
            ProtocolError: it is none.
        """
        reference = Reference.unpack(content)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            # The kernel does not deliver it to a process that has too many.
            _logger.warning("cannot share memory with a worker on this host: its descriptor did not arrive")
            return
        try:
            self._arena = PeerArena(descriptor)
        except OSError as error:
            _logger.warning("cannot share memory with a worker on this host: %s", error)
            return
        # The view dies here, which tells the owner.
        self._arena.view(reference)

    def view(self, content: memoryview) -> memoryview:
        """The memory that came in place of bytes.

        Raises:
            ProtocolError: there is no such memory.
        """
        if self._arena is None:
            raise ProtocolError("a message refers to shared memory, and none is shared on this connection")
        return self._arena.view(Reference.unpack(content))

    def close(self) -> None:
        """What was borrowed stays borrowed for as long as it is used."""
        self._arena = None
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
