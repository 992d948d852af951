"""Remote objects: an object lives on one worker, others hold references to it, and pass them on.

worker1 keeps statistics. worker0 creates them there, calls their methods, and hands its reference to worker2, which never learns
where the object is. It is deleted when the last reference is gone, wherever that was.

    python examples/rref_remote_objects.py
    torchrun --nproc-per-node 3 examples/rref_remote_objects.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import torch
from torch.distributed import rpc

import zmqagent  # noqa: F401 - registers rpc.BackendType.ZMQ

WORLD_SIZE = 3


class Statistics:
    """Mean and variance of rows that arrive in batches (Chan, Golub and LeVeque's update)."""

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean = torch.zeros(columns)
        self.squares = torch.zeros(columns)

    def add(self, batch: torch.Tensor) -> int:
        count = self.count + len(batch)
        delta = batch.mean(0) - self.mean
        self.squares += batch.var(0, correction=0) * len(batch) + delta**2 * self.count * len(batch) / count
        self.mean += delta * len(batch) / count
        self.count = count
        return count

    def variance(self) -> torch.Tensor:
        return self.squares / self.count


def contribute(statistics: rpc.RRef, batch: torch.Tensor) -> str:
    """Runs on worker2: a reference that came as an argument serves like one's own."""
    count = statistics.rpc_sync().add(batch)
    return f"{rpc.get_worker_info().name} added {len(batch)} rows to {statistics.owner_name()}'s: {count} by now"


def use_statistics() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 3) * torch.tensor([1.0, 2.0, 3.0]) + 5

    statistics = rpc.remote("worker1", Statistics, args=(3,))  # does not wait: the reference can be used at once
    print(f"rows on worker1: {statistics.rpc_sync().add(rows[:200])}", flush=True)
    print(rpc.rpc_sync("worker2", contribute, args=(statistics, rows[200:])), flush=True)

    # A reference to a result leaves it where it is, until someone wants it.
    variance = statistics.remote().variance()
    torch.testing.assert_close(variance.to_here(), rows.var(0, correction=0))

    # The whole object can be fetched as well: a copy.
    copy = statistics.to_here()
    torch.testing.assert_close(copy.mean, rows.mean(0))
    print(f"mean {copy.mean.tolist()}, variance {copy.variance().tolist()}", flush=True)


def run(rank: int, backend: str, init_method: str) -> None:
    """One process of the three."""
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(f"worker{rank}", backend=kind, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        use_statistics()
    rpc.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="Objects that live on one worker and are used by others.")
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
