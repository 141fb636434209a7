"""How far numbers have moved: elements of any type that a checkpoint holds, as bytes, to sums that add up.

Sums are taken in double precision, block by block, so that little is held. Bits tell whether an element has changed;
an element that is not finite before or after counts for no sum.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptstore.kernels import ByteArray

__all__ = ["Elements", "Moved"]

_BLOCK_ELEMENTS = 2**16
"""Of which a block of doubles takes half a MiB: with its temporaries it stays in the L2 cache."""

_NATIVE = {
    "bool": "u1",
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
}
"""torch's dtypes that NumPy has as well."""


@dataclass(slots=True)
class Moved:
    """Sums over elements before (b) and after (a); `+=` joins those of two parts of a tensor."""

    elements: int = 0
    changed: int = 0
    """Elements with other bits."""
    before_squared: float = 0.0
    after_squared: float = 0.0
    product: float = 0.0
    delta_squared: float = 0.0
    largest: float = 0.0
    new_nan: int = 0
    new_inf: int = 0

    def __iadd__(self, other: "Moved") -> "Moved":
        self.elements += other.elements
        self.changed += other.changed
        self.before_squared += other.before_squared
        self.after_squared += other.after_squared
        self.product += other.product
        self.delta_squared += other.delta_squared
        self.largest = max(self.largest, other.largest)
        self.new_nan += other.new_nan
        self.new_inf += other.new_inf
        return self

    @property
    def relative_l2(self) -> float | None:
        """‖a - b‖ / ‖b‖; infinite if b is all zero and a is not; None if the sums are too large for doubles."""
        if not self.delta_squared:
            return 0.0
        if not self.before_squared:
            return math.inf
        ratio = self.delta_squared / self.before_squared
        return math.sqrt(ratio) if math.isfinite(ratio) else None

    @property
    def cosine(self) -> float | None:
        """a·b / (‖a‖ ‖b‖), from -1 to 1; None if one of them is all zero, or the sums are too large for doubles."""
        if not self.delta_squared:
            return 1.0
        lengths = math.sqrt(self.before_squared) * math.sqrt(self.after_squared)
        ratio = self.product / lengths if lengths else math.nan
        return max(-1.0, min(1.0, ratio)) if math.isfinite(ratio) else None


class Elements:
    """The elements of one type: how wide they are, and what numbers their bytes are."""

    def __init__(self, dtype: str, item_bytes: int, *, is_torch: bool) -> None:
        """`dtype`: torch's name ("bfloat16") or NumPy's type string ("<f4")."""
        self._dtype = dtype
        self._item_bytes = item_bytes
        self._native = _native(dtype, is_torch=is_torch)
        self.are_numbers = self._native is not None or dtype in ("bfloat16", "complex32") or dtype.startswith("float8")
        """False for text, times and packed types, of which only whether they have changed is told."""

    def compare(self, before: ByteArray, after: ByteArray) -> Moved:
        """What has moved between as many elements before and after, as contiguous bytes."""
        found = Moved()
        step = _BLOCK_ELEMENTS * self._item_bytes
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(before), step):
                found += self._compare(before[start : start + step], after[start : start + step])
        return found

    def unchanged(self, both: ByteArray) -> Moved:
        """What there is to say of elements that are the same before and after: how long they are."""
        found = Moved()
        step = _BLOCK_ELEMENTS * self._item_bytes
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(both), step):
                block = both[start : start + step]
                found.elements += len(block) // self._item_bytes
                if self.are_numbers:
                    values = self._values(block)
                    squared = _squared(values[np.isfinite(values)])
                    found += Moved(before_squared=squared, after_squared=squared, product=squared)
        return found

    def _compare(self, before: ByteArray, after: ByteArray) -> Moved:
        found = Moved(len(before) // self._item_bytes, self._count_changed(before, after))
        if not self.are_numbers:
            return found
        old, new = self._values(before), self._values(after)
        finite = np.isfinite(old) & np.isfinite(new)
        if not finite.all():
            found.new_nan = int(np.count_nonzero(np.isnan(new) & ~np.isnan(old)))
            found.new_inf = int(np.count_nonzero(np.isinf(new) & ~np.isinf(old)))
            old, new = old[finite], new[finite]
        found.before_squared, found.after_squared = _squared(old), _squared(new)
        found.product = float(np.vdot(old, new).real)
        new -= old
        found.delta_squared = _squared(new)
        found.largest = float(np.abs(new).max(initial=0.0))
        return found

    def _count_changed(self, before: ByteArray, after: ByteArray) -> int:
        width = next(width for width in (8, 4, 2, 1) if self._item_bytes % width == 0)
        differ = before.view(f"u{width}") != after.view(f"u{width}")
        per_element = self._item_bytes // width
        return int(np.count_nonzero(differ.reshape(-1, per_element).any(axis=1) if per_element > 1 else differ))

    def _values(self, content: ByteArray) -> "NDArray[Any]":
        """The elements as doubles, or complex doubles, in memory of their own."""
        if self._native is not None:
            return content.view(self._native).astype(np.complex128 if self._native.kind == "c" else np.float64)
        if self._dtype == "bfloat16":  # the upper half of a float32
            return (content.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        if self._dtype == "complex32":
            return content.view("<f2").astype(np.float64).view(np.complex128)
        return _float8_values(self._dtype)[content]


def _native(dtype: str, *, is_torch: bool) -> "np.dtype[Any] | None":
    if is_torch:
        return np.dtype(_NATIVE[dtype]) if dtype in _NATIVE else None
    found = np.dtype(dtype)
    if found.kind == "b":
        return np.dtype("u1")
    return found if found.kind in "iufc" else None


def _squared(values: "NDArray[Any]") -> float:
    return float(np.vdot(values, values).real)


@cache
def _float8_values(dtype: str) -> "NDArray[np.float64]":
    """What each of the 256 bytes stands for."""
    import torch  # the only one here that knows them

    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values: NDArray[np.float64] = every.view(getattr(torch, dtype)).to(torch.float64).numpy()
    return values
