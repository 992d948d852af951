"""A parameter server that updates in batches: it averages all trainers' gradients, steps once, and answers all of them.

The server's function is `async_execution`: it returns a future at once, so no thread of the server waits for the slower trainer.
The trainers learn to tell the arms of two spirals apart, each from points of its own.

    python examples/parameter_server.py
    torchrun --nproc-per-node 3 examples/parameter_server.py
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import threading

import torch
from torch import Tensor, nn
from torch.distributed import rpc
from torch.futures import Future

import zmqagent  # noqa: F401 - registers rpc.BackendType.ZMQ

WORLD_SIZE = 3
TRAINERS = WORLD_SIZE - 1
STEPS = 400

Weights = list[Tensor]


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def spirals(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` points of the plane, and which of two spiral arms each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    arms = torch.arange(count) % 2
    distance = torch.rand(count, generator=generator)
    angle = distance * 1.5 * math.pi + arms * math.pi
    points = torch.stack([distance * angle.cos(), distance * angle.sin()], dim=1)
    return points + 0.02 * torch.randn(count, 2, generator=generator), arms


class ParameterServer:
    def __init__(self) -> None:
        self.parameters = list(build_model().parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.01)
        self.lock = threading.Lock()  # trainers call at the same time, on different threads
        self.gradients: list[Weights] = []
        self.updated: Future[Weights] = Future()

    def weights(self) -> Weights:
        return [parameter.detach() for parameter in self.parameters]

    @rpc.functions.async_execution
    def update(self, gradients: Weights) -> Future[Weights]:
        """Takes one trainer's gradients; all trainers get the new weights once the last of them has called."""
        with self.lock:
            self.gradients.append(gradients)
            updated = self.updated
            if len(self.gradients) == TRAINERS:
                for parameter, *found in zip(self.parameters, *self.gradients, strict=True):
                    parameter.grad = torch.stack(found).mean(0)
                self.optimizer.step()
                self.gradients, self.updated = [], Future()
                updated.set_result(self.weights())
        return updated


def train(server: rpc.RRef, trainer: int) -> float:
    """Runs on each trainer; returns its last loss."""
    points, arms = spirals(500, seed=trainer)
    model = build_model()
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(points), arms)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        weights = server.rpc_sync().update(list(gradients))
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), weights, strict=True):
                parameter.copy_(new)
    return loss.item()


def serve() -> None:
    server = ParameterServer()
    reference = rpc.RRef(server)
    losses = torch.futures.wait_all(
        [rpc.rpc_async(f"trainer{index}", train, args=(reference, index), timeout=0) for index in range(TRAINERS)]
    )
    model = build_model()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(server.weights()), model.parameters())
    points, arms = spirals(1000, seed=TRAINERS)
    accuracy = (model(points).argmax(1) == arms).float().mean().item()
    print(f"losses {[round(loss, 4) for loss in losses]}; {accuracy:.1%} of 1000 new points told apart", flush=True)
    assert accuracy > 0.95, "the spirals were not learned"


def run(rank: int, backend: str, init_method: str) -> None:
    """One process: the server, or a trainer."""
    torch.set_num_threads(1)
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(
        "server" if rank == 0 else f"trainer{rank - 1}",
        backend=kind,
        rank=rank,
        world_size=WORLD_SIZE,
        rpc_backend_options=options,
    )
    if rank == 0:
        serve()
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="A parameter server that averages gradients.")
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
