"""What the layers above hear of other workers: one thing after the other, in the order in which the group learned of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from zmqagent.agent.executor import Task

__all__ = ["News"]


class News:
    """Runs tasks in order, on threads that may run others meanwhile.

    Args:
        submit: has tasks run on some thread.
    """

    def __init__(self, submit: Callable[[Iterable[Task]], None]) -> None:
        self._submit = submit
        self._waiting: SimpleQueue[Task] = SimpleQueue()
        # Lets one thread tell at a time. There are as many calls of `_tell_next` as things to tell, so none stays behind.
        self._lock = threading.Lock()

    def tell(self, task: Task) -> None:
        """Has ``task`` run after all earlier ones."""
        self._waiting.put(task)
        self._submit([self._tell_next])

    def _tell_next(self) -> None:
        with self._lock:
            self._waiting.get_nowait()()
