"""Boxes within arrays: what covers an array, and where bytes of it lie; compared with what NumPy says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore import blocks
from tests.strategies import tilings

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def covered(shape: tuple[int, ...], boxes: list[blocks.Box]) -> bool:
    """Whether each element is in one box, by counting."""
    count = np.zeros(shape, int)
    for at, sizes in boxes:
        count[tuple(slice(start, start + size) for start, size in zip(at, sizes, strict=True))] += 1
    return bool((count == 1).all())


@given(tilings())
def test_what_an_array_was_cut_into_covers_it(cut: tuple[tuple[int, ...], list[blocks.Box]]) -> None:
    shape, boxes = cut
    assert covered(shape, boxes)
    assert blocks.tile(shape, boxes)
    assert blocks.tile(shape, boxes[::-1])


@given(tilings(), st.data())
def test_what_is_moved_left_out_or_doubled_does_not_cover_it(
    cut: tuple[tuple[int, ...], list[blocks.Box]], data: st.DataObject
) -> None:
    shape, boxes = cut
    number = data.draw(st.integers(0, len(boxes) - 1))
    at, sizes = boxes[number]
    moved = tuple(start + data.draw(st.integers(-1, 1)) for start in at)
    resized = tuple(max(0, size + data.draw(st.integers(-1, 1))) for size in sizes)
    for changed in ([], [(at, sizes), (at, sizes)], [(moved, sizes)], [(at, resized)], [(moved, resized)]):
        others = [*boxes[:number], *changed, *boxes[number + 1 :]]
        inside = all(
            0 <= start < start + size <= end for box in others for start, size, end in zip(*box, shape, strict=True)
        )
        assert blocks.tile(shape, others) == (inside and covered(shape, others))


def test_a_pinwheel_which_no_straight_cuts_make_covers_its_square() -> None:
    wheel: list[blocks.Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert blocks.tile((3, 3), wheel)
    assert not blocks.tile((3, 3), [*wheel[:4], ((2, 2), (1, 1))])


def test_overlaps_whose_volume_is_right_are_seen() -> None:
    assert not blocks.tile((4,), [((0,), (2,)), ((0,), (2,))])
    assert not blocks.tile((2, 2), [((0, 0), (1, 2)), ((0, 0), (2, 1))])
    assert not blocks.tile((4,), [((0,), (3,)), ((1,), (1,))])


def test_an_array_may_be_cut_along_four_dimensions_and_no_more() -> None:
    def halves(dimensions: int) -> list[blocks.Box]:
        corners = np.ndindex(*(2,) * dimensions)
        return [(corner, (1,) * dimensions) for corner in corners]

    assert blocks.tile((2,) * 4, halves(4))
    assert not blocks.tile((2,) * 5, halves(5))
    assert blocks.tile((2,) * 20, [((0,) * 20, (1, *(2,) * 19)), ((1, *(0,) * 19), (1, *(2,) * 19))])


@given(SHAPES, st.data())
def test_a_range_of_an_array_is_these_boxes_one_after_the_other(shape: tuple[int, ...], data: st.DataObject) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    found = list(blocks.boxes_of_range(shape, start, stop))
    pieces = [array[blocks.within(box, ((0,) * len(shape), shape))].reshape(-1) for box, _ in found]
    assert [before for _, before in found] == [sum(len(piece) for piece in pieces[:n]) for n in range(len(pieces))]
    assert np.array_equal(np.concatenate([np.empty(0, int), *pieces]), np.arange(start, stop))
    assert len(found) <= 2 * len(shape) + 1


@given(tilings())
def test_a_box_is_a_range_if_its_elements_lie_side_by_side(cut: tuple[tuple[int, ...], list[blocks.Box]]) -> None:
    shape, boxes = cut
    array = np.arange(math.prod(shape)).reshape(shape)
    for box in boxes:
        inside = array[blocks.within(box, ((0,) * len(shape), shape))].reshape(-1)
        side_by_side = len(inside) == inside[-1] - inside[0] + 1
        assert blocks.flat_range(shape, box) == ((inside[0], inside[-1] + 1) if side_by_side else None)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (((0, 0), (4, 4)), ((2, 3), (4, 4)), ((2, 3), (2, 1))),
        (((0, 0), (4, 4)), ((4, 0), (1, 4)), None),
        (((), ()), ((), ()), ((), ())),
    ],
)
def test_what_two_boxes_have_in_common(one: blocks.Box, other: blocks.Box, both: blocks.Box | None) -> None:
    assert blocks.common(one, other) == both
    assert blocks.common(other, one) == both


@given(tilings(), st.data())
def test_folded_boxes_hold_the_same_elements_in_the_same_order(
    cut: tuple[tuple[int, ...], list[blocks.Box]], data: st.DataObject
) -> None:
    shape, boxes = cut
    whole = data.draw(st.integers(0, 3))
    shape = (*shape, *[2] * whole)  # along these nothing is cut
    boxes = [((*at, *[0] * whole), (*sizes, *[2] * whole)) for at, sizes in boxes]
    folding = blocks.fold(shape, boxes)
    numbers = np.arange(math.prod(shape))
    for box in boxes:
        folded = numbers.reshape(folding.sizes(shape))[slices(folding.box(box))]
        assert folded.reshape(-1).tolist() == numbers.reshape(shape)[slices(box)].reshape(-1).tolist()


def test_what_is_not_cut_takes_no_dimension_of_its_own() -> None:
    shape = (2, 2, 6, 2, 2, 4)
    boxes = [((0, 0, 0, 0, 0, 0), (2, 2, 3, 2, 2, 4)), ((0, 0, 3, 0, 0, 0), (2, 2, 3, 2, 2, 4))]
    folding = blocks.fold(shape, boxes)
    assert folding.sizes(shape) == (4, 96)
    assert folding.box(boxes[1]) == ((0, 48), (4, 48))
    assert blocks.fold((), [((), ())]).sizes(()) == ()


def slices(box: blocks.Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
