"""`zmqagent.agent.executor`: somebody always receives, whatever the tasks do, and nothing that came in is lost."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from zmqagent.agent.clock import Clock
from zmqagent.agent.executor import Executor, Task
from zmqagent.exceptions import ShutdownError

DEADLINE_S = 30.0
"""Far more than anything here takes: only a hang is meant to reach it."""


class Wire:
    """What an executor receives from: tasks, some that come together, errors to raise, and wake-ups (None)."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Task | list[Task] | Exception | None] = SimpleQueue()

    def receive(self) -> list[Task]:
        item = self.queue.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            return []
        return item if isinstance(item, list) else [item]

    def wake(self) -> None:
        self.queue.put(None)


Start = Callable[[int], Executor]


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def start(wire: Wire) -> Iterator[Start]:
    """Starts executors; at the end none of their threads may be left."""
    before = set(threading.enumerate())
    started: list[tuple[Executor, Clock]] = []

    def make(size: int) -> Executor:
        clock = Clock(lambda: executor.look(), "worker")
        executor = Executor(wire.receive, wire.wake, size, "worker", clock.hurry)
        started.append((executor, clock))
        executor.start()
        clock.start()
        return executor

    yield make
    for executor, clock in started:
        clock.stop()
        executor.close()
    assert set(threading.enumerate()) <= before


def wait(event: threading.Event) -> None:
    assert event.wait(DEADLINE_S)


def wait_for(condition: Callable[[], bool], executor: Executor) -> None:
    """Has tasks pass through the executor until ``condition`` holds."""
    for _ in range(10_000):
        if condition():
            return
        passed = threading.Event()
        executor.submit(passed.set)
        wait(passed)
    raise AssertionError("it never came to hold")


def test_received_and_submitted_tasks_run(wire: Wire, start: Start) -> None:
    executor = start(2)
    received, submitted = threading.Event(), threading.Event()
    wire.queue.put(received.set)
    executor.submit(submitted.set)
    wait(received)
    wait(submitted)
    assert executor.size == 2


def test_receiving_goes_on_while_every_thread_runs_blocked_user_code(wire: Wire, start: Start) -> None:
    start(3)
    release = threading.Event()
    began = [threading.Event() for _ in range(3)]
    for event in began:

        def block(event: threading.Event = event) -> None:
            event.set()
            wait(release)

        wire.queue.put(block)
    for event in began:
        wait(event)
    last = threading.Event()
    wire.queue.put(last.set)
    wait(last)
    release.set()


def test_calls_nested_deeper_than_the_pool_end_and_the_surplus_threads_go_again(wire: Wire, start: Start) -> None:
    before = threading.active_count()
    executor = start(1)
    depth = 12
    most: list[int] = []
    done = [threading.Event() for _ in range(depth)]

    def nested(level: int) -> None:
        if level + 1 < depth:
            wire.queue.put(lambda: nested(level + 1))
            wait(done[level + 1])
        else:
            most.append(threading.active_count() - before)
        done[level].set()

    wire.queue.put(lambda: nested(0))
    wait(done[0])
    assert most[0] > depth
    # The configured thread, one that receives meanwhile, and the clock's.
    wait_for(lambda: threading.active_count() - before <= 3, executor)


def test_tasks_that_come_together_run_beside_each_other_if_they_take_long(wire: Wire, start: Start) -> None:
    start(4)
    all_run = threading.Barrier(4)
    done = [threading.Event() for _ in range(4)]

    def task(event: threading.Event) -> None:
        all_run.wait(DEADLINE_S)
        event.set()

    wire.queue.put([lambda event=event: task(event) for event in done])  # type: ignore[misc]
    for event in done:
        wait(event)


@pytest.mark.parametrize("error", [ValueError("a defect"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_what_a_task_raises_is_logged_and_ends_no_thread(
    error: BaseException, wire: Wire, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    executor = start(1)
    for _ in range(5):
        ran = threading.Event()

        def fail(ran: threading.Event = ran) -> None:
            ran.set()
            raise error

        wire.queue.put(fail)
        wait(ran)
    after = threading.Event()
    executor.submit(after.set)
    wait(after)
    wait_for(lambda: executor.num_idle() == executor.size, executor)
    assert [record.message for record in caplog.records] == ["a task of worker worker failed"] * 5


def test_a_failure_to_receive_is_logged_and_receiving_goes_on(wire: Wire, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    executor = start(2)
    for number in range(3):
        wire.queue.put(OSError(f"failure {number}"))
    after = threading.Event()
    wire.queue.put(after.set)
    wait(after)
    # The other thread may still be about to say so.
    wait_for(lambda: len(caplog.records) == 3, executor)
    assert [record.message for record in caplog.records] == ["worker worker could not receive"] * 3
    assert caplog.records[0].levelno == logging.ERROR


def test_threads_that_run_tasks_are_not_idle(wire: Wire, start: Start) -> None:
    executor = start(3)
    assert executor.num_idle() == 3
    began, release = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        wait(release)

    executor.submit(block)
    wait(began)
    assert executor.num_idle() == 2
    release.set()
    wait_for(lambda: executor.num_idle() == 3, executor)


def test_stop_returns_what_had_not_begun_and_nothing_begins_after_it(wire: Wire, start: Start) -> None:
    """The task comes in at the last moment: while stop waits for the thread that receives."""
    receiving, stopping = threading.Event(), threading.Event()
    ran: list[str] = []

    def late() -> None:
        ran.append("late")

    def receive() -> list[Task]:
        receiving.set()
        wait(stopping)
        return [late]

    executor = Executor(receive, stopping.set, 1, "worker")
    executor.start()
    wait(receiving)
    assert set(executor.stop()) == {late}
    assert executor.stop() == []
    executor.join()
    assert ran == []
    with pytest.raises(ShutdownError, match="worker worker has shut down and runs nothing more"):
        executor.submit(late)


def test_what_the_receiving_thread_submits_while_the_executor_stops_is_not_lost() -> None:
    receiving, stopping = threading.Event(), threading.Event()
    refused: list[ShutdownError] = []

    def completion() -> None:
        raise AssertionError("it is for whoever stopped the executor")

    def receive() -> list[Task]:
        receiving.set()
        wait(stopping)
        try:
            executor.submit(completion)
        except ShutdownError as error:
            refused.append(error)
        return []

    executor = Executor(receive, stopping.set, 1, "worker")
    executor.start()
    wait(receiving)
    left = executor.close()
    assert refused == []
    assert set(left) == {completion}


def test_close_waits_for_tasks_that_have_begun(wire: Wire, start: Start) -> None:
    executor = start(1)
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    def task() -> None:
        began.set()
        wait(release)
        ended.set()

    wire.queue.put(task)
    wait(began)
    assert executor.stop() == []
    closer = threading.Thread(target=executor.join)
    closer.start()
    assert closer.is_alive()
    release.set()
    closer.join(DEADLINE_S)
    assert not closer.is_alive()
    assert ended.is_set()


def test_what_still_runs_is_reported_and_left_behind_when_patience_ends(
    wire: Wire, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqagent.agent.executor.REPORT_EVERY", 0.001)
    executor = start(1)
    began, release = threading.Event(), threading.Event()

    def function_that_blocks() -> None:
        began.set()
        wait(release)

    assert executor.report() == ""
    wire.queue.put(function_that_blocks)
    wait(began)
    executor.stop()
    assert not executor.wait_for_end(0.01)
    first, last = caplog.messages[0], caplog.messages[-1]
    assert "worker worker waits for functions that still run" in first
    assert "worker worker has shut down and leaves functions behind that still run" in last
    for text in (first, last, executor.report()):
        assert re.search(r"worker-\d, for \d+ s:", text)
        assert f'File "{__file__}"' in text.split(":\n", 1)[1].splitlines()[0]
        assert "in function_that_blocks" in text
        assert "in _serve" not in text
    release.set()
    assert executor.wait_for_end(DEADLINE_S)
    assert executor.report() == ""


def test_a_thread_of_its_own_may_close_it(wire: Wire, start: Start) -> None:
    executor = start(2)
    closed = threading.Event()

    def close() -> None:
        executor.close()
        closed.set()

    wire.queue.put(close)
    wait(closed)
    executor.join()
    assert executor.close() == []


def test_a_task_s_arguments_are_let_go_when_it_has_ended(wire: Wire, start: Start) -> None:
    class Argument:
        pass

    executor = start(1)
    gone = threading.Event()

    def make() -> Task:
        argument = Argument()
        weakref.finalize(argument, gone.set)
        return lambda: argument and None

    wire.queue.put(make())
    wait(gone)
    assert executor.size == 1
