"""The hot loops: split elements into planes and merge them again, as they are or as differences to a base.

Knows nothing of compression. Planes halve the element from the top: 4-byte elements become a plane of their low 2
bytes, one of byte 2 and one of byte 3 (`PLANE_WIDTHS`). The low half of a float is noise that no compressor shortens,
so splitting it further would cost time for nothing (docs/decisions/0003-halving-planes.md).

Works in blocks that stay in the L2 cache, each of them handed to NumPy, or to the same loops compiled by Numba
(`compiled`), which are four times as fast and take most of a second to load
(docs/decisions/0010-kernels-in-numpy-and-numba.md).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptstore.kernels import compiled

__all__ = ["PLANE_WIDTHS", "ByteArray", "compiled", "merge", "split"]

Array = NDArray[np.unsignedinteger]
ByteArray = NDArray[np.uint8]

PLANE_WIDTHS: dict[int, tuple[int, ...]] = {1: (1,), 2: (1, 1), 4: (2, 1, 1), 8: (4, 2, 1, 1)}
"""Element size in bytes -> width in bytes of each plane, lowest bytes first."""

_UINT: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_BLOCK_BYTES = 2**18
"""What is worked on at a time: with its planes it stays in the L2 cache."""


def split(raw: ByteArray, element_size: int, planes: list[ByteArray], base: ByteArray | None = None) -> None:
    """Write each plane of `raw` into `planes[i]`.

    raw: contiguous bytes, a multiple of `element_size` (1, 2, 4 or 8).
    planes: one contiguous byte array a plane, of `len(raw) // element_size * width` bytes.
    base: as long as `raw`. If given, the planes are those of the zigzag-coded differences: with d the element minus
        that of `base`, modulo the element's range, 2·d for d ≥ 0 and -2·d - 1 for d < 0 (d taken as signed), so that
        small steps up and down have zeros in the upper planes.
    """
    kernels = compiled.loaded()
    elements: Array = raw.view(_UINT[element_size])
    typed = _typed(planes, len(elements), element_size)
    bases = None if base is None else _as_long(base, raw).view(_UINT[element_size])
    step = _BLOCK_BYTES // element_size
    coded = None if base is None else np.empty(min(step, len(elements)), _UINT[element_size])
    for start in range(0, len(elements), step):
        stop = min(start + step, len(elements))
        block: Array = elements[start:stop]
        if bases is not None and coded is not None:
            kernels.zigzag(block, bases[start:stop], coded[: stop - start])
            block = coded[: stop - start]
        kernels.split(block, [plane[start:stop] for plane in typed])


def merge(
    planes: list[ByteArray],
    element_size: int,
    raw: ByteArray,
    written: Callable[[ByteArray], object] = lambda part: None,
    base: ByteArray | None = None,
) -> None:
    """The inverse of `split`: write the elements whose planes are given into `raw` (contiguous bytes).

    `written` is called with each part of `raw` in order, while it is still in a cache: to hash it.
    """
    kernels = compiled.loaded()
    elements: Array = raw.view(_UINT[element_size])
    typed = _typed(planes, len(elements), element_size)
    bases = None if base is None else _as_long(base, raw).view(_UINT[element_size])
    step = _BLOCK_BYTES // element_size
    for start in range(0, len(elements), step):
        stop = min(start + step, len(elements))
        block = elements[start:stop]
        kernels.merge([plane[start:stop] for plane in typed], block)
        if bases is not None:
            kernels.undo_zigzag(block, bases[start:stop])
        written(raw[start * element_size : stop * element_size])


def _typed(planes: list[ByteArray], count: int, element_size: int) -> list[Array]:
    """The planes as numbers of their widths. A plane of another length would be read or written beyond its end."""
    typed = [plane.view(_UINT[width]) for plane, width in zip(planes, PLANE_WIDTHS[element_size], strict=True)]
    if any(len(plane) != count for plane in typed):
        raise ValueError(f"planes of {[len(plane) for plane in typed]} numbers for {count} elements")
    return typed


def _as_long(base: ByteArray, raw: ByteArray) -> ByteArray:
    if len(base) != len(raw):
        raise ValueError(f"a base of {len(base)} bytes for {len(raw)}")
    return base
