"""One way in which messages are carried between workers, as the transport sees it: where it listens, and a link to each peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from zmqagent.exceptions import InvalidTypeError, RpcError
from zmqagent.transport.base import Frames, PeerRecord

__all__ = ["Carrier", "Link", "as_buffer"]


class Link(ABC):
    """The way to one incarnation of one peer. Any thread may call these at any time; neither ever waits for the peer."""

    peer: PeerRecord

    def allocate(self, size: int) -> memoryview | None:
        """See `Transport.allocate`."""
        return None

    @abstractmethod
    def send(self, frames: Frames) -> None:
        """Accepts one message, whole or not at all. Raises as `Transport.send`, and the error that `end` was given."""

    @abstractmethod
    def end(self, error: type[RpcError], what: str, *, keep: bool = False) -> None:
        """Makes later sends raise ``error``. What has not gone out is dropped or, with ``keep``, still sent if the peer lives."""


class Carrier(ABC):
    """What a `SocketTransport` is put together from. What it receives it reports through the transport's `Poller`."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """The endpoints under which peers reach this worker, best first; fixed from construction on."""

    @abstractmethod
    def reaches(self, peer: PeerRecord) -> bool:
        """Whether messages to ``peer`` can go this way."""

    @abstractmethod
    def link(self, peer: PeerRecord) -> Link:
        """The way to ``peer``. Never blocks; the connection itself is made later."""

    def tidy(self) -> None:
        """See `Transport.tidy`."""
        return None

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Sends what links had accepted, until ``deadline`` (of `time.monotonic`), then frees sockets, files and threads. All
        links were ended before, and nobody receives."""


def as_buffer(frame: Any) -> memoryview:
    """One frame's memory. What can be wrong with a frame is found out by this, before a part of its message is written.

    Raises:
        InvalidTypeError: it is no contiguous buffer.
    """
    try:
        view = memoryview(frame)
    except TypeError:
        raise InvalidTypeError(f"a frame must have the buffer protocol, but {type(frame).__name__} has not") from None
    if not view.contiguous:
        raise InvalidTypeError(f"a frame must be contiguous, but this {type(frame).__name__} is not")
    return view
