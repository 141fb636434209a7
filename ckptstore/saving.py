"""A save, from the user's state to the manifest: take it apart, hash it, and let the protocol do the rest."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore import protocol, segments
from ckptstore.catalog import read_marker
from ckptstore.condemning import condemn_corrupt
from ckptstore.errors import CheckpointWarning, CorruptError, FencedError, InvalidInputError, UnavailableError
from ckptstore.format import DEFAULT_CHUNK_BYTES, DEFAULT_SMALL_BYTES, MARKER_KEY, Codec, new_save_id
from ckptstore.kernels import compiled
from ckptstore.manifest import Manifest, Marker, content_digest, encode
from ckptstore.objects.base import Objects
from ckptstore.objects.open import self_test
from ckptstore.performing import Performer
from ckptstore.pipeline import Progress
from ckptstore.tree import flatten
from ckptstore.writer import now_text, this_writer

FENCED_TRIES = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state taken apart: its skeleton, and where its bytes lie in memory."""

    tree: Any
    sources: list[segments.Source]
    metrics: Any
    metadata: Any


def ensure_store(objects: Objects) -> Marker:
    """The marker of the store; makes the store if there is none, after a trial of what the backend promises."""
    try:
        marker = read_marker(objects)
    except CorruptError as error:
        if objects.get(MARKER_KEY) is not None:
            raise CorruptError(
                f"nothing can be saved to {objects.url}: {error} Move {MARKER_KEY} away; the next save makes it again, "
                "and the checkpoints stay as they are."
            ) from error
        marker = None  # only the marker is gone: a new one makes the store whole again
    if marker is not None:
        return marker
    self_test(objects)
    fresh = Marker(
        store=new_save_id(), created=now_text(), chunk_bytes=DEFAULT_CHUNK_BYTES, small_bytes=DEFAULT_SMALL_BYTES
    )
    if objects.create(MARKER_KEY, encode(fresh)):
        return fresh
    made_by_another = read_marker(objects)
    if made_by_another is None:
        raise UnavailableError(
            f"{objects.url}/{MARKER_KEY} was there and is gone: something else deletes in this store."
        )
    return made_by_another


def take_apart(state: Any, metrics: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None) -> Snapshot:
    """Check the whole state and find its bytes. Raises InvalidInputError, naming the leaf that cannot be saved."""
    tree, leaves = flatten(state)
    return Snapshot(tree, segments.find(leaves), _small_values(metrics, "metrics"), _small_values(metadata, "metadata"))


def _small_values(values: Mapping[str, Any] | None, name: str) -> Any:
    if values is None:
        return {}
    given: Any = values  # whatever the annotations say
    if not isinstance(given, Mapping) or not all(type(key) is str for key in given):
        raise InvalidInputError(f"{name} must be a dict with str keys, such as {{'loss': 2.5}}; not {values!r:.80}.")
    skeleton, _ = flatten(dict(values), tensors=False, root=name)
    return skeleton


def save(
    objects: Objects,
    run: str,
    step: int,
    snapshot: Snapshot,
    *,
    replace: bool,
    codec: Codec,
    threads: int,
    progress: Progress | None = None,
    before_commit: Callable[[], None] | None = None,
) -> Manifest:
    """Save a snapshot as `step` of `run`; return the manifest that stands for it. Raises as `protocol.save` does.

    progress: called with the raw bytes uploaded so far and those to be uploaded in all.
    before_commit: called when all is uploaded and nothing is visible yet; what it raises ends the save there.
    """
    marker = ensure_store(objects)
    layout = segments.cut(snapshot.sources, chunk_bytes=marker.chunk_bytes, small_bytes=marker.small_bytes)
    compiled.expect(layout.raw_bytes)
    segment_table, distinct = layout.segments(layout.digests(threads=threads))
    for attempt in range(FENCED_TRIES):
        request = protocol.SaveRequest(
            run=run,
            step=step,
            save=new_save_id(),
            created=now_text(),
            writer=this_writer(),
            metrics=snapshot.metrics,
            metadata=snapshot.metadata,
            content=content_digest(snapshot.tree, segment_table, list(distinct)),
            tree=snapshot.tree,
            segments=segment_table,
            chunks={name: chunk.raw_bytes for name, chunk in distinct.items()},
            raw_bytes=layout.raw_bytes,
            replace=replace,
            deltas=codec == "small",
        )
        performer = Performer(objects, distinct, codec, threads, progress, before_commit)
        try:
            return performer.perform(protocol.save(request))
        except FencedError:
            if attempt == FENCED_TRIES - 1:
                raise
            # What was uploaded can be found again, so another try is cheap.
        finally:
            _report(objects, performer.damaged)
    raise AssertionError("unreachable")


def _report(objects: Objects, damaged: Sequence[CorruptError]) -> None:
    """Say that earlier checkpoints are damaged, which the save found out by the way."""
    if damaged:
        condemn_corrupt(objects, *damaged)
        keys = ", ".join(str(error.key) for error in damaged[:3])
        warnings.warn(
            CheckpointWarning(
                f"earlier checkpoints in {objects.url} are damaged: {keys}: {damaged[0]}. This save does not need "
                "them. `ckptstore verify` lists all damage."
            ),
            stacklevel=4,
        )
