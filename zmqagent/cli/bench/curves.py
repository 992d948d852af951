"""The curves: what grows, at which points it is measured, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from zmqagent.cli.bench import growth_workloads, observed, workloads
from zmqagent.cli.bench.group import Group
from zmqagent.cli.bench.rows import Metric
from zmqagent.cli.bench.workloads import MB

__all__ = ["CURVES", "Curve"]

_CALLS_IN_A_SLICE = 960
_MEMORY_STEP = 20_000


@dataclass(frozen=True)
class Curve:
    """Something that grows, and what is measured meanwhile.

    Attributes:
        key: what the command line calls it.
        title: what tables call it.
        points: what grows: its values, in growing order.
        quick: the same in a quick run.
        metrics: what is measured; what follows the last dot of a metric's key is a name that ``measure`` gives a figure.
        measure: measures a running group at a point.
        of_groups: whether the points are sizes of the group, so that each needs one of its own; otherwise there are two workers.
        repeats: whether points are measured in several rounds; a curve over what accumulates has one.
    """

    key: str
    title: str
    points: tuple[int, ...]
    quick: tuple[int, ...]
    metrics: tuple[Metric, ...]
    measure: Callable[[Group, int], Mapping[str, float]]
    of_groups: bool = False
    repeats: bool = True


def _by_caller(workload: Callable[[int], Mapping[str, float]]) -> Callable[[Group, int], Mapping[str, float]]:
    """A measurement that the caller makes by itself."""

    def measure(group: Group, point: int) -> Mapping[str, float]:
        measured: Mapping[str, float] = group.call(workload, point)
        return measured

    return measure


def _threads(group: Group, callers: int) -> dict[str, float]:
    measured: dict[str, float] = group.call(workloads.from_threads, callers, _CALLS_IN_A_SLICE)
    return measured


def _memory(group: Group, calls: int) -> dict[str, float]:
    group.call(growth_workloads.in_flight, _MEMORY_STEP if calls >= _MEMORY_STEP else calls)
    return {"memory": sum(group.observe(observed.memory_mb))}


def _group(group: Group, size: int) -> dict[str, float]:
    """Of a group in which every worker has called every other: means over the workers, but for times those of the slowest."""
    first_calls = max(group.everywhere(growth_workloads.call_all, size))
    return {
        "init": group.init_seconds,
        "first-calls": first_calls,
        "files": fmean(group.observe(observed.open_files)),
        "threads": fmean(group.observe(observed.threads)),
        "memory": fmean(group.observe(observed.memory_mb)),
    }


CURVES: tuple[Curve, ...] = (
    Curve(
        "threads",
        "threads that call",
        (1, 2, 4, 8, 16, 32, 64),
        (1, 4),
        (
            Metric("threads.rate", "calls", "1/s", "growth", more_is_better=True),
            Metric("threads.p50", "time of a call, p50", "µs", "growth"),
        ),
        _threads,
    ),
    Curve(
        "payload",
        "bytes there and back",
        (0, 2**10, 2**12, 2**16, 2**18, MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB),
        (0, 2**12, MB),
        (Metric("payload.time", "time of an echo", "ms", "growth"),),
        _by_caller(growth_workloads.payload),
    ),
    Curve(
        "group",
        "workers, each having called all",
        (2, 4, 8, 16, 24, 32),
        (2, 3),
        (
            Metric("group.init", "init_rpc, slowest worker", "s", "growth"),
            Metric("group.first-calls", "first calls to all, slowest worker", "s", "growth"),
            Metric("group.files", "open files of a worker", "", "growth"),
            Metric("group.threads", "threads of a worker", "", "growth"),
            Metric("group.memory", "memory of a worker", "MB", "growth"),
        ),
        _group,
        of_groups=True,
    ),
    Curve(
        "references",
        "live RRefs",
        (1, 10, 100, 1_000, 10_000, 100_000),
        (1, 100),
        (
            Metric("references.create", "creation of an RRef", "µs", "growth"),
            Metric("references.delete", "deletion of an RRef", "µs", "growth"),
        ),
        _by_caller(growth_workloads.references),
    ),
    Curve(
        "graph",
        "nodes of the local graph",
        (10, 100, 1_000, 10_000),
        (10, 100),
        (
            Metric("graph.time", "backward, with one remote call", "ms", "growth"),
            Metric("graph.plain", "backward, all local", "ms", "growth"),
            Metric("graph.overhead", "backward, the distributed one over the local", "x", "growth"),
        ),
        _by_caller(growth_workloads.graph),
    ),
    Curve(
        "memory",
        "calls made, 64 in flight",
        tuple(range(_MEMORY_STEP, 10 * _MEMORY_STEP + 1, _MEMORY_STEP)),
        (500, 1_000),
        (Metric("memory.memory", "memory of both workers", "MB", "growth"),),
        _memory,
        repeats=False,
    ),
)
