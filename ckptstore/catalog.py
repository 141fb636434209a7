"""What stands in a store, read: the marker, the runs, a run's steps, the manifest that counts for a step.

Everything but saving goes through here to find a checkpoint. Needs no torch, so that the command line starts fast.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ckptstore.errors import CheckpointWarning, CorruptError, NotFoundError
from ckptstore.format import CHUNKS, DELTAS, MARKER_KEY, RUNS, ManifestKey, chunk_prefixes, run_prefix
from ckptstore.manifest import Manifest, Marker, checkpoint_digest, decode_marker
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.pipeline import each
from ckptstore.protocol import current, may_be_committed, read_candidate
from ckptstore.protocol.operations import PREFIXES_AT_A_TIME, in_batches

STEPS_AT_A_TIME = 32
"""The manifests of so many are held in memory at once, where all of a store's are read."""
RELISTINGS = 4
"""A step is looked at so often while others replace what was seen of it."""


def read_marker(objects: Objects) -> Marker | None:
    """The store's marker, or None if there is no store at this place.

    Raises:
        CorruptError: the marker is damaged, or gone although there are checkpoints.
        UnsupportedFormatError: a newer ckptstore made this store.
        UnavailableError: the place cannot be reached or read.
    """
    content = objects.get(MARKER_KEY)
    if content is not None:
        return decode_marker(content, MARKER_KEY)
    if objects.children(RUNS):
        raise CorruptError(
            f"{objects.url} holds checkpoints and no {MARKER_KEY}: it was deleted, or not copied along. The next save "
            "makes it again; the checkpoints themselves can be restored."
        )
    return None


def exists(objects: Objects, *, warn: bool = True) -> bool:
    """Whether there is a store. A damaged marker is only a warning: no checkpoint depends on what it says."""
    try:
        return read_marker(objects) is not None
    except CorruptError as error:
        if warn:
            warnings.warn(CheckpointWarning(f"{error} Reading goes on without it."), stacklevel=4)
        return True


def require_store(objects: Objects, *, warn: bool = True) -> None:
    """Raise NotFoundError if there is no store."""
    if not exists(objects, warn=warn):
        raise NotFoundError(f"{objects.url} is not a ckptstore store, or nothing was ever saved there. Check the URL.")


@dataclass(slots=True)
class RunRows:
    """The listing of one run: rows by step, newest step last; fences and tombstones among them."""

    run: str
    by_step: dict[int, list[tuple[ManifestKey, ObjectInfo]]] = field(default_factory=dict)

    def committed_steps(self) -> list[int]:
        """The steps that hold a checkpoint, going by the sizes alone."""
        return [step for step, rows in self.by_step.items() if any(may_be_committed(row) for _, row in rows)]


def list_run(objects: Objects, run: str) -> RunRows:
    """List one run; empty if it does not exist."""
    return _group(run, objects.list(run_prefix(run)))


def list_runs(objects: Objects) -> dict[str, RunRows]:
    """List every run, by name."""
    by_run: dict[str, list[ObjectInfo]] = {}
    for row in objects.list(RUNS):
        if key := ManifestKey.parse(row.key):
            by_run.setdefault(key.run, []).append(row)
    return {run: _group(run, rows) for run, rows in sorted(by_run.items())}


def _group(run: str, rows: list[ObjectInfo]) -> RunRows:
    found = RunRows(run)
    for row in sorted(rows, key=lambda row: row.key):
        if key := ManifestKey.parse(row.key):
            found.by_step.setdefault(key.step, []).append((key, row))
    return found


def list_chunks(objects: Objects, full: int, deltas: int) -> Iterator[ObjectInfo]:
    """Every object in the folders of chunks, of which there are about so many; some listings at a time."""
    prefixes = chunk_prefixes(CHUNKS, full) + chunk_prefixes(DELTAS, deltas)
    for some in in_batches(prefixes, PREFIXES_AT_A_TIME):
        for rows in each(objects.list, some, threads=objects.request_threads):
            yield from rows


def read_step(
    objects: Objects, rows: list[tuple[ManifestKey, ObjectInfo]]
) -> tuple[Manifest | None, list[ManifestKey]]:
    """The manifest that counts among those of one step, and the keys of those that cannot be read.

    Reads small objects too: a manifest that was cut off is no fence. What was listed as a manifest and has become a
    tombstone since was deleted, or replaced by one that was not listed yet; so then the step is listed again.
    """
    for _ in range(RELISTINGS):
        contents = [(key, row, objects.get(row.key)) for key, row in rows]
        read = [(row, read_candidate(key, row.modified, content)) for key, row, content in contents]
        candidates = [found for _, found in read if found is not None]
        standing = current(candidates)
        was_buried = any(found is None and may_be_committed(row) for row, found in read)
        if standing is not None or not was_buried:
            break
        key, _ = rows[0]
        again = objects.list(f"{run_prefix(key.run)}{key.step:020d}.")
        rows = [(found, row) for row in again if (found := ManifestKey.parse(row.key))]
    damaged = [candidate.key for candidate in candidates if candidate.manifest is None]
    return (standing.manifest if standing else None), damaged


def read_steps(
    objects: Objects, steps: Sequence[list[tuple[ManifestKey, ObjectInfo]]]
) -> Iterator[tuple[Manifest | None, list[ManifestKey]]]:
    """What `read_step` says of each, in their order; only some manifests are in memory at a time."""
    for some in in_batches(steps, STEPS_AT_A_TIME):
        yield from each(lambda rows: read_step(objects, rows), some, threads=objects.request_threads)


def manifest_of(objects: Objects, run: str, step: int) -> Manifest:
    """The manifest that counts for a step.

    Raises:
        NotFoundError: there is no such checkpoint; the text says which there are.
        CorruptError: it cannot be read.
    """
    rows = list_run(objects, run)
    manifest, damaged = read_step(objects, rows.by_step.get(step, []))
    if manifest is not None:
        return manifest
    if damaged:
        raise CorruptError(
            f"the manifest of step {step} of run {run!r} is damaged ({damaged[0]}). Load another step: "
            f"{_some_steps(rows, but=step)}."
        )
    require_store(objects)
    raise NotFoundError(
        f"run {run!r} has no checkpoint at step {step}; it has {_some_steps(rows)}."
        if rows.committed_steps()
        else f"there is no run {run!r} with a checkpoint in {objects.url}."
    )


def newest_first(objects: Objects, run: str) -> Iterator[Manifest | CorruptError]:
    """The manifests of a run from the newest step down; an error in the place of one that cannot be read."""
    for step, rows in reversed(list_run(objects, run).by_step.items()):
        manifest, damaged = read_step(objects, rows)
        for key in damaged:
            yield CorruptError(f"step {step} of run {run!r}: its manifest {key} is damaged or cut off")
        if manifest is not None:
            yield manifest


def newest(objects: Objects, run: str) -> Manifest | None:
    """The newest manifest that can be read, with a warning for each newer one that cannot; None for an empty run.

    Raises:
        CorruptError: there are manifests, and none can be read.
    """
    last: CorruptError | None = None
    for found in newest_first(objects, run):
        if isinstance(found, Manifest):
            return found
        last = found
        warnings.warn(CheckpointWarning(f"{found}. Going back to an older checkpoint."), stacklevel=3)
    if last is not None:
        raise CorruptError(f"no manifest of run {run!r} can be read: {last}") from last
    return None


def pick(objects: Objects, run: str, step: int | None) -> Manifest:
    """The manifest that counts for a step; None is the newest. Raises NotFoundError, CorruptError; never goes back."""
    if step is not None:
        return manifest_of(objects, run, step)
    require_store(objects)
    return newest_or_raise(objects, run)


def require_digest(manifest: Manifest, expect: str | None) -> Manifest:
    """Return `manifest` if its digest is the expected one, or none is expected. Raises CorruptError."""
    if expect is not None and (found := checkpoint_digest(manifest)) != expect:
        raise CorruptError(
            f"step {manifest.step} of run {manifest.run!r} is not the checkpoint that is expected: its digest is "
            f"{found}, and not {expect}. Another state was saved in its place, or somebody changed it. Nothing was "
            "read or changed. Ask whoever gave you the digest."
        )
    return manifest


def _some_steps(rows: RunRows, but: int | None = None) -> str:
    steps = [str(step) for step in rows.committed_steps() if step != but]
    shown = ", ".join(steps if len(steps) <= 10 else [*steps[:3], "…", *steps[-5:]])
    return f"steps {shown}" if shown else "there is no other"


def newest_or_raise(objects: Objects, run: str) -> Manifest:
    """The newest manifest. Raises NotFoundError if the run has none, CorruptError if it cannot be read."""
    for found in newest_first(objects, run):
        if isinstance(found, CorruptError):
            raise CorruptError(f"{found}. Name an older step, or let restore() go back to one.") from found
        return found
    raise NotFoundError(f"there is no run {run!r} with a checkpoint in {objects.url}.")
