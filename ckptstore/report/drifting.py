"""How far each tensor of a run moved from checkpoint to checkpoint: reads the chunks that changed."""

import itertools

from ckptstore import catalog, diffing
from ckptstore.errors import CorruptError
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress
from ckptstore.report.facts import MAX_HEAT_STEPS, Heat, RunFacts, heat_of

__all__ = ["drift"]


def drift(objects: Objects, run: RunFacts, threads: int, progress: Progress | None = None) -> Heat | None:
    """A heat map of relative L2 distances, over the chunks that changed. A pair that is damaged has none.

    Each manifest is read once more, as a report keeps none; what was deleted since is left out.

    progress: called with the pairs done so far and those to be done in all.
    """
    steps = [each.step for each in run.sound][-MAX_HEAT_STEPS - 1 :]
    rows = catalog.list_run(objects, run.name)
    read = catalog.read_steps(objects, [rows.by_step.get(step, []) for step in steps])
    sizes: dict[str, int] = {}
    columns: list[tuple[int, dict[str, float | None]]] = []
    for before, after in itertools.pairwise(manifest for manifest, _ in read if manifest is not None):
        try:
            sides = diffing.Side(objects, before), diffing.Side(objects, after)
            tensors = diffing.compare(*sides, threads=threads).tensors
        except CorruptError:
            tensors = ()
        sizes |= {each.path: each.bytes for each in tensors}
        columns.append((after.step, {each.path: each.relative_l2 for each in tensors}))
        if progress is not None:
            progress(len(columns), len(steps) - 1)
    return heat_of(columns, sizes, is_drift=True)
