"""^C for a main thread that waits in C++.

``torch.futures.Future.wait``, ``wait_all`` and futures made by ``then`` wait in C++, where Python's signal handlers do not run. C
code writes each signal's number to a file descriptor at once, though (`signal.set_wakeup_fd`). A thread reads it, gives the main
thread a moment to raise KeyboardInterrupt by itself, and if it did not, has the calls that wait failed: that ends the wait, and
the handler runs.

Only Python's default SIGINT handler is extended. A program with a handler of its own decides for itself what ^C means.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["InterruptWatch"]

_GRACE = 0.25
"""Seconds the main thread gets to run the handler before it is taken to wait in C++."""

_END = b"\0"  # no signal has the number 0

_active: InterruptWatch | None = None
"""The watch that has SIGINT. Only the main thread changes it."""


class InterruptWatch:
    """Calls ``on_interrupt`` (on a thread of its own) when ^C was pressed and the main thread cannot react.

    Does nothing if it is made outside the main thread, or if SIGINT has a handler of the user's or another watch.
    """

    def __init__(self, on_interrupt: Callable[[], None]) -> None:
        self._on_interrupt = on_interrupt
        self._reacted = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        if _active is not None and _active._is_closed:
            # It was closed on another thread, which could not give SIGINT back.
            _active._give_back()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._take()

    def _take(self) -> None:
        global _active
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._former_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._handle)
        # Reads the pipe until _give_back writes _END to it. A daemon: it must not hold up an exit without shutdown().
        self._thread = threading.Thread(target=self._watch, name="zmqagent-interrupt", daemon=True)
        self._thread.start()
        _active = self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._reacted.set()
        signal.default_int_handler(number, frame)

    def _watch(self) -> None:
        while True:
            numbers = os.read(self._read_end, 64)
            if self._former_fd != -1:
                # As Python itself does: whoever had the descriptor may have closed it, or not read it for long.
                with contextlib.suppress(OSError):
                    os.write(self._former_fd, numbers.rstrip(_END))
            if signal.SIGINT in numbers:
                if not self._reacted.wait(_GRACE) and not self._is_closed:
                    self._on_interrupt()
                    # Now the main thread comes to its handler; what that notes must not count for the next ^C.
                    self._reacted.wait(_GRACE)
                self._reacted.clear()
            if _END in numbers:
                return

    def close(self) -> None:
        """Gives SIGINT back and ends the thread. Outside the main thread, which alone may change handlers, the handler stays (it
        does what Python's own does) until the next watch is made, and calls nothing any more. Idempotent."""
        self._is_closed = True
        if threading.current_thread() is threading.main_thread():
            self._give_back()

    def _give_back(self) -> None:
        """Undoes `_take`. ^C may end this at any point; the next call goes on."""
        global _active
        thread = self._thread
        if thread is None:
            return
        self._restore()
        os.write(self._write_end, _END)
        thread.join()
        self._thread = None
        _active = None
        os.close(self._read_end)
        os.close(self._write_end)

    def _restore(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        current = signal.set_wakeup_fd(-1)
        former = self._former_fd if current == self._write_end else current
        if former != -1:
            # Closed meanwhile, it is of no use to anybody.
            with contextlib.suppress(OSError, ValueError):
                signal.set_wakeup_fd(former)

    def _forget(self) -> None:
        """In a forked child, which has neither the thread nor a use for the parent's pipe."""
        self._former_fd = -1
        self._restore()
        self._thread = None


def _after_fork_in_child() -> None:
    global _active
    watch, _active = _active, None
    if watch is not None:
        watch._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
