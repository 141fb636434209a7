"""What a report tells of a store: gathered from manifests and listings, as plain values. Needs no torch.

Manifests are read once, a few at a time; of each only what is shown is kept. Text from a store is made `printable`
here, at the door, so that nothing behind it has to think of characters that act on text.
"""

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ckptstore import catalog, retention, tagging
from ckptstore.chunk_numbers import ChunkNumbers
from ckptstore.condemning import marked_corrupt, needs_any
from ckptstore.errors import CorruptError, InvalidInputError, NotFoundError
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.plain_values import pairs, to_json, to_text
from ckptstore.skeleton import tensors
from ckptstore.texts import printable

__all__ = ["MAX_HEAT_STEPS", "CheckpointFacts", "Heat", "RunFacts", "StoreFacts", "gather", "heat_of"]

MAX_HEAT_STEPS, MAX_HEAT_TENSORS = 120, 48
"""Of a heat map: the newest checkpoints and the largest tensors; a screen shows no more."""
MAX_CHARACTERS = 200
"""Of a name or a value that is shown."""


@dataclass(slots=True)
class CheckpointFacts:
    """One checkpoint of a run.

    Attributes:
        step: its step.
        created: ISO 8601, UTC.
        seconds_since: since the checkpoint before it was saved; None for the first.
        numbers: its metrics that are numbers, by name.
        metrics: all of them, as text.
        raw_bytes: in memory. stored_bytes: of its chunks. new_bytes: what its save uploaded.
        tags: those that people gave it.
        damaged: whether chunks of it were found damaged, or its manifest cannot be read.
        kept: why a prune by the rules would keep it; empty if it would not.
    """

    step: int
    created: str = ""
    seconds_since: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    raw_bytes: int = 0
    stored_bytes: int = 0
    new_bytes: int = 0
    tags: tuple[str, ...] = ()
    damaged: bool = False
    kept: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Heat:
    """How much of each tensor changed from each checkpoint to the next.

    Attributes:
        steps: of the later checkpoint of each pair.
        tensors: paths, the largest tensor first.
        values: for each tensor one for each pair: the part of its bytes that lies in chunks that changed, or the
            relative L2 distance; None where there is none.
        left_out: how many tensors are not shown.
        is_drift: whether values are relative L2 distances.
    """

    steps: list[int]
    tensors: list[str]
    values: list[list[float | None]]
    left_out: int
    is_drift: bool


@dataclass(slots=True)
class RunFacts:
    """One run.

    Attributes:
        name: its name.
        checkpoints: by step.
        logical_bytes: what they would take whole and uncompressed. stored_bytes: of their different chunks.
        shared_bytes: of these, those that other runs of the report need as well.
        freed_bytes: what a prune by the rules and a collection would free, of this run alone: what other runs of the
            report need is left out.
        heat: None for a run with fewer than two checkpoints.
    """

    name: str
    checkpoints: list[CheckpointFacts] = field(default_factory=list)
    logical_bytes: int = 0
    stored_bytes: int = 0
    shared_bytes: int = 0
    freed_bytes: int = 0
    heat: Heat | None = None

    @property
    def damaged(self) -> int:
        """How many checkpoints are."""
        return sum(each.damaged for each in self.checkpoints)

    @property
    def sound(self) -> list[CheckpointFacts]:
        """Those whose manifest can be read."""
        return [each for each in self.checkpoints if each.created]


@dataclass(slots=True)
class StoreFacts:
    """A store.

    Attributes:
        url: where it is.
        made: when this was gathered, ISO 8601, UTC.
        rules: those of the prune that is planned, in words.
        runs: by name.
        logical_bytes, stored_bytes: of all runs that are told of.
        shared: for each run, for each run: the stored bytes that both need.
    """

    url: str
    made: str
    rules: str
    runs: list[RunFacts]
    logical_bytes: int
    stored_bytes: int
    shared: list[list[int]]


def gather(objects: Objects, run: str | None, rules: retention.Rules, rules_text: str) -> StoreFacts:
    """Read every manifest of a store, or of one run.

    Raises:
        NotFoundError: there is no store, or no such run.
        InvalidInputError: no checkpoint of any run has a metric that a rule asks for.
        UnavailableError: the backend failed.
    """
    catalog.require_store(objects)
    listed = catalog.list_runs(objects) if run is None else {run: catalog.list_run(objects, run)}
    if run is not None and not listed[run].committed_steps():
        raise NotFoundError(f"there is no run {run!r} with a checkpoint in {objects.url}.")
    corrupt, chunks = marked_corrupt(objects), ChunkNumbers()
    gathered = [
        _Run(name, chunks).read(objects, rows, corrupt, rules)
        for name, rows in listed.items()
        if rows.committed_steps()
    ]
    if gathered and not any(each.planned for each in gathered):
        raise InvalidInputError(f"no run has the metric of a rule: {rules_text}. ckptstore ls RUN shows the metrics.")
    found = [each.facts for each in gathered]
    shared = [[chunks.stored_bytes(one.chunks & other.chunks) for other in gathered] for one in gathered]
    users = Counter(number for each in gathered for number in each.chunks)
    for each in gathered:
        going = each.going - each.staying
        each.facts.stored_bytes = chunks.stored_bytes(each.chunks)
        each.facts.shared_bytes = chunks.stored_bytes(number for number in each.chunks if users[number] > 1)
        each.facts.freed_bytes = chunks.stored_bytes(number for number in going if users[number] == 1)
    return StoreFacts(
        url=_text(objects.url),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rules=_text(rules_text),
        runs=found,
        logical_bytes=sum(each.logical_bytes for each in found),
        stored_bytes=chunks.stored_bytes(range(len(chunks))),
        shared=shared,
    )


class _Run:
    """A run while it is read: its facts, and the numbers of its chunks."""

    def __init__(self, name: str, chunks: ChunkNumbers) -> None:
        self.facts = RunFacts(_text(name))
        self.chunks: set[int] = set()
        self.going: set[int] = set()
        self.staying: set[int] = set()
        self._name = name
        self.planned = True
        """Whether a prune by the rules would do anything: it does not where no checkpoint has a metric."""
        self._numbers = chunks
        self._chunks_of: dict[int, Sequence[int]] = {}
        self._newest_created = ""
        self._cuts: list[tuple[int, dict[str, list[tuple[str, int]]]]] = []
        """Of the newest checkpoints: for each tensor the digests of its chunks, with their lengths."""
        self._cut_from = 0
        """The first step of those."""

    def read(self, objects: Objects, rows: catalog.RunRows, corrupt: set[str], rules: retention.Rules) -> "_Run":
        """Read all manifests of the run."""
        tags = tagging.listed(objects, self._name)
        self._cut_from = rows.committed_steps()[-MAX_HEAT_STEPS - 1 :][0]
        steps = [(step, found) for step, found in rows.by_step.items() if found]
        read = catalog.read_steps(objects, [found for _, found in steps])
        candidates = []
        for (step, found), (manifest, damaged) in zip(steps, read, strict=True):
            if manifest is None and not damaged:
                continue  # a fence, or a tombstone
            facts = self._add(step, manifest, tags.get(step, ()), corrupt)
            modified = max(row.modified for _, row in found)
            candidates.append(retention.Candidate(step, modified, facts.numbers, tags.get(step, ()), facts.damaged))
        self._plan(candidates, rules)
        self.facts.heat = self._heat()
        return self

    def _add(self, step: int, manifest: Manifest | None, tags: tuple[str, ...], corrupt: set[str]) -> CheckpointFacts:
        facts = CheckpointFacts(step, tags=tuple(map(_text, tags)), damaged=manifest is None)
        if manifest is not None:
            facts.created = manifest.created
            if self._newest_created:
                facts.seconds_since = _seconds(self._newest_created, manifest.created)
            self._newest_created = manifest.created
            with_values = [(name, value) for name, value in pairs(manifest.metrics)]
            facts.metrics = {_text(name): _text(to_text(value)) for name, value in with_values}
            facts.numbers = {
                _text(name): number for name, value in with_values if (number := _number(value)) is not None
            }
            facts.raw_bytes, facts.stored_bytes = manifest.raw_bytes, manifest.stored_bytes
            facts.new_bytes = manifest.new_bytes
            facts.damaged = needs_any(manifest, corrupt)
            self._chunks_of[step] = self._numbers.of(manifest)
            self.chunks.update(self._chunks_of[step])
            self.facts.logical_bytes += manifest.raw_bytes
            if step >= self._cut_from:
                self._cuts.append((step, _cut(manifest)))
        self.facts.checkpoints.append(facts)
        return facts

    def _plan(self, candidates: Sequence[retention.Candidate], rules: retention.Rules) -> None:
        try:
            reasons = retention.choose(candidates, rules, time.time())
        except InvalidInputError:  # no checkpoint has a metric that a rule asks for: a prune would do nothing
            self.planned = False
            reasons = {each.step: [_NO_METRIC] for each in candidates}
        for each in self.facts.checkpoints:
            each.kept = list(map(_text, reasons[each.step]))
            (self.staying if each.kept else self.going).update(self._chunks_of.get(each.step, ()))

    def _heat(self) -> Heat | None:
        sizes: dict[str, int] = {}
        for _, cut in self._cuts:
            sizes |= {path: sum(length for _, length in chunks) for path, chunks in cut.items()}
        columns = [
            (step, {path: _changed(old.get(path), chunks) for path, chunks in new.items()})
            for (_, old), (step, new) in itertools.pairwise(self._cuts)
        ]
        return heat_of(columns, sizes, is_drift=False)


def heat_of(
    columns: Sequence[tuple[int, Mapping[str, float | None]]], sizes: Mapping[str, int], *, is_drift: bool
) -> Heat | None:
    """A heat map of columns, each a step and values by tensor; None of none. The largest tensors are shown."""
    if not columns:
        return None
    shown = sorted(sizes, key=lambda path: -sizes[path])[:MAX_HEAT_TENSORS]
    return Heat(
        steps=[step for step, _ in columns],
        tensors=list(map(_text, shown)),
        values=[[values.get(path) for _, values in columns] for path in shown],
        left_out=len(sizes) - len(shown),
        is_drift=is_drift,
    )


_NO_METRIC = "a rule asks for a metric that no checkpoint has"


def _cut(manifest: Manifest) -> dict[str, list[tuple[str, int]]]:
    """For each tensor the digests of the chunks that it lies in, and how many of its bytes at most."""
    found: dict[str, list[tuple[str, int]]] = {}
    try:
        for path, node in tensors(manifest.tree, manifest.segment_bytes):
            segment = manifest.segments[node.segment]
            refs = [manifest.chunks[index] for index in segment.chunks]
            found[path] = [(ref.digest, min(ref.raw, segment.bytes)) for ref in refs]
    except CorruptError:  # a tree that no save could have made: the rest of the run can be told of
        return {}
    return found


def _changed(old: list[tuple[str, int]] | None, new: list[tuple[str, int]] | None) -> float | None:
    """The part of the bytes that lies in other chunks."""
    if old is None or not new or not (total := sum(length for _, length in new)):
        return None
    same = sum(length for (was, _), (now, length) in zip(old, new, strict=False) if was == now)
    return round(1 - same / total, 4)


def _number(node: Any) -> float | None:
    try:
        value = to_json(node)
    except CorruptError:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None


def _seconds(before: str, after: str) -> float:
    return round((datetime.fromisoformat(after) - datetime.fromisoformat(before)).total_seconds(), 3)


def _text(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= MAX_CHARACTERS else f"{shown[:MAX_CHARACTERS]}…"
