"""The picture that ``zmqagent demo`` leaves behind: the loss of every step, and the accuracy after every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from zmqagent.cli.pictures import INK, new_figure, tidy
from zmqagent.cli.training import EpochDone, trainer_name

__all__ = ["plot"]

_TRAINER_COLOURS = ("#7fb2e5", "#f2b27a")
_TARGET_COLOUR = "#b03a2e"


def plot(epochs: Sequence[EpochDone], target: float, title: str, path: Path) -> None:
    """Writes the picture of a training of at least one epoch to ``path``; its ending says the format.

    Raises:
        OSError: the file cannot be written.
    """
    figure = new_figure(title, 10, 4.2)
    losses, accuracy = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, epochs)
    _draw_accuracy(accuracy, epochs, target)
    for axes in (losses, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, len(epochs) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    figure.savefig(path)


def _draw_losses(axes: Axes, epochs: Sequence[EpochDone]) -> None:
    for index, colour in zip(range(len(epochs[0].losses)), _TRAINER_COLOURS, strict=False):
        steps = [
            (done.epoch - 1 + (step + 1) / len(done.losses[index]), loss)
            for done in epochs
            for step, loss in enumerate(done.losses[index])
        ]
        axes.plot(*zip(*steps, strict=True), color=colour, linewidth=0.9, alpha=0.8, label=f"{trainer_name(index)}, each batch")
    axes.plot(
        [done.epoch - 0.5 for done in epochs],
        [done.mean_loss for done in epochs],
        color=INK,
        linewidth=2,
        marker="o",
        markersize=4,
        label="mean of the epoch",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylabel("cross-entropy loss")
    tidy(axes, "Training loss")
    axes.legend(frameon=False, fontsize=9)


def _draw_accuracy(axes: Axes, epochs: Sequence[EpochDone], target: float) -> None:
    numbers, percents = [done.epoch for done in epochs], [100 * done.accuracy for done in epochs]
    axes.plot(numbers, percents, color=INK, linewidth=2, marker="o", markersize=4)
    axes.axhline(100 * target, color=_TARGET_COLOUR, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"asked: {target:.1%}", (1, 100 * target), xycoords=("axes fraction", "data"), xytext=(0, -4), textcoords="offset points",
        ha="right", va="top", color=_TARGET_COLOUR, fontsize=9,
    )  # fmt: skip
    axes.set_ylim(max(0.0, min(100 * target, *percents) - 4), 101)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    tidy(axes, f"Held-out digits read right: {epochs[-1].accuracy:.1%}")
