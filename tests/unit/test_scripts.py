from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.futures import Future

from zmqagent.exceptions import InvalidTypeError, ScriptError
from zmqagent.rpc.scripts import check_arguments, check_returns_future


@torch.jit.script
def scaled(x: torch.Tensor, by: int = 2) -> torch.Tensor:
    return x * by


@torch.jit.script
def forked(x: torch.Tensor) -> Future[torch.Tensor]:
    return torch.jit.fork(scaled, x)


SCALED = torch._jit_internal._qualified_name(scaled)
ONES = torch.ones(2)


def test_arguments_that_fit_the_schema_pass() -> None:
    check_arguments(SCALED, (ONES,), {}, hold_rrefs=False)
    check_arguments(SCALED, (ONES, 3), {}, hold_rrefs=False)
    check_arguments(SCALED, (), {"x": ONES, "by": 3}, hold_rrefs=False)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((ONES, 1, 2), {}), ((), {}), ((ONES, "text"), {}), ((ONES,), {"other": 1}), (("text",), {})],
    ids=["too many", "too few", "wrong type", "unknown name", "no tensor"],
)
def test_other_arguments_are_refused_with_the_text_of_a_local_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError) as local:
        scaled(*args, **kwargs)
    with pytest.raises(InvalidTypeError) as refused:
        check_arguments(SCALED, args, kwargs, hold_rrefs=False)
    assert str(refused.value) == str(local.value)


def test_an_rref_among_the_arguments_is_refused_before_anything_else() -> None:
    with pytest.raises(ScriptError, match=r"scaled takes an RRef.*Call a Python function"):
        check_arguments(SCALED, (), {}, hold_rrefs=True)


def test_a_function_that_only_the_callee_has_is_left_to_it() -> None:
    check_arguments("__torch__.no.such", (ONES,), {}, hold_rrefs=False)


def test_only_a_declared_future_can_be_run_asynchronously() -> None:
    check_returns_future(forked)
    with pytest.raises(InvalidTypeError, match="must return an IValue of Future type, but got Tensor from scaled"):
        check_returns_future(scaled)
