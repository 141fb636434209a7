"""`verify` and `repair`: every byte read again, what is damaged named, and made whole from good copies."""

from typing import TYPE_CHECKING, Annotated

import typer

from ckptstore import Store
from ckptstore.cli.options import Json, OptionalTarget, StorageOptions, examples
from ckptstore.cli.printing import bytes_text, counted, print_json, print_line, printable, progress_bar
from ckptstore.cli.target import parse_options, resolve
from ckptstore.format import CONDEMNED, MARKER_KEY, SESSIONS, ChunkKey

if TYPE_CHECKING:
    from ckptstore.repairing import RepairedStep, RepairReport
    from ckptstore.verifying import Damage, VerifyReport

__all__ = ["add_to"]

DAMAGED = 1
MAX_NAMES = 8
"""Of what needs one damaged object."""


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "verify",
        epilog=examples(
            "ckptstore verify ./ckpts",
            "ckptstore verify s3://bucket/ckpts/lstm",
            "ckptstore verify s3://bucket/ckpts --quick",
            "ckptstore verify ./ckpts --json",
        ),
    )(verify)
    app.command(
        "repair",
        epilog=examples(
            "ckptstore repair ./ckpts",
            "ckptstore repair s3://bucket/ckpts/lstm --json",
        ),
    )(repair)


def verify(
    target: OptionalTarget = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read no chunk that is there and as long as it should be.")
    ] = False,
    storage_options: StorageOptions = None,
    as_json: Json = False,
) -> int:
    """Read every byte again. It is compared with what was saved, in the whole store or in one run.

    The exit status is 1 if anything is damaged; each damaged tensor is named. Damaged chunks are marked, so that no
    save takes them up again.
    """
    place = resolve(target, parse_options(storage_options))
    place.refuse_step("verify reads")
    with progress_bar("verifying", shown=not as_json) as progress:
        report = Store(place.objects).verify(place.run, quick=quick, progress=progress)
    if as_json:
        print_json(_document(place.objects.url, place.run, report))
    else:
        _print(report)
    return 0 if report.ok else DAMAGED


def _document(store: str, run: str | None, report: "VerifyReport") -> dict[str, object]:
    return {
        "store": store,
        "run": run,
        "ok": report.ok,
        "quick": report.quick,
        "checkpoints": report.checkpoints,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "damaged": [
            {"run": each.run, "step": each.step, "path": each.path, "key": each.key, "reason": each.reason}
            for each in report.damaged
        ],
        "harmless": [{"key": each.key, "reason": each.reason} for each in report.harmless],
        "unknown": report.unknown,
        "marked": report.marked,
    }


def _print(report: "VerifyReport") -> None:
    for (key, reason), names in _by_object(report).items():
        print_line(f"damaged: {names[0]}", bold=True)
        for name in names[1:MAX_NAMES]:
            print_line(f"         {name}")
        if len(names) > MAX_NAMES:
            print_line(f"         and {len(names) - MAX_NAMES} more (--json has them all)")
        print_line(f"  key     {printable(key)}")
        print_line(f"  reason  {printable(reason)}")
    for each in report.harmless:
        print_line(f"harmless: {printable(each.key)} is damaged; no checkpoint needs it, and no save takes it up")
    for key in report.unknown:
        print_line(f"unknown: {printable(key)} is none of the store's objects; it was left alone")
    read = f"{counted(report.checkpoints, 'checkpoint')}, {counted(report.chunks, 'chunk')}, {bytes_text(report.bytes)}"
    if report.ok and report.quick:
        there = f"{counted(report.checkpoints, 'checkpoint')}, {counted(report.chunks, 'chunk')}"
        print_line(f"ok: {there}, each there and as long as it was saved; what is in them was not read")
        return
    if report.ok:
        but = " that a checkpoint needs" if report.harmless else ""
        print_line(f"ok: {read} read; every byte{but} is as it was saved")
        return
    print_line(f"DAMAGED: {counted(len(report.damaged), 'finding')} in {read}")
    print_line()
    print_line("What to do:")
    for line in _advice(report):
        print_line(f"- {line}")


def _by_object(report: "VerifyReport") -> dict[tuple[str, str], list[str]]:
    """What needs each damaged object: a chunk may be in a hundred checkpoints."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in report.damaged:
        found.setdefault((each.key, each.reason), []).append(_name(each))
    return found


def repair(target: OptionalTarget = None, storage_options: StorageOptions = None, as_json: Json = False) -> int:
    """Make checkpoints whole again that need damaged chunks, from good copies in the store.

    Run ckptstore verify before: it marks what is damaged. Where the same content was saved again since, there is a good
    copy. The exit status is 1 if a checkpoint cannot be repaired; each is named.
    """
    place = resolve(target, parse_options(storage_options))
    place.refuse_step("repair takes")
    report = Store(place.objects).repair(place.run)
    if as_json:
        print_json(
            {
                "store": place.objects.url,
                "run": place.run,
                "marked": report.marked,
                "repaired": _steps(report.repaired),
                "lost": _steps(report.lost),
                "unreadable": _steps(report.unreadable),
            }
        )
    else:
        _print_repaired(report, place.run)
    return DAMAGED if report.lost or report.unreadable else 0


def _steps(rows: "list[RepairedStep]") -> list[dict[str, object]]:
    return [{"run": row.run, "step": row.step, "paths": list(row.paths)} for row in rows]


def _print_repaired(report: "RepairReport", run: str | None) -> None:
    for row in report.repaired:
        print_line(printable(f"repaired: {row.run}@{row.step}: {', '.join(row.paths)}"))
    for row in report.lost:
        print_line(printable(f"LOST: {row.run}@{row.step}: there is no good copy of {', '.join(row.paths)}"), bold=True)
    for row in report.unreadable:
        print_line(printable(f"LOST: {row.run}@{row.step}: its manifest cannot be read"), bold=True)
    if not report.marked and not report.unreadable:
        print_line("nothing is marked as damaged. ckptstore verify reads every byte and marks what is.")
        return
    marked = f"{counted(report.marked, 'chunk')} marked as damaged"
    lost = len(report.lost) + len(report.unreadable)
    if not report.repaired and not lost:
        none = "no checkpoint" if run is None else f"no checkpoint of run {run}"
        print_line(f"{marked}; {none} needs any of them. ckptstore gc deletes those that no other needs.")
        return
    print_line(f"{marked}; {counted(len(report.repaired), 'checkpoint')} repaired, {lost} cannot be repaired")
    if report.lost or report.unreadable:
        print_line()
        print_line("What to do:")
        print_line(
            "- Save the same state again under any step, if it can be had, and repair again: that is a good copy."
        )
        print_line("- What else a checkpoint holds can still be loaded: run.load(step=…, only=…).")
        print_line("- One that is of no use any more can be deleted: ckptstore rm STORE/RUN@STEP.")


def _name(damage: "Damage") -> str:
    """What is damaged: a tensor of a checkpoint, a checkpoint's manifest, or an object that belongs to none."""
    if damage.run is None:
        return "an object that belongs to no checkpoint"
    what = "the manifest" if damage.path is None else damage.path
    return printable(f"run {damage.run}, step {damage.step}: {what}")


def _advice(report: "VerifyReport") -> list[str]:
    """What to do about each kind of damage that was found, and about no other."""
    keys = {each.key for each in report.damaged}
    lines = ["If there is a copy of the store, put the objects named above back from it, and verify again."]
    if any(each.run is not None for each in report.damaged):
        lines += [
            "restore() goes back by itself to the newest checkpoint of a run that is whole; load(step=…) of a damaged "
            "one raises.",
            "Saving a damaged step again mends it; ckptstore repair then mends others that need the same chunks.",
            "A checkpoint that cannot be had again can be deleted: ckptstore rm STORE/RUN@STEP.",
        ]
    if any(ChunkKey.parse(key) for key in keys):
        lines.append(
            "The damaged chunks are marked: the next save of the same content uploads good ones."
            if report.marked
            else "The damaged chunks could not be marked, as the store could not be written to: a save may take them "
            "up again. Verify with permission to write."
        )
    if MARKER_KEY in keys:
        lines.append(f"No checkpoint depends on {MARKER_KEY}. If it is damaged, move it away; the next save makes it.")
    if any(key.startswith(SESSIONS) for key in keys):
        lines.append("A session says that a save is under way. Delete the damaged one when no job saves.")
    if any(key.startswith(CONDEMNED) for key in keys):
        lines.append(
            "While a list of marks cannot be read, every save uploads all of its chunks. Delete the list when no job "
            "saves, and verify again, which makes the marks anew."
        )
    return lines
