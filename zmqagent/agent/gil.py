"""How long the threads that serve requests wait for the interpreter's lock (the GIL), for torch's ``enable_gil_profiling``."""

from __future__ import annotations

import threading
import time

__all__ = ["GilProfiler"]


class GilProfiler:
    """Measures the wait by letting the lock go once per request and timing how long it takes to get it back."""

    def __init__(self) -> None:
        self.is_enabled = False
        # Protects the two sums; any serving thread adds to them.
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._samples = 0

    def sample(self) -> None:
        """Measures once."""
        began = time.perf_counter()
        # Releases the lock and takes it again, without sleeping.
        time.sleep(0)
        waited = time.perf_counter() - began
        with self._lock:
            self._seconds += waited
            self._samples += 1

    def metrics(self) -> dict[str, float]:
        """The mean wait in microseconds; nothing while profiling is off."""
        if not self.is_enabled:
            return {}
        with self._lock:
            return {"agent.gil_average_wait_time_us": 1e6 * self._seconds / max(1, self._samples)}
