"""The loops over one block, in NumPy: wide casts and shifts, which it vectorises, rather than strided byte copies.

Those are 1.1 to 3 times as slow, by machine (docs/decisions/0003-halving-planes.md).
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.unsignedinteger]

_WIDER: dict[int, np.dtype[Any]] = {1: np.dtype("<u2"), 2: np.dtype("<u4"), 4: np.dtype("<u8")}
_NARROWER: dict[int, np.dtype[Any]] = {2: np.dtype("<u1"), 4: np.dtype("<u2"), 8: np.dtype("<u4")}


class _Scratch(threading.local):
    """Arrays of one thread, used again for every block."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, np.dtype[Any]], Array] = {}

    def array(self, name: str, dtype: "np.dtype[Any]", length: int) -> Array:
        found = self._arrays.get((name, dtype))
        if found is None or len(found) < length:
            found = self._arrays[name, dtype] = np.empty(length, dtype)
        return found[:length]


_scratch = _Scratch()


def split(elements: Array, planes: list[Array]) -> None:
    """Write the planes of `elements`, lowest bytes first."""
    rest = elements
    for number, plane in enumerate(planes[:-1]):
        # A cast to a narrower unsigned integer keeps the low bytes; the shift drops them.
        np.copyto(plane, rest, casting="unsafe")
        shifted = _scratch.array("shifted", rest.dtype, len(rest))
        np.right_shift(rest, 8 * plane.dtype.itemsize, out=shifted)
        half = _scratch.array(f"half {number}", _NARROWER[rest.dtype.itemsize], len(rest))
        np.copyto(half, shifted, casting="unsafe")
        rest = half
    planes[-1][:] = rest


def merge(planes: list[Array], elements: Array) -> None:
    """The inverse of `split`."""
    high = planes[-1]
    for plane in reversed(planes[:-1]):
        width = plane.dtype.itemsize
        wider = _WIDER[width]
        wide = elements if wider.itemsize == elements.dtype.itemsize else _scratch.array("high", wider, len(elements))
        low = _scratch.array("low", wider, len(elements))
        np.copyto(wide, high)
        np.left_shift(wide, 8 * width, out=wide)
        np.copyto(low, plane)
        np.bitwise_or(wide, low, out=wide)
        high = wide
    if high is not elements:
        elements[:] = high


def zigzag(elements: Array, bases: Array, coded: Array) -> None:
    """Write the zigzag-coded differences of `elements` to `bases` into `coded`."""
    top = 8 * elements.dtype.itemsize - 1
    sign = _scratch.array("sign", elements.dtype, len(elements))
    np.subtract(elements, bases, out=coded)
    np.right_shift(coded, top, out=sign)
    np.negative(sign, out=sign)  # all ones where the difference is negative
    np.left_shift(coded, 1, out=coded)
    np.bitwise_xor(coded, sign, out=coded)


def undo_zigzag(elements: Array, bases: Array) -> None:
    """The inverse of `zigzag`, in the place of the coded differences."""
    sign = _scratch.array("sign", elements.dtype, len(elements))
    np.bitwise_and(elements, 1, out=sign)
    np.negative(sign, out=sign)
    np.right_shift(elements, 1, out=elements)
    np.bitwise_xor(elements, sign, out=elements)
    np.add(elements, bases, out=elements)
