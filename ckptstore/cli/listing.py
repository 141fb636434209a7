"""`ls`: which checkpoints there are. From manifests alone; no tensor is read."""

from dataclasses import dataclass, field
from typing import Any

import typer

from ckptstore import catalog, tagging
from ckptstore.cli.options import Json, OptionalTarget, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, print_json, print_line, print_table, printable, time_text, warn
from ckptstore.cli.target import Target, parse_options, resolve
from ckptstore.cli.values import pairs, to_json, to_text
from ckptstore.errors import NotFoundError
from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import each

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
    different chunks that hold them, NEW what a save had to upload. A checkpoint whose manifest is damaged is reported,
    and the exit status is 1.
    """
    place = resolve(target, parse_options(storage_options))
    catalog.require_store(place.objects)
    found = _read(place)
    if place.run is None:
        _list_runs(place.objects, found, as_json=as_json)
    else:
        _list_steps(place, found, as_json=as_json)
    if not as_json:
        for key in found.damaged:
            warn(f"the manifest of step {key.step} of run {key.run!r} is damaged: {key}. See ckptstore verify.")
    return DAMAGED if found.damaged else 0


@dataclass(slots=True)
class _Found:
    """The manifests of each run by step, and the keys of those that cannot be read."""

    by_run: dict[str, list[Manifest]] = field(default_factory=dict)
    damaged: list[ManifestKey] = field(default_factory=list)

    def damaged_json(self) -> list[dict[str, Any]]:
        return [{"run": key.run, "step": key.step, "key": str(key)} for key in self.damaged]


def _read(place: Target) -> _Found:
    objects, run = place.objects, place.run
    listed = catalog.list_runs(objects) if run is None else {run: catalog.list_run(objects, run)}
    steps = [
        (name, rows)
        for name, found in listed.items()
        for step, rows in found.by_step.items()
        if place.step in (None, step)
    ]
    found = _Found()
    read = each(lambda row: catalog.read_step(objects, row[1]), steps, threads=objects.request_threads)
    for (name, _), (manifest, damaged) in zip(steps, read, strict=True):
        if manifest is not None:
            found.by_run.setdefault(name, []).append(manifest)
        else:
            found.damaged += damaged
    if run is not None and not found.by_run and not found.damaged:
        catalog.manifest_of(objects, run, place.step or 0)  # raises what fits: no such run, or no such step
        raise NotFoundError(f"there is no run {run!r} with a checkpoint in {objects.url}.")
    return found


def _list_runs(objects: Objects, found: _Found, *, as_json: bool) -> None:
    runs: list[dict[str, Any]] = []
    for run, manifests in sorted(found.by_run.items(), key=lambda item: max(one.created for one in item[1])):
        newest = manifests[-1]
        chunks = {chunk.key: chunk.stored for manifest in manifests for chunk in manifest.chunks}
        runs.append(
            {
                "run": run,
                "checkpoints": len(manifests),
                "newest_step": newest.step,
                "created": newest.created,
                "logical_bytes": sum(manifest.raw_bytes for manifest in manifests),
                "stored_bytes": sum(chunks.values()),
            }
        )
    if as_json:
        print_json({"store": objects.url, "runs": runs, "damaged": found.damaged_json()})
    elif not runs:
        print_line(f"no checkpoints in {printable(objects.url)}")
    else:
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
    manifests = found.by_run.get(run, [])
    tags = tagging.listed(place.objects, run)
    if as_json:
        checkpoints = [
            {
                "step": manifest.step,
                "created": manifest.created,
                "tags": list(tags.get(manifest.step, ())),
                "metrics": to_json(manifest.metrics),
                "raw_bytes": manifest.raw_bytes,
                "stored_bytes": manifest.stored_bytes,
                "new_bytes": manifest.new_bytes,
            }
            for manifest in manifests
        ]
        store = place.objects.url
        print_json({"store": store, "run": run, "checkpoints": checkpoints, "damaged": found.damaged_json()})
        return
    print_table(
        ("STEP", "SAVED (UTC)", "LOGICAL", "STORED", "NEW", "METRICS", *(("TAGS",) if tags else ())),
        [
            (
                str(manifest.step),
                time_text(manifest.created),
                bytes_text(manifest.raw_bytes),
                bytes_text(manifest.stored_bytes),
                bytes_text(manifest.new_bytes),
                "  ".join(f"{name}={to_text(value)}" for name, value in pairs(manifest.metrics)),
                *((" ".join(tags.get(manifest.step, ())),) if tags else ()),
            )
            for manifest in manifests
        ],
        right=("STEP", "LOGICAL", "STORED", "NEW"),
    )
