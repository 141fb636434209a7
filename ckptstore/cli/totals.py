"""`du`: what the runs of a store cost."""

import typer

from ckptstore import Store
from ckptstore.cli.options import Json, OptionalTarget, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, print_json, print_line, print_table
from ckptstore.cli.target import parse_options, resolve
from ckptstore.errors import NotFoundError
from ckptstore.usage import Usage

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "du",
        epilog=examples(
            "ckptstore du ./ckpts",
            "ckptstore du s3://bucket/ckpts/lstm",
            "ckptstore du ./ckpts --json",
        ),
    )(du)


def du(target: OptionalTarget = None, storage_options: StorageOptions = None, as_json: Json = False) -> int:
    """Add up what a store (or a run) costs.

    LOGICAL is what the checkpoints would take if each were stored whole and uncompressed. STORED is the size of the
    different chunks that a run needs, SHARED the part of it that other runs need as well; so the total of the store is
    less than the sum of its runs. Unreferenced chunks are those that no checkpoint needs.
    """
    place = resolve(target, parse_options(storage_options))
    place.refuse_step("du adds up")
    usage = Store(place.objects).usage()
    if place.run is not None and place.run not in usage.runs:
        raise NotFoundError(f"there is no run {place.run!r} with a checkpoint in {place.objects.url}.")
    runs = [name for name in usage.runs if place.run in (None, name)]
    if as_json:
        print_json(_document(place.objects.url, usage, runs))
    else:
        _print(usage, runs, whole=place.run is None)
    return 0


def _document(store: str, usage: Usage, runs: list[str]) -> dict[str, object]:
    return {
        "store": store,
        "runs": [
            {
                "run": name,
                "checkpoints": usage.runs[name].checkpoints,
                "logical_bytes": usage.runs[name].logical_bytes,
                "stored_bytes": usage.runs[name].stored_bytes,
                "shared_bytes": usage.runs[name].shared_bytes,
            }
            for name in runs
        ],
        "logical_bytes": usage.logical_bytes,
        "stored_bytes": usage.stored_bytes,
        "unreferenced_bytes": usage.unreferenced_bytes,
    }


def _print(usage: Usage, runs: list[str], *, whole: bool) -> None:
    rows = []
    for name in runs:
        run = usage.runs[name]
        sizes = (run.logical_bytes, run.stored_bytes, run.shared_bytes)
        rows.append((name, str(run.checkpoints), *map(bytes_text, sizes)))
    if whole:
        count = sum(run.checkpoints for run in usage.runs.values())
        rows.append(("total", str(count), bytes_text(usage.logical_bytes), bytes_text(usage.stored_bytes), ""))
    headings = ("RUN", "CHECKPOINTS", "LOGICAL", "STORED", "SHARED")
    print_table(headings, rows, right=headings[1:])
    if not whole:
        return
    print_line()
    if usage.stored_bytes:
        print_line(f"each stored byte serves {usage.logical_bytes / usage.stored_bytes:.1f} logical ones")
    print_line(f"unreferenced: {bytes_text(usage.unreferenced_bytes)} that no checkpoint needs")
