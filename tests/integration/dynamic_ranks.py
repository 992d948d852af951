"""Ranks of dynamic groups: they tell each other how far they are by files, so that no RPC is needed for it."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

import zmqagent

__all__ = ["PATIENCE_S", "Stage", "add", "die", "free_port", "join", "names", "train"]

PATIENCE_S = 30.0


class Stage:
    """What the ranks have reached; each mark is an empty file."""

    def __init__(self, meeting_point: str) -> None:
        self._directory = Path(urlparse(meeting_point).path).parent

    def reach(self, mark: str) -> None:
        """Says that ``mark`` is reached."""
        (self._directory / mark).touch()

    def wait(self, *marks: str) -> None:
        """Waits until all ``marks`` are reached."""
        deadline = time.monotonic() + PATIENCE_S
        while not all((self._directory / mark).exists() for mark in marks):
            assert time.monotonic() < deadline, f"{marks} was not reached"
            time.sleep(0.002)


def join(rank: int, meeting_point: str, name: str = "", **options: Any) -> None:
    """Joins the group as ``worker<rank>``."""
    options.setdefault("rpc_timeout", 20)
    rpc.init_rpc(
        name or f"worker{rank}",
        backend=rpc.BackendType.ZMQ,
        rank=rank,
        rpc_backend_options=zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, **options),
    )


def add(x: Any, y: Any) -> Any:
    return x + y


def names() -> list[str]:
    return [info.name for info in rpc.api._get_current_rpc_agent().get_worker_infos()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(worker: str) -> float:
    """The gradient of 3x, computed by ``worker``."""
    with dist_autograd.context() as context:
        x = torch.ones(1, requires_grad=True)
        dist_autograd.backward(context, [rpc.rpc_sync(worker, torch.mul, args=(x, 3.0)).sum()])
        return float(dist_autograd.get_gradients(context)[x].item())
