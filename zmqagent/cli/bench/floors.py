"""What the machine itself can do: messages between two processes, and copies of memory, without any RPC.

Two processes measure it. One listens and gives back what it gets, the other one counts the time. Times are in microseconds,
GB are 2**30 bytes.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import zmq
from torch import Tensor

from zmqagent.cli.bench.process import Process, answers
from zmqagent.cli.bench.statistics import percentile

__all__ = ["Floors", "running_floors"]

_MESSAGE = bytes(64)
_COPIED = 64 * 2**20
_GB = 2**30


class Floors:
    """The two processes, ready to measure."""

    def __init__(self, caller: Process, echo: Process, directory: Path) -> None:
        self._caller = caller
        self._echo = echo
        self._directory = directory
        self._echo.ask(_listen, directory)
        answers([echo])

    def measure(self, round_trips: int, copies: int) -> dict[str, float]:
        """One slice of each floor, by the last part of its key.

        Raises:
            ProcessFailed: one of the processes raised or died.
        """
        return {
            "socket": self._between(_call_over_socket, _serve_socket, round_trips),
            "zmq": self._between(_call_over_zmq, _serve_zmq, round_trips),
            "memcpy": self._alone(_copy, copies),
            "shared-memory": self._alone(_copy_to_shared_memory, copies),
        }

    def _between(self, call: Callable[[Path, int], float], serve: Callable[[Path, int], None], count: int) -> float:
        self._echo.ask(serve, self._directory, count)
        self._caller.ask(call, self._directory, count)
        microseconds, _ = answers([self._caller, self._echo])
        return float(microseconds)

    def _alone(self, measure: Callable[[int], float], count: int) -> float:
        self._caller.ask(measure, count)
        return float(answers([self._caller])[0])


@contextmanager
def running_floors(directory: Path) -> Iterator[Floors]:
    """The two processes; their sockets lie in ``directory``, a private one.

    Raises:
        ProcessFailed: one of them could not start.
    """
    with ExitStack() as ending:
        caller, echo = Process("the caller without RPC"), Process("the server without RPC")
        ending.callback(caller.end, patience=0)
        ending.callback(echo.end, patience=0)
        yield Floors(caller, echo, directory)


def _listen(directory: Path) -> None:
    _socket_listener(directory)
    _zmq_listener(directory)


@functools.cache
def _socket_listener(directory: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{directory}/socket")
    listener.listen()
    return listener


@functools.cache
def _accepted_socket(directory: Path) -> socket.socket:
    return _socket_listener(directory).accept()[0]


@functools.cache
def _connected_socket(directory: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(f"{directory}/socket")
    return connected


@functools.cache
def _zmq_listener(directory: Path) -> zmq.SyncSocket:
    listener: zmq.SyncSocket = zmq.Context.instance().socket(zmq.PAIR)
    listener.bind(f"ipc://{directory}/zmq")
    return listener


@functools.cache
def _connected_zmq(directory: Path) -> zmq.SyncSocket:
    connected: zmq.SyncSocket = zmq.Context.instance().socket(zmq.PAIR)
    connected.connect(f"ipc://{directory}/zmq")
    return connected


def _serve_socket(directory: Path, count: int) -> None:
    accepted = _accepted_socket(directory)
    for _ in range(count):
        accepted.sendall(accepted.recv(len(_MESSAGE), socket.MSG_WAITALL))


def _call_over_socket(directory: Path, count: int) -> float:
    connected = _connected_socket(directory)

    def there_and_back() -> None:
        connected.sendall(_MESSAGE)
        connected.recv(len(_MESSAGE), socket.MSG_WAITALL)

    return _median_seconds(there_and_back, count) * 1e6


def _serve_zmq(directory: Path, count: int) -> None:
    listener = _zmq_listener(directory)
    for _ in range(count):
        listener.send(listener.recv())


def _call_over_zmq(directory: Path, count: int) -> float:
    connected = _connected_zmq(directory)

    def there_and_back() -> None:
        connected.send(_MESSAGE)
        connected.recv()

    return _median_seconds(there_and_back, count) * 1e6


@functools.cache
def _source() -> Tensor:
    return torch.ones(_COPIED, dtype=torch.uint8)


@functools.cache
def _private() -> Tensor:
    return torch.ones(_COPIED, dtype=torch.uint8)


@functools.cache
def _shared() -> Tensor:
    descriptor = os.memfd_create("floor")
    os.ftruncate(descriptor, _COPIED)
    shared = torch.frombuffer(mmap.mmap(descriptor, _COPIED), dtype=torch.uint8)
    os.close(descriptor)
    return shared.fill_(1)


def _copy(count: int) -> float:
    return _copied_per_second(_private(), count)


def _copy_to_shared_memory(count: int) -> float:
    return _copied_per_second(_shared(), count)


def _copied_per_second(target: Tensor, count: int) -> float:
    source = _source()
    torch.set_num_threads(1)
    return _COPIED / _GB / _median_seconds(lambda: target.copy_(source), count)


def _median_seconds(call: Callable[[], object], count: int) -> float:
    clock = time.perf_counter
    seconds = []
    for _ in range(count):
        began = clock()
        call()
        seconds.append(clock() - began)
    return percentile(seconds, 0.5)
