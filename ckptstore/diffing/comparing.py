"""The contents of tensors, compared: what digests tell is not read; the rest is streamed, in bounded memory.

A chunk before and the chunk after that hold the same elements are fetched together and compared as soon as both are
there; only sums are kept. So are all tensors that small chunks hold many of.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckptstore import blocks as boxes
from ckptstore.decoding import decode_chain, get_chain, named
from ckptstore.diffing.alignment import Aligned, Taken, align
from ckptstore.diffing.numbers import Elements, Moved
from ckptstore.diffing.trees import Pair
from ckptstore.kernels import ByteArray, compiled
from ckptstore.manifest import ChunkRef, Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Stage, staged
from ckptstore.skeleton import TensorNode, contiguous_stride

__all__ = ["Compared", "Comparison", "Side"]

MAX_HELD_BYTES = 128 * 2**20
"""Of chunks on their way, planes and raw bytes counted."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints, and where its chunks are."""

    objects: Objects
    manifest: Manifest


@dataclass(slots=True)
class Compared:
    """What is known of a tensor: sums over what was read, and how much the digests alone say is equal."""

    pair: Pair
    elements: Elements
    moved: Moved = field(default_factory=Moved)
    equal_bytes: int = 0


@dataclass(slots=True)
class _Job:
    """A chunk before, one after (None: it is the same), and the places in both to compare."""

    before: int
    after: int | None
    places: list[tuple[int, Aligned]] = field(default_factory=list)
    """With the number of the tensor."""


class Comparison:
    """All tensors that two checkpoints have in common: planned first, then read."""

    def __init__(self, before: Side, after: Side, pairs: Sequence[Pair], *, read_equal: bool = False) -> None:
        """`read_equal`: read chunks that are equal, too, once, for the lengths of whole tensors."""
        self._before, self._after = before, after
        self.tensors = [
            Compared(pair, Elements(pair.before.dtype, pair.before.item_bytes, is_torch=pair.before.tag == "tensor"))
            for pair in pairs
        ]
        self._jobs: dict[tuple[int, int | None], _Job] = {}
        self._wholes: list[Compared] = []
        self._added = threading.Lock()
        for number, compared in enumerate(self.tensors):
            self._plan(number, compared, read_equal)

    def bytes_to_read(self) -> int:
        """The stored bytes that `run` will fetch."""
        jobs = sum(sum(ref.stored for _, ref in self._objects_of(job)) for job in self._jobs.values())
        wholes = sum(_stored(side, node) for each in self._wholes for side, node in self._sides(each.pair))
        return jobs + wholes

    def run(self, threads: int, progress: Callable[[int], None] | None = None) -> None:
        """Read what has to be read.

        Args:
            threads: how many decode and compare.
            progress: called with the stored bytes of what is done, one call at a time.

        Raises:
            CorruptError: a chunk is not what was saved, or (MissingChunkError) is not there; it names the tensors.
            UnavailableError: a backend failed.
        """
        jobs = list(self._jobs.values())
        objects = self._before.objects
        waits = objects.gets_wait or self._after.objects.gets_wait
        compiled.expect(2 * sum(self._before.manifest.chunks[job.before].raw for job in jobs))
        stages = (
            [
                Stage(lambda job: (job, self._fetch(job)), objects.request_threads),
                Stage(lambda it: self._use(*it), threads),
            ]
            if waits
            else [Stage(lambda job: self._use(job, self._fetch(job)), threads)]
        )

        def done(job: _Job) -> None:
            if progress is not None:
                progress(sum(ref.stored for _, ref in self._objects_of(job)))

        staged(jobs, stages, weigh=self._held_bytes, max_inflight_bytes=MAX_HELD_BYTES, done=done)
        for compared in self._wholes:
            self._compare_whole(compared)
            if progress is not None:
                progress(sum(_stored(side, node) for side, node in self._sides(compared.pair)))

    # ---- the plan

    def _plan(self, number: int, compared: Compared, read_equal: bool) -> None:
        old, new = self._before.manifest, self._after.manifest
        if _is_same(old, compared.pair.before, new, compared.pair.after) and not read_equal:
            compared.equal_bytes = compared.pair.after.logical_bytes
            return
        places = align(old, new, compared.pair)
        if places is None:
            self._wholes.append(compared)
            return
        for place in places:
            is_equal = _is_equal(old, place.before, new, place.after)
            compared.equal_bytes += place.bytes if is_equal else 0
            if not is_equal or read_equal:
                key = place.before.chunk, None if is_equal else place.after.chunk
                self._jobs.setdefault(key, _Job(*key)).places.append((number, place))

    def _sides(self, pair: Pair) -> tuple[tuple[Side, TensorNode], tuple[Side, TensorNode]]:
        return (self._before, pair.before), (self._after, pair.after)

    def _chains(self, job: _Job) -> Iterator[tuple[Side, int, list[ChunkRef]]]:
        yield self._before, job.before, self._before.manifest.chain(job.before)
        if job.after is not None:
            yield self._after, job.after, self._after.manifest.chain(job.after)

    def _objects_of(self, job: _Job) -> list[tuple[Objects, ChunkRef]]:
        """What to fetch. A chunk that one side needs for itself and the other as a base is needed once."""
        needed = {
            (id(side.objects), ref.key): (side.objects, ref) for side, _, chain in self._chains(job) for ref in chain
        }
        return list(needed.values())

    def _held_bytes(self, job: _Job) -> int:
        decoded = sum((2 + (len(chain) > 1)) * chain[-1].raw for _, _, chain in self._chains(job))
        return decoded + sum(ref.stored for _, ref in self._objects_of(job))

    # ---- the work

    def _fetch(self, job: _Job) -> dict[tuple[int, str], bytes]:
        contents: dict[tuple[int, str], bytes] = {}
        for side, index, chain in self._chains(job):
            lacking = [ref for ref in chain if (id(side.objects), ref.key) not in contents]
            with named(side.manifest, index):
                fetched = get_chain(side.objects, lacking)
            contents |= {(id(side.objects), ref.key): content for ref, content in zip(lacking, fetched, strict=True)}
        return contents

    def _use(self, job: _Job, contents: dict[tuple[int, str], bytes]) -> None:
        decoded: list[ByteArray] = []
        for side, index, chain in self._chains(job):
            raw = np.empty(chain[-1].raw, np.uint8)
            with named(side.manifest, index):
                decode_chain(chain, [contents[id(side.objects), ref.key] for ref in chain], raw)
            decoded.append(raw)
        contents.clear()
        for number, place in job.places:
            compared = self.tensors[number]
            old = _take(place.before, decoded[0])
            if job.after is None:
                moved = compared.elements.unchanged(old)
            else:
                moved = compared.elements.compare(old, _take(place.after, decoded[1]))
            with self._added:
                compared.moved += moved

    def _compare_whole(self, compared: Compared) -> None:
        """A tensor whose elements lie in another order on the other side, or not side by side."""
        old, new = (_whole(side, node) for side, node in self._sides(compared.pair))
        compared.moved += compared.elements.compare(old, new)


def _is_same(before: Manifest, old: TensorNode, after: Manifest, new: TensorNode) -> bool:
    """Whether two tensors lie alike in segments that are alike, chunk by chunk."""
    if (old.offset, old.stride) != (new.offset, new.stride):
        return False
    one, other = before.segments[old.segment], after.segments[new.segment]
    if (one.bytes, one.offset, one.shape) != (other.bytes, other.offset, other.shape):
        return False
    if [(b.at, b.shape, b.chunks, b.offset) for b in one.blocks or ()] != [
        (b.at, b.shape, b.chunks, b.offset) for b in other.blocks or ()
    ]:
        return False
    return [before.chunks[i].digest for i in one.chunks] == [after.chunks[i].digest for i in other.chunks]


def _is_equal(before: Manifest, old: Taken, after: Manifest, new: Taken) -> bool:
    """Whether the digests say that two places hold the same bytes."""
    same_place = (old.offset, old.shape, old.box) == (new.offset, new.shape, new.box)
    return same_place and before.chunks[old.chunk].digest == after.chunks[new.chunk].digest


def _take(taken: Taken, raw: ByteArray) -> ByteArray:
    """The bytes, contiguous."""
    held = raw[taken.offset : taken.offset + int(np.prod(taken.shape))]
    if len(taken.shape) == 1:
        return held
    part = held.reshape(taken.shape)[boxes.within(taken.box, ((0,) * len(taken.shape), taken.shape))]
    return np.ascontiguousarray(part).reshape(-1)


def _whole(side: Side, node: TensorNode) -> ByteArray:
    """All elements of a tensor in row-major order, its whole segment read."""
    segment = side.manifest.segments[node.segment]
    memory = np.empty(segment.bytes, np.uint8)
    array = memory.reshape((segment.bytes,) if segment.shape is None else (*segment.shape, segment.item_bytes))
    for placed in side.manifest.placed(node.segment):
        chain = side.manifest.chain(placed.chunk)
        raw = np.empty(chain[-1].raw, np.uint8)
        with named(side.manifest, placed.chunk):
            decode_chain(chain, get_chain(side.objects, chain), raw)
        if segment.shape is None:
            memory[placed.start : placed.stop] = raw[placed.offset : placed.offset + placed.stop - placed.start]
            continue
        at, sizes = placed.box
        for box, before in boxes.boxes_of_range((*sizes, segment.item_bytes), placed.start, placed.stop):
            there = boxes.moved(box, (*at, 0))
            held = raw[placed.offset + before :][: int(np.prod(box[1]))]
            array[tuple(slice(start, start + size) for start, size in zip(*there, strict=True))] = held.reshape(box[1])
    stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
    items = memory[node.offset : node.offset + node.span_bytes].view(np.dtype((np.void, node.item_bytes)))
    view = np.lib.stride_tricks.as_strided(
        items, node.shape, [step * node.item_bytes for step in stride], writeable=False
    )
    return np.ascontiguousarray(view).reshape(-1).view(np.uint8)


def _stored(side: Side, node: TensorNode) -> int:
    indices = side.manifest.segments[node.segment].chunks
    return sum(ref.stored for index in indices for ref in side.manifest.chain(index))
