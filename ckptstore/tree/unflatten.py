"""From JSON to Python: a skeleton, and a function that supplies the tensors, become a state tree.

Whoever wrote the skeleton: what makes no sense is a CorruptError, and nothing runs but what was registered here.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from ckptstore.errors import CorruptError, InvalidInputError, UnsupportedFormatError
from ckptstore.skeleton import MAX_DEPTH, TAG, TensorNode, join, shown, simple_key
from ckptstore.tree.flatten import FACTORIES
from ckptstore.tree.registry import registration_named
from ckptstore.tree.values import MAX_EQUAL_HASHES, TORCH_DTYPES, Hashes, decode_hashable


def unflatten(
    node: Any,
    supply: Callable[[TensorNode, str], Any],
    segment_bytes: Sequence[int],
    path: str = "",
    *,
    describe: bool = False,
) -> Any:
    """The tree of a skeleton.

    Args:
        node: the skeleton, or a part of it.
        supply: returns the value of a tensor, given its description and its path.
        segment_bytes: length of each segment of the manifest, to check descriptions against.
        path: where `node` stands in the whole tree.
        describe: the tree is to be looked at, not used, and `supply` returns placeholders. A value of a registered
            type is given as the tree that it was saved as, and need not be registered here.

    Raises:
        CorruptError: the skeleton makes no sense.
        InvalidInputError: a type in it is not registered here, or its from_tree failed; the text names it.
        UnsupportedFormatError: this torch lacks a dtype or a device in it.
        What `supply` raises, as it is.
    """
    return _Unflattener(supply, segment_bytes, describe).value(node, path, 0)


class _Unflattener:
    def __init__(self, supply: Callable[[TensorNode, str], Any], segment_bytes: Sequence[int], describe: bool) -> None:
        self.supply = supply
        self.segment_bytes = segment_bytes
        self.describe = describe

    # Errors of `supply` and of a from_tree pass through all of this: no try may stand around a call of value().
    def value(self, node: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptError(f"{path} is nested deeper than {MAX_DEPTH} containers")
        if isinstance(node, list):
            return [self.value(item, join(path, index), depth + 1) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: self.value(item, join(path, key), depth + 1) for key, item in node.items()}
        match node[TAG]:
            case "tensor" | "ndarray" | "blob":
                return self.tensor(node, path)
            case "registered":
                return self.registered(node, path, depth)
            case "tuple":
                return tuple(self.members(node, path, depth))
            case "deque":
                return self.deque(node, path, depth)
            case "dict":
                return self.items(node, path, depth)
            case "ordered_dict":
                return self.ordered_dict(node, path, depth)
            case "defaultdict":
                return self.defaultdict(node, path, depth)
            case "counter":
                return Counter(self.items(node, path, depth))
        return decode_hashable(node, path)

    def tensor(self, node: dict[str, Any], path: str) -> Any:
        found = TensorNode.from_json(node, path, self.segment_bytes)
        if not self.describe:
            _check_dtype(found, path)
        return self.supply(found, path)

    def registered(self, node: dict[str, Any], path: str, depth: int) -> Any:
        name = node.get("name")
        if not isinstance(name, str) or "tree" not in node:
            _refuse(node, path, "it lacks its name or its tree")
        registration = registration_named(name)
        if registration is None and not self.describe:
            raise InvalidInputError(
                f"{path or 'the tree'} is of a type saved under the name {name!r}, which is not registered here: call "
                "ckptstore.register(…) with that name first, as the program that saved it did."
            )
        tree = self.value(node["tree"], path, depth + 1)
        if registration is None or self.describe:
            return tree
        try:
            return registration.from_tree(tree)
        except Exception as error:
            raise InvalidInputError(
                f"{path or 'the tree'} was saved under the name {name!r}, and the from_tree that is registered for it "
                f"raised {type(error).__name__}: {error}. Let it read what its to_tree once wrote."
            ) from error

    def members(self, node: dict[str, Any], path: str, depth: int) -> list[Any]:
        items = node.get("items")
        if not isinstance(items, list):
            _refuse(node, path, "its items are no list")
        return [self.value(item, join(path, index), depth + 1) for index, item in enumerate(items)]

    def deque(self, node: dict[str, Any], path: str, depth: int) -> "deque[Any]":
        members = self.members(node, path, depth)
        maxlen = node.get("maxlen")
        if maxlen is not None and (type(maxlen) is not int or not len(members) <= maxlen < 2**63):
            _refuse(node, path, f"it has {len(members)} members and room for {shown(maxlen)}")
        return deque(members, maxlen)

    def items(self, node: dict[str, Any], path: str, depth: int) -> dict[Hashable, Any]:
        return {
            key: self.value(item, join(path, simple_key(key_node)), depth + 1)
            for key, (key_node, item) in decode_items(node, path).items()
        }

    def ordered_dict(self, node: dict[str, Any], path: str, depth: int) -> "OrderedDict[Hashable, Any]":
        ordered = OrderedDict(self.items(node, path, depth))
        if "metadata" in node:
            metadata = self.value(node["metadata"], f"{path}._metadata", depth + 1)
            ordered._metadata = metadata  # type: ignore[attr-defined]
        return ordered

    def defaultdict(self, node: dict[str, Any], path: str, depth: int) -> "defaultdict[Hashable, Any]":
        name = node.get("factory")
        if name is not None and (not isinstance(name, str) or name not in FACTORIES):
            _refuse(node, path, f"its factory {shown(name)} is none that it can have")
        return defaultdict(None if name is None else FACTORIES[name], self.items(node, path, depth))


def decode_items(node: dict[str, Any], path: str) -> dict[Hashable, tuple[Any, Any]]:
    """The members of a dict with any keys: by key, the node of the key and that of the member. Raises CorruptError."""
    pairs = node.get("items")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        _refuse(node, path, "its items are no pairs")
    found: dict[Hashable, tuple[Any, Any]] = {}
    hashes = Hashes()
    for key_node, item in pairs:
        key = decode_hashable(key_node, f"a key of {path or 'the tree'}")
        try:
            if not hashes.may_add(key):
                _refuse(node, path, f"more than {MAX_EQUAL_HASHES} keys have the same hash")
        except TypeError:
            _refuse(node, path, "a key cannot be one")
        found[key] = (key_node, item)
    if len(found) != len(pairs):
        _refuse(node, path, "a key stands twice")
    return found


def _refuse(node: dict[str, Any], path: str, why: str) -> NoReturn:
    raise CorruptError(f"{path or 'the tree'}: the {node[TAG]!r} there cannot be read ({why})")


def _check_dtype(node: TensorNode, path: str) -> None:
    """Raises unless torch and NumPy have the dtype of `node`, so that no `supply` need look."""
    if node.tag != "tensor":
        try:
            np.dtype(node.dtype)
        except (TypeError, ValueError) as error:
            raise CorruptError(f"{path} has dtype {node.dtype!r}, which NumPy does not have") from error
    elif node.dtype not in TORCH_DTYPES:
        raise UnsupportedFormatError(
            f"{path} has dtype {node.dtype}, which torch {torch.__version__} lacks: install a newer torch."
        )
