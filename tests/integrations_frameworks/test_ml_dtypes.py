"""Arrays of the dtypes of ml_dtypes: every bit goes into a store and comes back."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import ckptstore
from ckptstore.extension_arrays import from_leaf, to_leaf

KNOWN_TO_TORCH = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
UNKNOWN_TO_TORCH = ["float8_e3m4", "float8_e4m3b11fnuz", "int4", "uint4", "float6_e2m3fn"]


@pytest.mark.parametrize("name", KNOWN_TO_TORCH + UNKNOWN_TO_TORCH)
def test_every_bit_pattern_comes_back(name: str, tmp_path: Path) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = np.arange(256**dtype.itemsize, dtype=f"u{dtype.itemsize}").reshape(16, -1)
    run = ckptstore.Store(tmp_path).run("dtypes")
    run.save({"array": to_leaf(bits.view(dtype))}, step=1)
    found = from_leaf(run.load()["array"])
    assert found.dtype == dtype
    assert found.shape == bits.shape
    assert found.tobytes() == bits.tobytes()


@pytest.mark.parametrize("name", KNOWN_TO_TORCH)
def test_what_torch_knows_is_a_tensor_of_that_dtype(name: str) -> None:
    leaf = to_leaf(np.ones((2, 3), getattr(ml_dtypes, name)))
    assert isinstance(leaf, torch.Tensor)
    assert leaf.dtype == getattr(torch, name)
    assert torch.equal(leaf.float(), torch.ones(2, 3))


def test_views_and_scalars_come_back() -> None:
    array = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    for part in (array.T, array[:, 1], array[1, 2:].reshape(())):
        found = from_leaf(to_leaf(part))
        assert (found.shape, found.tolist()) == (part.shape, part.tolist())


def test_equal_weights_of_torch_and_of_ml_dtypes_are_stored_once(tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path)
    values = torch.randn(200, 300).to(torch.bfloat16)
    store.run("torch").save({"weight": values}, step=1)
    array = values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert store.run("array").save({"weight": to_leaf(array)}, step=1).new_bytes == 0


def test_a_tensor_of_a_dtype_of_numpy_becomes_an_array() -> None:
    found = from_leaf(torch.tensor([1.5, -0.0]))
    assert found.dtype == np.float32
    assert found.tobytes() == np.array([1.5, -0.0], np.float32).tobytes()


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="'float7' is no dtype"):
        from_leaf({"dtype": "float7", "bits": np.zeros(2, "u1")})


def test_a_dtype_of_another_size_is_refused() -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="2 bytes an item here and 1"):
        from_leaf({"dtype": "bfloat16", "bits": np.zeros(2, "u1")})
