"""A first call: two workers, and functions of one that run on the other.

python examples/first_call.py
torchrun --nproc-per-node 2 examples/first_call.py
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile

import torch
from torch.distributed import rpc

import zmqagent  # noqa: F401 - registers rpc.BackendType.ZMQ

WORLD_SIZE = 2


def scale(tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """What is called from afar: any function that both workers can import. Arguments and results may be tensors, or anything
    that pickle takes."""
    print(f"{rpc.get_worker_info().name} scales {tensor.tolist()} by {factor}", flush=True)
    return tensor * factor


def root(number: float) -> float:
    return math.sqrt(number)


def call_the_other() -> None:
    # Wait for the result. torch's own functions can be called, too.
    assert rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    assert rpc.rpc_sync("worker1", scale, args=(torch.ones(2),), kwargs={"factor": 3.0}).tolist() == [3, 3]

    # Do not wait: start several calls, then collect the results. They run side by side on the other worker.
    futures = [rpc.rpc_async("worker1", scale, args=(torch.tensor([1.0, 2.0]), factor)) for factor in (10.0, 100.0)]
    ten, hundred = torch.futures.wait_all(futures)
    assert ten.tolist() == [10, 20]
    assert hundred.tolist() == [100, 200]

    # What fails over there is raised here, and its text holds the traceback from there.
    try:
        rpc.rpc_sync("worker1", root, args=(-1.0,))
    except ValueError as error:
        print(f"worker1 refused to take the root of -1 ({type(error).__name__})", flush=True)
    else:
        raise AssertionError("-1 has a root")
    print("all calls gave what they should", flush=True)


def run(rank: int, backend: str, init_method: str) -> None:
    """One process of the two."""
    kind = rpc.BackendType[backend]
    options = rpc.backend_registry.construct_rpc_backend_options(kind, init_method=init_method)
    rpc.init_rpc(f"worker{rank}", backend=kind, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        call_the_other()
    rpc.shutdown()  # waits until nobody has work left, so worker1 serves until worker0 is done


def main() -> None:
    parser = argparse.ArgumentParser(description="Functions of one worker that run on another.")
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
