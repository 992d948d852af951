"""What can be compared: the ZMQ backend under different options, and torch's own. To add one is to add a line to a table.

A leaf of the tool: says what the contenders are called and which options make them, and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["REFERENCES", "VARIANTS", "Contender"]


@dataclass(frozen=True)
class Contender:
    """A backend with certain options.

    Attributes:
        name: what the command line calls it.
        label: what tables and pictures call it.
        backend: the name of the ``BackendType``.
        options: keyword arguments of the backend's options, ``init_method`` apart.
        spins: whether its workers look for messages without a pause, and so take processor time from whoever runs beside them.
        mb_a_peer: the memory in MB that a worker takes from the machine for each worker that it has talked with.
    """

    name: str
    label: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spins: bool = False
    mb_a_peer: float = 0


def _by_name(*contenders: Contender) -> dict[str, Contender]:
    return {contender.name: contender for contender in contenders}


VARIANTS = _by_name(
    Contender("auto", "ZMQ", "ZMQ"),
    Contender("no-shared-memory", "ZMQ, no shared memory", "ZMQ", {"shared_memory": 0}),
    Contender("local", "ZMQ local", "ZMQ", {"transport": "local"}),
    Contender("ipc", "ZMQ ipc", "ZMQ", {"transport": "ipc"}),
    Contender("tcp", "ZMQ tcp", "ZMQ", {"transport": "tcp"}),
)
"""The ZMQ backend; ``auto`` is what a user gets who chooses nothing."""

REFERENCES = _by_name(
    # Between workers of one host it reads rings in shared memory, of 8 MB each way, in a loop that only yields.
    Contender("TENSORPIPE", "TENSORPIPE", "TENSORPIPE", spins=True, mb_a_peer=16),
    # What TensorPipe has left between two hosts: TCP, without its ways through the memory that processes of one host share.
    Contender("TENSORPIPE:uv", "TENSORPIPE uv", "TENSORPIPE", {"_transports": ["uv"], "_channels": ["mpt_uv", "basic"]}),
)
"""torch's own backend."""
