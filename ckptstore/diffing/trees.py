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
        if place not in new:
            changes += _one_sided(place[0], was, "removed")
            continue
        now = new[place]
        if isinstance(was, TensorNode) and isinstance(now, TensorNode):
            changes += _of_tensors(place[0], was, now)
            if (was.tag, was.dtype, was.shape) == (now.tag, now.dtype, now.shape):
                pairs.append(Pair(place[0], was, now))
        elif _type(was) != _type(now):
            changes.append(Change(place[0], "type", _described(was), _described(now)))
        elif not _holds(was) and not _holds(now) and _encoded(was) != _encoded(now):
            changes.append(Change(place[0], "value", to_json(was), to_json(now)))
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


def _nodes(manifest: Manifest) -> Iterator[tuple[tuple[str, int], Any]]:
    """Every node of the tree, tensors parsed, by its path and by how many of that path come before it.

    Different keys can make one path: that "a.b" is a key, or "b" one below "a", is not seen in it.
    """
    lengths = manifest.segment_bytes
    seen: Counter[str] = Counter()
    stack: list[tuple[str, Any, int]] = [("", manifest.tree, 0)]
    while stack:
        path, node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise CorruptError(f"{path} is nested deeper than {MAX_DEPTH} containers")
        yield (path, seen[path]), TensorNode.from_json(node, path, lengths) if is_tensor(node) else node
        seen[path] += 1
        if not is_tensor(node):
            stack += [(below, child, depth + 1) for below, child in reversed(children(node, path))]


def _holds(node: Any) -> bool:
    """Whether others stand in the node, which tell of themselves."""
    return isinstance(node, TensorNode) or bool(children(node, ""))


def _type(node: Any) -> str:
    return f"tensor {node.tag}" if isinstance(node, TensorNode) else type_name(node)


def _encoded(node: Any) -> bytes:
    return msgspec.json.encode(node)


def _one_sided(path: str, node: Any, kind: str) -> Iterator[Change]:
    """What is there on one side only; nothing for a container whose members tell of themselves."""
    if isinstance(node, TensorNode) or not children(node, ""):
        text = _described(node)
        yield Change(path, kind, None if kind == "added" else text, text if kind == "added" else None)


def _of_tensors(path: str, before: TensorNode, after: TensorNode) -> Iterator[Change]:
    """What has changed of two tensors at one path but their elements."""
    old, new = _described(before), _described(after)
    if old != new:
        yield Change(path, "type", old, new)
    if before.requires_grad != after.requires_grad:
        yield Change(f"{path}.requires_grad", "value", before.requires_grad, after.requires_grad)


def _described(node: Any) -> Any:
    """A tensor or a container in a few words; a value as it is."""
    if isinstance(node, TensorNode):
        kind = {"tensor": "", "ndarray": "array ", "blob": "bytes "}[node.tag]
        return f"{kind}{node.dtype} {list(node.shape)}"
    if is_container(node):
        return f"{type_name(node)} of {len(children(node, ''))}"
    return to_json(node)
