"""The keys under which torch.distributed.checkpoint knows the leaves of a tree, and what it has to know of each.

DCP makes one flat dict of nested ones: mappings are opened, whatever their type, and so are lists that hold tensors or
mappings; the keys on the way are joined by dots. The same is done here with the tree of a manifest.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptstore.errors import UnsupportedFormatError
from ckptstore.manifest import Manifest
from ckptstore.skeleton import MAPPING_TAGS, TAG, TensorNode, is_tensor
from ckptstore.tree import TORCH_DTYPES, decode_items

KeyPath = tuple[str | int, ...]


class Keys:
    """Every key of a manifest's tree: the leaves, and the containers around them."""

    def __init__(self, manifest: Manifest) -> None:
        self.leaves: dict[str, Any] = {}
        """Node by key."""
        self.containers: dict[str, Any] = {}
        self.paths: dict[str, KeyPath] = {}
        """By key of a leaf: how to come to it."""
        self._lengths = manifest.segment_bytes
        shared: set[str] = set()
        for path, node, is_leaf in _walk(manifest.tree):
            key = ".".join(map(str, path))
            if not is_leaf:
                self.containers.setdefault(key, node)
            elif key not in self.leaves:
                self.leaves[key], self.paths[key] = node, path
            else:
                shared.add(key)
        for key in shared:  # DCP could not tell which is meant: to it, neither is there
            del self.leaves[key], self.paths[key]

    def node(self, key: str) -> Any:
        """The node under a key."""
        return self.leaves[key] if key in self.leaves else self.containers[key]

    def tensor(self, key: str) -> TensorNode | None:
        """The description of a tensor; None for what DCP takes for a value."""
        node: Any = self.leaves.get(key)
        return TensorNode.from_json(node, key, self._lengths) if _is_torch_tensor(node) else None

    def metadata(self) -> Metadata:
        """What DCP's planners look at."""
        entries = _Entries(self.containers)
        for key in self.leaves:
            found = self.tensor(key)
            entries[key] = BytesStorageMetadata() if found is None else _tensor_metadata(found, key)
        return Metadata(state_dict_metadata=entries, planner_data=dict(self.paths))


class _Entries(dict[str, "TensorStorageMetadata | BytesStorageMetadata"]):
    """The leaves; and, for a planner that does not flatten and asks for them by name, the containers as values."""

    def __init__(self, containers: dict[str, Any]) -> None:
        super().__init__()
        self._containers = containers

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._containers

    def __missing__(self, key: str) -> BytesStorageMetadata:
        if key in self._containers:
            return BytesStorageMetadata()
        raise KeyError(key)


def _tensor_metadata(node: TensorNode, key: str) -> TensorStorageMetadata:
    """However a tensor is stored, it is one chunk here: the planner then asks for just the boxes that it needs."""
    dtype = TORCH_DTYPES.get(node.dtype)
    if dtype is None:
        raise UnsupportedFormatError(
            f"{key} has dtype {node.dtype}, which torch {torch.__version__} lacks: install a newer torch."
        )
    size = torch.Size(node.shape)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype, requires_grad=node.requires_grad),
        size=size,
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)],
    )


def _walk(tree: Any) -> Iterator[tuple[KeyPath, Any, bool]]:
    """Path and node of everything below the root, and whether it is a leaf to DCP."""
    open_containers = [_members((), tree)]
    while open_containers:
        found = next(open_containers[-1], None)
        if found is None:
            open_containers.pop()
            continue
        path, node = found
        is_leaf = _is_leaf(node)
        yield path, node, is_leaf
        if not is_leaf:
            open_containers.append(_members(path, node))


def _members(path: KeyPath, node: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(node, list):
        return (((*path, index), below) for index, below in enumerate(node))
    if not _is_mapping(node):
        return iter([((*path, ""), node)])  # the state itself was a tensor, or a number
    if TAG not in node:
        return (((*path, key), below) for key, below in node.items())
    return (((*path, str(key)), below) for key, (_, below) in decode_items(node, ".".join(map(str, path))).items())


def _is_mapping(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    tag = node.get(TAG)
    return TAG not in node or (isinstance(tag, str) and tag in MAPPING_TAGS)


def _is_leaf(node: Any) -> bool:
    if _is_mapping(node):
        return False
    # Lists in lists are looked through; no deeper than a tree may be, which the walk of a load checks.
    level = [node] if isinstance(node, list) else []
    while level:
        inside = list(itertools.chain.from_iterable(level))
        if any(_is_mapping(each) or _is_torch_tensor(each) for each in inside):
            return False
        level = [each for each in inside if isinstance(each, list)]
    return True


def _is_torch_tensor(node: Any) -> bool:
    return is_tensor(node) and node[TAG] == "tensor"
