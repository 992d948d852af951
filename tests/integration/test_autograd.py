"""Training over real processes: the same numbers as in one process, with every optimizer, and through RemoteModule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import nn
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.optim.utils import functional_optim_map

from tests.integration.harness import on_group

TOLERANCE = 1e-9
_SIZES = [(4, 5), (5, 5), (5, 2)]


class Stage(nn.Module):
    """One third of a network; the second runs twice for each batch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*_SIZES[number], dtype=torch.float64)
        # Of its own, since other threads of this process draw numbers too.
        generator = torch.Generator().manual_seed(number)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))

    def parameter_rrefs(self) -> list[Any]:
        return [rpc.RRef(parameter) for parameter in self.parameters()]

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]


def _batch() -> torch.Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(100))


def _loss(first: Any, second: Any, third: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = first(x)
    return third(second(second(hidden)) + hidden).pow(2).sum()


def _train_in_one_process(kind: type, options: dict[str, Any], steps: int) -> list[torch.Tensor]:
    stages = [Stage(number) for number in range(3)]
    # As DistributedOptimizer does it: an optimizer of its own on each worker.
    optimizers = [kind(stage.parameters(), **options) for stage in stages]
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss(*stages, _batch()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [value for stage in stages for value in stage.values()]


def _train_on_three_workers(kind: type, options: dict[str, Any], steps: int) -> list[torch.Tensor]:
    stages = [rpc.remote(f"worker{number}", Stage, args=(number,)) for number in range(3)]
    parameters = [rref for stage in stages for rref in stage.rpc_sync().parameter_rrefs()]
    optimizer = DistributedOptimizer(kind, parameters, **options)

    def call(stage: Any) -> Any:
        return lambda x: stage.rpc_sync().forward(x)

    for _ in range(steps):
        with dist_autograd.context() as context:
            dist_autograd.backward(context, [_loss(*map(call, stages), _batch())])
            optimizer.step(context)
    return [value for stage in stages for value in stage.rpc_sync().values()]


def _assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


_OPTIONS: dict[type, dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9},
    torch.optim.Rprop: {"lr": 0.01},
}


def _train_with_all(kinds: list[type]) -> list[str]:
    wrong = []
    for kind in kinds:
        options = _OPTIONS.get(kind, {"lr": 0.01})
        try:
            _assert_equal(_train_on_three_workers(kind, options, 3), _train_in_one_process(kind, options, 3))
        except Exception as error:
            wrong.append(f"{kind.__name__}: {error!r:.2000}")
    return wrong


def test_steps_across_three_workers_equal_those_of_one_process_with_every_functional_optimizer() -> None:
    kinds = list(functional_optim_map)
    assert len(kinds) >= 8
    assert on_group(_train_with_all, kinds, world_size=3, deadline=80.0) == []


def test_steps_equal_those_of_one_process_with_an_optimizer_that_has_no_functional_form() -> None:
    kinds: list[type] = [torch.optim.NAdam, torch.optim.ASGD]
    assert not set(kinds) & set(functional_optim_map)
    assert on_group(_train_with_all, kinds, world_size=3) == []


def gradients_of(context: int, stage: Any) -> list[torch.Tensor]:
    found = dist_autograd.get_gradients(context)
    return [found[parameter] for parameter in stage.local_value().parameters()]


def _gradients() -> list[float]:
    stages = [rpc.remote(f"worker{number}", Stage, args=(number,)) for number in range(3)]
    local = [Stage(number) for number in range(3)]
    plain = copy.deepcopy(local)
    _loss(*plain, _batch()).backward()
    with dist_autograd.context() as context:
        dist_autograd.backward(context, [_loss(*[stage_call(stage) for stage in stages], _batch())])
        found = [
            gradient
            for number, stage in enumerate(stages)
            for gradient in rpc.rpc_sync(f"worker{number}", gradients_of, args=(context, stage))
        ]
    expected = [parameter.grad for stage in plain for parameter in stage.parameters()]
    return [float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)]


def stage_call(stage: Any) -> Any:
    return lambda x: stage.rpc_sync().forward(x)


def test_gradients_on_all_workers_equal_those_of_one_process() -> None:
    differences = on_group(_gradients, world_size=3)
    assert len(differences) == 6
    assert max(differences) < TOLERANCE


def _contexts_left() -> list[str]:
    return [dist_autograd._get_debug_info()["num_autograd_contexts"]]


def _fail_and_go_on() -> list[Any]:
    stage = rpc.remote("worker1", Stage, args=(0,))
    with dist_autograd.context() as context:
        y = rpc.rpc_sync("worker1", fail_backwards, args=(torch.ones(2, requires_grad=True),))
        with pytest.raises(RuntimeError, match="Error on Node"):
            dist_autograd.backward(context, [y.sum()])
    with dist_autograd.context() as context:
        loss = stage.rpc_sync().forward(_batch()).sum()
        dist_autograd.backward(context, [loss], retain_graph=True)
        dist_autograd.backward(context, [loss])
        doubled = rpc.rpc_sync("worker1", gradients_of, args=(context, stage))
    with dist_autograd.context() as context:
        dist_autograd.backward(context, [stage.rpc_sync().forward(_batch()).sum()])
        once = rpc.rpc_sync("worker1", gradients_of, args=(context, stage))
    return [torch.allclose(two, 2 * one) for two, one in zip(doubled, once, strict=True)]


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise ValueError("fails on its way back")


def fail_backwards(x: torch.Tensor) -> torch.Tensor:
    return _Fails.apply(x)


def test_a_failed_pass_reaches_the_caller_and_harms_no_other() -> None:
    assert on_group(_fail_and_go_on) == [True, True]


def _use_a_remote_module() -> list[Any]:
    from torch.distributed.nn import RemoteModule

    module = RemoteModule("worker1/cpu", nn.Linear, args=(3, 2))
    x = torch.ones(1, 3)
    value = module(x)
    future = module.forward_async(x)
    parameters = [parameter.to_here() for parameter in module.remote_parameters()]
    expected = nn.functional.linear(x, *parameters)
    return [torch.equal(value, expected), torch.equal(future.wait(), expected), module.get_module_rref().owner_name()]


# RemoteModule makes its forward from a template, in a file that it imports.
def test_a_remote_module_computes_where_it_lives() -> None:
    assert on_group(_use_a_remote_module) == [True, True, "worker1"]
