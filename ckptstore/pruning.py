"""A prune: the checkpoints that no rule keeps are deleted. Planned in full first; then just that is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptstore import catalog, protocol, tagging
from ckptstore.checkpoint import Checkpoint
from ckptstore.condemning import marked_corrupt
from ckptstore.errors import UnavailableError
from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.objects.open import store_time
from ckptstore.performing import Performer
from ckptstore.pipeline import each
from ckptstore.retention import Candidate, Rules, choose
from ckptstore.writer import now_text

__all__ = ["PruneReport", "PrunedStep", "prune"]


@dataclass(frozen=True, slots=True)
class PrunedStep:
    """What a prune decided about one checkpoint.

    Attributes:
        run, step: which.
        reasons: why it stays, such as "last 3" or "tag best"; empty if it goes.
    """

    run: str
    step: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The outcome of `Store.prune`.

    Attributes:
        dry_run: whether this only says what would be done, and nothing was changed.
        kept: the checkpoints that stay, and why.
        removed: the checkpoints that were deleted, or would be.
        freed_bytes: size of the chunks that, of these runs, only the removed ones need. Other runs may need them too;
            the next collection frees what nobody needs.
    """

    dry_run: bool
    kept: list[PrunedStep] = field(default_factory=list)
    removed: list[PrunedStep] = field(default_factory=list)
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """The manifests of one step: that which counts, and the keys of all, which goes last."""

    run: str
    step: int
    manifest: Manifest | None
    keys: tuple[ManifestKey, ...]
    modified: float


def prune(objects: Objects, runs: Sequence[str], rules: Rules, *, dry_run: bool) -> PruneReport:
    """Prune runs.

    Raises:
        InvalidInputError: a rule asks for a metric that no checkpoint of a run has. Nothing was deleted.
        UnavailableError: the backend failed; what was deleted until then is, and the rest is not.
    """
    now = _now(objects, dry_run=dry_run) if rules.within is not None else 0.0
    corrupt = marked_corrupt(objects)
    report = PruneReport(dry_run)
    going: list[_Step] = []
    kept: dict[str, int] = {}
    gone: dict[str, int] = {}
    for run in dict.fromkeys(runs):  # each once
        steps = _steps(objects, run)
        tags = tagging.listed(objects, run)
        reasons = choose([_candidate(step, tags.get(step.step, ()), corrupt) for step in steps], rules, now)
        for step in steps:
            stays = bool(reasons[step.step])
            row = PrunedStep(run, step.step, tuple(reasons[step.step]))
            (report.kept if stays else report.removed).append(row)
            going += [] if stays else [step]
            for ref in step.manifest.chunks if step.manifest else ():
                (kept if stays else gone)[ref.key] = ref.stored
    if not dry_run:
        each(lambda step: _bury(objects, step), going, threads=objects.request_threads)
    freed = sum(size for key, size in gone.items() if key not in kept)
    return PruneReport(dry_run, report.kept, report.removed, freed)


def _now(objects: Objects, *, dry_run: bool) -> float:
    try:
        return store_time(objects)
    except UnavailableError:
        if not dry_run:
            raise
        return time.time()  # who may only read can still see what would be done


def _steps(objects: Objects, run: str) -> list[_Step]:
    rows = catalog.list_run(objects, run).by_step
    found = each(lambda item: _step(objects, run, *item), sorted(rows.items()), threads=objects.request_threads)
    return [step for step in found if step is not None]


def _step(objects: Objects, run: str, step: int, rows: list[tuple[ManifestKey, ObjectInfo]]) -> _Step | None:
    contents = [(key, row.modified, objects.get(row.key)) for key, row in rows]
    candidates = [found for item in contents if (found := protocol.read_candidate(*item)) is not None]
    if not candidates:
        return None
    standing = protocol.current(candidates)
    candidates.sort(key=lambda found: found is standing)
    return _Step(
        run,
        step,
        standing.manifest if standing else None,
        tuple(found.key for found in candidates),
        max(found.modified for found in candidates),
    )


def _candidate(step: _Step, tags: tuple[str, ...], corrupt: set[str]) -> Candidate:
    manifest = step.manifest
    if manifest is None:
        return Candidate(step.step, step.modified, {}, tags, damaged=True)
    damaged = any(ref.key in corrupt for ref in manifest.chunks)
    return Candidate(step.step, step.modified, Checkpoint(manifest).metrics, tags, damaged)


def _bury(objects: Objects, step: _Step) -> None:
    """Delete what was seen when the prune was planned, and nothing that came since."""
    Performer(objects).perform(protocol.bury_all(step.keys, now_text()))
