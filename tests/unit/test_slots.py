"""`zmqagent.transport.slots`: no byte is given out twice, none is lost, and the lowest ones come first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqagent.transport.slots import Slots

GRAIN = 16


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.one_of(st.tuples(st.just("allocate"), st.integers(1, 300)), st.tuples(st.just("free"), st.integers(0, 50)))),
)
def test_any_sequence_gives_out_each_byte_once_and_the_lowest_that_fit(grains: int, steps: list[tuple[str, int]]) -> None:
    end = (1 + grains) * GRAIN
    slots = Slots(GRAIN, end, GRAIN)
    used: dict[int, int] = {}

    def is_free(offset: int, size: int) -> bool:
        apart = all(offset + size <= other or other + length <= offset for other, length in used.items())
        return apart and offset + size <= end

    for step, number in steps:
        if step == "allocate":
            size = slots.rounded(number)
            offset = slots.allocate(number)
            # The model looks at every place; nothing here is known of gaps.
            assert offset == next((o for o in range(GRAIN, end, GRAIN) if is_free(o, size)), None)
            if offset is not None:
                used[offset] = size
        elif used:
            offset = sorted(used)[number % len(used)]
            slots.free(offset)
            del used[offset]
        free = sum(stop - start for start, stop in slots.gaps_between(0, end))
        assert free + sum(used.values()) == grains * GRAIN
    for offset in used:
        slots.free(offset)
    assert slots.gaps_between(0, end) == ([(GRAIN, end)] if grains else [])


def test_gaps_are_cut_at_the_bounds_asked_for() -> None:
    slots = Slots(0, 100, 10)
    first, _ = slots.allocate(30), slots.allocate(20)
    assert first == 0
    slots.free(first)
    assert slots.gaps_between(20, 90) == [(20, 30), (50, 90)]
    assert slots.gaps_between(30, 50) == []


def test_what_is_not_in_use_cannot_be_freed() -> None:
    slots = Slots(0, 100, 10)
    slots.allocate(30)
    with pytest.raises(KeyError):
        slots.free(10)
    slots.free(0)
    with pytest.raises(KeyError):
        slots.free(0)
