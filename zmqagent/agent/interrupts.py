"""^C for a main thread that waits in C++.

``torch.futures.Future.wait``, ``wait_all`` and futures made by ``then`` wait in C++, where Python's signal handlers do not run. C code
writes each signal's number to a file descriptor at once, though (`signal.set_wakeup_fd`). A thread reads it, gives the main thread a
moment to raise KeyboardInterrupt by itself, and if it did not, has the calls that wait failed: that ends the wait, and the handler
runs.

Only Python's default SIGINT handler is extended. A program with a handler of its own decides for itself what ^C means.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["InterruptWatch"]

_GRACE = 0.25
"""Seconds the main thread gets to run the handler before it is taken to wait in C++."""

_END = b"\0"  # no signal has the number 0


class InterruptWatch:
    """Calls ``on_interrupt`` (on a thread of its own) when ^C was pressed and the main thread cannot react.

    Does nothing if it is made outside the main thread or SIGINT has a handler of the user's.
    """

    def __init__(self, on_interrupt: Callable[[], None]) -> None:
        self._on_interrupt = on_interrupt
        self._reacted = threading.Event()
        self._thread: threading.Thread | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return
        self._pid = os.getpid()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._former_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._handle)
        # Reads the pipe until close writes _END to it. A daemon: it must not hold up an exit without shutdown().
        self._thread = threading.Thread(target=self._watch, name="zmqagent-interrupt", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._reacted.set()
        signal.default_int_handler(number, frame)

    def _watch(self) -> None:
        while True:
            for byte in os.read(self._read_end, 64):
                if byte == _END[0]:
                    return
                if self._former_fd != -1:
                    os.write(self._former_fd, bytes([byte]))
                if byte == signal.SIGINT:
                    if not self._reacted.wait(_GRACE):
                        self._on_interrupt()
                    self._reacted.clear()

    def _forget(self) -> None:
        """In a forked child: its signals must not be written to the parent's pipe."""
        if self._thread is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def close(self) -> None:
        """Gives SIGINT back and ends the thread. Outside the main thread, which alone may change handlers, the handler stays (it does
        what Python's own does) and the descriptor too. Idempotent."""
        if self._thread is None or self._pid != os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        current = signal.set_wakeup_fd(self._former_fd)
        if current != self._write_end:
            signal.set_wakeup_fd(current)
        os.write(self._write_end, _END)
        self._thread.join()
        self._thread = None
        os.close(self._read_end)
        os.close(self._write_end)
