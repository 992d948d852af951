"""The rows of the benchmark: which workloads, how many operations a slice, and what is taken down of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from zmqagent.cli.bench import workloads

__all__ = ["AT_THE_END", "FLOORS", "ROWS", "SECTIONS", "Metric", "Row"]

SECTIONS = ("time of a call", "calls a second", "tensors", "training", "cost")
"""Of the metrics, in the order of tables."""

_TIMES, _RATES, _TENSORS, _TRAINING, _COST = SECTIONS
_FLOORS = "floors"


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        key: what machine-readable results and targets call it.
        title: what tables call it.
        unit: of its values.
        section: which part of a table it belongs to; one of `SECTIONS` or ``floors``.
        more_is_better: whether a higher value is the better one.
    """

    key: str
    title: str
    unit: str
    section: str
    more_is_better: bool = False

    @property
    def titled(self) -> str:
        """The title and the unit, if there is one."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Row:
    """A workload, and what is taken down of each of its slices.

    Attributes:
        key: what the command line calls it.
        workload: run by the caller with the number of operations; returns figures by name. What follows the last dot of a
            metric's key is such a name, or ``cpu``: microseconds of processor time an operation, of both workers together.
        count: operations in a slice.
        quick: the same in a quick run; 0 leaves the row out.
        metrics: the figures that are kept.
    """

    key: str
    workload: Callable[[int], Mapping[str, float]]
    count: int
    quick: int
    metrics: tuple[Metric, ...]


def _latency(key: str, title: str, workload: Callable[[int], Mapping[str, float]], *more: Metric) -> Row:
    p50 = Metric(f"{key}.p50", f"{title}, p50", "µs", _TIMES)
    p99 = Metric(f"{key}.p99", f"{title}, p99", "µs", _TIMES)
    return Row(key, workload, 300, 30, (p50, p99, *more))


def _bandwidth(key: str, megabytes: int, workload: Callable[[int, int], Mapping[str, float]], count: int, quick: int) -> Row:
    metric = Metric(f"{key}-{megabytes}.bandwidth", f"{key}, {megabytes} MB", "GB/s", _TENSORS, more_is_better=True)
    return Row(f"{key}-{megabytes}", partial(workload, megabytes), count, quick, (metric,))


def _training(key: str, title: str, with_optimizer: bool) -> Row:
    return Row(key, partial(workloads.train, with_optimizer), 30, 3, (Metric(f"{key}.step", title, "ms", _TRAINING),))


_SIZES = ((1, 20, 4), (16, 5, 2), (64, 3, 0), (256, 1, 0))
"""Of the tensors: MB, how many in a slice, how many in a slice of a quick run."""

ROWS: tuple[Row, ...] = (
    _latency("noop", "no-op call", workloads.no_op, Metric("noop.cpu", "no-op call, CPU of both workers", "µs", _COST)),
    _latency("builtin", "builtin operator", workloads.builtin_operator),
    _latency("echo-4k", "echo of 4 KB", workloads.small_echo),
    _latency("remote", "remote + to_here", workloads.remote_to_here),
    Row(
        "async",
        workloads.asynchronous,
        1000,
        100,
        (
            Metric("async.rate", "asynchronous calls", "1/s", _RATES, more_is_better=True),
            Metric("async.cpu", "asynchronous call, CPU of both workers", "µs", _COST),
        ),
    ),
    Row(
        "threads",
        partial(workloads.from_threads, 4),
        1000,
        100,
        (Metric("threads.rate", "calls from four threads", "1/s", _RATES, more_is_better=True),),
    ),
    *(_bandwidth("push", megabytes, workloads.push, count, quick) for megabytes, count, quick in _SIZES),
    *(_bandwidth("echo", megabytes, workloads.echo, count, quick) for megabytes, count, quick in _SIZES),
    _training("train", "forward + distributed backward", with_optimizer=False),
    _training("train-step", "the same + DistributedOptimizer.step", with_optimizer=True),
)
"""Measured in slices that alternate between the contenders, round after round."""

AT_THE_END: tuple[Metric, ...] = (
    Metric("memory.peak", "peak memory of both workers", "MB", _COST),
    Metric("idle.cpu", "CPU of a worker that waits", "%", _COST),
)
"""Measured once, when all rounds are over."""

FLOORS: tuple[Metric, ...] = (
    Metric("floor.socket", "Unix socket, there and back", "µs", _FLOORS),
    Metric("floor.zmq", "bare ZeroMQ over ipc, there and back", "µs", _FLOORS),
    Metric("floor.memcpy", "copy of 64 MB into warm memory", "GB/s", _FLOORS, more_is_better=True),
    Metric("floor.shared-memory", "copy of 64 MB into warm shared memory", "GB/s", _FLOORS, more_is_better=True),
)
"""What the machine itself can do, measured in every round by two processes without torch's RPC."""
