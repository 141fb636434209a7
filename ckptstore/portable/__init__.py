"""Checkpoints as files and folders that other programs read, and such files as states.

A `.safetensors` file of ours holds each tensor under its path, and in its metadata the skeleton of the tree, so that
importing it gives back what was exported. docs/reference/cli.md says what each format keeps.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ckptstore.assembly import Assembly
from ckptstore.condemning import condemn_corrupt
from ckptstore.errors import ConflictError, CorruptError, InvalidInputError, retold
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress
from ckptstore.portable import safetensors_files, torch_files
from ckptstore.portable.content import Portable
from ckptstore.portable.folders import holds_files, read_folder, write_folder
from ckptstore.skeleton import tensors
from ckptstore.tree import flatten, unflatten
from ckptstore.whole_files import check_destination, check_folder, explained, write_whole

__all__ = [
    "SUFFIXES",
    "Portable",
    "export_file",
    "export_folder",
    "read_file",
    "read_folder",
    "read_plain",
    "write_folder",
]

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def export_file(
    objects: Objects,
    manifest: Manifest,
    path: str | os.PathLike[str],
    *,
    threads: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint, every byte of it verified, to a file that appears whole or not at all.

    Raises:
        InvalidInputError: the name's ending is none that we write, or the format cannot hold a tensor, which is named.
        ConflictError: the file is there, and `overwrite` is False.
        CorruptError: the checkpoint is damaged; the text names the tensors.
        UnavailableError: the store or the disk failed.
    """
    file = _checked(path)
    with explained("write", file):
        check_destination(file, overwrite=overwrite)
    if file.suffix == ".safetensors":
        safetensors_files.require()
        names = safetensors_files.names_of(manifest)
        safetensors_files.check_dtypes(manifest, names)
        found = _filled(objects, manifest, threads, progress)
        write_whole(file, lambda temporary: safetensors_files.write(temporary, found, names), overwrite=overwrite)
        return
    torch_files.check_dtypes(manifest)
    found = _filled(objects, manifest, threads, progress)
    # Values of registered types as the plain trees that they were saved as: their pickles would run code.
    state = unflatten(manifest.tree, lambda node, _: found.value(node), manifest.segment_bytes, describe=True)
    write_whole(file, lambda temporary: torch_files.write(temporary, state), overwrite=overwrite)


def export_folder(
    objects: Objects,
    manifest: Manifest,
    path: str | os.PathLike[str],
    kind: Literal["dcp", "folder"],
    *,
    threads: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint, every byte of it verified, to a folder that appears whole or not at all.

    Args:
        objects: the backend of the store.
        manifest: the checkpoint.
        path: the folder.
        kind: "dcp", for torch.distributed.checkpoint; or "folder", for what was saved file by file.
        threads: how many read at a time.
        overwrite: put it in the place of a folder of the same kind.
        progress: called with the bytes read so far and those to be read in all.

    Raises:
        InvalidInputError: the checkpoint cannot be such a folder; nothing was written.
        ConflictError: the folder is there, and `overwrite` is False, or it holds other files than a checkpoint's.
        CorruptError: the checkpoint is damaged; the text names the tensors.
        UnavailableError: the store or the disk failed.
    """
    # Only torch.distributed takes that long to import, and few need it.
    from ckptstore.portable import dcp_folders

    folder = Path(os.path.abspath(path))  # noqa: PTH100  "." has no name, and links stay links
    with explained("write", folder):
        check_folder(folder, overwrite=overwrite)
    torch_files.check_dtypes(manifest, one_by_one=kind == "dcp")
    if kind == "folder":
        _check_files(manifest)
    found = _filled(objects, manifest, threads, progress)
    state = unflatten(manifest.tree, lambda node, _: found.value(node), manifest.segment_bytes, describe=True)
    if kind == "dcp":
        _check_replaceable(folder, lambda name: name == dcp_folders.METADATA or name.endswith(".distcp"))
        dcp_folders.write_dcp_folder(state, folder, overwrite=overwrite)
    else:
        _check_replaceable(folder, lambda name: name in state)
        write_folder(state, folder, overwrite=overwrite, durable=True)


def read_file(path: str | os.PathLike[str]) -> Portable:
    """The state in a `.safetensors` file, or in a file of `torch.save`. No code that the file brings along runs.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it is no such file, or holds what only code could make.
        UnavailableError: it cannot be read.
    """
    file = _checked(path)
    # So that a missing or forbidden file is told apart from one with strange content.
    with explained("read", file), file.open("rb"):
        pass
    if file.suffix == ".safetensors":
        return safetensors_files.read(file)
    tree, leaves = flatten(torch_files.read(file))
    return Portable(tree, leaves)


def read_plain(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote to a file, whatever its name ends in. No code that the file brings along runs.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it is no such file, or holds what only code could make.
        UnavailableError: it cannot be read.
    """
    file = Path(path)
    with explained("read", file), file.open("rb"):
        pass
    return torch_files.read(file)


def _checked(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise InvalidInputError(f"{file} is of a kind that is not known: its name must end in {', '.join(SUFFIXES)}.")
    return file


def _check_files(manifest: Manifest) -> None:
    """Raise InvalidInputError if this is no checkpoint of a folder's files."""
    if not holds_files(unflatten(manifest.tree, lambda node, _: node, manifest.segment_bytes, describe=True)):
        raise InvalidInputError(
            f"{manifest.run}@{manifest.step} was not saved from a folder of files, so there is none to write. Export "
            "it to a .pt or .safetensors file, or as a folder of torch.distributed.checkpoint (dcp)."
        )


def _check_replaceable(folder: Path, is_known: Callable[[str], bool]) -> None:
    """Keep a folder of other things from being replaced, which would delete them."""
    with explained("read", folder):
        others = [
            name
            for path in (folder.rglob("*") if folder.is_dir() else ())
            if not path.is_dir() and not is_known(name := path.relative_to(folder).as_posix())
        ]
    if others:
        raise ConflictError(
            f"{folder} holds other files than such a checkpoint's ({', '.join(sorted(others)[:3])}), and would be "
            "replaced as a whole. Choose another name."
        )


def _filled(objects: Objects, manifest: Manifest, threads: int, progress: Progress | None) -> Assembly:
    """Every tensor of the checkpoint in memory, verified."""
    assembly = Assembly(manifest)
    for _, node in tensors(manifest.tree, manifest.segment_bytes):
        assembly.want(node)
    total, read = assembly.stored_bytes(), 0

    def count(stored_bytes: int) -> None:
        nonlocal read
        read += stored_bytes
        if progress:
            progress(read, total)

    try:
        assembly.fill(objects, threads, count)
    except CorruptError as error:
        condemn_corrupt(objects, error)
        raise retold(error, f"{error}. Export another step; `ckptstore verify` lists all damage.") from error
    return assembly
