"""A prune: the checkpoints that no rule keeps are deleted. Planned in full first; then just that is done."""

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptstore import catalog, protocol, tagging
from ckptstore.checkpoint import Checkpoint
from ckptstore.chunk_numbers import ChunkNumbers
from ckptstore.condemning import marked_corrupt, needs_any
from ckptstore.errors import UnavailableError
from ckptstore.format import ManifestKey
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.objects.open import store_time
from ckptstore.performing import Performer
from ckptstore.pipeline import each
from ckptstore.protocol.operations import in_batches
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
    """What is left of the manifests of one step: what the rules ask for, and the keys of all, the current one last."""

    run: str
    step: int
    keys: tuple[ManifestKey, ...]
    modified: float
    metrics: Mapping[str, Any]
    damaged: bool
    chunks: "array[int]"
    """The numbers of those that it names."""


def prune(objects: Objects, runs: Sequence[str], rules: Rules, *, dry_run: bool) -> PruneReport:
    """Prune runs.

    Raises:
        InvalidInputError: a rule asks for a metric that no checkpoint of a run has. Nothing was deleted.
        CorruptError: which chunks are damaged cannot be read. Nothing was deleted.
        UnavailableError: the backend failed; what was deleted until then is, and the rest is not.
    """
    now = _now(objects, dry_run=dry_run) if rules.within is not None else 0.0
    corrupt = marked_corrupt(objects, strict=True)
    report = PruneReport(dry_run)
    going: list[_Step] = []
    staying: list[_Step] = []
    chunks = ChunkNumbers()
    for run in dict.fromkeys(runs):  # each once
        steps = _steps(objects, run, corrupt, chunks)
        tags = tagging.listed(objects, run)
        candidates = [
            Candidate(each.step, each.modified, each.metrics, tags.get(each.step, ()), each.damaged) for each in steps
        ]
        reasons = choose(candidates, rules, now)
        for step in steps:
            stays = bool(reasons[step.step])
            row = PrunedStep(run, step.step, tuple(reasons[step.step]))
            (report.kept if stays else report.removed).append(row)
            (staying if stays else going).append(step)
    if not dry_run:
        each(lambda step: _bury(objects, step), going, threads=objects.request_threads)
    return PruneReport(dry_run, report.kept, report.removed, _freed(chunks, going, staying))


def _freed(chunks: ChunkNumbers, going: Sequence[_Step], staying: Sequence[_Step]) -> int:
    return chunks.bytes_of_only((step.chunks for step in going), (step.chunks for step in staying))


def _now(objects: Objects, *, dry_run: bool) -> float:
    try:
        return store_time(objects)
    except UnavailableError:
        if not dry_run:
            raise
        return time.time()  # who may only read can still see what would be done


def _steps(objects: Objects, run: str, corrupt: set[str], chunks: ChunkNumbers) -> list[_Step]:
    rows = sorted(catalog.list_run(objects, run).by_step.items())
    found: list[_Step] = []
    for some in in_batches(rows, catalog.STEPS_AT_A_TIME):
        read = each(lambda item: _read(objects, item[1]), some, threads=objects.request_threads)
        found += [
            _step(run, step, candidates, corrupt, chunks)
            for (step, _), candidates in zip(some, read, strict=True)
            if candidates
        ]
    return found


def _read(objects: Objects, rows: list[tuple[ManifestKey, ObjectInfo]]) -> list[protocol.Candidate]:
    contents = [(key, row.modified, objects.get(row.key)) for key, row in rows]
    return [found for item in contents if (found := protocol.read_candidate(*item)) is not None]


def _step(run: str, step: int, candidates: list[protocol.Candidate], corrupt: set[str], chunks: ChunkNumbers) -> _Step:
    standing = protocol.current(candidates)
    manifest = standing.manifest if standing else None
    candidates.sort(key=lambda found: found is standing)
    return _Step(
        run,
        step,
        tuple(found.key for found in candidates),
        max(found.modified for found in candidates),
        Checkpoint(manifest).metrics if manifest else {},
        manifest is None or needs_any(manifest, corrupt),
        chunks.of(manifest) if manifest else array("I"),
    )


def _bury(objects: Objects, step: _Step) -> None:
    """Delete what was seen when the prune was planned, and nothing that came since."""
    Performer(objects).perform(protocol.bury_all(step.keys, now_text()))
