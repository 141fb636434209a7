"""Which chunk of an earlier checkpoint a delta may stand on, and what decoding it takes. Pure; no I/O.

A base is the chunk at the same place of the same tensor in the run's newest checkpoint, or what that stands on itself:
a save makes no chains, so that a restore decodes at most two objects a chunk. Chains are made by a compaction.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from ckptstore.format import chunk_key
from ckptstore.manifest import ChunkRef, Manifest, Segment
from ckptstore.skeleton import tensors

Place = tuple[str, int]
"""Where a chunk is in a state: the path of the first tensor in it, and the how manieth of the tensor's it is."""


class Held(Struct, frozen=True, gc=False):
    """A chunk that is in the store, and the one that it stands on.

    None of the garbage collector's business: there are as many as chunks, and they only ever point downwards.
    """

    digest: str
    save: str
    raw: int
    stored: int
    base: "Held | None" = None

    @property
    def key(self) -> str:
        return chunk_key(self.digest, self.save, is_delta=self.base is not None)

    @property
    def chain(self) -> "list[Held]":
        """What decoding it takes, in the order of decoding: a full chunk, and the deltas on it up to this one."""
        return [self] if self.base is None else [*self.base.chain, self]


def held_chunks(manifest: Manifest) -> list[Held]:
    """The chunks of a manifest's table, with what they stand on."""
    found: dict[int, Held] = {}
    for number in range(len(manifest.chunks)):
        climbed = []
        index: int | None = number
        while index is not None and index not in found:
            climbed.append(index)
            index = manifest.chunks[index].base
        for index in reversed(climbed):
            ref = manifest.chunks[index]
            below = None if ref.base is None else found[ref.base]
            found[index] = Held(ref.digest, ref.save, ref.raw, ref.stored, below)
    return [found[number] for number in range(len(manifest.chunks))]


def table(chunks: Sequence[Held]) -> list[ChunkRef]:
    """The chunks of a manifest: those given, in their order, and behind them what else decoding them takes."""
    number_of = {held.key: number for number, held in enumerate(chunks)}
    everything = list(chunks)
    for held in chunks:
        for below in held.chain:
            if below.key not in number_of:
                number_of[below.key] = len(everything)
                everything.append(below)
    return [
        ChunkRef(
            digest=held.digest,
            save=held.save,
            raw=held.raw,
            stored=held.stored,
            base=None if held.base is None else number_of[held.base.key],
        )
        for held in everything
    ]


def heads(manifest: Manifest) -> int:
    """How many chunks of the table tensors are made of; those behind are only there for others to stand on."""
    return 1 + max((index for segment in manifest.segments for index in segment.chunks), default=-1)


def find_bases(
    wanted: Iterable[int],
    lengths: Sequence[int],
    tree: Any,
    segments: Sequence[Segment],
    earlier: Manifest,
    depth: Callable[[int], int] = lambda index: 1,
) -> dict[int, Held]:
    """What the chunks at the indices `wanted` of a new checkpoint may be stored as differences to.

    That is the chunk at the same place of the earlier one; or, if its chain is as long as it may be, the full chunk at
    the end of that. The differences next to each other are the smallest ones, and they grow ever less with the
    distance: so one long leap, after which the chain can grow again, takes less than many middling ones.

    Args:
        wanted: indices into the new manifest's table.
        lengths: raw bytes of each chunk of that table.
        tree: the new checkpoint's.
        segments: likewise.
        earlier: the manifest of a checkpoint in the store.
        depth: how many differences may stand one on another for the chunk at an index, the new one counted.

    Returns:
        By index; full chunks, if `depth` is 1. Chunks for which the earlier checkpoint has none of the same length, or
        whose depth is 0 or less, are left out.
    """
    held = held_chunks(earlier)
    there = {place: index for index, place in _places(earlier.tree, earlier.segments).items()}
    here = _places(tree, segments)
    found: dict[int, Held] = {}
    for index in wanted:
        earlier_index = there.get(here[index]) if index in here else None
        if earlier_index is not None and held[earlier_index].raw == lengths[index] and depth(index) > 0:
            chain = held[earlier_index].chain
            found[index] = chain[-1] if len(chain) <= depth(index) else chain[0]
    return found


def _places(tree: Any, segments: Sequence[Segment]) -> Mapping[int, Place]:
    """The place of each chunk. A bundle's is that of its first tensor; any other rule would be as good a guess."""
    found: dict[int, Place] = {}
    seen: set[int] = set()
    for path, node in tensors(tree, [segment.bytes for segment in segments]):
        if node.segment in seen:
            continue
        seen.add(node.segment)
        segment = segments[node.segment]
        if segment.offset:
            continue
        for number, index in enumerate(segment.chunks):
            found.setdefault(index, (path, number))
    return found
