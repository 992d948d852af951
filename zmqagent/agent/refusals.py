"""What a worker says about messages that it refuses: each is counted, and few enough are logged that no flood fills a disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Refusals"]

_logger = logging.getLogger(__name__)

_PERIOD = 10.0
"""Seconds of which the refused messages are told apart, or told together."""

_LINES = 5
"""So many messages of a period have a line each: a mistake is seen whole, and a flood comes to one line every two seconds."""


class Refusals:
    """Counts and logs the messages that ``worker`` (a name) refuses. Any thread may call `note` and `report`.

    Args:
        worker: who refuses.
        clock: seconds that never go back.
    """

    def __init__(self, worker: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker = worker
        self._clock = clock
        # Protects what follows, for a few instructions; nothing is logged under it.
        self._lock = threading.Lock()
        self._total = 0
        self._ends = 0.0
        self._in_period = 0
        self._last = ""

    @property
    def total(self) -> int:
        """How many messages were refused so far."""
        return self._total

    def note(self, why: str) -> None:
        """A message was refused; ``why`` is what the log says."""
        self.report()
        with self._lock:
            if not self._in_period:
                self._ends = self._clock() + _PERIOD
            self._total += 1
            self._in_period += 1
            self._last = why
            if self._in_period > _LINES:
                return
        _logger.warning("worker %s %s", self._worker, why)

    def report(self, *, at_once: bool = False) -> None:
        """Logs, once a period has passed (or ``at_once``), how many messages in it had no line. To be called now and then."""
        with self._lock:
            if not self._in_period or (self._clock() < self._ends and not at_once):
                return
            silent, last = self._in_period - _LINES, self._last
            self._in_period = 0
        if silent > 0:
            _logger.warning(
                "worker %s refused %d more messages within %g s; the last one: it %s", self._worker, silent, _PERIOD, last
            )
