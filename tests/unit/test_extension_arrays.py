"""Arrays on their way into a state, as far as NumPy's own dtypes go; tests/integrations_frameworks has the others."""

from typing import Any

import numpy as np
import pytest

from ckptstore import InvalidInputError
from ckptstore.extension_arrays import from_leaf, to_leaf


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "|b1", "<U3", "<c8"])
def test_an_array_of_a_dtype_of_numpy_stays_as_it_is(dtype: str) -> None:
    array = np.zeros((2, 3), dtype)
    assert to_leaf(array) is array
    assert from_leaf(array) is array


@pytest.mark.parametrize("array", [np.array([object()]), np.zeros(2, [("a", "i4")])], ids=["objects", "fields"])
def test_what_is_no_number_is_refused(array: "np.ndarray[Any, Any]") -> None:
    with pytest.raises(InvalidInputError, match="cannot be saved without pickle"):
        to_leaf(array)


def test_what_was_no_array_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="a list stands where an array was saved"):
        from_leaf([1, 2])
