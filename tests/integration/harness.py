"""Runs functions on the ranks of a group, each in a process of its own, and brings back what they return or raise.

A rank is forked from a server process that has imported torch and this package, started no thread and run nothing, so that a
group stands within tenths of a second. Each run has a deadline: who is not done by then leaves its stacks and is killed. ::

    results = run_ranks(function, 3)                # function(rank, meeting_point) on each rank
    value = on_group(function, world_size=2)        # function() on rank 0 of a group that runs; the others serve
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["RankError", "on_group", "run_ranks", "worker"]

_ROOT = str(Path(__file__).parents[2])
_TIME_TO_DUMP_S = 1.0
_TIME_AFTER_TROUBLE_S = 1.0
DEADLINE_S = 40.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.integration.preload"])


class RankError(AssertionError):
    """A rank raised, died or hung; the text holds its traceback or its stacks, and what it wrote."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, deadline: float = DEADLINE_S, dying: Collection[int] = ()
) -> list[Any]:
    """What ``function(rank, meeting_point, *args)`` returned on each rank; None for the ranks in ``dying``, which may be killed.

    Raises:
        RankError: a rank raised, died unexpectedly, or was not done after ``deadline`` seconds.
    """
    # Short: sockets may be made in here, and the path of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="zi") as directory:
        ranks = [_Rank(function, rank, Path(directory), args, deadline) for rank in range(world_size)]
        try:
            _watch(ranks, time.monotonic() + deadline, dying)
        finally:
            for rank in ranks:
                rank.kill()
        troubles = [rank.trouble for rank in ranks if rank.trouble and rank.number not in dying]
        if troubles:
            raise RankError("\n".join(troubles))
        return [rank.result for rank in ranks]


def _watch(ranks: list[_Rank], end: float, dying: Collection[int]) -> None:
    """Waits for all ranks; once one is in trouble, the others get little more time, since they may wait for it."""
    waiting = {rank.connection: rank for rank in ranks}
    while waiting:
        left = max(0.0, end - time.monotonic())
        ready = multiprocessing.connection.wait(list(waiting), timeout=left + _TIME_TO_DUMP_S)
        if not ready:
            for rank in waiting.values():
                rank.give_up()
            return
        for rank in [waiting.pop(connection) for connection in ready]:
            rank.take_result(end)
            if rank.trouble and rank.number not in dying:
                end = min(end, time.monotonic() + _TIME_AFTER_TROUBLE_S)


def on_group(function: Callable[..., Any], *args: Any, world_size: int = 2, deadline: float = DEADLINE_S, **options: Any) -> Any:
    """What ``function(*args)`` returned on worker0 of a running group, whose other workers serve until it is over."""
    return run_ranks(partial(_lead_or_serve, function, world_size, args, options), world_size, deadline=deadline)[0]


def _lead_or_serve(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], options: dict[str, Any], rank: int, meeting_point: str
) -> Any:
    with worker(rank, world_size, meeting_point, **options):
        return function(*args) if rank == 0 else None


@contextlib.contextmanager
def worker(
    rank: int, world_size: int, meeting_point: str, *, name: str = "", backend: str = "ZMQ", **options: Any
) -> Iterator[None]:
    """A worker of a group that meets at ``meeting_point``, shut down together with the others if the body does not raise.

    Leaked RRefs are errors.
    """
    import torch.distributed.rpc as rpc

    import zmqagent  # noqa: F401

    rpc.api._ignore_rref_leak = False
    chosen = rpc.BackendType[backend]
    rpc.init_rpc(
        name or f"worker{rank}",
        backend=chosen,
        rank=rank,
        world_size=world_size,
        rpc_backend_options=rpc.backend_registry.construct_rpc_backend_options(chosen, init_method=meeting_point, **options),
    )
    yield
    rpc.shutdown()


class _Rank:
    """One process, watched from outside."""

    def __init__(
        self, function: Callable[..., Any], number: int, directory: Path, args: tuple[Any, ...], deadline: float
    ) -> None:
        self.number = number
        self.result: Any = None
        self.trouble = ""
        self._log = directory / f"rank{number}.log"
        self.connection, theirs = _server.Pipe(duplex=False)
        self._process = _server.Process(
            target=_live, args=(function, number, f"file://{directory}/meet", args, str(self._log), theirs, deadline), daemon=True
        )
        with _root_on_pythonpath():
            self._process.start()
        theirs.close()

    def give_up(self) -> None:
        """Notes that the rank is not done."""
        self.trouble = self._tell("is still running")

    def take_result(self, end: float) -> None:
        """Takes what the rank has sent, or the fact that it died."""
        try:
            self.result, trouble = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self._process.join(_TIME_TO_DUMP_S)
            trouble = f"died with exit code {self._process.exitcode}"
        if trouble:
            self.trouble = self._tell(trouble)
            return
        # Leaving takes no time, unless threads that are no daemons were left behind.
        self._process.join(max(0.0, end - time.monotonic()))
        if self._process.exitcode != 0:
            self.trouble = self._tell(f"returned, but its process ended with {self._process.exitcode}")

    def _tell(self, trouble: str) -> str:
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        return f"rank {self.number} {trouble}\n--- what rank {self.number} wrote:\n{log}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()


@contextlib.contextmanager
def _root_on_pythonpath() -> Iterator[None]:
    # The server, started with the first rank, finds what it preloads by this variable alone.
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _ROOT if former is None else f"{_ROOT}{os.pathsep}{former}"
    try:
        yield
    finally:
        if former is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = former


def _live(
    function: Callable[..., Any],
    rank: int,
    meeting_point: str,
    args: tuple[Any, ...],
    log: str,
    connection: Connection,
    deadline: float,
) -> None:
    """A rank's life."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(max(deadline, _TIME_TO_DUMP_S), file=sys.__stderr__)
    try:
        answer = pickle.dumps((function(rank, meeting_point, *args), ""))
    except BaseException:
        answer = pickle.dumps((None, f"raised\n{traceback.format_exc()}"))
        connection.send_bytes(answer)
        # An agent may still run, and would keep this process alive.
        os._exit(1)
    connection.send_bytes(answer)
    faulthandler.cancel_dump_traceback_later()
