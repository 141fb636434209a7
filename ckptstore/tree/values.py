"""Immutable values <-> their nodes: leaves that are no tensors, the keys of dicts, the members of sets.

What encodes a type and what decodes it stand side by side here. Containers that hold any leaf are not of this room.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Hashable
from typing import Any

import msgspec
import numpy as np
import torch

from ckptstore.errors import CorruptError, InvalidInputError, UnsupportedFormatError
from ckptstore.skeleton import ITEM_SIZES, MAX_DEPTH, TAG, decode_plain, numpy_item_bytes, shown

MAX_EQUAL_HASHES = 100
"""Members of one set, or keys of one dict, whose hashes are equal: making it takes time for each pair of them. Numbers
that are not chosen for it hardly ever have equal hashes, and those of texts differ from process to process."""

MAX_JSON_INT = 2**53
"""Integers from here on are written in hex: other JSON readers would round them."""

VALUE_TYPES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})
"""Types that `encode_value` turns into a node. NumPy's scalars have a function of their own: they can be refused."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ITEM_SIZES if isinstance(getattr(torch, name, None), torch.dtype)
}
"""The dtypes that a tensor of a checkpoint can have, as far as this torch has them."""

# A dtype that stands alone, as a value, may be any that torch has. Never getattr(torch, <text from a store>).
_ALL_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
_DTYPE_NAME = re.compile(r"(?:b?float|complex|q?u?int|bits|bool)\d[0-9a-z_]{0,40}")
_DEVICE_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}(?::\d{1,3})?")


def encode_value(value: Any) -> Any:
    """The node of a value of one of VALUE_TYPES."""
    if type(value) is int and abs(value) >= MAX_JSON_INT:
        return {TAG: "int", "hex": hex(value)}
    if type(value) is float and not math.isfinite(value):
        return {TAG: "float", "bits": struct.pack(">d", value).hex()}
    if type(value) is complex:
        return {TAG: "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}
    if type(value) is bytes:
        return {TAG: "bytes", "hex": value.hex()}
    if type(value) is str and not is_utf8(value):
        return {TAG: "str", "hex": value.encode("utf-8", "surrogatepass").hex()}
    if type(value) is torch.Size:
        return {TAG: "size", "items": [encode_value(int(size)) for size in value]}
    if type(value) is torch.dtype:
        return {TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {TAG: "device", "name": str(value)}
    return value


def is_utf8(text: str) -> bool:
    """False for text with lone surrogates, which JSON cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encode_hashable(value: Any, path: str, depth: int = 0) -> Any:
    """The node of a dict's key or a set's member: immutable values, and tuples and frozensets of them."""
    if depth > MAX_DEPTH:
        raise InvalidInputError(f"{path} is nested deeper than {MAX_DEPTH} tuples. Use a flatter one.")
    if type(value) in (bool, int, float, complex, str, bytes, type(None)):
        return encode_value(value)
    if type(value) is tuple:
        return {TAG: "tuple", "items": [encode_hashable(item, path, depth + 1) for item in value]}
    if type(value) in (set, frozenset):
        if not all(map(Hashes().may_add, value)):
            raise InvalidInputError(f"{path}: more than {MAX_EQUAL_HASHES} members have the same hash. Use a list.")
        # Sorted, because the order of a set differs from process to process.
        items = sorted((encode_hashable(item, path, depth + 1) for item in value), key=msgspec.json.encode)
        return {TAG: type(value).__name__, "items": items}
    raise InvalidInputError(
        f"{path} is or holds a {type(value).__name__}; keys and members of sets can be str, int, bool, float, complex, "
        "None, bytes, and tuples and frozensets of those. Use such a key."
    )


def encode_scalar(value: "np.generic[Any]", path: str) -> Any:
    """The node of a NumPy scalar."""
    if type(value) is np.str_:
        # Not value.tobytes(): NumPy takes zeros at the end of a text or of bytes for padding.
        return {TAG: "scalar", "dtype": f"<U{len(value)}", "hex": value.encode("utf-32-le", "surrogatepass").hex()}
    if type(value) is np.bytes_:
        return {TAG: "scalar", "dtype": f"|S{len(value)}", "hex": value.hex()}
    text = value.dtype.str
    # The second: np.longlong has np.int64's type string on Linux, and would come back as that.
    if numpy_item_bytes(text) is None or np.dtype(text).type is not type(value):
        raise InvalidInputError(
            f"{path or 'the state'} is a NumPy scalar of type {type(value).__name__} and dtype {value.dtype}, which is "
            "not the same on every machine or would not come back as the same type. Convert it: .item(), for example."
        )
    return {TAG: "scalar", "dtype": text, "hex": value.tobytes().hex()}


class Hashes:
    """Counts the hashes of the members of a set, or of the keys of a dict, before it is made."""

    def __init__(self) -> None:
        self._count: Counter[int] = Counter()

    def may_add(self, member: Hashable) -> bool:
        """False if too many others have its hash. Raises TypeError for what has none."""
        number = hash(member)
        self._count[number] += 1
        return self._count[number] <= MAX_EQUAL_HASHES


def decode_hashable(node: Any, path: str = "") -> Hashable:
    """The inverse of `encode_value`, `encode_scalar` and `encode_hashable`.

    Raises:
        CorruptError: the node makes no sense; the text names `path`.
        UnsupportedFormatError: it names a dtype or a device that this torch does not have.
    """
    try:
        value: Hashable = _decode(node, 0)
        return value
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError, struct.error) as error:
        what = shown(node.get(TAG)) if isinstance(node, dict) else "key or member"
        # The text of an error may quote all of what it could not read.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CorruptError(f"{path or 'the tree'}: the {what} there cannot be read ({reason})") from error


def _decode(node: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise ValueError("a list cannot stand here")
        return node
    match node[TAG]:
        case "tuple":
            return tuple(_members(node, depth))
        case "set" | "frozenset" as tag:
            members = _members(node, depth)
            if not all(map(Hashes().may_add, members)):
                raise ValueError(f"more than {MAX_EQUAL_HASHES} members have the same hash")
            found = set(members) if tag == "set" else frozenset(members)
            if len(found) != len(members):
                raise ValueError("a member stands twice")
            return found
        case "int" | "float" | "complex" | "bytes" | "str":
            return decode_plain(node)
        case "size":
            return _size(_members(node, depth))
        case "dtype":
            return _dtype(node["name"])
        case "device":
            return _device(node["name"])
        case "scalar":
            return _scalar(node["dtype"], bytes.fromhex(node["hex"]))
    raise ValueError("no such tag")


def _members(node: dict[str, Any], depth: int) -> list[Any]:
    items = node["items"]
    if not isinstance(items, list):
        raise ValueError("its items are no list")
    return [_decode(item, depth + 1) for item in items]


def _size(sizes: list[Any]) -> torch.Size:
    if not all(type(size) is int for size in sizes):
        raise ValueError("a size is no whole number")
    return torch.Size(sizes)


def _dtype(name: str) -> torch.dtype:
    dtype = _ALL_DTYPES.get(name)
    if dtype is not None:
        return dtype
    if _DTYPE_NAME.fullmatch(name):
        raise UnsupportedFormatError(f"torch {torch.__version__} has no dtype {name}: install a newer torch.")
    raise ValueError(f"{name[:80]!r} is no dtype")


def _device(name: str) -> torch.device:
    if not _DEVICE_NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no device")
    try:
        device = torch.device(name)
    except Exception as error:
        # A device of a backend that comes with another package, and is not imported here: nothing is corrupt.
        raise UnsupportedFormatError(
            f"torch {torch.__version__} knows no device {name!r} here: import the package that brings it."
        ) from error
    if str(device) != name:
        raise ValueError(f"{name!r} is no device")  # torch keeps the index in a byte: cpu:300 is cpu:44 to it
    return device


def _scalar(dtype: str, content: bytes) -> Any:
    if numpy_item_bytes(dtype) != len(content):
        raise ValueError(f"{dtype[:80]!r} does not take {len(content)} bytes")
    kind = np.dtype(dtype).kind
    if kind == "U":
        return np.str_(content.decode("utf-32-be" if dtype.startswith(">") else "utf-32-le", "surrogatepass"))
    if kind == "S":
        return np.bytes_(content)
    return np.frombuffer(content, np.dtype(dtype))[0]
