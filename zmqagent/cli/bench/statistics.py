"""Numbers made of measurements: percentiles, and medians with the spread over rounds. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Summary", "percentile", "ratios", "summarise"]


@dataclass(frozen=True)
class Summary:
    """The median of some values, and the quartiles around it: half of the values lie between ``low`` and ``high``."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value that the given share (0 to 1) of ``values`` does not exceed, interpolated linearly between neighbours.

    Raises:
        ValueError: there are no values, or ``share`` is out of range.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarise(values: Sequence[float]) -> Summary:
    """Median and quartiles of at least one value.

    Raises:
        ValueError: there are no values.
    """
    return Summary(percentile(values, 0.5), percentile(values, 0.25), percentile(values, 0.75))


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each value over that of the same round of the reference: what slows a whole round down cancels out.

    Raises:
        ValueError: the rounds differ in number.
    """
    return [value / base if base else math.inf for value, base in zip(values, reference, strict=True)]
