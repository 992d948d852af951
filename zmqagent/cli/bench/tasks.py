"""The two tasks of the benchmark, a comparison and a look at how cost grows, behind one face: run, then tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType

from zmqagent.cli.bench.conditions import Conditions
from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.growth import Grown, GrowthPlan, grow
from zmqagent.cli.bench.growth_results import growth_document, growth_report
from zmqagent.cli.bench.measure import Measured, Plan, measure
from zmqagent.cli.bench.report import report
from zmqagent.cli.bench.results import document, floor_lines, lines

__all__ = ["Comparison", "Growth", "Outcome", "Task"]


class Outcome(Protocol):
    """What a task found, in the forms that it can be told in."""

    def printed(self) -> RenderableType:
        """For people."""

    def document(self) -> dict[str, Any]:
        """For machines, as JSON has it."""

    def draw(self, path: Path) -> None:
        """As a picture, whose format the ending of ``path`` says.

        Raises:
            OSError: the file cannot be written.
        """


class Task(Protocol):
    """Something to be measured."""

    def steps(self) -> int:
        """How many steps `run` announces."""

    def run(self, directory: Path, announce: Callable[[str], None]) -> Outcome:
        """Does it, in processes of its own that have ended when it returns or raises.

        Args:
            directory: a private one, for meeting points and sockets.
            announce: called before each step with words for it.

        Raises:
            ProcessFailed: a process raised, died or did not answer.
        """


class Comparison:
    """The rows of the benchmark, as a `Task`."""

    def __init__(self, plan: Plan, reference: Contender | None) -> None:
        self._plan = plan
        self._reference = reference

    def steps(self) -> int:
        return self._plan.slices()

    def run(self, directory: Path, announce: Callable[[str], None]) -> Outcome:
        plan = self._plan
        conditions = Conditions.here(plan.rounds, "a round like the others", plan.threads, _stopped(plan.contenders), plan.quick)
        return _Compared(plan, self._reference, conditions, measure(plan, directory, announce))


class _Compared:
    def __init__(self, plan: Plan, reference: Contender | None, conditions: Conditions, measured: Measured) -> None:
        self._contenders = plan.contenders
        self._reference = reference
        self._conditions = conditions
        self._rows = lines(plan, reference, measured)
        self._floors = floor_lines(measured)

    def printed(self) -> RenderableType:
        return report(self._conditions.sentences(), self._contenders, self._reference, self._rows, self._floors)

    def document(self) -> dict[str, Any]:
        return document(asdict(self._conditions), self._contenders, self._reference, self._rows, self._floors)

    def draw(self, path: Path) -> None:
        from zmqagent.cli.bench.plot import plot

        plot(self._rows, self._floors, self._contenders, self._reference, path)


class Growth:
    """The curves of the benchmark, as a `Task`."""

    def __init__(self, plan: GrowthPlan, reference: Contender | None) -> None:
        self._plan = plan
        self._reference = reference

    def steps(self) -> int:
        return self._plan.slices()

    def run(self, directory: Path, announce: Callable[[str], None]) -> Outcome:
        plan = self._plan
        conditions = Conditions.here(plan.rounds, "the first point, once", plan.threads, _stopped(plan.contenders), plan.quick)
        return _HowItGrew(plan, self._reference, conditions, grow(plan, directory, announce))


class _HowItGrew:
    def __init__(self, plan: GrowthPlan, reference: Contender | None, conditions: Conditions, grown: Grown) -> None:
        self._plan = plan
        self._reference = reference
        self._conditions = conditions
        self._grown = grown

    def printed(self) -> RenderableType:
        return growth_report(self._conditions.sentences(), self._plan, self._grown)

    def document(self) -> dict[str, Any]:
        return growth_document(asdict(self._conditions), self._plan, self._grown)

    def draw(self, path: Path) -> None:
        from zmqagent.cli.bench.growth_plot import plot_growth

        plot_growth(self._plan, self._grown, self._reference, path)


def _stopped(contenders: Sequence[Contender]) -> list[str]:
    return [contender.label for contender in contenders if contender.spins]
