"""`zmqagent.agent.refusals`: every refused message is counted, and a flood of them writes few lines."""

from __future__ import annotations

import pytest

from zmqagent.agent.refusals import Refusals


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock) -> Refusals:
    return Refusals("alice", clock)


def test_a_few_messages_have_a_line_each(refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        refusals.note(f"refused message {number}")
    assert [record.message for record in caplog.records] == [f"worker alice refused message {number}" for number in range(5)]
    clock.now += 10
    refusals.report()
    assert len(caplog.records) == 5


def test_a_flood_has_few_lines_and_the_last_says_how_many_they_were(
    refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10_000):
        refusals.note(f"refused message {number}")
        refusals.report()
    assert len(caplog.records) == 5
    clock.now += 10
    refusals.report()
    assert caplog.messages[5:] == ["worker alice refused 9995 more messages within 10 s; the last one: it refused message 9999"]
    refusals.report()
    assert len(caplog.records) == 6
    assert refusals.total == 10_000


def test_after_a_flood_a_message_has_a_line_again(refusals: Refusals, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(7):
        refusals.note("refused it")
    clock.now += 10
    refusals.note("refused another")
    assert [message[:30] for message in caplog.messages[5:]] == ["worker alice refused 2 more me", "worker alice refused another"]


def test_the_end_of_a_worker_does_not_wait_for_the_period(refusals: Refusals, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(6):
        refusals.note("refused it")
    refusals.report(at_once=True)
    assert caplog.messages[5].startswith("worker alice refused 1 more messages")
