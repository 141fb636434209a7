"""The arguments and options that commands have in common."""

from typing import Annotated

import typer

from ckptstore.cli.target import HELP

__all__ = ["Json", "OptionalTarget", "StorageOptions", "Target", "as_it_stands", "examples"]

OptionalTarget = Annotated[str | None, typer.Argument(metavar="TARGET", help=HELP, show_default=False)]
Target = Annotated[str, typer.Argument(metavar="TARGET", help=HELP, show_default=False)]
StorageOptions = Annotated[
    str | None,
    typer.Option(
        "--storage-options",
        metavar="JSON",
        envvar="CKPTSTORE_STORAGE_OPTIONS",
        help="Options of fsspec's file system for the URL, as a JSON object. Keep secrets in the variable, in a "
        "profile or in the environment: other users of a machine can see its command lines.",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document: sizes in bytes, times in UTC (ISO 8601)."),
]


def examples(*commands: str) -> str:
    """The end of a help text: commands, each on its line."""
    return as_it_stands("Examples:", *(f"  {command}" for command in commands))


def as_it_stands(*lines: str) -> str:
    """A paragraph of a help text that is not wrapped; the character says so to the formatter."""
    return "\b\n" + "\n".join(lines)
