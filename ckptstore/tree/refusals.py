"""Why a value cannot be saved, and what to save in its place. The texts that users meet before a byte is written."""

import collections.abc
import dataclasses
import enum
import math
import random
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from ckptstore.errors import InvalidInputError
from ckptstore.skeleton import MAX_TENSOR_BYTES, numpy_item_bytes
from ckptstore.tree.values import TORCH_DTYPES

MAX_DIMENSIONS = 64
MAX_EXTENT = 2**48
"""Of one dimension of a tensor. A skeleton does not hold more; see its TensorNode."""

_TENSOR_KINDS = {
    "DTensor": (
        "a distributed tensor is saved through torch.distributed.checkpoint, with "
        "ckptstore.integrations.dcp.CkptstoreWriter; or save .full_tensor()."
    ),
    "FakeTensor": "a fake tensor has no values: save the real one.",
    "UninitializedTensorMixin": (
        "it has no values yet: run one batch through the lazy module first, so that it gets its shape."
    ),
    "NestedTensor": "save .values() and .offsets() of the nested tensor.",
}
"""Name of a class of tensors (some are costly to import) -> what to do."""

_KINDS: tuple[tuple[Any, str], ...] = (
    (enum.Enum, "save its .name or its .value"),
    (np.ma.MaskedArray, "save its .data and its .mask"),
    (np.ndarray, "save numpy.asarray(…) of it"),
    (PurePath, "save str(…) of it"),
    ((bytearray, memoryview), "save bytes(…) of it"),
    (torch.Generator, "save its .get_state(); torch's default generators are in ckptstore.RngState()"),
    ((random.Random, np.random.RandomState), "save its state; the global one is in ckptstore.RngState()"),
    (np.random.Generator, "save its .bit_generator.state"),
    ((collections.abc.Iterator, collections.abc.MappingView, range), "save list(…) of it"),
)
"""Types that people do put into states -> what to do."""


def check_tensor(value: torch.Tensor, path: str) -> None:
    """Raises InvalidInputError unless the memory of `value` holds its values, in a form that a checkpoint can hold."""
    path = path or "the state"
    if value.is_nested:
        raise InvalidInputError(f"{path} is a nested tensor: save .unbind() of it, or .to_padded_tensor(…).")
    if value.layout is not torch.strided:
        raise InvalidInputError(f"{path} is a {value.layout} tensor: save .to_dense(), or its indices and values.")
    if value.is_quantized:
        raise InvalidInputError(f"{path} is a quantized tensor: save .int_repr() with its scale, or .dequantize().")
    if value.is_meta:
        raise InvalidInputError(f"{path} is a meta tensor, which has no values: materialise the module first.")
    if value.dtype not in TORCH_DTYPES.values():
        raise InvalidInputError(f"{path} has dtype {value.dtype}, which ckptstore does not know: view it as uint8.")
    if any(name is not None for name in getattr(value, "names", ())):  # gone from newer versions of torch
        raise InvalidInputError(f"{path} has named dimensions, which would be lost: save .rename(None).")
    _check_shape(value.shape, value.itemsize, path)
    if value.numel() and not _memory_bytes(value):
        raise InvalidInputError(
            f"{path} has no memory behind it (FSDP frees that of its parameters, for example; torch.vmap never gives "
            "any): save it elsewhere, or gather it first."
        )


def _check_shape(shape: Sequence[int], item_bytes: int, path: str) -> None:
    """Only what is expanded can be as large as this; a skeleton that says so is refused when it is read."""
    count = math.prod(max(size, 1) for size in shape)
    if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_EXTENT or count * item_bytes >= MAX_TENSOR_BYTES:
        raise InvalidInputError(
            f"{path} has a shape that no checkpoint holds (at most {MAX_DIMENSIONS} dimensions, each at most "
            f"{MAX_EXTENT}, and {MAX_TENSOR_BYTES} bytes): save a smaller view of its memory."
        )


def _memory_bytes(value: torch.Tensor) -> int:
    try:
        return value.untyped_storage().nbytes()
    except NotImplementedError:
        return 0


def check_array(value: "np.ndarray[Any, Any]", path: str) -> None:
    """Raises InvalidInputError unless the dtype of `value` is one that means the same on every machine."""
    if not value.dtype.itemsize:
        # NumPy itself makes such arrays hardly ever: zeros(2, "U0") has items of 4 bytes.
        raise InvalidInputError(
            f"{path or 'the state'} is a NumPy array of dtype {value.dtype!r}, whose items have no bytes. Convert it, "
            "for example .astype('<U1')."
        )
    if numpy_item_bytes(value.dtype.str) is None:
        raise InvalidInputError(
            f"{path or 'the state'} is a NumPy array of dtype {value.dtype}, which cannot be saved without pickle or "
            "is not the same on every machine. Convert it (for example .astype('float64')), or save its fields one by "
            "one."
        )
    _check_shape(value.shape, value.dtype.itemsize, path or "the state")


def why_not(value: object, path: str) -> str:
    """Why `value`, of a type that ckptstore does not save, is refused, and the way out."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    what = f"{path or 'the state'} is a {name}"
    registering = f"register it once with ckptstore.register({kind.__name__}, …)"
    if isinstance(value, torch.Tensor):
        for base in kind.__mro__:
            if base.__name__ in _TENSOR_KINDS:
                return f"{what}: {_TENSOR_KINDS[base.__name__]}"
        return f"{what}, a subclass of torch.Tensor: save a plain tensor made from it, or {registering}."
    for types, way_out in _KINDS:
        if isinstance(value, types):
            return f"{what}, which would not come back as the same type: {way_out}, or {registering}."
    if (isinstance(value, tuple) or dataclasses.is_dataclass(value)) and not isinstance(value, type):
        return f"{what}: save a dict of its fields, or {registering}."
    if isinstance(value, type) or callable(value):
        called = getattr(value, "__qualname__", "")
        return (
            f"{what}{f' ({called})' if called else ''}, which cannot be saved without pickle. "
            "Save its parameters instead, or give it state_dict() and load_state_dict()."
        )
    for base in (int, float, complex, str, bytes, dict, list, set, frozenset, collections.deque):
        if isinstance(value, base):
            return (
                f"{what}, a subclass of {base.__name__}: it would not come back as the same type. "
                f"Save {base.__name__}(…) of it, or {registering}."
            )
    return (
        f"{what}, which ckptstore does not save. Give it state_dict() and load_state_dict(), save what it is made of, "
        f"or {registering}."
    )
