"""Which requests of others have been taken in: each is served once, however often it arrives.

Pure. A caller numbers its requests to one worker upwards, so what was taken in from one incarnation is a number up to which
everything was, and a set of the few above it.
"""

from __future__ import annotations

from zmqagent.wire.types import WorkerId

__all__ = ["Served"]


_MAX_GAP = 1 << 16
"""So many requests may overtake one before it is given up. A number whose request could not be sent is never seen at all."""


class Served:
    """The requests taken in, by caller."""

    def __init__(self) -> None:
        self._callers: dict[tuple[WorkerId, int], _Seen] = {}
        self._duplicates = 0

    @property
    def duplicates(self) -> int:
        """How many requests came again."""
        return self._duplicates

    def admit(self, source: WorkerId, incarnation: int, call_id: int) -> bool:
        """Whether this request is new; if so it is taken note of."""
        seen = self._callers.get((source, incarnation))
        if seen is None:
            seen = self._callers[source, incarnation] = _Seen()
        if seen.add(call_id):
            return True
        self._duplicates += 1
        return False

    def forget(self, source: WorkerId, incarnation: int) -> None:
        """Nothing more comes from this incarnation."""
        self._callers.pop((source, incarnation), None)


class _Seen:
    """Numbers seen, of a sequence without lasting gaps that starts at 0: ``floor`` and all below it, and ``above``."""

    __slots__ = ("above", "floor")

    def __init__(self) -> None:
        self.floor = -1
        self.above: set[int] = set()

    def add(self, number: int) -> bool:
        if number <= self.floor or number in self.above:
            return False
        self.above.add(number)
        if len(self.above) > _MAX_GAP:
            self.floor = min(self.above) - 1
        while self.floor + 1 in self.above:
            self.floor += 1
            self.above.remove(self.floor)
        return True
