"""A call that failed keeps nothing of its caller alive, neither here nor in the group."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc

import zmqagent
from tests.integration.harness import on_group, run_ranks
from zmqagent.exceptions import RpcError


class Unreadable:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


class Local:
    """Something that the caller has at hand."""


def _unsendable() -> torch.Tensor:
    return torch.ones(2).to_mkldnn()


def _fail(call: Callable[[], Any], held: list[weakref.ref[Local]]) -> str:
    local = Local()
    held.append(weakref.ref(local))
    with pytest.raises(RpcError) as caught:
        call()
    return caught.typename


_CALLS: dict[str, Callable[[], Any]] = {
    "that cannot be sent": lambda: rpc.rpc_sync("worker1", str, args=(_unsendable(),)),
    "remote that cannot be sent": lambda: rpc.remote("worker1", str, args=(_unsendable(),)),
    "that cannot be read": lambda: rpc.rpc_sync("worker1", str, args=(Unreadable(),)),
    "remote that cannot be read": lambda: rpc.remote("worker1", str, args=(Unreadable(),)).to_here(),
    "whose answer cannot be read": lambda: rpc.rpc_sync("worker1", Unreadable),
    "to oneself that cannot be read": lambda: rpc.rpc_sync("worker0", str, args=(Unreadable(),)),
}
_CALLS_TO_THE_LOST: dict[str, Callable[[], Any]] = {
    "to a lost worker": lambda: rpc.rpc_sync("worker1", str),
    "remote to a lost worker": lambda: rpc.remote("worker1", str).to_here(),
}


def _make_failing_calls() -> dict[str, tuple[str, bool]]:
    return _make_calls(_CALLS)


def _make_calls(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[str, bool]]:
    """What each call raised, and whether its caller's locals are still alive after that."""
    found = {}
    for name, call in calls.items():
        held: list[weakref.ref[Local]] = []
        raised = _fail(call, held)
        gc.collect()
        found[name] = raised, held[0]() is not None
    return found


def test_a_call_that_failed_lets_go_of_its_callers_locals() -> None:
    found = on_group(_make_failing_calls)
    assert found == {name: (raised, False) for name, (raised, _) in found.items()}


def _make_calls_to_a_lost_worker(rank: int, meeting_point: str) -> dict[str, tuple[str, bool]]:
    options = zmqagent.ZmqRpcBackendOptions(init_method=meeting_point)
    rpc.init_rpc(f"worker{rank}", backend=rpc.BackendType.ZMQ, rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        threading.Event().wait()
    with pytest.raises(RpcError):
        rpc.rpc_sync("worker1", os._exit, args=(9,))
    found = _make_calls(_CALLS_TO_THE_LOST)
    rpc.shutdown(graceful=False)
    return found


def test_a_call_to_a_lost_worker_lets_go_of_its_callers_locals() -> None:
    found, _ = run_ranks(_make_calls_to_a_lost_worker, 2, dying=(1,))
    assert found == dict.fromkeys(_CALLS_TO_THE_LOST, ("WorkerLostError", False))
