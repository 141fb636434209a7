"""Checkpoints as files that other programs read, and such files as states: `.safetensors` and torch's own `.pt`.

A `.safetensors` file of ours holds each tensor under its path, and in its metadata the skeleton of the tree, so that
importing it gives back what was exported. docs/reference/cli.md says what each format keeps.
"""

import contextlib
import json
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import numpy as np
import torch

from ckptstore.assembly import Assembly
from ckptstore.condemning import condemn_corrupt
from ckptstore.errors import (
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    UnsupportedFormatError,
    retold,
)
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress
from ckptstore.skeleton import TAG, TensorNode, contiguous_stride, tensor_places, tensors
from ckptstore.tree import TORCH_DTYPES, TensorLeaf, flatten, unflatten

__all__ = ["SUFFIXES", "Portable", "export_file", "read_file"]

TREE_KEY = "ckptstore.tree"
CHECKPOINT_KEY = "ckptstore.checkpoint"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
DOCUMENT_VERSION = 1
MAX_HEADER_BYTES = 90_000_000
"""Readers of safetensors refuse a header beyond 100 MB; escapes may make it a little longer than its texts."""


@dataclass(slots=True)
class Portable:
    """What was read from a file.

    Attributes:
        tree: the skeleton; the nodes of its tensors are those of `leaves`, to be filled in by whoever stores it.
        leaves: its tensors.
        metrics: the skeleton of the metrics; None if the file has none.
        metadata: the skeleton of the metadata; likewise.
    """

    tree: Any
    leaves: list[TensorLeaf]
    metrics: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


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
    with _explained("write", file):
        _check_destination(file, overwrite=overwrite)
    if file.suffix == ".safetensors":
        _require_safetensors()
        names = _names(manifest)
        _check_dtypes(manifest, names)
        found = _filled(objects, manifest, threads, progress)
        _write(file, lambda temporary: _write_safetensors(temporary, found, names), overwrite=overwrite)
        return
    _check_torch_has_dtypes(manifest)
    found = _filled(objects, manifest, threads, progress)
    # Values of registered types as the plain trees that they were saved as: their pickles would run code.
    state = unflatten(manifest.tree, lambda node, _: found.value(node), manifest.segment_bytes, describe=True)
    _write(file, lambda temporary: _write_torch(temporary, state), overwrite=overwrite)


def read_file(path: str | os.PathLike[str]) -> Portable:
    """The state in a `.safetensors` file, or in a file of `torch.save`. No code that the file brings along runs.

    Raises:
        NotFoundError: there is no such file.
        InvalidInputError: it is no such file, or holds what only code could make.
        UnavailableError: it cannot be read.
    """
    file = _checked(path)
    # So that a missing or forbidden file is told apart from one with strange content.
    with _explained("read", file), file.open("rb"):
        pass
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    tree, leaves = flatten(_read_torch(file))
    return Portable(tree, leaves)


# ---- files


def _checked(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise InvalidInputError(f"{file} is of a kind that is not known: its name must end in {', '.join(SUFFIXES)}.")
    return file


def _check_destination(file: Path, *, overwrite: bool) -> None:
    if not file.parent.is_dir():
        raise NotFoundError(f"there is no folder {file.parent}. Make it first.")
    if file.is_dir():
        raise InvalidInputError(f"{file} is a folder. Name a file.")
    if file.exists() and not overwrite:
        raise _exists(file)


def _exists(file: Path) -> ConflictError:
    return ConflictError(f"{file} exists, and is left as it is. Choose another name, or overwrite it on purpose.")


def _write(file: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill a temporary file beside `file`, and give it its name when it is durable."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    with _explained("write", file):
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
def _explained(action: str, file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}.") from error
    except OSError as error:
        raise UnavailableError(f"cannot {action} {file}: {error.strerror or error}.") from error


# ---- from the store


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


# ---- safetensors


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


# Made now, and not when the first file is read, which threads may do at the same time: see manifest.py.
_DOCUMENT_DECODER = msgspec.json.Decoder(_Document)
_ABOUT_DECODER = msgspec.json.Decoder(_About)


def _require_safetensors() -> Any:
    """The package that reads and writes the format. Raises InvalidInputError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InvalidInputError(
            "files in the safetensors format need a package that is not installed: pip install 'ckptstore[safetensors]'"
        ) from error
    return safetensors


def _names(manifest: Manifest) -> list[str]:
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


def _check_dtypes(manifest: Manifest, names: Sequence[str]) -> None:
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
            _require_safetensors().torch.save({"tensor": torch.empty(0, dtype=dtype)})
        except Exception:  # a KeyError today; whatever it is, this dtype cannot be written
            return False
    return True


def _write_safetensors(temporary: Path, assembly: Assembly, names: Sequence[str]) -> None:
    safetensors = _require_safetensors()
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


def _read_safetensors(file: Path) -> Portable:
    safetensors = _require_safetensors()
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
    return Portable(document.tree, leaves, _small_values(about.metrics), _small_values(about.metadata))


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


# ---- torch.save


def _check_torch_has_dtypes(manifest: Manifest) -> None:
    for path, node in tensors(manifest.tree, manifest.segment_bytes):
        if node.tag == "tensor" and node.dtype not in TORCH_DTYPES:
            raise UnsupportedFormatError(
                f"{path} has dtype {node.dtype}, which torch {torch.__version__} lacks: install a newer torch."
            )


def _write_torch(temporary: Path, state: Any) -> None:
    # Not by the path: torch would write the temporary file's name into the file.
    with temporary.open("wb") as opened:
        torch.save(state, opened)


def _read_torch(file: Path) -> Any:
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
