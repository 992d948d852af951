"""A pipeline: a model in two stages on two workers, fed with micro-batches so that both stages work at the same time.

The master passes references around and never sees what flows between the stages: the second fetches it from the first. The
backward pass takes the same way back.

    python examples/pipeline.py
    torchrun --nproc-per-node 3 examples/pipeline.py
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

WORLD_SIZE = 3
MICRO_BATCHES = 4
STEPS = 100
CLASSES = 3


class Stage:
    """A part of the model. Its layers keep nothing between calls, so that micro-batches may go through them side by side."""

    def __init__(self, layers: nn.Module) -> None:
        self.layers = layers

    def forward(self, inputs: rpc.RRef) -> Tensor:
        return self.layers(inputs.to_here())

    def parameters(self) -> list[rpc.RRef]:
        return [rpc.RRef(parameter) for parameter in self.layers.parameters()]


def through_pipeline(stages: list[rpc.RRef], inputs: Tensor, micro_batches: int) -> Tensor:
    """Nothing here waits before the end: while the second stage has one micro-batch, the first works on the next."""
    outputs = []
    for part in inputs.chunk(micro_batches):
        hidden = stages[0].remote().forward(rpc.RRef(part))
        outputs.append(stages[1].rpc_async().forward(hidden))
    return torch.cat(torch.futures.wait_all(outputs))


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the plane, and in which of three rings around the origin each of them lies."""
    points = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return points, (points.norm(dim=1) * CLASSES).long().clamp(max=CLASSES - 1)


def train() -> None:
    torch.manual_seed(0)
    stages = [
        rpc.remote("stage1", Stage, args=(nn.Sequential(nn.Linear(2, 64), nn.ReLU()),)),
        rpc.remote("stage2", Stage, args=(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)),)),
    ]
    parameters = [parameter for stage in stages for parameter in stage.rpc_sync().parameters()]
    optimizer = DistributedOptimizer(torch.optim.Adam, parameters, lr=0.01)
    points, labels = rings(512, seed=1)
    for step in range(STEPS + 1):
        with dist_autograd.context() as context_id:
            loss = nn.functional.cross_entropy(through_pipeline(stages, points, MICRO_BATCHES), labels)
            dist_autograd.backward(context_id, [loss])
            optimizer.step(context_id)
        if step % 20 == 0:
            print(f"step {step:3}   loss {loss.item():.4f}", flush=True)

    points, labels = rings(1000, seed=2)
    scores = through_pipeline(stages, points, MICRO_BATCHES)
    torch.testing.assert_close(scores, through_pipeline(stages, points, micro_batches=1))
    accuracy = (scores.argmax(1) == labels).float().mean().item()
    print(f"{accuracy:.1%} of 1000 new points put into the right ring", flush=True)
    assert accuracy > 0.9, "the rings were not learned"


def run(rank: int, backend: str, init_method: str) -> None:
    """One process: the master, or a stage."""
    torch.set_num_threads(1)
    name = "master" if rank == 0 else f"stage{rank}"
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(name, backend=kind, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        train()
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="A model in two stages, fed with micro-batches.")
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
