"""Remote modules with a TorchScript interface: called from Python, compiled, called from scripts, and trained.

Annotations are evaluated in this file, since TorchScript reads them.
"""

import gc
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor, nn
from torch.distributed.nn import RemoteModule
from torch.distributed.nn.api.remote_module import _RemoteModule
from torch.futures import Future

from tests.integration.harness import on_group
from zmqagent.exceptions import NotPicklableError, ScriptError


@torch.jit.interface
class Scaling:
    def forward(self, x: Tensor, by: int) -> tuple[Tensor, int]:  # type: ignore[empty-body]
        pass


@torch.jit.interface
class ScalingLater:
    def forward(self, x: Tensor, by: int) -> tuple[Tensor, int]:  # type: ignore[empty-body]
        pass

    def forward_async(self, x: Tensor, by: int) -> Future[tuple[Tensor, int]]:  # type: ignore[empty-body]
        pass


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 3.0))

    def forward(self, x: Tensor, by: int) -> tuple[Tensor, int]:
        return self.weight * x * by, by


class Model(nn.Module):
    """Has a remote part, and is compiled with it."""

    def __init__(self, remote: nn.Module) -> None:
        super().__init__()
        self.remote = remote

    def forward(self, x: Tensor) -> Tensor:
        scaled, by = self.remote(x, 2)
        return scaled + by


@torch.jit.script
def use(module: Scaling, x: Tensor) -> Tensor:
    scaled, by = module.forward(x, 2)
    return scaled + by


@torch.jit.script
def use_later(module: ScalingLater, x: Tensor) -> Tensor:
    first, second = module.forward_async(x, 1), module.forward_async(x, 2)
    return first.wait()[0] + second.wait()[0]


def remote_scale() -> Any:
    return _RemoteModule("worker1/cpu", Scale, _module_interface_cls=Scaling)


def _call_in_every_way() -> dict[str, Any]:
    ones = torch.ones(2)
    compiled = torch.jit.script(remote_scale())
    # The module that it was compiled from is referred to by nothing else.
    gc.collect()
    plain = remote_scale()
    return {
        "plain": plain(ones, 2)[0].tolist(),
        "plain async": plain.forward_async(ones, 2).wait()[0].tolist(),
        "compiled": compiled(ones, 2)[0].tolist(),
        "compiled async": compiled.forward_async(ones, 2).wait()[0].tolist(),
        "in a script": (use(compiled, ones) - 2).tolist(),
        "in a script, later": (use_later(compiled, ones) - 3).tolist(),
        "inside a module": (torch.jit.script(Model(remote_scale()))(ones) - 2).tolist(),
    }


def test_a_module_with_an_interface_is_called_from_python_and_from_scripts_and_nothing_leaks() -> None:
    assert {name: value for name, value in on_group(_call_in_every_way).items() if value != [6.0, 6.0]} == {}


def gradient_of(module_rref: Any, context_id: int) -> list[float]:
    gradients = dist_autograd.get_gradients(context_id)
    found: list[float] = gradients[module_rref.local_value().weight].tolist()
    return found


def _train() -> list[Any]:
    remote = remote_scale()
    compiled = torch.jit.script(remote)
    leaf = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = (use(compiled, leaf) + use_later(compiled, leaf)).sum()
        dist_autograd.backward(context_id, [loss])
        here = dist_autograd.get_gradients(context_id)[leaf].tolist()
        return [here, rpc.rpc_sync("worker1", gradient_of, args=(remote.module_rref, context_id))]


def test_gradients_flow_through_scripts_that_call_remote_modules() -> None:
    assert on_group(_train) == [[15.0, 15.0], [5.0, 5.0]]


def _fail_there() -> dict[str, str]:
    compiled, short = torch.jit.script(remote_scale()), torch.ones(3)
    calls = {
        "sync": lambda: compiled(short, 2),
        "async": lambda: compiled.forward_async(short, 2).wait(),
        "in a script": lambda: use(compiled, short),
        "in a script, later": lambda: use_later(compiled, short),
    }
    texts = {}
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        texts[name] = str(caught.value)
    return texts


def test_what_a_remote_module_raises_reaches_who_calls_the_compiled_one_in_any_way() -> None:
    for name, text in on_group(_fail_there).items():
        assert "On WorkerInfo(id=1, name=worker1)" in text, name
        assert "The size of tensor a (2) must match the size of tensor b (3)" in text, name


_leaf: Any = None


def _ask_on(x: Tensor) -> Tensor:
    scaled: Tensor = _leaf.forward_async(x, 2).wait()[0]
    return scaled


@torch.jit.ignore
def ask_back(x: Tensor) -> Tensor:
    found: Tensor = rpc.rpc_sync("worker0", _ask_on, args=(x,))
    return found


class AskBack(nn.Module):
    """Its answer takes another call, by the worker that asks."""

    def forward(self, x: Tensor, by: int) -> tuple[Tensor, int]:
        return ask_back(x), by


def _nest() -> list[list[float]]:
    global _leaf
    _leaf = torch.jit.script(remote_scale())
    asking = torch.jit.script(_RemoteModule("worker1/cpu", AskBack, _module_interface_cls=Scaling))
    # As many as there are threads for forks. If each held one, none would be left for the calls inside.
    outer = [asking.forward_async(torch.ones(2), 2) for _ in range(torch.get_num_interop_threads())]
    try:
        return [future.wait()[0].tolist() for future in outer]
    finally:
        _leaf = None


def test_calls_inside_calls_end_however_many_are_under_way() -> None:
    found = on_group(_nest)
    assert found == [[6.0, 6.0]] * len(found)
    assert found


def _misuse() -> str:
    with pytest.raises(ScriptError, match="without a module interface cannot be compiled"):
        torch.jit.script(RemoteModule("worker1/cpu", Scale))
    with pytest.raises(NotPicklableError, match="Passing a script RemoteModule over RPC is not supported"):
        rpc.rpc_sync("worker1", use, args=(torch.jit.script(remote_scale()), torch.ones(2)))
    return "told"


def test_what_remote_modules_cannot_do_is_told() -> None:
    assert on_group(_misuse) == "told"
