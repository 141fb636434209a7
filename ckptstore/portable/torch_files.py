"""Checkpoints as files of `torch.save`, and such files as states. No code that a file brings along runs."""

import io
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ckptstore.errors import InvalidInputError, UnsupportedFormatError
from ckptstore.manifest import Manifest
from ckptstore.skeleton import tensors
from ckptstore.tree import TORCH_DTYPES

__all__ = ["WAY_OUT_BY_TRUST", "ZIP_MAGIC", "check_dtypes", "damaged_records", "read", "read_stream", "write"]

ZIP_MAGIC = b"PK\x03\x04"
"""What files of torch.save begin with."""
_READ_BYTES = 1 << 20
_WAY_OUT = (
    "load it with torch.load yourself, take out what is plain tensors and numbers, and save that with run.save()."
)
WAY_OUT_BY_TRUST = (
    "give --trust (trust=True in Python), which runs it; what cannot be stored even then is left out with --leave-out."
)
"""What an import adds, which can be told to run code."""


def check_dtypes(manifest: Manifest, *, one_by_one: bool = False) -> None:
    """Raise, naming the tensor, if this torch lacks a dtype, or if torch.save cannot hold it beside another.

    one_by_one: each tensor is written for itself, so that what they share does not matter.
    """
    dtype_of: dict[int, tuple[str, str]] = {}
    for path, node in tensors(manifest.tree, manifest.segment_bytes):
        if node.tag == "tensor" and node.span_bytes and not one_by_one:
            dtype, first = dtype_of.setdefault(node.segment, (node.dtype, path))
            if dtype != node.dtype:
                raise InvalidInputError(
                    f"{path} ({node.dtype}) shares memory with {first} ({dtype}), and files of torch.save cannot hold "
                    "two types of the same memory: export to .safetensors, which has a copy of each."
                )
        if node.tag == "tensor" and node.dtype not in TORCH_DTYPES:
            raise UnsupportedFormatError(
                f"{path} has dtype {node.dtype}, which torch {torch.__version__} lacks: install a newer torch."
            )


def write(temporary: Path, state: Any) -> None:
    """Fill the file."""
    # Not by the path: torch would write the temporary file's name into the file.
    with temporary.open("wb") as opened:
        torch.save(state, opened)


def read(file: Path, *, mapped: bool = False, trust: bool | None = None) -> Any:
    """The state in it, if no code is needed to make it.

    Args:
        file: the file.
        mapped: map the tensors into memory rather than read them, for as long as nobody writes to the file.
        trust: True runs the code that the file brings along. False is for callers that offer that, so that the error
            says so; None for those that do not.

    Raises:
        InvalidInputError: it is no such file, or what it holds takes code to be made.
    """
    try:
        with torch.serialization.safe_globals(_harmless()):
            if not _is_text(file):  # which torch cannot open by its name
                with file.open("rb") as opened:
                    return torch.load(opened, map_location="cpu", weights_only=not trust)
            # Files of torch before 1.6 are no zip files, and cannot be mapped.
            is_mapped = mapped and _is_zip(file)
            return torch.load(file, map_location="cpu", weights_only=not trust, mmap=is_mapped)
    except Exception as error:  # torch raises half a dozen types, and its texts advise to run the code
        if trust:
            raise InvalidInputError(f"{file} cannot be read as a file of torch.save: {_told(error)}.") from error
        unsafe = _unsafe_globals(file)
        if unsafe:
            raise InvalidInputError(
                f"{file} holds objects that only running code could make ({', '.join(unsafe)}), and no code from files "
                f"is run here. If you trust it, {_WAY_OUT if trust is None else WAY_OUT_BY_TRUST}"
            ) from error
        raise InvalidInputError(
            f"{file} cannot be read as a file of torch.save with weights_only=True: {_reason(error)}."
        ) from error


def read_stream(stream: io.BytesIO, what: str) -> Any:
    """A value that torch.save wrote by itself, if no code is needed to make it. Raises InvalidInputError."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        unsafe = _unsafe_globals(stream)
        if unsafe:
            raise InvalidInputError(
                f"{what} holds objects that only running code could make ({', '.join(unsafe)}). If you trust it, "
                f"{WAY_OUT_BY_TRUST}"
            ) from error
        raise InvalidInputError(f"{what} cannot be read: {_reason(error)}.") from error


def damaged_records(file: Path) -> list[str]:
    """The parts of a file whose bytes are not those that its own checksums were made of, which torch does not look at.

    Empty for files that have no checksums: those of torch before 1.6, or with `set_crc32_options(False)`.

    Raises:
        OSError: it cannot be read.
        InvalidInputError: it looks like a file of torch.save, and its table of contents is damaged.
    """
    if not _is_zip(file):
        return []
    damaged = []
    try:
        with zipfile.ZipFile(file) as opened:
            records = opened.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise InvalidInputError(
                    f"{file} has compressed parts, which torch.save never writes: what they unpack to has no bound."
                )
            for record in records if any(record.CRC for record in records) else ():
                try:
                    with opened.open(record) as content:
                        while content.read(_READ_BYTES):
                            pass
                except (zipfile.BadZipFile, EOFError, NotImplementedError):
                    damaged.append(record.filename)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InvalidInputError(f"{file} is damaged: its table of contents cannot be read ({error}).") from error
    return damaged


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _is_text(file: Path) -> bool:
    """Whether a file's name is Unicode; on Linux it may be any bytes."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _told(error: Exception) -> str:
    """An error's first line."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), 'no more is said')}"


def _reason(error: Exception) -> str:
    """What torch says, without its advice."""
    lines = [line.strip().rstrip(".") for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines()]
    return next(filter(None, lines), type(error).__name__)


def _harmless() -> list[Any]:
    """What torch.load would refuse, although a state may hold it, and making it runs no code of the file."""
    array = np.empty(0)
    return [
        frozenset,
        np.ndarray,
        np.dtype,
        array.__reduce__()[0],  # numpy's own functions, whatever module this version has them in
        cast(Any, np.float64(0).__reduce__())[0],
        *(kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and issubclass(kind, np.dtype)),
    ]


def _unsafe_globals(file: Path | io.BytesIO) -> list[str]:
    try:
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with torch.serialization.safe_globals(_harmless()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # it is no such file at all
        return []
