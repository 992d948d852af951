"""`zmqagent.torch_bindings`: every name of the table is taken and given back, and torch's own functions answer in between."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

import zmqagent.backend
from zmqagent import torch_bindings
from zmqagent.torch_bindings import FUNCTIONS, HOOKS, METHODS, OPERATORS, SWAPS, Seam

MISSING = object()


def _ids(seams: tuple[Seam, ...]) -> list[str]:
    return [f"{seam.module.rpartition('.')[2]}.{seam.key}" for seam in seams]


def _held(seam: Seam) -> Any:
    """What the name's holder itself has, without what a class inherits."""
    return vars(seam.holder()).get(seam.name, MISSING)


@pytest.fixture
def torchs_own() -> Iterator[None]:
    """The body runs with torch as it was before this package came."""
    torch_bindings.uninstall()
    yield
    torch_bindings.uninstall()
    zmqagent.backend.register()


@pytest.mark.parametrize("seam", [*FUNCTIONS, *METHODS], ids=_ids((*FUNCTIONS, *METHODS)))
def test_a_name_is_taken_and_given_back(torchs_own: None, seam: Seam) -> None:
    before = _held(seam)
    by_lookup = getattr(seam.holder(), seam.name)
    torch_bindings.install({})
    assert _held(seam) is not before
    assert torch_bindings.original(seam.key) == by_lookup
    torch_bindings.uninstall()
    assert _held(seam) is before


@pytest.mark.parametrize("seam", SWAPS, ids=_ids(SWAPS))
def test_an_object_is_swapped_only_while_a_worker_runs(torchs_own: None, seam: Seam) -> None:
    before = _held(seam)
    torch_bindings.install({})
    assert _held(seam) is before
    ours = object()
    torch_bindings.activate({seam.key: ours})
    assert _held(seam) is ours
    torch_bindings.deactivate()
    assert _held(seam) is before


@pytest.mark.parametrize("seam", HOOKS, ids=_ids(HOOKS))
def test_an_added_method_gives_its_object_unless_a_worker_runs_and_goes_again(torchs_own: None, seam: Seam) -> None:
    assert _held(seam) is MISSING
    torch_bindings.install({})
    thing = object.__new__(seam.holder())
    assert getattr(thing, seam.name)() is thing
    torch_bindings.activate({seam.key: lambda owner: ("ours", owner)})
    assert getattr(thing, seam.name)() == ("ours", thing)
    torch_bindings.uninstall()
    assert _held(seam) is MISSING


def test_installing_twice_changes_nothing_more(torchs_own: None) -> None:
    torch_bindings.install({})
    taken = [_held(seam) for seam in (*FUNCTIONS, *METHODS)]
    torch_bindings.install({})
    assert [_held(seam) for seam in (*FUNCTIONS, *METHODS)] == taken


@pytest.mark.parametrize("seam", FUNCTIONS, ids=_ids(FUNCTIONS))
def test_a_name_imported_before_is_served_and_given_back(torchs_own: None, monkeypatch: pytest.MonkeyPatch, seam: Seam) -> None:
    own = getattr(seam.holder(), seam.name)
    script = types.ModuleType("an_early_script")
    script.__dict__["taken_early"] = own
    monkeypatch.setitem(sys.modules, script.__name__, script)
    torch_bindings.install({})
    torch_bindings.activate({seam.key: lambda *args: ("ours", args)})
    assert script.taken_early(1, 2) == ("ours", (1, 2))
    torch_bindings.uninstall()
    assert script.taken_early is own


def test_torchs_function_answers_while_no_worker_of_ours_runs(torchs_own: None) -> None:
    torch_bindings.install({})
    assert not torch_bindings.is_active()
    assert rpc.api._is_current_rpc_agent_set() is False
    torch_bindings.activate({"_is_current_rpc_agent_set": lambda: "ours"})
    assert torch_bindings.is_active()
    assert rpc.api._is_current_rpc_agent_set() == "ours"
    torch_bindings.deactivate()
    assert rpc.api._is_current_rpc_agent_set() is False
    with pytest.raises(RuntimeError, match="Current RPC agent is not set"):
        rpc.api._get_current_rpc_agent()


def test_a_standing_replacement_holds_with_and_without_a_worker(torchs_own: None) -> None:
    torch_bindings.install({"get_rpc_timeout": lambda: "standing"})
    assert rpc.get_rpc_timeout() == "standing"
    torch_bindings.activate({"_is_current_rpc_agent_set": lambda: True})
    assert rpc.get_rpc_timeout() == "standing"
    torch_bindings.activate({"get_rpc_timeout": lambda: "the worker's"})
    assert rpc.get_rpc_timeout() == "the worker's"
    torch_bindings.deactivate()
    assert rpc.get_rpc_timeout() == "standing"


def test_only_rref_itself_is_taken_and_a_users_subclass_keeps_its_type(torchs_own: None) -> None:
    torch_bindings.install({})
    torch_bindings.activate({"RRef.__new__": lambda cls, *args: ("ours", cls, args)})
    assert rpc.RRef(5) == ("ours", rpc.RRef, (5,))


# What scripts are compiled to.


@pytest.mark.parametrize("key", OPERATORS)
def test_the_compiler_takes_our_operator_for_a_function_and_forgets_it_again(torchs_own: None, key: str) -> None:
    own = getattr(dist_autograd, key)
    torchs_operator = torch.jit._builtins._find_builtin(own)
    torch_bindings.install({})
    dispatcher = getattr(dist_autograd, key)
    assert torch.jit._builtins._find_builtin(dispatcher) == OPERATORS[key]
    torch_bindings.uninstall()
    assert torch.jit._builtins._find_builtin(dispatcher) is None
    assert torch.jit._builtins._find_builtin(getattr(dist_autograd, key)) == torchs_operator


def test_a_script_compiled_before_a_worker_runs_calls_the_workers_functions(torchs_own: None) -> None:
    torch_bindings.install({})

    @torch.jit.script
    def gradients(context_id: int) -> dict[torch.Tensor, torch.Tensor]:
        return dist_autograd.get_gradients(context_id)

    @torch.jit.script
    def backward(context_id: int, root: torch.Tensor) -> None:
        dist_autograd.backward(context_id, [root], retain_graph=True)

    leaf = torch.ones(1, requires_grad=True)
    calls: list[Any] = []
    torch_bindings.activate(
        {
            "get_gradients": lambda context_id: {leaf: torch.full((1,), float(context_id))},
            "backward": lambda *args, **kwargs: calls.append((args, kwargs)),
        }
    )
    assert gradients(7)[leaf].item() == 7
    backward(8, leaf)
    assert calls == [((8, [leaf]), {"retain_graph": True})]
