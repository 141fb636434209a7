"""`rm`: a checkpoint taken away."""

import typer

from ckptstore import Store
from ckptstore.cli import options
from ckptstore.cli.printing import print_json, print_line
from ckptstore.cli.target import parse_options, resolve
from ckptstore.errors import InvalidInputError

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "rm",
        epilog=options.examples(
            "ckptstore rm ./ckpts/lstm@300",
            "ckptstore rm s3://bucket/ckpts/lstm@300",
        ),
    )(rm)


def rm(target: options.Target, storage_options: options.StorageOptions = None, as_json: options.Json = False) -> int:
    """Delete one checkpoint, sound or damaged: STORE/RUN@STEP.

    No other checkpoint loses anything. The bytes that only this one needed go with the next ckptstore gc.
    """
    place = resolve(target, parse_options(storage_options))
    run = place.require_run()
    if place.step is None:
        raise InvalidInputError(f"{run} is a whole run: name the checkpoint to delete, as in {run}@300.")
    Store(place.objects).run(run).delete(place.step)
    if as_json:
        print_json({"store": place.objects.url, "run": run, "step": place.step})
    else:
        print_line(f"deleted {run}@{place.step}")
    return 0
