"""Checkpoints as `.safetensors` files, and such files as states, through the package of that name."""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import numpy as np
import torch

from ckptstore.assembly import Assembly
from ckptstore.errors import CorruptError, InvalidInputError, UnavailableError, UnsupportedFormatError
from ckptstore.manifest import Manifest
from ckptstore.portable.content import Portable
from ckptstore.skeleton import TAG, TensorNode, contiguous_stride, tensor_places, tensors
from ckptstore.tree import TORCH_DTYPES, TensorLeaf, flatten, unflatten

__all__ = ["check_dtypes", "names_of", "read", "require", "write"]

TREE_KEY = "ckptstore.tree"
CHECKPOINT_KEY = "ckptstore.checkpoint"
DOCUMENT_VERSION = 1
MAX_HEADER_BYTES = 90_000_000
"""Readers of safetensors refuse a header beyond 100 MB; escapes may make it a little longer than its texts."""


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """What stands under TREE_KEY: a skeleton as in a manifest, its segments' lengths, and the tensors' names."""

    version: int
    tree: Any
    segments: list[Annotated[int, msgspec.Meta(ge=0)]]
    names: list[str]
    """Of the tensors, in the order in which the tree has them."""


class _About(msgspec.Struct):
    """What stands under CHECKPOINT_KEY, as far as it is read again."""

    metrics: Any = None
    metadata: Any = None
    step: int | None = None


# Made now, and not when the first file is read, which threads may do at the same time: see manifest.py.
_DOCUMENT_DECODER = msgspec.json.Decoder(_Document)
_ABOUT_DECODER = msgspec.json.Decoder(_About)


def require() -> Any:
    """The package that reads and writes the format. Raises InvalidInputError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InvalidInputError(
            "files in the safetensors format need a package that is not installed: pip install 'ckptstore[safetensors]'"
        ) from error
    return safetensors


def names_of(manifest: Manifest) -> list[str]:
    """A name for each tensor: its path; with a number where paths read the same ({"a.b": …} and {"a": {"b": …}})."""
    names: dict[str, None] = {}
    last_number: dict[str, int] = {}  # so that it takes no longer the more paths read the same
    for path, _ in tensors(manifest.tree, manifest.segment_bytes):
        wanted = name = path or "tensor"
        # __metadata__ is what the format calls its own part of the header.
        while name in names or name == "__metadata__":
            last_number[wanted] = last_number.get(wanted, 1) + 1
            name = f"{wanted}#{last_number[wanted]}"
        names[name] = None
    return list(names)


def check_dtypes(manifest: Manifest, names: Sequence[str]) -> None:
    """Raise InvalidInputError, naming the tensor, if the format lacks a dtype."""
    for name, (_, node) in zip(names, tensors(manifest.tree, manifest.segment_bytes), strict=True):
        dtype = _torch_dtype(node)
        if dtype is None or not _can_be_written(dtype):
            raise InvalidInputError(
                f"{name} has dtype {node.dtype}, which the safetensors format lacks. Export to a .pt file."
            )


def _torch_dtype(node: TensorNode) -> torch.dtype | None:
    """The dtype of the tensor that is written for `node`; None if there is none."""
    if node.tag == "tensor":
        return TORCH_DTYPES.get(node.dtype)
    try:
        return torch.from_numpy(np.empty(0, node.dtype)).dtype
    except (TypeError, ValueError):
        return None


@cache
def _can_be_written(dtype: torch.dtype) -> bool:
    """Ask the installed safetensors: each version knows a few more dtypes than the one before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's word on experimental dtypes
        try:
            require().torch.save({"tensor": torch.empty(0, dtype=dtype)})
        except Exception:  # a KeyError today; whatever it is, this dtype cannot be written
            return False
    return True


def write(temporary: Path, assembly: Assembly, names: Sequence[str]) -> None:
    """Fill the file: each tensor under its name, the tree in the metadata. Raises InvalidInputError."""
    safetensors = require()
    manifest = assembly.manifest
    lengths = manifest.segment_bytes
    nodes = [node for _, node in tensors(manifest.tree, lengths)]
    seen: set[int] = set()
    named: dict[str, torch.Tensor] = {}
    for name, node in zip(names, nodes, strict=True):
        tensor = _as_tensor(assembly.value(node)).detach().contiguous()
        # The format has no shared memory: each of the tensors that share some is written for itself.
        named[name] = tensor.clone() if node.segment in seen else tensor
        seen.add(node.segment)
    document = {"version": DOCUMENT_VERSION, "tree": manifest.tree, "segments": lengths, "names": list(names)}
    about = {
        "run": manifest.run,
        "step": manifest.step,
        "created": manifest.created,
        "metrics": manifest.metrics,
        "metadata": manifest.metadata,
    }
    # "format" is what the transformers library looks for.
    metadata = {"format": "pt", TREE_KEY: _json(document), CHECKPOINT_KEY: _json(about)}
    if sum(len(text.encode()) for text in (*metadata.values(), *names)) + 200 * len(names) > MAX_HEADER_BYTES:
        raise InvalidInputError(
            "the tree has too many values that are not tensors for the safetensors format. Export to a .pt file."
        )
    try:
        safetensors.torch.save_file(named, temporary, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise UnavailableError(f"cannot write {temporary}: {error}.") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bytes):
        return torch.from_numpy(np.frombuffer(bytearray(value), np.uint8))
    return torch.from_numpy(cast("np.ndarray[Any, Any]", value))


def read(file: Path) -> Portable:
    """The state that was exported to it, or a flat dict of its tensors. Raises InvalidInputError."""
    safetensors = require()
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
    except Exception as error:  # SafetensorError, and whatever else a strange file leads to
        raise InvalidInputError(f"{file} cannot be read as a safetensors file: {error}") from error
    if TREE_KEY not in metadata:
        return Portable(*flatten(named))
    try:
        return _rebuild(metadata, named)
    except CorruptError as error:
        raise InvalidInputError(
            f"{file} is not as ckptstore wrote it, so its tree cannot be put together again: {error}. Without the "
            f"entry {TREE_KEY} in its metadata it could be imported as a flat dict of tensors."
        ) from error


def _rebuild(metadata: Mapping[str, str], named: Mapping[str, torch.Tensor]) -> Portable:
    """The tree that was exported. Whoever wrote the file: all is checked. Raises CorruptError."""
    try:
        document = _DOCUMENT_DECODER.decode(metadata[TREE_KEY])
        about = _ABOUT_DECODER.decode(metadata.get(CHECKPOINT_KEY, "{}"))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CorruptError(f"its metadata makes no sense ({error})") from error
    if document.version != DOCUMENT_VERSION:
        raise UnsupportedFormatError("the file was written by a newer ckptstore: install that, and import it again.")
    unflatten(document.tree, lambda node, _: node, document.segments, describe=True)  # raises what is wrong with it
    nodes = list(tensors(document.tree, document.segments))
    if len(nodes) != len(document.names) or set(document.names) != set(named):
        raise CorruptError("the tensors in it are not those of the tree")
    memory = _shared_memory(nodes, document, named)
    leaves = []
    places = list(tensor_places(document.tree))
    for (path, node), (_, place), name in zip(nodes, places, document.names, strict=True):
        place.clear()
        place[TAG] = node.tag
        leaves.append(TensorLeaf(path, _value(node, named[name], memory.get(node.segment)), place))
    return Portable(document.tree, leaves, _small_values(about.metrics), _small_values(about.metadata), about.step)


def _shared_memory(
    nodes: Sequence[tuple[str, TensorNode]], document: _Document, named: Mapping[str, torch.Tensor]
) -> dict[int, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """The memory of the segments in which tensors share bytes or lie in another order, filled from the file."""
    users = Counter(node.segment for _, node in nodes)
    memory: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    placed: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for (path, node), name in zip(nodes, document.names, strict=True):
        written = _torch_dtype(node)
        if named[name].dtype != written or tuple(named[name].shape) != node.shape:
            raise CorruptError(f"{path} is a {named[name].dtype} of shape {tuple(named[name].shape)} in it, not {node}")
        if node.tag != "tensor" or (users[node.segment] == 1 and node.stride is None and not node.offset):
            continue
        try:
            flat = memory.setdefault(node.segment, np.zeros(document.segments[node.segment], np.uint8))
        except MemoryError as error:
            raise CorruptError(f"{path} asks for {document.segments[node.segment]} bytes of memory") from error
        source, view = _bits(named[name]), _view(node, flat)
        view[...] = source
        placed.append((path, view, source))
    for path, view, source in placed:
        if view.tobytes() != source.tobytes():
            raise CorruptError(f"{path} shares memory with another tensor, which has other values now")
    return memory


def _bits(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """The elements as bits, whatever NumPy thinks of their dtype."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(_bits_dtype(tensor.element_size())).reshape(tuple(tensor.shape))


def _view(node: TensorNode, memory: "np.ndarray[Any, np.dtype[np.uint8]]") -> "np.ndarray[Any, Any]":
    stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
    dtype = _bits_dtype(node.item_bytes)
    if 0 in node.shape:
        return np.empty(node.shape, dtype)
    return np.ndarray(node.shape, dtype, memory, node.offset, tuple(step * node.item_bytes for step in stride))


def _bits_dtype(item_bytes: int) -> str:
    return f"u{item_bytes}" if item_bytes <= 8 else f"V{item_bytes}"


def _value(node: TensorNode, stored: torch.Tensor, memory: "np.ndarray[Any, np.dtype[np.uint8]] | None") -> Any:
    if node.tag != "tensor":
        return stored.numpy()
    tensor = stored
    if memory is not None:
        tensor = torch.empty(0, dtype=stored.dtype)
        stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
        storage = torch.from_numpy(memory).untyped_storage()
        tensor.set_(storage, node.offset // node.item_bytes, node.shape, stride)
    if node.parameter:
        return torch.nn.Parameter(tensor, requires_grad=node.requires_grad)
    return tensor.requires_grad_(node.requires_grad)


def _small_values(node: Any) -> dict[str, Any] | None:
    """Metrics or metadata, checked. Raises CorruptError."""
    if node is None:
        return None
    values = unflatten(node, lambda tensor, _: tensor, [], describe=True)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CorruptError("its metrics or its metadata are no dict")
    return cast("dict[str, Any]", node)
