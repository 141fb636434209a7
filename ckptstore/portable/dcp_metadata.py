"""The `.metadata` of a folder of `torch.distributed.checkpoint`, a pickle, read without running what is in it.

An unpickler hands out stand-ins that hold what they are given, and nothing else; from these torch's own descriptions
are made, each field checked. So no code that the file names is called, and nothing of torch can be changed by it.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptstore.errors import InvalidInputError
from ckptstore.portable.torch_files import WAY_OUT_BY_TRUST

__all__ = ["METADATA", "read_metadata"]

METADATA = ".metadata"
MAX_INDEX = 1_000_000
"""Longer lists than that are not made of tensors; torch would fill one up to whatever index the file names."""
_DESCRIPTIONS = {
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
}
T = TypeVar("T")


class _Held:
    """What stands for an object of torch's: what it was called with, and the state that it was given."""

    def __new__(cls, *arguments: Any) -> "_Held":
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = {}
        return made

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, kind: type[T]) -> T:
        """A field. Raises ValueError if it is not of that type."""
        return _of(self.state.get(name) if isinstance(self.state, dict) else None, kind)


_STANDINS = {(module, name): type(name, (_Held,), {}) for module, names in _DESCRIPTIONS.items() for name in names}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STANDINS:
            return _STANDINS[module, name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise InvalidInputError(
            f"its {METADATA} holds an object that only running code could make ({module}.{name}). If you trust it, "
            f"{WAY_OUT_BY_TRUST}"
        )


def read_metadata(folder: Path) -> Metadata:
    """What a folder describes.

    Raises:
        InvalidInputError: it makes no sense, or names what only code could make, or a file outside of the folder.
        OSError: it cannot be read.
    """
    with (folder / METADATA).open("rb") as opened:
        try:
            held = _Unpickler(opened).load()
        except (InvalidInputError, OSError):
            raise
        except Exception as error:  # unpicklers raise whatever strange bytes lead to
            raise InvalidInputError(f"{folder}: its {METADATA} is no sound pickle ({type(error).__name__}).") from error
    try:
        return _metadata(held)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidInputError):
            raise InvalidInputError(f"{folder}: {error}") from error
        raise InvalidInputError(f"{folder}: its {METADATA} describes no checkpoint ({error}).") from error


def _metadata(held: Any) -> Metadata:
    if type(held).__name__ != "Metadata":
        raise ValueError("it is something else")
    entries = {_of(key, str): _entry(value) for key, value in held.get("state_dict_metadata", dict).items()}
    places = held.state.get("planner_data")
    return Metadata(
        state_dict_metadata=entries,
        planner_data=None if places is None else {_of(key, str): _place(place) for key, place in places.items()},
        storage_data={_index(key): _info(value) for key, value in held.get("storage_data", dict).items()},
        storage_meta=StorageMeta(),
    )


def _entry(held: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(held).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    if type(held).__name__ != "TensorStorageMetadata":
        raise ValueError("an entry is neither a tensor nor a value")
    properties = held.get("properties", _Held).state
    # torch writes it as a tuple; versions of long ago as a dict.
    dtype = properties["dtype"] if isinstance(properties, Mapping) else properties[0]
    chunks = [
        ChunkStorageMetadata(offsets=_size(chunk.state["offsets"]), sizes=_size(chunk.state["sizes"]))
        for chunk in held.get("chunks", list)
    ]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_of(dtype, torch.dtype)), size=_size(held.state.get("size")), chunks=chunks
    )


def _place(place: Any) -> tuple[str | int, ...]:
    """The keys on the way to a leaf."""
    if not isinstance(place, tuple) or not place or type(place[0]) is not str:
        raise ValueError("a key is none")
    for part in place:
        if type(part) is not str and not (type(part) is int and 0 <= part <= MAX_INDEX):
            raise ValueError(f"a key has the part {part!r:.40}")
    return place


def _index(held: Any) -> MetadataIndex:
    offset = held.state.get("offset")
    return MetadataIndex(held.get("fqn", str), None if offset is None else _size(offset), held.state.get("index"))


def _info(held: Any) -> _StorageInfo:
    name = PurePosixPath(held.get("relative_path", str))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"it names a file outside of the folder, {str(name)!r:.80}")
    if held.state.get("transform_descriptors"):
        raise InvalidInputError("its files went through an extension of torch's, which is not read here.")
    return _StorageInfo(str(name), _natural(held.state.get("offset")), _natural(held.state.get("length")))


def _size(held: Any) -> torch.Size:
    numbers = held.arguments[0] if isinstance(held, _Held) and held.arguments else held
    if not isinstance(numbers, tuple | list):
        raise ValueError("a shape is none")
    return torch.Size([_natural(number) for number in numbers])


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        raise ValueError(f"a size is {number!r:.40}")
    return number


def _of(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.40} stands where a {kind.__name__} should")
    return value
