"""Chunk objects: the raw bytes of one piece of a checkpoint <-> the bytes of one object, in full or as a delta.

Knows the layout of the header (docs/format.md has the same table); knows nothing of storage or of tensors.
"""

import struct
from dataclasses import dataclass

import blake3
import numpy as np

from ckptstore.codec import Mode, Plane, Sampled, as_it_is, decode_planes
from ckptstore.errors import CorruptError
from ckptstore.format import MAX_CHUNK_BYTES, MAX_OVERHEAD_BYTES, Codec
from ckptstore.kernels import PLANE_WIDTHS, ByteArray

MAGIC = b"\x89CKPTCH\n"
DELTA_MAGIC = b"\x89CKPTDL\n"
CHUNK_VERSION = 1
FILTER_PLANES = 1
FILTER_ZIGZAG_PLANES = 2
DELTA_PAYS = 0.9
"""A delta is kept only where a sample of it takes less than this part of what a sample of the full chunk takes."""

_HEADER = struct.Struct("<8sBBBB4sQ16s")
"""magic, version, filter, element size, number of planes, 4 zero bytes, raw length, checksum."""
_BASE = struct.Struct("<32s")
"""In a delta, behind the header: the digest of its base."""
_PLANE = struct.Struct("<B7sQ")
"""mode, 7 zero bytes, stored length."""
_NO_CHECKSUM = bytes(16)
_CHECKSUM_AT = _HEADER.size - len(_NO_CHECKSUM)


@dataclass(frozen=True, slots=True)
class Base:
    """The chunk that a delta is the difference to: its digest in hex, and its raw bytes."""

    digest: str
    raw: ByteArray


def digest(raw: ByteArray | bytes) -> str:
    """The name of a chunk: BLAKE3-256 of its raw bytes, in hex."""
    return blake3.blake3(raw if isinstance(raw, bytes) else raw.data).hexdigest()


def encode(raw: ByteArray, element_size: int, codec: Codec = "fast") -> ByteArray:
    """The chunk object of `raw` (contiguous, 1 byte to 1 GiB), whose elements are `element_size` bytes wide."""
    if codec == "none":
        return _assemble([as_it_is(raw)], 1, len(raw), None, np.empty(_start(1, None) + len(raw), np.uint8))
    return _encode(Sampled(raw, _fitting(raw, element_size)), None)


def encode_over(raw: ByteArray, element_size: int, base: Base, *, if_any: bool = False) -> tuple[ByteArray, bool]:
    """The object of `raw` as a delta to a base of the same length, or in full where that is not clearly larger.

    if_any: also where the delta is just somewhat smaller.

    Returns the object, and whether it is a delta.
    """
    element_size = _fitting(raw, element_size)
    full, delta = Sampled(raw, element_size), Sampled(raw, element_size, base.raw)
    if delta.shrinks_to > (1.0 if if_any else DELTA_PAYS) * full.shrinks_to:
        return _encode(full, None), False
    return _encode(delta, base), True


def decode(content: bytes, expected_digest: str | None, out: ByteArray, base: Base | None = None) -> None:
    """Write the raw bytes of the chunk object `content` into `out`, after checking that it is what was asked for.

    expected_digest: None if the caller compares something made of `out` with its own digest later.
    out: contiguous, as long as the raw bytes are expected to be. It may have been written to when this raises.
    base: for a delta, and only for one.
    Raises CorruptError if a single bit of the object is off.
    """
    parsed = _parse(content)
    if parsed.raw_bytes != len(out):
        raise CorruptError(f"the chunk holds {parsed.raw_bytes} raw bytes in place of {len(out)}")
    base_digest = None if base is None else base.digest
    if parsed.base_digest != base_digest:
        raise CorruptError(f"its base is {_short(parsed.base_digest)} in place of {_short(base_digest)}")
    if base is not None and len(base.raw) != len(out):
        raise CorruptError(f"its base has {len(base.raw)} bytes in place of {len(out)}")
    base_raw = None if base is None else base.raw
    if expected_digest is None:
        decode_planes(parsed.planes, parsed.element_size, out, base=base_raw)
        return
    hasher = blake3.blake3()
    decode_planes(parsed.planes, parsed.element_size, out, lambda part: hasher.update(part.data), base_raw)
    found = hasher.hexdigest()
    if found != expected_digest:
        raise CorruptError(f"its bytes hash to {_short(found)} in place of {_short(expected_digest)}")


def raw_length(content: bytes) -> int:
    """How many raw bytes a chunk object says that it holds (at most 1 GiB). Raises like `decode`.

    Checks all that can be checked without the base of a delta: not the raw planes, which only the digest covers.
    """
    return _parse(content).raw_bytes


def is_delta(content: bytes) -> bool:
    return content[: len(DELTA_MAGIC)] == DELTA_MAGIC


def _short(name: str | None) -> str:
    return "none" if name is None else f"{name[:16]}…"


def _fitting(raw: ByteArray, element_size: int) -> int:
    assert 0 < len(raw) <= MAX_CHUNK_BYTES
    return 1 if element_size not in PLANE_WIDTHS or len(raw) % element_size else element_size


def _encode(sampled: Sampled, base: Base | None) -> ByteArray:
    start = _start(sampled.element_size, base)
    content = np.empty(start + len(sampled.raw), np.uint8)
    planes = sampled.encode_planes(content[start:])
    return _assemble(planes, sampled.element_size, len(sampled.raw), base, content)


def _start(element_size: int, base: Base | None) -> int:
    """Where the first plane begins."""
    return _HEADER.size + (0 if base is None else _BASE.size) + len(PLANE_WIDTHS[element_size]) * _PLANE.size


def _assemble(
    planes: list[Plane], element_size: int, raw_bytes: int, base: Base | None, content: ByteArray
) -> ByteArray:
    """Put header, table and planes into `content`; return the part of it that they take."""
    start = _start(element_size, base)
    fields = (element_size, len(planes), raw_bytes)
    rest = b"" if base is None else _BASE.pack(bytes.fromhex(base.digest))
    rest += b"".join(_PLANE.pack(plane.mode, bytes(7), len(plane.stored)) for plane in planes)
    checksum = _checksum(_header(*fields, _NO_CHECKSUM, is_delta=base is not None) + rest, planes)
    content[:start] = np.frombuffer(_header(*fields, checksum, is_delta=base is not None) + rest, np.uint8)
    position = start
    for plane in planes:
        place = content[position : position + len(plane.stored)]
        if place.ctypes.data != plane.stored.ctypes.data:  # raw planes behind raw ones lie in their place already
            place[:] = plane.stored
        position += len(plane.stored)
    return content[:position]


def _header(element_size: int, planes: int, raw_bytes: int, checksum: bytes, *, is_delta: bool) -> bytes:
    magic, filter_ = (DELTA_MAGIC, FILTER_ZIGZAG_PLANES) if is_delta else (MAGIC, FILTER_PLANES)
    return _HEADER.pack(magic, CHUNK_VERSION, filter_, element_size, planes, bytes(4), raw_bytes, checksum)


def _checksum(header: bytes, planes: list[Plane]) -> bytes:
    """Of the header and the compressed planes. Raw planes need none: the digest of the raw bytes covers them."""
    hasher = blake3.blake3(header)
    for plane in planes:
        if plane.mode is Mode.ZSTD:
            hasher.update(plane.stored.data)
    return hasher.digest(16)


@dataclass(frozen=True, slots=True)
class _Parsed:
    raw_bytes: int
    element_size: int
    base_digest: str | None
    planes: list[Plane]


def _parse(content: bytes) -> _Parsed:
    if content[:8] not in (MAGIC, DELTA_MAGIC):
        raise CorruptError("it does not begin as a chunk does")
    table_at = _HEADER.size + (_BASE.size if is_delta(content) else 0)
    if len(content) < table_at:
        raise CorruptError(f"it is cut off after {len(content)} bytes")
    _, version, filter_, element_size, plane_count, reserved, raw_bytes, checksum = _HEADER.unpack_from(content)
    expected = (CHUNK_VERSION, FILTER_ZIGZAG_PLANES if is_delta(content) else FILTER_PLANES)
    # Each prefix holds one version for ever (a later one gets a prefix of its own), so another one is damage.
    if (version, filter_) != expected:
        raise CorruptError(f"its header says version {version}, filter {filter_} in place of {expected}")
    if any(reserved):
        raise CorruptError("its header uses bytes that are zero in version 1")
    if not plane_count or plane_count != len(PLANE_WIDTHS.get(element_size, ())):
        raise CorruptError(f"its header says {plane_count} planes for elements of {element_size} bytes")
    if not 0 < raw_bytes <= MAX_CHUNK_BYTES or raw_bytes % element_size:
        raise CorruptError(f"its header claims {raw_bytes} raw bytes")
    planes, start = _planes(content, table_at, plane_count)
    header = content[:_CHECKSUM_AT] + _NO_CHECKSUM + content[_HEADER.size : start]
    if _checksum(header, planes) != checksum:
        raise CorruptError("its checksum does not match its content")
    if len(content) > raw_bytes + MAX_OVERHEAD_BYTES + table_at - _HEADER.size:
        raise CorruptError(f"it has {len(content)} bytes, more than {raw_bytes} raw bytes ever take")
    base_digest = content[_HEADER.size : table_at].hex() if is_delta(content) else None
    return _Parsed(raw_bytes, element_size, base_digest, planes)


def _planes(content: bytes, table_at: int, count: int) -> tuple[list[Plane], int]:
    """The stored planes, and where the first begins."""
    start = position = table_at + count * _PLANE.size
    if len(content) < start:
        raise CorruptError(f"it is cut off after {len(content)} bytes")
    planes = []
    everything = np.frombuffer(content, np.uint8)
    for index in range(count):
        mode, reserved, stored_bytes = _PLANE.unpack_from(content, table_at + index * _PLANE.size)
        if mode > max(Mode) or any(reserved) or stored_bytes > len(content) - position:
            raise CorruptError("its header names planes that are not in it")
        planes.append(Plane(Mode(mode), everything[position : position + stored_bytes]))
        position += stored_bytes
    if position != len(content):
        raise CorruptError(f"it has {len(content) - position} bytes too many")
    return planes, start
