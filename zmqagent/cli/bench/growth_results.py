"""What growth measured, as a table and as JSON has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zmqagent.cli.bench.curves import Curve
from zmqagent.cli.bench.growth import Grown, GrowthPlan
from zmqagent.cli.bench.report import figure
from zmqagent.cli.bench.results import SCHEMA, contender_documents
from zmqagent.cli.bench.statistics import summarise

__all__ = ["growth_document", "growth_report"]


def growth_report(conditions: Sequence[str], plan: GrowthPlan, grown: Grown) -> RenderableType:
    """A table a curve, to be printed on a console: a column a point, and for each metric a row of medians a contender."""
    tables = [_table(plan, curve, grown) for curve in plan.curves]
    return Group(*tables, *(Text(told, style="dim") for told in (*conditions, *_left_out(plan))))


def _left_out(plan: GrowthPlan) -> Iterator[str]:
    for curve in plan.curves:
        for contender in plan.contenders:
            sizes = [f"{point:,}" for point in plan.points(curve) if plan.leaves_out(curve, contender, point)]
            if sizes:
                yield (
                    f"{contender.label} was not measured with {' and '.join(sizes)} workers, which would take more than half of "
                    "this machine's memory."
                )


def _table(plan: GrowthPlan, curve: Curve, grown: Grown) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(curve.title)
    for point in plan.points(curve):
        table.add_column(f"{point:,}", justify="right", no_wrap=True)
    for metric in curve.metrics:
        table.add_section()
        table.add_row(Text(metric.titled, style="italic"))
        for contender in plan.contenders:
            rounds_by_point = grown[metric.key][contender.name]
            medians = (figure(summarise(rounds).median) if rounds else "-" for rounds in rounds_by_point)
            table.add_row(f"  {contender.label}", *medians)
    return table


def growth_document(conditions: Mapping[str, Any], plan: GrowthPlan, grown: Grown) -> dict[str, Any]:
    """Everything that was measured, and under which conditions; docs/performance.md describes it."""
    return {
        "schema": SCHEMA,
        "kind": "growth",
        "conditions": dict(conditions),
        "contenders": contender_documents(plan.contenders),
        "curves": [
            {
                "key": curve.key,
                "title": curve.title,
                "points": list(plan.points(curve)),
                "metrics": [
                    {
                        "key": metric.key,
                        "title": metric.title,
                        "unit": metric.unit,
                        "more_is_better": metric.more_is_better,
                        "results": {contender.name: _points(grown[metric.key][contender.name]) for contender in plan.contenders},
                    }
                    for metric in curve.metrics
                ],
            }
            for curve in plan.curves
        ],
    }


def _points(rounds_by_point: Sequence[Sequence[float]]) -> list[dict[str, Any] | None]:
    return [{**asdict(summarise(rounds)), "rounds": list(rounds)} if rounds else None for rounds in rounds_by_point]
