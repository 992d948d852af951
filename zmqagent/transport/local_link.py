"""What a worker sends to one peer on the same host: a connection to that peer's Unix socket, opened at the first message.

A message is written at once, by the thread that sends it, as far as the kernel takes it; the rest waits in a queue, which the
threads that receive write out as the peer reads. What a thread sends while it handles several messages that came together is
gathered in the queue until it has done with them.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from zmqagent.exceptions import InvalidTypeError, RpcError, SendFailedError, WorkerLostError
from zmqagent.transport.base import Event, Frames, PeerRecord
from zmqagent.transport.carrier import Link, as_buffer
from zmqagent.transport.lending import Lender, Loans
from zmqagent.transport.poller import Poller, Source
from zmqagent.transport.stream import LENT, prefix

__all__ = ["LocalLink"]

_logger = logging.getLogger(__name__)

_GONE = (FileNotFoundError, ConnectionRefusedError, BrokenPipeError, ConnectionResetError)

_JOIN_BYTES = 1 << 14
"""Up to so many bytes, frames are joined before they are written: cheaper than to hand them over one by one."""

_SEND_BUFFER = 1 << 20
"""Bytes that the kernel is asked to hold for a peer that is slow to read; it grants 416 KiB by default, or some 550 messages of
any small size."""

_GATHERED = 16
"""Answers to messages that came together are written together, up to so many: each that is written alone wakes the peer."""

_MAX_PARTS = 512
"""Parts handed to the kernel at a time; it takes up to 1,024 (IOV_MAX)."""

_FLUSH_BYTES = 1 << 20
"""So much of a queue is written in a row, before the thread that does looks at others."""


class LocalLink(Link):
    """See `Link`.

    Args:
        peer: whom to.
        path: of the peer's socket; None if it has none that can be opened from here.
        poller: whose threads write what the kernel does not take at once.
        lender: out of whose arena memory is lent to the peer.
        on_end: called with this link once it is of no use any more.
    """

    def __init__(
        self, peer: PeerRecord, path: str | None, poller: Poller, lender: Lender, on_end: Callable[[LocalLink], None]
    ) -> None:
        self.peer = peer
        self._path = path
        self._poller = poller
        self._lender = lender
        self._on_end = on_end
        # Protects all fields below; held while a message is written as far as the kernel takes it, which is never waited for.
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._source: Source | None = None  # while something is queued
        self._queue: deque[memoryview] = deque()
        self._loans: Loans | None = None  # over the socket there is
        self._ended: tuple[type[RpcError], str] | None = None

    def allocate(self, size: int) -> memoryview | None:
        with self._lock:
            if self._loans is None:
                return None
            return self._loans.allocate(size, None if self._queue else self._socket)

    def send(self, frames: Frames) -> None:
        views = _views(frames)
        with self._lock:
            if self._ended is not None:
                error, what = self._ended
                raise error(f"worker {self.peer.name!r} ({self.peer.worker_id}) {what}")
            if self._loans is not None and (self._queue or self._poller.at_end_of_several(self._write_gathered)):
                self._queue += _parts(views, self._loans.lend(views))
                is_gathering = len(self._queue) < _GATHERED and self._poller.at_end_of_several(self._write_gathered)
                if self._source is None and not is_gathering:
                    self._write_queued()
                return
            is_begun = self._socket is not None and self._begin(self._socket, views)
            # Never opened, or closed by the peer, which may have had its reasons and live on.
            if not is_begun and not self._begin(self._open(), views):
                raise self._unreachable(ConnectionResetError())
            self._await_peer()

    def end(self, error: type[RpcError], what: str, *, keep: bool = False) -> None:
        with self._lock:
            self._ended = (error, what)
            if not (keep and self._queue):
                self._drop()

    def drain(self, deadline: float) -> None:
        """Writes what is queued as the peer reads, until ``deadline`` (of `time.monotonic`); then drops the rest."""
        with self._lock:
            self._stop_writing()
            while self._queue and self._socket is not None and (left := deadline - time.monotonic()) > 0:
                until_read = select.poll()
                until_read.register(self._socket, select.POLLOUT)
                until_read.poll(left * 1000)
                self._write_queued()
                self._stop_writing()
            self._drop()

    def _write_gathered(self) -> None:
        """Called when the thread that has gathered answers here is done."""
        with self._lock:
            if self._queue and self._source is None and self._socket is not None:
                self._write_queued()

    def _flush(self) -> Sequence[Event]:
        """Called when the kernel takes more."""
        with self._lock:
            if self._socket is not None:
                self._write_queued()
            if not self._queue:
                self._stop_writing()
                if self._ended is not None:
                    self._drop()
        return ()

    # The caller of these holds the lock.

    def _write_queued(self) -> None:
        assert self._socket is not None
        try:
            _write(self._socket, self._queue, _FLUSH_BYTES)
        except OSError as error:
            # The peer has closed its end. Whether it has gone is found out elsewhere; if not, the next message opens a new one.
            _logger.debug("the connection to worker %s broke: %s", self.peer.name, error)
            self._drop()
        self._await_peer()

    def _await_peer(self) -> None:
        """Has what is left in the queue written once the peer has read."""
        if self._queue and self._socket is not None and self._source is None:
            self._source = Source(self._socket.fileno(), self._flush, writing=True)
            self._poller.add(self._source)

    def _begin(self, connection: socket.socket, views: Sequence[memoryview]) -> bool:
        """Writes a message as far as the kernel takes it, and queues the rest; False if the peer has closed the connection."""
        assert self._loans is not None
        loans = self._loans
        lent = loans.lend(views)
        self._queue += _parts(views, lent)
        try:
            _write(connection, self._queue)
        except BaseException as cause:
            # The next message would continue this one, so it goes by a new connection; what the peer has of this one is void.
            self._drop()
            if not isinstance(cause, OSError):
                raise
            loans.recall(views[i] for i in lent)
            if isinstance(cause, _GONE):
                return False
            raise self._unreachable(cause) from cause
        return True

    def _open(self) -> socket.socket:
        if self._path is None:
            raise self._unreachable(FileNotFoundError())
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            connection.connect(self._path)
        except OSError as error:
            connection.close()
            raise self._unreachable(error) from error
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        self._loans = Loans(self._lender, self.peer)
        return connection

    def _unreachable(self, error: OSError) -> RpcError:
        who = f"worker {self.peer.name!r} ({self.peer.worker_id})"
        if isinstance(error, _GONE):
            return WorkerLostError(
                f"{who} cannot be reached from here under any of its addresses ({', '.join(self.peer.addresses)}); it has ended"
            )
        # Out of file descriptors or memory, for example.
        return SendFailedError(f"{who} cannot be sent to just now: {error.strerror}")

    def _stop_writing(self) -> None:
        if self._source is not None:
            self._poller.remove(self._source)
            self._source = None

    def _drop(self) -> None:
        self._stop_writing()
        if self._socket is not None:
            self._socket.close()
            self._socket = self._loans = None
        self._queue.clear()
        if self._ended is not None:
            self._on_end(self)


def _views(frames: Sequence[Any]) -> list[memoryview]:
    """The frames as flat bytes. Whatever can fail fails here, before a part of the message is written."""
    if not frames:
        raise InvalidTypeError("a message has at least one frame, but this has none")
    return [as_buffer(frame) for frame in frames]


def _parts(views: Sequence[memoryview], lent: Mapping[int, memoryview]) -> list[memoryview]:
    """What is written: the prefix and the frames, or the references in their place, with small neighbours joined."""
    sizes = [view.nbytes for view in views]
    if lent:
        views = [lent.get(i, view) for i, view in enumerate(views)]
        sizes = [view.nbytes | (LENT if i in lent else 0) for i, view in enumerate(views)]
    head = prefix(sizes)
    if sum([view.nbytes for view in views]) <= _JOIN_BYTES:
        return [memoryview(b"".join((head, *views)))]
    parts = []
    small: list[Any] = [head]
    for view in views:
        if view.nbytes <= _JOIN_BYTES:
            small.append(view)
        else:
            parts += _joined(small)
            small = []
            parts.append(view.cast("B") if view.ndim == 1 or view.c_contiguous else memoryview(view.tobytes("A")))
    return parts + _joined(small)


def _joined(small: list[Any]) -> list[memoryview]:
    return [memoryview(b"".join(small))] if small else []


def _write(connection: socket.socket, parts: deque[memoryview], at_most: int = 1 << 62) -> None:
    """Writes ``parts``, and takes out what was written, until the kernel takes no more or about ``at_most`` bytes are gone."""
    while parts and at_most > 0:
        try:
            count = connection.send(parts[0]) if len(parts) == 1 else connection.sendmsg(list(islice(parts, _MAX_PARTS)))
        except BlockingIOError:
            return
        at_most -= count
        while parts and count >= parts[0].nbytes:
            count -= parts.popleft().nbytes
        if count:
            parts[0] = parts[0][count:]
