"""``zmqagent demo``: starts the processes of the job in `training`, shows what they report, and says whether it succeeded.

The processes meet through a file in a private directory, so no port has to be chosen or can be taken. This process takes no part
in the training: it only listens, and ends the others when one of them fails or ^C is pressed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import queue
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from rich.console import Console
from torch.distributed import rpc
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from zmqagent.cli import training
from zmqagent.cli.arguments import number
from zmqagent.cli.display import Display
from zmqagent.cli.training import EpochDone, Job, Report

__all__ = ["add_parser", "demo"]

_INTERRUPTED = 130
_UNUSABLE = 2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``demo`` to the commands of ``zmqagent``."""
    parser = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits, over RPC",
        description="One parameter server and two trainers, each a process of its own on this machine, train a small network on "
        "scikit-learn's handwritten digits: first layers on the server, the last one on the trainers, forward through RRefs, "
        "distributed backward, DistributedOptimizer. Exits with 1 if too few of the held-out digits are read right.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    count = number(int, lambda value: value >= 1, "a whole number from 1 on")
    rate = number(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")
    seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
    share = number(float, lambda value: 0 <= value <= 100, "a number from 0 to 100")
    parser.add_argument("--backend", choices=("ZMQ", "TENSORPIPE"), default="ZMQ", help="what carries the calls")
    parser.add_argument("--epochs", type=count, default=20, metavar="N", help="passes over the digits")
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="digits in a step of a trainer")
    parser.add_argument("--learning-rate", type=rate, default=0.0015, metavar="RATE", help="of NAdam")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the split, the weights and the order of the digits")
    parser.add_argument("--accuracy", type=share, default=95.0, metavar="PERCENT", help="of held-out digits to read right")
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), metavar="FILE", help="where to draw the loss curve")
    parser.set_defaults(command=demo)


def demo(options: argparse.Namespace) -> int:
    """Runs the job; returns the exit code: 0, 1 (it failed, or learned too little), 2 (it cannot run here), 130 (interrupted)."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    obstacle = _obstacle(options.plot)
    if obstacle:
        return _fail(obstacle, _UNUSABLE)
    job = Job(options.epochs, options.batch_size, options.learning_rate, options.seed)
    console.print(f"A parameter server and {job.trainers} trainers learn to read digits; {options.backend} carries the calls.")
    # The processes that it ends are not worth a line each: what ended the job is printed below.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    began = time.monotonic()
    try:
        epochs = _train(job, options.backend, console)
    except KeyboardInterrupt:
        return _fail("interrupted; all processes have ended", _INTERRUPTED)
    except ProcessException as error:
        return _fail(_explain(error), 1)
    console.print(f"Trained in {time.monotonic() - began:.1f} s, the start of the processes included.")
    return _conclude(epochs, options, console)


def _conclude(epochs: list[EpochDone], options: argparse.Namespace, console: Console) -> int:
    from zmqagent.cli.plot import plot

    target = options.accuracy / 100
    title = f"Digits over {options.backend}: one parameter server, {len(epochs[0].losses)} trainers"
    try:
        plot(epochs, target, title, options.plot)
    except OSError as error:
        return _fail(f"the picture cannot be written: {error}", 1)
    console.print(f"The loss curve is in {options.plot.resolve()}")
    reached = epochs[-1].accuracy
    verdict = f"read {reached:.1%} of the {training.HELD_OUT} held-out digits right; asked were {target:.1%}"
    if reached < target:
        return _fail(f"too little was learned: {verdict}", 1)
    console.print(f"Success: {verdict}.", style="green")
    return 0


def _train(job: Job, backend: str, console: Console) -> list[EpochDone]:
    to_train, _ = training.load_digits(job.seed)
    steps = job.epochs * job.trainers * training.steps_in_epoch(job, len(to_train.labels))
    reports: Any = multiprocessing.get_context("spawn").Queue()
    epochs: list[EpochDone] = []
    with tempfile.TemporaryDirectory(prefix="zmqagent-demo-") as directory:
        processes = _spawn(job, backend, directory, reports)
        try:
            with Display(console, job.epochs, steps) as display:
                for report in _listen(processes, reports):
                    display.show(report)
                    if isinstance(report, EpochDone):
                        epochs.append(report)
        finally:
            _end(processes)
    return epochs


def _spawn(job: Job, backend: str, directory: str, reports: Any) -> ProcessContext:
    # ^C on a terminal goes to every process. Until `_work` says otherwise the children keep it waiting, or it would interrupt
    # their imports, each with a traceback of its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        processes: ProcessContext = torch.multiprocessing.spawn(
            _work, args=(job, backend, f"file://{directory}/rendezvous", reports), nprocs=1 + job.trainers, join=False
        )
        return processes
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _work(rank: int, job: Job, backend_name: str, init_method: str, reports: Any) -> None:
    """One process of the job. Rank 0 is the server; the trainers wait for its calls until all is done."""
    # Ends the process at once, wherever it waits; it comes by ^C, and also when the parent dies (torch's spawn arranges that).
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # What torch says of its own code, as TENSORPIPE starts and of optimizers without TorchScript: nothing a user could act on.
    warnings.filterwarnings("ignore", message="You are using a Backend")
    logging.getLogger("torch.distributed.optim").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    backend = rpc.BackendType[backend_name]
    rpc.init_rpc(
        "server" if rank == 0 else training.trainer_name(rank - 1),
        backend=backend,
        rank=rank,
        world_size=1 + job.trainers,
        rpc_backend_options=rpc.backend_registry.construct_rpc_backend_options(backend, init_method=init_method),
    )
    if rank == 0:
        training.serve(job, reports.put)
    rpc.shutdown()


def _listen(processes: ProcessContext, reports: Any) -> Iterator[Report]:
    """Yields reports until all processes have ended well.

    Raises:
        ProcessException: a process failed or died; the others have been ended.
    """
    ended = False
    while True:
        try:
            yield reports.get(timeout=0 if ended else 0.1)
        except queue.Empty:
            if ended:
                return
            # What a process put into the queue is in there before it ends.
            ended = processes.join(timeout=0)


def _end(processes: ProcessContext) -> None:
    for process in processes.processes:
        if process.is_alive():
            process.terminate()
    for process in processes.processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _obstacle(path: Path) -> str:
    """Why the job cannot run here, or its picture cannot be written to ``path``; empty if both can."""
    modules = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        return f"the demo needs {' and '.join(missing)}: pip install 'zmqagent[demo]'"
    from zmqagent.cli.pictures import undrawable

    return undrawable(path)


def _explain(error: ProcessException) -> str:
    name = "server" if error.error_index == 0 else training.trainer_name(error.error_index - 1)
    return f"{name} failed; the others have been ended: {error.msg.strip()}"


def _fail(message: str, code: int) -> int:
    print(f"zmqagent demo: {message}", file=sys.stderr)
    return code
