"""A checkpoint as users see it: a value made from its manifest. Needs no torch until its state is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from ckptstore.manifest import Manifest, checkpoint_digest
from ckptstore.markup import MAX_ROWS, caption, table
from ckptstore.plain_values import pairs, to_text
from ckptstore.skeleton import TAG, TensorNode, tensors
from ckptstore.texts import bytes_text, counted, time_text

__all__ = ["Checkpoint", "TensorInfo"]

_SHORT = 60


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What stands for a tensor, an array or a long bytes object where only its description was read.

    Attributes:
        dtype: torch's name ("bfloat16") or NumPy's type string ("<f4").
        shape: elements in each dimension.
        bytes: elements times element size.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Checkpoint:
    """One committed checkpoint: what it is, and the values of its leaves that are not tensors.

    Attributes:
        run: name of the run.
        step: the step it was saved as.
        created: when, by the clock of the process that saved it (UTC).
        raw_bytes: size of all tensors in memory, those that share memory counted once.
        stored_bytes: size of the chunks that hold it, whoever uploaded them.
        new_bytes: size of the chunks that this save had to upload; the others were in the store.
        missing: keys of the destination that the checkpoint lacks, after `restore(…, strict=False)`; else empty.
        unexpected: keys of the checkpoint that the destination lacks, likewise.
    """

    def __init__(self, manifest: Manifest, *, missing: Sequence[str] = (), unexpected: Sequence[str] = ()) -> None:
        self._manifest = manifest
        self.run: str = manifest.run
        self.step: int = manifest.step
        self.created: datetime = datetime.fromisoformat(manifest.created)
        self.raw_bytes: int = manifest.raw_bytes
        self.stored_bytes: int = manifest.stored_bytes
        self.new_bytes: int = manifest.new_bytes
        self.missing: tuple[str, ...] = tuple(missing)
        self.unexpected: tuple[str, ...] = tuple(unexpected)

    def __repr__(self) -> str:
        sizes = f"{self.raw_bytes:,} bytes, {self.stored_bytes:,} stored, {self.new_bytes:,} of them new"
        metrics = "".join(f", {name}={_short(value)}" for name, value in self.metrics.items())
        return f"<Checkpoint {self.run}@{self.step}{metrics}: {sizes}, {self.created:%Y-%m-%d %H:%M:%S} UTC>"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and its tensors. Reads nothing."""
        return _html(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and self._manifest.key == other._manifest.key

    def __hash__(self) -> int:
        return hash(self._manifest.key)

    @cached_property
    def state(self) -> Any:
        """The tree as it was saved, with a `TensorInfo` for each tensor, and the inner tree of what was registered."""
        from ckptstore.tree import unflatten

        return unflatten(self._manifest.tree, _info, self._manifest.segment_bytes, describe=True)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `save(metrics=…)` was given."""
        return _values(self._manifest.metrics)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What `save(metadata=…)` was given."""
        return _values(self._manifest.metadata)

    @cached_property
    def digest(self) -> str:
        """64 hex digits, which `load` and `restore` take as `expect`. They stand for the run, the step, the whole
        state, metrics and metadata. Saves of equal states as the same step have equal ones; a repair keeps it.
        """
        return checkpoint_digest(self._manifest)

    @property
    def host(self) -> str:
        """The machine that saved it."""
        return self._manifest.writer.host

    def tensors(self) -> dict[str, TensorInfo]:
        """Each tensor, array and long bytes object by its path, such as "model.linear.weight"."""
        return {path: _info(node, path) for path, node in tensors(self._manifest.tree, self._manifest.segment_bytes)}


def _html(checkpoint: Checkpoint) -> str:
    """What a checkpoint is, and its tensors, the largest first."""
    manifest = checkpoint._manifest
    facts = [
        ("saved (UTC)", f"{time_text(manifest.created)} by {manifest.writer.host}"),
        ("in memory", bytes_text(manifest.raw_bytes)),
        ("stored", f"{bytes_text(manifest.stored_bytes)}, {bytes_text(manifest.new_bytes)} of it new"),
        *((name, to_text(value)) for name, value in (*pairs(manifest.metrics), *pairs(manifest.metadata))),
    ]
    tensors = sorted(checkpoint.tensors().items(), key=lambda each: -each[1].bytes)
    rows = [(path, each.dtype, str(list(each.shape)), bytes_text(each.bytes)) for path, each in tensors[:MAX_ROWS]]
    title = caption(f"Checkpoint {checkpoint.run}@{checkpoint.step}", counted(len(tensors), "tensor"))
    return title + table(("", ""), facts) + table(("tensor", "dtype", "shape", "bytes"), rows)


def _info(node: TensorNode, path: str) -> TensorInfo:
    return TensorInfo(node.dtype, node.shape, node.logical_bytes)


def _short(value: Any) -> str:
    """A metric in a few characters."""
    if hasattr(value, "item"):
        value = value.item()  # of NumPy
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def _values(node: Any) -> dict[str, Any]:
    """Metrics or metadata: JSON as it stands where that says it all, else through the tree's decoder (and torch)."""
    if not _has_tag(node):
        return dict(node)
    from ckptstore.tree import unflatten

    return dict(unflatten(node, _info, []))


def _has_tag(node: Any) -> bool:
    if isinstance(node, dict):
        return TAG in node or any(_has_tag(below) for below in node.values())
    return isinstance(node, list) and any(_has_tag(below) for below in node)
