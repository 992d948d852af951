"""What ``rpc._get_debug_info`` and its parts count, each while there is something to count and after it has gone."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future

from tests.integration.harness import on_group

_begun = threading.Event()
_released = threading.Event()
_later: Future[int] = Future()


def hold() -> int:
    """Runs until `release`."""
    _begun.set()
    _released.wait()
    return 1


@rpc.functions.async_execution
def hold_as_future() -> Future[int]:
    """Is answered at `release`."""
    _begun.set()
    return _later


def wait_for_holder() -> None:
    _begun.wait()


def release() -> None:
    _released.set()
    _later.set_result(1)


def info() -> dict[str, str]:
    return dict(rpc._get_debug_info())


def counts(*names: str) -> list[int]:
    return [int(info()[name]) for name in names]


def counts_of(worker: str, *names: str) -> list[int]:
    found: list[int] = rpc.rpc_sync(worker, counts, args=names)
    return found


def becomes(expected: list[int], worker: str, *names: str) -> None:
    """Returns once the counts of ``worker`` are ``expected``, else never: a call counts until its thread has let go of it."""
    while (counts(*names) if worker == "worker0" else counts_of(worker, *names)) != expected:
        time.sleep(0.005)


# The agent.

CALLS = ("agent.client_active_calls", "agent.server_active_calls", "agent.server_active_async_calls")


def _count_calls(holder: Any, awaited: int) -> list[int]:
    becomes([0, 0, 0], "worker0", *CALLS)
    held = rpc.rpc_async("worker1", holder)
    rpc.rpc_sync("worker1", wait_for_holder)
    becomes([1, 0, 0], "worker0", *CALLS)
    # The call that asks is itself among those of worker1.
    becomes([0, 2, awaited], "worker1", *CALLS)
    rpc.rpc_sync("worker1", release)
    held.wait()
    becomes([0, 1, 0], "worker1", *CALLS)
    becomes([0, 0, 0], "worker0", *CALLS)
    return [held.wait()]


def test_calls_are_counted_at_both_ends_while_they_run() -> None:
    assert on_group(_count_calls, hold, 0) == [1]


def test_calls_whose_future_is_awaited_are_counted_among_the_asynchronous() -> None:
    assert on_group(_count_calls, hold_as_future, 1) == [1]


def _count_threads() -> list[list[int]]:
    names = ("agent.thread_pool_size", "agent.num_idle_threads")
    held = rpc.rpc_async("worker1", hold)
    rpc.rpc_sync("worker1", wait_for_holder)
    busy = counts_of("worker1", *names)
    rpc.rpc_sync("worker1", release)
    held.wait()
    return [busy, counts_of("worker1", *names)]


def test_the_size_of_the_pool_is_the_one_that_was_set_however_many_are_idle() -> None:
    busy, free = on_group(_count_threads, num_worker_threads=5)
    assert busy[0] == free[0] == 5
    assert all(0 <= idle <= 5 for _, idle in (busy, free))


def test_the_group_is_in_it() -> None:
    found = on_group(info, world_size=3)
    assert {found[f"agent.member.worker{rank}"] for rank in (1, 2)} == {"up"}


# RRefs.

RREFS = ("num_owner_rrefs", "num_forks", "num_pending_users", "num_pending_futures")


def _count_rrefs() -> list[list[int]]:
    found = [counts(*RREFS)]
    held = rpc.remote("worker1", hold)
    rpc.rpc_sync("worker1", wait_for_holder)
    found += [counts(*RREFS), counts_of("worker1", *RREFS)]
    rpc.rpc_sync("worker1", release)
    held.to_here()
    held._get_future().wait()
    becomes([0, 0, 0, 0], "worker0", *RREFS)
    becomes([1, 1, 0, 0], "worker1", *RREFS)
    del held
    becomes([0, 0, 0, 0], "worker1", *RREFS)
    return found


def test_rrefs_are_counted_by_their_owner_and_pending_ones_by_their_creator() -> None:
    at_first, creator, owner = on_group(_count_rrefs)
    assert at_first == [0, 0, 0, 0]
    assert creator[:3] == [0, 0, 1]
    assert owner[:3] == [1, 1, 0]


# Distributed autograd.

AUTOGRAD = ("num_autograd_contexts", "num_current_backward_passes")


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def _count_contexts() -> list[list[int]]:
    found = [counts(*AUTOGRAD)]
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(lambda gradient: found.append(counts(*AUTOGRAD)))
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", plus_one, args=(leaf,)).sum()
        found += [counts(*AUTOGRAD), counts_of("worker1", *AUTOGRAD)]
        dist_autograd.backward(context_id, [loss])
    return [*found, counts(*AUTOGRAD)]


def test_contexts_are_counted_where_they_have_spread_to_and_passes_while_they_run() -> None:
    at_first, opened, spread, in_backward, closed = on_group(_count_contexts)
    assert (at_first, opened, spread, in_backward, closed) == ([0, 0], [1, 0], [1, 0], [1, 1], [0, 0])


# All of it.


def _parts() -> list[list[str]]:
    agent = rpc.api._get_current_rpc_agent()
    parts = [agent.get_debug_info(), rpc._rref_context_get_debug_info(), dist_autograd._get_debug_info(), rpc._get_debug_info()]
    return [sorted(part) for part in parts]


def test_the_whole_is_its_three_parts_which_share_no_name() -> None:
    *parts, whole = on_group(_parts)
    assert sorted(name for part in parts for name in part) == whole
    assert {*CALLS, *RREFS, *AUTOGRAD, "agent.thread_pool_size", "agent.num_idle_threads"} <= set(whole)
    assert "agent.gil_average_wait_time_us" not in whole
