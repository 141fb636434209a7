"""How stores and runs show themselves in a notebook."""

from ckptstore import catalog
from ckptstore import usage as usages
from ckptstore.errors import CheckpointError
from ckptstore.markup import MAX_ROWS, caption, table
from ckptstore.objects.base import Objects
from ckptstore.plain_values import pairs, to_text
from ckptstore.texts import bytes_text, counted, time_text

__all__ = ["run_html", "store_html"]


def store_html(objects: Objects) -> str:
    """The runs of a store: checkpoints and bytes. A store that cannot be read says why."""
    try:
        found = usages.usage(objects)
    except CheckpointError as error:
        return caption(f"Store {objects.url}", str(error))
    rows = [
        (run, f"{each.checkpoints:,}", *map(bytes_text, (each.logical_bytes, each.stored_bytes, each.shared_bytes)))
        for run, each in found.runs.items()
    ]
    sums = f"{bytes_text(found.logical_bytes)} in {bytes_text(found.stored_bytes)}"
    return caption(f"Store {objects.url}", f"{counted(len(rows), 'run')}, {sums}") + table(
        ("run", "checkpoints", "logical", "stored", "of it shared"), rows
    )


def run_html(objects: Objects, run: str) -> str:
    """The checkpoints of a run, the newest last. One that is damaged is left out and counted."""
    try:
        rows = catalog.list_run(objects, run)
        steps = [found for found in rows.by_step.values() if found]
        manifests, damaged = [], 0
        for manifest, broken in catalog.read_steps(objects, steps[-MAX_ROWS:]):
            if manifest is not None:
                manifests.append(manifest)
            damaged += manifest is None and bool(broken)
    except CheckpointError as error:
        return caption(f"Run {run}", str(error))
    metrics = list(dict.fromkeys(name for manifest in manifests for name, _ in pairs(manifest.metrics)))
    lines = []
    for manifest in manifests:
        values = dict(pairs(manifest.metrics))
        lines.append(
            (
                str(manifest.step),
                time_text(manifest.created),
                *(to_text(values[name]) if name in values else "" for name in metrics),
                *map(bytes_text, (manifest.raw_bytes, manifest.stored_bytes, manifest.new_bytes)),
            )
        )
    told = [counted(len(rows.committed_steps()), "checkpoint")]
    told += [f"the newest {MAX_ROWS} are shown"] if len(steps) > MAX_ROWS else []
    told += [f"{damaged} of them damaged: see ckptstore verify"] if damaged else []
    headings = ("step", "saved (UTC)", *metrics, "in memory", "stored", "new")
    return caption(f"Run {run}", ", ".join(told)) + table(headings, lines)
