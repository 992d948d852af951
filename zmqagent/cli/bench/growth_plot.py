"""The picture of how cost grows: a panel a metric, a line a contender, the quartiles as a band around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator, StrMethodFormatter

from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.growth import Grown, GrowthPlan
from zmqagent.cli.bench.plot import colours
from zmqagent.cli.bench.rows import Metric
from zmqagent.cli.bench.statistics import summarise
from zmqagent.cli.pictures import new_figure, tidy

__all__ = ["plot_growth"]

_COLUMNS = 4
_MOST_TICKS = 7
_WIDE = 20
"""From this ratio of the last to the first of some values on, a logarithmic scale shows them better."""


def plot_growth(plan: GrowthPlan, grown: Grown, reference: Contender | None, path: Path) -> None:
    """Writes the picture to ``path``, whose ending says the format.

    Raises:
        OSError: the file cannot be written.
    """
    panels = [(curve, metric) for curve in plan.curves for metric in curve.metrics]
    lines = -(-len(panels) // _COLUMNS)
    columns = min(_COLUMNS, len(panels))
    figure = new_figure("How cost grows, on one machine", 4.2 * columns, 0.8 + 3.2 * lines)
    for index, (curve, metric) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw(axes, plan.contenders, colours(plan.contenders, reference), plan.points(curve), grown, metric)
        axes.set_xlabel(curve.title, fontsize=9)
        tidy(axes, metric.titled)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(
    axes: Axes, contenders: Sequence[Contender], colour: dict[str, str], points: Sequence[int], grown: Grown, metric: Metric
) -> None:
    highest: list[float] = []
    for contender in contenders:
        measured = [
            (point, summarise(rounds)) for point, rounds in zip(points, grown[metric.key][contender.name], strict=True) if rounds
        ]
        places, summaries = [point for point, _ in measured], [summary for _, summary in measured]
        medians = [summary.median for summary in summaries]
        low, high = [summary.low for summary in summaries], [summary.high for summary in summaries]
        axes.plot(places, medians, color=colour[contender.name], marker="o", markersize=3.5, label=contender.label)
        axes.fill_between(places, low, high, color=colour[contender.name], alpha=0.2, linewidth=0)
        highest += medians
    if points[-1] >= _WIDE * max(points[0], 1):
        # Zero has no logarithm, and is a point of its own at the left.
        axes.set_xscale("symlog", linthresh=max(min(point for point in points if point), 1))
    if len(points) <= _MOST_TICKS:
        axes.set_xticks(points)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if min(highest) > 0 and max(highest) >= _WIDE * min(highest):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=8)
