"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptstore.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError

__all__ = ["check_destination", "check_folder", "explained", "place_folder", "write_whole"]


def check_destination(file: Path, *, overwrite: bool) -> None:
    """Raise what `write_whole` would raise in the end, before the work is done."""
    if not file.parent.is_dir():
        raise NotFoundError(f"there is no folder {file.parent}. Make it first.")
    if file.is_dir():
        raise InvalidInputError(f"{file} is a folder. Name a file.")
    if file.exists() and not overwrite:
        raise _exists(file)


def _exists(file: Path) -> ConflictError:
    return ConflictError(f"{file} exists, and is left as it is. Choose another name, or overwrite it on purpose.")


def write_whole(file: Path, write: Callable[[Path], object], *, overwrite: bool) -> None:
    """Let `write` fill a temporary file beside `file`, and give it its name when it is durable."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    with explained("write", file):
        try:
            # Made here, so that who may read it is what the user's umask says; safetensors would let the owner alone.
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            _rename(temporary, file, overwrite=overwrite)
            _sync_folder(file.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _rename(temporary: Path, file: Path, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(file)
        return
    try:
        file.hardlink_to(temporary)
    except FileExistsError:
        raise _exists(file) from None
    except OSError:
        # A file system without hard links: what is left is a moment in which another program could make the file.
        if file.exists():
            raise _exists(file) from None
        temporary.replace(file)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise what `place_folder` would raise in the end, before the work is done."""
    if not folder.parent.is_dir():
        raise NotFoundError(f"there is no folder {folder.parent}. Make it first.")
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file. Name a folder.")
    if folder.exists() and not overwrite:
        raise _exists(folder)


def place_folder(new: Path, folder: Path, *, overwrite: bool, durable: bool = True) -> None:
    """Give a finished folder beside `folder` its name, when it is durable. Raises ConflictError, OSError."""
    if durable:
        _sync_below(new)
    old = new.with_suffix(".old")
    if overwrite and folder.exists():
        folder.rename(old)
    elif folder.exists():
        raise _exists(folder)
    try:
        # A folder that is not empty is never replaced by this, whoever made it meanwhile.
        new.rename(folder)
    except OSError as error:
        # Where there is one now that somebody else made, what was there before stays under its other name.
        if old.exists() and not folder.exists():
            old.rename(folder)
        if folder.exists() and not overwrite:
            raise _exists(folder) from error
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_below(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
            continue
        with path.open("rb") as written:
            os.fsync(written.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems cannot; the file itself is durable.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(action: str, file: Path) -> Iterator[None]:
    """Turn what the system raises into errors that say which file, and why."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}.") from error
    except OSError as error:
        raise UnavailableError(f"cannot {action} {file}: {error.strerror or error}.") from error
