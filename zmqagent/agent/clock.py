"""The thread that does what time brings: deadlines, housekeeping, patience that has come to its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

__all__ = ["HURRIED", "UNHURRIED", "Clock"]

UNHURRIED = 0.02
"""Seconds between two ticks: how late a deadline may be noticed. Fifty ticks a second cost 0.1 to 0.2 percent of a core."""

HURRIED = 0.001
"""The same while something waits that `Clock.hurry` told of."""

_LINGER = 50
"""So many ticks it goes on to hurry after the last that found something: to wake this thread costs more than its ticks do."""

_logger = logging.getLogger(__name__)


class Clock:
    """Calls ``tick`` again and again on a thread of its own, from `start` to `stop`. ``tick`` says whether it has to hurry."""

    def __init__(self, tick: Callable[[], bool], name: str) -> None:
        self._tick = tick
        self._hurries = 0
        self._stopped = False
        self._hurry = threading.Event()
        # Ends by `stop`. A daemon: a script that never calls shutdown() must still exit.
        self._thread = threading.Thread(target=self._run, name=f"{name}-clock", daemon=True)

    def start(self) -> None:
        """Begins to tick."""
        self._thread.start()

    def hurry(self) -> None:
        """Has the next tick come soon. From any thread."""
        if not self._hurries:
            self._hurry.set()

    def stop(self) -> None:
        """Ends the thread after the tick that runs now, and waits for that. Idempotent."""
        self._stopped = True
        self._hurry.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            if self._hurry.wait(HURRIED if self._hurries else UNHURRIED):
                self._hurry.clear()
                self._hurries = _LINGER
            try:
                must_hurry = self._tick()
            except Exception:
                # A defect of what is ticked for; without a clock no deadline would ever be kept.
                _logger.exception("%s failed", self._thread.name)
                must_hurry = False
            self._hurries = _LINGER if must_hurry else max(0, self._hurries - 1)
