"""How cost grows: measures the curves, contenders taking turns at each point, round by round, as in `measure`.

Each curve begins with workers of its own, so that none inherits what another left in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.curves import Curve
from zmqagent.cli.bench.group import Group, running_group
from zmqagent.cli.bench.measure import in_turn

__all__ = ["Grown", "GrowthPlan", "grow"]

_PAIR = 2
_Take = Callable[[Contender, int, Callable[[], Mapping[str, float]]], None]
"""Takes down what a measurement of a contender at the point of an index gives."""


@dataclass(frozen=True)
class GrowthPlan:
    """What is to be measured, and how.

    Attributes:
        contenders: who takes part.
        curves: what grows.
        rounds: how often each point is measured.
        threads: what ``torch.set_num_threads`` gets in each worker.
        quick: whether to take the points of a quick run.
        machine_mb: the memory of the machine in MB; groups that need more than half of it are left out.
    """

    contenders: Sequence[Contender]
    curves: Sequence[Curve]
    rounds: int
    threads: int
    quick: bool
    machine_mb: float

    def points(self, curve: Curve) -> tuple[int, ...]:
        """The points of a curve."""
        return curve.quick if self.quick else curve.points

    def rounds_of(self, curve: Curve) -> int:
        """How often each point of a curve is measured."""
        return self.rounds if curve.repeats else 1

    def leaves_out(self, curve: Curve, contender: Contender, point: int) -> bool:
        """Whether the group that the point of a curve asks for would take too much memory."""
        return curve.of_groups and 2 * point * (point - 1) * contender.mb_a_peer > self.machine_mb

    def slices(self) -> int:
        """How many steps `grow` announces."""
        return sum(
            self.rounds_of(curve) * (not self.leaves_out(curve, contender, point))
            for curve in self.curves
            for contender in self.contenders
            for point in self.points(curve)
        )


Grown = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
"""By the key of a metric, then the name of a contender: for each point of the curve the figures of all rounds.

A point that was left out has none.
"""


def grow(plan: GrowthPlan, directory: Path, announce: Callable[[str], None]) -> Grown:
    """Measures all curves.

    Args:
        plan: what is to be measured.
        directory: a private one, where workers meet.
        announce: called before each step with words for it.

    Raises:
        ProcessFailed: a process raised, died or did not answer; all have been ended.
    """
    grown: dict[str, dict[str, list[list[float]]]] = {}
    for curve in plan.curves:
        points = plan.points(curve)
        for metric in curve.metrics:
            grown[metric.key] = {contender.name: [[] for _ in points] for contender in plan.contenders}

        def take(contender: Contender, index: int, measure: Callable[[], Mapping[str, float]], curve: Curve = curve) -> None:
            announce(f"{plan.points(curve)[index]:,} {curve.title}: {contender.label}")
            figures = measure()
            for metric in curve.metrics:
                grown[metric.key][contender.name][index].append(figures[metric.key.rpartition(".")[2]])

        (_over_groups if curve.of_groups else _over_pairs)(plan, curve, directory, take)
    return grown


def _over_pairs(plan: GrowthPlan, curve: Curve, directory: Path, take: _Take) -> None:
    with ExitStack() as running:
        groups = [
            running.enter_context(running_group(contender, _PAIR, plan.threads, directory)) for contender in plan.contenders
        ]
        for group in groups:
            # Warms up, and counts for nothing.
            curve.measure(group, plan.points(curve)[0])
            group.pause()
        for number in range(plan.rounds_of(curve)):
            for index, point in enumerate(plan.points(curve)):
                for group in in_turn(groups, number):
                    take(group.contender, index, partial(_awake, curve, group, point))


def _over_groups(plan: GrowthPlan, curve: Curve, directory: Path, take: _Take) -> None:
    for number in range(plan.rounds_of(curve)):
        for index, size in enumerate(plan.points(curve)):
            for contender in in_turn(plan.contenders, number):
                if not plan.leaves_out(curve, contender, size):
                    take(contender, index, partial(_of_new_group, curve, contender, size, plan.threads, directory))


def _awake(curve: Curve, group: Group, point: int) -> Mapping[str, float]:
    with group.awake():
        return curve.measure(group, point)


def _of_new_group(curve: Curve, contender: Contender, size: int, threads: int, directory: Path) -> Mapping[str, float]:
    with running_group(contender, size, threads, directory) as group:
        return curve.measure(group, size)
