"""The decisions of a compaction: an older checkpoint, stored as differences to the next newer one of its run.

A compaction is a save of what is there already: it opens a session, reads what is condemned, looks at what it means to
name, uploads the differences that pay, and creates a manifest that replaces the old one. So whatever is safe for saves
is safe for it, and it may be cut off at any moment.
"""

from collections.abc import Generator, Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from ckptstore.deltas import Held, find_bases, heads, held_chunks, table
from ckptstore.errors import ConflictError, CorruptError
from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest, Writer, format_naming
from ckptstore.protocol.candidates import UNREADABLE_LIST, read_candidate, read_condemned
from ckptstore.protocol.operations import Check, Get, Operation, Sync, Upload, Uploaded
from ckptstore.protocol.rewrites import changed, in_place_of, rewrite

PAYS = 0.98
"""What a difference may take of what it replaces."""
FREES = 1.05
"""What it may take of a difference whose base nobody else needs: that can then become a difference itself."""


class CompactRequest(Struct, frozen=True):
    """Which checkpoint to compact, and against which."""

    manifest: ManifestKey
    newer: ManifestKey
    """The next newer one of the run, to whose chunks the differences are."""
    save: str
    """A new id, for the manifest that takes the place of the old one."""
    created: str
    writer: Writer
    depth: int
    """How many differences may stand one on another."""
    pinned: frozenset[str] = frozenset()
    """Keys of chunks that others need too: they stay in any case, so nothing is won by storing them again."""
    hanging: Mapping[str, int] = field(default_factory=dict)
    """Key -> how many differences of older checkpoints stand on it, one on another."""


def compact(request: CompactRequest) -> Generator[Operation, Any, Manifest | None]:
    """Compact one checkpoint; return its new manifest, or None if nothing is to be won.

    Raises:
        ConflictError: it or the newer one is there no more, or needs chunks that are marked.
        CorruptError: a chunk of it is damaged, or a list of condemned chunks cannot be read.
        FencedError, UnavailableError: as for a save.
    """
    making = _assemble(request)
    return (yield from rewrite(request.manifest, request.save, request.created, request.writer, making, "compaction"))


def _assemble(request: CompactRequest) -> Generator[Operation, Any, tuple[Manifest | None, Manifest | None]]:
    lists = yield from read_condemned()
    if None in lists:
        raise CorruptError(UNREADABLE_LIST)
    condemned = {key for each in lists if each for key in each.keys}
    old = yield from _read(request.manifest)
    newer = yield from _read(request.newer)
    chunks = held_chunks(old)[: heads(old)]
    if any(link.key in condemned for chunk in chunks for link in chunk.chain):
        raise ConflictError(f"{request.manifest} needs chunks that are marked as damaged or as garbage.")
    sound = [held for held in held_chunks(newer) if not any(link.key in condemned for link in held.chain)]
    there = {held.digest: held for held in sound}
    fresh = [_moved(chunk, there, request) for chunk in chunks]
    for number, (chunk, moved) in enumerate(zip(chunks, fresh, strict=True)):
        if moved != chunk and not (yield Check(moved)):
            fresh[number] = chunk  # the other copy is rotten, and nobody has noticed yet
    bases = _bases(request, old, newer, chunks, fresh, {held.key for held in sound})
    below = {chunk.digest: _limit(chunk, request) for chunk in fresh if chunk.digest in bases}
    new_bytes = 0
    if bases:
        uploaded: dict[str, Uploaded] = yield Upload(request.save, tuple(bases), bases, below)
        for number, chunk in enumerate(fresh):
            put = uploaded.get(chunk.digest)
            if put is not None:
                base = bases[chunk.digest] if put.is_delta else None
                fresh[number] = Held(chunk.digest, request.save, chunk.raw, put.stored, base)
                new_bytes += put.stored
    if fresh == chunks:
        return None, None
    yield Sync(tuple(link.key for chunk in fresh for link in chunk.chain))
    refs = table(fresh)
    made = msgspec.structs.replace(
        old,
        format=format_naming((ref.key for ref in refs), old.segments),
        save=request.save,
        replaces=in_place_of(old),
        chunks=refs,
        stored_bytes=sum(ref.stored for ref in refs),
        new_bytes=new_bytes,
    )
    return made, made


def _read(key: ManifestKey) -> Generator[Operation, Any, Manifest]:
    [content] = yield Get((str(key),))
    found = read_candidate(key, 0.0, content)
    if found is None or found.manifest is None:
        raise changed(key, "compaction")
    return found.manifest


def _moved(chunk: Held, there: Mapping[str, Held], request: CompactRequest) -> Held:
    """The chunk as the newer checkpoint has it, or, of a difference, its base as that one has it: for nothing.

    A difference names its base by digest, so it stands as well on the same chunk in another form.
    """
    if chunk.key in request.pinned:
        return chunk
    same = there.get(chunk.digest)
    if same is not None:
        return same
    base = None if chunk.base is None else there.get(chunk.base.digest)
    if base is not None and len(base.chain) + request.hanging.get(chunk.key, 0) <= request.depth:
        return msgspec.structs.replace(chunk, base=base)
    return chunk


def _bases(
    request: CompactRequest, old: Manifest, newer: Manifest, chunks: list[Held], fresh: list[Held], sound: set[str]
) -> dict[str, Held]:
    """What is to be tried as a difference to what."""
    wanted = [
        number
        for number, (chunk, moved) in enumerate(zip(chunks, fresh, strict=True))
        if moved == chunk and chunk.key not in request.pinned
    ]
    lengths = [chunk.raw for chunk in chunks]
    found = find_bases(
        wanted,
        lengths,
        old.tree,
        old.segments,
        newer,
        depth=lambda number: request.depth - request.hanging.get(chunks[number].key, 0),
    )
    return {
        chunks[number].digest: base
        for number, base in found.items()
        if base.key in sound and _is_another(base, chunks[number])
    }


def _limit(chunk: Held, request: CompactRequest) -> int:
    """How many bytes a chunk may take in its new form."""
    frees = chunk.base is not None and chunk.base.key not in request.pinned
    return int((FREES if frees else PAYS) * chunk.stored)


def _is_another(base: Held, chunk: Held) -> bool:
    """Whether it is neither the chunk itself nor what that stands on already."""
    return base.digest not in (chunk.digest, chunk.base.digest if chunk.base is not None else None)
