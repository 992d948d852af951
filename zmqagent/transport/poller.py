"""Several threads wait for many descriptors at once, and each descriptor that is ready goes to one of them.

All idle threads of a worker wait here. The kernel wakes one of them for what arrives, and that one handles it; the others sleep
on, and none has to be told to take its place. A descriptor is disarmed while it is handled (EPOLLONESHOT of epoll_ctl(2)), so
that a source is used by one thread at a time. Where there is no epoll, the threads take turns at waiting.
"""

from __future__ import annotations

import select
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from zmqagent.transport.base import Event
from zmqagent.transport.waker import Waker

__all__ = ["READINESS", "Epoll", "Handler", "Poller", "Readiness", "Source", "Turns"]

Handler = Callable[[], Sequence[Event]]
"""Takes in what a descriptor has to offer. Need not take all: it is called again as long as the descriptor is ready."""


class Source:
    """A descriptor, and what is called, by one thread at a time, once it can be read (or, if ``writing``, written). The handler
    may change ``writing``.

    ``lock`` is held while the handler runs, and by whoever wants to be sure that it does not.
    """

    __slots__ = ("fd", "handler", "lock", "writing")

    def __init__(self, fd: int, handler: Handler, *, writing: bool = False) -> None:
        self.fd = fd
        self.handler = handler
        self.writing = writing
        self.lock = threading.Lock()


class _Held:
    """A source that a thread has handled and not let go, since when, and what is to be called then. ``has_several``: it brought
    more than one event at once."""

    __slots__ = ("ends", "has_several", "since", "source")

    def __init__(self, source: Source, since: float, has_several: bool) -> None:
        self.source = source
        self.since = since
        self.has_several = has_several
        self.ends: dict[Callable[[], object], None] = {}


class Poller:
    """The sources of one transport, and the threads that wait for them.

    ``_lock`` protects the table of sources; each source's own lock orders its handlers. Neither is held while waiting.
    """

    def __init__(self) -> None:
        self._readiness: Readiness = READINESS()
        self._lock = threading.Lock()
        self._sources: dict[int, Source] = {}
        # The threads inside `wait`, each of which enters and leaves in a single step of the interpreter.
        self._inside: set[int] = set()
        # By thread, the source that it handled last and has not let go; changed in single steps too.
        self._held: dict[int, _Held] = {}
        self._closed = False
        self._freed = False
        self._waker = Waker()
        self._wake_source = Source(self._waker.fileno(), self._awake)
        self.add(self._wake_source)

    def add(self, source: Source) -> None:
        """From now on ``source``'s handler is called whenever it is ready."""
        with self._lock:
            if not self._freed:
                self._sources[source.fd] = source
                self._readiness.arm(source.fd, source.writing, is_new=True)

    def remove(self, source: Source) -> None:
        """``source`` is not waited for any more; its handler may still run if it does so now. To be called before its descriptor
        is closed. Idempotent."""
        with self._lock:
            if self._sources.get(source.fd) is source and not self._freed:
                del self._sources[source.fd]
                self._readiness.disarm(source.fd)

    def wait(self, timeout: float | None) -> Sequence[Event] | None:
        """Waits until a source is ready and returns what its handler does; nothing after ``timeout`` seconds (None: no limit);
        None after `wake`, and once closed. Any number of threads may wait at once.

        The source is the calling thread's until that waits again, or `let_go`: what comes in meanwhile would only have another
        thread compete with this one for the interpreter.
        """
        me = threading.get_ident()
        self._let_go(me)
        self._inside.add(me)
        try:
            if self._closed:
                return None
            fd = self._readiness.wait(timeout)
            if self._is_closed():
                return None
            # Whoever owns it may have removed it meanwhile.
            source = None if fd is None else self._sources.get(fd)
            if source is None:
                return ()
            events = self._handle(source)
            return None if source is self._wake_source else events
        finally:
            self._inside.discard(me)
            if self._closed:
                self._free()

    def let_go(self) -> None:
        """The calling thread may be about to wait for something: others may handle the source that it has."""
        self._let_go(threading.get_ident())

    def let_go_overdue(self, since: float) -> bool:
        """Lets go the sources that threads have had since before ``since``; says whether there are others."""
        for thread, held in list(self._held.items()):
            if held.since <= since:
                self._let_go(thread)
        return bool(self._held)

    def at_end_of_several(self, end: Callable[[], object]) -> bool:
        """Whether the calling thread handles several events that came at once. If so, ``end`` is called once that has done with
        them, or its source is let go in another way."""
        held = self._held.get(threading.get_ident())
        if held is None or not held.has_several:
            return False
        held.ends[end] = None
        # Whoever let it go meanwhile may have overlooked this one.
        return self._held.get(threading.get_ident()) is held

    def wake(self) -> None:
        """Makes one `wait` that waits now, or else the next one, return None."""
        self._waker.set()

    def close(self) -> None:
        """Ends every `wait`. The sources' descriptors are their owners' to close. Idempotent."""
        self._closed = True
        # Left readable, so that all who wait come back.
        with self._lock:
            if not self._freed:
                self._readiness.arm_for_all(self._waker.fileno())
                self._waker.set()
        self._free()

    def _handle(self, source: Source) -> Sequence[Event]:
        # Held by another only if the descriptor's number was given to a new source meanwhile; whoever holds it arms it again.
        if not source.lock.acquire(blocking=False):
            return ()
        events: Sequence[Event] = ()
        try:
            events = source.handler()
        finally:
            source.lock.release()
            if events:
                self._held[threading.get_ident()] = _Held(source, time.monotonic(), len(events) > 1)
            else:
                self._arm_again(source)
        return events

    def _let_go(self, thread: int) -> None:
        held = self._held.pop(thread, None)
        if held is not None:
            for end in list(held.ends):
                end()
            self._arm_again(held.source)

    def _arm_again(self, source: Source) -> None:
        with self._lock:
            if self._sources.get(source.fd) is source and not self._freed:
                self._readiness.arm(source.fd, source.writing, is_new=False)

    def _is_closed(self) -> bool:
        return self._closed

    def _awake(self) -> Sequence[Event]:
        if not self._closed:
            self._waker.clear()
        return ()

    def _free(self) -> None:
        """Frees the descriptors once nobody waits for them: the last one out does."""
        with self._lock:
            if self._inside or self._freed:
                return
            self._freed = True
        self._readiness.close()
        self._waker.close()


class Readiness(Protocol):
    """Which descriptors are ready. Any thread may call any of these at any time."""

    def arm(self, fd: int, writing: bool, *, is_new: bool) -> None:
        """``fd`` is waited for, from now on or again, until it is ready once."""

    def arm_for_all(self, fd: int) -> None:
        """``fd`` will be readable for good in a moment: everybody who waits, now or later, is told."""

    def disarm(self, fd: int) -> None:
        """``fd`` is not waited for any more."""

    def wait(self, timeout: float | None) -> int | None:
        """A descriptor that is ready, told to one thread only; None after ``timeout`` seconds."""

    def close(self) -> None:
        """Nobody waits any more."""


class Epoll:
    """Readiness by epoll(7), which may be waited for, and changed, by any number of threads."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def arm(self, fd: int, writing: bool, *, is_new: bool) -> None:
        mask = (select.EPOLLOUT if writing else select.EPOLLIN) | select.EPOLLONESHOT
        if is_new:
            self._epoll.register(fd, mask)
        else:
            self._epoll.modify(fd, mask)

    def arm_for_all(self, fd: int) -> None:
        self._epoll.modify(fd, select.EPOLLIN)

    def disarm(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def wait(self, timeout: float | None) -> int | None:
        ready = self._epoll.poll(timeout, 1)
        return ready[0][0] if ready else None

    def close(self) -> None:
        self._epoll.close()


class Turns:
    """Readiness by whatever the system has: one thread waits, the others wait for their turn."""

    def __init__(self) -> None:
        # Held by the thread that waits.
        self._turn = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._for_all = False

    def arm(self, fd: int, writing: bool, *, is_new: bool) -> None:
        del is_new  # Who waits takes a descriptor out as it becomes ready.
        self._selector.register(fd, selectors.EVENT_WRITE if writing else selectors.EVENT_READ)

    def arm_for_all(self, fd: int) -> None:
        self._for_all = True

    def disarm(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def wait(self, timeout: float | None) -> int | None:
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            return None
        try:
            ready = () if self._for_all else self._selector.select(timeout)
            for key, _ in ready:
                self._selector.unregister(key.fd)
                return key.fd
            return None
        finally:
            self._turn.release()

    def close(self) -> None:
        self._selector.close()


READINESS: type[Epoll | Turns] = Epoll if hasattr(select, "epoll") else Turns
"""What this system has."""
