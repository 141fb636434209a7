"""Folders that other libraries make of a checkpoint, as states, and such states as folders again.

The tensors in `.safetensors` files and in files of `torch.save` become tensors of the state, so that each is stored
once, wherever and in whichever file it comes again; all other files are bytes. Nothing is unpickled that needs code.
"""

import json
import math
import operator
import secrets
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ckptstore.errors import CorruptError, InvalidInputError
from ckptstore.portable import torch_files
from ckptstore.skeleton import TensorNode
from ckptstore.tree import flatten
from ckptstore.whole_files import explained, place_folder

__all__ = ["holds_files", "read_folder", "write_folder"]

MAX_HEADER_BYTES = 100_000_000
"""What readers of safetensors allow."""

_DTYPES = {
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
"""safetensors' name of a dtype -> torch's. A file with another one is kept as bytes."""


def read_folder(folder: Path, *, mapped: bool = False) -> dict[str, Any]:
    """The files in `folder` and below it, by name.

    Args:
        folder: the folder.
        mapped: map what files of torch.save hold into memory, rather than read it. Nobody may write to them then.

    Returns:
        For each file: its bytes; or for a `.safetensors` file `{"header": bytes, "tensors": {name: tensor}}`, whose
        tensors are read from the file when they are needed; or for a file of torch.save `{"torch": what it holds}`.

    Raises:
        NotFoundError: there is no such folder.
        UnavailableError: it cannot be read.
    """
    with explained("read", folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            folder.stat()
            raise InvalidInputError(f"{folder} has no files in it, so it is no checkpoint.")
        return {path.relative_to(folder).as_posix(): _read_file(path, mapped) for path in files}


def holds_files(state: Any) -> bool:
    """Whether a state has the form of what `read_folder` gives, with descriptions in the place of its long values."""
    return isinstance(state, dict) and bool(state) and all(map(_is_file_content, state.values()))


def _is_file_content(held: Any) -> bool:
    if isinstance(held, dict):
        return held.keys() in ({"torch"}, {"header", "tensors"})
    return isinstance(held, bytes) or (isinstance(held, TensorNode) and held.tag == "blob")


def write_folder(files: Mapping[str, Any], folder: Path, *, overwrite: bool = True, durable: bool = False) -> None:
    """Write what `read_folder` gave; a folder of that name is replaced when all of it is there.

    Files of torch.save hold what they held, and need not be the same bytes; all others are.

    Args:
        files: by name.
        folder: the folder to make.
        overwrite: False leaves a folder that is there as it is.
        durable: wait until all of it is on the disk.

    Raises:
        ConflictError: the folder is there, and `overwrite` is False.
        CorruptError: `files` cannot be what `read_folder` gave.
        UnavailableError: it cannot be written.
    """
    places = {name: _checked_name(name) for name in files}
    with explained("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        try:
            for name, content in files.items():
                file = new / places[name]
                file.parent.mkdir(parents=True, exist_ok=True)
                _write_file(file, content, name)
            place_folder(new, folder, overwrite=overwrite, durable=durable)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _read_file(file: Path, mapped: bool) -> Any:
    if file.suffix == ".safetensors":
        header = _read_header(file)
        tensors = None if header is None else _read_tensors(file, header)
        if tensors is not None:
            return {"header": header, "tensors": tensors}
    with file.open("rb") as opened:
        is_zip = opened.read(len(torch_files.ZIP_MAGIC)) == torch_files.ZIP_MAGIC
    if is_zip:
        try:
            held = torch_files.read(file, mapped=mapped)
            flatten(held)
        except InvalidInputError:
            pass  # another kind of zip file, or one that only code could read: its bytes are kept
        else:
            return {"torch": held}
    return file.read_bytes()


def _read_header(file: Path) -> bytes | None:
    """The JSON at the beginning of a safetensors file; None if there is none."""
    with file.open("rb") as opened:
        length = opened.read(8)
        if len(length) < 8 or (size := struct.unpack("<Q", length)[0]) > MAX_HEADER_BYTES:
            return None
        header = opened.read(size)
    return header if len(header) == size else None


def _read_tensors(file: Path, header: bytes) -> dict[str, torch.Tensor] | None:
    """The tensors that a header describes, mapped into memory; None if it does not tell what all the bytes are."""
    try:
        layout = _layout(header)
    except CorruptError:
        return None
    if layout and layout[-1][-1] != file.stat().st_size - 8 - len(header):
        return None
    return {name: _mapped(file, dtype, shape, 8 + len(header) + begin) for name, dtype, shape, begin, _ in layout}


def _layout(header: bytes) -> list[tuple[str, torch.dtype, tuple[int, ...], int, int]]:
    """Name, dtype, shape, begin and end of each tensor, in the order of its bytes. Raises CorruptError."""
    layout = []
    position = 0
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        rows = sorted((*row["data_offsets"], name, row["dtype"], row["shape"]) for name, row in described.items())
        for begin, end, name, dtype_name, shape in rows:
            dtype = getattr(torch, _DTYPES[dtype_name])
            size = math.prod(map(operator.index, shape)) * dtype.itemsize
            if (begin, end) != (position, position + size):
                raise CorruptError(f"the header of a safetensors file leaves a hole before {name!r}, or an overlap.")
            layout.append((name, dtype, tuple(shape), begin, end))
            position = end
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError("the header of a safetensors file cannot be read, or has an unknown dtype.") from error
    return layout


def _mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    # Copied on write: torch has no tensors that cannot be written to.
    content = np.memmap(file, np.uint8, "c", offset, (size,))
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _checked_name(name: object) -> PurePosixPath:
    """A name out of a store may not lead out of the folder."""
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or not path.parts or ".." in path.parts or "\0" in str(path):
        raise CorruptError(f"{name!r} cannot be a file of a folder that was saved. No file was written.")
    return path


def _write_file(file: Path, content: Any, name: str) -> None:
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict) and content.keys() == {"torch"}:
        torch_files.write(file, content["torch"])
    elif isinstance(content, dict) and content.keys() == {"header", "tensors"} and type(content["header"]) is bytes:
        _write_safetensors(file, content["header"], content["tensors"], name)
    else:
        raise CorruptError(f"what the checkpoint has as {name!r} is not the content of a file that was saved.")


def _write_safetensors(file: Path, header: bytes, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)))
        opened.write(header)
        for key, dtype, shape, _, _ in _layout(header):
            tensor = tensors.get(key)
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise CorruptError(f"the checkpoint's {name!r} lacks its tensor {key!r}, or has another one.")
            opened.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
