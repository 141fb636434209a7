"""`diff`: what has changed between two checkpoints. Reads only the chunks that differ."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ckptstore import catalog
from ckptstore.cli import options
from ckptstore.cli.printing import (
    bytes_text,
    counted,
    print_json,
    print_line,
    print_table,
    printable,
    progress_bar,
)
from ckptstore.cli.target import Target, parse_options, resolve
from ckptstore.errors import InvalidInputError, NotFoundError
from ckptstore.format import is_run_name, split_run
from ckptstore.manifest import Manifest

__all__ = ["add_to"]

_READ = ("nothing", "changed", "all")
_MAX_VALUE_CHARACTERS = 80
_MARKS = {"added": "+", "removed": "-", "type": "!", "value": "*"}

Before = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="The checkpoint to compare with: STORE/RUN@STEP; without @STEP the newest.",
        show_default=False,
    ),
]
After = Annotated[
    str | None,
    typer.Argument(
        metavar="OTHER",
        help="The other: @STEP of the same run, RUN@STEP of the same store, or one in any store. Without it, TARGET is "
        "compared with the checkpoint before it.",
        show_default=False,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--tensors",
        metavar="GLOB",
        help="Compare only tensors whose path matches, such as 'model.*'.",
        show_default=False,
    ),
]
ToRead = Annotated[
    str,
    typer.Option(
        "--read",
        metavar="WHAT",
        help="changed: chunks that differ. all: equal ones too, for REL L2 and COSINE of whole tensors. nothing: go by "
        "digests alone.",
    ),
]
OtherOptions = Annotated[
    str | None,
    typer.Option(
        "--other-storage-options",
        metavar="JSON",
        envvar="CKPTSTORE_OTHER_STORAGE_OPTIONS",
        help="Those of OTHER's store, if they are not the same.",
        show_default=False,
    ),
]
Top = Annotated[
    int | None,
    typer.Option("--top", metavar="N", min=1, help="Show only the N tensors that moved farthest.", show_default=False),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "diff",
        epilog=options.examples(
            "ckptstore diff ./ckpts/lstm                 the newest and the one before",
            "ckptstore diff ./ckpts/lstm@100 @200",
            "ckptstore diff ./ckpts/lstm@100 s3://bucket/ckpts/lstm@100",
            "ckptstore diff lstm@100 @200 --tensors 'model.*' --top 10",
        ),
    )(diff)


def diff(
    target: Before,
    other: After = None,
    tensors: Pattern = None,
    read: ToRead = "changed",
    top: Top = None,
    storage_options: options.StorageOptions = None,
    other_storage_options: OtherOptions = None,
    as_json: options.Json = False,
) -> int:
    """Show what has changed from one checkpoint to another.

    Per tensor: CHANGED, the part of the elements with other bits; REL L2, the length of the difference as a part of
    the length before; MAX, the largest difference of an element; COSINE, of the angle between before and after. Equal
    chunks are not read, and a ~ says that REL L2 and COSINE are of the chunks that differ. Then what else changed:
    + added, - removed, ! of another type or shape, * another value.
    """
    if read not in _READ:
        raise InvalidInputError(f"--read must be one of {', '.join(_READ)}, not {read!r}.")
    given = parse_options(storage_options)
    place = resolve(target, given)
    place.require_run()
    theirs = _other(place, other, parse_options(other_storage_options) or given)
    after = _picked(theirs or place)
    before = _picked(place) if theirs else _one_before(place, after)
    from ckptstore import diffing  # takes NumPy

    with progress_bar("Comparing", shown=not as_json) as progress:
        found = diffing.compare(
            diffing.Side(place.objects, before),
            diffing.Side((theirs or place).objects, after),
            tensors=tensors,
            read=read,  # type: ignore[arg-type]  # one of the three, as was seen above
            progress=progress,
        )
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, top)
    return 0


def _other(place: Target, other: str | None, given: dict[str, Any] | None) -> Target | None:
    if other is None:
        return None
    if other.startswith("@"):
        return Target(place.objects, *split_run(f"{place.run}{other}"))
    run = other.partition("@")[0]
    if "/" not in other and is_run_name(run) and catalog.list_run(place.objects, run).by_step:
        return Target(place.objects, *split_run(other))  # of the store that was named a word before
    theirs = resolve(other, given)
    theirs.require_run()
    return theirs


def _picked(place: Target) -> Manifest:
    return catalog.pick(place.objects, place.require_run(), place.step)


def _one_before(place: Target, after: Manifest) -> Manifest:
    steps = [step for step in catalog.list_run(place.objects, after.run).committed_steps() if step < after.step]
    if not steps:
        raise NotFoundError(f"there is no checkpoint before {after.run}@{after.step} to compare it with. Name two.")
    return catalog.manifest_of(place.objects, after.run, max(steps))


# ---- for people


def _print(found: Any, top: int | None) -> None:
    print_line(printable(str(found)), bold=True)
    moved = found.moved
    if moved:
        print_line()
        shown = moved[:top]
        print_table(
            ("TENSOR", "TYPE", "BYTES", "CHANGED", "REL L2", "MAX", "COSINE"),
            [_row(each) for each in shown],
            right=("BYTES", "CHANGED", "REL L2", "MAX", "COSINE"),
        )
        if len(shown) < len(moved):
            print_line(f"and {counted(len(moved) - len(shown), 'tensor')} more that moved")
    for title, changes in (("", found.changes), ("metrics.", found.metrics), ("metadata.", found.metadata)):
        if changes:
            print_line()
            for change in changes:
                print_line(_line(title, change))
    print_line()
    print_line(
        f"{counted(len(found.tensors) - len(moved), 'tensor')} did not move. "
        f"{bytes_text(found.shared_bytes)} of {bytes_text(found.raw_bytes)} are shared; "
        f"{bytes_text(found.read_bytes)} were read."
    )


def _row(each: Any) -> Sequence[str]:
    broken = "".join(
        f", {count} new {name}" for count, name in ((each.new_nan, "NaN"), (each.new_inf, "infinite")) if count
    )
    about = "" if each.is_whole else "~"
    return (
        each.path,
        f"{each.dtype} {list(each.shape)}{broken}",
        bytes_text(each.bytes),
        _part(each),
        _figure(each.relative_l2, about),
        _figure(each.largest),
        "" if each.cosine is None else f"{about}{_cosine(each.cosine)}",
    )


def _part(each: Any) -> str:
    """The part that changed: exact, or what its chunks tell."""
    if each.changed is None:
        return f"≤ {_percent(1 - each.equal_bytes / each.bytes)}"
    return _percent(each.changed)


def _percent(part: float) -> str:
    return "< 0.1 %" if 0 < part < 0.001 else f"{math.floor(part * 1000) / 10:.1f} %"


def _figure(value: float | None, about: str = "") -> str:
    return "" if value is None else f"{about}{value:.3g}"


def _cosine(value: float) -> str:
    """With as many digits as it takes to tell it from 1."""
    return f"{value:.4f}" if abs(value) < 0.9999 else f"{value:.10f}".rstrip("0").ljust(6, "0")


def _line(above: str, change: Any) -> str:
    mark = _MARKS[change.kind]
    path = f"{above}{change.path}"
    if change.kind == "added":
        text = f"{path}  {_text(change.after)}"
    elif change.kind == "removed":
        text = f"{path}  {_text(change.before)}"
    else:
        text = f"{path}  {_text(change.before)} → {_text(change.after)}"
    return printable(f"{mark} {text}")


def _text(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}…"
