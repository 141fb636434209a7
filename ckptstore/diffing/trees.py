"""What differs between the trees of two checkpoints, tensors' contents aside: from their manifests alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ckptstore.errors import CorruptError
from ckptstore.manifest import Manifest
from ckptstore.plain_values import is_container, to_json, type_name
from ckptstore.skeleton import MAX_DEPTH, TensorNode, children, is_tensor

__all__ = ["Change", "Pair", "compare_trees", "compare_values"]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two trees.

    Attributes:
        path: where, such as "optimizer.param_groups[0].lr".
        kind: "added", "removed", "type" (another type, shape or dtype, or another container), or "value".
        before: the value before as JSON holds it, and of a tensor or a container what it is; None for "added".
        after: the value after, likewise; None for "removed".
    """

    path: str
    kind: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that stands at one path of both trees, of one type, shape and dtype."""

    path: str
    before: TensorNode
    after: TensorNode


def compare_trees(before: Manifest, after: Manifest) -> tuple[list[Change], list[Pair]]:
    """The differences, in the order of the tree before and then of that after, and the tensors to compare.

    Raises:
        CorruptError: a tree is not one that a save could have made.
    """
    old, new = dict(_nodes(before)), dict(_nodes(after))
    changes: list[Change] = []
    pairs: list[Pair] = []
    for place, was in old.items():
        path, now = place[0], new.get(place)
        if now is None:
            changes += _one_sided(path, was, "removed")
        elif isinstance(was.node, TensorNode) and isinstance(now.node, TensorNode):
            changes += _of_tensors(path, was.node, now.node)
            if (was.node.tag, was.node.dtype, was.node.shape) == (now.node.tag, now.node.dtype, now.node.shape):
                pairs.append(Pair(path, was.node, now.node))
        elif was.type != now.type:
            changes.append(Change(path, "type", was.described, now.described))
        elif not was.members and not now.members and _encoded(was.node) != _encoded(now.node):
            changes.append(Change(path, "value", to_json(was.node), to_json(now.node)))
    for place, now in new.items():
        if place not in old:
            changes += _one_sided(place[0], now, "added")
    return changes, pairs


def compare_values(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The differences between two mappings of nodes, such as metrics."""
    changes = []
    for name in before | after:
        if name not in after:
            changes.append(Change(name, "removed", to_json(before[name]), None))
        elif name not in before:
            changes.append(Change(name, "added", None, to_json(after[name])))
        elif _encoded(before[name]) != _encoded(after[name]):
            changes.append(Change(name, "value", to_json(before[name]), to_json(after[name])))
    return changes


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of a tree, parsed if it is a tensor's, and how many stand in it, which tell of themselves."""

    node: Any
    members: int

    @property
    def type(self) -> str:
        return f"tensor {self.node.tag}" if isinstance(self.node, TensorNode) else type_name(self.node)

    @property
    def described(self) -> Any:
        """A tensor or a container in a few words; a value as it is."""
        if isinstance(self.node, TensorNode):
            return _tensor_text(self.node)
        return f"{self.type} of {self.members}" if is_container(self.node) else to_json(self.node)


def _nodes(manifest: Manifest) -> Iterator[tuple[tuple[str, int], _Node]]:
    """Every node of the tree by its path and by how many of that path come before it.

    Different keys can make one path: that "a.b" is a key, or "b" one below "a", is not seen in it.
    """
    lengths = manifest.segment_bytes
    seen: Counter[str] = Counter()
    stack: list[tuple[str, Any, int]] = [("", manifest.tree, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise CorruptError(f"{path} is nested deeper than {MAX_DEPTH} containers")
        below = children(node, path)
        parsed = TensorNode.from_json(node, path, lengths) if is_tensor(node) else node
        yield (path, seen[path]), _Node(parsed, len(below))
        seen[path] += 1
        stack += [(path_below, child, depth + 1) for path_below, child in reversed(below)]


def _encoded(node: Any) -> bytes:
    return msgspec.json.encode(node)


def _one_sided(path: str, node: _Node, kind: str) -> Iterator[Change]:
    """What is there on one side only; nothing for a container whose members tell of themselves."""
    if not node.members:
        text = node.described
        yield Change(path, kind, None if kind == "added" else text, text if kind == "added" else None)


def _of_tensors(path: str, before: TensorNode, after: TensorNode) -> Iterator[Change]:
    """What has changed of two tensors at one path but their elements."""
    old, new = _tensor_text(before), _tensor_text(after)
    if old != new:
        yield Change(path, "type", old, new)
    if before.requires_grad != after.requires_grad:
        yield Change(f"{path}.requires_grad", "value", before.requires_grad, after.requires_grad)


def _tensor_text(node: TensorNode) -> str:
    kind = {"tensor": "", "ndarray": "array ", "blob": "bytes "}[node.tag]
    return f"{kind}{node.dtype} {list(node.shape)}"
