"""What a comparison of two checkpoints found, as values, as JSON, and in one sentence."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptstore.checkpoint import Checkpoint
from ckptstore.diffing.trees import Change
from ckptstore.markup import MAX_ROWS, caption, table
from ckptstore.texts import bytes_text

__all__ = ["Diff", "TensorDiff", "groups"]

MAX_GROUPS = 4
"""Of tensors that a summary names."""
_MEMBER = re.compile(r"\[[^]]*\]|\.?[^.\[]+")


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How far one tensor has moved. Figures are None where they were not read, or make no sense of such elements.

    Attributes:
        path: such as "model.linear.weight".
        dtype: torch's name ("bfloat16") or NumPy's type string ("<f4").
        shape: elements in each dimension.
        bytes: elements times element size.
        equal_bytes: how many of them lie in chunks that are equal, by their digests.
        changed: the fraction of the elements whose bits have changed.
        relative_l2: ‖after - before‖ / ‖before‖ over the elements that were compared; infinite where all were zero.
        largest: the largest |after - before| of an element.
        cosine: of the angle between before and after, over the elements that were compared.
        new_nan: how many elements have become NaN.
        new_inf: how many have become infinite.
        is_whole: whether `relative_l2` and `cosine` are those of the whole tensor: nothing was left unread of it.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    equal_bytes: int
    changed: float | None
    relative_l2: float | None
    largest: float | None
    cosine: float | None
    new_nan: int | None
    new_inf: int | None
    is_whole: bool

    @property
    def has_moved(self) -> bool:
        """Whether any bit of it has changed; where it was not read, whether any chunk has."""
        return self.equal_bytes < self.bytes if self.changed is None else self.changed > 0

    def to_json(self) -> dict[str, Any]:
        """For a JSON document: figures that are not finite as text."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "equal_bytes": self.equal_bytes,
            "changed": self.changed,
            "relative_l2": _json(self.relative_l2),
            "largest": _json(self.largest),
            "cosine": self.cosine,
            "new_nan": self.new_nan,
            "new_inf": self.new_inf,
            "is_whole": self.is_whole,
        }


@dataclass(frozen=True, slots=True)
class Diff:
    """What has changed from one checkpoint to another. `str()` is one sentence.

    Attributes:
        before: the checkpoint that was compared with.
        after: the other.
        changes: what differs between the trees but for the contents of tensors.
        metrics: what differs between the metrics; paths are names.
        metadata: likewise.
        tensors: each tensor that both have, of one type, shape and dtype; what has moved farthest comes first.
        raw_bytes: size of the chunks that hold all tensors of `after`, in memory, equal chunks counted once.
        shared_bytes: of those, the bytes in chunks that `before` has, too.
        read_bytes: what was fetched to find this out, manifests not counted.
    """

    before: Checkpoint
    after: Checkpoint
    changes: tuple[Change, ...]
    metrics: tuple[Change, ...]
    metadata: tuple[Change, ...]
    tensors: tuple[TensorDiff, ...]
    raw_bytes: int
    shared_bytes: int
    read_bytes: int = field(compare=False)

    @property
    def moved(self) -> tuple[TensorDiff, ...]:
        """Those of `tensors` that have moved."""
        return tuple(each for each in self.tensors if each.has_moved)

    @property
    def is_empty(self) -> bool:
        """Whether the states are equal: the same tree with the same bits in it."""
        return not self.changes and not self.moved

    @property
    def summary(self) -> str:
        """What a person needs first: which tensors moved, what else changed, and how much is shared."""
        parts = [_moved_text(self.tensors)]
        for kind, text in (("added", "added"), ("removed", "removed"), ("type", "of another type or shape")):
            if count := sum(change.kind == kind for change in self.changes):
                parts.append(f"{count} {text}")
        if count := sum(change.kind == "value" for change in self.changes):
            parts.append(f"{count} value{'s' if count > 1 else ''} changed")
        if broken := [each.path for each in self.tensors if each.new_nan or each.new_inf]:
            parts.append(f"NaN or infinity is new in {broken[0]}{f' and {len(broken) - 1} more' if broken[1:] else ''}")
        if self.raw_bytes:
            parts.append(f"{_percent(self.shared_bytes / self.raw_bytes)} of the bytes are shared")
        return "; ".join(parts)

    def __str__(self) -> str:
        names = (f"{each.run}@{each.step}" for each in (self.before, self.after))
        return f"{' → '.join(names)}: {self.summary}"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return _html(self)

    def to_json(self) -> dict[str, Any]:
        """As `ckptstore diff --json` prints it."""
        return {
            "before": {"run": self.before.run, "step": self.before.step},
            "after": {"run": self.after.run, "step": self.after.step},
            "summary": self.summary,
            "raw_bytes": self.raw_bytes,
            "shared_bytes": self.shared_bytes,
            "read_bytes": self.read_bytes,
            "tensors": [each.to_json() for each in self.tensors],
            **{
                name: [
                    {"path": each.path, "kind": each.kind, "before": each.before, "after": each.after}
                    for each in getattr(self, name)
                ]
                for name in ("changes", "metrics", "metadata")
            },
        }


def groups(some: Collection[str], others: Collection[str]) -> list[str]:
    """Patterns such as "model.linear.*" that cover all paths of `some`, none of `others`, and are as few as can be."""
    members = {path: tuple(_MEMBER.findall(path)) for path in (*some, *others)}
    taken = {members[path][:depth] for path in others for depth in range(len(members[path]) + 1)}
    inside = Counter(members[path][:depth] for path in some for depth in range(len(members[path]) + 1))
    found: dict[str, None] = {}
    for path in some:
        above = members[path]
        depth = next((depth for depth in range(len(above)) if above[:depth] not in taken), len(above))
        # A group of one is told by its own path.
        found[
            path
            if inside[above[:depth]] == 1 or depth == len(above)
            else f"{''.join(above[:depth])}.*".removeprefix(".")
        ] = None
    return list(found)


def _moved_text(tensors: Sequence[TensorDiff]) -> str:
    moved = [each.path for each in tensors if each.has_moved]
    did = "moved" if all(each.changed is not None for each in tensors) else "may have moved"
    if not tensors:
        return "no tensor to compare"
    if not moved:
        return f"no tensor moved, of {len(tensors)}"
    if len(moved) == len(tensors):
        return f"all {len(tensors)} tensors {did}" if len(tensors) > 1 else f"{moved[0]} {did}"
    still = [each.path for each in tensors if not each.has_moved]
    named = groups(moved, still)
    if len(named) <= MAX_GROUPS:
        return f"only {_listed(named)} {did}"
    unmoved = groups(still, moved)
    if len(unmoved) <= MAX_GROUPS:
        return f"all but {_listed(unmoved)} {did}"
    return f"{len(moved)} of {len(tensors)} tensors {did}, {moved[0]} the farthest"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _percent(share: float) -> str:
    """Never 100 % of what is not all of it, nor 0 % of what is not nothing."""
    if 0.99 < share < 1:
        return f"{math.floor(share * 1000) / 10:.1f} %"
    return "less than 1 %" if 0 < share < 0.01 else f"{share * 100:.0f} %"


def _json(figure: float | None) -> float | str | None:
    return figure if figure is None or math.isfinite(figure) else str(figure)


def by_drift(tensors: Sequence[TensorDiff]) -> Iterator[TensorDiff]:
    """What has moved farthest first: what became NaN before all else, what was not read by its chunks."""

    def key(each: TensorDiff) -> tuple[float, float, float]:
        broken = (each.new_nan or 0) + (each.new_inf or 0)
        drift = each.relative_l2 if each.relative_l2 is not None else -1.0
        part = each.changed if each.changed is not None else 1 - each.equal_bytes / max(1, each.bytes)
        return broken, drift, part

    return iter(sorted(tensors, key=key, reverse=True))


def _html(diff: Diff) -> str:
    """The summary of a comparison, what moved farthest, and what else changed."""
    names = [f"{each.run}@{each.step}" for each in (diff.before, diff.after)]
    moved = [
        (
            each.path,
            "" if each.changed is None else f"{each.changed:.2%}",
            _figure(each.relative_l2),
            _figure(each.largest),
            _figure(each.cosine),
            bytes_text(each.bytes),
        )
        for each in diff.moved[:MAX_ROWS]
    ]
    changes = [
        (f"{above}{each.path}", each.kind, _value(each.before), _value(each.after))
        for above, those in (("", diff.changes), ("metrics.", diff.metrics), ("metadata.", diff.metadata))
        for each in those[:MAX_ROWS]
    ]
    found = caption(" → ".join(names), diff.summary)
    if moved:
        found += table(("tensor", "changed", "relative L2", "largest", "cosine", "bytes"), moved)
    return found + (table(("what else", "", "before", "after"), changes) if changes else "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
