"""`ls`: which checkpoints there are. From manifests alone; no tensor is read."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import typer

from ckptstore import catalog, tagging
from ckptstore.chunk_numbers import ChunkNumbers
from ckptstore.cli.options import Json, OptionalTarget, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, print_table, printable, time_text, warn
from ckptstore.cli.target import Target, parse_options, resolve
from ckptstore.condemning import marked_corrupt, needs_any
from ckptstore.errors import NotFoundError
from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.plain_values import pairs, to_json, to_text

__all__ = ["add_to"]

DAMAGED = 1


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "ls",
        epilog=examples(
            "ckptstore ls ./ckpts",
            "ckptstore ls s3://bucket/ckpts/lstm",
            "CKPTSTORE_URL=s3://bucket/ckpts ckptstore ls lstm --json",
        ),
    )(ls)


def ls(target: OptionalTarget = None, storage_options: StorageOptions = None, as_json: Json = False) -> int:
    """List the runs of a store, or the steps of a run. The newest stands last.

    Sizes: LOGICAL is what the checkpoints would take if each were stored whole and uncompressed, STORED the size of the
    different chunks that hold them, NEW what a save had to upload. Checkpoints that need a chunk that was found damaged
    are marked; one whose manifest is damaged is reported, and the exit status is 1.
    """
    place = resolve(target, parse_options(storage_options))
    catalog.require_store(place.objects)
    found = _read(place)
    damaged = sum(step["damaged"] for run in found.runs.values() for step in run.steps)
    if place.run is None:
        _list_runs(place.objects, found, as_json=as_json)
    else:
        _list_steps(place, found, as_json=as_json)
    if not as_json:
        for key in found.damaged:
            warn(f"the manifest of step {key.step} of run {key.run!r} is damaged: {key}. See ckptstore verify.")
        if damaged:
            warn(f"{counted(damaged, 'checkpoint')} cannot be restored whole: see ckptstore repair.")
    return DAMAGED if found.damaged else 0


@dataclass(slots=True)
class _Run:
    """What is shown of a run; of its manifests, which may be many and large, only that is kept."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """As they are shown, the newest last."""
    chunks: set[int] = field(default_factory=set)
    newest_created: str = ""

    def add(self, manifest: Manifest, chunks: Iterable[int], *, damaged: bool) -> None:
        self.newest_created = max(self.newest_created, manifest.created)
        self.chunks.update(chunks)
        self.steps.append(
            {
                "step": manifest.step,
                "created": manifest.created,
                "metrics": manifest.metrics,
                "raw_bytes": manifest.raw_bytes,
                "stored_bytes": manifest.stored_bytes,
                "new_bytes": manifest.new_bytes,
                "damaged": damaged,
            }
        )


@dataclass(slots=True)
class _Found:
    """What the runs hold, and the keys of the manifests that cannot be read."""

    runs: dict[str, _Run] = field(default_factory=dict)
    damaged: list[ManifestKey] = field(default_factory=list)
    chunks: ChunkNumbers = field(default_factory=ChunkNumbers)

    def damaged_json(self) -> list[dict[str, Any]]:
        return [{"run": key.run, "step": key.step, "key": str(key)} for key in self.damaged]


def _read(place: Target) -> _Found:
    objects, run = place.objects, place.run
    listed = catalog.list_runs(objects) if run is None else {run: catalog.list_run(objects, run)}
    steps = [rows for found in listed.values() for step, rows in found.by_step.items() if place.step in (None, step)]
    found = _Found()
    corrupt = marked_corrupt(objects)
    for manifest, damaged in catalog.read_steps(objects, steps):
        if manifest is not None:
            run_found = found.runs.setdefault(manifest.run, _Run())
            run_found.add(manifest, found.chunks.of(manifest), damaged=needs_any(manifest, corrupt))
        else:
            found.damaged += damaged
    if run is not None and not found.runs and not found.damaged:
        catalog.manifest_of(objects, run, place.step or 0)  # raises what fits: no such run, or no such step
        raise NotFoundError(f"there is no run {run!r} with a checkpoint in {objects.url}.")
    return found


def _list_runs(objects: Objects, found: _Found, *, as_json: bool) -> None:
    runs: list[dict[str, Any]] = []
    for name, run in sorted(found.runs.items(), key=lambda item: item[1].newest_created):
        newest = run.steps[-1]
        runs.append(
            {
                "run": name,
                "checkpoints": len(run.steps),
                "damaged": sum(step["damaged"] for step in run.steps),
                "newest_step": newest["step"],
                "created": newest["created"],
                "logical_bytes": sum(step["raw_bytes"] for step in run.steps),
                "stored_bytes": found.chunks.stored_bytes(run.chunks),
            }
        )
    if as_json:
        print_json({"store": objects.url, "runs": runs, "damaged": found.damaged_json()})
        return
    if not runs:
        print_line(f"no checkpoints in {printable(objects.url)}")
        return
    print_table(
        ("RUN", "CHECKPOINTS", "NEWEST", "SAVED (UTC)", "LOGICAL", "STORED"),
        [
            (
                row["run"],
                str(row["checkpoints"]),
                str(row["newest_step"]),
                time_text(row["created"]),
                bytes_text(row["logical_bytes"]),
                bytes_text(row["stored_bytes"]),
            )
            for row in runs
        ],
        right=("CHECKPOINTS", "NEWEST", "LOGICAL", "STORED"),
    )


def _list_steps(place: Target, found: _Found, *, as_json: bool) -> None:
    run = place.require_run()
    steps = found.runs[run].steps if run in found.runs else []
    tags = tagging.listed(place.objects, run)
    any_damaged = any(step["damaged"] for step in steps)
    if as_json:
        checkpoints = [
            {**step, "tags": list(tags.get(step["step"], ())), "metrics": to_json(step["metrics"])} for step in steps
        ]
        store = place.objects.url
        print_json({"store": store, "run": run, "checkpoints": checkpoints, "damaged": found.damaged_json()})
        return
    print_table(
        (
            *("STEP", "SAVED (UTC)", "LOGICAL", "STORED", "NEW", "METRICS"),
            *(("TAGS",) if tags else ()),
            *(("DAMAGE",) if any_damaged else ()),
        ),
        [
            (
                str(step["step"]),
                time_text(step["created"]),
                bytes_text(step["raw_bytes"]),
                bytes_text(step["stored_bytes"]),
                bytes_text(step["new_bytes"]),
                "  ".join(f"{name}={to_text(value)}" for name, value in pairs(step["metrics"])),
                *((" ".join(tags.get(step["step"], ())),) if tags else ()),
                *(("damaged" if step["damaged"] else "",) if any_damaged else ()),
            )
            for step in steps
        ],
        right=("STEP", "LOGICAL", "STORED", "NEW"),
    )
