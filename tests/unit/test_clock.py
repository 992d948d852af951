"""`zmqagent.agent.clock`: it ticks until it is stopped, whatever its ticks do."""

from __future__ import annotations

import threading

import pytest

from zmqagent.agent import clock as module
from zmqagent.agent.clock import Clock

DEADLINE_S = 30.0


class Ticks:
    """Counts ticks up to what is enough for a test."""

    def __init__(self) -> None:
        self.count = 0
        self.enough = threading.Event()

    def __call__(self) -> bool:
        self.count += 1
        if self.count == 3:
            self.enough.set()
        return False


def test_it_ticks_again_and_again_until_it_is_stopped() -> None:
    ticks = Ticks()
    clock = Clock(ticks, "w")
    clock.start()
    assert ticks.enough.wait(DEADLINE_S)
    clock.stop()
    clock.stop()
    count = ticks.count
    assert not any(thread.name == "w-clock" for thread in threading.enumerate())
    assert ticks.count == count


def test_who_is_in_a_hurry_does_not_wait_for_the_next_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNHURRIED", DEADLINE_S)
    ticks = Ticks()
    clock = Clock(ticks, "w")
    clock.start()
    clock.hurry()
    # And goes on to hurry for a while.
    assert ticks.enough.wait(DEADLINE_S / 2)
    clock.stop()


def test_a_tick_that_fails_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    ticks = Ticks()

    def tick() -> bool:
        ticks()
        raise ValueError("a defect")

    clock = Clock(tick, "w")
    clock.start()
    assert ticks.enough.wait(DEADLINE_S)
    clock.stop()
    assert caplog.messages[0] == "w-clock failed"


def test_a_tick_may_stop_its_own_clock() -> None:
    stopped = threading.Event()

    def tick() -> bool:
        clock.stop()
        stopped.set()
        return False

    clock = Clock(tick, "w")
    clock.start()
    assert stopped.wait(DEADLINE_S)
    clock.stop()
    assert not any(thread.name == "w-clock" for thread in threading.enumerate())
