"""Runs the benchmark: all contenders are alive at once, and take turns slice by slice, round by round.

So whatever the machine does meanwhile (other work, a clock that changes its speed) meets all of them, and a ratio of two figures
of one round is worth more than either. While one contender runs the others wait, and are stopped if they would spin. The
first round is discarded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zmqagent.cli.bench import observed
from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.floors import Floors, running_floors
from zmqagent.cli.bench.group import Group, running_group
from zmqagent.cli.bench.rows import FLOORS, Row

__all__ = ["Measured", "Plan", "in_turn", "measure"]

T = TypeVar("T")

_FLOOR_ROUND_TRIPS = 300
_FLOOR_COPIES = 5
_PAIR = 2


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how.

    Attributes:
        contenders: who takes part.
        rows: what each does in a round.
        rounds: how many count, after the one that is discarded.
        threads: what ``torch.set_num_threads`` gets in each worker.
        quick: whether slices are as small as they can be.
        idle_seconds: how long the workers are watched while they wait.
    """

    contenders: Sequence[Contender]
    rows: Sequence[Row]
    rounds: int
    threads: int
    quick: bool
    idle_seconds: float

    def slices(self) -> int:
        """How many steps `measure` announces."""
        return (self.rounds + 1) * (len(self.rows) * len(self.contenders) + 1) + len(self.contenders)


@dataclass(frozen=True)
class Measured:
    """The figures of each round, by metric.

    Attributes:
        figures: by the name of the contender, then by the key of the metric; what is measured at the end has one value.
        floors: by the key of the metric.
    """

    figures: Mapping[str, Mapping[str, Sequence[float]]]
    floors: Mapping[str, Sequence[float]]


def measure(plan: Plan, directory: Path, announce: Callable[[str], None]) -> Measured:
    """Starts all contenders, measures them, and ends them.

    Args:
        plan: what is to be measured.
        directory: a private one, for meeting points and sockets.
        announce: called before each slice with words for it.

    Raises:
        ProcessFailed: a process raised, died or did not answer; all have been ended.
    """
    figures: dict[str, dict[str, list[float]]] = {contender.name: {} for contender in plan.contenders}
    floor_figures: dict[str, list[float]] = {}
    with ExitStack() as running:
        groups = [
            running.enter_context(running_group(contender, _PAIR, plan.threads, directory)) for contender in plan.contenders
        ]
        for group in groups:
            group.pause()
        floors = running.enter_context(running_floors(directory))
        for number in range(plan.rounds + 1):
            announced = f"round {number}/{plan.rounds}" if number else "warm-up"
            announce(f"{announced}: floors")
            _keep(floor_figures, _floors(floors, plan.quick), number)
            for row in plan.rows:
                for group in in_turn(groups, number):
                    announce(f"{announced}: {row.key}, {group.contender.label}")
                    _keep(figures[group.contender.name], _slice(group, row, plan.quick), number)
        for group in groups:
            announce(f"idle: {group.contender.label}")
            peak = sum(group.observe(observed.peak_memory_mb))
            figures[group.contender.name] |= {"idle.cpu": [_idle(group, plan.idle_seconds)], "memory.peak": [peak]}
    return Measured(figures, floor_figures)


def in_turn(contenders: Sequence[T], number: int) -> list[T]:
    """The contenders in the order of round ``number``: in each another one comes first."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def _keep(kept: dict[str, list[float]], figures: Mapping[str, float], number: int) -> None:
    if number > 0:
        for key, value in figures.items():
            kept.setdefault(key, []).append(value)


def _slice(group: Group, row: Row, quick: bool) -> dict[str, float]:
    count = row.quick if quick else row.count
    with group.awake():
        before = group.cpu_seconds()
        measured: dict[str, float] = group.call(row.workload, count)
        measured["cpu"] = (group.cpu_seconds() - before) / count * 1e6
    return {metric.key: measured[metric.key.rpartition(".")[2]] for metric in row.metrics}


def _floors(floors: Floors, quick: bool) -> dict[str, float]:
    measured = floors.measure(*(30, 1) if quick else (_FLOOR_ROUND_TRIPS, _FLOOR_COPIES))
    return {metric.key: measured[metric.key.rpartition(".")[2]] for metric in FLOORS}


def _idle(group: Group, seconds: float) -> float:
    """The busier worker of a pair while nobody asks anything of either, in percent of a core."""
    with group.awake():
        before = group.observe(observed.cpu_seconds)
        began = time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - began
        after = group.observe(observed.cpu_seconds)
    return max(now - then for then, now in zip(before, after, strict=True)) / elapsed * 100
