"""Shares in RRefs that nobody will ever use come back to the owner: after each of these, it has let its RRef go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch.distributed.rpc.internal import _InternalRPCPickler

from tests.integration.harness import on_group
from zmqagent.exceptions import CalleeError, NotPicklableError, RpcTimeoutError, UnreadableCallError

GONE = {"num_forks": "0", "num_owner_rrefs": "0"}


class Unreadable:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def first(value: Any, *others: Any) -> Any:
    return value


def _forks() -> dict[str, str]:
    info = dict(rpc._rref_context_get_debug_info())
    return {name: info[name] for name in GONE}


def _until_gone(forks: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Waits until there are no forks; a leak ends by the test's deadline."""
    while (found := forks()) != GONE:
        time.sleep(0.01)
    return found


def _forks_at(worker: str) -> dict[str, str]:
    return rpc.rpc_sync(worker, _forks)


def _remote_what_cannot_be_read() -> dict[str, str]:
    mine = rpc.RRef(torch.ones(1))
    for to in ("worker1", "worker0"):
        made = rpc.remote(to, first, args=(Unreadable(), mine))
        made._get_future().wait()
        with pytest.raises(CalleeError, match="no number"):
            made.to_here()
        assert rpc.rpc_sync("worker1", torch.add, args=(1, 1)) == 2
        del made
    return _until_gone(_forks)


def test_shares_in_a_remote_call_that_nobody_could_read_are_taken_back() -> None:
    assert on_group(_remote_what_cannot_be_read) == GONE


class _Users:
    """A pickler of the user's, which knows of no scopes."""

    def __init__(self) -> None:
        self._pickler = _InternalRPCPickler()

    def serialize(self, obj: Any) -> Any:
        return self._pickler.serialize(obj)

    def deserialize(self, data: Any, tensors: Any) -> Any:
        return self._pickler.deserialize(data, tensors)


def _send_what_cannot_be_read_by_a_pickler_of_the_users() -> dict[str, str]:
    mine = rpc.RRef(torch.ones(1))
    with rpc.api._use_rpc_pickler(_Users()):
        with pytest.raises(UnreadableCallError, match="no number"):
            rpc.rpc_sync("worker1", first, args=(Unreadable(), mine))
        assert rpc.rpc_sync("worker1", first, args=(1, mine)) == 1
    return _until_gone(_forks)


def test_shares_pickled_by_a_pickler_of_the_users_are_taken_back_too() -> None:
    assert on_group(_send_what_cannot_be_read_by_a_pickler_of_the_users) == GONE


def _wrapped_unreadable(value: torch.Tensor) -> Any:
    return Unreadable(), rpc.RRef(value), value


def _get_what_cannot_be_read() -> dict[str, str]:
    with pytest.raises(CalleeError, match="no number"):
        rpc.rpc_sync("worker1", _wrapped_unreadable, args=(torch.ones(1),))
    with dist_autograd.context(), pytest.raises(CalleeError, match="no number"):
        rpc.rpc_sync("worker1", _wrapped_unreadable, args=(torch.ones(1, requires_grad=True),))
    return _until_gone(partial(_forks_at, "worker1"))


def test_shares_in_an_answer_that_the_caller_cannot_read_are_given_back() -> None:
    assert on_group(_get_what_cannot_be_read) == GONE


def _wrapped_unsendable() -> Any:
    return rpc.RRef(torch.ones(1)), torch.ones(2).to_mkldnn()


def _get_what_cannot_be_sent() -> dict[str, str]:
    with pytest.raises(NotPicklableError, match="_mkldnn"):
        rpc.rpc_sync("worker1", _wrapped_unsendable)
    return _until_gone(partial(_forks_at, "worker1"))


def test_shares_in_a_result_that_cannot_travel_are_taken_back() -> None:
    assert on_group(_get_what_cannot_be_sent) == GONE


_permits = threading.Semaphore(0)


def _permit() -> None:
    _permits.release()


def _wrapped_late(theirs: Any, value: torch.Tensor) -> Any:
    _permits.acquire()
    return rpc.RRef(value), theirs, value


def _late_answers() -> int:
    return int(rpc.api._get_current_rpc_agent().get_metrics()["agent.late_replies"])


def _get_it_late(value: torch.Tensor) -> None:
    before = _late_answers()
    theirs = rpc.remote("worker2", torch.ones, args=([1],))
    with pytest.raises(RpcTimeoutError):
        rpc.rpc_sync("worker1", _wrapped_late, args=(theirs, value), timeout=0.05)
    rpc.rpc_sync("worker1", _permit)
    while _late_answers() == before:
        time.sleep(0.01)


def _get_it_late_with_and_without_autograd() -> list[dict[str, str]]:
    _get_it_late(torch.ones(1))
    with dist_autograd.context():
        _get_it_late(torch.ones(1, requires_grad=True))
    return [_until_gone(partial(_forks_at, to)) for to in ("worker1", "worker2")]


def test_shares_in_an_answer_that_came_too_late_are_given_back() -> None:
    assert on_group(_get_it_late_with_and_without_autograd, world_size=3) == [GONE, GONE]
