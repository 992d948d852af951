"""The RRef protocol's machine, event by event: the four ways to get a share, both guarantees, waits and fetches."""

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
    THEIR_FORK,
    THEIRS,
    VALUE,
    Machine,
    confirmed_user,
    refusal,
)
from zmqagent.exceptions import RRefCreationError, RRefUsageError
from zmqagent.rref import events as ev
from zmqagent.rref.protocol import Counts, RRefProtocol
from zmqagent.rref.users import UserState
from zmqagent.wire.commands import RRefChildAccept, RRefForkRequest, RRefUserDelete
from zmqagent.wire.types import ForkId, RRefId


@pytest.fixture
def machine() -> Machine:
    return Machine()


# ------------------------------------------------------------------------------------------------------------------ ids


def test_rrefs_and_forks_draw_from_one_counter() -> None:
    protocol = RRefProtocol(ME, first_local_id=5)
    assert [protocol.draw() for _ in range(3)] == [5, 6, 7]


# ------------------------------------------------------------------------------------------------- scenario 1: the creator


def test_a_creator_deletes_only_after_its_confirmation(machine: Machine) -> None:
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    assert machine.protocol.user_state(MY_FORK) == (UserState.PENDING, None)
    assert machine(ev.UserDropped(MY_FORK)) == []
    assert machine.counts.pending_users == 1
    assert machine(ev.CreationConfirmed(MY_FORK)) == [ev.Send(OWNER, RRefUserDelete(MINE, MY_FORK))]
    assert machine.counts.unanswered == 1
    assert machine.answer(ev.Send(OWNER, RRefUserDelete(MINE, MY_FORK))) == []
    assert machine.counts == NONE_LEFT


def test_a_second_confirmation_changes_nothing(machine: Machine) -> None:
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    assert machine(ev.CreationConfirmed(MY_FORK)) == []
    assert machine.protocol.user_state(MY_FORK) == (UserState.CONFIRMED, None)
    assert machine(ev.CreationConfirmed(MY_FORK)) == []
    assert machine(ev.CreationConfirmed(A_FORK)) == []


def test_the_owner_keeps_the_value_until_the_creator_deletes(machine: Machine) -> None:
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)
    assert machine.protocol.leaks() == [ev.MintedFork(THEIRS, THEIR_FORK)]
    assert machine(ev.UserDeleted(THEIRS, THEIR_FORK)) == [ev.Release(VALUE)]
    assert machine.counts == NONE_LEFT


def test_a_second_creation_does_not_bring_the_creators_fork_back(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    assert machine.counts.forks == 1
    machine(ev.UserDeleted(THEIRS, A_FORK))
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == []
    assert machine.counts == NONE_LEFT


def test_a_failed_creator_reports_its_end_all_the_same(machine: Machine) -> None:
    error = RRefCreationError("timed out")
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    assert machine(ev.CreationFailed(MY_FORK, error)) == []
    assert machine.protocol.user_state(MY_FORK) == (UserState.FAILED, error)
    assert machine(ev.UserDropped(MY_FORK)) == [ev.Send(OWNER, RRefUserDelete(MINE, MY_FORK))]


def test_a_delete_that_overtakes_the_creation_is_remembered(machine: Machine) -> None:
    assert machine(ev.UserDeleted(THEIRS, THEIR_FORK)) == []
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == []
    assert machine.counts == NONE_LEFT


def test_an_abandoned_creation_that_arrives_serves_the_users_that_are_left(machine: Machine) -> None:
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    assert machine(ev.UserDeleted(THEIRS, THEIR_FORK)) == []
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)
    assert machine(ev.UserDeleted(THEIRS, A_FORK)) == [ev.Release(VALUE)]


def test_a_user_deleted_before_the_creation_arrives_does_not_end_the_wait_for_it(machine: Machine) -> None:
    machine(ev.OwnerFetched(THEIRS, VALUE, created=False))
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    assert machine(ev.UserDeleted(THEIRS, A_FORK)) == []
    assert machine.protocol.keeps(THEIRS)
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)


def test_a_user_may_come_and_go_before_the_creation_arrives(machine: Machine) -> None:
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    assert machine(ev.UserDeleted(THEIRS, A_FORK)) == [ev.Release(None)]
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)


def test_the_call_of_a_dead_creator_leaves_nothing(machine: Machine) -> None:
    machine(ev.WorkerLost(PARENT, LOST))
    assert machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE)) == [ev.Release(VALUE)]
    assert machine.counts == NONE_LEFT


# ---------------------------------------------------------------------------------------------- scenario 1 to oneself


def test_a_call_to_oneself_keeps_the_value_until_it_is_answered(machine: Machine) -> None:
    machine(ev.OwnerForked(MINE, ForkId(*MINE), VALUE, created=True))
    assert machine(ev.OwnerCreated(MINE, ForkId(*MINE), ME, VALUE)) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)
    assert machine(ev.SelfRemoteEnded(MINE, None)) == [ev.Release(VALUE)]
    assert machine.counts == NONE_LEFT


def test_a_failed_call_to_oneself_fails_the_value_and_its_late_arrival_leaves_nothing(machine: Machine) -> None:
    error = RRefCreationError("timed out")
    machine(ev.OwnerForked(MINE, ForkId(*MINE), VALUE, created=True))
    assert machine(ev.SelfRemoteEnded(MINE, error)) == [ev.FailOwner(VALUE, error), ev.Release(VALUE)]
    assert machine(ev.OwnerCreated(MINE, ForkId(*MINE), ME, VALUE)) == []
    assert machine(ev.SelfRemoteEnded(MINE, error)) == []
    assert machine.counts == NONE_LEFT


# ------------------------------------------------------------------------------------------- scenario 2: user to owner


def test_a_user_sent_to_its_owner_outlives_the_owners_acceptance(machine: Machine) -> None:
    confirmed_user(machine)
    assert machine(ev.UserForked(A_FORK, MY_FORK)) == []
    assert machine(ev.ForksSent((ev.MintedFork(THEIRS, MY_FORK),), OWNER)) == []
    assert machine(ev.UserDropped(A_FORK)) == []
    assert machine.counts.pending_children == 1
    assert machine(ev.ChildAccepted(MY_FORK)) == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK))]
    assert machine(ev.ChildAccepted(MY_FORK)) == []


def test_the_owner_accepts_the_phantom_and_keeps_no_fork_for_it(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    phantom = ForkId(PARENT, 9)
    instructions = machine(ev.OwnerUnpickled(THEIRS, phantom, PARENT, VALUE, created=True))
    assert instructions == [ev.Send(PARENT, RRefChildAccept(phantom))]
    assert machine.answer(instructions[0]) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)


def test_an_rref_that_reaches_its_owner_before_its_creation_is_waited_for(machine: Machine) -> None:
    machine(ev.OwnerUnpickled(THEIRS, ForkId(PARENT, 9), PARENT, VALUE, created=False))
    assert machine.protocol.keeps(THEIRS)
    assert machine.counts.owners == 0
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    assert machine.counts.owners == 1


def test_a_parent_is_freed_even_if_its_rref_is_no_more(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    instructions = machine(ev.OwnerUnpickled(THEIRS, A_FORK, OTHER, VALUE, created=False))
    assert isinstance(refusal(instructions), RRefUsageError)
    assert ev.Send(OTHER, RRefChildAccept(A_FORK)) in instructions


# ------------------------------------------------------------------------------------------- scenario 3: owner to user


def test_the_owner_registers_a_fork_while_it_is_pickled(machine: Machine) -> None:
    assert machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True)) == []
    assert machine(ev.ForksSent((ev.MintedFork(MINE, MY_FORK),), OTHER)) == []
    assert machine.counts == Counts(1, 1, 0, 0, 0, 0)
    assert machine(ev.UserDeleted(MINE, MY_FORK)) == [ev.Release(VALUE)]


def test_a_user_that_the_owner_made_is_confirmed_at_once_and_sends_nothing(machine: Machine) -> None:
    confirmed_user(machine)
    assert machine.protocol.user_state(A_FORK) == (UserState.CONFIRMED, None)
    assert machine(ev.UserDropped(A_FORK)) == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK))]


def test_an_owner_that_sends_to_itself_takes_the_fork_back(machine: Machine) -> None:
    machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True))
    assert machine(ev.OwnerUnpickled(MINE, MY_FORK, ME, VALUE, created=True)) == [ev.Release(VALUE)]
    assert machine.counts == NONE_LEFT


def test_an_rref_can_be_shared_again_after_all_its_users_have_gone(machine: Machine) -> None:
    machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True))
    machine(ev.UserDeleted(MINE, MY_FORK))
    machine(ev.OwnerForked(MINE, ForkId(ME, 2), VALUE, created=True))
    assert machine(ev.ForkRequested(MINE, A_FORK, OTHER)) == []
    assert machine.counts == Counts(1, 2, 0, 0, 0, 0)


def test_a_second_delete_of_a_fork_that_the_owner_made_is_no_sign_of_a_failed_creation(machine: Machine) -> None:
    machine(ev.OwnerForked(THEIRS, MY_FORK, VALUE, created=False))
    machine(ev.OwnerFetched(THEIRS, VALUE, created=False))
    machine(ev.UserDeleted(THEIRS, MY_FORK))
    assert machine(ev.UserDeleted(THEIRS, MY_FORK)) == []
    assert machine.protocol.keeps(THEIRS)


# -------------------------------------------------------------------------------------------- scenario 4: user to user


def test_a_child_asks_the_owner_then_frees_its_parent_and_starts_the_function(machine: Machine) -> None:
    (request,) = machine(ev.UserUnpickled(THEIRS, THEIR_FORK, OWNER, PARENT))
    assert request == ev.Send(OWNER, RRefForkRequest(THEIRS, THEIR_FORK))
    assert machine(ev.ConfirmationAwaited("function", (THEIR_FORK,))) == []
    assert machine.answer(request) == [ev.Resume("function", None), ev.Send(PARENT, RRefChildAccept(THEIR_FORK))]
    assert machine.counts.pending_users == 0


def test_a_child_dropped_early_frees_its_parent_before_it_goes(machine: Machine) -> None:
    (request,) = machine(ev.UserUnpickled(THEIRS, THEIR_FORK, OWNER, PARENT))
    machine(ev.UserDropped(THEIR_FORK))
    assert machine.answer(request) == [
        ev.Send(PARENT, RRefChildAccept(THEIR_FORK)),
        ev.Send(OWNER, RRefUserDelete(THEIRS, THEIR_FORK)),
    ]


def test_copies_of_a_fork_request_count_once_and_do_not_outlive_the_deletion(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    for _ in range(2):
        assert machine(ev.ForkRequested(THEIRS, A_FORK, OTHER)) == []
    assert machine.counts.forks == 2
    for _ in range(2):
        assert machine(ev.UserDeleted(THEIRS, A_FORK)) == []
    assert machine(ev.ForkRequested(THEIRS, A_FORK, OTHER)) == []
    assert machine.counts.forks == 1


def test_a_delete_that_overtakes_the_fork_request_is_remembered(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.UserDeleted(THEIRS, A_FORK))
    assert machine(ev.ForkRequested(THEIRS, A_FORK, OTHER)) == []
    assert machine.counts.forks == 1


def test_a_fork_request_may_arrive_before_the_creation(machine: Machine) -> None:
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    assert machine.counts == Counts(0, 1, 0, 0, 0, 0)
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    assert machine.counts == Counts(1, 2, 0, 0, 0, 0)


def test_a_request_for_what_is_gone_is_refused(machine: Machine) -> None:
    machine(ev.OwnerCreated(THEIRS, THEIR_FORK, PARENT, VALUE))
    machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    error = refusal(machine(ev.ForkRequested(THEIRS, A_FORK, OTHER)))
    assert isinstance(error, RRefUsageError)
    assert "has been deleted" in str(error)


def test_a_refused_child_fails_and_frees_its_parent(machine: Machine) -> None:
    (request,) = machine(ev.UserUnpickled(THEIRS, THEIR_FORK, OWNER, PARENT))
    machine(ev.ConfirmationAwaited("function", (THEIR_FORK,)))
    assert machine.answer(request, ev.Outcome.FAILED) == [
        ev.Resume("function", LOST),
        ev.Send(PARENT, RRefChildAccept(THEIR_FORK)),
    ]
    assert machine.protocol.user_state(THEIR_FORK) == (UserState.FAILED, LOST)


def test_a_refusal_without_a_reason_fails_the_child_too(machine: Machine) -> None:
    (request,) = machine(ev.UserUnpickled(THEIRS, THEIR_FORK, OWNER, PARENT))
    assert isinstance(request, ev.Send)
    machine(ev.Answered(request, ev.Outcome.FAILED))
    assert machine.protocol.user_state(THEIR_FORK)[0] is UserState.FAILED


def test_one_share_cannot_be_unpickled_twice(machine: Machine) -> None:
    confirmed_user(machine)
    assert isinstance(refusal(machine(ev.UserUnpickled(THEIRS, A_FORK, OWNER, OWNER))), RRefUsageError)


# ---------------------------------------------------------------------------------------------------------------- G2


def test_a_parent_waits_for_all_its_children(machine: Machine) -> None:
    confirmed_user(machine)
    children = [ForkId(ME, n) for n in range(3)]
    for child in children:
        machine(ev.UserForked(A_FORK, child))
    machine(ev.UserDropped(A_FORK))
    assert machine(ev.ChildAccepted(children[1])) == []
    assert machine(ev.ChildAccepted(children[0])) == []
    assert machine(ev.ChildAccepted(children[2])) == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK))]


def test_children_of_a_pending_parent_do_not_confirm_it(machine: Machine) -> None:
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    machine(ev.UserForked(MY_FORK, A_FORK))
    machine(ev.UserDropped(MY_FORK))
    assert machine(ev.ChildAccepted(A_FORK)) == []
    assert machine(ev.CreationConfirmed(MY_FORK)) == [ev.Send(OWNER, RRefUserDelete(MINE, MY_FORK))]


def test_forks_of_a_message_that_was_not_sent_are_taken_back(machine: Machine) -> None:
    confirmed_user(machine)
    child = ForkId(ME, 5)
    machine(ev.UserForked(A_FORK, child))
    machine(ev.OwnerForked(MINE, MY_FORK, VALUE, created=True))
    machine(ev.UserDropped(A_FORK))
    instructions = machine(ev.ForksCancelled((ev.MintedFork(THEIRS, child), ev.MintedFork(MINE, MY_FORK))))
    assert instructions == [ev.Send(OWNER, RRefUserDelete(THEIRS, A_FORK)), ev.Release(VALUE)]


def test_deleted_users_cannot_be_forked(machine: Machine) -> None:
    error = refusal(machine(ev.UserForked(A_FORK, MY_FORK)))
    assert "Cannot call fork an UserRRef after deletion." in str(error)
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    machine(ev.AllUsersDropped())
    assert machine.protocol.user_state(MY_FORK) == (UserState.DELETED, None)
    assert isinstance(refusal(machine(ev.UserForked(MY_FORK, A_FORK))), RRefUsageError)


# -------------------------------------------------------------------------------------------------------- confirmations


def test_a_function_waits_for_all_its_pending_arguments(machine: Machine) -> None:
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    machine(ev.UserCreated(RRefId(ME, 2), ForkId(ME, 3), OWNER))
    confirmed_user(machine)
    assert machine(ev.ConfirmationAwaited("function", (MY_FORK, ForkId(ME, 3), A_FORK))) == []
    assert machine(ev.CreationConfirmed(ForkId(ME, 3))) == []
    assert machine(ev.CreationConfirmed(MY_FORK)) == [ev.Resume("function", None)]


def test_a_function_without_pending_arguments_starts_at_once(machine: Machine) -> None:
    confirmed_user(machine)
    gone = ForkId(OTHER, 99)
    assert machine(ev.ConfirmationAwaited("function", (A_FORK, gone))) == [ev.Resume("function", None)]


def test_the_first_argument_that_fails_ends_the_wait_and_the_others_do_not_end_it_again(machine: Machine) -> None:
    error = RRefCreationError("timed out")
    machine(ev.UserCreated(MINE, MY_FORK, OWNER))
    machine(ev.UserCreated(RRefId(ME, 2), ForkId(ME, 3), OWNER))
    machine(ev.ConfirmationAwaited("function", (MY_FORK, ForkId(ME, 3))))
    assert machine(ev.CreationFailed(MY_FORK, error)) == [ev.Resume("function", error)]
    assert machine(ev.CreationConfirmed(ForkId(ME, 3))) == []
    assert machine(ev.ConfirmationAwaited("another", (MY_FORK,))) == [ev.Resume("another", error)]


# ------------------------------------------------------------------------------------------------------------- fetches


def test_a_fetch_keeps_a_place_for_a_value_that_is_on_its_way(machine: Machine) -> None:
    assert machine(ev.OwnerFetched(THEIRS, VALUE, created=False)) == []
    assert machine.protocol.keeps(THEIRS)
    assert machine.counts.owners == 0


def test_a_fetch_of_what_exists_changes_nothing(machine: Machine) -> None:
    assert machine(ev.OwnerFetched(MINE, VALUE, created=True)) == []
    assert not machine.protocol.keeps(MINE)


def test_a_fetch_ends_when_the_creator_gives_up(machine: Machine) -> None:
    machine(ev.OwnerFetched(THEIRS, VALUE, created=False))
    failed, released = machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    assert isinstance(failed, ev.FailOwner)
    assert isinstance(failed.error, RRefCreationError)
    assert released == ev.Release(VALUE)


def test_a_fetch_after_the_creator_gave_up_is_refused(machine: Machine) -> None:
    machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    assert isinstance(refusal(machine(ev.OwnerFetched(THEIRS, VALUE, created=False))), RRefUsageError)
    assert machine.counts == NONE_LEFT


def test_a_fetch_by_another_user_after_the_creator_gave_up_is_refused_too(machine: Machine) -> None:
    machine(ev.ForkRequested(THEIRS, A_FORK, OTHER))
    machine(ev.UserDeleted(THEIRS, THEIR_FORK))
    assert isinstance(refusal(machine(ev.OwnerFetched(THEIRS, VALUE, created=False))), RRefCreationError)
    assert machine(ev.UserDeleted(THEIRS, A_FORK)) == [ev.Release(None)]
    assert isinstance(refusal(machine(ev.OwnerFetched(THEIRS, VALUE, created=False))), RRefUsageError)
