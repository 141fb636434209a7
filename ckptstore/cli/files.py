"""`export` and `import`: checkpoints as files of other programs, and such files as checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ckptstore import Checkpoint, Store
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, print_json, print_line, printable, progress_bar
from ckptstore.cli.target import parse_options, resolve, resolve_new
from ckptstore.errors import ConflictError
from ckptstore.plain_values import to_json

__all__ = ["add_to"]

Output = Annotated[
    Path, typer.Argument(metavar="FILE", help="The file to write: .safetensors, .pt, .pth, .ckpt or .bin.")
]
Input = Annotated[
    Path, typer.Argument(metavar="FILE", help="The file to read: .safetensors, .pt, .pth, .ckpt or .bin.")
]
NewTarget = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="The checkpoint to make: STORE/RUN@STEP, where STORE may be new, or RUN@STEP of the default store.",
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Put it in the place of another state of that step.")]
Expect = Annotated[
    str | None,
    typer.Option("--expect", metavar="DIGEST", help="Write it only if it is this one: a digest as show prints it."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite FILE if it is there.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "export",
        epilog=options.examples(
            "ckptstore export ./ckpts/lstm@300 lstm.safetensors",
            "ckptstore export s3://bucket/ckpts/lstm newest.pt --force",
        ),
    )(export)
    app.command(
        "import",
        epilog=options.examples(
            "ckptstore import model.safetensors ./ckpts/pretrained@0",
            "ckptstore import old/step-300.pt s3://bucket/ckpts/lstm@300",
        ),
    )(import_)


def export(
    target: options.Target,
    file: Output,
    force: Force = False,
    expect: Expect = None,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Write a checkpoint to a file that other programs read. Without @STEP it is the newest of the run.

    A .safetensors file holds every tensor by its path, and all the rest of the checkpoint in its metadata: ckptstore
    import gives back all of it. A .pt file is torch.save of the tree: torch.load reads it. Every byte is verified on
    the way, and the file appears whole or not at all.
    """
    if file.exists() and not force:
        # The library says the same, but does not know of the option that helps.
        raise ConflictError(f"{file} exists, and is left as it is. Choose another name, or give --force.")
    place = resolve(target, parse_options(storage_options))
    run = Store(place.objects).run(place.require_run())
    with progress_bar("exporting", shown=not as_json) as progress:
        checkpoint = run.export(file, step=place.step, expect=expect, overwrite=force, progress=progress)
    size = file.stat().st_size
    if as_json:
        print_json(_document(place.objects.url, checkpoint, file) | {"file_bytes": size})
    else:
        print_line(f"exported {run.name}@{checkpoint.step} to {printable(file)} ({bytes_text(size)})")
    return 0


def import_(
    file: Input,
    target: NewTarget,
    replace: Replace = False,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Save the content of a file as a checkpoint.

    A .safetensors file of ckptstore export gives back the tree, the metrics and the metadata that were exported; one of
    another program becomes a flat dict of tensors. Other files are read by torch.load(weights_only=True): no code that
    a file brings along runs.
    """
    place = resolve_new(target, parse_options(storage_options))
    assert place.step is not None
    run = Store(place.objects).run(place.require_run())
    try:
        checkpoint = run.import_file(file, step=place.step, replace=replace)
    except ConflictError as error:
        raise ConflictError(
            f"{run.name}@{place.step} is there already, with another state, and is left as it is. Choose another step "
            "or run, or give --replace to put this one in its place."
        ) from error
    if as_json:
        document = _document(place.objects.url, checkpoint, file)
        sizes = {"stored_bytes": checkpoint.stored_bytes, "new_bytes": checkpoint.new_bytes}
        print_json(document | {"raw_bytes": checkpoint.raw_bytes} | sizes)
    else:
        print_line(
            f"imported {printable(file)} as {checkpoint.run}@{checkpoint.step}: {bytes_text(checkpoint.raw_bytes)}, "
            f"{bytes_text(checkpoint.stored_bytes)} stored, {bytes_text(checkpoint.new_bytes)} of it new"
        )
    return 0


def _document(store: str, checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    return {"store": store, "run": checkpoint.run, "step": checkpoint.step, "file": to_json(str(file))}
