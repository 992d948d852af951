"""Distributed autograd: a model over two workers, and one backward pass through both.

The first layer is on worker1, the second on worker0. Within a `dist_autograd.context` each call that carries tensors becomes a
part of the graph; `backward` follows it across the workers, and `DistributedOptimizer` steps each parameter where it is.

    python examples/distributed_autograd.py
    torchrun --nproc-per-node 2 examples/distributed_autograd.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor, nn
from torch.distributed import rpc
from torch.distributed.optim import DistributedOptimizer

import zmqagent  # noqa: F401 - registers rpc.BackendType.ZMQ

WORLD_SIZE = 2
STEPS = 200


class FirstLayer:
    """Lives on worker1."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.layer = nn.Linear(1, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.layer(inputs))

    def parameters(self) -> list[rpc.RRef]:
        return [rpc.RRef(parameter) for parameter in self.layer.parameters()]

    def gradients(self, context_id: int) -> list[Tensor]:
        """Gradients of a context: they are kept there, not in ``.grad``, so that several passes may run at once."""
        found = dist_autograd.get_gradients(context_id)
        return [found[parameter] for parameter in self.layer.parameters()]


def fit_sine() -> None:
    torch.manual_seed(0)
    inputs = torch.linspace(-3, 3, 128).unsqueeze(1)
    targets = torch.sin(inputs)
    first = rpc.remote("worker1", FirstLayer)
    second = nn.Linear(32, 1)
    check_gradients(first, second, inputs, targets)

    parameters = [*first.rpc_sync().parameters(), *(rpc.RRef(parameter) for parameter in second.parameters())]
    optimizer = DistributedOptimizer(torch.optim.Adam, parameters, lr=0.02)
    for step in range(STEPS + 1):
        with dist_autograd.context() as context_id:
            loss = nn.functional.mse_loss(second(first.rpc_sync().forward(inputs)), targets)
            dist_autograd.backward(context_id, [loss])
            optimizer.step(context_id)  # on both workers; no zero_grad, for the context takes its gradients with it
        if step % 50 == 0:
            print(f"step {step:3}   loss {loss.item():.6f}", flush=True)
    assert loss.item() < 0.01, "the sine was not learned"


def check_gradients(first: rpc.RRef, second: nn.Linear, inputs: Tensor, targets: Tensor) -> None:
    """The gradients of a pass over two workers are those of the same model in one process."""
    with dist_autograd.context() as context_id:
        loss = nn.functional.mse_loss(second(first.rpc_sync().forward(inputs)), targets)
        dist_autograd.backward(context_id, [loss])
        own = dist_autograd.get_gradients(context_id)
        gradients = first.rpc_sync().gradients(context_id) + [own[parameter] for parameter in second.parameters()]
    copy = first.to_here()
    parameters = [*copy.layer.parameters(), *second.parameters()]
    expected = torch.autograd.grad(nn.functional.mse_loss(second(copy.forward(inputs)), targets), parameters)
    torch.testing.assert_close(gradients, list(expected))
    print("gradients over two workers equal those in one process", flush=True)


def run(rank: int, backend: str, init_method: str) -> None:
    """One process of the two."""
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(f"worker{rank}", backend=kind, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        fit_sine()
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="A backward pass through two workers.")
    parser.add_argument("--backend", choices=("ZMQ", "TENSORPIPE"), default="ZMQ")
    backend = parser.parse_args().backend
    if "RANK" in os.environ:  # torchrun started this process, and says where all meet
        if int(os.environ["WORLD_SIZE"]) != WORLD_SIZE:
            sys.exit(f"start {WORLD_SIZE} processes: torchrun --nproc-per-node {WORLD_SIZE}")
        run(int(os.environ["RANK"]), backend, "env://")
    else:  # start the processes here, and let them meet through a file
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(run, (backend, f"file://{directory}/rendezvous"), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
