"""The RRefs of one worker, as the layers above use them: made, pickled, unpickled, asked for, deleted.

Every method reports an event to the protocol, through `ProtocolShell`, and wraps what comes of it into objects. Knows the agent
only as a `Requester`; never pickles, and runs user code only by calling back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from zmqagent.agent.base import Requester
from zmqagent.exceptions import (
    InvalidTypeError,
    RpcError,
    RpcTimeoutError,
    RRefCreationError,
    RRefUsageError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.rref import events
from zmqagent.rref.forks import Forks, PendingUsers, Unscoped, current_forks, current_pending, unpack_fork
from zmqagent.rref.owner_table import OwnerTable
from zmqagent.rref.owners import CREATION_TIMED_OUT
from zmqagent.rref.protocol import RRefProtocol
from zmqagent.rref.rref import OwnerRRef, RRef, RRefCalls, UserRRef
from zmqagent.rref.shell import OnConfirmed, ProtocolShell
from zmqagent.rref.users import UserState
from zmqagent.wire.commands import RRefUserDelete
from zmqagent.wire.types import ForkData, ForkId, RRefId, WorkerId

__all__ = ["NewRemote", "OnOwnerReady", "RRefContext"]

_logger = logging.getLogger(__name__)

OnOwnerReady = Callable[["OwnerRRef | None", "BaseException | None"], None]

_SHUTDOWN_TIMEOUT = 100.0
"""Seconds that torch waits at shutdown, once for pending users and once for the RRefs owned here."""

_TYPE_NAME = "PyObject"
"""The type in the pickled form, for torch's sake: every value is a Python object here."""


class NewRemote(NamedTuple):
    """What the caller of ``remote`` needs: the RRef to return, and the ids that the message carries."""

    rref: RRef
    rref_id: RRefId
    fork_id: ForkId


class RRefContext:
    """All RRefs of one worker, as owner and as user. All methods may be called from any thread."""

    def __init__(
        self,
        requester: Requester,
        calls: RRefCalls,
        *,
        first_local_id: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requester = requester
        self._calls = calls
        self._me = requester.worker_id
        self._names: dict[WorkerId, str] = {}
        self._shell = ProtocolShell(requester, first_local_id, clock)
        self._own = OwnerTable(self._me, self._shell)
        self._unscoped = Unscoped()

    # What RRefs ask of their home (`RRefHome`).

    @property
    def worker_id(self) -> WorkerId:
        """This worker."""
        return self._me

    @property
    def calls(self) -> RRefCalls:
        """The calls to other layers."""
        return self._calls

    def worker_name(self, worker_id: WorkerId) -> str:
        """The name of a worker; kept once it was asked for, so that an RRef can name its owner after shutdown too."""
        name = self._names.get(worker_id)
        if name is None:
            name = self._names[worker_id] = self._requester.worker_name(worker_id)
        return name

    def user_state(self, fork_id: ForkId) -> tuple[UserState, RpcError | None]:
        """How a user stands with its owner, and what went wrong if it failed."""
        with self._shell.locked() as protocol:
            return protocol.user_state(fork_id)

    # New RRefs.

    def local(self, value: Any, type_hint: Any = None) -> RRef:
        """``rpc.RRef(value, type_hint)``: an RRef to a value on this worker.

        Raises:
            InvalidTypeError: a ScriptModule without its interface type.
        """
        return RRef(self.owner_of(value, type_hint), self)

    def owner_of(self, value: Any, type_hint: Any = None) -> OwnerRRef:
        """The `OwnerRRef` inside `local`. The protocol hears of it only when it is shared."""
        if isinstance(value, torch.jit.ScriptModule) and type_hint is None:
            raise InvalidTypeError("The RRef being created contains a ScriptModule, must provide its ModuleInterface type hint. ")
        with self._shell.locked() as protocol:
            owner = self._own.get(RRefId(self._me, protocol.draw()), created=True)
        owner.set_value(value)
        return owner

    def new_remote(self, to: WorkerId) -> NewRemote:
        """For the caller of ``remote``: the RRef, not confirmed yet. Next the call is sent, and its end reported by
        `confirm_remote` or `creation_failed`, also if it could not be sent at all.

        Raises:
            ShutdownError: RPC has shut down on this worker.
        """
        if to == self._me:
            return self._new_remote_to_itself()

        def created(protocol: RRefProtocol) -> events.UserCreated:
            rref_id = RRefId(self._me, protocol.draw())
            return events.UserCreated(rref_id, ForkId(self._me, protocol.draw()), to)

        event = self._shell.step(created)
        return NewRemote(self._new_user(to, event.rref_id, event.fork_id), event.rref_id, event.fork_id)

    def _new_remote_to_itself(self) -> NewRemote:
        owners: list[OwnerRRef] = []

        def created(protocol: RRefProtocol) -> events.OwnerForked:
            rref_id = RRefId(self._me, protocol.draw())
            owners.append(self._own.get(rref_id, created=True))
            return events.OwnerForked(rref_id, ForkId(*rref_id), owners[0], created=True)

        event = self._shell.step(created)
        self._own.keep_while_running(owners[0])
        return NewRemote(RRef(owners[0], self), event.rref_id, event.fork_id)

    def confirm_remote(self, rref_id: RRefId, fork_id: ForkId) -> None:
        """The ``remote`` call was answered."""
        if tuple(rref_id) == tuple(fork_id):
            self._shell.handle(events.SelfRemoteEnded(rref_id, None))
        else:
            self._shell.handle(events.CreationConfirmed(fork_id))

    def creation_failed(self, rref_id: RRefId, fork_id: ForkId, cause: RpcError) -> None:
        """The ``remote`` call failed: every later use of the RRef raises `RRefCreationError`, or `WorkerLostError` if that is
        why: whether the call or the RRef learns of a loss first is chance."""
        kind = WorkerLostError if isinstance(cause, WorkerLostError) else RRefCreationError
        timed_out = isinstance(cause, RpcTimeoutError)
        error = kind(CREATION_TIMED_OUT if timed_out else f"RRef creation via rpc.remote() failed: {cause}")
        error.__cause__ = cause
        if tuple(rref_id) == tuple(fork_id):
            self._shell.handle(events.SelfRemoteEnded(rref_id, error))
        else:
            self._shell.handle(events.CreationFailed(fork_id, error))

    # Pickling and unpickling.

    def pickling(self) -> Forks:
        """``with context.pickling() as forks:`` collects the shares that are minted while a message is pickled. Then
        ``forks.sent_to(worker)`` or ``forks.cancel()``; if the body raises, they are cancelled."""
        return Forks(self._settle_forks)

    def _settle_forks(self, forks: tuple[events.MintedFork, ...], to: WorkerId | None) -> None:
        self._shell.handle(events.ForksCancelled(forks) if to is None else events.ForksSent(forks, to))

    def pickled_without_scope(self) -> Forks:
        """The shares that this thread has minted while no scope was open, since the last call of this: a pickler of the user's
        knows of no scopes."""
        forks = self.pickling()
        forks.shares, self._unscoped.shares = self._unscoped.shares, []
        return forks

    def unpickling(self) -> PendingUsers:
        """``with context.unpickling() as pending:`` makes this context the home of the RRefs that the body unpickles, and
        collects what `when_confirmed` has to wait for."""
        return PendingUsers(self.unpickle)

    def fork(self, rref: OwnerRRef | UserRRef) -> ForkData:
        """Mints a share in ``rref``, for the innermost `pickling` scope of this thread, and gives it in torch's form.

        Raises:
            RRefUsageError: the user has been deleted.
            ShutdownError: RPC has shut down on this worker.
        """
        minted: list[ForkId] = []

        def forked(protocol: RRefProtocol) -> events.OwnerForked | events.UserForked:
            minted.append(ForkId(self._me, protocol.draw()))
            if isinstance(rref, OwnerRRef):
                return events.OwnerForked(rref.rref_id, minted[0], rref, rref.created)
            return events.UserForked(rref.fork_id, minted[0])

        self._shell.step(forked)
        share = (rref.owner, *rref.rref_id, *minted[0], self._me, _TYPE_NAME)
        scope = current_forks()
        (self._unscoped.shares if scope is None else scope.shares).append(share)
        return share

    def unpickle(self, data: ForkData) -> RRef:
        """The RRef for a share that a message brought: ``PyRRef._deserialize``.

        Inside an `unpickling` scope an RRef of this worker's that is no more is rebuilt with the error in place of its value, and
        `when_confirmed` reports the error.

        Raises:
            RRefUsageError: the share was unpickled before, or this worker owned the RRef and has deleted it.
            RRefCreationError: the ``remote`` call that was to create the RRef here has failed.
            ShutdownError: RPC has shut down on this worker.
        """
        owner_id, rref_id, fork_id, parent = unpack_fork(data)
        if owner_id == self._me:
            return self._unpickle_own(rref_id, fork_id, parent)
        self._shell.handle(events.UserUnpickled(rref_id, fork_id, owner_id, parent))
        scope = current_pending()
        if scope is not None:
            scope.fork_ids.append(fork_id)
        return self._new_user(owner_id, rref_id, fork_id)

    def _unpickle_own(self, rref_id: RRefId, fork_id: ForkId, parent: WorkerId) -> RRef:
        owners: list[OwnerRRef] = []

        def unpickled(_: RRefProtocol) -> events.OwnerUnpickled:
            owners.append(self._own.get(rref_id, created=False))
            return events.OwnerUnpickled(rref_id, fork_id, parent, owners[0], owners[0].created)

        try:
            self._shell.step(unpickled)
        except RpcError as error:
            scope = current_pending()
            if scope is None:
                raise
            # Its traceback holds this frame, hence the owner: without it, reference counting suffices to free them.
            scope.error = error.with_traceback(None)
            owners[0].set_error(error)
        return RRef(owners[0], self)

    def when_confirmed(self, pending: PendingUsers, callback: OnConfirmed) -> None:
        """Calls ``callback(None)`` once the owners know of all ``pending`` users, or ``callback(error)`` if one of them never
        will: now, or later on a thread of the agent."""
        if pending.error is not None:
            callback(pending.error)
        elif pending.fork_ids:
            self._shell.handle(events.ConfirmationAwaited(callback, tuple(pending.fork_ids)))
        else:
            callback(None)

    # Requests of other workers.

    def create_owner(self, rref_id: RRefId, fork_id: ForkId) -> OwnerRRef:
        """A ``remote`` call arrived: the place for its value. Called again before the value is set, it gives the same object.

        Raises:
            ShutdownError: RPC has shut down on this worker.
        """
        owners: list[OwnerRRef] = []

        def created(_: RRefProtocol) -> events.OwnerCreated:
            owners.append(self._own.get(rref_id, created=True))
            # The creator minted the fork id itself, so the id says who it is.
            return events.OwnerCreated(rref_id, fork_id, WorkerId(fork_id.created_on), owners[0])

        self._shell.step(created)
        self._own.keep_while_running(owners[0])
        return owners[0]

    def when_owner_ready(self, rref_id: RRefId, callback: OnOwnerReady) -> None:
        """Waits for the RRef's creation and for its value, then calls ``callback(owner, None)``, or ``callback(owner, error)`` if
        there is an error in place of the value, or ``callback(None, error)`` if there is no such RRef: now, or later on the
        thread that brings the value."""
        owners: list[OwnerRRef] = []

        def fetched(_: RRefProtocol) -> events.OwnerFetched:
            owners.append(self._own.get(rref_id, created=False))
            return events.OwnerFetched(rref_id, owners[0], owners[0].created)

        try:
            self._shell.step(fetched)
        except RpcError as error:
            callback(None, error)
            return
        owners[0].add_callback(lambda owner: callback(owner, owner.error))

    def on_user_deletes(self, deletes: Iterable[RRefUserDelete]) -> None:
        """RREF_USER_DELETE arrived; to be answered by an `Ack`."""
        self._shell.handle(*[events.UserDeleted(delete.rref_id, delete.fork_id) for delete in deletes])

    def on_fork_request(self, source: WorkerId, rref_id: RRefId, fork_id: ForkId) -> None:
        """RREF_FORK_REQUEST arrived from ``source``; to be answered by an `Ack`.

        Raises:
            RRefUsageError: the RRef was deleted.
            WorkerLostError: ``source`` was declared dead.
            ShutdownError: RPC has shut down on this worker.
        """
        self._shell.handle(events.ForkRequested(rref_id, fork_id, source))

    def on_child_accept(self, fork_id: ForkId) -> None:
        """RREF_CHILD_ACCEPT arrived; to be answered by an `Ack`."""
        self._shell.handle(events.ChildAccepted(fork_id))

    # The group, and the end.

    def on_worker_lost(self, worker_id: WorkerId, error: RpcError) -> None:
        """``worker_id`` died or left: the shares it held end, and RRefs it owned raise ``error`` when they are used."""
        self._shell.handle(events.WorkerLost(worker_id, error))

    def on_worker_joined(self, worker_id: WorkerId) -> None:
        """A new process has the id ``worker_id``, under which a former one may have been lost."""
        self._names.pop(worker_id, None)
        self._shell.handle(events.WorkerJoined(worker_id))

    def drain(self) -> None:
        """Returns once the deletion of all users that nobody refers to any more has begun. It begins without being asked, soon
        after the last reference goes."""
        self._shell.drain()

    def delete_all_users_and_unforked_owners(self, timeout: float = _SHUTDOWN_TIMEOUT) -> None:
        """Waits until no user and no child is pending, deletes every user on this worker, and waits until the others have deleted
        theirs of RRefs owned here; each wait takes at most ``timeout`` seconds, and one that does not suffice is logged."""
        self._drop_all_users(timeout)
        if not self._shell.wait_until(lambda protocol: protocol.counts.is_empty, timeout):
            self._log_timeout("the users of the RRefs owned here to be deleted", timeout)

    def delete_all_users(self, timeout: float = _SHUTDOWN_TIMEOUT) -> None:
        """Waits until no user and no child is pending, deletes every user on this worker, and waits until their owners know; each
        wait takes at most ``timeout`` seconds, and one that does not suffice is logged."""
        self._drop_all_users(timeout)
        if not self._shell.wait_until(lambda protocol: protocol.counts.has_no_users, timeout):
            self._log_timeout("the owners of deleted users to answer", timeout)

    def _drop_all_users(self, timeout: float) -> None:
        self.drain()
        if not self._shell.wait_until(lambda protocol: protocol.counts.is_settled, timeout):
            self._log_timeout("users to be confirmed", timeout)
        self._shell.handle(events.AllUsersDropped())

    def destroy(self, ignore_leak: bool = True) -> None:
        """Ends all RRefs of this worker. Idempotent.

        Raises:
            RRefUsageError: forks of RRefs owned here are left, and ``ignore_leak`` is False. All has ended nevertheless.
        """
        with self._shell.locked() as protocol:
            leaks = protocol.leaks()
        self.close()
        if not leaks:
            return
        text = "\n".join(f"Leaking RRef {leak.rref_id} with fork Id {leak.fork_id}" for leak in leaks)
        if not ignore_leak:
            raise RRefUsageError(f"{text}\nDrop all references to RRefs, on all workers, before shutdown.")
        _logger.warning("References to RRefs owned here were left at shutdown, on other workers or on their way:\n%s", text)

    def close(self) -> None:
        """Ends all RRefs of this worker, and whatever waits for one, without a word on leaks. Idempotent."""
        error = ShutdownError("RPC was shut down on this worker while the RRef was still waited for")
        self._shell.handle(events.Closed(error))
        for owner in self._own.let_go():
            owner.set_error(error)  # changes nothing where there is a value
        self._shell.close()

    def debug_info(self) -> dict[str, str]:
        """torch's counters, as strings."""
        with self._shell.locked() as protocol:
            counts = protocol.counts
        return {
            "num_owner_rrefs": str(counts.owners),
            "num_pending_futures": str(counts.unanswered),
            "num_pending_users": str(counts.pending_users),
            "num_forks": str(counts.forks),
        }

    # Helpers.

    def _new_user(self, owner: WorkerId, rref_id: RRefId, fork_id: ForkId) -> RRef:
        self.worker_name(owner)
        return RRef(UserRRef(owner, rref_id, fork_id, self._shell.notes), self)

    def _log_timeout(self, what: str, timeout: float) -> None:
        _logger.warning("%s: timed out after %g s while waiting for %s", self.worker_name(self._me), timeout, what)
