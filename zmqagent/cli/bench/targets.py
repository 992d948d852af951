"""What is aimed at: bounds on the ratios to a reference, and on a few figures by themselves. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zmqagent.cli.bench.rows import ROWS, Metric

__all__ = ["Target", "target"]


@dataclass(frozen=True)
class Target:
    """A bound that the median is to keep.

    Attributes:
        bound: the value still allowed.
        at_least: whether the median is to be ``bound`` or more; else ``bound`` or less.
        of_ratio: whether the ratio to the reference is meant; else the figure itself, in its unit.
    """

    bound: float
    at_least: bool
    of_ratio: bool = True

    def met(self, median: float) -> bool:
        """Whether the bound is kept."""
        return median >= self.bound if self.at_least else median <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{' x' if self.of_ratio else ''}"


_CALLS = ("noop", "builtin", "echo-4k", "remote")
_BOUNDS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("auto", "TENSORPIPE"): {
        **{f"{row}.p50": 0.6 for row in _CALLS},
        **{f"{row}.p99": 0.9 for row in _CALLS},
        "async.rate": 2.5,
        "threads.rate": 1.3,
        "push-1.bandwidth": 1.5,
        "push-16.bandwidth": 1.2,
        "push-64.bandwidth": 4.0,
        "echo-1.bandwidth": 1.5,
        "echo-16.bandwidth": 1.2,
        "echo-64.bandwidth": 3.0,
        "train.step": 0.6,
        "train-step.step": 0.6,
    },
    ("ipc", "TENSORPIPE"): {f"{row}.p50": 0.85 for row in _CALLS},
    ("tcp", "TENSORPIPE:uv"): {metric.key: 1.0 for row in ROWS for metric in row.metrics if not metric.key.endswith(".cpu")},
}
"""By contender and reference, then by metric."""

_IDLE_CPU = Target(1.0, at_least=False, of_ratio=False)


def target(contender: str, reference: str | None, metric: Metric) -> Target | None:
    """What is aimed at for a metric of the contender of that name, where anything is.

    Args:
        contender: its name.
        reference: the name of what it is compared with, if anything.
        metric: the figure.
    """
    if (metric.key, contender, reference) == ("idle.cpu", "auto", "TENSORPIPE"):
        return _IDLE_CPU
    bound = _BOUNDS.get((contender, reference or ""), {}).get(metric.key)
    return None if bound is None else Target(bound, metric.more_is_better)
