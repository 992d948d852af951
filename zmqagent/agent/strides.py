"""Which elements a strided view touches, and which views must therefore travel in one piece.

Pure: plain numbers only; nothing is known of torch. All sizes, strides and offsets count elements and are not negative.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["View", "contiguous", "extent", "pieces"]


_WASTE_FROM = 8 << 10


class View(NamedTuple):
    """A strided view into some memory, whose elements have ``itemsize`` bytes. No dimension has size 0."""

    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def begin(self) -> int:
        """The first byte it touches."""
        return self.offset * self.itemsize

    @property
    def end(self) -> int:
        """The byte after the last one it touches."""
        return (self.offset + extent(self.sizes, self.strides)) * self.itemsize

    @property
    def is_wasteful(self) -> bool:
        """Whether a copy of the elements alone is much smaller than the memory they span. As in torch's RPC: a view of less than
        8 KiB, or one that uses more than half of its memory, travels with its gaps and keeps its strides."""
        span = self.end - self.begin
        return span >= _WASTE_FROM and span >= 2 * math.prod(self.sizes) * self.itemsize


def extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie from the first to the last that such a view touches, both included; 0 if it has none."""
    if 0 in sizes:
        return 0
    return 1 + sum([(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)])


def contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of these sizes."""
    strides = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def pieces(views: Sequence[View]) -> list[list[int]]:
    """Cuts views of one memory into groups (of indices) that have no byte in common with each other, and so may travel apart.

    Views in one group may overlap. Whether strided views do is hard to decide in general: what lies interleaved stays together
    unless that is wasteful and the views are easily seen to be apart, as are columns of a matrix.
    """
    order = sorted(range(len(views)), key=lambda i: views[i].begin)
    groups: list[list[int]] = []
    end = -1
    for i in order:
        if views[i].begin >= end:
            groups.append([])
        groups[-1].append(i)
        end = max(end, views[i].end)
    return [part for group in groups for part in _split(views, group)]


def _split(views: Sequence[View], group: list[int]) -> list[list[int]]:
    """``group`` as it is, or cut into its distinct views if those are apart and much smaller than the memory between them."""
    distinct: dict[View, list[int]] = {}
    for i in group:
        distinct.setdefault(views[i], []).append(i)
    if len(distinct) == 1:
        return [group]
    needed = sum(math.prod(view.sizes) * view.itemsize for view in distinct)
    span = max(view.end for view in distinct) - min(view.begin for view in distinct)
    if span <= 2 * needed or len({view.itemsize for view in distinct}) > 1:
        return [group]
    periods = {
        stride for view in distinct for size, stride in zip(view.sizes, view.strides, strict=True) if size > 1 and stride > 1
    }
    if any(_apart(list(distinct), period) for period in periods):
        return list(distinct.values())
    return [group]


def _apart(views: Sequence[View], period: int) -> bool:
    """True if no two views touch elements whose positions are equal modulo ``period``. False proves nothing."""
    ranges = []
    for view in views:
        # Steps by multiples of the period do not move a view's position within it.
        steps = [stride if stride % period else 0 for stride in view.strides]
        begin = view.offset % period
        end = begin + extent(view.sizes, steps)
        if end > period:
            return False
        ranges.append((begin, end))
    ranges.sort()
    return all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))
