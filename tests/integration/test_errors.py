"""Bad input between real processes: one clear error of the right class each, and every worker serves on afterwards."""

from __future__ import annotations

import gc
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgpack
import pytest
import torch
import torch.distributed.rpc as rpc
import zmq

import zmqagent
from tests.integration.harness import on_group, run_ranks, worker
from zmqagent.exceptions import (
    AlreadyInitializedError,
    CalleeError,
    InvalidOptionError,
    InvalidTypeError,
    NotPicklableError,
    RemoteUserError,
    RendezvousError,
    RpcError,
    RRefUsageError,
    ScriptError,
    UnknownWorkerError,
)
from zmqagent.transport.stream import prefix

Outcome = tuple[type[BaseException], str]


def outcome_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """The class and the text of what ``function`` raises."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the class is what is asked for
        function(*args, **kwargs)
    return type(caught.value), str(caught.value)


def is_served(to: str = "worker1") -> bool:
    return rpc.rpc_sync(to, str.upper, args=("serving",)) == "SERVING"


# A group that cannot come together.


def _init(
    rank: int, meeting_point: str, name: str, its_rank: int, world_size: int, timeout: float, leave: bool
) -> Outcome | None:
    def init() -> None:
        rpc.init_rpc(
            name,
            backend=rpc.BackendType.ZMQ,
            rank=its_rank,
            world_size=world_size,
            rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, rpc_timeout=timeout),
        )

    if leave:
        return None
    outcome = outcome_of(init)
    assert not rpc.api._is_current_rpc_agent_set()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("zmqagent")] == []
    return outcome


def _names(rank: int, meeting_point: str, names: list[Any]) -> Outcome | None:
    return _init(rank, meeting_point, names[rank], rank, len(names), 20.0, False)


def test_two_workers_of_one_name_are_both_told() -> None:
    for kind, text in run_ranks(_names, 2, ["twin", "twin"]):
        assert issubclass(kind, InvalidOptionError)
        assert issubclass(kind, ValueError)
        assert "RPC worker name twin is not unique. Workers 0 and 1 share the same name." in text


@pytest.mark.parametrize("name", ["has space", "a/b", "ü", "", "x" * 128])
def test_an_illegal_name_is_refused_and_the_other_worker_is_told_why(name: str) -> None:
    (kind, text), (others_kind, others_text) = run_ranks(_names, 2, [name, "worker1"])
    assert issubclass(kind, InvalidOptionError)
    assert repr(name)[:50] in text or name in text
    assert issubclass(others_kind, RendezvousError)
    assert "(rank 0) could not join the group" in others_text
    assert text[:50] in others_text


def _fail_after_hosts_are_known(rank: int, meeting_point: str) -> Outcome | None:
    if rank == 0:

        def fail(*_: Any) -> Any:
            raise OSError("no descriptor is left")

        zmqagent.worker.describe_self = fail
    return _init(rank, meeting_point, f"worker{rank}", rank, 2, 20.0, False)


def test_whatever_fails_while_one_worker_joins_the_others_are_told() -> None:
    (kind, text), (others_kind, others_text) = run_ranks(_fail_after_hosts_are_known, 2)
    assert (kind, text) == (OSError, "no descriptor is left")
    assert issubclass(others_kind, RendezvousError)
    assert "'worker0' (rank 0) could not join the group: OSError: no descriptor is left" in others_text


def _rank_out_of_range(rank: int, meeting_point: str) -> list[Outcome]:
    return [outcome_of(_init_once, meeting_point, "w", its_rank) for its_rank in (2, -1)]


def _init_once(meeting_point: str, name: Any, rank: Any, **options: Any) -> None:
    rpc.init_rpc(
        name,
        backend=rpc.BackendType.ZMQ,
        rank=rank,
        world_size=2,
        rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, rpc_timeout=0.3, **options),
    )


def test_a_rank_out_of_range_is_refused() -> None:
    ((above, below),) = run_ranks(_rank_out_of_range, 1)
    assert issubclass(above[0], ValueError)
    assert "rank 2" in above[1]
    assert issubclass(below[0], (ValueError, RuntimeError))


def _wait_in_vain(rank: int, meeting_point: str) -> list[Any]:
    first = outcome_of(_init_once, meeting_point, "early", 0)
    # Nothing is left that would be in the way of another try.
    with worker(0, 1, meeting_point + "2"):
        return [first, is_served("worker0")]


def test_a_worker_that_never_comes_is_named_after_the_timeout_and_init_works_again() -> None:
    ((((kind, text), served)),) = run_ranks(_wait_in_vain, 1)
    assert issubclass(kind, RendezvousError)
    assert "'early' (rank 0) waited 0.3 s" in text
    assert "rank 1 did not come" in text
    assert served


def _wrong_types(rank: int, meeting_point: str) -> dict[str, Outcome]:
    return {
        "backend": outcome_of(rpc.init_rpc, "w", backend="ZMQ", rank=0, world_size=1),
        "options": outcome_of(
            rpc.init_rpc, "w", backend=rpc.BackendType.ZMQ, rank=0, world_size=1, rpc_backend_options={"rpc_timeout": 1}
        ),
        "plain options": outcome_of(
            rpc.init_rpc,
            "w",
            backend=rpc.BackendType.ZMQ,
            rank=0,
            world_size=1,
            rpc_backend_options=rpc.RpcBackendOptions(init_method=meeting_point),
        ),
    }


def test_a_wrong_type_is_a_type_error() -> None:
    (outcomes,) = run_ranks(_wrong_types, 1)
    for name, (kind, text) in outcomes.items():
        assert issubclass(kind, TypeError), (name, kind, text)


# Before, after, and twice.


def _outside() -> dict[str, Outcome]:
    return {
        "rpc_sync": outcome_of(rpc.rpc_sync, "worker0", is_served),
        "rpc_async": outcome_of(rpc.rpc_async, "worker0", is_served),
        "remote": outcome_of(rpc.remote, "worker0", is_served),
        "get_worker_info": outcome_of(rpc.get_worker_info),
        "agent": outcome_of(rpc.api._get_current_rpc_agent),
        "RRef": outcome_of(rpc.RRef, 1),
    }


def _before_and_after(rank: int, meeting_point: str) -> list[Any]:
    before = _outside()
    with worker(rank, 1, meeting_point):
        twice = outcome_of(_init_once, meeting_point, "again", 0)
        kept = rpc.remote("worker0", str, args=("kept",))
        served = is_served("worker0")
        kept.to_here()
        agent = rpc.api._get_current_rpc_agent()
        del kept
    return [before, twice, served, _outside(), outcome_of(agent.request, 0, None, None)]


def test_calls_before_init_and_after_shutdown_say_so() -> None:
    ((before, twice, served, after, by_agent),) = run_ranks(_before_and_after, 1)
    for outcomes in (before, after):
        for name, (kind, text) in outcomes.items():
            assert issubclass(kind, RuntimeError), name
            assert "has not been initialized" in text or "Current RPC agent is not set" in text, (name, text)
    assert issubclass(twice[0], RuntimeError)
    assert "is already initialized" in twice[1]
    assert served
    assert "has shut down" in by_agent[1]


# Calls that cannot be made.


def _call_strangers() -> dict[str, Outcome]:
    return {
        "name": outcome_of(rpc.rpc_sync, "nobody", is_served),
        "id": outcome_of(rpc.rpc_sync, 7, is_served),
        "remote": outcome_of(rpc.remote, "nobody", is_served),
        "served": (RuntimeError, str(is_served())),
    }


def test_an_unknown_destination_is_named() -> None:
    outcomes = on_group(_call_strangers)
    assert outcomes.pop("served")[1] == "True"
    for name, (kind, text) in outcomes.items():
        assert issubclass(kind, UnknownWorkerError), name
        assert "nobody" in text or "7" in text, text


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("not this one")


class FailsToUnpickle:
    def __reduce__(self) -> Any:
        return explode, ("while unpickling",)


def explode(text: str) -> None:
    raise ValueError(text)


def make(kind: type) -> Any:
    return kind()


def make_lambda() -> Any:
    return lambda: None


def _send_the_unpicklable() -> dict[str, Any]:
    metrics = rpc.api._get_current_rpc_agent().get_metrics
    outcomes: dict[str, Any] = {
        "lambda": outcome_of(rpc.rpc_sync, "worker1", lambda: None),
        "argument": outcome_of(rpc.rpc_sync, "worker1", make, args=(Unpicklable(),)),
        "lock": outcome_of(rpc.rpc_async, "worker1", make, args=(threading.Lock(),)),
        "remote": outcome_of(rpc.remote, "worker1", make, args=(threading.Lock(),)),
        "to oneself": outcome_of(rpc.rpc_sync, "worker0", make, args=(Unpicklable(),)),
        "result": outcome_of(rpc.rpc_sync, "worker1", make, args=(Unpicklable,)),
        "lambda result": outcome_of(rpc.rpc_sync, "worker1", make_lambda),
        "fetched": outcome_of(rpc.remote("worker1", make, args=(Unpicklable,)).to_here),
    }
    served = is_served()
    # A call counts until its callbacks have returned, a moment after its value is there. A leak ends by the test's deadline.
    while metrics()["agent.client_active_calls"] != "0":
        time.sleep(0.01)
    return {"outcomes": outcomes, "served": served}


def test_what_cannot_be_pickled_is_refused_on_the_side_that_has_it() -> None:
    found = on_group(_send_the_unpicklable)
    assert found["served"]
    for name, (kind, text) in found["outcomes"].items():
        assert issubclass(kind, NotPicklableError), (name, kind)
        assert issubclass(kind, pickle.PicklingError)
        assert "cannot pickle" in text
    assert "not this one" in found["outcomes"]["argument"][1]
    assert "On WorkerInfo(id=1, name=worker1)" in found["outcomes"]["result"][1]


def only_here() -> None:
    """Exists on the caller alone: see `_forget_functions`."""


def _forget_functions() -> None:
    del sys.modules[__name__].__dict__["only_here"]


def _call_what_is_missing() -> dict[str, Outcome]:
    function = only_here
    rpc.rpc_sync("worker1", _forget_functions)
    agent = rpc.api._get_current_rpc_agent()
    assert agent is not None
    outcomes = {
        "sync": outcome_of(rpc.rpc_sync, "worker1", function),
        "async": outcome_of(rpc.rpc_async("worker1", function).wait),
        "remote": outcome_of(rpc.remote("worker1", function).to_here),
        "unpickling": outcome_of(rpc.rpc_sync, "worker1", str, args=(FailsToUnpickle(),)),
        "script": outcome_of(rpc.api._invoke_rpc_torchscript("worker1", "__torch__.no.such", (), {}, 5.0, False).wait),
    }
    assert is_served()
    return outcomes


def test_a_function_that_the_callee_lacks_is_named() -> None:
    outcomes = on_group(_call_what_is_missing)
    for name, (kind, text) in outcomes.items():
        assert issubclass(kind, CalleeError), (name, kind, text)
        assert issubclass(kind, AttributeError)
    for name in ("sync", "async", "remote"):
        assert "only_here" in outcomes[name][1]
        assert "RPC pickler does not serialize" in outcomes[name][1]
    assert "while unpickling" in outcomes["unpickling"][1]
    assert "__torch__.no.such" in outcomes["script"][1]


# Exceptions of user functions.


class WantsTwo(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first, second)


class Unknown(Exception):
    """Forgotten on the caller."""


def local_class() -> None:
    class Local(Exception):
        pass

    raise Local("of a local class")


def raise_unknown() -> None:
    raise Unknown("known there only")


def raise_two() -> None:
    raise WantsTwo("one", "two")


def raise_kind(kind: type[BaseException], *args: Any) -> None:
    raise kind(*args)


def _raise_everything() -> dict[str, Outcome]:
    del sys.modules[__name__].__dict__["Unknown"]
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "ValueError": (raise_kind, (ValueError, "grüße, 世界 \U0001f600")),
        "KeyError": (raise_kind, (KeyError, "key")),
        "AssertionError": (raise_kind, (AssertionError,)),
        "SystemExit": (raise_kind, (SystemExit, 3)),
        "KeyboardInterrupt": (raise_kind, (KeyboardInterrupt,)),
        "UnicodeDecodeError": (bytes.decode, (b"\xff",)),
        "unknown": (raise_unknown, ()),
        "local": (local_class, ()),
        "two": (raise_two, ()),
    }
    found = {}
    for name, (function, args) in cases.items():
        found[name] = outcome_of(rpc.rpc_sync, "worker1", function, args=args)
        assert outcome_of(rpc.rpc_async("worker1", function, args=args).wait)[0] is found[name][0], name
        assert outcome_of(rpc.remote("worker1", function, args=args).to_here)[0] is found[name][0], name
        assert is_served()
    return found


def test_the_exception_of_a_function_arrives_with_its_type_and_whole_text() -> None:
    found = on_group(_raise_everything)
    assert found["ValueError"][0] is ValueError
    assert found["ValueError"][1].startswith("On WorkerInfo(id=1, name=worker1):\nValueError(")
    assert "grüße, 世界 \U0001f600" in found["ValueError"][1].split("\n")[1]
    assert "in raise_kind" in found["ValueError"][1]
    assert found["KeyError"][0] is KeyError
    assert found["AssertionError"][0] is AssertionError
    for name, text in {
        "SystemExit": "SystemExit: 3",
        "KeyboardInterrupt": "KeyboardInterrupt",
        "UnicodeDecodeError": "can't decode byte 0xff",
        "unknown": "known there only",
        "local": "of a local class",
        "two": "('one', 'two')",
    }.items():
        assert issubclass(found[name][0], RemoteUserError), name
        assert text in found[name][1], name
    assert "Failed to create original exception type" in found["two"][1]


# RRefs against their rules.


def _misuse_rrefs() -> dict[str, Outcome]:
    mine, theirs = rpc.RRef(torch.ones(1)), rpc.remote("worker1", torch.ones, args=([1],))
    theirs.to_here()
    outcomes = {
        "pickled outside": outcome_of(pickle.dumps, mine),
        "user's pickled outside": outcome_of(pickle.dumps, theirs),
        "local_value": outcome_of(theirs.local_value),
        "script": outcome_of(rpc.rpc_sync, "worker1", script_identity, args=(mine,)),
        "backward": outcome_of(rpc.remote("worker1", str).backward, 1),
    }
    assert is_served()
    return outcomes


@torch.jit.script
def script_identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_rrefs_used_against_their_rules_say_so() -> None:
    found = on_group(_misuse_rrefs)
    for name in ("pickled outside", "user's pickled outside"):
        assert issubclass(found[name][0], RRefUsageError)
        assert "Can not pickle rref in python pickler, rref can only be pickled when using RPC" in found[name][1]
    assert issubclass(found["local_value"][0], RRefUsageError)
    assert "can't call localValue() on user WorkerInfo(id=0, name=worker0)" in found["local_value"][1]
    assert issubclass(found["script"][0], ScriptError)
    assert issubclass(found["backward"][0], RpcError)


def _use_deleted_rref() -> dict[str, Outcome]:
    rref = rpc.remote("worker1", torch.ones, args=([1],))
    rref.to_here()
    rpc.api._delete_all_user_and_unforked_owner_rrefs(timedelta(seconds=5))
    outcomes = {
        "to_here": outcome_of(rref.to_here),
        "sent": outcome_of(rpc.rpc_sync, "worker1", str, args=(rref,)),
        "proxy": outcome_of(rref.rpc_sync().sum),
    }
    assert is_served()
    del rref
    gc.collect()
    return outcomes


def test_an_rref_is_of_no_use_after_its_deletion() -> None:
    for name, (kind, text) in on_group(_use_deleted_rref).items():
        assert issubclass(kind, RRefUsageError), (name, kind, text)
        assert "has been deleted" in text


# Bytes that are no messages.


def _addresses() -> list[str]:
    return list(rpc.api._get_current_rpc_agent()._me.addresses)


def _send_by_zmq(address: str, messages: list[list[bytes]]) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as pushing:
        pushing.linger = 5000
        pushing.connect(address)
        for message in messages:
            pushing.send_multipart(message)


def _send_by_stream(address: str, messages: list[list[bytes]]) -> None:
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(address.removeprefix("unix://"))
        for message in messages:
            stream.sendall(prefix([len(frame) for frame in message]) + b"".join(message))
        stream.sendall(b"\xff" * 100)


def _send_garbage() -> list[Any]:
    (address, *_) = rpc.rpc_sync("worker1", _addresses)
    future = rpc.rpc_async("worker1", str.upper, args=("already accepted",))
    future_version = msgpack.packb(["zmq", 99, 0, 1, 0, 5, 0, [], 0, [], []])
    unknown_type = msgpack.packb(["zmq", 1, 0, 1, 0, 5, 0x3FF, [], 0, [0], []])
    wrong_fields = msgpack.packb(["zmq", 1, 0, 1, 0, 5, 0x102, [1, 2, 3, 4, 5], 0, [0], []])
    messages = [
        [b""],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\xff" * 100_000],
        [b"\x9b"] * 1000,
        [future_version],
        [unknown_type, b""],
        [wrong_fields, b""],
        [msgpack.packb({"a": 1})],
    ]
    send = _send_by_stream if address.startswith("unix") else _send_by_zmq
    send(address, messages)
    return [future.wait(), is_served(), [info.name for info in rpc.api._get_current_rpc_agent().get_worker_infos()]]


@pytest.mark.parametrize("transport", ["local", "ipc"])
def test_garbage_at_a_workers_socket_changes_nothing(transport: str) -> None:
    assert on_group(_send_garbage, transport=transport) == ["ALREADY ACCEPTED", True, ["worker0", "worker1"]]


def test_the_classes_are_what_torch_raises_there() -> None:
    assert issubclass(InvalidTypeError, TypeError)
    assert issubclass(InvalidOptionError, ValueError)
    assert issubclass(AlreadyInitializedError, RuntimeError)
