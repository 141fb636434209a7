"""Arrays of the small floats and integers that NumPy itself lacks, as TensorFlow, Keras and JAX hand them out.

They belong to the package ml_dtypes, and say of themselves that they are raw bytes. A checkpoint holds them as tensors
where torch has the same dtype, which keeps its name and lets each program that reads the store know it; else as their
bits, with the name beside them. Both ways every bit comes back.
"""

from typing import Any

import numpy as np
import torch

from ckptstore.errors import InvalidInputError
from ckptstore.skeleton import numpy_item_bytes
from ckptstore.tree import TORCH_DTYPES

__all__ = ["from_leaf", "to_leaf"]

_DTYPE, _BITS = "dtype", "bits"


def to_leaf(array: "np.ndarray[Any, Any]") -> Any:
    """What to put into a state for an array.

    Args:
        array: of NumPy's own dtypes or of ml_dtypes'.

    Returns:
        The array itself, if a checkpoint can hold it; or a tensor; or a dict of its dtype's name and its bits.

    Raises:
        InvalidInputError: its items are Python objects.
    """
    if numpy_item_bytes(array.dtype.str) is not None:
        return array
    if array.dtype.hasobject or array.dtype.names or array.dtype.itemsize not in (1, 2, 4, 8):
        raise InvalidInputError(f"an array of {array.dtype} cannot be saved without pickle. Save numbers or bytes.")
    bits = np.array(array, order="C").view(f"u{array.dtype.itemsize}")  # a copy: torch takes what it may write to
    name = array.dtype.name
    if name in TORCH_DTYPES:
        return torch.from_numpy(bits).view(TORCH_DTYPES[name])
    return {_DTYPE: name, _BITS: bits}


def from_leaf(leaf: Any) -> "np.ndarray[Any, Any]":
    """The array that `to_leaf` was given.

    Raises:
        InvalidInputError: `leaf` is no such thing, or its dtype is not known here.
    """
    if isinstance(leaf, np.ndarray):
        return leaf
    if isinstance(leaf, torch.Tensor):
        name = str(leaf.dtype).removeprefix("torch.")
        bits = leaf.detach().cpu().contiguous().view(getattr(torch, f"uint{8 * leaf.itemsize}")).numpy()
    elif isinstance(leaf, dict) and leaf.keys() == {_DTYPE, _BITS} and isinstance(leaf[_BITS], np.ndarray):
        name, bits = str(leaf[_DTYPE]), leaf[_BITS]
    else:
        raise InvalidInputError(f"a {type(leaf).__name__} stands where an array was saved.")
    return bits.view(_dtype_named(name, bits.dtype.itemsize))


def _dtype_named(name: str, item_bytes: int) -> "np.dtype[Any]":
    """A dtype of ml_dtypes, or one of NumPy's own, for a tensor that torch has saved."""
    import ml_dtypes

    try:
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise InvalidInputError(f"{name!r} is no dtype that this ml_dtypes knows: install a newer one.") from error
    if found.itemsize != item_bytes:
        raise InvalidInputError(f"{name!r} has {found.itemsize} bytes an item here and {item_bytes} in the checkpoint.")
    return found
