"""The command line `ckptstore`: what the library does, for people at a terminal and for scripts.

Each group of commands is a file here. Nothing in this room imports torch before a command needs it.
"""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
import typer.main

from ckptstore._version import __version__
from ckptstore.cli import (
    benching,
    collection,
    compaction,
    differing,
    examination,
    files,
    importing,
    listing,
    removal,
    reporting,
    showing,
    totals,
    verification,
)
from ckptstore.cli.options import as_it_stands, examples
from ckptstore.cli.printing import print_json, printable, warn
from ckptstore.errors import (
    CheckpointError,
    CheckpointWarning,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
)

__all__ = ["main"]

OK, DAMAGED, USAGE, NOT_FOUND, UNAVAILABLE, BUG, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 4, 70, 130, 141

_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""The base of all complaints about the command line. Typer has it from click, or brings its own; neither says so."""

EXAMPLES = (
    "ckptstore ls ./ckpts                     the runs of a store",
    "ckptstore show ./ckpts/lstm@300          what is in a checkpoint",
    "ckptstore verify s3://bucket/ckpts       read every byte again",
    "export CKPTSTORE_URL=s3://bucket/ckpts",
    "ckptstore ls lstm                        the checkpoints of a run there",
)
EXIT_STATUS = (
    "Exit status:",
    "  0    all is well",
    "  1    damage was found, or a problem, or something cannot be repaired",
    "  2    the command line or a file makes no sense, or something is in the way;",
    "       nothing was changed",
    "  3    there is no such store, run, step or file",
    "  4    the store cannot be used now: unreachable, forbidden, or made by a",
    "       newer ckptstore",
    "  70   a bug in ckptstore; please report it",
    "  130  interrupted",
)

app = typer.Typer(
    name="ckptstore",
    add_completion=False,
    # Plain help: rich's would take the brackets in STORE[/RUN[@STEP]] for markup, and draw boxes.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS = (
    *(listing, showing, differing, reporting, verification, totals, files, importing),
    *(removal, collection, compaction, examination, benching),
)
"""In the order of the help."""
for group in GROUPS:
    group.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ckptstore {__version__}")
        raise typer.Exit


@app.callback(epilog=f"{examples(*EXAMPLES)}\n\n{as_it_stands(*EXIT_STATUS)}")
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Look at, verify and move the checkpoints of a store.

    Most commands take a TARGET: a store, a run in it, or one checkpoint, as STORE[/RUN[@STEP]]. STORE is a path or a
    URL such as s3://bucket/ckpts. The default store is the one that the variable CKPTSTORE_URL names, else the current
    folder; of it, RUN[@STEP] will do.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line; return the exit status, which `ckptstore --help` explains.

    Args:
        arguments: what follows the program's name; None takes those of this process.
    """
    words = tuple(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    with _plain_streams(), _warnings_on_stderr():
        try:
            status = _run(list(words or ["--help"]))
            sys.stdout.flush()
            return status if words else USAGE
        except (CheckpointError, _USAGE_ERROR) as error:
            return _report(error, as_json=as_json)
        except (KeyboardInterrupt, typer.Abort):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Who read our output has seen enough. What is left in the buffer must not raise again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        except Exception:
            traceback.print_exc()
            return BUG


def _run(words: list[str]) -> int:
    # Not command.main(): it gives a closed pipe the status 1, which means damage here.
    command = typer.main.get_command(app)
    try:
        with command.make_context("ckptstore", words) as context:
            result = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return result if isinstance(result, int) else OK


def _report(error: Exception, *, as_json: bool) -> int:
    """Say on one line of stderr what went wrong, with --json also in a document on stdout; return the exit status."""
    text: str = error.format_message() if hasattr(error, "format_message") else str(error)
    kind = type(error).__name__ if isinstance(error, CheckpointError) else "UsageError"
    status = _status(error)
    print(f"error: {printable(' '.join(text.split()))}", file=sys.stderr)
    if kind == "UsageError":
        context: Any = getattr(error, "ctx", None)
        print(f"Try: {context.command_path if context else 'ckptstore'} --help", file=sys.stderr)
    if as_json:
        with contextlib.suppress(BrokenPipeError):
            print_json({"error": {"type": kind, "message": text, "status": status}})
    return status


def _status(error: Exception) -> int:
    if isinstance(error, CorruptError):
        return DAMAGED
    if isinstance(error, InvalidInputError | ConflictError) or not isinstance(error, CheckpointError):
        return USAGE
    return NOT_FOUND if isinstance(error, NotFoundError) else UNAVAILABLE


@contextlib.contextmanager
def _plain_streams() -> Iterator[None]:
    """Let text through that the terminal's encoding lacks, written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    yield


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show warnings as a line of text, without the place in our code; ours always."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch and others say nothing to people at a terminal
        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = lambda message, *_, **__: warn(message)
        yield
