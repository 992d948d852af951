"""Calls between real processes: every way to call, and every kind of argument and result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.rpc as rpc
from torch import nn

from tests.integration.harness import on_group
from zmqagent.exceptions import RpcTimeoutError


def add(x: Any, y: Any = 1) -> Any:
    return x + y


def echo(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


def my_name() -> str:
    return rpc.get_worker_info().name


class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def increment(self, by: int = 1) -> int:
        self.value += by
        return self.value

    @classmethod
    def described(cls) -> str:
        return cls.__name__

    @staticmethod
    def doubled(value: int) -> int:
        return 2 * value


@torch.jit.script
def script_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + 2 * y


@rpc.functions.async_execution
def add_over(to: str, x: Any, y: Any) -> Any:
    return rpc.rpc_async(to, add, args=(x, y)).then(lambda future: future.wait() + 1)


# Every way to call, to another worker and to oneself.


def _call_in_every_way(to: str) -> dict[str, Any]:
    ones = torch.ones(2)
    return {
        "sync": rpc.rpc_sync(to, add, args=(1,), kwargs={"y": 5}),
        "async": rpc.rpc_async(to, add, args=(1, 2)).wait(),
        "remote": rpc.remote(to, add, args=(1, 3)).to_here(),
        "by WorkerInfo": rpc.rpc_sync(rpc.get_worker_info(to), my_name),
        "by id": rpc.rpc_sync(rpc.get_worker_info(to).id, my_name),
        "bound method": rpc.rpc_sync(to, Counter(3).increment, args=(4,)),
        "class method": rpc.rpc_sync(to, Counter.described),
        "static method": rpc.rpc_sync(to, Counter.doubled, args=(4,)),
        "class": rpc.rpc_sync(to, Counter, args=(9,)).value,
        "python builtin": rpc.rpc_sync(to, divmod, args=(7, 2)),
        "operator": rpc.rpc_sync(to, torch.add, args=(ones, 3)).tolist(),
        "operator async": rpc.rpc_async(to, torch.mul, args=(ones, 4)).wait().tolist(),
        "operator remote": rpc.remote(to, torch.add, args=(ones, ones)).to_here().tolist(),
        "script": rpc.rpc_sync(to, script_add, args=(ones, ones)).tolist(),
        "script async": rpc.rpc_async(to, script_add, args=(ones, ones)).wait().tolist(),
        "script remote": rpc.remote(to, script_add, args=(ones, ones)).to_here().tolist(),
        "async_execution": rpc.rpc_sync(to, add_over, args=("worker0", 1, 2)),
        "async_execution remote": rpc.remote(to, add_over, args=("worker0", 1, 2)).to_here(),
    }


@pytest.mark.parametrize("to", ["worker1", "worker0"])
def test_every_way_to_call_gives_the_functions_value(to: str) -> None:
    assert on_group(_call_in_every_way, to) == {
        "sync": 6,
        "async": 3,
        "remote": 4,
        "by WorkerInfo": to,
        "by id": to,
        "bound method": 7,
        "class method": "Counter",
        "static method": 8,
        "class": 9,
        "python builtin": (3, 1),
        "operator": [4.0, 4.0],
        "operator async": [4.0, 4.0],
        "operator remote": [2.0, 2.0],
        "script": [3.0, 3.0],
        "script async": [3.0, 3.0],
        "script remote": [3.0, 3.0],
        "async_execution": 4,
        "async_execution remote": 4,
    }


def _use_a_remote_object(to: str) -> list[Any]:
    counter = rpc.remote(to, Counter, args=(10,))
    counter.rpc_sync().increment()
    counter.rpc_async().increment(by=5).wait()
    seen = counter.remote().increment().to_here()
    return [seen, counter.to_here().value, counter.owner_name(), counter.is_owner(), counter._get_type().__name__]


@pytest.mark.parametrize("to", ["worker1", "worker0"])
def test_a_remote_object_keeps_its_state_between_calls(to: str) -> None:
    assert on_group(_use_a_remote_object, to) == [17, 17, to, to == "worker0", "Counter"]


# Nested calls.


def visit(route: list[str]) -> list[str]:
    here = my_name()
    return [here, *rpc.rpc_sync(route[0], visit, args=(route[1:],))] if route else [here]


def _visit_concurrently(routes: list[list[str]]) -> list[list[str]]:
    futures = [rpc.rpc_async(route[0], visit, args=(route[1:],)) for route in routes]
    return torch.futures.wait_all(futures)


def test_nested_calls_in_every_direction_end_though_each_worker_has_one_thread() -> None:
    names = ["worker0", "worker1", "worker2"]
    routes = [[a, b, c, d] for a in names for b in names for c in names for d in names]
    assert on_group(_visit_concurrently, routes, world_size=3, num_worker_threads=1) == routes


_gate = threading.Event()


def wait_for_gate() -> bool:
    return _gate.wait(20)


def open_gate() -> None:
    _gate.set()


def _open_a_gate_that_all_threads_wait_for() -> list[bool]:
    waiting = [rpc.rpc_async("worker1", wait_for_gate) for _ in range(4)]
    rpc.rpc_sync("worker1", open_gate)
    return torch.futures.wait_all(waiting)


def test_a_call_is_served_while_all_threads_of_the_pool_are_busy() -> None:
    assert on_group(_open_a_gate_that_all_threads_wait_for, num_worker_threads=2) == [True] * 4


# Timeouts.


def _call_the_closed_gate(how: str, timeout: float, default: float) -> str:
    rpc._set_rpc_timeout(default)
    with pytest.raises(RpcTimeoutError) as caught:  # noqa: PT012 - one call, of three kinds
        if how == "sync":
            rpc.rpc_sync("worker1", wait_for_gate, timeout=timeout)
        elif how == "async":
            rpc.rpc_async("worker1", wait_for_gate, timeout=timeout).wait()
        else:
            rpc.remote("worker1", wait_for_gate).to_here(timeout=timeout)
    rpc._set_rpc_timeout(30)
    rpc.rpc_sync("worker1", open_gate)
    return str(caught.value)


@pytest.mark.parametrize("how", ["sync", "async", "to_here"])
@pytest.mark.parametrize(("timeout", "default"), [(0.05, 30.0), (-1, 0.05)])
def test_a_call_fails_after_its_timeout_and_the_worker_serves_on(how: str, timeout: float, default: float) -> None:
    assert "RPC ran for more than set timeout (50 ms)" in on_group(_call_the_closed_gate, how, timeout, default)


def _call_without_a_limit() -> list[Any]:
    rpc._set_rpc_timeout(0.01)
    assert rpc.get_rpc_timeout() == pytest.approx(0.01)
    unlimited = rpc.rpc_async("worker1", wait_for_gate, timeout=0)
    limited = rpc.rpc_async("worker1", wait_for_gate)
    with pytest.raises(RpcTimeoutError):
        limited.wait()
    rpc._set_rpc_timeout(30)
    rpc.rpc_sync("worker1", open_gate)
    return [unlimited.wait()]


def test_a_timeout_of_zero_outlasts_the_default() -> None:
    assert on_group(_call_without_a_limit) == [True]


# Arguments and results.


def _strided() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6).t()[1:5:2]


def _sparse_coo() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 1, 1], [2, 0, 2]]), torch.tensor([3.0, 4.0, 5.0]), (2, 3))


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "dense": lambda: torch.arange(6.0).reshape(2, 3),
    "large": lambda: torch.arange(300_000, dtype=torch.int64),
    "strided": _strided,
    "expanded": lambda: torch.tensor([1.0, 2.0]).expand(3, 2),
    "zero-size": lambda: torch.empty(0, 3),
    "0-d": lambda: torch.tensor(7),
    "bfloat16": lambda: torch.tensor([1.5, -2.0]).bfloat16(),
    "half": lambda: torch.tensor([1.5, -2.0]).half(),
    "complex64": lambda: torch.tensor([1 + 2j]),
    "complex128": lambda: torch.tensor([1 + 2j], dtype=torch.complex128),
    "bool": lambda: torch.tensor([True, False]),
    "uint8": lambda: torch.tensor([255], dtype=torch.uint8),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "COO": lambda: _sparse_coo().coalesce(),
    "CSR": lambda: torch.sparse_csr_tensor(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 2.0])),
    "quantized": lambda: torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 3, torch.qint8),
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj()


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.is_quantized


def received(name: str, tensor: torch.Tensor) -> bool:
    """On the callee: whether ``tensor`` arrived as what the caller sent."""
    expected = TENSORS[name]()
    return _kind(tensor) == _kind(expected) and torch.equal(_plain(tensor), _plain(expected))


def _send_tensors(to: str) -> list[str]:
    wrong = []
    for name, make in TENSORS.items():
        tensor = make()
        if not rpc.rpc_sync(to, received, args=(name, tensor)):
            wrong.append(f"{name} to {to}")
        for back in (rpc.rpc_sync(to, echo, args=(tensor,)), rpc.remote(to, echo, args=(tensor,)).to_here()):
            if not received(name, back):
                wrong.append(f"{name} from {to}: {back}")
    return wrong


@pytest.mark.parametrize("to", ["worker1", "worker0"])
def test_every_kind_of_tensor_arrives_as_it_was_sent(to: str) -> None:
    assert on_group(_send_tensors, to) == []


def _send_views() -> list[bool]:
    base = torch.arange(6.0)
    first, second = rpc.rpc_sync("worker1", echo, args=(base[:4], base[2:]))
    # A large storage of which little is sent.
    row = rpc.rpc_sync("worker1", echo, args=(torch.zeros(1000, 1000)[3],))
    return [torch.equal(first, base[:4]), torch.equal(second, base[2:]), row.untyped_storage().nbytes() <= 8000]


def test_views_of_one_storage_arrive_with_their_values_and_without_its_rest() -> None:
    assert on_group(_send_views) == [True, True, True]


def _change_after_sending() -> tuple[float, float]:
    tensor, array = torch.zeros(200_000), np.zeros(200_000)
    future = rpc.rpc_async("worker1", echo, args=(tensor, array))
    tensor.fill_(1)
    array.fill(1)
    there = future.wait()
    return float(there[0].sum()), float(there[1].sum())


def test_what_is_sent_is_what_it_was_at_the_call() -> None:
    assert on_group(_change_after_sending) == (0.0, 0.0)


def train(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return module(x), all(parameter.requires_grad for parameter in module.parameters())


def _send_a_module() -> list[bool]:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3)
    result, requires = rpc.rpc_sync("worker1", train, args=(module, x))
    back = rpc.rpc_sync("worker1", echo, args=(module,))
    return [torch.equal(result.detach(), module(x).detach()), requires, torch.equal(back(x), module(x))]


def test_a_module_arrives_whole() -> None:
    assert on_group(_send_a_module) == [True, True, True]


ARRAYS: list[Callable[[], Any]] = [
    lambda: np.arange(6, dtype=np.float64).reshape(2, 3),
    lambda: np.arange(100_000, dtype=np.int16)[::3],
    lambda: np.array(["2024-01-02", "NaT"], dtype="datetime64[D]"),
    lambda: np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
    lambda: np.array(["ä", "bc"]),
    lambda: np.zeros((0, 3)),
    lambda: np.array(5),
    lambda: np.float32(2.5),
]


def fill(array: Any) -> Any:
    array[...] = 7
    return array


def _send_arrays() -> list[str]:
    wrong = []
    for make in ARRAYS:
        back = rpc.rpc_sync("worker1", echo, args=(make(),))
        if back.dtype != make().dtype or not np.array_equal(back, make(), equal_nan=back.dtype.kind in "fM"):
            wrong.append(repr(back))
    if not (rpc.rpc_sync("worker1", fill, args=(np.zeros(50_000),)) == 7).all():
        wrong.append("not writable at the callee")
    if not fill(rpc.rpc_sync("worker1", np.zeros, args=(50_000,))).all():
        wrong.append("not writable at the caller")
    return wrong


def test_arrays_arrive_as_they_were_and_can_be_written_to() -> None:
    assert on_group(_send_arrays) == []


def _send_containers() -> Any:
    value = {"a": [1, None, (2.5, "ü")], 3: {4, 5}, "t": [torch.ones(1)], "b": b"\x00\xff"}
    back = rpc.rpc_sync("worker1", echo, args=(value,))
    return back.pop("t")[0].tolist(), back


def test_containers_arrive_as_they_were() -> None:
    assert on_group(_send_containers) == ([1.0], {"a": [1, None, (2.5, "ü")], 3: {4, 5}, "b": b"\x00\xff"})


def _collect() -> tuple[list[int], str]:
    futures = [rpc.rpc_async("worker1", add, args=(number,)) for number in range(200)]
    values = [future.wait() for future in torch.futures.collect_all(futures).wait()]
    failing = [rpc.rpc_async("worker1", add, args=(1, "text")), *(rpc.rpc_async("worker1", add, args=(1,)) for _ in range(3))]
    with pytest.raises(TypeError) as caught:
        torch.futures.wait_all(failing)
    return values, str(caught.value)


def test_many_calls_at_once_end_together_and_with_the_first_error() -> None:
    values, text = on_group(_collect)
    assert values == list(range(1, 201))
    assert "unsupported operand" in text
