"""The RRef context, as in `test_rref_context`: messages that do not arrive, deaths, shutdown, finalizers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.rref_group import EMPTY, Group, counts, dumps, fetched
from zmqagent.agent.base import Reply
from zmqagent.exceptions import (
    RpcError,
    RpcTimeoutError,
    RRefUsageError,
    ShutdownError,
    WorkerLostError,
)
from zmqagent.wire.commands import Failure, RemoteReturn
from zmqagent.wire.types import ForkId, Message, RRefId, WorkerId


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(3)
    yield group
    group.close()


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
    assert "worker1 may keep values that nobody uses any more: no way out" in caplog.text
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
