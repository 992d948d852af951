"""The RRef protocol's machine, event by event: deaths, messages that do not arrive, shutdown."""

from __future__ import annotations

import pytest

from tests.unit.rref_machine import (
    A_FORK,
    LOST,
    ME,
    MINE,
    MY_FORK,
    NONE_LEFT,
    OTHER,
    OWNER,
    PARENT,
    SHUT,
    THEIR_FORK,
    THEIRS,
    VALUE,
    Machine,
    confirmed_user,
    refusal,
)
from zmqagent.exceptions import RpcTimeoutError, RRefCreationError, ShutdownError, WorkerLostError
from zmqagent.rref import events as ev
from zmqagent.rref.owners import MESSAGE_LIFETIME, Tombstones
from zmqagent.rref.users import UserState
from zmqagent.wire.commands import RRefUserDelete
from zmqagent.wire.types import ForkId, RRefId


@pytest.fixture
def machine() -> Machine:
    return Machine()


# -------------------------------------------------------------------------------------------------------------- deaths


def test_the_forks_that_a_dead_worker_held_end(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    machine(ev.OwnerForked(MINE, MY_FORK, "mine", created=True))
    machine(ev.ForksSent((ev.MintedFork(MINE, MY_FORK),), OTHER))
    assert machine(ev.WorkerLost(OTHER, LOST)) == [ev.Release("mine")]
    assert machine.protocol.leaks() == [ev.MintedFork(THEIRS, THEIR_FORK)]
    assert machine(ev.WorkerLost(PARENT, LOST)) == [ev.Release(VALUE)]


def test_forks_sent_to_a_worker_that_is_dead_already_end_at_once(machine: Machine) -> None:
    machine(ev.WorkerLost(OTHER, LOST))
    confirmed_user(machine)
    child = ForkId(ME, 5)
    machine(ev.UserForked(A_FORK, child))
    machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True))
    instructions = machine(ev.ForksSent((ev.MintedFork(THEIRS, child), ev.MintedFork(MINE, MY_FORK)), OTHER))
    assert instructions == [ev.Release(VALUE)]
    assert machine.counts.pending_children == 0


def test_a_fork_that_is_gone_before_it_is_known_to_whom_it_went_stays_gone(machine: Machine) -> None:
    machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True))
    machine(ev.OwnerForked(MINE, ForkId(ME, 2), VALUE, created=True))
    machine(ev.UserDeleted(MINE, MY_FORK))
    assert machine(ev.ForksSent((ev.MintedFork(MINE, MY_FORK),), OTHER)) == []
    assert machine.counts.forks == 1


def test_late_requests_of_the_dead_are_refused_until_the_id_is_used_again(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.WorkerLost(OTHER, LOST))
    assert isinstance(refusal(machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))), WorkerLostError)
    machine(ev.WorkerJoined(OTHER))
    assert machine(ev.ForkRequested(THEIRS, A_FORK, OTHER)) == []


def test_a_dead_child_frees_its_parent(machine: Machine) -> None:
    confirmed_user(machine)
    machine(ev.UserForked(A_FORK, MY_FORK))
    machine(ev.ForksSent((ev.MintedFork(THEIRS, MY_FORK),), OTHER))
    machine(ev.UserDropped(A_FORK))
    assert machine(ev.WorkerLost(OTHER, LOST)) == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK))]


def test_users_of_a_dead_owner_fail_and_report_to_nobody(machine: Machine) -> None:
    confirmed_user(machine)
    (request,) = machine(ev.UserUnpickled(RRefId(PARENT, 4), THEIR_FORK, OWNER, PARENT))
    machine(ev.UserForked(A_FORK, MY_FORK))
    machine(ev.ConfirmationAwaited("function", (THEIR_FORK,)))
    assert machine(ev.WorkerLost(OWNER, LOST)) == [ev.Resume("function", LOST)]
    assert machine.protocol.user_state(A_FORK) == (UserState.ORPHANED, LOST)
    assert machine.answer(request, ev.Outcome.FAILED) == []
    assert machine(ev.UserDropped(A_FORK)) == []
    assert machine(ev.UserDropped(THEIR_FORK)) == []
    assert machine.counts == NONE_LEFT


def test_a_dropped_user_of_a_dead_owner_is_forgotten_with_its_children(machine: Machine) -> None:
    confirmed_user(machine)
    machine(ev.UserForked(A_FORK, MY_FORK))
    machine(ev.UserDropped(A_FORK))
    assert machine(ev.WorkerLost(OWNER, LOST)) == []
    assert machine.counts == NONE_LEFT


def test_a_share_in_a_dead_owners_rref_fails_the_function_that_gets_it(machine: Machine) -> None:
    machine(ev.WorkerLost(OWNER, LOST))
    assert machine(ev.UserUnpickled(THEIRS, THEIR_FORK, OWNER, PARENT)) == []
    (resume,) = machine(ev.ConfirmationAwaited("function", (THEIR_FORK,)))
    assert isinstance(resume, ev.Resume)
    assert isinstance(resume.error, WorkerLostError)


def test_what_a_dead_worker_was_about_to_create_is_not_waited_for(machine: Machine) -> None:
    machine(ev.OwnerFetched(THEIRS, VALUE, created=False))
    machine(ev.ForkRequested(RRefId(PARENT, 8), A_FORK, OTHER))
    assert machine(ev.WorkerLost(PARENT, LOST)) == [ev.FailOwner(VALUE, LOST), ev.Release(VALUE)]
    assert isinstance(refusal(machine(ev.OwnerFetched(RRefId(PARENT, 8), VALUE, created=False))), RRefCreationError)


# ---------------------------------------------------------------------------------------------------- control messages


def test_a_control_message_that_times_out_is_sent_again(machine: Machine) -> None:
    confirmed_user(machine)
    (delete,) = machine(ev.UserDropped(A_FORK))
    assert isinstance(delete, ev.Send)
    for _ in range(3):
        assert machine(ev.Answered(delete, ev.Outcome.TIMED_OUT, RpcTimeoutError("late"))) == [delete]
        assert machine.counts.unanswered == 1
    assert machine.answer(delete) == []
    assert machine.counts == NONE_LEFT


def test_a_control_message_that_cannot_arrive_is_given_up(machine: Machine) -> None:
    confirmed_user(machine)
    (delete,) = machine(ev.UserDropped(A_FORK))
    assert machine.answer(delete, ev.Outcome.FAILED) == []
    assert machine.counts == NONE_LEFT


def test_deleted_forks_are_forgotten_when_no_copy_can_be_under_way() -> None:
    graves = Tombstones(lifetime=10.0, capacity=2)
    graves.add("a", 0.0)
    graves.add("b", 5.0)
    graves.add("b", 6.0)
    assert "a" in graves
    graves.add("c", 10.0)
    assert "a" not in graves
    graves.add("d", 10.0)
    assert "b" not in graves
    assert len(graves) == 2
    graves.discard("c")
    graves.discard("never there")
    assert len(graves) == 1
    graves.expire(100.0)
    assert len(graves) == 0


def test_a_copy_older_than_any_message_lives_is_taken_for_new(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    machine(ev.UserDeleted(THEIRS, A_FORK))
    machine.now = MESSAGE_LIFETIME + 1
    machine(ev.UserDeleted(THEIRS, ForkId(OTHER, 50)))
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    assert machine.counts.forks == 2


# ------------------------------------------------------------------------------------------------------------ shutdown


def test_shutdown_deletes_every_user_as_soon_as_the_rules_allow_it(machine: Machine) -> None:
    confirmed_user(machine)
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    assert machine(ev.AllUsersDropped()) == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK))]
    assert machine(ev.CreationConfirmed(MY_FORK)) == [ev.Send(OWNER, RRefUserDelete(MINE, MY_FORK))]
    assert machine(ev.UserDropped(MY_FORK)) == []


def test_closing_ends_all_waits_and_keeps_nothing(machine: Machine) -> None:
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    machine(ev.UserForked(MY_FORK, ForkId(ME, 5)))
    machine(ev.ConfirmationAwaited("function", (MY_FORK,)))
    machine(ev.OwnerFetched(THEIRS, VALUE, created=False))
    machine(ev.OwnerCreated(RRefId(OTHER, 1), A_FORK, OTHER, "other"))
    assert machine(ev.Closed(SHUT)) == [
        ev.FailOwner(VALUE, SHUT),
        ev.Release(VALUE),
        ev.Release("other"),
        ev.Resume("function", SHUT),
    ]
    assert machine.protocol.is_closed
    assert machine.counts == NONE_LEFT


@pytest.mark.parametrize(
    "event",
    [
        ev.OwnerForked(MINE, MY_FORK, VALUE, created=True),
        ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE),
        ev.OwnerFetched(THEIRS, VALUE, created=False),
        ev.OwnerUnpickled(THEIRS, A_FORK, PARENT, VALUE, created=False),
        ev.ForkRequested(THEIRS, A_FORK, OTHER),
        ev.UserCreated(MINE, MY_FORK, OWNER),
        ev.UserUnpickled(THEIRS, A_FORK, OWNER, PARENT),
        ev.UserForked(A_FORK, MY_FORK),
    ],
    ids=lambda event: type(event).__name__,
)
def test_after_closing_nothing_new_begins(machine: Machine, event: ev.Event) -> None:
    assert not machine.protocol.is_closed
    machine(ev.Closed(SHUT))
    error = refusal(machine(event))
    assert isinstance(error, ShutdownError)
    assert error is not SHUT, "each raise needs an exception of its own"
    assert machine.counts == NONE_LEFT


def test_after_closing_the_rest_goes_without_a_word(machine: Machine) -> None:
    machine(ev.Closed(SHUT))
    assert machine(ev.ConfirmationAwaited("function", (A_FORK,))) == [ev.Resume("function", SHUT)]
    assert machine(ev.UserDropped(A_FORK)) == []
    assert machine(ev.UserDeleted(THEIRS, THEIR_FORK)) == []
    assert machine(ev.Closed(SHUT)) == []
