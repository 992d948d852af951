"""An RRef as the owner keeps it, as a user holds it, and as the user's code sees it.

`OwnerRRef` holds the value or the place for it, `UserRRef` is one share in another worker's RRef and reports its own death, and
`RRef` is what programs hold: it passes for torch's own `torch.distributed.rpc.RRef`. Knows nothing of autograd and of calls: what
needs them comes in as `RRefCalls`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol, cast

import torch
import torch.distributed.rpc as torch_rpc
from torch.distributed.rpc import WorkerInfo, internal
from torch.distributed.rpc.api import _rref_typeof_on_owner, _rref_typeof_on_user
from torch.distributed.rpc.rref_proxy import RRefProxy
from torch.futures import Future

from zmqagent.agent.base import UNSET_TIMEOUT, check_timeout
from zmqagent.exceptions import BackwardError, RpcError, RpcTimeoutError, RRefUsageError
from zmqagent.rref.forks import receive_rref
from zmqagent.rref.users import UserState
from zmqagent.wire.types import ForkData, ForkId, RRefId, WorkerId

__all__ = ["OwnerRRef", "RRef", "RRefCalls", "RRefHome", "UserRRef", "backward_root"]

_logger = logging.getLogger(__name__)

OnReady = Callable[["OwnerRRef"], None]


class OwnerRRef:
    """The owner's side of an RRef: a value or an error, once there is one, and whoever waits for it.

    ``created`` is False as long as this worker has only heard of the RRef, and its ``remote`` call has not arrived.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_creation_failed",
        "_error",
        "_lock",
        "_ready",
        "_value",
        "created",
        "owner",
        "rref_id",
    )

    def __init__(self, owner: WorkerId, rref_id: RRefId, *, created: bool) -> None:
        self.owner = owner
        self.rref_id = rref_id
        self.created = created
        # Orders set_value, set_error and add_callback: one value wins, and no callback is missed. Callbacks run outside it.
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._callbacks: list[OnReady] = []
        self._value: Any = None
        self._error: BaseException | None = None
        self._creation_failed = False

    def __str__(self) -> str:
        return f"OwnerRRef(rref_id={self.rref_id})"

    @property
    def is_ready(self) -> bool:
        """Whether there is a value or an error."""
        return self._ready.is_set()

    @property
    def error(self) -> BaseException | None:
        """What took the value's place, if something did."""
        return self._error

    @property
    def creation_error(self) -> BaseException | None:
        """Why the ``remote`` call has failed, if it has: not what its function raised, but why that may never have run."""
        return self._error if self._creation_failed else None

    def set_value(self, value: Any) -> bool:
        """Gives the RRef its value, and tells who waits. False, and nothing changes, if it has a value or an error already."""
        return self._set(value, None)

    def set_error(self, error: BaseException) -> bool:
        """Gives the RRef an error in place of a value. False, and nothing changes, if it has a value or an error already."""
        return self._set(None, error)

    def fail_creation(self, error: RpcError) -> None:
        """Takes note that the ``remote`` call has failed, unless there is a value or an error already."""
        self._set(None, error, creation_failed=True)

    def value(self, timeout: float | None = None) -> Any:
        """The value; waits for it for at most ``timeout`` seconds (None: until it is there, or RPC shuts down).

        Raises:
            RpcTimeoutError: the time is over.
            BaseException: what took the value's place.
        """
        # Event.wait runs in Python, where ^C is seen.
        if not self._ready.wait(timeout):
            raise RpcTimeoutError(
                f"{self} got no value: RPC ran for more than set timeout ({(timeout or 0) * 1000:.0f} ms) "
                "and will now be marked with an error"
            )
        if self._error is not None:
            raise _fresh(self._error)
        return self._value

    def add_callback(self, callback: OnReady) -> None:
        """Calls ``callback`` once there is a value or an error: now, or on the thread that sets it."""
        with self._lock:
            if not self._ready.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def _set(self, value: Any, error: BaseException | None, *, creation_failed: bool = False) -> bool:
        with self._lock:
            if self._ready.is_set():
                return False
            self._value, self._error, self._creation_failed = value, error, creation_failed
            callbacks, self._callbacks = self._callbacks, []
            self._ready.set()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                # The others wait too; who sets the value has no part in what one of them does with it.
                _logger.exception("a callback of %s failed", self)
        return True


def _fresh(error: BaseException) -> BaseException:
    """A copy to raise: a shared exception would collect the tracebacks, hence the local variables, of all who raise it."""
    try:
        fresh = copy.copy(error)
    except Exception:  # a user's exception class may do anything when it is copied
        return error
    if type(fresh) is not type(error):
        return error
    fresh.__cause__ = error.__cause__
    return fresh


class UserRRef:
    """One share in another worker's RRef. When nobody refers to it any more, it leaves its fork id in ``notes``."""

    __slots__ = ("__weakref__", "_notes", "fork_id", "owner", "rref_id")

    def __init__(self, owner: WorkerId, rref_id: RRefId, fork_id: ForkId, notes: SimpleQueue[Any]) -> None:
        self.owner = owner
        self.rref_id = rref_id
        self.fork_id = fork_id
        self._notes = notes

    def __str__(self) -> str:
        return f"UserRRef(rref_id={self.rref_id}, fork_id={self.fork_id})"

    def __del__(self) -> None:
        # Runs in the middle of anything, with any lock held: SimpleQueue.put is made for this, and is all that is done.
        self._notes.put(self.fork_id)


class RRefCalls(Protocol):
    """The calls to other layers that an RRef makes; injected, since this layer may import neither calls nor autograd."""

    def fetch(self, owner: WorkerId, rref_id: RRefId, timeout: float) -> Future[Any]:
        """Asks ``owner`` for the value (RREF_FETCH, in the current autograd context). ``timeout`` as in `Requester.request`."""

    def backward_on_owner(self, owner: WorkerId, rref_id: RRefId, context_id: int, retain_graph: bool) -> None:
        """Runs the backward pass of the context on ``owner``, from the RRef's value; returns when it is over."""

    def backward_here(self, root: torch.Tensor, context_id: int, retain_graph: bool) -> None:
        """Runs the backward pass of the context on this worker, from ``root``."""


class RRefHome(Protocol):
    """What an `RRef` needs of the context that it lives in."""

    @property
    def worker_id(self) -> WorkerId:
        """This worker."""

    @property
    def calls(self) -> RRefCalls:
        """The injected calls."""

    def worker_name(self, worker_id: WorkerId) -> str:
        """The name of a worker, also after shutdown."""

    def user_state(self, fork_id: ForkId) -> tuple[UserState, BaseException | None]:
        """How a user stands with its owner."""

    def fork(self, rref: OwnerRRef | UserRRef) -> ForkData:
        """Mints a share in ``rref`` that a message will carry."""


def backward_root(value: Any) -> torch.Tensor:
    """``value``, if a backward pass can start from it.

    Raises:
        BackwardError: it is no tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise BackwardError(f"RRef should contain a tensor for .backward(), but it contains a {type(value).__qualname__}")
    return value


class RRef:
    """A reference to a value on some worker: what programs hold. The methods are those of `torch.distributed.rpc.RRef`."""

    def __init__(self, rref: OwnerRRef | UserRRef, home: RRefHome) -> None:
        self._rref = rref
        self._home = home
        self._creation: Future[Any] | None = None
        self._profiling: Future[Any] | None = None
        self._type: Future[type] | None = None

    @property  # type: ignore[misc]  # object's can be assigned to
    def __class__(self) -> type:
        """torch's class, so that ``isinstance(x, rpc.RRef)`` holds; ``type(x)`` tells the truth, and is what pickle asks."""
        return cast(type, torch_rpc.RRef)

    def __str__(self) -> str:
        rref = self._rref
        if isinstance(rref, OwnerRRef):
            return f"OwnerRRef({rref.rref_id})"
        return f"UserRRef(RRefId = {rref.rref_id}, ForkId = {rref.fork_id})"

    __repr__ = __str__

    # Where the value is.

    def is_owner(self) -> bool:
        """Whether the value is on this worker."""
        return isinstance(self._rref, OwnerRRef)

    def confirmed_by_owner(self) -> bool:
        """Whether the owner knows of this reference; always true on the owner."""
        if isinstance(self._rref, OwnerRRef):
            return True
        # Only a confirmed user is deleted while somebody refers to it.
        state, _ = self._home.user_state(self._rref.fork_id)
        return state in (UserState.CONFIRMED, UserState.DELETED)

    def owner(self) -> WorkerInfo:
        """The worker that has the value."""
        return self._worker_info(self._rref.owner)

    def owner_name(self) -> str:
        """The name of the worker that has the value."""
        return self._home.worker_name(self._rref.owner)

    # The value.

    def to_here(self, timeout: float = UNSET_TIMEOUT) -> Any:
        """The value itself on the owner, a copy of it elsewhere; waits until it exists.

        ``timeout`` is in seconds: -1 is the agent's default (on the owner: no limit), 0 no limit.

        Raises:
            RRefCreationError: the ``remote`` call that was to create the RRef failed.
            RRefUsageError: the reference was deleted, as at shutdown.
            RpcTimeoutError: the time is over.
            WorkerLostError: the owner died.
        """
        rref = self._rref
        if isinstance(rref, OwnerRRef):
            seconds = check_timeout(timeout)
            return rref.value(seconds if seconds > 0 else None)
        self._check_usable(rref, "Cannot call to_here() on it after deletion.")
        with self._profiled_to_here():
            return self._home.calls.fetch(rref.owner, rref.rref_id, timeout).wait()

    def local_value(self) -> Any:
        """The value, on its owner; waits until it exists.

        Raises:
            RRefUsageError: this worker is not the owner.
            RRefCreationError: the ``remote`` call that was to create the RRef failed.
        """
        if isinstance(self._rref, OwnerRRef):
            return self._rref.value()
        here = self._worker_info(self._home.worker_id)
        raise RRefUsageError(f"For {self._rref}, can't call localValue() on user {here}. Call it on owner {self.owner()}.")

    # Calls on the owner.

    def rpc_sync(self, timeout: float = UNSET_TIMEOUT) -> RRefProxy:
        """A proxy whose methods are the value's, run on the owner by ``rpc_sync``."""
        return RRefProxy(self, torch_rpc.rpc_sync, timeout)

    def rpc_async(self, timeout: float = UNSET_TIMEOUT) -> RRefProxy:
        """A proxy whose methods are the value's, run on the owner by ``rpc_async``."""
        return RRefProxy(self, torch_rpc.rpc_async, timeout)

    def remote(self, timeout: float = UNSET_TIMEOUT) -> RRefProxy:
        """A proxy whose methods are the value's, run on the owner by ``remote``."""
        return RRefProxy(self, torch_rpc.remote, timeout)

    def backward(self, dist_autograd_ctx_id: int = -1, retain_graph: bool = False) -> None:
        """Runs a backward pass from the value, on its owner.

        Without a context id (-1) gradients go to ``.grad`` as with ``Tensor.backward``; only the owner can do that.

        Raises:
            BackwardError: the value is no tensor, or a context id is missing.
        """
        rref = self._rref
        if isinstance(rref, UserRRef):
            if dist_autograd_ctx_id == -1:
                raise BackwardError("User RRefs require 'dist_autograd_ctx_id' to be specified")
            self._home.calls.backward_on_owner(rref.owner, rref.rref_id, dist_autograd_ctx_id, retain_graph)
            return
        root = backward_root(rref.value())
        if dist_autograd_ctx_id == -1:
            torch.autograd.backward([root], retain_graph=retain_graph)
        else:
            self._home.calls.backward_here(root, dist_autograd_ctx_id, retain_graph)

    # What torch's own Python code asks for.

    def _get_type(self, timeout: float = UNSET_TIMEOUT, blocking: bool = True) -> Any:
        """The value's type, or a future of it. The owner is asked once; a failed answer is not kept."""
        future = self._type
        if future is None or _has_failed(future):
            if self.is_owner():
                future = _rref_typeof_on_owner(self, blocking=False)
            else:
                future = _rref_typeof_on_user(self, timeout=timeout, blocking=False)
            self._type = future
        return future.wait() if blocking else future

    def _get_future(self) -> Future[Any]:
        """The future of the ``remote`` call that created this RRef."""
        if self._creation is None:
            raise RRefUsageError(f"{self} was not created by rpc.remote() on this worker, so there is no future of its creation")
        return self._creation

    def _set_future(self, creation: Future[Any]) -> None:
        """Keeps the future of the ``remote`` call, for profiling."""
        self._creation = creation

    def _get_profiling_future(self) -> Future[Any]:
        """The future that is done when the creation has been profiled."""
        if self._profiling is None:
            raise RRefUsageError("Profiling future has not been set!")
        return self._profiling

    def _set_profiling_future(self, future: Future[Any]) -> None:
        self._profiling = future

    def _serialize(self) -> ForkData:
        """Mints a share in this RRef and gives it in torch's form, for a pickle."""
        if isinstance(self._rref, UserRRef):
            self._check_usable(self._rref, "Cannot call fork an UserRRef after deletion.")
        elif self._rref.creation_error is not None:
            raise _fresh(self._rref.creation_error)
        return self._home.fork(self._rref)

    def __reduce__(self) -> tuple[Callable[[ForkData], Any], tuple[ForkData]]:
        # torch's own sign that the RPC pickler is at work; other picklers would make shares that nobody ever claims.
        if getattr(internal._thread_local_tensor_tables, "send_tables", None) is None:
            raise RRefUsageError("Can not pickle rref in python pickler, rref can only be pickled when using RPC")
        return receive_rref, (self._serialize(),)

    # Helpers.

    def _check_usable(self, rref: UserRRef, complaint: str) -> None:
        state, error = self._home.user_state(rref.fork_id)
        if error is not None:
            raise _fresh(error)
        if state is UserState.DELETED:
            raise RRefUsageError(f"{rref} has been deleted. {complaint}")

    def _profiled_to_here(self) -> contextlib.AbstractContextManager[Any]:
        if not torch.autograd._profiler_enabled():
            return contextlib.nullcontext()
        me = self._home.worker_name(self._home.worker_id)
        return torch.autograd.profiler.record_function(f"to_here#({me})->({self.owner_name()})")

    def _worker_info(self, worker_id: WorkerId) -> WorkerInfo:
        return WorkerInfo(self._home.worker_name(worker_id), worker_id)


def _has_failed(future: Future[Any]) -> bool:
    if not future.done():
        return False
    try:
        future.value()
    except Exception:  # whatever it is, its caller has had it
        return True
    return False
