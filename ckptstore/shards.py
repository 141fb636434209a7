"""A state that many processes hold parts of: what each of them stores, and how one of them makes a checkpoint of it.

Each process turns its parts into `Stored` (`Part.store`); these travel to one of them, which puts them together
(`Whole`). What is small travels with its bytes, and is bundled there, as if one process had saved it all. Knows
nothing of how processes talk to each other.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from ckptstore import blocks as boxes
from ckptstore import protocol, segments
from ckptstore.deltas import Held
from ckptstore.errors import InvalidInputError
from ckptstore.format import Codec, ManifestKey
from ckptstore.manifest import Block, ElementSize, Segment
from ckptstore.objects.base import Objects
from ckptstore.performing import Performer
from ckptstore.pipeline import Progress
from ckptstore.skeleton import MAX_DEPTH, TAG, TensorNode, tensor_places
from ckptstore.tree import TensorLeaf, encode_hashable, flatten

MAX_CARRIED_BYTES = 64 * 2**20
"""Of all shards of small tensors whose bytes travel; those beyond are stored by whoever holds them."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What one process tells each of the others when it has opened the session of their save."""

    save: str
    upload: str
    """The id that this process uploads its chunks under."""
    newest: ManifestKey | None
    chunk_bytes: int
    small_bytes: int
    carried_bytes: int
    """How many bytes of small tensors this process may send along, rather than store them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The bytes of a source: in chunks that are held, at `offset` of a bundle if that is not None; or themselves."""

    length: int
    element: ElementSize
    chunks: tuple[Held, ...] = ()
    offset: int | None = None
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor, and its bytes."""

    dtype: str
    box: boxes.Box
    stored: Stored


@dataclass(frozen=True, slots=True)
class Value:
    """What is no tensor: its skeleton, and the segments of what has bytes in it, by their numbers there."""

    skeleton: Any
    stored: list[Stored]


@dataclass(slots=True)
class _Given:
    """What was given under a name, before its bytes are stored: sources, numbered from `first` on."""

    node: Any
    first: int
    count: int
    box: boxes.Box | None = None


class Part:
    """What one process holds of a state."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._given: list[_Given] = []
        self._sources: list[segments.Source] = []
        self._carried: set[int] = set()
        self._budget = terms.carried_bytes

    def add_shard(self, name: str, tensor: torch.Tensor, at: Sequence[int], whole: Sequence[int]) -> None:
        """A box of the tensor `name`, which is of the shape `whole`. Raises InvalidInputError if it cannot be saved."""
        node, [leaf] = flatten(tensor.detach(), root=name)
        if isinstance(leaf.value, torch.Tensor) and not leaf.value.is_contiguous():
            leaf = TensorLeaf(name, leaf.value.contiguous(), node)
        box = tuple(at), tuple(tensor.shape)
        [source] = segments.find([leaf])
        source.private = source.private or not _shares(leaf.value, tensor)
        if source.bytes and (flat := boxes.flat_range(whole, box)) is not None:
            source.begins = flat[0] * tensor.element_size()
        is_small = math.prod(whole) * tensor.element_size() < self._terms.small_bytes
        if is_small and source.bytes <= self._budget:
            self._budget -= source.bytes
            self._carried.add(len(self._sources))
        self._given.append(_Given(node, len(self._sources), 1, box))
        self._sources.append(source)

    def add_value(self, name: str, value: Any) -> None:
        """What is no tensor. Raises InvalidInputError if it cannot be saved."""
        node, leaves = flatten(value, root=name)
        sources = segments.find(leaves)
        self._given.append(_Given(node, len(self._sources), len(sources)))
        self._sources += sources

    def store(
        self, objects: Objects, *, codec: Codec, threads: int, progress: Progress | None = None
    ) -> "list[Shard | Value]":
        """Hash everything, upload what is not there yet; return what was made of it, in the order of adding.

        Raises:
            InvalidInputError: the state changed meanwhile.
            UnavailableError: the backend failed.
        """
        own = [source for number, source in enumerate(self._sources) if number not in self._carried]
        layout = segments.cut(own, chunk_bytes=self._terms.chunk_bytes, small_bytes=self._terms.small_bytes)
        table, distinct = layout.segments(layout.digests(threads=threads))
        request = protocol.PartRequest(
            save=self._terms.upload,
            chunks={name: chunk.raw_bytes for name, chunk in distinct.items()},
            newest=self._terms.newest,
        )
        steps = protocol.hold_part(request, self._terms.save)
        held = Performer(objects, distinct, codec, threads, progress).perform(steps) if distinct else {}
        names = list(distinct)
        stored_own = iter(
            Stored(
                length=segment.bytes,
                element=segment.element,
                chunks=tuple(held[names[index]] for index in segment.chunks),
                offset=segment.offset,
            )
            for segment in table
        )
        stored = [
            _carried(source) if number in self._carried else next(stored_own)
            for number, source in enumerate(self._sources)
        ]
        return [self._told(given, stored[given.first : given.first + given.count]) for given in self._given]

    def _told(self, given: _Given, stored: list[Stored]) -> "Shard | Value":
        if given.box is None:
            return Value(given.node, stored)
        return Shard(given.node["dtype"], given.box, stored[0])


def _shares(value: "torch.Tensor | np.ndarray[Any, Any]", tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.data_ptr() == tensor.data_ptr()


def _carried(source: segments.Source) -> Stored:
    raw = source.read(0, source.bytes).tobytes()
    return Stored(length=source.bytes, element=segments.element_size(source), raw=raw)


class Whole:
    """A state put together from what its processes have stored."""

    def __init__(self) -> None:
        self._segments: list[Stored | list[Shard] | segments.Source] = []
        self._shapes: dict[int, tuple[int, ...]] = {}

    def add_tensor(
        self, name: str, shape: Sequence[int], shards: Sequence[Shard], *, requires_grad: bool
    ) -> dict[str, Any]:
        """The node of a tensor. Raises InvalidInputError if its shards are not what it is made of."""
        full = tuple(shape)
        dtypes = {shard.dtype for shard in shards}
        if len(dtypes) != 1:
            raise InvalidInputError(
                f"{name} has shards of the dtypes {', '.join(sorted(dtypes)) or 'none at all'}: give all processes one."
            )
        node = TensorNode("tensor", dtypes.pop(), full, len(self._segments))
        if requires_grad and node.dtype.startswith(("float", "bfloat", "complex")):
            node = TensorNode("tensor", node.dtype, full, node.segment, requires_grad=True)
        filled = sorted((shard for shard in shards if shard.stored.length), key=lambda shard: shard.box[0])
        if 0 in full:
            self._segments.append(shards[0].stored)
            return node.to_json()
        if not boxes.tile(full, [shard.box for shard in filled]):
            raise InvalidInputError(
                f"{name}, of shape {full}, is not what the processes' shards make up: they leave gaps, overlap, lie "
                f"outside, or cut it along more than {boxes.MAX_CUT_DIMENSIONS} dimensions. Every element is to be "
                "in the plan of one process."
            )
        if all(shard.stored.raw is not None for shard in filled):
            self._segments.append(_joined(filled, full, node))
        else:
            self._shapes[len(self._segments)] = full
            self._segments.append(filled)
        return node.to_json()

    def add_value(self, value: Value) -> Any:
        """The node of what is no tensor."""
        for _, node in tensor_places(value.skeleton):
            node["segment"] += len(self._segments)
        self._segments += value.stored
        return value.skeleton

    def lay_out(
        self, *, chunk_bytes: int, small_bytes: int, threads: int
    ) -> tuple[list[Segment], dict[str, int], dict[str, Held], dict[str, segments.PlannedChunk]]:
        """Bundle what was carried.

        Returns:
            The segments of the manifest; raw bytes by digest, in the order of its table; the chunks that are held; and
            those that are to be uploaded, unless they are held.
        """
        own = [source for each in self._segments for source in _carried_in(each)]
        layout = segments.cut(own, chunk_bytes=chunk_bytes, small_bytes=small_bytes)
        made, distinct = layout.segments(layout.digests(threads=threads))
        names, rest = list(distinct), iter(made)
        table, held = _Table(), dict[str, Held]()

        def placed(stored: Stored | segments.Source) -> Segment:
            if isinstance(stored, Stored) and stored.raw is None:
                held.update((chunk.digest, chunk) for chunk in stored.chunks if chunk.digest not in held)
                chunks = [table.number(chunk.digest, chunk.raw) for chunk in stored.chunks]
                return Segment(bytes=stored.length, element=stored.element, chunks=chunks, offset=stored.offset)
            segment = next(rest)
            chunks = [table.number(name, distinct[name].raw_bytes) for name in (names[at] for at in segment.chunks)]
            return msgspec.structs.replace(segment, chunks=chunks)

        result = [
            _put_together([(shard.box, placed(shard.stored)) for shard in each], self._shapes[number])
            if isinstance(each, list)
            else placed(each)
            for number, each in enumerate(self._segments)
        ]
        return result, table.lengths, held, distinct


class _Table:
    """The chunks of a manifest, each once, in the order in which segments first name them."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}
        self._numbers: dict[str, int] = {}

    def number(self, digest: str, raw: int) -> int:
        self.lengths.setdefault(digest, raw)
        return self._numbers.setdefault(digest, len(self._numbers))


def _carried_in(stored: Stored | list[Shard] | segments.Source) -> list[segments.Source]:
    """What is still to be stored of a segment."""
    if isinstance(stored, segments.Source):
        return [stored]
    every = [shard.stored for shard in stored] if isinstance(stored, list) else [stored]
    return [
        segments.Source(np.frombuffer(each.raw, np.uint8), each.element, private=True)
        for each in every
        if each.raw is not None
    ]


def _joined(shards: Sequence[Shard], shape: tuple[int, ...], node: TensorNode) -> segments.Source:
    """The bytes of a tensor whose shards have travelled."""
    memory = np.empty((*shape, node.item_bytes), np.uint8)
    for shard in shards:
        at, sizes = shard.box
        there = (*at, 0), (*sizes, node.item_bytes)
        held = np.frombuffer(shard.stored.raw or b"", np.uint8).reshape(there[1])
        memory[boxes.within(there, ((0,) * memory.ndim, memory.shape))] = held
    return segments.Source(memory.reshape(-1), shards[0].stored.element, private=True)


def _put_together(parts: Sequence[tuple[boxes.Box, Segment]], shape: tuple[int, ...]) -> Segment:
    """The segment of a tensor whose parts are segments by themselves: as plain as it can be."""
    if len(parts) == 1:
        return parts[0][1]
    total = sum(part.bytes for _, part in parts)
    element = min(part.element for _, part in parts)
    chunks = [index for _, part in parts for index in part.chunks]
    position, follows = 0, True
    for box, part in parts:
        flat = boxes.flat_range(shape, box)
        follows = follows and flat is not None and flat[0] == position and part.offset is None
        position += math.prod(box[1])
    if follows:
        return Segment(bytes=total, element=element, chunks=chunks)
    blocks = [
        Block(at=list(at), shape=list(sizes), chunks=len(part.chunks), offset=part.offset)
        for (at, sizes), part in parts
    ]
    return Segment(bytes=total, element=element, chunks=chunks, shape=list(shape), blocks=blocks)


@dataclass(slots=True)
class Tree:
    """A skeleton built from leaves, each at a path of keys and indices."""

    _root: dict[str | int, Any] = field(default_factory=dict)

    def put(self, path: Sequence[str | int], node: Any) -> None:
        """Let `node` stand at `path`, whose parts are keys of dicts (str) and indices of lists (int)."""
        here = self._root
        for key, below in itertools.pairwise(path):
            if here.get(key) in ([], {}):
                del here[key]  # what is empty in one process may hold something in another
            branch = here.setdefault(key, _Branch(is_list=isinstance(below, int)))
            if not isinstance(branch, _Branch):
                raise InvalidInputError(f"{'.'.join(map(str, path))} stands below {key}, which is a value. Rename one.")
            here = branch.members
        if path[-1] not in here:
            here[path[-1]] = node
        elif not (isinstance(here[path[-1]], _Branch) and node in ([], {})):
            raise InvalidInputError(
                f"{'.'.join(map(str, path))} is a value in one process, and something else, or holds something, in "
                "another. Rename one."
            )

    def skeleton(self) -> Any:
        """All of it."""
        return _encode(_Branch(is_list=False, members=self._root), 0)


@dataclass(slots=True)
class _Branch:
    is_list: bool
    members: dict[str | int, Any] = field(default_factory=dict)


def _encode(node: Any, depth: int) -> Any:
    if not isinstance(node, _Branch):
        return node
    if depth > MAX_DEPTH:
        raise InvalidInputError(f"the state is nested deeper than {MAX_DEPTH} containers. Flatten it.")
    members: Mapping[Any, Any] = {key: _encode(below, depth + 1) for key, below in node.members.items()}
    if node.is_list:
        return [members.get(index) for index in range(1 + max(members, default=-1))]
    if (numbered := _numbered(members)) is not None:
        members = {**members, "state": numbered}
    if all(not key.startswith(TAG) for key in members):
        return members
    return {TAG: "dict", "items": [[encode_hashable(key, str(key)), below] for key, below in members.items()]}


def _numbered(members: Mapping[str, Any]) -> Any:
    """The state of an optimizer, if `members` is one's, with the numbers of its parameters for keys; else None.

    DCP makes texts of all keys on its way here. To torch the state of a parameter "0" is that of none.
    """
    groups, state = members.get("param_groups"), members.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or TAG in state:
        return None
    params = [group.get("params") for group in groups if isinstance(group, dict)]
    numbers = {str(number) for each in params if isinstance(each, list) for number in each if type(number) is int}
    if not state or not numbers.issuperset(state):
        return None
    return {TAG: "dict", "items": [[int(key), below] for key, below in state.items()]}
