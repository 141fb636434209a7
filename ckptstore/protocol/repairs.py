"""The decisions of a repair: a checkpoint whose chunks are damaged, rewired to good copies of them that are there.

A repair is a save that uploads nothing: it opens a session, reads what is condemned, looks at what it means to name,
and creates a manifest under an id of its own, which replaces the old one. So whatever is safe for saves is safe for it.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from ckptstore.deltas import Held, heads, held_chunks, table
from ckptstore.errors import CorruptError
from ckptstore.format import CHUNKS, MAX_DELTA_DEPTH, MAX_OVERHEAD_BYTES, ChunkKey, ManifestKey
from ckptstore.manifest import ChunkRef, Manifest, Writer, format_naming
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import UNREADABLE_LIST, read_candidate, read_condemned
from ckptstore.protocol.operations import Check, Get, List, Operation, Sync
from ckptstore.protocol.rewrites import changed, in_place_of, rewrite


class RepairRequest(Struct, frozen=True):
    """Which checkpoint to repair."""

    manifest: ManifestKey
    sources: tuple[ManifestKey, ...]
    """Other checkpoints that may hold good copies, as chunks or as deltas."""
    save: str
    """A new id, for the manifest that takes the place of the old one."""
    created: str
    writer: Writer


class Repaired(Struct, frozen=True):
    """What became of it: the new manifest, or the digests of the chunks of which there is no good copy."""

    manifest: Manifest | None
    missing: tuple[str, ...] = ()


def repair(request: RepairRequest) -> Generator[Operation, Any, Repaired]:
    """Repair one checkpoint.

    Raises:
        ConflictError: it is there no more, counts no more, or cannot be read.
        CorruptError: a condemned list cannot be read, so which copies are good is not known.
        FencedError: a collector took this repair for dead; nothing was changed.
        UnavailableError: a request failed. If it was the commit's, its outcome is unknown and the session stands.
    """
    making = _rewire(request)
    return (yield from rewrite(request.manifest, request.save, request.created, request.writer, making, "repair"))


def _rewire(request: RepairRequest) -> Generator[Operation, Any, tuple[Manifest | None, Repaired]]:
    lists = yield from read_condemned()
    if None in lists:
        raise CorruptError(UNREADABLE_LIST)
    condemned = {key for each in lists if each for key in each.keys}
    manifest, sources = yield from _read(request)
    held = held_chunks(manifest)[: heads(manifest)]
    broken = {digest for chunk in held for digest in _broken(chunk, condemned)}
    if not broken:
        return None, Repaired(manifest)
    lengths = {link.digest: link.raw for chunk in held for link in chunk.chain}
    good = yield from _good_copies(broken, lengths, sources, condemned)
    mended = [_mended(chunk, good, condemned) for chunk in held]
    for number, chunk in enumerate(mended):
        if chunk and chunk.key == held[number].key and chunk.base != held[number].base and not (yield Check(chunk)):
            # As long as its base was damaged nobody could tell that the delta is, too.
            mended[number] = good.get(chunk.digest)
    missing = dict.fromkeys(old.digest for old, new in zip(held, mended, strict=True) if new is None)
    if missing:
        return None, Repaired(None, tuple(missing))
    chunks = table([chunk for chunk in mended if chunk is not None])
    yield Sync(tuple(chunk.key for chunk in chunks))
    made = _manifest(request, manifest, chunks)
    return made, Repaired(made)


def _read(request: RepairRequest) -> Generator[Operation, Any, tuple[Manifest, list[Manifest]]]:
    keys = (request.manifest, *request.sources)
    contents: list[bytes | None] = yield Get(tuple(map(str, keys)))
    found = [read_candidate(key, 0.0, content) for key, content in zip(keys, contents, strict=True)]
    manifests = [None if each is None else each.manifest for each in found]
    if manifests[0] is None:
        raise changed(request.manifest, "repair")
    return manifests[0], [each for each in manifests if each is not None]


def _broken(chunk: Held, condemned: set[str]) -> Iterator[str]:
    """What a good copy of would help: what is condemned, and each delta that stands on it, as one may be in full."""
    sound = True
    for link in chunk.chain:
        sound = sound and link.key not in condemned
        if not sound:
            yield link.digest


def _good_copies(
    broken: Iterable[str], lengths: dict[str, int], sources: Sequence[Manifest], condemned: set[str]
) -> Generator[Operation, Any, dict[str, Held]]:
    """A copy of each broken chunk, seen now, not condemned, and read to the last byte."""
    rows: list[ObjectInfo] = yield List(tuple(f"{CHUNKS}{name[:2]}/{name}" for name in sorted(broken)))
    copies: dict[str, dict[str, Held]] = {name: {} for name in broken}
    for row in rows:
        if (key := ChunkKey.parse(row.key)) and key.digest in copies:
            copies[key.digest][row.key] = Held(key.digest, key.save_id, lengths[key.digest], row.size)
    for manifest in sources:
        for chunk in held_chunks(manifest):
            if chunk.digest in copies:
                copies[chunk.digest].setdefault(chunk.key, chunk)
    good: dict[str, Held] = {}
    for name, found in sorted(copies.items()):
        for copy in found.values():
            fits = copy.raw == lengths[name] and copy.stored <= copy.raw + MAX_OVERHEAD_BYTES
            if fits and not any(link.key in condemned for link in copy.chain) and (yield Check(copy)):
                good[name] = copy
                break
    return good


def _mended(chunk: Held, good: dict[str, Held], condemned: set[str]) -> Held | None:
    """The chunk with all that is broken replaced; None if there is no good copy."""
    base = None if chunk.base is None else _mended(chunk.base, good, condemned)
    if chunk.key not in condemned and (chunk.base is None or base is not None):
        mended = msgspec.structs.replace(chunk, base=base)
        # A good copy of the base may be a delta itself. No reader takes chains that are too long, or go round.
        goes_round = base is not None and any(link.key == chunk.key for link in base.chain)
        if len(mended.chain) <= MAX_DELTA_DEPTH + 1 and not goes_round:
            return mended
    return good.get(chunk.digest)


def _manifest(request: RepairRequest, manifest: Manifest, chunks: list[ChunkRef]) -> Manifest:
    return msgspec.structs.replace(
        manifest,
        format=format_naming((chunk.key for chunk in chunks), manifest.segments),
        save=request.save,
        replaces=in_place_of(manifest),
        chunks=chunks,
        stored_bytes=sum(chunk.stored for chunk in chunks),
    )
