"""The loops over one block, compiled by Numba: the same bytes as `with_numpy`, at the speed of the memory.

Importing this compiles them, or loads them from the cache that Numba keeps on disk; `compiled` does it when it pays.
All of them release the interpreter lock. Inputs may be read-only, and anything may lie at an odd address.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

Array = NDArray[np.unsignedinteger]

_UINTS = (types.uint8, types.uint16, types.uint32, types.uint64)


def _in(number: Any) -> Any:
    return types.Array(number, 1, "C", readonly=True, aligned=False)


def _out(number: Any) -> Any:
    return types.Array(number, 1, "C", readonly=False, aligned=False)


_U1, _U2, _U4, _U8 = _UINTS
_compile: dict[str, Any] = {"nogil": True, "cache": True}


@njit([types.void(_in(number), _in(number), _out(number)) for number in _UINTS], **_compile)
def zigzag(elements: Any, bases: Any, coded: Any) -> None:
    """Write the zigzag-coded differences of `elements` to `bases` into `coded`."""
    uint = elements.dtype.type
    top = uint(8 * elements.itemsize - 1)
    for i in range(coded.shape[0]):
        difference = uint(elements[i] - bases[i])
        coded[i] = uint(uint(difference << uint(1)) ^ uint(uint(0) - uint(difference >> top)))


@njit([types.void(_out(number), _in(number)) for number in _UINTS], **_compile)
def undo_zigzag(elements: Any, bases: Any) -> None:
    """The inverse of `zigzag`, in the place of the coded differences."""
    uint = elements.dtype.type
    for i in range(elements.shape[0]):
        coded = elements[i]
        difference = uint(uint(coded >> uint(1)) ^ uint(uint(0) - uint(coded & uint(1))))
        elements[i] = uint(bases[i] + difference)


@njit(types.void(_in(_U2), _out(_U1), _out(_U1)), **_compile)
def _split_2(elements: Any, low: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        element = elements[i]
        low[i] = np.uint8(element)
        top[i] = np.uint8(element >> np.uint16(8))


@njit(types.void(_in(_U4), _out(_U2), _out(_U1), _out(_U1)), **_compile)
def _split_4(elements: Any, low: Any, middle: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        element = elements[i]
        low[i] = np.uint16(element)
        middle[i] = np.uint8(element >> np.uint32(16))
        top[i] = np.uint8(element >> np.uint32(24))


@njit(types.void(_in(_U8), _out(_U4), _out(_U2), _out(_U1), _out(_U1)), **_compile)
def _split_8(elements: Any, low: Any, middle: Any, high: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        element = elements[i]
        low[i] = np.uint32(element)
        middle[i] = np.uint16(element >> np.uint64(32))
        high[i] = np.uint8(element >> np.uint64(48))
        top[i] = np.uint8(element >> np.uint64(56))


@njit(types.void(_out(_U2), _in(_U1), _in(_U1)), **_compile)
def _merge_2(elements: Any, low: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        elements[i] = np.uint16(low[i]) | np.uint16(np.uint16(top[i]) << np.uint16(8))


@njit(types.void(_out(_U4), _in(_U2), _in(_U1), _in(_U1)), **_compile)
def _merge_4(elements: Any, low: Any, middle: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        elements[i] = (
            np.uint32(low[i])
            | np.uint32(np.uint32(middle[i]) << np.uint32(16))
            | np.uint32(np.uint32(top[i]) << np.uint32(24))
        )


@njit(types.void(_out(_U8), _in(_U4), _in(_U2), _in(_U1), _in(_U1)), **_compile)
def _merge_8(elements: Any, low: Any, middle: Any, high: Any, top: Any) -> None:
    for i in range(elements.shape[0]):
        elements[i] = (
            np.uint64(low[i])
            | (np.uint64(middle[i]) << np.uint64(32))
            | (np.uint64(high[i]) << np.uint64(48))
            | (np.uint64(top[i]) << np.uint64(56))
        )


_SPLIT: dict[int, Any] = {2: _split_2, 4: _split_4, 8: _split_8}
_MERGE: dict[int, Any] = {2: _merge_2, 4: _merge_4, 8: _merge_8}


def split(elements: Array, planes: list[Array]) -> None:
    """Write the planes of `elements`, lowest bytes first."""
    if len(planes) == 1:
        planes[0][:] = elements
    else:
        _SPLIT[elements.dtype.itemsize](elements, *planes)


def merge(planes: list[Array], elements: Array) -> None:
    """The inverse of `split`."""
    if len(planes) == 1:
        elements[:] = planes[0]
    else:
        _MERGE[elements.dtype.itemsize](elements, *planes)
