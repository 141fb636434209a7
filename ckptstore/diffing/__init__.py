"""What has changed between two checkpoints: of a run, of two runs, or of two stores.

Equal chunks have equal digests, so most of what has not changed need not be read. Layers, bottom up: `numbers` (sums
over elements), `trees` (what the manifests alone tell), `alignment` (which bytes belong together), `comparing`
(fetching and summing), `report` (what came out). `ckptstore.Store.diff` is what users call.
"""

import fnmatch
from typing import Literal, get_args

from ckptstore.checkpoint import Checkpoint
from ckptstore.diffing.comparing import Compared, Comparison, Side
from ckptstore.diffing.report import Diff, TensorDiff, by_drift, groups
from ckptstore.diffing.trees import Change, compare_trees, compare_values
from ckptstore.errors import InvalidInputError
from ckptstore.manifest import Manifest
from ckptstore.pipeline import Progress, worker_threads

__all__ = ["Change", "Diff", "Read", "Side", "TensorDiff", "compare", "groups"]

_SOME = 5
"""Of the paths that an error names."""
Read = Literal["nothing", "changed", "all"]
"""What of the tensors is read: nothing, the chunks that differ, or those that are equal as well."""


def compare(
    before: Side,
    after: Side,
    *,
    tensors: str | None = None,
    read: Read = "changed",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints; see `ckptstore.Store.diff`."""
    if read not in get_args(Read):
        raise InvalidInputError(f"read must be one of {', '.join(map(repr, get_args(Read)))}, not {read!r}.")
    changes, pairs = compare_trees(before.manifest, after.manifest)
    if tensors is not None:
        matching = [pair for pair in pairs if fnmatch.fnmatchcase(pair.path, tensors)]
        if pairs and not matching:
            some = ", ".join(pair.path for pair in pairs[:_SOME])
            raise InvalidInputError(
                f"no tensor that both have matches {tensors!r}. There are {some}{', …' if len(pairs) > _SOME else ''}."
            )
        pairs = matching
    comparison = Comparison(before, after, pairs, read_equal=read == "all")
    read_bytes = 0
    if read != "nothing":
        total = comparison.bytes_to_read()

        def done(count: int) -> None:
            nonlocal read_bytes
            read_bytes += count
            if progress is not None:
                progress(read_bytes, total)

        comparison.run(threads or worker_threads(), done)
    raw, shared = _raw_and_shared(before.manifest, after.manifest)
    return Diff(
        before=Checkpoint(before.manifest),
        after=Checkpoint(after.manifest),
        changes=tuple(changes),
        metrics=tuple(compare_values(before.manifest.metrics, after.manifest.metrics)),
        metadata=tuple(compare_values(before.manifest.metadata, after.manifest.metadata)),
        tensors=tuple(by_drift([_of_tensor(compared, was_read=read != "nothing") for compared in comparison.tensors])),
        raw_bytes=raw,
        shared_bytes=shared,
        read_bytes=read_bytes,
    )


def _of_tensor(compared: Compared, *, was_read: bool) -> TensorDiff:
    node, moved = compared.pair.after, compared.moved
    elements = node.logical_bytes // node.item_bytes
    is_equal = compared.equal_bytes == node.logical_bytes
    is_known = was_read or is_equal
    are_numbers = is_known and compared.elements.are_numbers
    return TensorDiff(
        path=compared.pair.path,
        dtype=node.dtype,
        shape=node.shape,
        bytes=node.logical_bytes,
        equal_bytes=compared.equal_bytes,
        changed=moved.changed / max(1, elements) if is_known else None,
        relative_l2=moved.relative_l2 if are_numbers else None,
        largest=moved.largest if are_numbers else None,
        cosine=moved.cosine if are_numbers else None,
        new_nan=moved.new_nan if are_numbers else None,
        new_inf=moved.new_inf if are_numbers else None,
        is_whole=is_known and (is_equal or moved.elements == elements),
    )


def _raw_and_shared(before: Manifest, after: Manifest) -> tuple[int, int]:
    """Raw bytes of the different chunks that hold `after` (bases of deltas left out), and those that `before` has."""
    old = {before.chunks[index].digest for segment in before.segments for index in segment.chunks}
    new = {
        after.chunks[index].digest: after.chunks[index].raw for segment in after.segments for index in segment.chunks
    }
    return sum(new.values()), sum(length for digest, length in new.items() if digest in old)
