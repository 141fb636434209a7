"""What in a folder is a checkpoint, and of which kind. Looks at names alone."""

import fnmatch
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptstore.errors import InvalidInputError
from ckptstore.whole_files import explained

__all__ = ["DCP_METADATA", "SHARD", "Kind", "Source", "files_in", "find", "is_state", "only_source"]

Kind = Literal["file", "dcp", "folder"]
DCP_METADATA = ".metadata"
TRAINER_STATE = "trainer_state.json"
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_TEMPORARY = re.compile(r"(\A[.~])|((\.(tmp|temp|part|partial|incomplete)|~)\Z)", re.IGNORECASE)
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint of another program.

    Attributes:
        path: the file or folder.
        name: its name in the folder that is imported.
        kind: a file of `torch.save` or safetensors; a folder of torch.distributed.checkpoint; or any other folder,
            whose files make one checkpoint together, as Hugging Face's are.
    """

    path: Path
    name: str
    kind: Kind


def find(place: Path, exclude: Sequence[str] = ()) -> tuple[list[Source], list[str]]:
    """The checkpoints at `place`: itself, if it is one, else those that are directly in it.

    Args:
        place: a file or folder.
        exclude: patterns of names, such as `best*`, to be left out.

    Returns:
        The checkpoints by name, and what was passed over, each name with the reason.

    Raises:
        NotFoundError: there is nothing there.
        InvalidInputError: there is no checkpoint in it.
        UnavailableError: it cannot be read.
    """
    with explained("read", place):
        if place.is_file() or _is_one_checkpoint(place):
            return [only_source(place)], []
        rows = sorted(place.iterdir(), key=lambda path: path.name)
        found, passed_over = _sorted_out(rows, exclude)
    if not found:
        names = ", ".join(row.name for row in rows[:_NAMES_SHOWN]) or "nothing"
        raise InvalidInputError(
            f"{place} has no checkpoints in it: no files that end in {', '.join(ENDINGS)}, and no folders that hold "
            f"such files or {DCP_METADATA}. It has: {names}{', …' if len(rows) > _NAMES_SHOWN else ''}."
        )
    return found, passed_over


def only_source(place: Path) -> Source:
    """A file or a folder as one checkpoint. Raises NotFoundError."""
    with explained("read", place):
        if place.is_dir():
            return Source(place, _name(place), "dcp" if (place / DCP_METADATA).is_file() else "folder")
        place.stat()
    if not is_state(place):
        raise InvalidInputError(f"{place} is of a kind that is not known: its name must end in {', '.join(ENDINGS)}.")
    return Source(place, _name(place), "file")


def files_in(source: Source) -> list[Path]:
    """Every file that a source consists of, in the order of their names."""
    if source.kind == "file":
        return [source.path]
    return sorted(path for path in source.path.rglob("*") if path.is_file())


def _name(place: Path) -> str:
    return place.name or Path(os.path.abspath(place)).name  # noqa: PTH100  "." has no name, and links stay links


def _sorted_out(rows: Sequence[Path], exclude: Sequence[str]) -> tuple[list[Source], list[str]]:
    found: list[Source] = []
    passed_over: list[str] = []
    real = {os.path.realpath(row) for row in rows if not row.is_symlink()}
    for row in rows:
        is_folder = row.is_dir()
        if _TEMPORARY.search(row.name):
            passed_over.append(f"{row.name}: unfinished, or hidden")
        elif any(fnmatch.fnmatchcase(row.name, pattern) for pattern in exclude):
            passed_over.append(f"{row.name}: excluded")
        elif row.is_symlink() and os.path.realpath(row) in real:
            passed_over.append(f"{row.name}: a link to {Path(os.path.realpath(row)).name}")
        elif is_folder and (row / DCP_METADATA).is_file():
            found.append(Source(row, row.name, "dcp"))
        elif is_folder and any(is_state(path) for path in row.iterdir()):
            found.append(Source(row, row.name, "folder"))
        elif not is_folder and is_state(row) and row.is_file():
            found.append(Source(row, row.name, "file"))
        else:
            passed_over.append(f"{row.name}: no checkpoint")
    if any((source.path / TRAINER_STATE).is_file() for source in found if source.kind == "folder"):
        # What a Trainer leaves beside its checkpoints is the model as it was in the end, and the arguments.
        loose = [source for source in found if source.kind == "file"]
        found = [source for source in found if source.kind != "file"]
        passed_over += [f"{source.name}: a file beside the folders of a Trainer" for source in loose]
    return found, passed_over


def is_state(path: Path) -> bool:
    """Whether a file's name says that it may be one of torch.save or safetensors."""
    return path.suffix.lower() in ENDINGS


def _is_one_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint itself, rather than a folder of some."""
    names = [path.name for path in folder.iterdir()]
    return any(
        name in (DCP_METADATA, TRAINER_STATE) or name.endswith(".index.json") or SHARD.search(name) for name in names
    )
