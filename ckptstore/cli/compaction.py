"""`compact`: the older checkpoints of a run in fewer bytes."""

from typing import Annotated

import typer

from ckptstore import Store
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, progress_bar
from ckptstore.cli.target import parse_options, resolve

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "compact",
        epilog=options.examples(
            "ckptstore compact ./ckpts/lstm",
            "ckptstore compact s3://bucket/ckpts/lstm --keep-fast 5 --depth 8",
        ),
    )(compact)


def compact(
    target: options.Target,
    keep_fast: Annotated[int, typer.Option(metavar="N", min=1, help="Leave the N newest checkpoints as they are.")] = 3,
    depth: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="How many differences may stand one on another.")
    ] = 4,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Store older checkpoints of a run as differences to the next newer one each.

    They stay what they are, and take longer to restore. It may be stopped at any moment, and goes on where it was. The
    bytes that it wins become free with the next ckptstore gc.
    """
    place = resolve(target, parse_options(storage_options))
    run = place.require_run()
    place.refuse_step("compact takes")
    with progress_bar("compacting", shown=not as_json) as progress:
        report = Store(place.objects).run(run).compact(keep_fast=keep_fast, depth=depth, progress=progress)
    if as_json:
        print_json(
            {
                "store": place.objects.url,
                "run": run,
                "checkpoints": report.checkpoints,
                "compacted": report.compacted,
                "passed_over": report.passed_over,
                "bytes_before": report.bytes_before,
                "bytes_after": report.bytes_after,
            }
        )
        return 0
    for step in report.passed_over:
        print_line(f"passed over: {run}@{step}, which is damaged, or was changed meanwhile: see ckptstore verify")
    before, after = bytes_text(report.bytes_before), bytes_text(report.bytes_after)
    print_line(
        f"{counted(len(report.compacted), 'checkpoint')} of {report.checkpoints} stored anew: {before} -> {after}"
    )
    if report.compacted:
        print_line("ckptstore gc frees what is needed no more")
    return 0
