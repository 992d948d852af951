"""`FaultyZmqRpcBackendOptions` and the backend FAULTY_ZMQ: torch's options under the same names, checked where they are set."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import rpc
from torch.distributed.rpc import backend_registry

import zmqagent.testing
from zmqagent import backend
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.testing import FaultyZmqRpcBackendOptions
from zmqagent.testing.injector import FaultInjector

FAULTS = {
    "num_fail_sends": 3,
    "messages_to_fail": ["RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT", "RREF_USER_DELETE", "CLEANUP_AUTOGRAD_CONTEXT_REQ"],
    "messages_to_delay": {"PYTHON_CALL": 1.5, "SCRIPT_CALL": 1.5},
}


def test_by_default_nothing_fails() -> None:
    options = FaultyZmqRpcBackendOptions()
    assert (options.num_fail_sends, options.messages_to_fail, options.messages_to_delay) == (0, [], {})
    assert options.rpc_timeout == ZmqRpcBackendOptions().rpc_timeout


def test_what_is_given_is_what_is_read() -> None:
    options = FaultyZmqRpcBackendOptions(num_worker_threads=8, **FAULTS)
    assert {name: getattr(options, name) for name in FAULTS} == FAULTS
    assert options.num_worker_threads == 8
    assert repr(options) == (
        "FaultyZmqRpcBackendOptions(num_worker_threads=8, rpc_timeout=60.0, init_method='env://', device_maps={}, devices=[], "
        "transport='auto', bind_address=None, shared_memory=None, draw_rank=False, num_fail_sends=3, "
        f"messages_to_fail={FAULTS['messages_to_fail']}, messages_to_delay={FAULTS['messages_to_delay']})"
    )


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("num_fail_sends", -1, InvalidOptionError, "numFailSends should be non-negative"),
        ("num_fail_sends", True, InvalidTypeError, "num_fail_sends must be an int, but got True (bool)"),
        ("num_fail_sends", "3", InvalidTypeError, "num_fail_sends must be an int, but got '3' (str)"),
        ("messages_to_fail", "PYTHON_CALL", InvalidTypeError, "must be a list of names, but got 'PYTHON_CALL' (str)"),
        ("messages_to_fail", 7, InvalidTypeError, "must be a list of names, but got 7 (int)"),
        ("messages_to_fail", [7], InvalidTypeError, "goes by its name, a str, but got 7 (int)"),
        ("messages_to_fail", ["CALL"], InvalidOptionError, "No mapping to rpc::MessageType exists for CALL"),
        ("messages_to_delay", ["PYTHON_CALL"], InvalidTypeError, "must map names to seconds"),
        ("messages_to_delay", {"CALL": 1}, InvalidOptionError, "No mapping to rpc::MessageType exists for CALL"),
        (
            "messages_to_delay",
            {"PYTHON_CALL": -1},
            InvalidOptionError,
            "must be non-negative, and finite: that of PYTHON_CALL is -1",
        ),
        ("messages_to_delay", {"PYTHON_CALL": float("nan")}, InvalidOptionError, "must be non-negative"),
        ("messages_to_delay", {"PYTHON_CALL": "1"}, InvalidTypeError, "must be a number of seconds, but got '1' (str)"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_set(name: str, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        FaultyZmqRpcBackendOptions(**{name: value})
    options = FaultyZmqRpcBackendOptions()
    with pytest.raises(error, match=re.escape(text)):
        setattr(options, name, value)


@functools.cache
def torchs_faulty_options() -> Any:
    """The options of FAULTY_TENSORPIPE, without torch's Python module for it, which registers a backend."""
    # A second call in one process aborts it.
    torch._C._faulty_agent_init()
    return torch._C._distributed_rpc_testing.FaultyTensorPipeRpcBackendOptions(
        num_worker_threads=8, rpc_timeout=5.0, init_method="env://", **FAULTS
    )


def test_the_options_of_torchs_faulty_agent_are_taken_over() -> None:
    options = FaultyZmqRpcBackendOptions.from_tensorpipe(torchs_faulty_options())
    assert {name: getattr(options, name) for name in FAULTS} == FAULTS
    assert (options.num_worker_threads, options.rpc_timeout) == (8, 5.0)
    assert FaultyZmqRpcBackendOptions.from_tensorpipe(rpc.TensorPipeRpcBackendOptions()).num_fail_sends == 0


# The backend.


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What workers would have been started with."""
    calls: list[tuple[Any, ...]] = []

    class _Worker:
        agent = None

        @staticmethod
        def start(*args: Any) -> Any:
            calls.append(args)
            return _Worker

    monkeypatch.setattr(backend, "Worker", _Worker)
    return calls


def _init(chosen: Any, tmp_path: Any, options: Any) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    backend_registry.init_backend(chosen, store=store, name="w", rank=0, world_size=1, rpc_backend_options=options)


def test_importing_the_package_registers_the_backend_once() -> None:
    member = rpc.BackendType.FAULTY_ZMQ
    importlib.reload(zmqagent.testing)
    assert rpc.BackendType.FAULTY_ZMQ is member
    assert isinstance(backend_registry.construct_rpc_backend_options(member, num_fail_sends=2), FaultyZmqRpcBackendOptions)


def test_a_worker_of_the_backend_sends_through_an_injector(started: list[tuple[Any, ...]], tmp_path: Any) -> None:
    options = FaultyZmqRpcBackendOptions(**FAULTS)
    _init(rpc.BackendType.FAULTY_ZMQ, tmp_path, options)
    ((*_, given, detour),) = started
    assert given is options
    assert isinstance(detour, FaultInjector)


def test_options_of_another_type_are_refused(started: list[tuple[Any, ...]], tmp_path: Any) -> None:
    with pytest.raises(
        InvalidTypeError, match=r"must be a `FaultyZmqRpcBackendOptions` or a `Tensor.*but got ZmqRpcBackendOptions"
    ):
        _init(rpc.BackendType.FAULTY_ZMQ, tmp_path, ZmqRpcBackendOptions())
    assert started == []


@pytest.mark.parametrize("make_options", [FaultyZmqRpcBackendOptions, torchs_faulty_options])
def test_faults_that_the_chosen_backend_would_not_inject_are_refused(
    make_options: Callable[[], Any], started: list[tuple[Any, ...]], tmp_path: Any
) -> None:
    with pytest.raises(InvalidTypeError, match=r"which is for backend=rpc.BackendType.FAULTY_ZMQ, and the backend is ZMQ"):
        _init(rpc.BackendType.ZMQ, tmp_path, make_options())
    assert started == []


def test_without_the_faulty_backend_torchs_faulty_options_are_refused(
    started: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(backend._variants, "FAULTY_ZMQ")
    with pytest.raises(InvalidTypeError, match=r"must be a `ZmqRpcBackendOptions` .*but got FaultyTensorPipeRpcBackendOptions"):
        _init(rpc.BackendType.ZMQ, tmp_path, torchs_faulty_options())
    assert started == []


def test_torchs_own_autograd_is_left_alone_as_by_zmq(
    started: list[tuple[Any, ...]], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = backend.torch_bindings.original

    def noting_original(key: str) -> Any:
        asked.append(key)
        return original(key)

    monkeypatch.setattr(backend.torch_bindings, "original", noting_original)
    monkeypatch.setattr(backend, "_process", backend._Process(autograd_rank=0, profiler_node=0))
    _init(rpc.BackendType.FAULTY_ZMQ, tmp_path, FaultyZmqRpcBackendOptions())
    assert asked == ["init_backend"]
