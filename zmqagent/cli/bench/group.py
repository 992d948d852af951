"""The workers of one contender: processes that form an RPC group, the first of which is told to call the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import rpc

import zmqagent
from zmqagent.cli.bench import observed, workloads
from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.process import Process, answers

__all__ = ["Group", "running_group"]


class Group:
    """A group that runs.

    Attributes:
        contender: what carries its calls.
        processes: its workers, by rank.
        init_seconds: how long ``init_rpc`` took on the slowest of them.
    """

    def __init__(self, contender: Contender, processes: list[Process], init_seconds: float) -> None:
        self.contender = contender
        self.processes = processes
        self.init_seconds = init_seconds

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function(*args)`` returned on the first worker.

        Raises:
            ProcessFailed: it raised, took too long, or a worker died.
        """
        caller, *others = self.processes
        caller.ask(function, *args)
        return answers([caller], bystanders=others)[0]

    def everywhere(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returned on each worker, all at the same time.

        Raises:
            ProcessFailed: as `call`.
        """
        for process in self.processes:
            process.ask(function, *args)
        return answers(self.processes)

    def pause(self) -> None:
        """Stops the workers if they would take processor time from others while nobody asks anything of them."""
        if self.contender.spins:
            for process in self.processes:
                process.pause()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Lets paused workers run, until the end of the block."""
        self.resume()
        yield
        self.pause()

    def resume(self) -> None:
        """Lets the workers run that `pause` stopped."""
        for process in self.processes:
            process.resume()

    def observe(self, look: Callable[[int], float]) -> list[float]:
        """What ``look`` says of the process of each worker.

        Raises:
            ProcessFailed: one of them died.
        """
        return [process.observe(look) for process in self.processes]

    def cpu_seconds(self) -> float:
        """The processor time that all workers together have used so far."""
        return sum(self.observe(observed.cpu_seconds))


@contextmanager
def running_group(contender: Contender, size: int, threads: int, directory: Path) -> Iterator[Group]:
    """A group of ``size`` workers; it is shut down at the end, or killed when an error leaves the block.

    Args:
        threads: what ``torch.set_num_threads`` gets in each worker.
        directory: a private one, where the workers meet.

    Raises:
        ProcessFailed: a worker could not start or shut down.
    """
    names = [f"{contender.label}'s {'caller' if rank == 0 else f'worker{rank}'}" for rank in range(size)]
    processes: list[Process] = []
    patience = 0.0
    try:
        for name in names:
            processes.append(Process(name))
        meeting_point = f"file://{directory}/{contender.name.replace(':', '-')}-{size}-{time.monotonic_ns()}"
        for rank, process in enumerate(processes):
            process.ask(_join, contender, rank, size, meeting_point, threads)
        group = Group(contender, processes, max(answers(processes)))
        yield group
        group.resume()
        group.everywhere(_leave)
        patience = 5.0
    finally:
        for process in processes:
            process.end(patience)


def _join(contender: Contender, rank: int, size: int, meeting_point: str, threads: int) -> float:
    """Makes this process a worker; returns how many seconds ``init_rpc`` took."""
    assert zmqagent.__version__  # imported so that the backend exists
    torch.set_num_threads(threads)
    backend = rpc.BackendType[contender.backend]
    options = rpc.backend_registry.construct_rpc_backend_options(backend, init_method=meeting_point, **contender.options)
    began = time.perf_counter()
    rpc.init_rpc(workloads.worker(rank), backend=backend, rank=rank, world_size=size, rpc_backend_options=options)
    return time.perf_counter() - began


def _leave() -> None:
    workloads.forget()
    rpc.shutdown()
