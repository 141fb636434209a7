"""`verify`: every byte read again, and what is damaged named."""

import typer

from ckptstore import Store
from ckptstore.cli.options import Json, OptionalTarget, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, printable, progress_bar
from ckptstore.cli.target import parse_options, resolve
from ckptstore.verifying import Damage, VerifyReport

__all__ = ["add_to"]

DAMAGED = 1


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "verify",
        epilog=examples(
            "ckptstore verify ./ckpts",
            "ckptstore verify s3://bucket/ckpts/lstm",
            "ckptstore verify ./ckpts --json",
        ),
    )(verify)


def verify(target: OptionalTarget = None, storage_options: StorageOptions = None, as_json: Json = False) -> int:
    """Read every byte again. It is compared with what was saved, in the whole store or in one run.

    The exit status is 1 if anything is damaged; each damaged tensor is named. Damaged chunks are marked, so that no
    save takes them up again.
    """
    place = resolve(target, parse_options(storage_options))
    place.refuse_step("verify reads")
    with progress_bar("verifying", shown=not as_json) as progress:
        report = Store(place.objects).verify(place.run, progress=progress)
    if as_json:
        print_json(_document(place.objects.url, place.run, report))
    else:
        _print(report)
    return 0 if report.ok else DAMAGED


def _document(store: str, run: str | None, report: VerifyReport) -> dict[str, object]:
    return {
        "store": store,
        "run": run,
        "ok": report.ok,
        "checkpoints": report.checkpoints,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "damaged": [
            {"run": each.run, "step": each.step, "path": each.path, "key": each.key, "reason": each.reason}
            for each in report.damaged
        ],
        "unknown": report.unknown,
        "marked": report.marked,
    }


def _print(report: VerifyReport) -> None:
    for each in report.damaged:
        print_line(f"damaged: {_name(each)}", bold=True)
        print_line(f"  key     {printable(each.key)}")
        print_line(f"  reason  {printable(each.reason)}")
    for key in report.unknown:
        print_line(f"unknown: {printable(key)} is none of the store's objects; it was left alone")
    read = f"{counted(report.checkpoints, 'checkpoint')}, {counted(report.chunks, 'chunk')}, {bytes_text(report.bytes)}"
    if report.ok:
        print_line(f"ok: {read} read; every byte is as it was saved")
        return
    print_line(f"DAMAGED: {counted(len(report.damaged), 'finding')} in {read}")
    print_line()
    print_line("What to do:")
    for line in _advice(report):
        print_line(f"- {line}")


def _name(damage: Damage) -> str:
    """What is damaged: a tensor of a checkpoint, a checkpoint's manifest, or an object that belongs to none."""
    if damage.run is None:
        return "an object that belongs to no checkpoint"
    what = "the manifest" if damage.path is None else damage.path
    return printable(f"run {damage.run}, step {damage.step}: {what}")


def _advice(report: VerifyReport) -> list[str]:
    lines = [
        "If there is a copy of the store, put the objects named above back from it, and verify again.",
        "restore() goes back by itself to the newest checkpoint of a run that is whole; load(step=…) of a damaged one "
        "raises.",
    ]
    if report.marked:
        lines.append("The damaged chunks are marked: the next save of the same content uploads good ones.")
    else:
        lines.append(
            "The damaged chunks could not be marked, as the store could not be written to: a save may take them up "
            "again. Verify with permission to write."
        )
    lines.append("A checkpoint that cannot be mended can be deleted: Store(url).run(name).delete(step).")
    return lines
