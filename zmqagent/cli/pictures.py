"""What the pictures of all commands have in common: a figure of a house style, and the formats that it can be written in."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zmqagent.cli.arguments import unwritable

__all__ = ["INK", "formats", "new_figure", "tidy", "undrawable"]

INK = "#1f2d3d"
"""The colour of what matters most."""


def formats() -> set[str]:
    """The endings of the names of files that a figure can be written to, without the dot."""
    return set(FigureCanvasAgg.get_supported_filetypes())


def undrawable(path: Path) -> str:
    """Why no picture can be written to ``path``; empty if one can."""
    if path.suffix.removeprefix(".").lower() not in formats():
        return f"no picture can be written to {path}: its name must end in one of {', '.join(sorted(formats()))}"
    trouble = unwritable(path)
    return f"no picture can be written to {path}: {trouble}" if trouble else ""


def new_figure(title: str, width: float, height: float) -> Figure:
    """An empty figure of that many inches, which draws without a display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def tidy(axes: Axes, title: str) -> None:
    """Title, grid and frame, so that what is drawn stands out."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
