"""From Python to JSON: a state tree becomes a skeleton and the list of the tensors in it."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptstore.errors import InvalidInputError
from ckptstore.skeleton import MAX_DEPTH, TAG, join, simple_key
from ckptstore.tree.refusals import check_array, check_tensor, why_not
from ckptstore.tree.registry import Registration, is_plain_tensor, is_stateful, registration_of
from ckptstore.tree.values import (
    MAX_EQUAL_HASHES,
    VALUE_TYPES,
    Hashes,
    encode_hashable,
    encode_scalar,
    encode_value,
    is_utf8,
)

MAX_INLINE_BYTES = 1024
"""Bytes objects longer than this go into chunks."""

FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}
"""What a defaultdict of a checkpoint can make, by name."""


@dataclass(slots=True)
class TensorLeaf:
    """A tensor found in a tree: its path, its value, and the skeleton's node, to be filled in by whoever stores it."""

    path: str
    value: "torch.Tensor | np.ndarray[Any, Any]"
    node: dict[str, Any]


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
        # By identity, the containers that are being walked right now: one that comes again contains itself.
        self.open: dict[int, str] = {}

    def node(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise InvalidInputError(f"{path} is nested deeper than {MAX_DEPTH} containers. Flatten it.")
        if id(value) in self.open:
            raise InvalidInputError(
                f"{path} is the same {type(value).__name__} as {self.open[id(value)] or 'the state'}, which contains "
                "it: what contains itself cannot be saved. Leave that reference out."
            )
        encoder = _ENCODERS.get(type(value))
        if encoder is None:
            encoder = _Flattener.encode_other
        elif type(value) in VALUE_TYPES:
            return encoder(self, value, path, depth)  # these hold nothing, and None or 0 stand in many places at once
        self.open[id(value)] = path
        try:
            return encoder(self, value, path, depth)
        finally:
            del self.open[id(value)]

    def encode_other(self, value: Any, path: str, depth: int) -> Any:
        if is_plain_tensor(value):
            return self.encode_tensor(value, path)
        registration = registration_of(value)
        if registration is not None:
            return self.encode_registered(value, registration, path, depth)
        if isinstance(value, np.generic):
            return encode_scalar(value, path)
        if is_stateful(value):
            try:
                tree = value.state_dict()
            except Exception as error:
                error.add_note(f"(raised by state_dict() of {path or 'the state'})")
                raise
            return self.node(tree, path, depth + 1)
        raise InvalidInputError(why_not(value, path))

    def encode_tensor(self, value: torch.Tensor, path: str) -> Any:
        check_tensor(value, path)
        return self.leaf(_materialised(value), path, {TAG: "tensor"})

    def encode_array(self, value: "np.ndarray[Any, Any]", path: str, depth: int) -> Any:
        check_array(value, path)
        return self.leaf(value, path, {TAG: "ndarray"})

    def encode_bytes(self, value: bytes, path: str, depth: int) -> Any:
        if len(value) <= MAX_INLINE_BYTES or not self.allow_tensors:
            return encode_value(value)
        return self.leaf(np.frombuffer(value, "|u1"), path, {TAG: "blob"})

    def leaf(self, value: "torch.Tensor | np.ndarray[Any, Any]", path: str, node: dict[str, Any]) -> Any:
        if not self.allow_tensors:
            raise InvalidInputError(
                f"{path} is a {type(value).__name__}: metrics and metadata hold small values. "
                "Put it into the state, or use .item() or .tolist()."
            )
        self.leaves.append(TensorLeaf(path, value, node))
        return node

    def encode_registered(self, value: Any, registration: Registration, path: str, depth: int) -> Any:
        try:
            tree = registration.to_tree(value)
        except Exception as error:
            raise InvalidInputError(
                f"{path or 'the state'} is a {type(value).__name__}, and the to_tree that was registered for it raised "
                f"{type(error).__name__}: {error}. Mend that function."
            ) from error
        return {TAG: "registered", "name": registration.name, "tree": self.node(tree, path, depth + 1)}

    def encode_list(self, value: list[Any], path: str, depth: int) -> Any:
        return self.members(value, path, depth)

    def members(self, value: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.node(item, join(path, index), depth + 1) for index, item in enumerate(value)]

    def encode_tuple(self, value: tuple[Any, ...], path: str, depth: int) -> Any:
        return {TAG: "tuple", "items": self.members(value, path, depth)}

    def encode_deque(self, value: "deque[Any]", path: str, depth: int) -> Any:
        return {TAG: "deque", "items": self.members(value, path, depth), "maxlen": value.maxlen}

    def encode_dict(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if all(type(key) is str and is_utf8(key) and not key.startswith(TAG) for key in value):
            return {key: self.node(item, join(path, key), depth + 1) for key, item in value.items()}
        return {TAG: "dict", "items": self.items(value, path, depth)}

    def items(self, value: dict[Any, Any], path: str, depth: int) -> list[Any]:
        items = []
        hashes = Hashes()
        for key, item in value.items():
            if not hashes.may_add(key):
                raise InvalidInputError(
                    f"{path or 'the state'}: more than {MAX_EQUAL_HASHES} keys have the same hash. Use a list of pairs."
                )
            encoded = encode_hashable(key, f"a key of {path or 'the state'}")
            items.append([encoded, self.node(item, join(path, simple_key(encoded)), depth + 1)])
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
        names = [name for name, known in FACTORIES.items() if known is factory]
        if factory is not None and not names:
            raise InvalidInputError(
                f"{path or 'the state'} is a defaultdict of {factory!r}, which cannot be saved without pickle. "
                f"Use a factory that is one of {', '.join(sorted(FACTORIES))}, or save dict(…) of it."
            )
        return {TAG: "defaultdict", "items": self.items(value, path, depth), "factory": names[0] if names else None}

    def encode_counter(self, value: "Counter[Any]", path: str, depth: int) -> Any:
        return {TAG: "counter", "items": self.items(value, path, depth)}

    def encode_set(self, value: set[Any] | frozenset[Any], path: str, depth: int) -> Any:
        return encode_hashable(value, path or "the state")

    def encode_value(self, value: Any, path: str, depth: int) -> Any:
        return encode_value(value)


def _materialised(value: torch.Tensor) -> torch.Tensor:
    """`value`; or a copy where its memory holds something else: its conjugate, its negative, or nothing (all zero)."""
    if not (value.is_conj() or value.is_neg() or torch._is_zerotensor(value)):
        return value
    copy = value.detach().clone().resolve_conj().resolve_neg()
    if type(value) is torch.nn.Parameter:
        return torch.nn.Parameter(copy, requires_grad=value.requires_grad)
    return copy.requires_grad_(value.requires_grad)


_ENCODERS: dict[type, Callable[[_Flattener, Any, str, int], Any]] = {
    **dict.fromkeys(VALUE_TYPES, _Flattener.encode_value),
    bytes: _Flattener.encode_bytes,
    list: _Flattener.encode_list,
    tuple: _Flattener.encode_tuple,
    dict: _Flattener.encode_dict,
    set: _Flattener.encode_set,
    frozenset: _Flattener.encode_set,
    OrderedDict: _Flattener.encode_ordered_dict,
    defaultdict: _Flattener.encode_defaultdict,
    Counter: _Flattener.encode_counter,
    deque: _Flattener.encode_deque,
    np.ndarray: _Flattener.encode_array,
}
