"""What workers run to show how cost grows: with callers, payload, references, the length of a graph, and calls made.

As in `workloads`: run by the caller, public RPC API only (torch's own debug information apart), the other worker only serves.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor
from torch.distributed import rpc

from zmqagent.cli.bench.statistics import percentile
from zmqagent.cli.bench.workloads import FLOATS_IN_4_KB, MB, PEER, nothing, same, timed, worker

__all__ = ["call_all", "graph", "in_flight", "payload", "references"]

_CREATIONS_AT_ONCE = 500
_CALLS_IN_FLIGHT = 64


def payload(size: int) -> dict[str, float]:
    """The milliseconds that a tensor of ``size`` bytes takes there and back."""
    tensor = torch.ones(size, dtype=torch.uint8)
    count = 100 if size < MB else 10 if size < 64 * MB else 2
    return {"time": percentile(timed(lambda: rpc.rpc_sync(PEER, same, args=(tensor,)), count), 0.5) * 1e3}


def references(count: int) -> dict[str, float]:
    """The microseconds that each of ``count`` references takes: to be made and confirmed by the owner, and to be deleted there.

    All live at the same time.
    """
    before = rpc.rpc_sync(PEER, _objects_owned)
    began = time.perf_counter()
    live: list[rpc.RRef[Any]] = []
    while len(live) < count:
        made = [rpc.remote(PEER, nothing) for _ in range(min(_CREATIONS_AT_ONCE, count - len(live)))]
        torch.futures.wait_all([reference._get_future() for reference in made])
        live += made
    created = time.perf_counter()
    made.clear()
    live.clear()
    while rpc.rpc_sync(PEER, _objects_owned) > before:
        # Asking must not take the time that it is to measure.
        time.sleep((time.perf_counter() - created) / 20)
    return {"create": (created - began) / count * 1e6, "delete": (time.perf_counter() - created) / count * 1e6}


def graph(nodes: int) -> dict[str, float]:
    """The milliseconds of a backward pass over a local graph of ``nodes`` nodes with one remote call at its end.

    Also what the same graph takes without the call and the context, and the ratio of the two.
    """
    leaf = torch.ones(8, requires_grad=True)
    local, distributed = [], []
    for _ in range(5):
        loss = _chain(leaf, nodes).sum()
        local += timed(loss.backward, 1)
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync(PEER, same, args=(_chain(leaf, nodes),)).sum()
            distributed += timed(lambda: dist_autograd.backward(context_id, [loss]), 1)  # noqa: B023
    plain, measured = percentile(local, 0.5) * 1e3, percentile(distributed, 0.5) * 1e3
    return {"time": measured, "plain": plain, "overhead": measured / plain}


def in_flight(calls: int) -> None:
    """Calls that take 4 KB there and back, 64 of them at any time."""
    tensor = torch.ones(FLOATS_IN_4_KB)
    pending: deque[torch.futures.Future[Tensor]] = deque()
    for _ in range(calls):
        if len(pending) == _CALLS_IN_FLIGHT:
            pending.popleft().wait()
        pending.append(rpc.rpc_async(PEER, same, args=(tensor,)))
    torch.futures.wait_all(list(pending))


def call_all(size: int) -> float:
    """The seconds until a call to each of the ``size`` workers of the group, this one included, has been answered."""
    began = time.perf_counter()
    torch.futures.wait_all([rpc.rpc_async(worker(rank), nothing) for rank in range(size)])
    return time.perf_counter() - began


def _chain(leaf: Tensor, nodes: int) -> Tensor:
    grown = leaf
    for _ in range(nodes):
        grown = grown * 1.0001
    return grown


def _objects_owned() -> int:
    return int(rpc._rref_context_get_debug_info()["num_owner_rrefs"])
