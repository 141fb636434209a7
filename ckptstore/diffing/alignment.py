"""Which bytes of which chunks two tensors have at the same elements. Arithmetic on manifests; no byte is read.

Most tensors are cut alike on both sides: as one run of bytes, or into the same blocks. Then runs are laid side by side.
Tensors that were cut into different blocks, by another number of processes say, are compared box by box.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ckptstore import blocks as boxes
from ckptstore.diffing.trees import Pair
from ckptstore.manifest import Manifest, Placed
from ckptstore.skeleton import TensorNode, contiguous_stride

__all__ = ["Aligned", "Taken", "align", "is_laid_out"]


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes of a chunk: `box` of what lies from `offset` on as a row-major array of `shape`; of runs, one dimension."""

    chunk: int
    offset: int
    shape: tuple[int, ...]
    box: boxes.Box

    @classmethod
    def run(cls, chunk: int, offset: int, length: int) -> "Taken":
        """So many bytes side by side."""
        return cls(chunk, offset, (length,), ((0,), (length,)))


@dataclass(frozen=True, slots=True)
class Aligned:
    """The same elements of a tensor before and after, and their bytes."""

    before: Taken
    after: Taken
    bytes: int


def is_laid_out(manifest: Manifest, node: TensorNode) -> bool:
    """Whether each element of a tensor lies once, and nothing else between them, in the chunks of its segment."""
    segment = manifest.segments[node.segment]
    if segment.shape is not None:
        whole = tuple(segment.shape) == node.shape and segment.bytes == node.span_bytes
        return whole and node.stride is None
    if node.stride is None:
        return True
    strides = sorted((step, size) for step, size in zip(node.stride, node.shape, strict=True) if size > 1)
    expected = 1
    for step, size in strides:
        if step != expected:
            return False
        expected *= size
    return True


def align(before: Manifest, after: Manifest, pair: Pair) -> list[Aligned] | None:
    """The bytes of a tensor before and after, side by side, none of them twice.

    None if they do not lie so that they can be: then both have to be put together first.
    """
    old, new = pair.before, pair.after
    if not old.logical_bytes:
        return []
    if not (is_laid_out(before, old) and is_laid_out(after, new)) or _stride(old) != _stride(new):
        return None
    one, other = before.segments[old.segment], after.segments[new.segment]
    if [(b.at, b.shape) for b in one.blocks or ()] == [(b.at, b.shape) for b in other.blocks or ()]:
        found = list(_side_by_side(list(_runs(before, old)), list(_runs(after, new))))
    elif old.stride is not None:
        return None
    else:
        found = list(_box_by_box(list(_boxes(before, old)), list(_boxes(after, new))))
    # An element may have been cut in two, where a tensor is a view of memory of another type.
    return None if any(place.bytes % old.item_bytes for place in found) else found


def _stride(node: TensorNode) -> tuple[int, ...]:
    stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
    return tuple(step for step, size in zip(stride, node.shape, strict=True) if size > 1)


def _runs(manifest: Manifest, node: TensorNode) -> Iterator[tuple[int, int, int]]:
    """Chunk, offset in it, and length of each run of the tensor's bytes, one after the other, block by block."""
    segment = manifest.segments[node.segment]
    first, last = node.offset, node.offset + node.span_bytes
    if segment.blocks is not None:
        first, last = 0, segment.bytes
    position = 0
    for placed in manifest.placed(node.segment):
        length = placed.stop - placed.start
        start, stop = max(first, position), min(last, position + length)
        if start < stop:
            yield placed.chunk, placed.offset + start - position, stop - start
        position += length


def _side_by_side(old: list[tuple[int, int, int]], new: list[tuple[int, int, int]]) -> Iterator[Aligned]:
    """Cut two sequences of runs, as long in all, wherever one of them is cut."""
    ours, theirs = iter(old), iter(new)
    chunk, offset, left = next(ours)
    other, other_offset, other_left = next(theirs)
    while True:
        length = min(left, other_left)
        yield Aligned(Taken.run(chunk, offset, length), Taken.run(other, other_offset, length), length)
        offset, left, other_offset, other_left = (
            offset + length,
            left - length,
            other_offset + length,
            other_left - length,
        )
        if not left:
            following = next(ours, None)
            if following is None:
                return
            chunk, offset, left = following
        if not other_left:
            other, other_offset, other_left = next(theirs)


def _boxes(manifest: Manifest, node: TensorNode) -> Iterator[tuple[boxes.Box, int, int]]:
    """Each box of the tensor's bytes (an item's bytes are one dimension more), the chunk, and where in it it begins."""
    segment = manifest.segments[node.segment]
    shape = (*node.shape, node.item_bytes)
    if segment.blocks is None:
        position = 0
        for chunk, offset, length in _runs(manifest, node):
            for box, before in boxes.boxes_of_range(shape, position, position + length):
                yield box, chunk, offset + before
            position += length
        return
    for placed in manifest.placed(node.segment):
        yield from _boxes_of_block(placed, segment.item_bytes)


def _boxes_of_block(placed: Placed, item_bytes: int) -> Iterator[tuple[boxes.Box, int, int]]:
    at, sizes = placed.box
    for box, before in boxes.boxes_of_range((*sizes, item_bytes), placed.start, placed.stop):
        yield boxes.moved(box, (*at, 0)), placed.chunk, placed.offset + before


def _box_by_box(old: list[tuple[boxes.Box, int, int]], new: list[tuple[boxes.Box, int, int]]) -> Iterator[Aligned]:
    """What each box before has in common with each after. Those that begin below it are none of its business."""
    new = sorted(new, key=lambda each: each[0][0][0])
    firsts = [box[0][0] for box, _, _ in new]
    for box, chunk, offset in old:
        for other, other_chunk, other_offset in new[: bisect.bisect_left(firsts, box[0][0] + box[1][0])]:
            if (shared := boxes.common(box, other)) is not None:
                yield Aligned(
                    Taken(chunk, offset, box[1], _moved_into(shared, box)),
                    Taken(other_chunk, other_offset, other[1], _moved_into(shared, other)),
                    math.prod(shared[1]),
                )


def _moved_into(inner: boxes.Box, outer: boxes.Box) -> boxes.Box:
    return tuple(start - origin for start, origin in zip(inner[0], outer[0], strict=True)), inner[1]
