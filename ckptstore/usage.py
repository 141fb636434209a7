"""What a store costs, run by run: logical, stored and shared bytes. From manifests and one listing; needs no torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ckptstore import catalog
from ckptstore.chunk_numbers import ChunkNumbers
from ckptstore.errors import CorruptError
from ckptstore.format import ChunkKey, ManifestKey
from ckptstore.manifest import Manifest
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.protocol import may_be_committed

__all__ = ["RunUsage", "Usage"]


@dataclass(frozen=True, slots=True)
class RunUsage:
    """The bytes of one run.

    Attributes:
        checkpoints: how many it has.
        logical_bytes: what its checkpoints would take if each were stored whole and uncompressed.
        stored_bytes: size of the different chunks that it needs.
        shared_bytes: of these, size of the chunks that other runs need as well.
    """

    checkpoints: int
    logical_bytes: int
    stored_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """The bytes of a store.

    Attributes:
        runs: by name; chunks that several runs need count in each of them.
        logical_bytes: what all checkpoints would take if each were stored whole and uncompressed.
        stored_bytes: size of the different chunks that checkpoints need.
        unreferenced_bytes: size of the chunks that no checkpoint needs: of saves under way, of saves that were cut
            off, and of deleted checkpoints, until they are collected.
    """

    runs: dict[str, RunUsage]
    logical_bytes: int
    stored_bytes: int
    unreferenced_bytes: int


def usage(objects: Objects) -> Usage:
    """Add up a store.

    Raises:
        NotFoundError: there is no store.
        CorruptError: a manifest is damaged, so the sums would be wrong.
    """
    catalog.require_store(objects)
    chunks = ChunkNumbers()
    chunks_of: dict[str, set[int]] = {}
    logical_bytes: Counter[str] = Counter()
    checkpoints: Counter[str] = Counter()
    for manifest in manifests(objects):
        checkpoints[manifest.run] += 1
        logical_bytes[manifest.run] += manifest.raw_bytes
        chunks_of.setdefault(manifest.run, set()).update(chunks.of(manifest))
    users = Counter(number for numbers in chunks_of.values() for number in numbers)
    return Usage(
        runs={
            run: RunUsage(
                checkpoints=checkpoints[run],
                logical_bytes=logical_bytes[run],
                stored_bytes=chunks.stored_bytes(numbers),
                shared_bytes=chunks.stored_bytes(number for number in numbers if users[number] > 1),
            )
            for run, numbers in chunks_of.items()
        },
        logical_bytes=logical_bytes.total(),
        stored_bytes=chunks.stored_bytes(range(len(chunks))),
        unreferenced_bytes=_unreferenced_bytes(objects, chunks),
    )


def _unreferenced_bytes(objects: Objects, chunks: ChunkNumbers) -> int:
    """The size of the chunks that none of those read names. One that a save names since counts as under way."""
    rows = catalog.list_chunks(objects, len(chunks) - chunks.deltas, chunks.deltas)
    return sum(row.size for row in rows if not ((key := ChunkKey.parse(row.key)) and chunks.holds(key)))


def manifests(objects: Objects, only: str | None = None) -> Iterator[Manifest]:
    """The manifests that count, of all runs by name (or of one), by step.

    Raises:
        CorruptError: one cannot be read.
    """
    listed = catalog.list_runs(objects) if only is None else {only: catalog.list_run(objects, only)}
    steps = [rows for found in listed.values() for rows in found.by_step.values() if any(map(_large, rows))]
    for manifest, damaged in catalog.read_steps(objects, steps):
        if manifest is not None:
            yield manifest
        elif damaged:
            [key, *_] = damaged
            raise CorruptError(
                f"the manifest of step {key.step} of run {key.run!r} is damaged ({key}), so what the store holds "
                "cannot be told. ckptstore verify says what is wrong with it; save the step again, or delete it."
            )


def _large(row: "tuple[ManifestKey, ObjectInfo]") -> bool:
    return may_be_committed(row[1])
