"""`zmqagent.agent.strides` against brute force: the elements that a view touches, listed one by one."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqagent.agent.strides import View, contiguous, extent, pieces

DIMENSIONS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=3)


@st.composite
def views(draw: st.DrawFn) -> View:
    dimensions = draw(DIMENSIONS)
    return View(
        draw(st.sampled_from([1, 4])),
        tuple(size for size, _ in dimensions),
        tuple(stride for _, stride in dimensions),
        draw(st.integers(0, 40)),
    )


def touched(view: View) -> set[int]:
    """The bytes of a view, one by one."""
    elements = {
        view.offset + sum(i * stride for i, stride in zip(index, view.strides, strict=True))
        for index in itertools.product(*map(range, view.sizes))
    }
    return {element * view.itemsize + byte for element in elements for byte in range(view.itemsize)}


@given(views())
def test_a_view_lies_between_begin_and_end(view: View) -> None:
    assert view.begin == min(touched(view))
    assert view.end == max(touched(view)) + 1
    assert extent(view.sizes, view.strides) * view.itemsize == view.end - view.begin


@given(views())
def test_a_small_view_is_never_wasteful(view: View) -> None:
    assert not view.is_wasteful


@pytest.mark.parametrize(
    ("view", "is_wasteful"),
    [
        (View(4, (5000,), (1,), 0), False),
        (View(4, (1024,), (2,), 7), False),
        (View(4, (1025,), (2,), 7), False),
        (View(4, (2000,), (3,), 7), True),
        (View(4, (5, 410), (410, 1), 0), False),
        (View(4, (5, 10), (410, 1), 0), False),
        (View(4, (6, 10), (410, 1), 0), True),
        (View(1, (1 << 40, 8192), (0, 1), 0), False),
    ],
)
def test_a_large_view_that_uses_at_most_half_of_its_memory_is_wasteful(view: View, is_wasteful: bool) -> None:
    assert view.is_wasteful == is_wasteful


@settings(max_examples=400)
@given(st.lists(views(), max_size=5))
def test_views_that_have_bytes_in_common_stay_in_one_piece(all_views: list[View]) -> None:
    groups = pieces(all_views)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(all_views)))
    piece = {index: number for number, group in enumerate(groups) for index in group}
    for a, b in itertools.combinations(range(len(all_views)), 2):
        if touched(all_views[a]) & touched(all_views[b]):
            assert piece[a] == piece[b]


def test_views_that_lie_behind_each_other_are_pieces_of_their_own() -> None:
    rows = [View(4, (10,), (1,), row * 10) for row in (2, 0, 1)]
    assert pieces(rows) == [[1], [2], [0]]


def test_a_few_columns_of_a_large_matrix_are_pieces_of_their_own() -> None:
    columns = [View(4, (1000,), (500,), 7), View(4, (1000,), (500,), 8), View(4, (1000, 3), (500, 1), 20)]
    assert pieces(columns) == [[0], [1], [2]]


def test_channels_of_a_large_image_are_pieces_of_their_own() -> None:
    assert pieces([View(4, (100, 100), (10000, 100), c) for c in (0, 99)]) == [[0], [1]]


def test_the_same_column_twice_is_one_piece() -> None:
    column = View(4, (1000,), (500,), 7)
    assert pieces([column, View(4, (1000,), (500,), 8), column]) == [[0, 2], [1]]


def test_columns_that_are_most_of_a_matrix_stay_in_one_piece() -> None:
    assert pieces([View(4, (100,), (2,), 0), View(4, (100,), (2,), 1)]) == [[0, 1]]


def test_a_block_that_runs_over_the_end_of_a_row_stays_with_the_others() -> None:
    assert pieces([View(4, (100, 3), (500, 1), 499), View(4, (100,), (500,), 1)]) == [[1, 0]]


@given(st.lists(st.integers(0, 5), max_size=4))
def test_contiguous_strides_are_those_of_row_major_order(sizes: list[int]) -> None:
    strides = contiguous(sizes)
    expected = tuple(math.prod(max(size, 1) for size in sizes[i + 1 :]) for i in range(len(sizes)))
    assert strides == expected


def test_a_view_without_elements_has_no_extent() -> None:
    assert extent((3, 0), (5, 1)) == 0
    assert extent((), ()) == 1
