"""What users get wrong in calls: torch's own error where it has one, a readable one otherwise, and nothing hangs or stays."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

from tests.integration.harness import DEADLINE_S, on_group, run_ranks, worker
from tests.integration.test_errors import Outcome, _init_once, is_served, outcome_of
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError, UnknownWorkerError

WAYS: dict[str, Callable[..., Any]] = {
    "rpc_sync": rpc.rpc_sync,
    "rpc_async": lambda *args, **kwargs: rpc.rpc_async(*args, **kwargs).wait(),
    "remote": lambda *args, **kwargs: rpc.remote(*args, **kwargs).to_here(),
}
TARGETS: dict[str, Any] = {
    "None": None,
    "float": 1.0,
    "bool": True,
    "list": ["worker1"],
    "tuple": ("worker1",),
    "bytes": b"worker1",
    "object": object(),
    "empty": "",
    "long": "x" * 129,
    "space": "worker 1",
    "unicode": "wörker1",
    "negative": -1,
    "too large": 2,
    "beyond int16": 1 << 15,
    "beyond int64": 1 << 70,
}
NAMES_AND_NUMBERS = ("empty", "long", "space", "unicode", "negative", "too large", "beyond int16", "beyond int64")
TIMEOUTS: dict[str, Any] = {
    "None": None,
    "text": "1",
    "list": [1],
    "negative": -5,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "not a number": math.nan,
    "immense": 10**400,
}


def takes_anything(*args: Any, **kwargs: Any) -> str:
    return "called"


def in_every_way(*args: Any, **kwargs: Any) -> dict[str, Outcome]:
    return {name: outcome_of(way, *args, **kwargs) for name, way in WAYS.items()}


def assert_nothing_is_under_way() -> None:
    """A call counts until its callbacks have returned, which may be after whoever waited for it goes on."""
    agent: Any = rpc.api._get_current_rpc_agent()
    deadline = time.monotonic() + DEADLINE_S
    while agent.get_metrics()["agent.client_active_calls"] != "0":
        assert time.monotonic() < deadline


def _call_nobody() -> dict[str, dict[str, Outcome]]:
    found = {name: in_every_way(to, takes_anything) for name, to in TARGETS.items()}
    assert is_served()
    assert_nothing_is_under_way()
    return found


def test_a_destination_of_a_wrong_type_or_that_does_not_exist_is_named() -> None:
    for target, ways in on_group(_call_nobody).items():
        for way, (kind, text) in ways.items():
            if target in NAMES_AND_NUMBERS:
                assert issubclass(kind, UnknownWorkerError), (target, way, kind)
                assert "could not find destination" in text
                assert "its members are: 'worker0' (0), 'worker1' (1)" in text
            else:
                # torch's Python layer has a word of its own for some of them.
                assert issubclass(kind, (TypeError, ValueError)), (target, way, kind)
                assert "worker" in text.lower(), (target, way, text)


def _time_out_oddly() -> dict[str, dict[str, Outcome]]:
    here, there = rpc.RRef(1), rpc.remote("worker1", takes_anything)
    assert there.to_here() == "called"
    found = {}
    for name, timeout in TIMEOUTS.items():
        found[name] = {
            **in_every_way("worker1", takes_anything, timeout=timeout),
            "builtin": outcome_of(rpc.remote, "worker1", torch.add, args=(torch.ones(1), 1), timeout=timeout),
            "to_here": outcome_of(there.to_here, timeout=timeout),
            "to_here on the owner": outcome_of(here.to_here, timeout=timeout),
            "proxy": outcome_of(lambda timeout=timeout: there.rpc_sync(timeout=timeout).upper()),
            "default": outcome_of(rpc._set_rpc_timeout, timeout),
        }
    assert rpc.rpc_sync("worker1", takes_anything, timeout=-1) == "called"
    assert is_served()
    assert_nothing_is_under_way()
    return found


def test_a_timeout_that_is_none_is_refused_before_anything_is_sent() -> None:
    for timeout, ways in on_group(_time_out_oddly).items():
        for way, (kind, text) in ways.items():
            wanted = InvalidTypeError if timeout in ("None", "text", "list") else InvalidOptionError
            assert issubclass(kind, wanted), (timeout, way, kind, text)
            assert "a timeout is a" in text


def _pass_odd_arguments() -> dict[str, dict[str, Outcome]]:
    found = {
        "args": in_every_way("worker1", takes_anything, args=5),
        "kwargs": in_every_way("worker1", takes_anything, kwargs=[1]),
        "keys": in_every_way("worker1", takes_anything, kwargs={1: 2}),
        "args of an operator": in_every_way("worker1", torch.add, args=5),
        "kwargs of an operator": in_every_way("worker1", torch.add, kwargs=[1]),
        "a tensor as args": in_every_way("worker1", takes_anything, args=torch.ones(2)),
        "wrong types for an operator": in_every_way("worker1", torch.add, args=("a", [1], {})),
        "no arguments for an operator": in_every_way("worker1", torch.add),
    }
    assert rpc.rpc_sync("worker1", takes_anything, args=iter([1])) == "called"
    assert rpc.rpc_sync("worker1", takes_anything, args={"key": 1}) == "called"
    assert is_served()
    assert_nothing_is_under_way()
    return found


def test_arguments_that_a_function_cannot_be_called_with_raise_what_python_or_torch_raises() -> None:
    found = on_group(_pass_odd_arguments)
    for name, text in {
        "args": "must be an iterable, not int",
        "kwargs": "must be a mapping, not list",
        "keys": "keywords must be strings",
        "args of an operator": "must be an iterable, not int",
        "kwargs of an operator": "must be a mapping, not list",
    }.items():
        for way, (kind, message) in found[name].items():
            assert kind is TypeError, (name, way, kind)
            assert text in message, (name, way, message)
    for name in ("a tensor as args", "wrong types for an operator", "no arguments for an operator"):
        for way, (kind, _) in found[name].items():
            assert issubclass(kind, (RuntimeError, TypeError)), (name, way, kind)


def _call_what_cannot_be_called() -> dict[str, dict[str, Outcome]]:
    found = {name: in_every_way("worker1", function) for name, function in {"None": None, "int": 5, "text": "function"}.items()}
    found["lambda"] = in_every_way("worker1", lambda: 1)
    assert is_served()
    assert_nothing_is_under_way()
    return found


def test_what_cannot_be_called_or_pickled_raises_torch_s_error() -> None:
    found = on_group(_call_what_cannot_be_called)
    for name in ("None", "int", "text"):
        assert found[name]["rpc_sync"] == found[name]["rpc_async"] == (TypeError, "function should be callable.")
        kind, text = found[name]["remote"]
        assert kind is TypeError
        assert "object is not callable" in text
    for kind, text in found["lambda"].values():
        assert issubclass(kind, AttributeError)
        assert "Can't pickle local object '_call_what_cannot_be_called.<locals>.<lambda>'" in text


def _name_no_context() -> dict[str, Outcome]:
    root = torch.ones((), requires_grad=True)
    outcomes = {}
    for name, context_id in {"text": "x", "None": None, "float": 1.5, "bool": True}.items():
        outcomes[f"type {name} backward"] = outcome_of(dist_autograd.backward, context_id, [root])
        outcomes[f"type {name} gradients"] = outcome_of(dist_autograd.get_gradients, context_id)
    for name, context_id in {"negative": -1, "unknown": 12345, "huge": 1 << 80}.items():
        outcomes[f"{name} backward"] = outcome_of(dist_autograd.backward, context_id, [root])
        outcomes[f"{name} gradients"] = outcome_of(dist_autograd.get_gradients, context_id)
    assert is_served()
    return outcomes


def test_a_context_that_does_not_exist_is_named_and_one_of_a_wrong_type_a_type_error() -> None:
    for name, (kind, text) in on_group(_name_no_context).items():
        if name.startswith("type "):
            assert issubclass(kind, TypeError), (name, kind)
        else:
            assert issubclass(kind, RuntimeError), (name, kind)
            assert "Could not find autograd context with id: " in text


ODD_NAMES = [None, 5, b"worker0"]
ODD_RANKS = ["0", None, 0.0, [0]]


def _introduce_oneself_oddly(rank: int, meeting_point: str) -> list[tuple[str, Outcome]]:
    found = [(f"name {name!r}", outcome_of(_init_once, meeting_point, name, 0)) for name in ODD_NAMES]
    found += [(f"rank {odd!r}", outcome_of(_init_once, meeting_point, "worker0", odd)) for odd in ODD_RANKS]
    with worker(0, 1, meeting_point + "2"):
        assert is_served("worker0")
    return found


def test_names_that_are_no_text_and_ranks_that_are_no_integers_are_refused() -> None:
    (found,) = run_ranks(_introduce_oneself_oddly, 1)
    for what, (kind, text) in found:
        # torch itself checks most of them, and raises a RuntimeError.
        assert issubclass(kind, RuntimeError), (what, kind, text)
        assert re.search("must be of type|must be an integer", text), (what, text)
