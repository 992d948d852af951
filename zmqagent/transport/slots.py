"""Which bytes of an arena are in use: first fit at the lowest address, so that memory that was used lately is used again.

Pure: offsets and sizes only; the memory itself is unknown here.
"""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["Slots"]

_Range = tuple[int, int]
"""Begin and end."""


class Slots:
    """The bytes from ``begin`` to ``end``, given out in whole multiples of ``grain``, which divides both.

    >>> slots = Slots(0, 400, 100)
    >>> slots.allocate(150), slots.allocate(100), slots.allocate(200)
    (0, 200, None)
    >>> slots.free(0)
    >>> slots.allocate(100)
    0
    """

    def __init__(self, begin: int, end: int, grain: int) -> None:
        self._grain = grain
        # In order, and no two of them touch.
        self._gaps: list[_Range] = [(begin, end)] if begin < end else []
        self._ends: dict[int, int] = {}

    def rounded(self, size: int) -> int:
        """How many bytes an allocation of ``size`` takes."""
        return -(-size // self._grain) * self._grain

    def allocate(self, size: int) -> int | None:
        """The offset of ``size`` > 0 bytes; None if there is no gap of that size."""
        size = self.rounded(size)
        for i, (begin, end) in enumerate(self._gaps):
            if end - begin >= size:
                if end - begin == size:
                    del self._gaps[i]
                else:
                    self._gaps[i] = (begin + size, end)
                self._ends[begin] = begin + size
                return begin
        return None

    def free(self, offset: int) -> None:
        """Takes back what `allocate` gave.

        Raises:
            KeyError: nothing that is in use begins at ``offset``.
        """
        begin, end = offset, self._ends.pop(offset)
        i = bisect_left(self._gaps, (begin, end))
        if i < len(self._gaps) and self._gaps[i][0] == end:
            end = self._gaps.pop(i)[1]
        if i and self._gaps[i - 1][1] == begin:
            begin = self._gaps.pop(i - 1)[0]
        insort(self._gaps, (begin, end))

    def gaps_between(self, begin: int, end: int) -> list[_Range]:
        """The parts of the gaps between two offsets, in order."""
        return [(max(start, begin), min(stop, end)) for start, stop in self._gaps if stop > begin and start < end]
