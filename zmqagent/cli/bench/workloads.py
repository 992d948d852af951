"""What the caller of a pair runs, in slices of a given number of operations; each returns what it measured in one slice.

Nothing but torch's public RPC API, the same for every backend. The other worker only serves. Times are in microseconds, or
milliseconds for a training step; MB and GB are 2**20 and 2**30 bytes.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor, nn
from torch.distributed import rpc
from torch.distributed.optim import DistributedOptimizer

from zmqagent.cli.bench.statistics import percentile

__all__ = [
    "FLOATS_IN_4_KB",
    "GB",
    "MB",
    "PEER",
    "asynchronous",
    "builtin_operator",
    "echo",
    "forget",
    "from_threads",
    "no_op",
    "nothing",
    "push",
    "remote_to_here",
    "same",
    "small_echo",
    "timed",
    "train",
    "worker",
]

MB = 2**20
GB = 2**30
FLOATS_IN_4_KB = 1024
FEATURES, HIDDEN, CLASSES, BATCH = 64, 128, 10, 32


def worker(rank: int) -> str:
    """The RPC name of a worker."""
    return f"worker{rank}"


PEER = worker(1)


def no_op(count: int) -> dict[str, float]:
    """Calls of a function that does nothing, each awaited."""
    return _latencies(lambda: rpc.rpc_sync(PEER, nothing), count)


def builtin_operator(count: int) -> dict[str, float]:
    """Calls of an operator of torch on two small tensors, each awaited."""
    tensor = torch.ones(2)
    return _latencies(lambda: rpc.rpc_sync(PEER, torch.add, args=(tensor, tensor)), count)


def small_echo(count: int) -> dict[str, float]:
    """A tensor of 4 KB there and back."""
    tensor = torch.ones(FLOATS_IN_4_KB)
    return _latencies(lambda: rpc.rpc_sync(PEER, same, args=(tensor,)), count)


def remote_to_here(count: int) -> dict[str, float]:
    """Creations of a remote object, each fetched at once."""
    tensor = torch.ones(2)
    return _latencies(lambda: rpc.remote(PEER, torch.add, args=(tensor, tensor)).to_here(), count)


def asynchronous(count: int) -> dict[str, float]:
    """Calls of a function that does nothing, all begun before the first is awaited."""
    began = time.perf_counter()
    torch.futures.wait_all([rpc.rpc_async(PEER, nothing) for _ in range(count)])
    return {"rate": count / (time.perf_counter() - began)}


def from_threads(callers: int, count: int) -> dict[str, float]:
    """Calls of a function that does nothing, each awaited, from several threads at the same time; ``count`` in all."""
    ready = threading.Barrier(callers + 1)

    def call() -> list[float]:
        ready.wait()
        return timed(lambda: rpc.rpc_sync(PEER, nothing), count // callers)

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(call) for _ in range(callers)]
        ready.wait()
        began = time.perf_counter()
        latencies = [seconds for future in futures for seconds in future.result()]
        elapsed = time.perf_counter() - began
    return {"rate": len(latencies) / elapsed, "p50": percentile(latencies, 0.5) * 1e6}


def push(megabytes: int, count: int) -> dict[str, float]:
    """Tensors to a function that drops them."""
    tensor = _tensor(megabytes * MB)
    seconds = percentile(timed(lambda: rpc.rpc_sync(PEER, _drop, args=(tensor,)), count), 0.5)
    return {"bandwidth": megabytes * MB / GB / seconds}


def echo(megabytes: int, count: int) -> dict[str, float]:
    """Tensors there and back; both ways count."""
    tensor = _tensor(megabytes * MB)
    seconds = percentile(timed(lambda: rpc.rpc_sync(PEER, same, args=(tensor,)), count), 0.5)
    return {"bandwidth": 2 * megabytes * MB / GB / seconds}


def train(with_optimizer: bool, count: int) -> dict[str, float]:
    """Steps of a network whose first layer lives on the other worker: forward, distributed backward, perhaps the optimizer."""
    network = _network()

    def step() -> None:
        with dist_autograd.context() as context_id:
            hidden = network.first.rpc_sync().forward(network.inputs)
            loss = nn.functional.cross_entropy(network.last(torch.relu(hidden)), network.labels)
            dist_autograd.backward(context_id, [loss])
            if with_optimizer:
                network.optimizer.step(context_id)

    return {"step": percentile(timed(step, count), 0.5) * 1e3}


def forget() -> None:
    """Lets go of what the workloads keep between slices, references to the other worker among it."""
    _network.cache_clear()


def nothing() -> None:
    """What is called where only the call counts."""


def same(tensor: Tensor) -> Tensor:
    """What is called to have a tensor back."""
    return tensor


def timed(call: Callable[[], object], count: int) -> list[float]:
    """The seconds that each of ``count`` calls took."""
    clock = time.perf_counter
    seconds = []
    for _ in range(count):
        began = clock()
        call()
        seconds.append(clock() - began)
    return seconds


class _Network(NamedTuple):
    first: rpc.RRef[nn.Linear]
    last: nn.Linear
    optimizer: DistributedOptimizer
    inputs: Tensor
    labels: Tensor


@functools.cache
def _network() -> _Network:
    # That optimizers give up TorchScript in favour of torch.compile is nothing that a user of this tool could act on.
    logging.getLogger("torch.distributed.optim").setLevel(logging.ERROR)
    first = rpc.remote(PEER, nn.Linear, args=(FEATURES, HIDDEN))
    last = nn.Linear(HIDDEN, CLASSES)
    parameters = [*rpc.rpc_sync(PEER, _parameters, args=(first,)), *map(rpc.RRef, last.parameters())]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=0.01)
    return _Network(first, last, optimizer, torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,)))


def _parameters(layer: rpc.RRef[nn.Linear]) -> list[rpc.RRef[Any]]:
    return [rpc.RRef(parameter) for parameter in layer.local_value().parameters()]


def _drop(tensor: Tensor) -> None:
    pass


def _tensor(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.uint8)


def _latencies(call: Callable[[], object], count: int) -> dict[str, float]:
    seconds = timed(call, count)
    return {"p50": percentile(seconds, 0.5) * 1e6, "p99": percentile(seconds, 0.99) * 1e6}
