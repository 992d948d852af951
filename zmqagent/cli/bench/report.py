"""What the benchmark prints: a table of figures and ratios, the floors, and the conditions under which they were measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.results import Line, Result
from zmqagent.cli.bench.statistics import Summary

__all__ = ["figure", "report"]


def report(
    conditions: Sequence[str],
    contenders: Sequence[Contender],
    reference: Contender | None,
    rows: Sequence[Line],
    floors: Sequence[Line],
) -> RenderableType:
    """All of it, to be printed on a console."""
    return Group(
        _comparison(contenders, reference, rows),
        Text(),
        _floors(floors),
        Text(),
        *(Text(condition, style="dim") for condition in conditions),
        *(
            []
            if reference is None
            else [Text("Ratios are taken in each round; their quartiles are in parentheses.", style="dim")]
        ),
        *_verdict(rows),
    )


def figure(value: float) -> str:
    """A value with about three digits, as they can be compared at a glance: 8.31, 83.1, 831, 8,310."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _comparison(contenders: Sequence[Contender], reference: Contender | None, rows: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("unit", style="dim", no_wrap=True)
    for contender in contenders:
        table.add_column(contender.label, justify="right", no_wrap=True)
        if reference is not None and contender != reference:
            table.add_column(f"x {reference.label}", justify="right", no_wrap=True)
            table.add_column("target" if _has_targets(contender, rows) else "", no_wrap=True)
    for section, in_section in groupby(rows, key=lambda line: line.metric.section):
        table.add_section()
        table.add_row(Text(section, style="italic"))
        for line in in_section:
            cells = [
                cell
                for contender in contenders
                for cell in _cells(line.results[contender.name], contender == reference, reference)
            ]
            table.add_row(f"  {line.metric.title}", line.metric.unit, *cells)
    return table


def _has_targets(contender: Contender, rows: Sequence[Line]) -> bool:
    return any(line.results[contender.name].target is not None for line in rows)


def _cells(result: Result, is_reference: bool, reference: Contender | None) -> Iterator[Text]:
    yield Text(figure(result.summary.median))
    if reference is not None and not is_reference:
        yield Text("" if result.ratio is None else _with_spread(result.ratio))
        yield _against_target(result)


def _with_spread(ratio: Summary) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _against_target(result: Result) -> Text:
    if result.target is None:
        return Text()
    return Text(f"{result.target} {'met' if result.met else 'not met'}", style="green" if result.met else "red")


def _floors(floors: Sequence[Line]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("what the machine itself can do")
    table.add_column("unit", style="dim")
    table.add_column("", justify="right")
    for line in floors:
        table.add_row(f"  {line.metric.title}", line.metric.unit, figure(line.results[""].summary.median))
    return table


def _verdict(rows: Sequence[Line]) -> Iterator[Text]:
    """How many targets are met, if there are any."""
    met = [result.met for line in rows for result in line.results.values() if result.met is not None]
    if met:
        yield Text()
        yield Text(f"{sum(met)} of {len(met)} targets are met.", style="green" if all(met) else "red")
