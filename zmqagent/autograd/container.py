"""The contexts of one worker, in a container that holds them weakly.

A context lives as long as its *lease*. On the worker that opened it, the lease is the object that ``_new_context`` returns and a
user's ``with`` block holds. On all others a table holds the lease, until the clean-up message comes or the opener is dead.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Set
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from zmqagent.agent.base import Requester
from zmqagent.autograd.cleanup import CleanupMessages
from zmqagent.autograd.context import DistAutogradContext
from zmqagent.autograd.functions import CONTEXT_GONE, SendRpcBackward
from zmqagent.exceptions import AutogradContextError, RpcError
from zmqagent.wire.types import WorkerId

__all__ = ["ContextLease", "DistAutogradContainer", "PassObserver"]

_COUNTER_BITS = 48
_REMEMBERED_RELEASES = 4096
"""How many released ids are remembered, so that messages which come late do not bring their contexts back."""


class PassObserver(Protocol):
    """The engine, as the container sees it."""

    def passes_under_way(self) -> int:
        """How many backward passes have begun on this worker and are not over."""

    def on_context_released(self, context_id: int, error: RpcError) -> None:
        """A context is gone; its pass ends by ``error``."""


class ContextLease:
    """The right of a context to exist, and what the user of an opened context holds: it answers for the context.

    Leases are equal if their ids are, which makes any lease a key to look up the context with.
    """

    __slots__ = ("__weakref__", "_context", "_id")

    def __init__(self, context_id: int, context: DistAutogradContext | None = None) -> None:
        self._id = context_id
        self._context = context

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContextLease) and self._id == other._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"<ContextLease {self._id}>"

    @property
    def context(self) -> DistAutogradContext:
        """The context that this lease keeps."""
        if self._context is None:
            raise AutogradContextError(_not_found(self._id))
        return self._context

    def _context_id(self) -> int:
        return self._id

    def _send_functions(self) -> dict[int, SendRpcBackward]:
        return self.context._send_functions()

    def _recv_functions(self) -> dict[int, Any]:
        return self.context._recv_functions()

    def _known_worker_ids(self) -> set[WorkerId]:
        return self.context._known_worker_ids()


class _CurrentContext:
    """Each thread's current context, kept in torch's own thread-local state: TorchScript takes that along to the threads on which
    a script is forked, or goes on after it has waited."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._key = f"zmqagent.current_context.{next(self._numbers)}"

    def get(self) -> weakref.ref[DistAutogradContext] | None:
        """What was set last on this thread."""
        if not torch._C._is_key_in_tls(self._key):
            return None
        reference: weakref.ref[DistAutogradContext] | None = torch._C._get_obj_in_tls(self._key)
        return reference

    def set(self, reference: weakref.ref[DistAutogradContext] | None) -> None:
        """Keeps ``reference`` for this thread."""
        torch._C._stash_obj_in_tls(self._key, reference)


class _Activation:
    """A ``with`` block in which a context, or none, is the thread's current one."""

    __slots__ = ("_before", "_context", "_current")

    def __init__(self, current: _CurrentContext, context: DistAutogradContext | None) -> None:
        self._current = current
        self._context = context

    def __enter__(self) -> None:
        self._before = self._current.get()
        # Calls outside any context set nothing: that is what takes the time.
        if self._context is not None or self._before is not None:
            self._current.set(None if self._context is None else weakref.ref(self._context))

    def __exit__(self, *_: object) -> None:
        if self._current.get() is not self._before:
            self._current.set(self._before)


class DistAutogradContainer:
    """Makes, finds and releases the contexts of one worker. All methods may be called from any thread.

    Args:
        requester: sends the clean-up messages.
        first_local_id: where the ids of contexts and messages begin: after those that a former life of this worker drew.
        cleanups: how other workers are told that contexts have ended: by default of each at once.
    """

    def __init__(self, requester: Requester, first_local_id: int = 0, cleanups: CleanupMessages | None = None) -> None:
        self._me = requester.worker_id
        self._cleanups = CleanupMessages(requester) if cleanups is None else cleanups
        self._first_id = self._me << _COUNTER_BITS
        self._context_ids = itertools.count(self._first_id + first_local_id)
        self._message_ids = itertools.count(self._first_id + first_local_id)
        self._current = _CurrentContext()
        self._observer: PassObserver | None = None
        # Protects the three maps below, for single steps; no call leaves this file while it is held. Re-entrant, because the
        # garbage collector may run anything at any time on the thread that holds it.
        self._lock = threading.RLock()
        self._contexts: weakref.WeakKeyDictionary[ContextLease, DistAutogradContext] = weakref.WeakKeyDictionary()
        self._leases: dict[int, ContextLease] = {}
        self._released: OrderedDict[int, None] = OrderedDict()
        # Notes of finalizers: (context id, workers to tell). Drained by `collect`.
        self._dropped: SimpleQueue[tuple[int, set[WorkerId]]] = SimpleQueue()

    def observe(self, observer: PassObserver) -> None:
        """Makes ``observer`` hear of contexts that are released."""
        self._observer = observer

    # The calling thread's current context.

    def new_context(self) -> ContextLease:
        """Opens a context and makes it the calling thread's current one; it lives until `release_context`, or until the returned
        lease is dropped.

        Raises:
            AutogradContextError: the thread has a current context.
        """
        self.collect()
        if self.current_context_or_none() is not None:
            raise AutogradContextError(
                "Already have an autograd context id for this thread. Leave its `with` block before you enter another one."
            )
        context_id = next(self._context_ids)
        context = DistAutogradContext(context_id, self._draw_message_id)
        lease = ContextLease(context_id, context)
        weakref.finalize(lease, self._dropped.put, (context_id, context.known_workers)).atexit = False
        with self._lock:
            self._contexts[lease] = context
        self._current.set(weakref.ref(context))
        return lease

    def current_context(self) -> DistAutogradContext:
        """The calling thread's current context.

        Raises:
            AutogradContextError: it has none.
        """
        context = self.current_context_or_none()
        if context is None:
            raise AutogradContextError(
                "Current thread doesn't have a valid autograd context. Please wrap your code using: "
                "`with torch.distributed.autograd.context() as context_id` to generate a valid context"
            )
        return context

    def current_context_or_none(self) -> DistAutogradContext | None:
        """The calling thread's current context, if it has one that has not been released."""
        reference = self._current.get()
        context = None if reference is None else reference()
        return None if context is None or context.is_released else context

    def activate(self, context: DistAutogradContext | None) -> AbstractContextManager[None]:
        """Makes ``context`` (or none) the calling thread's current one for the length of a ``with`` block."""
        return _Activation(self._current, context)

    # Looking up.

    def retrieve_context(self, context_id: int) -> DistAutogradContext:
        """The context with this id.

        Raises:
            AutogradContextError: there is none on this worker.
        """
        context = self.find_context(context_id)
        if context is None:
            raise AutogradContextError(_not_found(context_id))
        return context

    def find_context(self, context_id: int) -> DistAutogradContext | None:
        """The context with this id, or None."""
        with self._lock:
            return self._contexts.get(ContextLease(context_id))

    def is_valid_context(self, context_id: int) -> None:
        """Raises `AutogradContextError` if there is no context with this id on this worker."""
        self.retrieve_context(context_id)

    def get_or_create_context(self, context_id: int) -> DistAutogradContext:
        """The context with this id; if a message mentions it for the first time, it is made, and kept until its clean-up.

        A message that comes after the clean-up gets a context of its own, which nobody can look up and which dies with the call
        that uses it.
        """
        self.collect()
        with self._lock:
            context = self._contexts.get(ContextLease(context_id))
            if context is not None:
                return context
            context = DistAutogradContext(context_id, self._draw_message_id)
            if context_id not in self._released and context_id >> _COUNTER_BITS != self._me:
                lease = self._leases[context_id] = ContextLease(context_id, context)
                self._contexts[lease] = context
                return context
        # Whatever it spreads to has to be told as well.
        weakref.finalize(context, self._dropped.put, (context_id, context.known_workers)).atexit = False
        return context

    # The end of contexts.

    def release_context(self, context_id: int) -> None:
        """Erases the context, here first, and tells the workers it has spread to, who pass it on.

        Raises:
            AutogradContextError: there is no such context on this worker.
        """
        if not self._release(context_id, AutogradContextError(CONTEXT_GONE)):
            raise AutogradContextError(_not_found(context_id))

    def on_cleanup(self, context_id: int, source: WorkerId) -> None:
        """Serves a clean-up message from ``source``: erases the context if it is here and passes the message on."""
        self.collect()
        if not self._release(context_id, AutogradContextError(CONTEXT_GONE), know={source}):
            with self._lock:
                self._remember_release(context_id)

    def release_opened_by(self, worker_id: WorkerId, error: RpcError) -> None:
        """Erases all contexts that a worker opened which died by ``error``; the others learn of the death themselves."""
        with self._lock:
            orphans = [context_id for context_id in self._leases if context_id >> _COUNTER_BITS == worker_id]
        for context_id in orphans:
            self._release(context_id, error, know=None)
        with self._lock:
            # A worker that comes back under this id counts from the start again.
            for context_id in [released for released in self._released if released >> _COUNTER_BITS == worker_id]:
                del self._released[context_id]

    def close(self, error: RpcError) -> None:
        """Erases all contexts without a word to others: the agent shuts down by ``error``."""
        with self._lock:
            context_ids = [context.context_id for context in self._contexts.values()]
        for context_id in context_ids:
            self._release(context_id, error, know=None)
        self._cleanups.close()

    def collect(self) -> None:
        """Sends the clean-up messages for contexts whose lease was dropped without a release; call it now and then."""
        while True:
            try:
                context_id, workers = self._dropped.get_nowait()
            except Empty:
                return
            with self._lock:
                self._remember_release(context_id)
            self._end(context_id, workers, AutogradContextError(CONTEXT_GONE))

    def _release(self, context_id: int, error: RpcError, know: Set[WorkerId] | None = frozenset()) -> bool:
        """Erases the context, if it is here, and tells the workers it has spread to but those that ``know``; None: nobody."""
        with self._lock:
            # The lease dies with the end of this method at the latest, the context with its last user.
            lease = self._leases.pop(context_id, None) or ContextLease(context_id)
            context = self._contexts.pop(lease, None)
            if context is None:
                return False
            self._remember_release(context_id)
        workers = context.release()
        # Nothing is left to tell when the lease dies.
        context.known_workers.clear()
        self._end(context_id, set() if know is None else workers - know, error)
        return True

    def _remember_release(self, context_id: int) -> None:
        self._released[context_id] = None
        self._released.move_to_end(context_id)
        if len(self._released) > _REMEMBERED_RELEASES:
            self._released.popitem(last=False)

    def _end(self, context_id: int, workers: set[WorkerId], error: RpcError) -> None:
        """Ends what went on in a context that is erased, and tells ``workers``."""
        if self._observer is not None:
            self._observer.on_context_released(context_id, error)
        self._cleanups.tell(workers - {self._me}, context_id)

    # Numbers.

    def get_max_id(self) -> int:
        """The greatest context or message id that this worker can draw."""
        return self._first_id + (1 << _COUNTER_BITS) - 1

    def debug_info(self) -> dict[str, str]:
        """What torch's ``_get_debug_info`` tells."""
        self.collect()
        with self._lock:
            contexts = len(self._contexts)
        passes = 0 if self._observer is None else self._observer.passes_under_way()
        return {"num_current_backward_passes": str(passes), "num_autograd_contexts": str(contexts)}

    def contexts(self) -> list[DistAutogradContext]:
        """All contexts of this worker."""
        with self._lock:
            return list(self._contexts.values())

    def _draw_message_id(self) -> int:
        return next(self._message_ids)


def _not_found(context_id: int) -> str:
    return f"Could not find autograd context with id: {context_id}"
