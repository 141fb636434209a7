"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptstore.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError

__all__ = ["check_destination", "explained", "write_whole"]


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


def write_whole(file: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
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
