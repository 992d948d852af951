"""`zmqagent.agent.calls`: every call ends exactly once, for the reason that came first."""

from __future__ import annotations

import random
import re

import pytest

from zmqagent.agent.calls import MAX_TRIES, CallId, Calls, Complete, Instruction, Resend
from zmqagent.exceptions import InterruptedCallError, RpcError, RpcTimeoutError, ShutdownError, WorkerLostError
from zmqagent.wire.types import WorkerId

ALICE, BOB = WorkerId(1), WorkerId(2)
NEVER = float("inf")


def started(*calls: tuple[CallId, float], now: float = 0.0) -> Calls:
    machine = Calls()
    for call_id, timeout in calls:
        machine.start(call_id, f"worker{call_id[0]}", "PYTHON_CALL", timeout=timeout, retry=False, now=now)
    return machine


def retried(timeout: float) -> Calls:
    machine = Calls()
    machine.start((ALICE, 0), "alice", "RREF_USER_DELETE", timeout=timeout, retry=True, now=0.0)
    return machine


def errors(instructions: list[Instruction]) -> dict[CallId, RpcError]:
    """What the calls that ended failed with; nothing else may have happened."""
    assert all(isinstance(instruction, Complete) for instruction in instructions)
    found = {i.call_id: i.error for i in instructions if isinstance(i, Complete)}
    assert len(found) == len(instructions)
    return found


def test_an_answer_ends_a_call_once() -> None:
    calls = started(((ALICE, 0), 60.0))
    assert len(calls) == 1
    assert calls.answered((ALICE, 0))
    assert len(calls) == 0
    assert calls.late_replies == 0
    assert not calls.answered((ALICE, 0))
    assert calls.late_replies == 1
    assert calls.tick(1e9) == []


def test_the_answer_of_another_worker_ends_nothing() -> None:
    calls = started(((ALICE, 0), 60.0))
    assert not calls.answered((BOB, 0))
    assert len(calls) == 1


def test_a_call_without_an_answer_fails_at_its_deadline_with_torchs_text() -> None:
    calls = started(((ALICE, 3), 0.25), now=10.0)
    assert calls.next_deadline() == 10.25
    assert calls.tick(10.2) == []
    ((call_id, error),) = errors(calls.tick(10.25)).items()
    assert call_id == (ALICE, 3)
    assert isinstance(error, RpcTimeoutError)
    assert "RPC ran for more than set timeout (250 ms) and will now be marked with an error" in str(error)
    assert "a PYTHON_CALL to worker worker1" in str(error)
    assert not calls.answered((ALICE, 3))
    assert calls.late_replies == 1


def test_calls_fail_in_the_order_of_their_deadlines() -> None:
    calls = started(((ALICE, 0), 3.0), ((ALICE, 1), 1.0), ((BOB, 0), 2.0), ((BOB, 1), 9.0))
    assert list(errors(calls.tick(5.0))) == [(ALICE, 1), (BOB, 0), (ALICE, 0)]
    assert calls.next_deadline() == 9.0


def test_a_call_without_a_timeout_waits_for_ever() -> None:
    calls = started(((ALICE, 0), 0.0))
    assert calls.next_deadline() == NEVER
    assert calls.tick(1e12) == []
    assert calls.answered((ALICE, 0))


def test_the_next_deadline_is_that_of_a_call_under_way() -> None:
    calls = started(((ALICE, 0), 1.0), ((ALICE, 1), 2.0))
    assert calls.next_deadline() == 1.0
    calls.answered((ALICE, 0))
    assert calls.next_deadline() == 2.0
    calls.withdrawn((ALICE, 1))
    assert calls.next_deadline() == NEVER


def test_a_call_that_could_not_be_sent_ends_without_instructions() -> None:
    calls = started(((ALICE, 0), 1.0))
    calls.withdrawn((ALICE, 0))
    calls.withdrawn((ALICE, 0))
    assert calls.tick(5.0) == []
    assert calls.late_replies == 0


def test_an_idempotent_call_is_sent_again_on_torchs_schedule() -> None:
    calls = retried(timeout=60.0)
    now, resent = 0.0, []
    while len(resent) < MAX_TRIES - 1:
        now = calls.next_deadline()
        assert calls.tick(now) == [Resend((ALICE, 0))]
        resent.append(now)
    assert resent == [1.0, 2.5, 4.75, 8.125]
    assert calls.next_deadline() == 8.125 + 60.0
    ((_, error),) = errors(calls.tick(68.125)).items()
    assert isinstance(error, RpcTimeoutError)
    assert "The RPC has not succeeded after the specified number of max retries (5)." in str(error)
    assert "a RREF_USER_DELETE to worker alice" in str(error)
    assert calls.next_deadline() == NEVER


def test_the_last_try_of_a_call_without_a_timeout_gets_its_own_pause() -> None:
    calls = retried(timeout=0.0)
    for _ in range(MAX_TRIES - 1):
        calls.tick(calls.next_deadline())
    assert calls.next_deadline() == 8.125 + 5.0625


def test_an_answer_ends_the_retries() -> None:
    calls = retried(timeout=60.0)
    calls.tick(1.0)
    assert calls.answered((ALICE, 0))
    assert calls.next_deadline() == NEVER
    assert calls.tick(100.0) == []
    # The second copy was answered too.
    assert not calls.answered((ALICE, 0))


def test_a_late_tick_sends_again_once_and_starts_the_pause_then() -> None:
    calls = retried(timeout=60.0)
    assert calls.tick(50.0) == [Resend((ALICE, 0))]
    assert calls.next_deadline() == 51.5


def test_the_loss_of_a_worker_ends_its_calls_and_no_others() -> None:
    calls = started(((ALICE, 0), 60.0), ((BOB, 0), 60.0), ((ALICE, 1), 0.0))
    found = errors(calls.worker_lost(ALICE, WorkerLostError("its process was killed")))
    assert set(found) == {(ALICE, 0), (ALICE, 1)}
    for error in found.values():
        assert isinstance(error, WorkerLostError)
        assert str(error) == "a PYTHON_CALL to worker worker1 has no answer: its process was killed"
    assert calls.worker_lost(ALICE, WorkerLostError("again")) == []
    assert calls.answered((BOB, 0))


def test_an_interrupt_ends_all_calls() -> None:
    calls = started(((ALICE, 0), 60.0), ((BOB, 0), 0.0))
    found = errors(calls.interrupted())
    assert set(found) == {(ALICE, 0), (BOB, 0)}
    assert all(isinstance(error, InterruptedCallError) for error in found.values())
    assert str(found[BOB, 0]) == "^C ended the wait for the answer to a PYTHON_CALL to worker worker2"
    assert calls.interrupted() == []


def test_the_end_of_the_agent_ends_all_calls() -> None:
    calls = started(((ALICE, 0), 60.0), ((BOB, 0), 0.0))
    found = errors(calls.closed(ShutdownError("rpc.shutdown() was called")))
    assert all(isinstance(error, ShutdownError) for error in found.values())
    assert str(found[ALICE, 0]) == "a PYTHON_CALL to worker worker1 has no answer: rpc.shutdown() was called"
    assert len(calls) == 0


def test_calls_that_ended_leave_no_memory_behind() -> None:
    calls = started(((BOB, 0), 1e9), ((BOB, 1), 0.0))
    calls.start((BOB, 2), "bob", "RREF_USER_DELETE", timeout=0.0, retry=True, now=1e6)
    for number in range(10_000):
        calls.start((ALICE, number), "alice", "PYTHON_CALL", timeout=60.0, retry=False, now=float(number) / 1000)
        calls.answered((ALICE, number))
    assert len(calls._deadlines) < 1000
    # Compacting has lost none of those under way.
    assert calls.tick(1e6) == []
    assert calls.next_deadline() == 1e6 + 1
    calls.answered((BOB, 2))
    assert calls.next_deadline() == 1e9


@pytest.mark.parametrize("seed", range(12))
def test_every_call_ends_exactly_once_whatever_happens(seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    calls = Calls()
    open_calls: dict[CallId, float] = {}
    ended: set[CallId] = set()
    idempotent: set[CallId] = set()
    now, number, late = 0.0, 0, 0

    def finish(instructions: list[Instruction]) -> None:
        for instruction in instructions:
            assert instruction.call_id in open_calls
            if isinstance(instruction, Complete):
                del open_calls[instruction.call_id]
                ended.add(instruction.call_id)

    for _ in range(1000):
        event = chance.random()
        if event < 0.5:
            call_id = (WorkerId(chance.randrange(3)), number)
            number += 1
            timeout = chance.choice([0.0, 0.5, 60.0])
            retry = chance.random() < 0.2
            calls.start(call_id, "w", "PYTHON_CALL", timeout=timeout, retry=retry, now=now)
            open_calls[call_id] = NEVER if retry or not timeout else now + timeout
            if retry:
                idempotent.add(call_id)
        elif event < 0.85 and number:
            # Any call ever made may be answered, again and again.
            call_id = (WorkerId(chance.randrange(3)), chance.randrange(max(0, number - 30), number))
            was_open = open_calls.pop(call_id, None) is not None
            assert calls.answered(call_id) == was_open
            late += not was_open
            if was_open:
                ended.add(call_id)
        elif event < 0.99:
            now += chance.expovariate(5.0)
            finish(calls.tick(now))
            assert all(deadline > now for deadline in open_calls.values())
            assert calls.next_deadline() > now
        elif event < 0.995:
            lost = WorkerId(chance.randrange(3))
            finish(calls.worker_lost(lost, WorkerLostError("gone")))
            assert not any(to == lost for to, _ in open_calls)
        else:
            finish(calls.interrupted())
            assert open_calls.keys() <= idempotent
        assert len(calls) == len(open_calls)
        assert calls.late_replies == late
    finish(calls.closed(ShutdownError("over")))
    assert not open_calls
    assert len(ended) == number


def test_a_timeout_below_a_millisecond_is_told_as_it_is_rounded() -> None:
    calls = started(((ALICE, 0), 0.001))
    ((_, error),) = errors(calls.tick(1.0)).items()
    assert re.search(r"set timeout \(1 ms\)", str(error))
