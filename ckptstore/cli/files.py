"""`export`: a checkpoint as a file or folder of other programs. The way back is in importing.py."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ckptstore import Checkpoint, Store
from ckptstore.cli import options
from ckptstore.cli.printing import bytes_text, print_json, print_line, printable, progress_bar
from ckptstore.cli.target import parse_options, resolve
from ckptstore.errors import ConflictError
from ckptstore.plain_values import to_json

__all__ = ["add_to"]

Output = Annotated[
    Path, typer.Argument(metavar="FILE", help="The file to write: .safetensors, .pt, .pth, .ckpt or .bin; or a folder.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="file, as FILE ends (the default); dcp, a folder of torch.distributed.checkpoint; or folder, the folder "
        "that was imported, such as Hugging Face's.",
        show_default=False,
    ),
]
Expect = Annotated[
    str | None,
    typer.Option("--expect", metavar="DIGEST", help="Write it only if it is this one: a digest as show prints it."),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Overwrite FILE if it is there; a folder, if nothing but a checkpoint is in it."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        "export",
        epilog=options.examples(
            "ckptstore export ./ckpts/lstm@300 lstm.safetensors",
            "ckptstore export s3://bucket/ckpts/lstm newest.pt --force",
            "ckptstore export ./ckpts/llama@500 llama-500 --format dcp",
        ),
    )(export)


def export(
    target: options.Target,
    file: Output,
    form: Format = None,
    force: Force = False,
    expect: Expect = None,
    storage_options: options.StorageOptions = None,
    as_json: options.Json = False,
) -> int:
    """Write a checkpoint to a file or folder that other programs read. Without @STEP it is the newest of the run.

    A .safetensors file holds every tensor by its path, and all the rest of the checkpoint in its metadata: ckptstore
    import gives back all of it. A .pt file is torch.save of the tree: torch.load reads it. Every byte is verified on
    the way, and file or folder appears whole or not at all.
    """
    if file.exists() and not force:
        # The library says the same, but does not know of the option that helps.
        raise ConflictError(f"{file} exists, and is left as it is. Choose another name, or give --force.")
    place = resolve(target, parse_options(storage_options))
    run = Store(place.objects).run(place.require_run())
    with progress_bar("exporting", shown=not as_json) as progress:
        checkpoint = run.export(
            file, step=place.step, expect=expect, overwrite=force, format=cast(Any, form or "file"), progress=progress
        )
    size = _bytes_of(file)
    if as_json:
        print_json(_document(place.objects.url, checkpoint, file) | {"file_bytes": size})
    else:
        print_line(f"exported {run.name}@{checkpoint.step} to {printable(file)} ({bytes_text(size)})")
    return 0


def _bytes_of(place: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file())


def _document(store: str, checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    return {"store": store, "run": checkpoint.run, "step": checkpoint.step, "file": to_json(str(file))}
