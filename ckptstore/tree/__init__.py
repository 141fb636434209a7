"""State trees in Python <-> skeletons in JSON, each leaf with its exact type. No pickle, no code from a store.

`flatten` takes a tree apart into a skeleton and the tensors in it; `unflatten` puts one together again from a
skeleton and a function that supplies the tensors. Neither knows of chunks or of storage.
"""

from ckptstore.tree.flatten import TensorLeaf, flatten
from ckptstore.tree.registry import is_plain_tensor, is_stateful, register, registration_named, registration_of
from ckptstore.tree.unflatten import decode_items, unflatten
from ckptstore.tree.values import MAX_JSON_INT, TORCH_DTYPES, decode_hashable, encode_hashable

__all__ = [
    "MAX_JSON_INT",
    "TORCH_DTYPES",
    "TensorLeaf",
    "decode_hashable",
    "decode_items",
    "encode_hashable",
    "flatten",
    "is_plain_tensor",
    "is_stateful",
    "register",
    "registration_named",
    "registration_of",
    "unflatten",
]
