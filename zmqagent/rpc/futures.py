"""``torch.futures.collect_all`` and ``wait_all`` for futures whose errors are Python exceptions.

torch's own wait in C++ and know C++ errors only: a future that holds a Python exception counts as done, and its error shows
after all others have ended. These end with the first error, as torch's do for its own agent's futures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch.futures import Future

from zmqagent.rpc.failures import Failed, new_future

__all__ = ["collect_all", "wait_all"]


def collect_all(futures: list[Future[Any]], devices: Iterable[torch.device] = ()) -> Future[list[Future[Any]]]:
    """A future that is done when all ``futures`` are, with them as its value; or as soon as one has failed, with its error. It
    carries ``devices``, as `new_future` says."""
    collected = new_future(devices)
    _Collection(futures, collected).begin()
    return collected


def wait_all(futures: list[Future[Any]]) -> list[Any]:
    """The values of ``futures``, in order. Raises the first error as soon as there is one."""
    return [future.wait() for future in collect_all(futures).wait()]


class _Collection:
    """Counts futures down; the lock keeps two that end at once from completing ``collected`` twice."""

    def __init__(self, futures: list[Future[Any]], collected: Future[Any]) -> None:
        self._futures = list(futures)
        self._collected = collected
        self._lock = threading.Lock()
        self._left = len(self._futures)
        self._is_over = False

    def begin(self) -> None:
        if not self._futures:
            self._collected.set_result([])
        for future in self._futures:
            future.add_done_callback(self._on_done)

    def _on_done(self, future: Future[Any]) -> None:
        error = _error_of(future)
        with self._lock:
            self._left -= 1
            if self._is_over or (error is None and self._left):
                return
            self._is_over = True
        self._collected.set_result(self._futures if error is None else Failed(lambda: error))


def _error_of(future: Future[Any]) -> Exception | None:
    try:
        future.value()
    except Exception as error:
        return error
    return None
