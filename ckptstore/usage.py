"""What a store costs, run by run: logical, stored and shared bytes. From manifests and one listing; needs no torch."""

from collections import Counter
from dataclasses import dataclass

from ckptstore import catalog
from ckptstore.errors import CorruptError
from ckptstore.format import CHUNKS, DELTAS, ManifestKey
from ckptstore.manifest import Manifest
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.pipeline import each
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
    stored_objects = {row.key: row.size for prefix in (CHUNKS, DELTAS) for row in objects.list(prefix)}
    sizes: dict[str, int] = {}
    chunks_of: dict[str, set[str]] = {}
    logical_bytes: Counter[str] = Counter()
    checkpoints: Counter[str] = Counter()
    for run, manifests in read_all(objects).items():
        chunks_of[run] = set()
        for manifest in manifests:
            checkpoints[run] += 1
            logical_bytes[run] += manifest.raw_bytes
            for chunk in manifest.chunks:
                chunks_of[run].add(chunk.key)
                sizes[chunk.key] = chunk.stored
    users = Counter(key for keys in chunks_of.values() for key in keys)
    return Usage(
        runs={
            run: RunUsage(
                checkpoints=checkpoints[run],
                logical_bytes=logical_bytes[run],
                stored_bytes=sum(sizes[key] for key in keys),
                shared_bytes=sum(sizes[key] for key in keys if users[key] > 1),
            )
            for run, keys in chunks_of.items()
        },
        logical_bytes=logical_bytes.total(),
        stored_bytes=sum(sizes.values()),
        unreferenced_bytes=sum(size for key, size in stored_objects.items() if key not in sizes),
    )


def read_all(objects: Objects, only: str | None = None) -> dict[str, list[Manifest]]:
    """The manifests that count, of each run (or of one), by step. Raises CorruptError if one cannot be read."""
    listed = catalog.list_runs(objects) if only is None else {only: catalog.list_run(objects, only)}
    steps = [(run, rows) for run, found in listed.items() for rows in found.by_step.values() if any(map(_large, rows))]

    def read(step: tuple[str, list[tuple[ManifestKey, ObjectInfo]]]) -> tuple[str, Manifest | None]:
        run, rows = step
        manifest, damaged = catalog.read_step(objects, rows)
        if manifest is None and damaged:
            [key, *_] = damaged
            raise CorruptError(
                f"the manifest of step {key.step} of run {key.run!r} is damaged ({key}), so what the store holds "
                "cannot be told. ckptstore verify says what is wrong with it; save the step again, or delete it."
            )
        return run, manifest

    found: dict[str, list[Manifest]] = {run: [] for run in listed}
    for run, manifest in each(read, steps, threads=objects.request_threads):
        if manifest is not None:
            found[run].append(manifest)
    return {run: manifests for run, manifests in found.items() if manifests}


def _large(row: "tuple[ManifestKey, ObjectInfo]") -> bool:
    return may_be_committed(row[1])
