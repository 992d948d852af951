"""What pickling and unpickling do to RRefs on the side: the shares that a message gives away, and those that it brings.

Pickle calls reducers deep inside an object, where no argument of ours arrives. So each thread has a stack of open scopes, and a
reducer finds the innermost one. Knows nothing of the protocol; a scope reports to whoever opened it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch.distributed.rpc import PyRRef

from zmqagent.exceptions import RpcError
from zmqagent.rref.events import MintedFork
from zmqagent.wire.types import ForkData, ForkId, RRefId, WorkerId

__all__ = [
    "Forks",
    "PendingUsers",
    "Unscoped",
    "current_forks",
    "current_pending",
    "receive_rref",
    "unpack_fork",
]


def unpack_fork(data: ForkData) -> tuple[WorkerId, RRefId, ForkId, WorkerId]:
    """``data`` as (owner, RRef id, fork id, parent)."""
    owner, rref_on, rref_no, fork_on, fork_no, parent, _type = data
    return WorkerId(owner), RRefId(rref_on, rref_no), ForkId(fork_on, fork_no), WorkerId(parent)


class _Scopes(threading.local):
    """The scopes open on this thread, innermost last: pickling an argument may itself make a call."""

    def __init__(self) -> None:
        self.pickling: list[Forks] = []
        self.unpickling: list[PendingUsers] = []


_scopes = _Scopes()


class _Settler(Protocol):
    def __call__(self, forks: tuple[MintedFork, ...], to: WorkerId | None) -> None: ...


class Forks:
    """The forks minted while one message was pickled. As a context manager it collects them; if the body raises, it cancels them.

    Afterwards the message is sent or not: say so by `sent_to` or `cancel`. Forks that are never settled work, but do not end with
    the death of the worker that got them. `cancel` after `sent_to` says that the receiver could not unpickle the message.
    """

    def __init__(self, settle: _Settler) -> None:
        self._settle = settle
        self.shares: list[ForkData] = []
        """The forks as the message has them."""
        self._sent = False

    def __enter__(self) -> Forks:
        _scopes.pickling.append(self)
        return self

    def __exit__(self, exc_type: object, *_: object) -> None:
        _scopes.pickling.pop()
        if exc_type is not None:
            self.cancel()

    def __len__(self) -> int:
        return len(self.shares)

    def sent_to(self, to: WorkerId) -> None:
        """The message was accepted for sending to ``to``. A second call, or one after `cancel`, changes nothing."""
        if self.shares and not self._sent:
            self._settle(tuple(map(_fork, self.shares)), to)
        self._sent = True

    def cancel(self) -> None:
        """Nobody will ever hold these forks: the message is not sent, or its receiver has said that it cannot unpickle it.
        (Shares that it did unpickle before it failed die there, and are none the worse.) A second call changes nothing."""
        shares, self.shares = self.shares, []
        if shares:
            self._settle(tuple(map(_fork, shares)), None)


class Unscoped(threading.local):
    """The shares that a thread has minted outside of all scopes."""

    def __init__(self) -> None:
        self.shares: list[ForkData] = []


class PendingUsers:
    """The users that one message brought: what a user function among whose arguments they are has to wait for. While the body of
    its ``with`` block runs, RRefs that this thread unpickles are rebuilt by ``unpickle``."""

    def __init__(self, unpickle: Callable[[ForkData], Any]) -> None:
        self.unpickle = unpickle
        self.fork_ids: list[ForkId] = []
        # An RRef that is no more stops the function, not the unpickling: the shares behind it would never be claimed.
        self.error: RpcError | None = None

    def __bool__(self) -> bool:
        """Whether there is something to wait for, or an error."""
        return bool(self.fork_ids) or self.error is not None

    def __enter__(self) -> PendingUsers:
        _scopes.unpickling.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _scopes.unpickling.pop()


def current_forks() -> Forks | None:
    """The innermost pickling scope of this thread."""
    return _scopes.pickling[-1] if _scopes.pickling else None


def _fork(share: ForkData) -> MintedFork:
    _owner, rref_id, fork_id, _parent = unpack_fork(share)
    return MintedFork(rref_id, fork_id)


def current_pending() -> PendingUsers | None:
    """The innermost unpickling scope of this thread."""
    return _scopes.unpickling[-1] if _scopes.unpickling else None


def receive_rref(data: ForkData) -> Any:
    """What a pickled RRef names as its constructor: rebuilds it in the scope that unpickles, else by torch's own entry."""
    if _scopes.unpickling:
        return _scopes.unpickling[-1].unpickle(data)
    return PyRRef._deserialize(data)
