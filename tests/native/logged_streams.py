"""The fake device with streams and events that torch's own code sees, and what comes behind what on them.

`build` compiles logging_guard.cpp, which takes a C++ compiler and a few seconds; `install` loads it into a process.
`work_behind` reads its log as the device would: an event brings the work before it to every stream that waits for it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

from tests.support import fake_device

__all__ = ["build", "install", "note_use", "note_work", "take_log", "uses_memory", "work_behind"]

_SOURCE = Path(__file__).with_name("logging_guard.cpp")
_TORCH = Path(torch.__file__).parent

_library: ctypes.CDLL
_operators = torch.library.Library("aten", "IMPL")


def build(directory: Path) -> str:
    """Compiles the guard; the path for `install`."""
    target = directory / "logging_guard.so"
    torchs = [f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}"]
    command = ["c++", "-std=c++20", "-shared", "-fPIC", *torchs, str(_SOURCE), "-o", str(target), "-lc10"]
    subprocess.run(command, check=True, timeout=100)
    return str(target)


def install(path: str) -> None:
    """Gives this process the fake device, with streams, for good."""
    global _library
    fake_device.install()
    _library = ctypes.CDLL(path)
    _library.take_log.restype = ctypes.c_char_p
    _library.install_guard()
    _operators.impl("record_stream", lambda tensor, stream: _add(f"use {_name(stream)}"), "PrivateUse1")
    fake_device.on_copy(_note_copy)


def _add(line: str) -> None:
    _library.add_line(line.encode())


def _name(stream: torch.Stream) -> str:
    return f"{stream.device_index}/{stream.stream_id}"


def _current(device: torch.device) -> str:
    return _name(torch.accelerator.current_stream(device))


def _note_copy(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Notes a copy as work of the stream that it was given to."""
    device = source.device if destination.device.type == "cpu" else destination.device
    which = "out" if device == source.device else "in"
    _add(f"work copy-{which} {_current(device)}")


def note_work(name: str, device: str) -> None:
    """Notes that the current stream of ``device`` is given some work."""
    _add(f"work {name} {_current(torch.device(device))}")


def note_use(name: str, device: str) -> None:
    """Notes that work given to the current stream of ``device`` uses what came before."""
    _add(f"used {name} {_current(torch.device(device))}")


def take_log() -> list[str]:
    """The log so far; it is empty afterwards."""
    log: bytes = _library.take_log()
    return log.decode().splitlines()


def work_behind(log: list[str], use: str) -> set[str]:
    """What was done before the use that was noted as ``use``, by the orders given to streams alone."""
    done: defaultdict[str, set[str]] = defaultdict(set)
    before: dict[str, set[str]] = {}
    for line in log:
        what, name, *stream = line.split()
        if what == "work":
            done[stream[0]].add(name)
        elif what == "record":
            before[name] = set(done[stream[0]])
        elif what == "wait":
            done[stream[0]] |= before.get(name, set())
        elif what == "used" and name == use:
            return done[stream[0]]
    raise AssertionError(f"nothing was noted as {use!r} in {log}")


def uses_memory(log: list[str], use: str) -> bool:
    """Whether the allocator was told of the stream on which ``use`` was noted."""
    (stream,) = [line.split()[2] for line in log if line.startswith(f"used {use} ")]
    return f"use {stream}" in log
