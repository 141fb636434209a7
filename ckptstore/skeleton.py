"""The tree of a checkpoint as it stands in the manifest: JSON values, with tagged objects for what JSON lacks.

    null, true, "text", 12, 0.5          None, bool, str, int (below 2**53), float (finite)
    [ ... ]                              list
    { "name": ... }                      dict whose keys are all str and do not begin with "$"; order counts
    {"$": "<tag>", ... }                 everything else: TAGS says what each holds

This module walks and describes such trees without torch, so that the command line can show a checkpoint fast.
`tree/` turns them into Python objects. Nothing else gives meaning to a tag.
"""

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import blake3
import msgspec

from ckptstore.errors import CorruptError, NotFoundError

TAG = "$"
TENSOR_TAGS = frozenset({"tensor", "ndarray", "blob"})
"""Leaves whose bytes are in chunks: torch tensors, NumPy arrays, and bytes objects too long for a manifest."""
MAPPING_TAGS = frozenset({"dict", "ordered_dict", "defaultdict", "counter"})
SEQUENCE_TAGS = frozenset({"tuple", "set", "frozenset", "deque"})
VALUE_TAGS = frozenset({"int", "float", "complex", "str", "bytes", "scalar", "size", "dtype", "device"})
MAX_DEPTH = 100
"""Of containers within containers."""
MAX_TENSOR_BYTES = 2**62
MAX_PATH_CHARACTERS = 500
"""Of a path as it is told and compared: a long key over many members would cost their product in memory and time."""

ITEM_SIZES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Name of a torch dtype -> bytes an element. These are the dtypes that a checkpoint can hold."""


_NUMPY_DTYPE = re.compile(
    r"(?:\|b|\|[iu])(1)|[<>](?:[iu]([248])|f([248])|c(8|16)"
    r"|[Mm](8)(?:\[(?:[1-9][0-9]{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)|\|S([0-9]{1,8})"
)
_NUMPY_TEXT = re.compile(r"[<>]U([0-9]{1,8})")


def numpy_item_bytes(dtype: str) -> int | None:
    """Bytes an element of NumPy's type string `dtype`, or None for one that a checkpoint cannot hold."""
    if match := _NUMPY_TEXT.fullmatch(dtype):
        return 4 * int(match[1])
    match = _NUMPY_DTYPE.fullmatch(dtype)
    return int(match[match.lastindex or 0]) if match else None


@dataclass(frozen=True, slots=True)
class TensorNode:
    """A tensor (or, if `numpy`, an array; if `raw`, a long bytes object) of the tree: where and how its bytes lie.

    dtype: torch's name ("bfloat16") or NumPy's type string ("<f4"). offset: bytes from the segment's start.
    stride: elements, for each dimension; None is contiguous (row-major).
    """

    tag: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int = 0
    stride: tuple[int, ...] | None = None
    requires_grad: bool = False
    parameter: bool = False

    @property
    def item_bytes(self) -> int:
        size = ITEM_SIZES.get(self.dtype) if self.tag == "tensor" else numpy_item_bytes(self.dtype)
        return size or 0

    @property
    def logical_bytes(self) -> int:
        """What the tensor takes if nothing is shared: elements times element size."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def span_bytes(self) -> int:
        """From the first to the end of the last byte that the tensor touches in its segment."""
        if 0 in self.shape:
            return 0
        stride = self.stride if self.stride is not None else contiguous_stride(self.shape)
        return (1 + sum((size - 1) * step for size, step in zip(self.shape, stride, strict=True))) * self.item_bytes

    def to_json(self) -> dict[str, Any]:
        node: dict[str, Any] = {TAG: self.tag, "dtype": self.dtype, "shape": list(self.shape), "segment": self.segment}
        if self.offset:
            node["offset"] = self.offset
        if self.stride is not None:
            node["stride"] = list(self.stride)
        if self.requires_grad:
            node["requires_grad"] = True
        if self.parameter:
            node["parameter"] = True
        return node

    @classmethod
    def from_json(cls, node: dict[str, Any], path: str, segment_bytes: Sequence[int]) -> "TensorNode":
        """Raises CorruptError, naming `path`, unless every number fits the segment it refers to."""
        try:
            parsed = msgspec.convert({key: value for key, value in node.items() if key != TAG}, _TensorFields)
        except msgspec.ValidationError as error:
            raise CorruptError(f"{path} is described in a way that makes no sense ({error})") from error
        stride = None if parsed.stride is None else tuple(parsed.stride)
        found = cls(
            tag=node[TAG],
            dtype=parsed.dtype,
            shape=tuple(parsed.shape),
            segment=parsed.segment,
            offset=parsed.offset,
            stride=stride,
            requires_grad=parsed.requires_grad,
            parameter=parsed.parameter,
        )
        fits = (
            found.item_bytes > 0
            and (stride is None or len(stride) == len(found.shape))
            and found._fits_in_memory
            and found._suits_its_tag
            and found.segment < len(segment_bytes)
            and found.offset % found.item_bytes == 0
            and found.offset + found.span_bytes <= segment_bytes[found.segment]
        )
        if not fits:
            raise CorruptError(f"{path} is described as {found}, which does not fit the bytes it refers to")
        return found

    @property
    def _fits_in_memory(self) -> bool:
        """False for a shape whose bytes no machine can count, which a stride of 0 or a size of 0 would let through."""
        return math.prod(max(size, 1) for size in self.shape) * self.item_bytes < MAX_TENSOR_BYTES

    @property
    def _suits_its_tag(self) -> bool:
        if self.tag == "tensor":
            # Whole numbers and bools have no gradient; torch would refuse to make such a tensor.
            return not self.requires_grad or self.dtype.startswith(("float", "bfloat", "complex"))
        plain = not self.requires_grad and not self.parameter and self.stride is None
        return plain and (self.tag == "ndarray" or (self.dtype == "|u1" and len(self.shape) == 1))


class _TensorFields(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**48)]], msgspec.Meta(max_length=64)]
    segment: Annotated[int, msgspec.Meta(ge=0)]
    offset: Annotated[int, msgspec.Meta(ge=0)] = 0
    stride: list[Annotated[int, msgspec.Meta(ge=0, le=2**62)]] | None = None
    requires_grad: bool = False
    parameter: bool = False


msgspec.json.Decoder(_TensorFields)  # so that msgspec has taken it apart before threads need it: see manifest.py


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The stride, in elements, of a row-major tensor of `shape`."""
    stride = [1] * len(shape)
    for index in range(len(shape) - 1, 0, -1):
        stride[index - 1] = stride[index] * max(shape[index], 1)
    return tuple(stride)


def is_tensor(node: Any) -> bool:
    """True for a node whose bytes are in chunks."""
    if not isinstance(node, dict):
        return False
    tag = node.get(TAG)
    # What a hostile tag is can be a list, which no set could be asked for.
    return isinstance(tag, str) and tag in TENSOR_TAGS


def join(path: str, key: Any) -> str:
    """The path of what stands under `key` (a Python key, or an index) of the container at `path`.

    The end of one that would be too long is a digest of all of it, so that different paths stay different.
    """
    joined = path + _suffix(path, key)
    if len(joined) <= MAX_PATH_CHARACTERS:
        return joined
    digest = blake3.blake3(joined.encode("utf-8", "surrogatepass")).hexdigest(16)
    return f"{joined[: MAX_PATH_CHARACTERS - 1 - len(digest)]}…{digest}"


def _suffix(path: str, key: Any) -> str:
    """What a key adds to the path of its container."""
    if isinstance(key, str):
        return f".{key}" if path else key
    try:
        return f"[{key!r}]"
    except ValueError:  # Python does not write out an int of thousands of digits
        return f"[{type(key).__name__} {hash(key):x}]"


def shown(value: Any) -> str:
    """What a JSON value of a store is, in a few characters for a message; it may be of any length and depth."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value)[:80]


def children(node: Any, path: str) -> list[tuple[str, Any]]:
    """Path and node of each member of a container node; empty for a leaf. Raises CorruptError."""
    return list(_children(node, path))


def _children(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The same one after the other, so that no more than one path of a container's is held."""
    for key, child in _members(node, path):
        yield path if key is _NO_KEY else join(path, key), child


_NO_KEY: Final = object()
"""What the tree of a registered value stands under."""


def _members(node: Any, path: str) -> Iterator[tuple[Any, Any]]:
    """Key and node of each member."""
    if isinstance(node, list):
        return iter(enumerate(node))
    if not isinstance(node, dict) or is_tensor(node):
        return iter(())
    if TAG not in node:
        return iter(node.items())
    tag, items = node[TAG], node.get("items")
    if isinstance(tag, str):
        if tag in VALUE_TAGS:
            return iter(())
        if tag == "registered" and "tree" in node:
            return iter([(_NO_KEY, node["tree"])])
        if tag in SEQUENCE_TAGS and isinstance(items, list):
            return iter(enumerate(items))
        if tag in MAPPING_TAGS and isinstance(items, list) and all(map(_is_pair, items)):
            return ((simple_key(key), child) for key, child in items)
    raise CorruptError(
        f"{path or 'the tree'}: what is tagged {shown(tag)} there is written in a way that makes no sense"
    )


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2


def decode_plain(node: dict[str, Any]) -> Any:
    """The value of an int, float, complex, bytes or str node. Raises KeyError, TypeError, ValueError, struct.error."""
    match node[TAG]:
        case "int":
            return int(node["hex"], 16)
        case "float":
            return struct.unpack(">d", bytes.fromhex(node["bits"]))[0]
        case "complex":
            return complex(*struct.unpack(">dd", bytes.fromhex(node["bits"])))
        case "bytes":
            return bytes.fromhex(node["hex"])
        case "str":
            return bytes.fromhex(node["hex"]).decode("utf-8", "surrogatepass")
    raise ValueError("no plain value")


def simple_key(node: Any, depth: int = 0) -> Any:
    """A dict's key for use in a path: as the Python key where that is readable, else its node as text.

    Raises:
        CorruptError: it is nested deeper than a key can be.
    """
    if not isinstance(node, dict):
        return _text(node) if isinstance(node, list) else node
    items = node.get("items")
    if node.get(TAG) == "tuple" and isinstance(items, list):
        if depth > MAX_DEPTH:
            raise CorruptError(f"a key is nested deeper than {MAX_DEPTH} tuples")
        return tuple(simple_key(item, depth + 1) for item in items)
    try:
        match node.get(TAG):
            case "str":
                return bytes.fromhex(node["hex"]).decode("utf-8", "backslashreplace")
            case "bytes" | "float":
                return decode_plain(node)
            case "int" if len(node["hex"]) <= 40:  # Python does not write out an int of thousands of digits
                return decode_plain(node)
    except (KeyError, TypeError, ValueError, struct.error):
        pass  # the text will do; who decodes the key says what is wrong with it
    return _text(node)


def _text(node: Any) -> str:
    """The text of a key's node, which Python could not write if it were nested too deep."""
    level, depth = [node], 0
    while level:
        if depth > 2 * MAX_DEPTH + 2:  # a tuple or a set is an object with a list in it
            raise CorruptError(f"a key is nested deeper than {MAX_DEPTH} containers")
        below = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level, depth = list(itertools.chain.from_iterable(below)), depth + 1
    return repr(node)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and node of every leaf, in order. An empty container is a leaf.

    What modules attach to their dicts (`metadata` of an ordered_dict) is left out: it says nothing to people.
    """
    return _leaves(node, path, _children)


def _leaves(
    node: Any, path: str, members: Callable[[Any, str], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Any]]:
    open_containers = [iter([(path, node)])]
    while open_containers:
        found = next(open_containers[-1], None)
        if found is None:
            open_containers.pop()
            continue
        here, current = found
        if len(open_containers) - 1 > MAX_DEPTH:
            raise CorruptError(f"{here} is nested deeper than {MAX_DEPTH} containers")
        below = members(current, here)
        first = next(below, None)
        if first is None:
            yield here, current
        else:
            open_containers.append(itertools.chain([first], below))


def tensors(node: Any, segment_bytes: Sequence[int], path: str = "") -> Iterator[tuple[str, TensorNode]]:
    """Path and description of every tensor, array and long bytes object at or below `node`, which stands at `path`.

    Those in what modules attach to their dicts are among them. Each is checked; raises CorruptError.
    """
    for here, leaf in tensor_places(node, path):
        yield here, TensorNode.from_json(leaf, here, segment_bytes)


def registered_names(node: Any) -> Iterator[Any]:
    """The name of every registered type in the tree."""
    stack = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, dict) and current.get(TAG) == "registered":
            yield current.get("name")
        stack.extend(child for _, child in _children_and_metadata(current, ""))


def tensor_places(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The same as they stand in the tree, unchecked."""
    for here, leaf in _leaves(node, path, _children_and_metadata):
        if is_tensor(leaf):
            yield here, leaf


def _children_and_metadata(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield from _children(node, path)
    if isinstance(node, dict) and node.get(TAG) == "ordered_dict" and "metadata" in node:
        yield f"{path}._metadata", node["metadata"]


def find(tree: Any, wanted: str) -> Any:
    """The node at the path `wanted`, such as "model" or "optimizer.param_groups[0]".

    Raises NotFoundError that lists what stands at the place where the path leaves the tree.
    """
    # How much of `wanted` leads to a node, rather than its path: `wanted` may be longer than paths are told.
    farthest: tuple[int, Any] = (0, tree)
    stack: list[tuple[int, Any]] = [(0, tree)]
    while stack:
        length, node = stack.pop()
        if length == len(wanted):
            return node
        farthest = max(farthest, (length, node), key=lambda place: place[0])
        inside = []
        for key, child in _members(node, wanted[:length]):
            suffix = "" if key is _NO_KEY else _suffix(wanted[:length], key)
            end = length + len(suffix)
            if wanted.startswith(suffix, length) and (end == len(wanted) or wanted[end] in ".["):
                inside.append((end, child))
        # Keys may have dots in them, so there may be several ways; the longest is tried first.
        stack += sorted(inside, key=lambda place: place[0])
    length, node = farthest
    here = wanted[:length]
    near = ", ".join(path for path, _ in itertools.islice(_children(node, here), 12)) or "nothing"
    raise NotFoundError(f"there is no {wanted!r} in the checkpoint; under {here or 'its root'!r} stand: {near}")
