"""The threads of a worker: idle ones receive, and run what they received.

All idle threads wait in ``receive``; the system wakes one of them for what arrives. It runs that itself, which saves a
hand-over, as long as another idle thread stays behind to receive: at every moment one thread that runs no user code receives
(or is about to). Otherwise, and if more arrived than one task, the rest waits in the backlog for a thread to come free. User
code may block for long, so a backlog that nobody takes from for `PATIENCE` seconds gets a thread, be it a new one: otherwise
calls nested deeper than the pool is large would deadlock.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from zmqagent.exceptions import ShutdownError

__all__ = ["HELP_AFTER", "PATIENCE", "REPORT_EVERY", "Executor", "Task"]

PATIENCE = 0.005
"""Seconds a task waits for a busy thread to come free before a thread beyond the configured number is started: long enough that
short functions never cost a thread, short enough that a nested call is not felt."""

_PAUSE_AFTER_FAILURE = 0.05
"""Seconds until receiving is tried again after it raised, so that a lasting fault cannot keep a core busy."""

HELP_AFTER = 0.0005
"""Seconds a task waits for the thread that received it before an idle one, or one of the configured number that was not needed
yet, is woken for it: for short functions that costs more than it gains."""

REPORT_EVERY = 10.0
"""Seconds between two words in the log on what a worker waits for before it ends."""

Task = Callable[[], None]
"""Something to do, once."""

_logger = logging.getLogger(__name__)


class Executor:
    """Runs ``receive`` on all idle threads and the tasks it returns on up to ``size`` threads.

    Args:
        receive: called on any number of threads at once; waits until something arrives, and returns the tasks that it brought, if
            any. One call must return soon after each ``wake``.
        wake: makes one ``receive`` that waits, or else the next one, return; called from any thread.
        size: how many tasks run at once before patience is asked for.
        name: prefix of the threads' names.
        on_work: called when there is something to run; `look` is to be called every now and then for as long as it tells so.
    """

    def __init__(
        self,
        receive: Callable[[], Sequence[Task]],
        wake: Callable[[], None],
        size: int,
        name: str,
        on_work: Callable[[], None] = lambda: None,
    ) -> None:
        self._receive = receive
        self._wake = wake
        self._size = size
        self._name = name
        self._on_work = on_work
        # Protects all fields below. Held for a few instructions only, never while receiving or running a task.
        self._lock = threading.Lock()
        # Notified when the last thread has ceased to receive, after `stop`.
        self._nobody_receives = threading.Condition(self._lock)
        self._backlog: deque[Task] = deque()
        self._waiting_since = 0.0  # when the backlog last got shorter, or began
        self._threads: set[threading.Thread] = set()
        self._started = 0
        self._idle = 0  # threads that receive, or are about to
        self._running: dict[threading.Thread, float] = {}  # threads that run a task, and since when
        self._closed = False  # no task begins any more
        self._drained = False  # no task is taken in any more

    def start(self) -> None:
        """Starts the first two threads: one receives while the other runs. More come when they are needed."""
        for _ in range(2):
            self._add_thread()

    def submit(self, task: Task) -> None:
        """Has ``task`` run on one of the threads. Any thread may call this.

        Raises:
            ShutdownError: the executor has stopped.
        """
        with self._lock:
            if self._drained:
                raise ShutdownError(f"worker {self._name} has shut down and runs nothing more")
            self._add_to_backlog((task,))
        self._wake()
        self._on_work()

    def look(self) -> bool:
        """Sees to tasks that have waited for long enough; says whether anything runs or waits."""
        with self._lock:
            if self._closed or not (self._backlog or self._running):
                return False
            waited = time.monotonic() - self._waiting_since if self._backlog else 0.0
            has_help = self._idle > 1
            missing = min(len(self._backlog), self._size + 1 - len(self._threads))
        if waited >= HELP_AFTER and has_help:
            self._wake()
        elif waited >= HELP_AFTER and missing > 0:
            for _ in range(missing):
                self._add_thread()
        elif waited >= PATIENCE:
            self._add_thread()
        return True

    @property
    def size(self) -> int:
        """The configured number of threads."""
        return self._size

    def num_idle(self) -> int:
        """How many of the configured threads run no task now (threads that were not needed yet count as idle)."""
        with self._lock:
            return max(0, self._size - len(self._running))

    def report(self) -> str:
        """What the threads run now: which one, for how long, and where in the code it is. Empty if they run nothing."""
        now = time.monotonic()
        with self._lock:
            running = {thread: now - since for thread, since in self._running.items() if thread is not threading.current_thread()}
        frames = sys._current_frames()
        texts = []
        for thread, seconds in running.items():
            # The frame is gone if the task has ended meanwhile.
            stack = traceback.extract_stack(frames.get(thread.ident or 0))
            own = [number for number, entry in enumerate(stack) if entry.filename == __file__]
            where = "".join(traceback.format_list(stack[max(own, default=-1) + 1 :]))
            texts.append(f"{thread.name}, for {seconds:.0f} s:\n{where}")
        return "\n".join(texts).rstrip()

    def stop(self) -> list[Task]:
        """Stops receiving, has no further task begin, and returns the tasks that had not. Idempotent."""
        with self._lock:
            self._closed = True
        self._wake()
        # Whoever receives now may still bring a task; each that ceases to wakes the next. After that nobody receives again.
        with self._lock:
            self._nobody_receives.wait_for(lambda: not self._idle)
            self._drained = True
            left = list(self._backlog)
            self._backlog.clear()
        return left

    def join(self, timeout: float = float("inf")) -> bool:
        """Waits, after `stop`, until every thread has ended its task, or ``timeout`` seconds have passed; says whether they have.

        A thread of the executor that calls this ends after the task that called. User code may block for ever; the threads are
        daemons, so they never hold up the interpreter's exit. Idempotent.
        """
        with self._lock:
            threads = list(self._threads)
        deadline = time.monotonic() + timeout
        current = threading.current_thread()
        for thread in threads:
            if thread is not current:
                thread.join(max(0.0, deadline - time.monotonic()) if timeout != float("inf") else None)
        return not any(thread.is_alive() for thread in threads if thread is not current)

    def wait_for_end(self, patience: float) -> bool:
        """`join` for at most ``patience`` seconds, with a word in the log now and then on what still runs; says whether all have
        ended. What has not is left behind."""
        deadline = time.monotonic() + patience
        while not self.join(min(REPORT_EVERY, max(0.0, deadline - time.monotonic()))):
            is_over = time.monotonic() >= deadline
            what = "has shut down and leaves functions behind that still run" if is_over else "waits for functions that still run"
            _logger.warning("worker %s %s. %s", self._name, what, self.report())
            if is_over:
                return False
        return True

    def close(self) -> list[Task]:
        """`stop`, then `join`. What the threads run must not wait for tasks that had not begun."""
        left = self.stop()
        self.join()
        return left

    def _add_thread(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._started += 1
            self._waiting_since = time.monotonic()
            # Serves until close, or until it is surplus. A daemon: a script that never calls shutdown() must still exit.
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._started}", daemon=True)
            self._threads.add(thread)
            # Under the lock, so that close never meets a thread that has not started.
            thread.start()

    def _serve(self) -> None:
        try:
            while (task := self._next_task()) is not None:
                self._run(task)
                # The local name would keep the last call's arguments alive while this thread idles.
                del task
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _run(self, task: Task) -> None:
        try:
            task()
        except BaseException:
            # Tasks answer their own failures; what reaches this point, be it SystemExit, is a defect, and the thread survives it.
            _logger.exception("a task of worker %s failed", self._name)
        finally:
            with self._lock:
                del self._running[threading.current_thread()]

    def _next_task(self) -> Task | None:
        with self._lock:
            if self._closed:
                return None
            # Only if somebody receives: the last thread that could has to, or nobody would ever receive again.
            if self._backlog and self._idle:
                return self._take()
            surplus = len(self._threads) > self._size + 1 and self._idle >= 2
            if surplus:
                return None
            self._idle += 1
        return self._receive_task()

    def _take(self) -> Task:
        """The oldest task, with the lock held. Somebody came free, so whoever waits behind it is given new patience."""
        self._waiting_since = self._running[threading.current_thread()] = time.monotonic()
        return self._backlog.popleft()

    def _add_to_backlog(self, tasks: Sequence[Task]) -> None:
        """With the lock held."""
        if not self._backlog:
            self._waiting_since = time.monotonic()
        self._backlog += tasks

    def _receive_task(self) -> Task | None:
        """Receives until there is a task that this thread may run; None once closed."""
        while True:
            tasks = () if self._closed else self._receive_once()
            if not (tasks or self._backlog or self._closed):
                continue  # Answers, mostly: nothing to run.
            with self._lock:
                if tasks:
                    self._add_to_backlog(tasks)
                if self._closed:
                    self._cease()
                    return None
                task = None
                if self._backlog and self._idle > 1:
                    self._idle -= 1
                    task = self._take()
                # Nobody but this thread would receive, and a task may run for long.
                is_alone = self._backlog and task is None and len(self._threads) <= 2
            if is_alone:
                self._add_thread()
            # The local name would keep them alive while this thread waits for others.
            del tasks
            self._on_work()
            if task is not None:
                return task

    def _cease(self) -> None:
        """This thread receives no more, with the lock held."""
        self._idle -= 1
        if self._idle:
            self._wake()
        else:
            self._nobody_receives.notify_all()

    def _receive_once(self) -> Sequence[Task]:
        try:
            return self._receive()
        except Exception:
            # A defect too; without a thread that receives the worker would hang.
            _logger.exception("worker %s could not receive", self._name)
            time.sleep(_PAUSE_AFTER_FAILURE)
            return ()
