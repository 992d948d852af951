"""What torch's legacy profiler records, in a form that can be built, sent and merged.

torch's own records (``ProfilerEvent``) can be read from Python, but neither built nor pickled. A `Record` answers the same
questions and so passes for one in torch's parser of records. Its times count from the epoch, as torch's do inside, so that
records of several profilers and several workers fit together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from zmqagent.exceptions import ProtocolError

__all__ = ["REMOTE_PREFIX", "Record", "Values", "from_remote", "from_torch", "pack", "started_by", "unpack"]

REMOTE_PREFIX = "#remote_op: "
"""Stands between the name of a call and the name of what it did on the callee, as in torch."""

_START = "__start_profile"
_MARK = "mark"


class Values(NamedTuple):
    """What a record says. Durations are in the unit that the name tells, memory in bytes."""

    kind: str
    """"push" and "pop" begin and end an event; "memory_alloc"; "mark"."""
    name: str
    thread_id: int
    """torch's own number of the thread."""
    handle: int
    """Ties a pop to its push, together with ``node_id``."""
    node_id: int
    """The worker, -1 if the process was none."""
    cpu_ns: int
    is_async: bool = False
    fwd_thread_id: int = 0
    scope: int = 0
    sequence_nr: int = -1
    flops: int = 0
    cpu_memory: int = 0
    cuda_memory: int = 0
    device: int = -1
    """The accelerator that ``cuda_us`` was measured on, -1 for none."""
    cuda_us: float = 0.0
    """Time since the first record of the same profiler on the same accelerator."""
    shapes: tuple[tuple[int, ...], ...] = ()
    stack: tuple[str, ...] = ()


_TYPES = [str, str, int, int, int, int, bool, int, int, int, int, int, int, int, float, tuple, tuple]


@dataclass(frozen=True, slots=True)
class Record:
    """Passes for torch's ``ProfilerEvent`` where torch turns records into events; the methods are torch's."""

    values: Values
    remote: bool = False

    def kind(self) -> str:
        return self.values.kind

    def name(self) -> str:
        return self.values.name

    def thread_id(self) -> int:
        return self.values.thread_id

    def fwd_thread_id(self) -> int:
        return self.values.fwd_thread_id

    def handle(self) -> int:
        return self.values.handle

    def node_id(self) -> int:
        return self.values.node_id

    def is_remote(self) -> bool:
        return self.remote

    def is_async(self) -> bool:
        return self.values.is_async

    def scope(self) -> int:
        return self.values.scope

    def sequence_nr(self) -> int:
        return self.values.sequence_nr

    def flops(self) -> int:
        return self.values.flops

    def shapes(self) -> list[list[int]]:
        return [list(shape) for shape in self.values.shapes]

    def stack(self) -> list[str]:
        return list(self.values.stack)

    def start_us(self) -> float:
        return self.values.cpu_ns / 1000

    def cpu_elapsed_us(self, other: Record) -> float:
        """From this record to ``other``."""
        return (other.values.cpu_ns - self.values.cpu_ns) / 1000

    def cpu_memory_usage(self) -> int:
        return self.values.cpu_memory

    def has_cuda(self) -> bool:
        return self.values.device >= 0

    def device(self) -> int:
        return self.values.device

    def cuda_elapsed_us(self, other: Record) -> float:
        """From this record to ``other`` of the same event."""
        return other.values.cuda_us - self.values.cuda_us

    def cuda_memory_usage(self) -> int:
        return self.values.cuda_memory


Records = list[list[Record]]
"""One list a thread, as torch has them."""


def started_by(lists: Sequence[Sequence[Any]]) -> Any:
    """The record that marks the profiler's start; every result of torch's has one."""
    return next(event for event in itertools.chain.from_iterable(lists) if event.name() == _START)


def from_torch(lists: Sequence[Sequence[Any]]) -> Records:
    """torch's records, as one profiler returned them, as `Record`."""
    start = started_by(lists)
    start_ns = round(start.start_us() * 1000)
    first_on: dict[int, Any] = {}

    def convert(event: Any) -> Record:
        device, cuda_us = -1, 0.0
        if event.has_cuda():
            device = event.device()
            cuda_us = first_on.setdefault(device, event).cuda_elapsed_us(event)
        return Record(
            Values(
                kind=event.kind(),
                name=event.name(),
                thread_id=event.thread_id(),
                handle=event.handle(),
                node_id=event.node_id(),
                cpu_ns=start_ns + round(start.cpu_elapsed_us(event) * 1000),
                is_async=event.is_async(),
                fwd_thread_id=event.fwd_thread_id(),
                scope=event.scope(),
                sequence_nr=event.sequence_nr(),
                flops=event.flops(),
                cpu_memory=event.cpu_memory_usage(),
                cuda_memory=event.cuda_memory_usage(),
                device=device,
                cuda_us=cuda_us,
                shapes=tuple(map(tuple, event.shapes())),
                stack=tuple(event.stack()),
            ),
            event.is_remote(),
        )

    return [[convert(event) for event in events] for events in lists]


def from_remote(lists: Records, call: str, began_ns: int, ended_ns: int) -> Records:
    """What a callee recorded, as it is shown at the caller: under the name of the ``call``, which lasted from ``began_ns`` to
    ``ended_ns``.

    If the records lie outside of the call, the clocks of the two hosts disagree, and the records are moved to its middle.
    """
    times = [record.values.cpu_ns for record in itertools.chain.from_iterable(lists)]
    shift = 0
    if times and not began_ns <= min(times) <= max(times) <= ended_ns:
        shift = (began_ns + ended_ns - min(times) - max(times)) // 2

    def convert(values: Values) -> Record:
        name = f"{call}{REMOTE_PREFIX}{values.name}" if values.name else ""
        return Record(values._replace(name=name, cpu_ns=values.cpu_ns + shift), remote=True)

    return [[convert(record.values) for record in records] for records in lists]


def pack(lists: Records) -> bytes:
    """What travels of records: no marks, which mean nothing to another profiler."""
    values = [[record.values for record in records if record.values.kind != _MARK] for records in lists]
    packed: bytes = msgpack.packb(values, unicode_errors="surrogatepass")
    return packed


def unpack(packed: Any) -> Records:
    """The records in a buffer that `pack` made.

    Raises:
        ProtocolError: these are none.
    """
    try:
        lists = msgpack.unpackb(packed, use_list=False, unicode_errors="surrogatepass")
    except (ValueError, RecursionError) as error:
        # All of msgpack's own errors are ValueErrors.
        raise ProtocolError(f"the records of a profiled call are no valid msgpack: {error}") from error
    if type(lists) is not tuple or not all(type(records) is tuple for records in lists):
        raise ProtocolError(f"the records of a profiled call come in lists, {lists!r:.100} arrived")
    return [[Record(_checked(values), remote=True) for values in records] for records in lists]


def _checked(values: Any) -> Values:
    if type(values) is not tuple or list(map(type, values)) != _TYPES:
        raise ProtocolError(f"a record of a profiled call does not fit {Values._fields}: {values!r:.200}")
    record = Values(*values)
    are_shapes = all(type(shape) is tuple and {*map(type, shape)} <= {int} for shape in record.shapes)
    if not are_shapes or {*map(type, record.stack)} - {str}:
        raise ProtocolError(f"a record of a profiled call has shapes and a stack, but {values!r:.200} arrived")
    return record
