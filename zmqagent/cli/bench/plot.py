"""The picture of a comparison: bars for every contender, small multiples that share no axis, and the machine's floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from zmqagent.cli.bench.contenders import Contender
from zmqagent.cli.bench.results import Line, Result
from zmqagent.cli.pictures import INK, new_figure, tidy

__all__ = ["colours", "plot"]

_REFERENCE_COLOUR = "#b9c0c8"
_COLOURS = ("#2f6fb0", "#e08e3c", "#4a9c6d", "#8d5fa8", "#c2504a", "#5aa7b8")


@dataclass(frozen=True)
class _Panel:
    """Some metrics of one unit, by key with what stands below their bars; and floors to draw across, by key with their names."""

    title: str
    bars: Mapping[str, str]
    floors: Mapping[str, str] = field(default_factory=dict)


_CALLS = {"noop": "no-op", "builtin": "builtin\noperator", "echo-4k": "echo\nof 4 KB", "remote": "remote +\nto_here"}
_SIZES = (1, 16, 64, 256)
_ROUND_TRIPS = {"floor.socket": "Unix socket", "floor.zmq": "bare ZeroMQ"}
_COPIES = {"floor.memcpy": "memcpy", "floor.shared-memory": "into shared memory"}
_PANELS = (
    _Panel("time of a call, p50, µs", {f"{row}.p50": label for row, label in _CALLS.items()}, _ROUND_TRIPS),
    _Panel("time of a call, p99, µs", {f"{row}.p99": label for row, label in _CALLS.items()}),
    _Panel("calls a second", {"async.rate": "asynchronous", "threads.rate": "from four\nthreads"}),
    _Panel("step of training, ms", {"train.step": "forward +\nbackward", "train-step.step": "the same +\noptimizer"}),
    _Panel("push, GB/s", {f"push-{size}.bandwidth": f"{size} MB" for size in _SIZES}, _COPIES),
    _Panel("echo, GB/s", {f"echo-{size}.bandwidth": f"{size} MB" for size in _SIZES}, _COPIES),
    _Panel("CPU of both workers a call, µs", {"noop.cpu": "no-op", "async.cpu": "asynchronous"}),
    _Panel("peak memory, MB", {"memory.peak": "both workers"}),
)
_COLUMNS = 4
_LINES = (":", "--")


def colours(contenders: Sequence[Contender], reference: Contender | None) -> dict[str, str]:
    """A colour for each contender, by name; that of the reference steps back."""
    others = [contender.name for contender in contenders if contender != reference]
    chosen = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return chosen if reference is None else {reference.name: _REFERENCE_COLOUR, **chosen}


def plot(
    rows: Sequence[Line], floors: Sequence[Line], contenders: Sequence[Contender], reference: Contender | None, path: Path
) -> None:
    """Writes the picture to ``path``, whose ending says the format; panels of which nothing was measured are left out.

    Raises:
        OSError: the file cannot be written.
    """
    results = {line.metric.key: line.results for line in rows}
    heights = {line.metric.key: line.results[""].summary.median for line in floors}
    panels = [panel for panel in _PANELS if panel.bars.keys() & results.keys()]
    lines = -(-len(panels) // _COLUMNS)
    figure = new_figure("Two workers on one machine: medians, and the quartiles over rounds", 15, 0.8 + 3.6 * max(lines, 1))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, min(_COLUMNS, len(panels)), index + 1)
        _draw(axes, panel, results, heights, contenders, colours(contenders, reference))
    if panels:
        colour = colours(contenders, reference)
        patches = [Patch(color=colour[contender.name], label=contender.label) for contender in contenders]
        figure.legend(handles=patches, loc="upper right", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(
    axes: Axes,
    panel: _Panel,
    results: Mapping[str, Mapping[str, Result]],
    floors: Mapping[str, float],
    contenders: Sequence[Contender],
    colour: Mapping[str, str],
) -> None:
    keys = [key for key in panel.bars if key in results]
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        places = [place + (index - (len(contenders) - 1) / 2) * width for place in range(len(keys))]
        summaries = [results[key][contender.name].summary for key in keys]
        medians = [summary.median for summary in summaries]
        spread = [[it.median - it.low for it in summaries], [it.high - it.median for it in summaries]]
        axes.bar(places, medians, width * 0.92, color=colour[contender.name])
        axes.errorbar(places, medians, spread, fmt="none", ecolor=INK, elinewidth=1)
    for (key, label), style in zip(panel.floors.items(), _LINES, strict=False):
        axes.axhline(floors[key], color=INK, linewidth=1, linestyle=style, label=label)
    axes.set_xticks(range(len(keys)), [panel.bars[key] for key in keys], fontsize=9)
    axes.set_ylim(bottom=0)
    if panel.floors:
        axes.set_ylim(top=1.15 * axes.get_ylim()[1])
        axes.legend(loc="upper left", ncols=len(panel.floors), frameon=False, fontsize=8)
    tidy(axes, panel.title)
    axes.grid(visible=False, axis="x")
