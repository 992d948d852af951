"""`zmqagent.agent.served`: a request is new once, in whatever order requests come, and little is remembered of them."""

from __future__ import annotations

import random

import pytest

from zmqagent.agent import served
from zmqagent.agent.served import Served
from zmqagent.wire.types import WorkerId

ALICE, BOB = WorkerId(1), WorkerId(2)


def test_a_request_is_new_once() -> None:
    machine = Served()
    assert machine.admit(ALICE, 7, 0)
    assert not machine.admit(ALICE, 7, 0)
    assert machine.admit(ALICE, 7, 2)
    assert not machine.admit(ALICE, 7, 2)
    assert machine.admit(ALICE, 7, 1)
    assert not machine.admit(ALICE, 7, 1)
    assert machine.duplicates == 3


def test_workers_and_incarnations_have_numbers_of_their_own() -> None:
    machine = Served()
    assert machine.admit(ALICE, 7, 0)
    assert machine.admit(ALICE, 8, 0)
    assert machine.admit(BOB, 7, 0)
    assert machine.duplicates == 0


def test_an_incarnation_that_is_gone_is_forgotten() -> None:
    machine = Served()
    machine.admit(ALICE, 7, 0)
    machine.admit(ALICE, 8, 0)
    machine.forget(ALICE, 7)
    machine.forget(BOB, 1)
    assert machine.admit(ALICE, 7, 0)
    assert not machine.admit(ALICE, 8, 0)


def remembered(machine: Served) -> int:
    return sum(len(seen.above) for seen in machine._callers.values())


@pytest.mark.parametrize("seed", range(10))
def test_requests_that_overtake_and_repeat_each_other_are_each_new_once(seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    numbers = [number for number in range(3000) for _ in range(chance.choice([1, 1, 2]))]
    # Each moves by at most 50 places.
    numbers.sort(key=lambda number: number + chance.uniform(0, 50))
    machine = Served()
    new = []
    for number in numbers:
        if machine.admit(ALICE, 7, number):
            new.append(number)
        assert remembered(machine) <= 60
    assert sorted(new) == list(range(3000))
    assert machine.duplicates == len(numbers) - 3000
    assert remembered(machine) == 0


def test_a_request_that_never_comes_does_not_hold_memory_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_MAX_GAP", 100)
    machine = Served()
    for number in range(1, 101):
        assert machine.admit(ALICE, 7, number)
    assert remembered(machine) == 100
    assert machine.admit(ALICE, 7, 101)
    assert remembered(machine) == 0
    # The missing one has been given up; what was served is still known, and what is new still new.
    assert not machine.admit(ALICE, 7, 0)
    assert not machine.admit(ALICE, 7, 50)
    assert machine.admit(ALICE, 7, 102)
