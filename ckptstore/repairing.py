"""A repair: checkpoints that need chunks marked as damaged are rewired to good copies of them, where there are some.

`verify` and failed restores have marked what is damaged; saves of the same content since then have uploaded good
copies. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptstore import catalog, protocol
from ckptstore.condemning import marked_corrupt, needs_any
from ckptstore.errors import ConflictError, FencedError
from ckptstore.format import ChunkKey, ManifestKey, new_save_id
from ckptstore.manifest import Manifest, TensorPaths
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.performing import Performer
from ckptstore.pipeline import each
from ckptstore.writer import now_text, this_writer

__all__ = ["RepairReport", "RepairedStep", "repair"]

FENCED_TRIES = 3


@dataclass(frozen=True, slots=True)
class RepairedStep:
    """A checkpoint that needs chunks that are marked as damaged.

    Attributes:
        run, step: which.
        paths: the tensors that these chunks are of.
    """

    run: str
    step: int
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The outcome of `Store.repair`.

    Attributes:
        marked: how many chunks are marked as damaged, needed by a checkpoint or not.
        repaired: checkpoints that are whole again.
        lost: checkpoints that cannot be saved, as there is no good copy of some of their chunks; `paths` names the
            tensors of those. Their other tensors can still be loaded.
        unreadable: checkpoints whose manifest cannot be read, which no repair can bring back; `paths` is empty.
    """

    marked: int = 0
    repaired: list[RepairedStep] = field(default_factory=list)
    lost: list[RepairedStep] = field(default_factory=list)
    unreadable: list[RepairedStep] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Found:
    """One manifest that counts: as a whole if it is damaged, else only which of the damaged digests it holds."""

    key: ManifestKey
    damaged: Manifest | None
    digests: frozenset[str]


def repair(objects: Objects, run: str | None = None) -> RepairReport:
    """Repair a store, or one run.

    Raises:
        CorruptError: a list of marks cannot be read, so which copies are good is not known.
        FencedError: collections took this repair for dead, again and again.
        UnavailableError: the backend failed. What was repaired until then is.
        UnsupportedFormatError: an object was written by a newer ckptstore.
    """
    corrupt = marked_corrupt(objects, strict=True)
    report = RepairReport(marked=len(corrupt))
    digests = {key.digest for name in corrupt if (key := ChunkKey.parse(name))}
    steps = [
        (name, step, rows)
        for name, listed in catalog.list_runs(objects).items()
        for step, rows in listed.by_step.items()
    ]

    def look(item: tuple[str, int, list[tuple[ManifestKey, ObjectInfo]]]) -> _Found | RepairedStep | None:
        name, step, rows = item
        manifest, damaged = catalog.read_step(objects, rows)
        if manifest is None:
            return RepairedStep(name, step, ()) if damaged else None
        held = frozenset(ref.digest for ref in manifest.chunks) & digests
        needs_repair = run in (None, name) and needs_any(manifest, corrupt)
        return _Found(manifest.key, manifest if needs_repair else None, held)

    looked = each(look, steps, threads=objects.request_threads)
    report.unreadable.extend(row for row in looked if isinstance(row, RepairedStep) and run in (None, row.run))
    found = [row for row in looked if isinstance(row, _Found)]
    for number, row in enumerate(found):
        if row.damaged is None:
            continue
        repaired = _repair_one(objects, row.damaged, row.digests, found, corrupt, report)
        if repaired is not None:
            # What is found through manifests alone, deltas, the next ones must find through this one.
            found[number] = _Found(repaired.key, None, row.digests)
    return report


def _repair_one(
    objects: Objects,
    manifest: Manifest,
    digests: frozenset[str],
    others: Sequence[_Found],
    corrupt: set[str],
    report: RepairReport,
) -> Manifest | None:
    """Repair one checkpoint, and report on it; return the manifest that counts now, if it is another one."""
    sources = tuple(other.key for other in others if other.digests & digests and other.key != manifest.key)
    try:
        outcome = _perform(objects, manifest.key, sources)
    except ConflictError:
        return None  # it was deleted or saved again meanwhile
    missing = set(outcome.missing)
    broken = [index for index, ref in enumerate(manifest.chunks) if ref.key in corrupt or ref.digest in missing]
    if outcome.manifest is None:
        broken = [index for index in broken if manifest.chunks[index].digest in missing]
    paths = TensorPaths(manifest, broken)
    named = dict.fromkeys(path for index in broken for path in paths.of(index))
    (report.lost if outcome.manifest is None else report.repaired).append(
        RepairedStep(manifest.run, manifest.step, tuple(named))
    )
    return outcome.manifest


def _perform(objects: Objects, key: ManifestKey, sources: tuple[ManifestKey, ...]) -> protocol.Repaired:
    for attempt in range(FENCED_TRIES):
        request = protocol.RepairRequest(
            manifest=key, sources=sources, save=new_save_id(), created=now_text(), writer=this_writer()
        )
        try:
            return Performer(objects).perform(protocol.repair(request))
        except FencedError:
            if attempt == FENCED_TRIES - 1:
                raise
    raise AssertionError("unreachable")
