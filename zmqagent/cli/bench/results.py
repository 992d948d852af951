"""What the measured figures say: medians, ratios to the reference, targets met or not; and the same for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.measure import Measured, Plan
from zmqagent.cli.bench.rows import AT_THE_END, FLOORS, SECTIONS, Metric
from zmqagent.cli.bench.statistics import Summary, ratios, summarise
from zmqagent.cli.bench.targets import Target, target

__all__ = ["SCHEMA", "Line", "Result", "contender_documents", "document", "floor_lines", "lines"]

SCHEMA = 1
"""The version of what `document` returns; a change that readers must know of counts it up."""


@dataclass(frozen=True)
class Result:
    """What came out for one metric and one contender.

    Attributes:
        rounds: the figure of each round.
        summary: of these.
        ratio: of the ratios to the reference, round by round; None for the reference, or if there is none.
        target: what is aimed at, where anything is.
    """

    rounds: Sequence[float]
    summary: Summary
    ratio: Summary | None = None
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        of = self.ratio if self.target.of_ratio else self.summary
        return of is not None and self.target.met(of.median)


@dataclass(frozen=True)
class Line:
    """A metric, and what came out for each contender, by name."""

    metric: Metric
    results: Mapping[str, Result]


def lines(plan: Plan, reference: Contender | None, measured: Measured) -> list[Line]:
    """A line a metric, section by section, within them in the order of the plan's rows."""
    metrics = [*(metric for row in plan.rows for metric in row.metrics), *AT_THE_END]
    metrics.sort(key=lambda metric: SECTIONS.index(metric.section))
    return [
        Line(metric, {contender.name: _result(contender.name, reference, metric, measured) for contender in plan.contenders})
        for metric in metrics
    ]


def floor_lines(measured: Measured) -> list[Line]:
    """A line a floor; the only contender is the machine, and its name is empty."""
    return [Line(metric, {"": Result(measured.floors[metric.key], summarise(measured.floors[metric.key]))}) for metric in FLOORS]


def _result(name: str, reference: Contender | None, metric: Metric, measured: Measured) -> Result:
    rounds = measured.figures[name][metric.key]
    ratio = None
    # Two loads so small that only chance separates them have no ratio worth a line.
    if reference is not None and name != reference.name and metric.key != "idle.cpu":
        ratio = summarise(ratios(rounds, measured.figures[reference.name][metric.key]))
    return Result(rounds, summarise(rounds), ratio, target(name, None if reference is None else reference.name, metric))


def document(
    conditions: Mapping[str, Any],
    contenders: Sequence[Contender],
    reference: Contender | None,
    rows: Sequence[Line],
    floors: Sequence[Line],
) -> dict[str, Any]:
    """Everything that was measured, and under which conditions, as JSON has it; docs/performance.md describes it."""
    return {
        "schema": SCHEMA,
        "kind": "comparison",
        "conditions": dict(conditions),
        "contenders": contender_documents(contenders),
        "reference": None if reference is None else reference.name,
        "rows": [
            {**_described(line.metric), "results": {name: _result_document(result) for name, result in line.results.items()}}
            for line in rows
        ],
        "floors": [{**_described(line.metric), **_result_document(line.results[""])} for line in floors],
    }


def contender_documents(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Who took part, and which options made them what they were."""
    return [
        {"name": contender.name, "label": contender.label, "backend": contender.backend, "options": dict(contender.options)}
        for contender in contenders
    ]


def _described(metric: Metric) -> dict[str, Any]:
    return asdict(metric)


def _result_document(result: Result) -> dict[str, Any]:
    told: dict[str, Any] = {**asdict(result.summary), "rounds": list(result.rounds)}
    if result.ratio is not None:
        told["ratio"] = asdict(result.ratio)
    if result.target is not None:
        told["target"] = {**asdict(result.target), "met": result.met}
    return told
