"""`import`: checkpoints of other programs as the steps of a run, one file or a whole folder of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptstore import Store
from ckptstore.cli import options
from ckptstore.cli.printing import (
    bytes_text,
    counted,
    print_json,
    print_line,
    print_table,
    printable,
    progress_bar,
    warn,
)
from ckptstore.cli.target import parse_options, resolve_new
from ckptstore.errors import ConflictError
from ckptstore.plain_values import to_json

if TYPE_CHECKING:
    from ckptstore.migration import ImportedCheckpoint, ImportReport

__all__ = ["add_to"]

Input = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of checkpoints; or one: a file (.pt, .pth, .ckpt, .bin, .safetensors), or a folder of "
        "torch.distributed.checkpoint or of Hugging Face's Trainer.",
    ),
]
NewTarget = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="STORE/RUN, where both may be new; STORE/RUN@STEP for one checkpoint; or RUN[@STEP] of the default store.",
    ),
]
StepFrom = Annotated[
    str | None,
    typer.Option(
        "--step-from",
        metavar="REGEX|content",
        help="How the step is told: a regular expression with one group, searched in each name; or content, the step "
        "inside each file. Without it, the number in the name.",
        show_default=False,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Names to leave alone, such as 'best*'.", show_default=False),
]
LeaveOut = Annotated[
    list[str] | None,
    typer.Option(
        "--leave-out",
        metavar="PATH",
        help="What in each state is not stored, such as args or 'callbacks.*'.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run the code that the files bring along. Only if you made them yourself.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of another state of that step.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; list what would be imported, in order.")]
StopOnError = Annotated[
    bool, typer.Option("--stop-on-error", help="End with the first one that fails, rather than go on with the others.")
]
_OUTCOMES = {"imported": "imported", "there": "is there already", "failed": "failed", "planned": "would be imported"}


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "import",
        epilog=options.examples(
            "ckptstore import old/checkpoints s3://bucket/ckpts/lstm --dry-run",
            "ckptstore import old/checkpoints s3://bucket/ckpts/lstm",
            "ckptstore import model.safetensors ./ckpts/pretrained@0",
        ),
    )(import_)


def import_(
    source: Input,
    target: NewTarget,
    step_from: StepFrom = None,
    exclude: Exclude = None,
    leave_out: LeaveOut = None,
    trust: Trust = False,
    dry_run: DryRun = False,
    stop_on_error: StopOnError = False,
    replace: Replace = False,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Save checkpoints of other programs as the steps of a run, in order.

    Each is committed by itself: an import that was cut off goes on when it is started again. What fails is named, and
    the rest is imported; the exit status is 1 then. No code that a file brings along runs, unless --trust is given.

    A .safetensors file of ckptstore export gives back the tree, the metrics and the metadata that were exported; one of
    another program becomes a flat dict of tensors. What Lightning and Hugging Face's Trainer wrote can be resumed from
    the store by their integrations.
    """
    from ckptstore.migration import import_checkpoints

    place = resolve_new(target, parse_options(storage_options))
    with progress_bar("importing", shown=not as_json) as progress:
        report = import_checkpoints(
            Store(place.objects),
            place.require_run(),
            source,
            step=place.step,
            step_from=step_from,
            exclude=exclude or (),
            leave_out=leave_out or (),
            trust=trust,
            replace=replace,
            stop_on_error=stop_on_error,
            dry_run=dry_run,
            progress=progress,
        )
    if place.step is not None and not dry_run:
        return _report_one(report, place.objects.url, source, as_json)
    if as_json:
        print_json(_document(place.objects.url, report))
    else:
        _print(report)
    return 1 if report.failed else 0


def _report_one(report: "ImportReport", store: str, source: Path, as_json: bool) -> int:
    """One checkpoint as the step that was named: what is wrong with it is an error of the command."""
    [row] = report.checkpoints
    if row.failure is not None:
        error = row.failure
        if isinstance(error, ConflictError) and "--replace" not in str(error):
            raise ConflictError(
                f"{row.run}@{row.step} is there already, with another state, and is left as it is. Choose another "
                "step or run, or give --replace to put this one in its place."
            ) from error
        raise error
    if as_json:
        sizes = {"raw_bytes": row.raw_bytes, "stored_bytes": row.stored_bytes, "new_bytes": row.new_bytes}
        print_json({"store": store, "run": row.run, "step": row.step, "file": to_json(str(source))} | sizes)
    else:
        print_line(
            f"imported {printable(source)} as {row.run}@{row.step}: {bytes_text(row.raw_bytes)}, "
            f"{bytes_text(row.stored_bytes)} stored, {bytes_text(row.new_bytes)} of it new"
        )
    return 0


def _print(report: "ImportReport") -> None:
    for line in report.passed_over:
        print_line(f"passed over {printable(line)}")
    if report.passed_over:
        print_line()
    print_table(
        ("RUN", "STEP", "SOURCE", "SIZE", "NEW", "WHAT"),
        [_cells(row) for row in report.checkpoints],
        right=("STEP", "SIZE", "NEW"),
    )
    print_line()
    print_line(_summary(report))
    for row in report.failed:
        warn(f"{row.source} was not imported: {row.error}")


def _cells(row: "ImportedCheckpoint") -> tuple[str, ...]:
    is_stored = row.outcome == "imported"  # what is there already took what it took in its time
    return (
        row.run,
        "?" if row.step is None else str(row.step),
        row.source,
        bytes_text(row.source_bytes),
        bytes_text(row.new_bytes) if is_stored else "",
        _OUTCOMES[row.outcome],
    )


def _summary(report: "ImportReport") -> str:
    counts = {name: sum(row.outcome == name for row in report.checkpoints) for name in _OUTCOMES}
    if report.dry_run:
        return (
            f"{counted(counts['planned'], 'checkpoint')} would be imported, {counts['there']} are there already. "
            "What is in the files was not read: damage, and code in them, shows at the import."
        )
    text = f"{counted(counts['imported'], 'checkpoint')} imported, {counts['there']} were there already"
    if report.failed:
        text += f", {counts['failed']} failed"
    if report.passed_over:
        text += f", {len(report.passed_over)} passed over (see above)"
    if report.raw_bytes:
        share = report.new_bytes / report.raw_bytes
        text += (
            f"\n{bytes_text(report.source_bytes)} of files, {bytes_text(report.raw_bytes)} of tensors, take "
            f"{bytes_text(report.new_bytes)} in the store ({share:.3f} of the tensors): "
            f"{report.reused_chunks} of {counted(report.chunks, 'chunk')} were there already"
        )
    return text


def _document(store: str, report: "ImportReport") -> dict[str, Any]:
    names = ("source", "run", "step", "outcome", "error", "source_bytes", "raw_bytes", "stored_bytes", "new_bytes")
    totals = ("source_bytes", "raw_bytes", "new_bytes", "chunks", "reused_chunks")
    return {
        "store": store,
        "run": report.run,
        "source": to_json(report.source),
        "dry_run": report.dry_run,
        "checkpoints": [{name: to_json(getattr(row, name)) for name in names} for row in report.checkpoints],
        "passed_over": [to_json(line) for line in report.passed_over],
        **{name: getattr(report, name) for name in totals},
    }
