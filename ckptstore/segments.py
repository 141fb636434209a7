"""From the tensors of a state to segments of bytes, and from these to chunks. Reads memory, does no I/O.

A segment is a run of bytes that one tensor, or several that overlap in memory, live in; so tied weights are stored
once and come back tied. Long segments are cut into chunks, short ones are packed together into bundles.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from ckptstore.chunk import digest
from ckptstore.kernels import ByteArray
from ckptstore.manifest import Segment
from ckptstore.pipeline import each
from ckptstore.skeleton import TAG, TensorNode
from ckptstore.tree import TORCH_DTYPES, TensorLeaf

BUNDLE_BYTES = 2**20
"""Bundles are closed at this size: large enough for few objects, small enough that a change of one tensor of many
does not store much again."""

_ALIGNMENT = 64
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(slots=True)
class Source:
    """The bytes of one segment in memory: of the state itself, or of a copy that nobody else writes to."""

    flat: "torch.Tensor | ByteArray"
    """One dimension of uint8, contiguous; on any device."""
    element: int
    """Bytes of a number in it, 1, 2, 4 or 8: how to split it into planes."""
    private: bool
    begins: int = 0
    """Where it begins in a larger run of bytes that it is a part of: it is cut where that would be."""

    @property
    def bytes(self) -> int:
        return int(self.flat.shape[0])

    def read(self, start: int, stop: int) -> ByteArray:
        """The bytes from `start` to `stop`; a view where the memory is the host's."""
        if isinstance(self.flat, torch.Tensor):
            return cast(ByteArray, self.flat[start:stop].cpu().numpy())
        return self.flat[start:stop]

    def move_to(self, memory: ByteArray) -> None:
        """Go on with a copy in `memory`, which is as long and nobody else's, so that the state may change."""
        if isinstance(self.flat, torch.Tensor):
            torch.from_numpy(memory).copy_(self.flat)
        else:
            memory[:] = self.flat
        self.flat, self.private = memory, True


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """The raw bytes of one chunk: parts of one segment, or many whole ones in a bundle."""

    parts: tuple[tuple[Source, int, int], ...]
    element: int
    raw_bytes: int

    @property
    def private(self) -> bool:
        """Whether nobody else can write to its memory."""
        return all(source.private for source, _, _ in self.parts)

    def read(self) -> ByteArray:
        """The raw bytes, contiguous; a view where one part in host memory holds them all."""
        pieces = [source.read(start, stop) for source, start, stop in self.parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(slots=True)
class Layout:
    """Where the bytes of a state lie: its sources, the chunks made of them, and which segment is in which chunks."""

    sources: list[Source]
    chunks: list[PlannedChunk]
    places: list[tuple[list[int], int | None]]
    """For each source: indices into `chunks`, and the offset within a bundle."""

    @property
    def raw_bytes(self) -> int:
        """All bytes of the state, those that several tensors share counted once."""
        return sum(source.bytes for source in self.sources)

    def digests(self, *, threads: int) -> list[str]:
        """The digest of each chunk."""
        return each(
            lambda chunk: digest(chunk.read()), self.chunks, threads=threads, weigh=lambda chunk: chunk.raw_bytes
        )

    def segments(self, digests: Sequence[str]) -> tuple[list[Segment], dict[str, PlannedChunk]]:
        """The manifest's segments, and the different chunks by digest in the order of the manifest's table.

        Equal chunks (of two equal tensors, or of zeros) become one.
        """
        number_of: dict[str, int] = {}
        distinct: dict[str, PlannedChunk] = {}
        for name, chunk in zip(digests, self.chunks, strict=True):
            number_of.setdefault(name, len(number_of))
            distinct.setdefault(name, chunk)
        table = [number_of[name] for name in digests]
        segments = [
            Segment(
                bytes=source.bytes,
                element=element_size(source),
                chunks=[table[index] for index in chunks],
                offset=offset,
            )
            for source, (chunks, offset) in zip(self.sources, self.places, strict=True)
        ]
        return segments, distinct


Move = tuple[Source, ByteArray]
"""A source, and the memory that it is to be copied to."""


def move(moves: Sequence[Move], *, threads: int) -> None:
    """Copy sources, and let them go on with the copies."""
    each(lambda pair: pair[0].move_to(pair[1]), moves, threads=threads)


class Room:
    """Host memory for the copy of a state, used again for the next one: new memory costs more than the copy does.

    One copy at a time: the next one overwrites it.
    """

    def __init__(self) -> None:
        self._memory: ByteArray = np.empty(0, np.uint8)

    def detach(
        self, sources: Sequence[Source], *, threads: int, later: Callable[[Source], bool] = lambda source: False
    ) -> list[Move]:
        """Copy everything that the caller could still change into this room, and let `sources` go on with that.

        Returns those that `later` picks, for `move`: they still are the caller's.
        """
        changing = [source for source in sources if not source.private]
        starts = [0, *itertools.accumulate(source.bytes + -source.bytes % _ALIGNMENT for source in changing)]
        needed = starts.pop()
        if not needed <= len(self._memory) <= 2 * needed:
            self._memory = np.empty(0, np.uint8)  # freed first: there is never memory for two copies
            self._memory = np.empty(needed, np.uint8)
        moves = [
            (source, self._memory[start : start + source.bytes]) for source, start in zip(changing, starts, strict=True)
        ]
        left = [pair for pair in moves if later(pair[0])]
        move([pair for pair in moves if not later(pair[0])], threads=threads)
        return left


def cut(sources: list[Source], *, chunk_bytes: int, small_bytes: int) -> Layout:
    """Cut segments into chunks; those below `small_bytes` are packed together."""
    chunks: list[PlannedChunk] = []
    places: list[tuple[list[int], int | None]] = [([], None) for _ in sources]
    small: dict[int, list[int]] = {}
    for number, source in enumerate(sources):
        if 0 < source.bytes < small_bytes:
            # Planes are split by the size of a number, so a bundle holds numbers of one size.
            small.setdefault(source.element, []).append(number)
            continue
        cuts = range(chunk_bytes - source.begins % chunk_bytes, source.bytes, chunk_bytes)
        for start, stop in itertools.pairwise([0, *cuts, source.bytes] if source.bytes else []):
            places[number][0].append(len(chunks))
            chunks.append(PlannedChunk(((source, start, stop),), source.element, stop - start))
    for element, numbers in small.items():
        for bundle in _bundles(numbers, sources, min(BUNDLE_BYTES, chunk_bytes)):
            offset = 0
            for number in bundle:
                places[number] = ([len(chunks)], offset)
                offset += sources[number].bytes
            parts = tuple((sources[number], 0, sources[number].bytes) for number in bundle)
            chunks.append(PlannedChunk(parts, element, offset))
    return Layout(sources, chunks, places)


def _bundles(numbers: Iterable[int], sources: Sequence[Source], limit: int) -> Iterable[list[int]]:
    bundle: list[int] = []
    held = 0
    for number in numbers:
        if bundle and held + sources[number].bytes > limit:
            yield bundle
            bundle, held = [], 0
        bundle.append(number)
        held += sources[number].bytes
    if bundle:
        yield bundle


def element_size(source: Source) -> Literal[1, 2, 4, 8]:
    """Bytes of a number in it, in the type that manifests ask for."""
    return cast(Literal[1, 2, 4, 8], source.element)


# ---- from leaves to sources


@dataclass(slots=True)
class _Span:
    """The bytes of a storage, from `start` to `stop`, that a tensor touches."""

    leaf: TensorLeaf
    value: torch.Tensor
    start: int
    stop: int


def find(leaves: Sequence[TensorLeaf]) -> list[Source]:
    """The segments of `leaves`, in the order in which the tree first touches them; fills in the leaves' nodes."""
    by_storage: dict[Any, list[_Span]] = {}
    clusters: list[list[_Span] | TensorLeaf] = []
    for leaf in leaves:
        if isinstance(leaf.value, np.ndarray):
            clusters.append(leaf)
            continue
        span = _span(leaf, leaf.value.detach().resolve_conj().resolve_neg())
        storage = span.value.untyped_storage()
        # An empty tensor touches nothing, so it overlaps with nothing.
        key = (span.value.device, storage.data_ptr()) if span.stop > span.start else len(by_storage)
        by_storage.setdefault(key, []).append(span)
    for spans in by_storage.values():
        clusters.extend(_overlapping(spans))
    order = {id(leaf): number for number, leaf in enumerate(leaves)}
    clusters.sort(key=lambda cluster: min(order[id(leaf)] for leaf in _leaves(cluster)))
    return [
        _from_array(cluster, number) if isinstance(cluster, TensorLeaf) else _from_spans(cluster, number)
        for number, cluster in enumerate(clusters)
    ]


def _leaves(cluster: "list[_Span] | TensorLeaf") -> list[TensorLeaf]:
    return [cluster] if isinstance(cluster, TensorLeaf) else [span.leaf for span in cluster]


def _span(leaf: TensorLeaf, value: torch.Tensor) -> _Span:
    if value.numel() == 0:
        return _Span(leaf, value, 0, 0)
    start = int(value.storage_offset()) * value.element_size()
    return _Span(leaf, value, start, start + span_bytes(value))


def span_bytes(value: torch.Tensor) -> int:
    """From the first byte of a tensor, which is not empty, to the one behind its last."""
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.element_size()


def _overlapping(spans: list[_Span]) -> list[list[_Span]]:
    """Put spans of one storage that overlap together."""
    clusters: list[list[_Span]] = []
    stop = 0
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if clusters and span.start < stop:
            clusters[-1].append(span)
        else:
            clusters.append([span])
        stop = max(stop, span.stop)
    return clusters


def _from_array(leaf: TensorLeaf, number: int) -> Source:
    array = cast("np.ndarray[Any, Any]", leaf.value)
    flat = np.ascontiguousarray(array).reshape(-1)
    node = TensorNode(leaf.node[TAG], array.dtype.str, array.shape, number)
    leaf.node.update(node.to_json())
    element = {"c": array.dtype.itemsize // 2, "U": 4, "S": 1, "V": 1}.get(array.dtype.kind, array.dtype.itemsize)
    return Source(flat.view(np.uint8), element, private=not np.may_share_memory(flat, array))


def _from_spans(spans: list[_Span], number: int) -> Source:
    if len(spans) == 1 and not fills_its_span(spans[0].value):
        # A view with gaps, such as weight[:, :10]: what lies between does not belong to the state.
        value = spans[0].value.contiguous()
        spans = [_span(spans[0].leaf, value)]
        private = True
    else:
        private = spans[0].value.data_ptr() != cast(torch.Tensor, spans[0].leaf.value).data_ptr()
    widest = max(span.value.element_size() for span in spans)
    start, stop = min(span.start for span in spans), max(span.stop for span in spans)
    start -= start % widest
    for span in spans:
        value = span.value
        original = cast(torch.Tensor, span.leaf.value)
        node = TensorNode(
            "tensor",
            _DTYPE_NAMES[value.dtype],
            tuple(value.shape),
            number,
            offset=max(span.start - start, 0),
            # Where there is one element, its stride says nothing, and torch lets it be anything.
            stride=None
            if value.is_contiguous()
            else tuple(step if size > 1 else 1 for size, step in zip(value.shape, value.stride(), strict=True)),
            requires_grad=original.requires_grad,
            parameter=isinstance(original, torch.nn.Parameter),
        )
        span.leaf.node.update(node.to_json())
    first = spans[0].value
    flat = torch.empty(0, dtype=torch.uint8, device=first.device)
    flat.set_(first.untyped_storage(), start, (stop - start,), (1,))
    element = max(_number_bytes(span.value.dtype) for span in spans)
    if (stop - start) % element:
        element = 1
    return Source(cast(Any, flat.numpy()) if first.device.type == "cpu" else flat, element, private)


def fills_its_span(value: torch.Tensor) -> bool:
    """True if a tensor touches all that lies between its first and its last byte (transposed, expanded: yes)."""
    if value.is_contiguous():
        return True
    touched = span = 1
    for size, step in zip(value.shape, value.stride(), strict=True):
        touched *= size if step else 1
        span += (size - 1) * step
    return touched >= span


def _number_bytes(dtype: torch.dtype) -> int:
    """Bytes of one number: a complex one is two."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
