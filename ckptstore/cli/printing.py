"""How results reach people and programs: text without surprises, sizes, tables, one JSON document, progress bars.

Names and values come from stores that anybody may have written: nothing in them acts on a terminal. Nothing is cut off
or wrapped in the middle, so that what is piped can be searched.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ckptstore.pipeline import Progress
from ckptstore.texts import bytes_text, counted, printable, time_text

__all__ = [
    "bytes_text",
    "counted",
    "print_json",
    "print_line",
    "print_table",
    "printable",
    "progress_bar",
    "time_text",
    "warn",
]


def print_json(document: Any) -> None:
    """Write the one document of a command: ASCII, with no NaN in it, so that every JSON parser takes it."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_line(text: str = "", *, bold: bool = False) -> None:
    """Write one line of text."""
    if bold and sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console().print(Text(text, style="bold"), soft_wrap=True)
    else:
        print(text)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Write rows below headings, each column as wide as it has to be; the columns named in `right` end flush."""
    from rich.cells import cell_len

    lines = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(headings, *lines, strict=True)]
    for number, line in enumerate([headings, *lines]):
        cells = []
        for heading, cell, width in zip(headings, line, widths, strict=True):
            space = " " * (width - cell_len(cell))
            cells.append(space + cell if heading in right else cell + space)
        print_line("  ".join(cells).rstrip(), bold=number == 0)


def warn(text: object) -> None:
    """Write a warning to stderr, on one line."""
    print(f"warning: {printable(' '.join(str(text).split()))}", file=sys.stderr)


@contextlib.contextmanager
def progress_bar(doing: str, *, shown: bool, of_bytes: bool = True) -> Iterator[Progress | None]:
    """A bar on stderr, for what takes `progress(done, all)`, of bytes or of things; None if stderr is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    columns = (doing, BarColumn(), *counts, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
