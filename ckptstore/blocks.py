"""Boxes within row-major arrays: how shards of a tensor lie in the whole one. Arithmetic alone: no bytes, no torch.

A box is where it begins and how long it is, in each dimension.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MAX_CUT_DIMENSIONS = 4
"""Along how many dimensions an array may be cut into blocks; looking for gaps and overlaps takes 2 to that power."""

Sizes = tuple[int, ...]
Box = tuple[Sizes, Sizes]


def tile(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether `boxes` cover an array of `shape`, each element once; none of them may be empty.

    They do if their volumes add up to that of the array, and each corner of them, but for those of the array itself,
    is a corner of an even number of them: then, modulo 2, they add up to the array, so every element is in an odd
    number of boxes, and one box each is all that there is volume for.
    """
    for at, sizes in boxes:
        if len(at) != len(shape) or len(sizes) != len(shape):
            return False
        if any(not 0 <= start < start + size <= end for start, size, end in zip(at, sizes, shape, strict=True)):
            return False
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    cut = [number for number, end in enumerate(shape) if any(sizes[number] != end for _, sizes in boxes)]
    if len(cut) > MAX_CUT_DIMENSIONS:
        return False
    odd: set[Sizes] = set()
    for at, sizes in [*boxes, ((0,) * len(shape), tuple(shape))]:
        odd.symmetric_difference_update(
            itertools.product(*((at[number], at[number] + sizes[number]) for number in cut))
        )
    return not odd


def flat_range(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """Where the elements of a box, which is not empty, lie in a row-major array: from, to; None if not side by side."""
    at, sizes = box
    start = 0
    for end, first in zip(shape, at, strict=True):
        start = start * end + first
    is_whole = True
    for end, size in zip(reversed(shape), reversed(sizes), strict=True):
        if not is_whole and size != 1:
            return None
        is_whole = is_whole and size == end
    return start, start + math.prod(sizes)


@dataclass(frozen=True, slots=True)
class Folding:
    """Dimensions taken together that no box is cut along: one dimension for each cut one and those behind it.

    What is left are one more than dimensions that are cut, however many a shape has: work grows with those.
    """

    groups: tuple[tuple[int, int], ...]
    """Of each dimension that is left: the first of those that it stands for, and the one behind the last."""

    def sizes(self, sizes: Sizes) -> Sizes:
        """The same sizes, folded."""
        return tuple(math.prod(sizes[first:stop]) for first, stop in self.groups)

    def box(self, box: Box) -> Box:
        """The same box, folded."""
        at, sizes = box
        starts = (at[first] * math.prod(sizes[first + 1 : stop]) for first, stop in self.groups)
        return tuple(starts), self.sizes(sizes)


def fold(shape: Sequence[int], boxes: Iterable[Box]) -> Folding:
    """How an array of `shape` can be folded for all of these boxes of it."""
    cut = {number for _, sizes in boxes for number, size in enumerate(sizes) if size != shape[number]}
    firsts = sorted({0, *cut}) if shape else []
    return Folding(tuple(itertools.pairwise([*firsts, len(shape)])))


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The elements from `start` to `stop` of a row-major array as boxes, one after the other.

    With each: how many elements come before it. Two boxes at most for each dimension, and one more.
    """
    if start >= stop:
        return
    if not shape:
        yield ((), ()), 0
        return
    row = math.prod(shape[1:])
    (first, into), (last, rest) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, shape, into, rest, 0)
        return
    done = 0
    if into:
        yield from _in_row(first, shape, into, row, 0)
        first, done = first + 1, row - into
    if first < last:
        yield ((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])), done
        done += (last - first) * row
    if rest:
        yield from _in_row(last, shape, 0, rest, done)


def _in_row(number: int, shape: Sequence[int], start: int, stop: int, done: int) -> Iterator[tuple[Box, int]]:
    for (at, sizes), before in boxes_of_range(shape[1:], start, stop):
        yield ((number, *at), (1, *sizes)), done + before


def common(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None for nothing."""
    at = tuple(map(max, one[0], other[0]))
    ends = (min(a + m, b + n) for a, m, b, n in zip(*one, *other, strict=True))
    sizes = tuple(end - start for start, end in zip(at, ends, strict=True))
    return (at, sizes) if all(size > 0 for size in sizes) else None


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """The slices that take `inner` out of an array that holds `outer`."""
    return tuple(
        slice(start - origin, start - origin + size) for start, size, origin in zip(*inner, outer[0], strict=True)
    )


def moved(box: Box, by: Iterable[int]) -> Box:
    """The same box, farther on."""
    return tuple(start + more for start, more in zip(box[0], by, strict=True)), box[1]
