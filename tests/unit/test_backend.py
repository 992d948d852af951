"""`zmqagent.backend`: the registration, in torch's own enum; and the options a worker starts with."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch.distributed.rpc import backend_registry

import zmqagent
from zmqagent import backend
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError

TENSORPIPE = rpc.BackendType.TENSORPIPE


class _Started(Exception):
    """Raised in place of a worker's start."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What workers would have been started with."""
    calls: list[tuple[Any, ...]] = []

    def start(*args: Any) -> Any:
        calls.append(args)
        raise _Started

    monkeypatch.setattr(backend.Worker, "start", start)
    return calls


def _init(chosen: Any, tmp_path: Any, options: Any, **kwargs: Any) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    backend_registry.init_backend(
        chosen,
        store=store,
        name="w",
        rank=kwargs.pop("rank", 0),
        world_size=kwargs.pop("world_size", 1),
        rpc_backend_options=options,
    )


def test_the_member_is_in_torchs_own_enum() -> None:
    member = rpc.BackendType.ZMQ
    assert member is backend_registry.BackendType["ZMQ"]
    assert isinstance(member, backend_registry.BackendType)
    assert member in list(backend_registry.BackendType)
    assert backend_registry.BackendType(member.value) is member
    assert repr(member) == "BackendType.ZMQ"
    assert backend_registry.backend_registered("ZMQ")


def test_members_taken_before_stay_valid() -> None:
    assert TENSORPIPE is rpc.BackendType.TENSORPIPE
    assert isinstance(TENSORPIPE, backend_registry.BackendType)
    assert isinstance(backend_registry.construct_rpc_backend_options(TENSORPIPE), rpc.TensorPipeRpcBackendOptions)


def test_registering_twice_is_harmless() -> None:
    before = rpc.BackendType.ZMQ
    backend.register()
    importlib.reload(zmqagent)
    assert rpc.BackendType.ZMQ is before
    assert [member.name for member in rpc.BackendType].count("ZMQ") == 1


def test_another_backend_can_be_registered_and_the_enum_stays_the_same() -> None:
    enum_before, zmq_before = backend_registry.BackendType, rpc.BackendType.ZMQ
    member = backend_registry.register_backend("OTHER_FOR_A_TEST", lambda **kwargs: kwargs, lambda *args, **kwargs: None)
    assert backend_registry.BackendType is enum_before
    assert rpc.BackendType.ZMQ is zmq_before
    assert rpc.BackendType.OTHER_FOR_A_TEST is member
    with pytest.raises(RuntimeError, match="RPC backend OTHER_FOR_A_TEST: already registered"):
        backend_registry.register_backend("OTHER_FOR_A_TEST", dict, dict)


def test_default_options_are_ours() -> None:
    options = backend_registry.construct_rpc_backend_options(rpc.BackendType.ZMQ, rpc_timeout=7, init_method="file:///x")
    assert isinstance(options, zmqagent.ZmqRpcBackendOptions)
    assert (options.rpc_timeout, options.init_method) == (7.0, "file:///x")


def test_tensorpipes_options_are_accepted(started: list[tuple[Any, ...]], tmp_path: Any) -> None:
    with pytest.raises(_Started):
        _init(rpc.BackendType.ZMQ, tmp_path, rpc.TensorPipeRpcBackendOptions(num_worker_threads=3, rpc_timeout=2))
    ((_, name, rank, world_size, options, detour),) = started
    assert (name, rank, world_size, detour) == ("w", 0, 1, None)
    assert isinstance(options, zmqagent.ZmqRpcBackendOptions)
    assert (options.num_worker_threads, options.rpc_timeout) == (3, 2.0)


@pytest.mark.parametrize("options", [{"rpc_timeout": 1}, rpc.RpcBackendOptions()])
def test_options_of_another_type_are_refused(started: list[tuple[Any, ...]], tmp_path: Any, options: Any) -> None:
    with pytest.raises(InvalidTypeError, match="`rpc_backend_options` must be a `ZmqRpcBackendOptions`"):
        _init(rpc.BackendType.ZMQ, tmp_path, options)
    assert started == []


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (-1, None), (-1, 0), (-2, None), (1 << 15, None)])
def test_a_rank_outside_the_group_is_refused(
    started: list[tuple[Any, ...]], tmp_path: Any, rank: int, world_size: int | None
) -> None:
    with pytest.raises(InvalidOptionError, match=f"rank {rank}|rank parameter missing|but got {rank}"):
        _init(rpc.BackendType.ZMQ, tmp_path, zmqagent.ZmqRpcBackendOptions(), rank=rank, world_size=world_size)
    assert started == []


def test_tensorpipe_can_be_replaced(started: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend._process, "replace_tensorpipe", False)
    backend.replace_tensorpipe()
    with pytest.raises(_Started):
        _init(TENSORPIPE, tmp_path, rpc.TensorPipeRpcBackendOptions(rpc_timeout=5))
    assert started[0][4].rpc_timeout == 5.0


def test_the_store_of_a_worker_that_draws_its_rank_is_made_without_one(tmp_path: Any) -> None:
    options = zmqagent.ZmqRpcBackendOptions(init_method=f"file://{tmp_path}/store")
    with pytest.raises(ValueError, match="rank parameter missing"):
        dist._create_store_from_options(options, -1)
    options.draw_rank = True
    assert isinstance(dist._create_store_from_options(options, -1), dist.FileStore)


@pytest.mark.parametrize("world_size", [None, 0])
def test_without_a_world_size_the_group_is_dynamic(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, world_size: int | None
) -> None:
    calls: list[tuple[Any, ...]] = []

    def join(*args: Any) -> Any:
        calls.append(args)
        raise _Started

    monkeypatch.setattr(backend.DynamicWorker, "join", join)
    with pytest.raises(_Started):
        _init(rpc.BackendType.ZMQ, tmp_path, zmqagent.ZmqRpcBackendOptions(), rank=3, world_size=world_size)
    ((_, name, rank, *_),) = calls
    assert (name, rank) == ("w", 3)
