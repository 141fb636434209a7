"""A compaction: the older checkpoints of a run, stored as differences to the next newer one each. Needs no torch.

From the newest down, one commit a checkpoint, so it can be stopped at any moment and goes on where it was.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ckptstore import catalog, protocol
from ckptstore.condemning import condemn_corrupt
from ckptstore.decoding import decode_chain, each_of_chain
from ckptstore.deltas import heads, held_chunks
from ckptstore.errors import ConflictError, CorruptError, NotFoundError, retold
from ckptstore.format import Codec, ManifestKey, new_save_id
from ckptstore.kernels import ByteArray, compiled
from ckptstore.manifest import ChunkRef, Manifest
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.performing import Performer
from ckptstore.pipeline import Progress, each
from ckptstore.writer import now_text, this_writer

__all__ = ["CompactReport", "compact"]


@dataclass(slots=True)
class CompactReport:
    """The outcome of `Run.compact`.

    Attributes:
        checkpoints: how many the run has.
        compacted: the steps that were stored anew.
        passed_over: steps that could not be: deleted or saved again meanwhile, or in need of damaged chunks.
        bytes_before, bytes_after: size of the different chunks that the run's checkpoints need. The difference becomes
            free with the next collection, less what other runs need.
    """

    checkpoints: int
    compacted: list[int]
    passed_over: list[int]
    bytes_before: int
    bytes_after: int


class _StoredChunk:
    """A chunk that is in the store, read again when it is to be encoded."""

    private = True

    def __init__(self, objects: Objects, chain: list[ChunkRef], element: int) -> None:
        self._objects = objects
        self._chain = chain
        self.element = element
        self.raw_bytes = chain[-1].raw

    def read(self) -> ByteArray:
        raw = np.empty(self.raw_bytes, np.uint8)
        decode_chain(self._chain, each_of_chain(self._objects, self._chain), raw, verify_each=True)
        return raw


def compact(
    objects: Objects,
    run: str,
    *,
    keep_fast: int,
    depth: int,
    codec: Codec,
    threads: int,
    progress: Progress | None,
) -> CompactReport:
    """Compact a run.

    keep_fast: so many of the newest checkpoints are left as they are.
    depth: how many differences may stand one on another.
    progress: called with the bytes in memory of the checkpoints done, and of those to be done.

    Raises:
        NotFoundError: there is no such run.
        CorruptError: a chunk or a manifest is damaged; what was done until then stays.
        FencedError, UnavailableError: as for a save.
    """
    own, pinned = _read(objects, run)
    if not own:
        raise NotFoundError(f"there is no run {run!r} with a checkpoint in {objects.url}.")
    pinned |= {ref.key for manifest in own[-keep_fast:] for ref in manifest.chunks}
    report = CompactReport(len(own), [], [], _size(own), 0)
    older = own[:-keep_fast]
    total, done = sum(manifest.raw_bytes for manifest in older), 0
    compiled.expect(2 * total)
    for number in reversed(range(len(older))):
        old, newer = own[number], own[number + 1]
        request = protocol.CompactRequest(
            manifest=old.key,
            newer=newer.key,
            save=new_save_id(),
            created=now_text(),
            writer=this_writer(),
            depth=depth,
            pinned=frozenset(pinned),
            hanging=_hanging(own[:number]),
        )
        made = _compact_one(objects, request, old, codec, threads, report)
        if made is not None:
            own[number] = made
        # What a newer one stands on stays, so nothing is won by storing it again for an older one.
        pinned |= {ref.key for ref in own[number].chunks}
        done += old.raw_bytes
        if progress:
            progress(done, total)
    report.bytes_after = _size(own)
    return report


def _compact_one(
    objects: Objects,
    request: protocol.CompactRequest,
    old: Manifest,
    codec: Codec,
    threads: int,
    report: CompactReport,
) -> Manifest | None:
    """Compact one checkpoint and report it; return the manifest that has taken its place, if one has."""
    try:
        performer = Performer(objects, _stored_chunks(objects, old), codec, threads)
        made = performer.perform(protocol.compact(request))
    except ConflictError:
        report.passed_over.append(old.step)
        return None
    except CorruptError as error:
        condemn_corrupt(objects, error)
        raise retold(
            error, f"step {old.step} of run {old.run!r}: {error}. `ckptstore verify` lists all damage."
        ) from error
    if performer.damaged:
        condemn_corrupt(objects, *performer.damaged)
        report.passed_over.append(old.step)
    if made is not None:
        report.compacted.append(old.step)
    return made


def _read(objects: Objects, run: str) -> tuple[list[Manifest], set[str]]:
    """The run's manifests by step, and the chunk keys that other runs need. Raises CorruptError if one is damaged."""
    steps = [rows for listed in catalog.list_runs(objects).values() for rows in listed.by_step.values()]

    def read(rows: list[tuple[ManifestKey, ObjectInfo]]) -> Manifest | set[str] | None:
        manifest, damaged = catalog.read_step(objects, rows)
        if manifest is None and damaged:
            raise CorruptError(f"the manifest {damaged[0]} is damaged. Save its step again, or delete it.")
        if manifest is None or manifest.run == run:
            return manifest
        return {ref.key for ref in manifest.chunks}

    own: list[Manifest] = []
    pinned: set[str] = set()
    for found in each(read, steps, threads=objects.request_threads):
        if isinstance(found, Manifest):
            own.append(found)
        elif found is not None:
            pinned |= found
    return sorted(own, key=lambda manifest: manifest.step), pinned


def _hanging(older: Iterable[Manifest]) -> dict[str, int]:
    """How many differences of these checkpoints stand on each chunk, one on another."""
    found: Counter[str] = Counter()
    for manifest in older:
        for chunk in held_chunks(manifest):
            for above, link in enumerate(reversed(chunk.chain)):
                found[link.key] = max(found[link.key], above)
    return dict(found)


def _stored_chunks(objects: Objects, manifest: Manifest) -> dict[str, _StoredChunk]:
    elements = {
        index: 1 if segment.is_bundled else segment.element for segment in manifest.segments for index in segment.chunks
    }
    return {
        manifest.chunks[index].digest: _StoredChunk(objects, manifest.chain(index), elements.get(index, 1))
        for index in range(heads(manifest))
    }


def _size(manifests: Iterable[Manifest]) -> int:
    return sum({ref.key: ref.stored for manifest in manifests for ref in manifest.chunks}.values())
