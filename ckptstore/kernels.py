"""The hot loops: split elements into planes and merge them again. NumPy only; knows nothing of compression.

Planes halve the element from the top: 4-byte elements become a plane of their low 2 bytes, one of byte 2 and one of
byte 3 (`PLANE_WIDTHS`). The low half of a float is noise that no compressor shortens, so splitting it further would
cost time for nothing. Wide integer casts and shifts are what NumPy vectorises: 1.1 to 3 times as fast as strided byte
copies, by machine (docs/decisions/0003-halving-planes.md).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.unsignedinteger]
ByteArray = NDArray[np.uint8]

PLANE_WIDTHS: dict[int, tuple[int, ...]] = {1: (1,), 2: (1, 1), 4: (2, 1, 1), 8: (4, 2, 1, 1)}
"""Element size in bytes -> width in bytes of each plane, lowest bytes first."""

_UINT: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_BLOCK = 65536
"""Elements worked on at a time: the temporaries stay in the L2 cache."""


def split(raw: ByteArray, element_size: int, planes: list[ByteArray]) -> None:
    """Write each plane of `raw` into `planes[i]`.

    raw: contiguous bytes, a multiple of `element_size` (1, 2, 4 or 8).
    planes: one contiguous byte array a plane, of `len(raw) // element_size * width` bytes.
    """
    if element_size == 1:
        planes[0][:] = raw
        return
    elements: Array = raw.view(_UINT[element_size])
    typed = _typed(planes, element_size)
    for start in range(0, len(elements), _BLOCK):
        rest: Array = elements[start : start + _BLOCK]
        stop = start + len(rest)
        for plane in typed[:-1]:
            # A cast to a narrower unsigned integer keeps the low bytes; the shift drops them.
            np.copyto(plane[start:stop], rest, casting="unsafe")
            bits = 8 * plane.dtype.itemsize
            half: Array = np.empty(len(rest), _UINT[rest.dtype.itemsize // 2])
            np.copyto(half, rest >> rest.dtype.type(bits), casting="unsafe")
            rest = half
        typed[-1][start:stop] = rest


def merge(
    planes: list[ByteArray],
    element_size: int,
    raw: ByteArray,
    written: Callable[[ByteArray], object] = lambda part: None,
) -> None:
    """The inverse of `split`: write the elements whose planes are given into `raw` (contiguous bytes).

    `written` is called with each part of `raw` in order, while it is still in a cache: to hash it.
    """
    if element_size == 1:
        raw[:] = planes[0]
        written(raw)
        return
    elements: Array = raw.view(_UINT[element_size])
    typed = _typed(planes, element_size)
    scratch = {plane.dtype.itemsize: np.empty(_BLOCK, _UINT[2 * plane.dtype.itemsize]) for plane in typed}
    highs = {plane.dtype.itemsize: np.empty(_BLOCK, _UINT[2 * plane.dtype.itemsize]) for plane in typed}
    for start in range(0, len(elements), _BLOCK):
        stop = min(start + _BLOCK, len(elements))
        high: Array = typed[-1][start:stop]
        for plane in reversed(typed[:-1]):
            width = plane.dtype.itemsize
            wide = elements[start:stop] if 2 * width == element_size else highs[width][: stop - start]
            low = scratch[width][: stop - start]
            np.copyto(wide, high)
            np.left_shift(wide, 8 * width, out=wide)
            np.copyto(low, plane[start:stop])
            np.bitwise_or(wide, low, out=wide)
            high = wide
        written(raw[start * element_size : stop * element_size])


def _typed(planes: list[ByteArray], element_size: int) -> list[Array]:
    return [plane.view(_UINT[width]) for plane, width in zip(planes, PLANE_WIDTHS[element_size], strict=True)]
