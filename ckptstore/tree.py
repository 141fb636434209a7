"""State trees in Python <-> skeletons in JSON, each leaf with its exact type. No pickle, no code from a store.

`flatten` takes a tree apart into a skeleton and the tensors in it; `unflatten` puts one together again from a
skeleton and a function that supplies the tensors. Neither knows of chunks or of storage.
"""

import dataclasses
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import msgspec
import numpy as np
import torch

from ckptstore.errors import CorruptError, InvalidInputError
from ckptstore.skeleton import ITEM_SIZES, MAX_DEPTH, TAG, TensorNode, is_tensor, join, numpy_item_bytes, simple_key

MAX_JSON_INT = 2**53
"""Integers from here on are written in hex: other JSON readers would round them."""
MAX_INLINE_BYTES = 1024
"""Bytes objects longer than this go into chunks."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ITEM_SIZES if isinstance(getattr(torch, name, None), torch.dtype)
}
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_FACTORIES: dict[str, Any] = {
    factory.__name__: factory for factory in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}


@dataclasses.dataclass(slots=True)
class TensorLeaf:
    """A tensor found in a tree: its path, its value, and the skeleton's node, to be filled in by whoever stores it."""

    path: str
    value: "torch.Tensor | np.ndarray[Any, Any]"
    node: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Registration:
    cls: type
    name: str
    to_tree: Callable[[Any], Any]
    from_tree: Callable[[Any], Any]


_registered: dict[type, _Registration] = {}
_registered_names: dict[str, _Registration] = {}


def register(cls: type, name: str, to_tree: Callable[[Any], Any], from_tree: Callable[[Any], Any]) -> None:
    """Let values of exactly the type `cls` be leaves of a checkpoint.

    Args:
        cls: the type; subclasses are not included.
        name: what stands for it in the store, for ever; the reader must register the same name.
        to_tree: from a value to a tree of what can be saved (dict, list, tensors, numbers, …).
        from_tree: the way back.

    Raises:
        InvalidInputError: `cls` is a type that ckptstore saves by itself, or `name` is taken by another type.
    """
    if cls in _ENCODERS or cls in (torch.Tensor, torch.nn.Parameter):
        raise InvalidInputError(f"{cls.__name__} is saved as it is and needs no registration.")
    taken = _registered_names.get(name)
    if taken is not None and taken.cls is not cls:
        raise InvalidInputError(f"the name {name!r} is registered for {taken.cls.__qualname__} already; choose another.")
    _registered[cls] = _registered_names[name] = _Registration(cls, name, to_tree, from_tree)


def is_stateful(value: object) -> bool:
    """True for what is saved and restored through its own methods (module, optimizer, DCP's Stateful, …)."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def is_plain_tensor(value: object) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) or (
        isinstance(value, torch.nn.Buffer) and type(value) is torch.Tensor
    )


# ---- from Python to JSON


def flatten(state: Any, *, tensors: bool = True, root: str = "") -> tuple[Any, list[TensorLeaf]]:
    """The skeleton of `state` and the tensors in it, in order.

    Args:
        state: the tree.
        tensors: False forbids tensors, arrays and long bytes (in metrics and metadata).
        root: what to call the tree itself in messages.

    Raises:
        InvalidInputError: a leaf cannot be saved; the text names its path, its type and the way out.
    """
    walk = _Flattener(tensors)
    return walk.node(state, root, 0), walk.leaves


class _Flattener:
    def __init__(self, tensors: bool) -> None:
        self.allow_tensors = tensors
        self.leaves: list[TensorLeaf] = []

    def node(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise InvalidInputError(
                f"{path} is nested deeper than {MAX_DEPTH} containers (does it contain itself?). Flatten it."
            )
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value, path, depth)
        if is_plain_tensor(value):
            return self.tensor(value, path)
        if isinstance(value, np.generic):
            return _scalar_node(value, path)
        registration = _registered.get(type(value))
        if registration is not None:
            tree = self.node(registration.to_tree(value), path, depth + 1)
            return {TAG: "registered", "name": registration.name, "tree": tree}
        if is_stateful(value):
            return self.node(value.state_dict(), path, depth + 1)
        raise InvalidInputError(_why_not(value, path))

    def tensor(self, value: torch.Tensor, path: str) -> Any:
        _check_tensor(value, path)
        node: dict[str, Any] = {TAG: "tensor"}
        return self._leaf(value, path, node)

    def encode_array(self, value: "np.ndarray[Any, Any]", path: str, depth: int) -> Any:
        if numpy_item_bytes(value.dtype.str) is None or value.dtype.hasobject or value.dtype.names:
            raise InvalidInputError(
                f"{path} is a NumPy array of dtype {value.dtype}, which cannot be saved without pickle or is not the "
                "same on every machine. Convert it (for example .astype('float64')), or save its fields one by one."
            )
        return self._leaf(value, path, {TAG: "ndarray"})

    def encode_bytes(self, value: bytes, path: str, depth: int) -> Any:
        if len(value) <= MAX_INLINE_BYTES or not self.allow_tensors:
            return {TAG: "bytes", "hex": value.hex()}
        return self._leaf(np.frombuffer(value, "|u1"), path, {TAG: "blob"})

    def _leaf(self, value: Any, path: str, node: dict[str, Any]) -> Any:
        if not self.allow_tensors:
            raise InvalidInputError(
                f"{path} is a {type(value).__name__}: metrics and metadata hold small values. Put it into the state, "
                "or use .item() or .tolist()."
            )
        self.leaves.append(TensorLeaf(path, value, node))
        return node

    def encode_list(self, value: list[Any], path: str, depth: int) -> Any:
        return self.members(value, path, depth)

    def members(self, value: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.node(item, join(path, index), depth + 1) for index, item in enumerate(value)]

    def encode_tuple(self, value: tuple[Any, ...], path: str, depth: int) -> Any:
        return {TAG: "tuple", "items": self.members(value, path, depth)}

    def encode_deque(self, value: "deque[Any]", path: str, depth: int) -> Any:
        return {TAG: "deque", "items": self.members(value, path, depth), "maxlen": value.maxlen}

    def encode_dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if all(type(key) is str and _is_utf8(key) and not key.startswith(TAG) for key in value):
            return {key: self.node(item, join(path, key), depth + 1) for key, item in value.items()}
        return {TAG: "dict", "items": self.items(value, path, depth)}

    def items(self, value: dict[Any, Any], path: str, depth: int) -> list[Any]:
        items = []
        for key, item in value.items():
            encoded = encode_hashable(key, f"the key {key!r} of {path or 'the state'}")
            items.append([encoded, self.node(item, join(path, simple_key_of(key)), depth + 1)])
        return items

    def encode_ordered_dict(self, value: "OrderedDict[Any, Any]", path: str, depth: int) -> Any:
        node: dict[str, Any] = {TAG: "ordered_dict", "items": self.items(value, path, depth)}
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            # Modules put the versions there that their load_state_dict looks at.
            node["metadata"] = self.node(metadata, f"{path}._metadata", depth + 1)
        return node

    def encode_defaultdict(self, value: "defaultdict[Any, Any]", path: str, depth: int) -> Any:
        factory = value.default_factory
        if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
            raise InvalidInputError(
                f"{path} is a defaultdict of {factory!r}, which cannot be saved without pickle. "
                f"Use a factory that is one of {', '.join(sorted(_FACTORIES))}, or save dict(…)."
            )
        name = None if factory is None else getattr(factory, "__name__", None)
        return {TAG: "defaultdict", "items": self.items(value, path, depth), "factory": name}

    def encode_counter(self, value: "Counter[Any]", path: str, depth: int) -> Any:
        return {TAG: "counter", "items": self.items(value, path, depth)}

    def encode_value(self, value: Any, path: str, depth: int) -> Any:
        return encode_value(value)

    def encode_hashable(self, value: Any, path: str, depth: int) -> Any:
        return encode_hashable(value, path)


def simple_key_of(key: Any) -> Any:
    """How a dict's key stands in a path."""
    return simple_key(encode_hashable(key, "a key"))


def encode_hashable(value: Any, path: str) -> Any:
    """The node of a dict's key or a set's member: immutable values, and tuples and frozensets of them."""
    if type(value) in (bool, int, float, complex, str, bytes, type(None)):
        return encode_value(value)
    if type(value) is tuple:
        return {TAG: "tuple", "items": [encode_hashable(item, path) for item in value]}
    if type(value) in (set, frozenset):
        # Sorted, because the order of a set differs from process to process.
        items = sorted((encode_hashable(item, path) for item in value), key=msgspec.json.encode)
        return {TAG: type(value).__name__, "items": items}
    raise InvalidInputError(
        f"{path} is a {type(value).__name__}; keys and members of sets can be str, int, bool, float, complex, None, "
        "bytes, and tuples and frozensets of those. Use such a key."
    )


def encode_value(value: Any) -> Any:
    """The node of an immutable value without members."""
    if type(value) is int and abs(value) >= MAX_JSON_INT:
        return {TAG: "int", "hex": hex(value)}
    if type(value) is float and not math.isfinite(value):
        return {TAG: "float", "bits": struct.pack(">d", value).hex()}
    if type(value) is complex:
        return {TAG: "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}
    if type(value) is bytes:
        return {TAG: "bytes", "hex": value.hex()}
    if type(value) is str and not _is_utf8(value):
        return {TAG: "str", "hex": value.encode("utf-8", "surrogatepass").hex()}
    if type(value) is torch.Size:
        return {TAG: "size", "items": list(value)}
    if type(value) is torch.dtype:
        return {TAG: "dtype", "name": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {TAG: "device", "name": str(value)}
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _scalar_node(value: np.generic, path: str) -> Any:
    if numpy_item_bytes(value.dtype.str) is None:
        raise InvalidInputError(f"{path} is a NumPy scalar of dtype {value.dtype}; convert it with .item().")
    return {TAG: "scalar", "dtype": value.dtype.str, "hex": value.tobytes().hex()}


_ENCODERS: dict[type, Callable[[_Flattener, Any, str, int], Any]] = {
    **dict.fromkeys((type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device), _Flattener.encode_value),
    bytes: _Flattener.encode_bytes,
    list: _Flattener.encode_list,
    tuple: _Flattener.encode_tuple,
    dict: _Flattener.encode_dict,
    set: _Flattener.encode_hashable,
    frozenset: _Flattener.encode_hashable,
    OrderedDict: _Flattener.encode_ordered_dict,
    defaultdict: _Flattener.encode_defaultdict,
    Counter: _Flattener.encode_counter,
    deque: _Flattener.encode_deque,
    np.ndarray: _Flattener.encode_array,
}


def _check_tensor(value: torch.Tensor, path: str) -> None:
    if value.layout is not torch.strided:
        raise InvalidInputError(f"{path} is a {value.layout} tensor: save .to_dense(), or its indices and values.")
    if value.is_quantized:
        raise InvalidInputError(f"{path} is a quantized tensor: save .int_repr() with its scale, or .dequantize().")
    if value.is_meta:
        raise InvalidInputError(f"{path} is a meta tensor, which has no values: materialise the module first.")
    if value.dtype not in _DTYPE_NAMES:
        raise InvalidInputError(f"{path} has dtype {value.dtype}, which ckptstore does not know: view it as uint8.")


def _why_not(value: object, path: str) -> str:
    kind = type(value)
    what = f"{path or 'the state'} is a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")
    if isinstance(value, torch.Tensor):
        if kind.__name__ == "DTensor":
            return f"{what}: a distributed tensor is saved through torch.distributed.checkpoint; or save .full_tensor()."
        return f"{what}, a subclass of torch.Tensor that ckptstore does not know: save a plain tensor made from it."
    if isinstance(value, type) or callable(value):
        return (
            f"{path} is {value!r}, which cannot be saved without pickle. "
            "Save its parameters instead, or give it state_dict() and load_state_dict()."
        )
    if isinstance(value, tuple) or dataclasses.is_dataclass(value):
        return f"{what}: save a dict of its fields, or register it once with ckptstore.register({kind.__name__}, …)."
    for base in (bool, int, float, str, bytes, dict, list, set):
        if isinstance(value, base):
            return (
                f"{what}, a subclass of {base.__name__}: it would not come back as the same type. "
                f"Save {base.__name__}(…) of it, or register it with ckptstore.register({kind.__name__}, …)."
            )
    return (
        f"{what}, which ckptstore does not save. Give it state_dict() and load_state_dict(), save what it is made "
        f"of, or register it with ckptstore.register({kind.__name__}, …)."
    )


# ---- from JSON to Python


def unflatten(node: Any, supply: Callable[[TensorNode, str], Any], segment_bytes: list[int], path: str = "") -> Any:
    """The tree of a skeleton.

    Args:
        node: the skeleton, or a part of it.
        supply: returns the value of a tensor, given its description and its path.
        segment_bytes: length of each segment of the manifest, to check descriptions against.
        path: where `node` stands in the whole tree.

    Raises:
        CorruptError: the skeleton makes no sense.
        InvalidInputError: a type in it is not registered here; the text names it.
    """
    return _Unflattener(supply, segment_bytes).value(node, path, 0)


class _Unflattener:
    def __init__(self, supply: Callable[[TensorNode, str], Any], segment_bytes: list[int]) -> None:
        self.supply = supply
        self.segment_bytes = segment_bytes

    def value(self, node: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptError(f"{path} is nested deeper than {MAX_DEPTH} containers")
        if isinstance(node, list):
            return [self.value(item, join(path, index), depth + 1) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: self.value(item, join(path, key), depth + 1) for key, item in node.items()}
        if is_tensor(node):
            return self.supply(TensorNode.from_json(node, path, self.segment_bytes), path)
        if node[TAG] == "registered":
            return self.registered(node, path, depth)
        try:
            return self.tagged(node, path, depth)
        except (KeyError, TypeError, ValueError, OverflowError, struct.error, RuntimeError) as error:
            raise CorruptError(f"{path or 'the tree'}: the {node[TAG]!r} there cannot be read ({error})") from error

    def tagged(self, node: dict[str, Any], path: str, depth: int) -> Any:
        match node[TAG]:
            case "tuple":
                return tuple(self.value(node["items"], path, depth))
            case "deque":
                return deque(self.value(node["items"], path, depth), node["maxlen"])
            case "dict":
                return dict(self.items(node, path, depth))
            case "ordered_dict":
                ordered = OrderedDict(self.items(node, path, depth))
                if "metadata" in node:
                    ordered._metadata = self.value(node["metadata"], path, depth + 1)  # type: ignore[attr-defined]
                return ordered
            case "defaultdict":
                factory = None if node["factory"] is None else _FACTORIES[node["factory"]]
                return defaultdict(factory, self.items(node, path, depth))
            case "counter":
                return Counter(dict(self.items(node, path, depth)))
        return decode_hashable(node)

    def items(self, node: dict[str, Any], path: str, depth: int) -> list[tuple[Hashable, Any]]:
        return [
            (decode_hashable(key), self.value(item, join(path, simple_key(key)), depth + 1)) for key, item in node["items"]
        ]

    def registered(self, node: dict[str, Any], path: str, depth: int) -> Any:
        registration = _registered_names.get(node.get("name", ""))
        if registration is None:
            raise InvalidInputError(
                f"{path} is of a type saved under the name {node.get('name')!r}, which is not registered here: call "
                "ckptstore.register(…) with that name first, as the program that saved it did."
            )
        return registration.from_tree(self.value(node.get("tree"), path, depth + 1))


def decode_hashable(node: Any) -> Any:
    """The inverse of `encode_hashable` and `encode_value`. Raises ValueError, TypeError or KeyError for nonsense."""
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise ValueError("a list cannot stand here")
        return node
    match node[TAG]:
        case "tuple" | "set" | "frozenset" as tag:
            items = [decode_hashable(item) for item in node["items"]]
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)
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
        case "size":
            return torch.Size(node["items"])
        case "dtype":
            dtype = getattr(torch, node["name"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{node['name']!r} is no dtype")
            return dtype
        case "device":
            return torch.device(node["name"])
        case "scalar":
            return _scalar(node["dtype"], bytes.fromhex(node["hex"]))
    raise ValueError("no such tag")


def _scalar(dtype: str, content: bytes) -> Any:
    if numpy_item_bytes(dtype) != len(content):
        raise ValueError(f"{dtype!r} does not take {len(content)} bytes")
    return np.frombuffer(content, np.dtype(dtype))[0] if content else np.zeros(1, np.dtype(dtype))[0]
