"""The values in a manifest (metrics, metadata, leaves that are no tensors) as strict JSON and as text. Needs no torch.

int of 2**53 and more    its digits, as a string: many JSON readers would round the number
float that is not finite "nan", "inf", "-inf"
complex                  "(1+2j)"
bytes                    hex digits
tuple, set, deque, size  list
dict with other keys     list of [key, value]
NumPy scalar             its value; of types that JSON lacks: its text
dtype, device            its name
"""

import json
import math
import struct
from typing import Any

from ckptstore.errors import CorruptError
from ckptstore.skeleton import MAPPING_TAGS, MAX_DEPTH, SEQUENCE_TAGS, TAG, TENSOR_TAGS, decode_plain, numpy_item_bytes

__all__ = ["is_container", "pairs", "to_json", "to_text", "type_name"]

MAX_EXACT_INT = 2**53
_MAX_DIGITS_BITS = 4000
_TYPE_NAMES = {
    "blob": "bytes",
    "ordered_dict": "OrderedDict",
    "counter": "Counter",
    "scalar": "NumPy scalar",
    "size": "torch.Size",
    "dtype": "torch.dtype",
    "device": "torch.device",
}


def to_json(node: Any) -> Any:
    """A node of a skeleton without tensors as a value that JSON holds. Raises CorruptError."""
    try:
        return _plain(node, 0)
    except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise CorruptError(f"a value in the manifest is written in a way that makes no sense: {error}") from error


def to_text(node: Any) -> str:
    """A node as people read it: plain text and numbers as they are, the rest as JSON."""
    value = to_json(node)
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def pairs(node: Any) -> list[tuple[str, Any]]:
    """Names and nodes of metrics or metadata."""
    if isinstance(node, dict) and TAG not in node:
        return list(node.items())
    values = to_json(node)
    return [(str(name), node["items"][number][1]) for number, name in enumerate(values)]


def is_container(node: Any) -> bool:
    """Whether other nodes stand in this one, or could."""
    if not isinstance(node, dict):
        return isinstance(node, list)
    return TAG not in node or node[TAG] in MAPPING_TAGS or node[TAG] in SEQUENCE_TAGS


def type_name(node: Any) -> str:
    """What Python calls the type of a node's value."""
    if not isinstance(node, dict) or TAG not in node:
        return "None" if node is None else type(node).__name__
    tag = node[TAG]
    if tag == "registered":
        name = node.get("name")
        return name if isinstance(name, str) else tag  # of any depth, which Python could not write out
    return _TYPE_NAMES.get(tag, tag) if isinstance(tag, str) else "unknown"


def _plain(node: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(node, list):
        return [_plain(item, depth + 1) for item in node]
    if not isinstance(node, dict):
        return _python(node)
    if TAG not in node:
        return {key: _plain(item, depth + 1) for key, item in node.items()}
    tag = node[TAG]
    if tag in SEQUENCE_TAGS or tag == "size":
        return [_plain(item, depth + 1) for item in node["items"]]
    if tag in MAPPING_TAGS:
        pairs = [(_plain(key, depth + 1), _plain(item, depth + 1)) for key, item in node["items"]]
        if all(isinstance(key, str) for key, _ in node["items"]):
            return dict(pairs)
        return [list(pair) for pair in pairs]
    if tag == "registered":
        return _plain(node["tree"], depth + 1)
    if tag in TENSOR_TAGS:
        return {"dtype": node["dtype"], "shape": node["shape"]}
    return _python(_value(tag, node))


def _value(tag: str, node: dict[str, Any]) -> Any:
    match tag:
        case "int" | "float" | "complex" | "bytes" | "str":
            return decode_plain(node)
        case "dtype" | "device":
            return str(node["name"])
        case "scalar":
            return _scalar(node["dtype"], bytes.fromhex(node["hex"]))
    raise ValueError(f"no such tag: {tag!r:.80}")


def _scalar(dtype: str, content: bytes) -> Any:
    if numpy_item_bytes(dtype) != len(content):
        raise ValueError(f"{dtype!r:.80} does not take {len(content)} bytes")
    if not content:
        return "" if "U" in dtype else b""
    import numpy as np  # here, as only NumPy scalars need it

    scalar = np.frombuffer(content, np.dtype(dtype))[0]
    return str(scalar) if scalar.dtype.kind in "mM" else scalar.item()


def _python(value: Any) -> Any:
    """A Python value as JSON holds it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, complex):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) >= MAX_EXACT_INT:
        # Python refuses to write longer ones in decimal, as that takes quadratic time.
        return str(value) if value.bit_length() <= _MAX_DIGITS_BITS else hex(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value
