"""The RRef context: what its callers see of the protocol, with several workers in one process. Making and passing on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.unit.rref_group import EMPTY, Group, counts, dumps, fetched, loads
from zmqagent.exceptions import (
    InvalidTypeError,
    ProtocolError,
    RpcError,
    RpcTimeoutError,
    RRefCreationError,
    RRefUsageError,
    WorkerLostError,
)
from zmqagent.rref.events import AllUsersDropped
from zmqagent.wire.commands import RRefUserDelete, RRefUserDeletes, parse
from zmqagent.wire.types import ForkId, RRefId, WorkerId


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(3)
    yield group
    group.close()


# ---------------------------------------------------------------------------------------------------------- creation


def test_remote_draws_the_rrefs_id_first(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    assert (new.rref_id, new.fork_id) == (RRefId(0, 0), ForkId(0, 1))


def test_a_remote_value_lives_until_its_creator_drops_it(group: Group) -> None:
    new = group.remote(0, 1, "value")
    assert counts(group, 1) == (1, 1, 0, 0)
    assert new.rref.to_here() == "value"
    del new
    assert group.deliver() == ["0->1 RREF_USER_DELETE"]
    assert [group[n].context.debug_info() for n in range(3)] == [EMPTY] * 3


def test_the_deletion_of_a_dropped_user_begins_by_itself(group: Group) -> None:
    new = group.remote(0, 1, "value")
    fork_id = new.fork_id
    del new
    shell = group[0].context._shell
    assert shell.wait_until(lambda protocol: protocol.user_state(fork_id)[0].name == "DELETED", 10.0)


def test_deletions_for_one_owner_travel_together(group: Group) -> None:
    news = [group.remote(0, owner, "value") for owner in [1, 2] * 300]
    group[0].context._shell.handle(AllUsersDropped())
    deletes = [(to, parse(message)) for _, to, message, _ in group.queue]
    sizes = [(to, len(command.deletes)) for to, command in deletes if isinstance(command, RRefUserDeletes)]
    assert sorted(sizes) == [(1, 44), (1, 256), (2, 44), (2, 256)]
    group.deliver()
    assert [group[n].context.debug_info() for n in range(3)] == [EMPTY] * 3
    del news


def test_a_call_to_oneself_has_one_id_and_keeps_its_value_while_it_runs(group: Group) -> None:
    context = group[0].context
    new = context.new_remote(WorkerId(0))
    assert new.rref_id == new.fork_id == (0, 0)
    assert counts(group, 0) == (1, 1, 0, 0)
    owner = context.create_owner(new.rref_id, new.fork_id)
    assert owner.set_value(7)
    context.confirm_remote(new.rref_id, new.fork_id)
    assert counts(group, 0) == (0, 0, 0, 0)
    assert new.rref.local_value() == 7


def test_creating_an_owner_twice_gives_the_same_place_even_if_its_users_are_gone(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    ids = new.rref_id, new.fork_id
    owner = id(group[1].context.create_owner(*ids))
    waiting = fetched(group[1].context, new.rref_id)
    group[1].context.on_user_deletes([RRefUserDelete(*ids)])
    again = group[1].context.create_owner(*ids)
    assert id(again) == owner
    again.set_value("late")
    assert waiting == ["late"]
    assert counts(group, 1) == (0, 0, 0, 0)


def test_a_value_is_freed_with_its_last_user(group: Group) -> None:
    class Value:
        def __init__(self, log: list[str]) -> None:
            self.log = log

        def __del__(self) -> None:
            # The context's lock must be free: values may use RRefs when they die.
            group[1].context.debug_info()
            self.log.append("freed")

    log: list[str] = []
    new = group.remote(0, 1, Value(log))
    assert log == []
    del new
    group.deliver()
    assert log == ["freed"]


def test_a_timed_out_creation_has_torchs_text(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    group[0].context.creation_failed(new.rref_id, new.fork_id, RpcTimeoutError("10 ms"))
    for use in (new.rref.to_here, new.rref._serialize):
        with pytest.raises(RRefCreationError, match=r"RRef creation via rpc.remote\(\) timed out, and it is possible"):
            use()
    assert not new.rref.confirmed_by_owner()


@pytest.mark.parametrize(
    ("cause", "raised"), [(WorkerLostError("worker1 died"), WorkerLostError), (ProtocolError("nonsense"), RRefCreationError)]
)
def test_another_failed_creation_tells_the_cause(group: Group, cause: RpcError, raised: type[RpcError]) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    group[0].context.creation_failed(new.rref_id, new.fork_id, cause)
    with pytest.raises(raised, match=rf"RRef creation via rpc\.remote\(\) failed: {cause}") as caught:
        new.rref.to_here()
    assert caught.value.__cause__ is cause


def test_a_timed_out_call_to_oneself_fails_its_value_for_good(group: Group) -> None:
    context = group[0].context
    new = context.new_remote(WorkerId(0))
    context.creation_failed(new.rref_id, new.fork_id, RpcTimeoutError("10 ms"))
    assert not context.create_owner(new.rref_id, new.fork_id).set_value("too late")
    for use in (new.rref.to_here, new.rref._serialize):
        with pytest.raises(RRefCreationError, match="timed out"):
            use()
    assert counts(group, 0) == (0, 0, 0, 0)


def test_an_rref_whose_function_raised_can_be_given_away_all_the_same(group: Group) -> None:
    context = group[0].context
    new = context.new_remote(WorkerId(0))
    context.create_owner(new.rref_id, new.fork_id).set_error(RRefCreationError("of an RRef that the function used"))
    context.confirm_remote(new.rref_id, new.fork_id)
    assert group.share(0, 1, new.rref).owner().id == 0


def test_a_creator_that_gave_up_ends_the_fetches_that_wait_for_it(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    group[0].context.creation_failed(new.rref_id, new.fork_id, RpcTimeoutError("10 ms"))
    waiting = fetched(group[1].context, new.rref_id)
    rref_id = new.rref_id
    del new
    group.deliver()
    assert isinstance(waiting[0], RRefCreationError)
    assert isinstance(fetched(group[1].context, rref_id)[0], RRefUsageError)


def test_a_local_rref_counts_only_once_it_is_shared(group: Group) -> None:
    rref = group[0].context.local(35)
    assert str(rref) == "OwnerRRef(GloballyUniqueId(created_on=0, local_id=0))"
    assert counts(group, 0) == (0, 0, 0, 0)
    shared = group.share(0, 1, rref)
    assert counts(group, 0) == (1, 1, 0, 0)
    assert shared.to_here() == 35
    del shared
    group.deliver()
    assert counts(group, 0) == (0, 0, 0, 0)
    assert rref.local_value() == 35


def test_a_script_module_needs_its_interface(group: Group) -> None:
    with pytest.warns(DeprecationWarning, match="trace"):
        module = torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1), check_trace=False)
    with pytest.raises(InvalidTypeError, match=r"contains a ScriptModule, must provide its ModuleInterface type hint\. "):
        group[0].context.local(module)
    assert group[0].context.local(module, type_hint=object).local_value() is module


# ------------------------------------------------------------------------------------------- the ways of a share


def test_owner_to_user_needs_no_messages(group: Group) -> None:
    shared, pending = group.send(0, 1, [group[0].context.local("value")])
    confirmed: list[Any] = []
    group[1].context.when_confirmed(pending, confirmed.append)
    assert confirmed == [None]
    assert shared[0].confirmed_by_owner()
    assert not group.queue


def test_a_message_without_rrefs_waits_for_nothing(group: Group) -> None:
    _, pending = group.send(0, 1, "no RRef in it")
    confirmed: list[Any] = []
    group[1].context.when_confirmed(pending, confirmed.append)
    assert confirmed == [None]


def test_user_to_user_waits_for_the_owner_then_frees_the_parent(group: Group) -> None:
    new = group.remote(0, 1, "value")
    shared, pending = group.send(0, 2, {"key": (new.rref,)})
    confirmed: list[Any] = []
    group[2].context.when_confirmed(pending, confirmed.append)
    assert confirmed == []
    assert not shared["key"][0].confirmed_by_owner()
    assert counts(group, 2) == (0, 0, 1, 1)
    del new
    assert group.deliver() == ["2->1 RREF_FORK_REQUEST", "2->0 RREF_CHILD_ACCEPT", "0->1 RREF_USER_DELETE"]
    assert confirmed == [None]
    assert shared["key"][0].to_here() == "value"
    del shared
    assert group.deliver() == ["2->1 RREF_USER_DELETE"]
    assert counts(group, 1) == (0, 0, 0, 0)


def test_user_to_owner_gives_the_owners_own_object(group: Group) -> None:
    value = object()
    new = group.remote(0, 1, value)
    back = group.share(0, 1, new.rref)
    assert back.is_owner()
    assert back.local_value() is value
    del new
    assert group.deliver() == ["1->0 RREF_CHILD_ACCEPT", "0->1 RREF_USER_DELETE"]
    assert back.local_value() is value


def test_an_owner_that_calls_itself_keeps_no_fork(group: Group) -> None:
    rref = group[0].context.local("value")
    again = group.share(0, 0, rref)
    assert again.local_value() == "value"
    assert counts(group, 0) == (0, 0, 0, 0)
    assert not group.queue


def test_a_user_that_calls_itself_gets_a_share_of_its_own(group: Group) -> None:
    new = group.remote(0, 1, "value")
    again = group.share(0, 0, new.rref)
    assert group.deliver() == ["0->1 RREF_FORK_REQUEST", "0->0 RREF_CHILD_ACCEPT"]
    assert counts(group, 1) == (1, 2, 0, 0)
    assert str(again) != str(new.rref)


def test_an_rref_that_reaches_its_owner_before_its_creation_gets_its_value_later(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    early = group.share(0, 1, new.rref)
    group[1].context.create_owner(new.rref_id, new.fork_id).set_value("value")
    assert early.local_value() == "value"


def test_a_fetch_that_overtakes_the_creation_waits_for_it(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    waiting = fetched(group[1].context, new.rref_id)
    owner = group[1].context.create_owner(new.rref_id, new.fork_id)
    assert waiting == []
    owner.set_value("value")
    assert waiting == ["value"]
    assert fetched(group[1].context, new.rref_id) == ["value"]


def test_a_fetch_of_a_failed_function_gets_its_exception(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    error = ValueError("no value")
    group[1].context.create_owner(new.rref_id, new.fork_id).set_error(error)
    assert fetched(group[1].context, new.rref_id) == [error]


def test_a_message_that_is_not_sent_gives_nothing_away(group: Group) -> None:
    new = group.remote(0, 1, "value")
    own = group[0].context.local("own")
    _, forks = dumps(group[0].context, [new.rref, own])
    assert counts(group, 0) == (1, 1, 0, 0)
    forks.cancel()
    assert counts(group, 0) == (0, 0, 0, 0)
    del new
    assert group.deliver() == ["0->1 RREF_USER_DELETE"]


def test_pickling_that_fails_gives_nothing_away(group: Group) -> None:
    own = group[0].context.local("own")
    with pytest.raises(TypeError, match="pickle"):
        dumps(group[0].context, [own, threading.Lock()])
    assert counts(group, 0) == (0, 0, 0, 0)


def test_an_rref_of_this_worker_that_is_gone_fails_the_function_but_not_what_comes_after_it(group: Group) -> None:
    new = group.remote(0, 1, "value")
    other = group[0].context.local("other")
    data, _ = dumps(group[0].context, [new.rref, other])
    group[1].context.on_worker_lost(WorkerId(0), WorkerLostError("worker0 is gone"))
    (gone, shared), pending = loads(group[1].context, data)
    errors: list[Any] = []
    group[1].context.when_confirmed(pending, errors.append)
    assert isinstance(errors[0], RRefUsageError)
    with pytest.raises(RRefUsageError, match="has been deleted"):
        gone.local_value()
    assert shared.owner_name() == "worker0"


def test_shares_minted_outside_of_all_scopes_are_taken_back_by_who_asks_for_them(group: Group) -> None:
    context = group[0].context
    context.local("mine")._serialize()
    assert counts(group, 0)[:2] == (1, 1)
    forks = context.pickled_without_scope()
    context.pickled_without_scope().cancel()
    assert counts(group, 0)[:2] == (1, 1)
    forks.cancel()
    assert counts(group, 0)[:2] == (0, 0)


def test_outside_of_a_scope_an_rref_that_is_gone_is_refused(group: Group) -> None:
    new = group.remote(0, 1, "value")
    data = new.rref._serialize()
    group[1].context.on_worker_lost(WorkerId(0), WorkerLostError("worker0 is gone"))
    with pytest.raises(RRefUsageError, match="has been deleted"):
        group[1].context.unpickle(data)


def test_rrefs_can_be_rebuilt_without_a_scope(group: Group) -> None:
    rref = group[1].context.unpickle(group[0].context.local("value")._serialize())
    assert rref.to_here() == "value"
