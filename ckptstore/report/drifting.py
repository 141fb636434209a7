"""How far each tensor of a run moved from checkpoint to checkpoint: reads the chunks that changed."""

from ckptstore import catalog, diffing
from ckptstore.errors import CorruptError
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress
from ckptstore.report.facts import MAX_HEAT_TENSORS, Heat, RunFacts, pairs_of
from ckptstore.texts import printable

__all__ = ["drift"]


def drift(objects: Objects, run: RunFacts, threads: int, progress: Progress | None = None) -> Heat | None:
    """A heat map of relative L2 distances, over the chunks that changed. A pair that is damaged has none.

    progress: called with the pairs done so far and those to be done in all.
    """
    pairs = list(pairs_of(run))
    if not pairs:
        return None
    sizes: dict[str, int] = {}
    found: list[dict[str, float | None]] = []
    for number, (before, after) in enumerate(pairs):
        sides = (diffing.Side(objects, catalog.manifest_of(objects, run.name, step)) for step in (before, after))
        try:
            tensors = diffing.compare(*sides, threads=threads).tensors
        except CorruptError:
            tensors = ()
        sizes |= {each.path: each.bytes for each in tensors}
        found.append({each.path: each.relative_l2 for each in tensors})
        if progress is not None:
            progress(number + 1, len(pairs))
    shown = sorted(sizes, key=lambda path: -sizes[path])[:MAX_HEAT_TENSORS]
    values = [[each.get(path) for each in found] for path in shown]
    return Heat(
        [after for _, after in pairs], list(map(printable, shown)), values, len(sizes) - len(shown), is_drift=True
    )
