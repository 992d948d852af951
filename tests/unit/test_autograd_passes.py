from __future__ import annotations

import pytest
import torch

from zmqagent.autograd.passes import Arrival, BackwardPass, PassRegister, opener_of
from zmqagent.exceptions import BackwardError
from zmqagent.wire.types import WorkerId


def a_pass(pass_id: int = 1 << 16, roots: tuple[int | None, ...] = (None, 5)) -> BackwardPass:
    return BackwardPass(pass_id, None, {root: [(object(), 0)] for root in roots}, {}, False, None)  # type: ignore[arg-type]


def arrival(message_id: int | None, count: int = 1) -> Arrival:
    return Arrival(message_id, [torch.ones(1)] * count)


def test_ids_name_the_opener_and_grow_past_all_that_was_seen() -> None:
    register, elsewhere = PassRegister(), PassRegister()
    first = register.draw(WorkerId(7))
    elsewhere.begin(a_pass(first))
    second = elsewhere.draw(WorkerId(3))
    assert (opener_of(first), opener_of(second)) == (7, 3)
    assert second > first


def test_a_pass_that_was_seen_or_aborted_is_not_begun_again() -> None:
    register = PassRegister()
    first, second, third = (register.draw(WorkerId(1)) for _ in range(3))
    register.begin(a_pass(second))
    register.current = None
    assert [register.admits(pass_id) for pass_id in (first, second, third)] == [False, False, True]
    assert [register.abort(third), register.abort(third), register.abort(first)] == [True, False, False]
    assert not register.admits(third)


def test_an_unseen_opener_with_small_numbers_is_admitted_unless_a_pass_runs() -> None:
    register, fresh = PassRegister(), PassRegister()
    ids = [register.draw(WorkerId(1)) for _ in range(3)]
    register.begin(a_pass(ids[-1]))
    other = fresh.draw(WorkerId(2))
    assert not register.admits(other)
    register.current = None
    assert register.admits(other)


def test_it_is_over_when_all_has_run_and_all_is_answered() -> None:
    running = a_pass()
    running.set_off(1)
    running.set_off(2)
    assert not running.answered()
    assert not running.ran()
    assert not running.is_over
    assert running.answered()
    assert running.is_over
    assert running.error is None


def test_the_first_failure_counts() -> None:
    running = a_pass()
    first = ValueError("first")
    assert running.fail(first)
    assert not running.fail(ValueError("second"))
    assert running.error is first
    assert not running.ran()
    with pytest.raises(BackwardError, match="is over on this worker"):
        running.take_in(arrival(5))
    with pytest.raises(BackwardError, match="is over on this worker"):
        running.set_off(1)
    assert running.claim() == []


def test_a_recv_that_runs_twice_is_refused() -> None:
    running = a_pass()
    running.set_off(1)
    with pytest.raises(BackwardError, match="message id 1 ran twice"):
        running.set_off(1)


def test_gradients_that_do_not_fit_are_refused() -> None:
    running = a_pass()
    with pytest.raises(BackwardError, match="Could not find send function for autograd message id: 6"):
        running.take_in(arrival(6))
    with pytest.raises(BackwardError, match="2 gradients came for autograd message id 5, which sent 1"):
        running.take_in(arrival(5, count=2))
    running.take_in(arrival(5))
    with pytest.raises(BackwardError, match="message id 5 came twice"):
        running.take_in(arrival(5))


def test_one_thread_at_a_time_runs_what_arrives() -> None:
    running = a_pass(roots=(1, 2, 3))
    running.take_in(arrival(1))
    assert [taken.message_id for taken in running.claim()] == [1]
    running.take_in(arrival(2))
    assert running.claim() == [], "another thread is at it"
    assert [taken.message_id for taken in running.claim_next()] == [2]
    assert running.claim_next() == []
    running.take_in(arrival(3))
    assert [taken.message_id for taken in running.claim()] == [3]
