"""`doctor`: whether a place can hold a store, and what lies about in it."""

from typing import Annotated

import typer

from ckptstore import Store
from ckptstore.cli import options
from ckptstore.cli.printing import counted, print_json, print_line, printable
from ckptstore.cli.target import parse_options, resolve
from ckptstore.errors import InvalidInputError, NotFoundError, UnavailableError
from ckptstore.objects.open import open_objects

__all__ = ["add_to"]

PROBLEM = 1
SIGNS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "doctor",
        epilog=options.examples(
            "ckptstore doctor ./ckpts",
            "ckptstore doctor s3://bucket/ckpts --json",
        ),
    )(doctor)


def doctor(
    target: options.OptionalTarget = None,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="A save without a sign of life for so long counts as dead.", min=0),
    ] = 600.0,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Examine a store, or a place where one is to be: what saves and collections need of it, and what is left over.

    It writes and deletes a few small objects below scratch/, and changes nothing else. The exit status is 1 if there
    is a problem.
    """
    parsed = parse_options(storage_options)
    try:
        place = resolve(target, parsed)
        if place.run is not None:
            raise InvalidInputError(
                f"doctor examines a whole store, and {place.run} is taken for a run of {place.objects.url}. Leave it "
                f"out; or, if it is a folder, give it as ./{place.run}."
            )
        objects = place.objects
    except (NotFoundError, UnavailableError):
        if not target:
            raise
        objects = open_objects(target, parsed)
    findings = Store(objects).examine(grace=grace)
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        rows = [{"level": each.level, "what": each.what, "advice": each.advice} for each in findings]
        print_json({"store": objects.url, "ok": not problems, "findings": rows})
        return PROBLEM if problems else 0
    for finding in findings:
        print_line(f"{SIGNS[finding.level]}  {printable(finding.what)}", bold=finding.level == "problem")
        if finding.advice:
            print_line(f"         {printable(finding.advice)}")
    print_line(counted(problems, "problem") if problems else "no problems")
    return PROBLEM if problems else 0
