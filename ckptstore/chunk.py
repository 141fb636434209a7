"""Chunk objects: the raw bytes of one piece of a checkpoint <-> the bytes of one object.

Knows the layout of the header (docs/format.md has the same table); knows nothing of storage or of tensors.
"""

import struct

import blake3
import numpy as np

from ckptstore.codec import Mode, Plane, decode_planes, encode_planes
from ckptstore.errors import CorruptError
from ckptstore.format import MAX_CHUNK_BYTES
from ckptstore.kernels import PLANE_WIDTHS, ByteArray

MAGIC = b"\x89CKPTCH\n"
CHUNK_VERSION = 1
FILTER_PLANES = 1

_HEADER = struct.Struct("<8sBBBB4sQ16s")
"""magic, version, filter, element size, number of planes, 4 zero bytes, raw length, checksum."""
_PLANE = struct.Struct("<B7sQ")
"""mode, 7 zero bytes, stored length."""
_NO_CHECKSUM = bytes(16)
_CHECKSUM_AT = _HEADER.size - len(_NO_CHECKSUM)


def digest(raw: ByteArray | bytes) -> str:
    """The name of a chunk: BLAKE3-256 of its raw bytes, in hex."""
    return blake3.blake3(raw if isinstance(raw, bytes) else raw.data).hexdigest()


def encode(raw: ByteArray, element_size: int) -> ByteArray:
    """The chunk object of `raw` (contiguous, 1 byte to 1 GiB), whose elements are `element_size` bytes wide."""
    assert 0 < len(raw) <= MAX_CHUNK_BYTES
    if element_size not in PLANE_WIDTHS or len(raw) % element_size:
        element_size = 1
    start = _HEADER.size + len(PLANE_WIDTHS[element_size]) * _PLANE.size
    content = np.empty(start + len(raw), np.uint8)
    planes = encode_planes(raw, element_size, content[start:])
    table = b"".join(_PLANE.pack(plane.mode, bytes(7), len(plane.stored)) for plane in planes)
    checksum = _checksum(_header(element_size, len(planes), len(raw), _NO_CHECKSUM) + table, planes)
    content[:start] = np.frombuffer(_header(element_size, len(planes), len(raw), checksum) + table, np.uint8)
    position = start
    for plane in planes:
        place = content[position : position + len(plane.stored)]
        if place.ctypes.data != plane.stored.ctypes.data:  # raw planes behind raw ones lie in their place already
            place[:] = plane.stored
        position += len(plane.stored)
    return content[:position]


def decode(content: bytes, expected_digest: str, out: ByteArray) -> None:
    """Write the raw bytes of the chunk object `content` into `out`, after checking that it is what was asked for.

    out: contiguous, as long as the raw bytes are expected to be. It may have been written to when this raises.
    Raises CorruptError if a single bit of the object is off.
    """
    raw_bytes, element_size, planes = _parse(content)
    if raw_bytes != len(out):
        raise CorruptError(f"the chunk holds {raw_bytes} raw bytes in place of {len(out)}")
    hasher = blake3.blake3()
    decode_planes(planes, element_size, out, lambda part: hasher.update(part.data))
    found = hasher.hexdigest()
    if found != expected_digest:
        raise CorruptError(f"its bytes hash to {found[:16]}… in place of {expected_digest[:16]}…")


def raw_length(content: bytes) -> int:
    """How many raw bytes a chunk object says that it holds (at most 1 GiB). Raises like `decode`."""
    return _parse(content)[0]


def _header(element_size: int, planes: int, raw_bytes: int, checksum: bytes) -> bytes:
    return _HEADER.pack(MAGIC, CHUNK_VERSION, FILTER_PLANES, element_size, planes, bytes(4), raw_bytes, checksum)


def _checksum(header: bytes, planes: list[Plane]) -> bytes:
    """Of the header and the compressed planes. Raw planes need none: the digest of the raw bytes covers them."""
    hasher = blake3.blake3(header)
    for plane in planes:
        if plane.mode is Mode.ZSTD:
            hasher.update(plane.stored.data)
    return hasher.digest(16)


def _parse(content: bytes) -> tuple[int, int, list[Plane]]:
    if content[:8] != MAGIC:
        raise CorruptError("it does not begin as a chunk does")
    if len(content) < _HEADER.size:
        raise CorruptError(f"it is cut off after {len(content)} bytes")
    _, version, filter_, element_size, plane_count, reserved, raw_bytes, checksum = _HEADER.unpack_from(content)
    # `chunks/` holds version 1 alone for ever (a later version gets a prefix of its own), so another one is damage.
    if (version, filter_) != (CHUNK_VERSION, FILTER_PLANES):
        raise CorruptError(f"its header says version {version}, filter {filter_}: chunks have 1 and 1")
    if any(reserved):
        raise CorruptError("its header uses bytes that are zero in version 1")
    if not plane_count or plane_count != len(PLANE_WIDTHS.get(element_size, ())):
        raise CorruptError(f"its header says {plane_count} planes for elements of {element_size} bytes")
    if not 0 < raw_bytes <= MAX_CHUNK_BYTES or raw_bytes % element_size:
        raise CorruptError(f"its header claims {raw_bytes} raw bytes")
    planes, start = _planes(content, plane_count)
    header = content[:_CHECKSUM_AT] + _NO_CHECKSUM + content[_HEADER.size : start]
    if _checksum(header, planes) != checksum:
        raise CorruptError("its checksum does not match its content")
    return raw_bytes, element_size, planes


def _planes(content: bytes, count: int) -> tuple[list[Plane], int]:
    """The stored planes, and where the first begins."""
    start = position = _HEADER.size + count * _PLANE.size
    if len(content) < start:
        raise CorruptError(f"it is cut off after {len(content)} bytes")
    planes = []
    everything = np.frombuffer(content, np.uint8)
    for index in range(count):
        mode, reserved, stored_bytes = _PLANE.unpack_from(content, _HEADER.size + index * _PLANE.size)
        if mode > max(Mode) or any(reserved) or stored_bytes > len(content) - position:
            raise CorruptError("its header names planes that are not in it")
        planes.append(Plane(Mode(mode), everything[position : position + stored_bytes]))
        position += stored_bytes
    if position != len(content):
        raise CorruptError(f"it has {len(content) - position} bytes too many")
    return planes, start
