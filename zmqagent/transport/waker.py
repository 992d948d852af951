"""A flag with a file descriptor: what one thread sets, another waits for among its sockets."""

from __future__ import annotations

import os
import threading

__all__ = ["Waker"]

_ONE = (1).to_bytes(8, "little")


class Waker:
    """Readable from `set` until `clear`. An eventfd on Linux, a pipe elsewhere."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self._reader = self._writer = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._reader, False)
            os.set_blocking(self._writer, False)
        self._closed = False
        # Orders `set`, called by any thread, against `close`: a descriptor that was closed may be another file's by then.
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._reader

    def set(self) -> None:
        """Makes the descriptor readable. From any thread; does nothing once closed."""
        with self._lock:
            if not self._closed:
                try:
                    os.write(self._writer, _ONE)
                except BlockingIOError:
                    return  # Full, hence readable already.

    def clear(self) -> None:
        """Takes the flag back. By the waiting thread only."""
        try:
            # Reading an eventfd takes all of it; a full pipe takes a few rounds, each with work between.
            os.read(self._reader, 4096)
        except BlockingIOError:
            return  # Not set.

    def close(self) -> None:
        """Frees the descriptor. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._reader)
            if self._writer != self._reader:
                os.close(self._writer)
