"""What a worker sends to one peer by ZeroMQ."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import zmq

from zmqagent.exceptions import InvalidTypeError, RpcError, SendFailedError, WorkerLostError
from zmqagent.transport.base import Frames, PeerRecord
from zmqagent.transport.carrier import Link, as_buffer
from zmqagent.transport.endpoints import reachable_address

__all__ = ["ZERO_COPY_BYTES", "ZmqContext", "ZmqLink", "ZmqSocket"]

ZERO_COPY_BYTES = 1 << 16
"""Frames of at least so many bytes are sent from where they lie. Measured: below 32 KiB copying is cheaper than telling
pyzmq's collector thread when the memory is free again; at 64 KiB it costs a third more, at 1 MiB four times as much."""

ZmqSocket = zmq.Socket[bytes]
ZmqContext = zmq.Context[zmq.Socket[bytes]]


class ZmqLink(Link):
    """See `Link`: a PUSH socket, from the first message on.

    Args:
        peer: whom to.
        context: of the socket.
        host: the `host_identity` of this process.
        part: is given sockets that are out of use, but may still have something to send.
    """

    def __init__(self, peer: PeerRecord, context: ZmqContext, host: str, part: Callable[[ZmqSocket], None]) -> None:
        self.peer = peer
        self._context = context
        self._host = host
        self._part = part
        self._socket: ZmqSocket | None = None
        self._ended: tuple[type[RpcError], str] | None = None
        # Orders the threads that send to this peer, and them against `end`; held for as long as it takes to queue one message.
        self._lock = threading.Lock()

    def send(self, frames: Frames) -> None:
        parts = [_as_part(frame) for frame in frames]
        if not parts:
            raise InvalidTypeError("a message has at least one frame, but this has none")
        with self._lock:
            if self._ended is not None:
                error, what = self._ended
                raise error(f"worker {self.peer.name!r} ({self.peer.worker_id}) {what}")
            socket = self._socket or self._open()
            try:
                for part in parts[:-1]:
                    socket.send(part, zmq.NOBLOCK | zmq.SNDMORE)
                socket.send(parts[-1], zmq.NOBLOCK)
            except BaseException:
                # ^C, for example: the next message would continue this one. As the socket closes, libzmq drops the torn end and
                # sends the rest.
                self._socket = None
                self._part(socket)
                raise

    def end(self, error: type[RpcError], what: str, *, keep: bool = False) -> None:
        with self._lock:
            self._ended = (error, what)
            socket, self._socket = self._socket, None
        if socket is None:
            return
        if keep:
            self._part(socket)
        else:
            socket.close(linger=0)

    def _open(self) -> ZmqSocket:
        address = reachable_address(self.peer, self._host)
        if address is None:
            raise WorkerLostError(
                f"worker {self.peer.name!r} ({self.peer.worker_id}) cannot be reached from here under any of its addresses "
                f"({', '.join(self.peer.addresses)}); it has ended, or listens on no TCP address"
            )
        try:
            self._socket = self._connect(address)
        except zmq.ZMQError as error:
            # Out of sockets or file descriptors, for example.
            raise SendFailedError(
                f"worker {self.peer.name!r} ({self.peer.worker_id}) cannot be connected to just now: {error.strerror}"
            ) from error
        return self._socket

    def _connect(self, address: str) -> ZmqSocket:
        socket = self._context.socket(zmq.PUSH)
        try:
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.connect(address)
        except BaseException:
            socket.close(linger=0)
            raise
        return socket


def _as_part(frame: Any) -> Any:
    """One frame in the form that libzmq takes. Raises as `as_buffer`."""
    view = as_buffer(frame)
    return frame if view.nbytes < ZERO_COPY_BYTES else zmq.Frame(view, track=False, copy=False)
