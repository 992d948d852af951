"""What programs hold: an object that passes for torch's RRef, on the owner and on a user."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.rpc as torch_rpc
from torch.distributed.rpc import PyRRef, WorkerInfo
from torch.distributed.rpc.rref_proxy import RRefProxy
from torch.futures import Future

from tests.unit.rref_group import Group
from zmqagent.exceptions import BackwardError, RpcTimeoutError, RRefUsageError
from zmqagent.rref import rref as rref_module
from zmqagent.rref.rref import OwnerRRef, RRef, backward_root
from zmqagent.wire.types import RRefId, WorkerId


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.close()


@pytest.fixture
def owned(group: Group) -> RRef:
    return group[0].context.local(torch.ones(2))


@pytest.fixture
def used(group: Group) -> RRef:
    return group.remote(0, 1, torch.ones(2)).rref


def an_owner() -> OwnerRRef:
    return OwnerRRef(WorkerId(0), RRefId(0, 3), created=True)


# ------------------------------------------------------------------------------------------------------------ OwnerRRef


def test_the_first_value_wins() -> None:
    owner = an_owner()
    assert not owner.is_ready
    assert owner.set_value(1)
    assert owner.is_ready
    assert not owner.set_value(2)
    assert not owner.set_error(ValueError("late"))
    assert owner.value() == 1
    assert owner.error is None


def test_an_error_takes_the_values_place_and_each_reader_raises_a_copy_of_it() -> None:
    owner = an_owner()
    error = ValueError("no value")
    error.__cause__ = cause = KeyError("why")
    owner.set_error(error)
    for _ in range(2):
        with pytest.raises(ValueError, match="no value") as caught:
            owner.value()
        assert caught.value is not error
        assert caught.value.__cause__ is cause
    assert error.__traceback__ is None
    assert owner.error is error


def test_an_error_that_cannot_be_copied_is_raised_itself() -> None:
    class Uncopyable(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a)

    class Changeling(Exception):
        def __reduce__(self) -> Any:
            return (str, ("no exception at all",))

    for error in (Uncopyable(1, 2), Changeling()):
        owner = an_owner()
        owner.set_error(error)
        with pytest.raises(type(error)) as caught:
            owner.value()
        assert caught.value is error


def test_a_reader_waits_for_the_value() -> None:
    owner = an_owner()
    values: list[Any] = []
    reader = threading.Thread(target=lambda: values.append(owner.value()))
    reader.start()
    owner.set_value("value")
    reader.join()
    assert values == ["value"]


def test_a_reader_waits_no_longer_than_it_says() -> None:
    text = (
        r"OwnerRRef\(rref_id=.*\) got no value: RPC ran for more than set timeout \(10 ms\) and will now be marked with an error"
    )
    with pytest.raises(RpcTimeoutError, match=text):
        an_owner().value(timeout=0.01)


def test_callbacks_run_once_each_even_if_one_of_them_fails(caplog: pytest.LogCaptureFixture) -> None:
    owner = an_owner()
    seen: list[Any] = []

    def broken(_: OwnerRRef) -> None:
        raise ValueError("a broken callback")

    owner.add_callback(broken)
    owner.add_callback(lambda rref: seen.append(("early", rref.value())))
    owner.set_value(1)
    owner.add_callback(lambda rref: seen.append(("late", rref.value())))
    assert seen == [("early", 1), ("late", 1)]
    assert "a broken callback" in caplog.text


# ------------------------------------------------------------------------------------------------------------ identity


def test_both_kinds_pass_for_torchs_rref(owned: RRef, used: RRef) -> None:
    for rref in (owned, used):
        assert isinstance(rref, torch_rpc.RRef)
        assert isinstance(rref, PyRRef)
        assert type(rref) is RRef


def test_their_text_is_torchs(owned: RRef, used: RRef) -> None:
    assert str(owned) == repr(owned) == "OwnerRRef(GloballyUniqueId(created_on=0, local_id=0))"
    user = "UserRRef(RRefId = GloballyUniqueId(created_on=0, local_id=1), ForkId = GloballyUniqueId(created_on=0, local_id=2))"
    assert str(used) == repr(used) == user


def test_they_know_their_owner(owned: RRef, used: RRef) -> None:
    assert owned.is_owner()
    assert not used.is_owner()
    assert owned.owner() == WorkerInfo("worker0", 0)
    assert used.owner() == WorkerInfo("worker1", 1)
    assert (owned.owner_name(), used.owner_name()) == ("worker0", "worker1")


def test_owners_are_confirmed_and_users_become_so(group: Group, owned: RRef) -> None:
    assert owned.confirmed_by_owner()
    new = group[0].context.new_remote(WorkerId(1))
    assert not new.rref.confirmed_by_owner()
    group[0].context.confirm_remote(new.rref_id, new.fork_id)
    assert new.rref.confirmed_by_owner()


# --------------------------------------------------------------------------------------------------------------- values


def test_the_owner_has_the_value_itself(owned: RRef) -> None:
    assert owned.to_here() is owned.local_value()


def test_an_owner_waits_no_longer_than_it_says(group: Group) -> None:
    new = group[0].context.new_remote(WorkerId(0))
    with pytest.raises(RpcTimeoutError):
        new.rref.to_here(timeout=0.01)


def test_a_user_fetches_the_value_with_its_timeout(group: Group, used: RRef) -> None:
    assert torch.equal(used.to_here(), torch.ones(2))
    assert torch.equal(used.to_here(timeout=2.5), torch.ones(2))
    assert group[0].calls.timeouts == [-1.0, 2.5]


def test_a_fetch_is_profiled_under_torchs_name(used: RRef) -> None:
    with torch.autograd.profiler.profile() as profile:
        used.to_here()
    assert "to_here#(worker0)->(worker1)" in [event.name for event in profile.function_events]


def test_a_user_has_no_local_value(used: RRef) -> None:
    text = (
        r"For UserRRef\(rref_id=GloballyUniqueId\(created_on=0, local_id=0\), fork_id=GloballyUniqueId\(created_on=0, "
        r"local_id=1\)\), can't call localValue\(\) on user WorkerInfo\(id=0, name=worker0\). "
        r"Call it on owner WorkerInfo\(id=1, name=worker1\)."
    )
    with pytest.raises(RRefUsageError, match=text):
        used.local_value()


@pytest.mark.parametrize("api", ["rpc_sync", "rpc_async", "remote"])
def test_proxies_are_torchs_own(owned: RRef, api: str) -> None:
    proxy = getattr(owned, api)(timeout=3.0)
    assert type(proxy) is RRefProxy
    assert (proxy.rref, proxy.rpc_api, proxy.rpc_timeout) == (owned, getattr(torch_rpc, api), 3.0)


# ------------------------------------------------------------------------------------------------------------- pickling


def test_only_the_rpc_pickler_pickles_rrefs(group: Group, owned: RRef, used: RRef) -> None:
    for rref in (owned, used):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy, lambda rref: torch.save(rref, io.BytesIO())):
            with pytest.raises(
                RRefUsageError, match="Can not pickle rref in python pickler, rref can only be pickled when using"
            ):
                attempt(rref)
    assert group[0].context.debug_info()["num_forks"] == "0"


def test_the_pickled_form_is_torchs(group: Group, owned: RRef, used: RRef) -> None:
    assert owned._serialize() == (0, 0, 0, 0, 3, 0, "PyObject")
    assert used._serialize() == (1, 0, 1, 0, 4, 0, "PyObject")
    assert group[0].context.unpickle(group[0].context.local(5)._serialize()).local_value() == 5


# ---------------------------------------------------------------------------------------------------------------- types


def test_the_type_on_the_owner_needs_no_call(owned: RRef) -> None:
    assert owned._get_type() is torch.Tensor
    future = owned._get_type(blocking=False)
    assert future.wait() is torch.Tensor
    assert owned._get_type(blocking=False) is future


def test_a_user_asks_for_the_type_once(used: RRef, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def typeof(rref: RRef, timeout: float, blocking: bool) -> Future[type]:
        assert rref is used
        assert not blocking
        asked.append(timeout)
        future: Future[type] = Future()
        futures.append(future)
        return future

    futures: list[Future[type]] = []
    monkeypatch.setattr(rref_module, "_rref_typeof_on_user", typeof)
    first = used._get_type(timeout=1.0, blocking=False)
    assert used._get_type(timeout=2.0, blocking=False) is first
    futures[0].set_exception(RuntimeError("lost"))
    with pytest.raises(RuntimeError, match="lost"):
        first.wait()
    second = used._get_type(timeout=3.0, blocking=False)
    assert second is not first
    futures[1].set_result(torch.Tensor)
    assert used._get_type() is torch.Tensor
    assert asked == [1.0, 3.0]


# -------------------------------------------------------------------------------------------------------------- futures


def test_the_future_of_the_creation_is_kept(used: RRef) -> None:
    with pytest.raises(RRefUsageError, match=r"was not created by rpc\.remote"):
        used._get_future()
    future: Future[Any] = Future()
    used._set_future(future)
    assert used._get_future() is future


def test_the_profiling_future_is_kept(used: RRef) -> None:
    with pytest.raises(RRefUsageError, match="Profiling future has not been set!"):
        used._get_profiling_future()
    future: Future[Any] = Future()
    used._set_profiling_future(future)
    assert used._get_profiling_future() is future


# ------------------------------------------------------------------------------------------------------------- backward


def test_backward_without_a_context_is_torchs_own(group: Group) -> None:
    t = torch.ones(2, requires_grad=True)
    rref = group[0].context.local(t.sum())
    rref.backward(retain_graph=True)
    rref.backward()
    assert t.grad is not None
    assert torch.equal(t.grad, torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
        group[0].context.local(torch.rand(1)).backward()


def test_backward_in_a_context_runs_where_the_value_is(group: Group, used: RRef) -> None:
    root = torch.ones(1, requires_grad=True)
    group[0].context.local(root).backward(7, retain_graph=True)
    used.backward(8)
    assert group[0].calls.passes == [("here", root, 7, True), ("owner", 1, RRefId(0, 0), 8, False)]


def test_backward_needs_a_tensor_and_on_users_a_context(group: Group, used: RRef) -> None:
    with pytest.raises(BackwardError, match=r"RRef should contain a tensor for .backward\(\)"):
        group[0].context.local("foo").backward()
    with pytest.raises(BackwardError, match="User RRefs require 'dist_autograd_ctx_id' to be specified"):
        used.backward()
    assert backward_root(torch.ones(1)).item() == 1
