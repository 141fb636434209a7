"""Checkpoints as files of `torch.save`, and such files as states. No code that a file brings along runs."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ckptstore.errors import InvalidInputError, UnsupportedFormatError
from ckptstore.manifest import Manifest
from ckptstore.skeleton import tensors
from ckptstore.tree import TORCH_DTYPES

__all__ = ["check_dtypes", "read", "write"]


def check_dtypes(manifest: Manifest) -> None:
    """Raise, naming the tensor, if this torch lacks a dtype, or if torch.save cannot hold it beside another."""
    dtype_of: dict[int, tuple[str, str]] = {}
    for path, node in tensors(manifest.tree, manifest.segment_bytes):
        if node.tag == "tensor" and node.span_bytes:
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


def read(file: Path) -> Any:
    """The state in it, if no code is needed to make it. Raises InvalidInputError."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types, and its texts advise to run the code
        unsafe = _unsafe_globals(file)
        if unsafe:
            raise InvalidInputError(
                f"{file} holds objects that only running code could make ({', '.join(unsafe)}), and no code from files "
                "is run here. If you trust it, load it with torch.load yourself, take out what is plain tensors and "
                "numbers, and save that with run.save()."
            ) from error
        raise InvalidInputError(
            f"{file} cannot be read as a file of torch.save with weights_only=True: {_reason(error)}."
        ) from error


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


def _unsafe_globals(file: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_harmless()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # it is no such file at all
        return []
