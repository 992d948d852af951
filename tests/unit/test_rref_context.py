"""The RRef context: what its callers see of the protocol, with several workers in one process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.unit.rref_group import Group, dumps, loads
from zmqagent.agent.base import Reply
from zmqagent.exceptions import (
    InvalidTypeError,
    ProtocolError,
    RpcError,
    RpcTimeoutError,
    RRefCreationError,
    RRefUsageError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.rref.context import RRefContext
from zmqagent.rref.rref import OwnerRRef
from zmqagent.wire.commands import Failure, RemoteReturn
from zmqagent.wire.types import ForkId, Message, RRefId, WorkerId

EMPTY = {"num_owner_rrefs": "0", "num_pending_futures": "0", "num_pending_users": "0", "num_forks": "0"}


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(3)
    yield group
    group.close()


def counts(group: Group, worker: int) -> tuple[int, int, int, int]:
    """Owners, forks, pending users and unanswered control messages."""
    info = group[worker].context.debug_info()
    keys = ("num_owner_rrefs", "num_forks", "num_pending_users", "num_pending_futures")
    return tuple(int(info[key]) for key in keys)  # type: ignore[return-value]


def fetched(context: RRefContext, rref_id: RRefId) -> list[Any]:
    """Asks for a value; the list gets what comes of it."""
    results: list[Any] = []

    def ready(owner: OwnerRRef | None, error: BaseException | None) -> None:
        results.append(error if error is not None or owner is None else owner.value())

    context.when_owner_ready(rref_id, ready)
    return results


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
    group[1].context.on_user_delete(*ids)
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


# ----------------------------------------------------------------------------------------------------- control messages


def test_a_control_message_is_sent_again_when_it_times_out(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    new = group.remote(0, 1, "value")
    tries = iter([RpcTimeoutError("no answer"), RpcTimeoutError("no answer")])

    def answer(_: Message) -> Reply | None:
        return next(tries, None)

    del new
    assert group.deliver(answer) == ["0->1 RREF_USER_DELETE"] * 3
    assert "worker1 did not answer RRefUserDelete in time" in caplog.text
    assert counts(group, 1) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (Failure(0, "ValueError", "broken"), "worker1 did not accept RRefForkRequest: broken"),
        (RemoteReturn(RRefId(0, 0), ForkId(0, 1)), "worker1 answered RRefForkRequest with RemoteReturn instead of Ack"),
        (WorkerLostError("worker1 died"), "worker1 died"),
    ],
)
def test_a_refused_share_fails_the_function_and_frees_its_parent(group: Group, reply: Reply, complaint: str) -> None:
    new = group.remote(0, 1, "value")
    shared, pending = group.send(0, 2, new.rref)
    errors: list[Any] = []
    group[2].context.when_confirmed(pending, errors.append)
    group.deliver(lambda message: reply if message.type.name == "RREF_FORK_REQUEST" else None)
    assert complaint in str(errors[0])
    with pytest.raises(type(errors[0]), match=complaint):
        shared.to_here()
    del new
    assert group.deliver() == ["0->1 RREF_USER_DELETE"]


def test_what_cannot_be_sent_fails_as_if_it_were_answered_so(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    new = group.remote(0, 1, "value")
    group.refuse = RpcError("no way out")
    del new
    group.drain()
    assert "worker1 may keep a value that nobody uses any more: no way out" in caplog.text
    assert group[0].context.debug_info() == EMPTY


# --------------------------------------------------------------------------------------------------------------- deaths


def test_the_shares_of_a_dead_worker_end(group: Group) -> None:
    rref = group[0].context.local("value")
    group.share(0, 1, rref)
    assert counts(group, 0) == (1, 1, 0, 0)
    group[0].context.on_worker_lost(WorkerId(1), WorkerLostError("worker1 is gone"))
    assert counts(group, 0) == (0, 0, 0, 0)


def test_the_rrefs_of_a_dead_owner_name_it(group: Group) -> None:
    new = group.remote(0, 1, "value")
    group[0].context.on_worker_lost(WorkerId(1), WorkerLostError("worker1 is gone"))
    for use in (new.rref.to_here, new.rref._serialize):
        with pytest.raises(WorkerLostError, match="worker1 is gone"):
            use()


def test_a_worker_that_comes_back_under_an_old_id_may_hold_shares(group: Group) -> None:
    context = group[0].context
    context.on_worker_lost(WorkerId(1), WorkerLostError("worker1 is gone"))
    context.on_worker_joined(WorkerId(1))
    shared = group.share(0, 1, context.local("value"))
    assert counts(group, 0) == (1, 1, 0, 0)
    assert shared.to_here() == "value"


# ------------------------------------------------------------------------------------------------------------- shutdown


def test_shutdown_deletes_the_users_that_are_still_referred_to(group: Group) -> None:
    new = group.remote(0, 1, "value")
    waiter = threading.Thread(target=group[0].context.delete_all_users_and_unforked_owners)
    waiter.start()
    shell = group[0].context._shell
    assert shell.wait_until(lambda protocol: protocol.counts.unanswered == 1, 10.0)
    group.deliver()
    waiter.join()
    group[1].context.delete_all_users_and_unforked_owners()
    assert counts(group, 1) == (0, 0, 0, 0)
    for worker in (0, 1):
        group[worker].context.destroy(ignore_leak=False)
    name = r"UserRRef\(rref_id=GloballyUniqueId\(created_on=0, local_id=0\), fork_id=.* has been deleted. "
    with pytest.raises(RRefUsageError, match=name + r"Cannot call to_here\(\) on it after deletion."):
        new.rref.to_here()
    with pytest.raises(RRefUsageError, match=name + "Cannot call fork an UserRRef after deletion."):
        dumps(group[0].context, new.rref)
    assert new.rref.confirmed_by_owner()
    assert new.rref.owner_name() == "worker1"


def test_one_that_leaves_gives_back_its_users_and_does_not_wait_for_those_of_others(group: Group) -> None:
    mine, theirs = group.remote(0, 1, "value"), group.remote(1, 0, "value")
    waiter = threading.Thread(target=group[0].context.delete_all_users)
    waiter.start()
    assert group[0].context._shell.wait_until(lambda protocol: protocol.counts.unanswered == 1, 10.0)
    group.deliver()
    waiter.join(10.0)
    assert not waiter.is_alive()
    assert counts(group, 1)[0] == 0
    assert counts(group, 0)[0] == 1
    del mine, theirs


def test_a_departure_that_takes_too_long_is_logged_and_goes_on(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    new = group.remote(0, 1, "value")
    group[0].context.delete_all_users(timeout=0.0)
    assert "worker0: timed out after 0 s while waiting for the owners of deleted users to answer" in caplog.text
    del new


def test_a_shutdown_that_takes_too_long_is_logged_and_goes_on(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    new = group[0].context.new_remote(WorkerId(1))
    group[0].context.delete_all_users_and_unforked_owners(timeout=0.0)
    assert "worker0: timed out after 0 s while waiting for users to be confirmed" in caplog.text
    assert "while waiting for the users of the RRefs owned here to be deleted" in caplog.text
    assert new.rref.confirmed_by_owner()


def test_forks_left_at_shutdown_are_an_error_if_asked_for(group: Group) -> None:
    new = group.remote(0, 1, "value")
    ids = r"Leaking RRef GloballyUniqueId\(created_on=0, local_id=0\) with fork Id GloballyUniqueId\(created_on=0, local_id=1\)"
    with pytest.raises(RRefUsageError, match=ids):
        group[1].context.destroy(ignore_leak=False)
    assert group[1].context.debug_info() == EMPTY
    group[1].context.destroy(ignore_leak=False)
    del new


def test_forks_left_at_shutdown_are_logged_otherwise(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    new = group.remote(0, 1, "value")
    group[1].context.destroy(ignore_leak=True)
    assert "Leaking RRef" in caplog.text
    del new


def test_shutdown_ends_every_wait(group: Group) -> None:
    context = group[1].context
    new = group[0].context.new_remote(WorkerId(1))
    waiting = fetched(context, new.rref_id)
    running = context.create_owner(RRefId(0, 50), ForkId(0, 51))
    shared, pending = group.send(0, 2, group.remote(0, 1, "value").rref)
    confirmed: list[Any] = []
    group[2].context.when_confirmed(pending, confirmed.append)
    group.close()
    assert isinstance(waiting[0], ShutdownError)
    assert isinstance(confirmed[0], ShutdownError)
    with pytest.raises(ShutdownError):
        running.value()
    assert not running.set_value("too late")
    with pytest.raises(RRefUsageError, match="has been deleted"):
        shared.to_here()


def test_after_shutdown_nothing_begins_and_values_can_still_be_read(group: Group) -> None:
    context = group[0].context
    rref = context.local("value")
    group.close()
    assert rref.local_value() == "value"
    with pytest.raises(ShutdownError):
        context.new_remote(WorkerId(1))
    with pytest.raises(ShutdownError):
        context.new_remote(WorkerId(0))
    with pytest.raises(ShutdownError):
        dumps(context, rref)
    assert isinstance(fetched(context, RRefId(1, 0))[0], ShutdownError)


def test_the_thread_that_follows_dying_users_ends_with_the_context(group: Group) -> None:
    follower = group[0].context._shell._follower
    assert follower.is_alive()
    group[0].context.close()
    assert not follower.is_alive()
    group[0].context.drain()
    group[0].context.close()


def test_the_thread_that_follows_dying_users_may_close_the_context_itself(group: Group) -> None:
    context = group[0].context
    follower = context._shell._follower

    class Closer:
        def __call__(self, *_: Any, **__: Any) -> None:
            context.drain()
            context.close()

    new = group.remote(0, 1, "value")
    group[0].request = Closer()  # type: ignore[method-assign]
    del new
    follower.join(10.0)
    assert not follower.is_alive()


def test_a_deletion_that_breaks_does_not_end_the_ones_after_it(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    first, second = group.remote(0, 1, 1), group.remote(0, 1, 2)
    request = group[0].request

    def broken(*args: Any, **kwargs: Any) -> None:
        group[0].request = request  # type: ignore[method-assign]
        raise OSError("a fault of the machine")

    group[0].request = broken  # type: ignore[method-assign]
    del first
    group.drain()
    assert "cannot delete the user" in caplog.text
    del second
    assert group.deliver() == ["0->1 RREF_USER_DELETE"]


def test_an_rref_used_by_a_finalizer_inside_the_lock_is_an_error_not_a_deadlock(group: Group) -> None:
    context = group[0].context
    with context._shell.locked(), pytest.raises(RRefUsageError, match="by a finalizer that the garbage collector ran"):
        context.debug_info()
    assert context.debug_info() == EMPTY


def test_users_leave_nothing_for_the_garbage_collector(group: Group) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            new = group.remote(0, 1, "value")
            group.share(0, 2, new.rref)
            del new
            group.deliver()
        assert counts(group, 1) == (0, 0, 0, 0)
    finally:
        gc.enable()
