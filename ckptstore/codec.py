"""Raw bytes <-> encoded planes: what pays is compressed with zstd, what does not is stored as it is.

Knows planes and zstd; knows nothing of chunk headers, digests or storage.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import zstandard

from ckptstore.errors import CorruptError
from ckptstore.kernels import PLANE_WIDTHS, ByteArray, merge, split

_SAMPLE_SLICES = 8
_SAMPLE_ELEMENTS = 2048
_PAYS = 0.97
"""A plane whose sample does not shrink to this is stored raw."""


class Mode(IntEnum):
    """How a plane is stored."""

    RAW = 0
    ZSTD = 1
    ZERO = 2
    """Every byte of the plane is zero; nothing is stored."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One stored plane: its mode, and its bytes as they stand in the chunk."""

    mode: Mode
    stored: ByteArray


class _Zstd(threading.local):
    """zstd contexts of one thread; they are not to be shared between threads.

    Both settings match only long repeats and leave the rest to entropy coding, which is what exponents need. A
    tiny hash table is better for weights, a larger one for Adam's moments (measured, docs/decisions/0003).
    """

    def __init__(self) -> None:
        self.compressors = [
            zstandard.ZstdCompressor(
                compression_params=zstandard.ZstdCompressionParameters(
                    window_log=18,
                    hash_log=hash_log,
                    chain_log=6,
                    search_log=1,
                    min_match=7,
                    target_length=0,
                    strategy=1,
                    write_content_size=True,
                )
            )
            for hash_log in (6, 10)
        ]
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)


_zstd = _Zstd()


class Sampled:
    """What a few slices of some raw bytes tell of how to encode all of them.

    raw: a multiple of `element_size` bytes, not empty.
    base: if given, what is encoded is the difference to it.
    """

    def __init__(self, raw: ByteArray, element_size: int, base: ByteArray | None = None) -> None:
        self.raw = raw
        self.element_size = element_size
        self.base = base
        self._plans = [_plan(plane) for plane in _sample(raw, element_size, base)]

    @property
    def shrinks_to(self) -> float:
        """What part of their length the bytes are likely to take."""
        return sum(plan.stored for plan in self._plans) / sum(plan.sampled for plan in self._plans)

    def encode_planes(self, room: ByteArray | None = None) -> list[Plane]:
        """Split the raw bytes and compress the planes for which it pays.

        room: memory as long as `raw`. Planes that are stored raw lie in it, each where it would if all were raw.
        """
        room = np.empty(len(self.raw), np.uint8) if room is None else room
        count = len(self.raw) // self.element_size
        widths = PLANE_WIDTHS[self.element_size]
        planes = np.split(room, [count * sum(widths[:number]) for number in range(1, len(widths))])
        split(self.raw, self.element_size, planes, self.base)
        return [_encode(plane, plan) for plane, plan in zip(planes, self._plans, strict=True)]


def as_it_is(raw: ByteArray) -> Plane:
    """All of `raw` as one plane of single bytes, uncompressed."""
    return Plane(Mode.RAW, raw) if raw.any() else Plane(Mode.ZERO, raw[:0])


def decode_planes(
    planes: list[Plane],
    element_size: int,
    out: ByteArray,
    written: Callable[[ByteArray], object] = lambda part: None,
    base: ByteArray | None = None,
) -> None:
    """Write the raw bytes of `planes` into `out`, whose length says how many. Raises CorruptError.

    `written` is called with each part of `out`, in order, when it is final.
    Allocates no more than `out` holds (and blocks of a fixed size), whatever the planes claim.
    """
    count = len(out) // element_size
    decoded = [_decode(plane, count * width) for plane, width in zip(planes, PLANE_WIDTHS[element_size], strict=True)]
    merge(decoded, element_size, out, written, base)


def _sample(raw: ByteArray, element_size: int, base: ByteArray | None) -> list[ByteArray]:
    """The planes of a few slices of `raw`, taken at even distances."""
    raw = _slices(raw, element_size)
    planes = [np.empty(len(raw) // element_size * width, np.uint8) for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes, None if base is None else _slices(base, element_size))
    return planes


def _slices(raw: ByteArray, element_size: int) -> ByteArray:
    length = _SAMPLE_ELEMENTS * element_size
    if len(raw) <= _SAMPLE_SLICES * length:
        return raw
    starts = np.linspace(0, len(raw) // element_size - _SAMPLE_ELEMENTS, _SAMPLE_SLICES, dtype=np.int64) * element_size
    return np.concatenate([raw[start : start + length] for start in starts])


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to encode a plane, going by a sample of it."""

    sampled: int
    stored: int
    compressor: int | None
    """Which of the settings; None: it does not pay."""


def _plan(sample: ByteArray) -> _Plan:
    if not sample.any():
        return _Plan(len(sample), 0, 0)
    sizes = [len(compressor.compress(sample.data)) for compressor in _zstd.compressors]
    best = min(sizes)
    if best > _PAYS * len(sample):
        return _Plan(len(sample), len(sample), None)
    return _Plan(len(sample), best, sizes.index(best))


def _encode(plane: ByteArray, plan: _Plan) -> Plane:
    if not plan.stored and not plane.any():
        return Plane(Mode.ZERO, plane[:0])
    if plan.compressor is None:
        return Plane(Mode.RAW, plane)
    stored = _zstd.compressors[plan.compressor].compress(plane.data)
    if len(stored) > _PAYS * len(plane):
        return Plane(Mode.RAW, plane)
    return Plane(Mode.ZSTD, np.frombuffer(stored, np.uint8))


def _decode(plane: Plane, length: int) -> ByteArray:
    if plane.mode is Mode.ZERO:
        if len(plane.stored):
            raise CorruptError(f"a plane of zeros has {len(plane.stored)} bytes")
        return np.zeros(length, np.uint8)
    if plane.mode is Mode.RAW:
        if len(plane.stored) != length:
            raise CorruptError(f"a raw plane has {len(plane.stored)} bytes in place of {length}")
        return plane.stored
    try:
        if zstandard.get_frame_parameters(plane.stored.data).content_size != length:
            raise CorruptError(f"a compressed plane does not hold {length} bytes")
        content = _zstd.decompressor.decompress(plane.stored.data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"a compressed plane cannot be read: {error}") from error
    if len(content) != length:
        raise CorruptError(f"a compressed plane holds {len(content)} bytes in place of {length}")
    return np.frombuffer(content, np.uint8)
