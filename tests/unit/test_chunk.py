"""Chunk objects: every flipped bit and every missing or added byte is seen, and hostile headers get nowhere."""

import struct

import blake3
import numpy as np
import pytest
import zstandard

from ckptstore import chunk
from ckptstore.chunk import decode, digest, encode, raw_length
from ckptstore.codec import Mode
from ckptstore.errors import CorruptError
from ckptstore.format import MAX_CHUNK_BYTES
from ckptstore.kernels import PLANE_WIDTHS, ByteArray

HEADER_BYTES, PLANE_BYTES, CHECKSUM_AT = 40, 16, 24


def noise(count: int) -> ByteArray:
    return np.random.default_rng(7).integers(0, 256, count, np.uint8)


def repetitive(count: int) -> ByteArray:
    return np.tile(np.arange(1, 9, dtype=np.uint8), count // 8 + 1)[:count].copy()


def zeros(count: int) -> ByteArray:
    return np.zeros(count, np.uint8)


def decoded(content: bytes, name: str, length: int) -> bytes:
    out = np.full(length, 0xEE, np.uint8)
    decode(content, name, out)
    return out.tobytes()


def sealed(header: bytes, stored: bytes = b"", *, hashed: bytes = b"") -> bytes:
    """A chunk of any header and table (its checksum 16 zero bytes) and planes, with a checksum that is right."""
    checksum = blake3.blake3(header + hashed).digest(16)
    return header[:CHECKSUM_AT] + checksum + header[HEADER_BYTES:] + stored


def header(
    *planes: tuple[int, bytes, int],
    magic: bytes = b"\x89CKPTCH\n",
    version: int = 1,
    filter_: int = 1,
    element_size: int = 1,
    count: int | None = None,
    reserved: bytes = bytes(4),
    raw_bytes: int = 4,
) -> bytes:
    numbers = bytes([version, filter_, element_size, len(planes) if count is None else count])
    table = b"".join(struct.pack("<B7sQ", *plane) for plane in planes)
    return magic + numbers + reserved + struct.pack("<Q", raw_bytes) + bytes(16) + table


RAW_4 = (0, bytes(7), 4)
KINDS = {
    f"{kind.__name__}-{size}": (kind(64 * size), size) for kind in (noise, repetitive, zeros) for size in PLANE_WIDTHS
}
kinds = pytest.mark.parametrize(("raw", "element_size"), KINDS.values(), ids=KINDS)


def test_the_kinds_below_have_planes_of_every_mode_at_every_element_size() -> None:
    found = {
        (size, content[HEADER_BYTES + PLANE_BYTES * number])
        for raw, size in KINDS.values()
        for content in [encode(raw, size)]
        for number in range(content[11])
    }
    assert found == {(size, mode) for size in PLANE_WIDTHS for mode in Mode}


@kinds
def test_a_chunk_is_decoded_to_the_bytes_that_were_encoded(raw: ByteArray, element_size: int) -> None:
    content = encode(raw, element_size).tobytes()
    assert decoded(content, digest(raw), len(raw)) == raw.tobytes()
    assert raw_length(content) == len(raw)


@kinds
def test_every_flipped_bit_is_seen(raw: ByteArray, element_size: int) -> None:
    content, name = encode(raw, element_size).tobytes(), digest(raw)
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(CorruptError):
                decoded(bytes(flipped), name, len(raw))


@kinds
def test_every_truncation_is_seen(raw: ByteArray, element_size: int) -> None:
    content, name = encode(raw, element_size).tobytes(), digest(raw)
    for length in range(len(content)):
        with pytest.raises(CorruptError):
            decoded(content[:length], name, len(raw))


@kinds
def test_every_added_byte_is_seen(raw: ByteArray, element_size: int) -> None:
    content, name = encode(raw, element_size).tobytes(), digest(raw)
    for added in (b"\0", b"x", content):
        with pytest.raises(CorruptError, match="bytes too many"):
            decoded(content + added, name, len(raw))


def test_another_whole_chunk_in_its_place_is_seen() -> None:
    raw, other = noise(64), noise(65)[1:]
    with pytest.raises(CorruptError, match=f"hash to {digest(other)[:16]}… in place of {digest(raw)[:16]}…"):
        decoded(encode(other, 4).tobytes(), digest(raw), 64)


def test_a_chunk_of_another_length_is_not_decoded() -> None:
    raw = noise(64)
    for length in (0, 63, 65):
        with pytest.raises(CorruptError, match=f"holds 64 raw bytes in place of {length}"):
            decoded(encode(raw, 4).tobytes(), digest(raw), length)


@pytest.mark.parametrize("element_size", [0, 3, 5, 16, -1, 4])
def test_elements_that_do_not_fit_are_taken_as_single_bytes(element_size: int) -> None:
    raw = noise(61)
    content = encode(raw, element_size).tobytes()
    assert content[10] == 1
    assert decoded(content, digest(raw), 61) == raw.tobytes()


def test_the_name_does_not_depend_on_how_the_bytes_are_encoded() -> None:
    raw = repetitive(64)
    contents = {encode(raw, size).tobytes() for size in PLANE_WIDTHS}
    assert len(contents) == len(PLANE_WIDTHS)
    assert {decoded(content, digest(raw.tobytes()), 64) for content in contents} == {raw.tobytes()}


def test_no_chunk_is_longer_than_its_bytes_and_its_header() -> None:
    for size, planes in PLANE_WIDTHS.items():
        for raw in (noise(8 * size), noise(size)):
            assert len(encode(raw, size)) <= HEADER_BYTES + PLANE_BYTES * len(planes) + len(raw)


def test_nothing_is_no_chunk() -> None:
    with pytest.raises(AssertionError):
        encode(zeros(0), 1)


# ---- headers that nobody of us wrote, with checksums that are right


def test_a_header_made_by_hand_is_read() -> None:
    assert decoded(sealed(header(RAW_4), b"abcd"), digest(b"abcd"), 4) == b"abcd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as a chunk does"),
        (b"\x89CKPTCH\n", "cut off after 8 bytes"),
        (sealed(header(RAW_4, magic=b"\x89CKPTCH\r"), b"abcd"), "does not begin as a chunk does"),
        (sealed(header(RAW_4, version=0), b"abcd"), "version 0, filter 1"),
        (sealed(header(RAW_4, version=2), b"abcd"), "version 2, filter 1"),
        (sealed(header(RAW_4, filter_=0), b"abcd"), "version 1, filter 0"),
        (sealed(header(RAW_4, filter_=2), b"abcd"), "version 1, filter 2"),
        (sealed(header(RAW_4, element_size=0), b"abcd"), "1 planes for elements of 0 bytes"),
        (sealed(header(RAW_4, element_size=3), b"abcd"), "1 planes for elements of 3 bytes"),
        (sealed(header(RAW_4, element_size=4), b"abcd"), "1 planes for elements of 4 bytes"),
        (sealed(header(RAW_4, element_size=16), b"abcd"), "1 planes for elements of 16 bytes"),
        (sealed(header(element_size=16), b""), "0 planes for elements of 16 bytes"),
        (sealed(header(RAW_4, RAW_4), b"abcdabcd"), "2 planes for elements of 1 bytes"),
        (sealed(header(RAW_4, count=255), b"abcd"), "255 planes"),
        (sealed(header(RAW_4, reserved=b"\0\0\0\1"), b"abcd"), "bytes that are zero in version 1"),
        (sealed(header(RAW_4, raw_bytes=0), b"abcd"), "claims 0 raw bytes"),
        (sealed(header(RAW_4, raw_bytes=MAX_CHUNK_BYTES + 1), b"abcd"), "claims 1073741825 raw bytes"),
        (sealed(header(RAW_4, raw_bytes=2**64 - 1), b"abcd"), "claims 18446744073709551615 raw bytes"),
        (sealed(header(RAW_4, RAW_4, element_size=2, raw_bytes=7), b"abcdabcd"), "claims 7 raw bytes"),
        (sealed(header((0, b"\0\0\0\0\0\0\1", 4)), b"abcd"), "planes that are not in it"),
        (sealed(header((3, bytes(7), 4)), b"abcd"), "planes that are not in it"),
        (sealed(header((255, bytes(7), 4)), b"abcd"), "planes that are not in it"),
        (sealed(header((0, bytes(7), 5)), b"abcd"), "planes that are not in it"),
        (sealed(header((0, bytes(7), 2**64 - 1)), b"abcd"), "planes that are not in it"),
        (sealed(header((0, bytes(7), 3)), b"abcd"), "1 bytes too many"),
        (sealed(header((0, bytes(7), 3)), b"abc"), "a raw plane has 3 bytes in place of 4"),
        (sealed(header((2, bytes(7), 4)), bytes(4)), "a plane of zeros has 4 bytes"),
        (sealed(header((1, bytes(7), 4)), b"abcd", hashed=b"abcd"), "cannot be read"),
        (sealed(header((1, bytes(7), 4)), b"abcd"), "checksum"),
    ],
)
def test_a_header_that_makes_no_sense_is_corrupt(content: bytes, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        decoded(content, digest(b"abcd"), 4)


def test_lengths_that_add_up_only_modulo_64_bits_are_corrupt() -> None:
    wrapping = [(0, bytes(7), 2), (0, bytes(7), 2**64 - 2)]
    with pytest.raises(CorruptError, match="planes that are not in it"):
        decoded(sealed(header(*wrapping, element_size=2, raw_bytes=4)), digest(b"abcd"), 4)


def test_a_tiny_chunk_that_claims_a_gigabyte_says_so_before_anything_is_allocated() -> None:
    bomb = sealed(header((2, bytes(7), 0), raw_bytes=MAX_CHUNK_BYTES))
    assert raw_length(bomb) == MAX_CHUNK_BYTES
    with pytest.raises(CorruptError, match="holds 1073741824 raw bytes in place of 4"):
        decoded(bomb, digest(b"abcd"), 4)


def test_the_layout_is_as_long_as_the_document_says() -> None:
    assert (chunk._HEADER.size, chunk._PLANE.size, chunk._CHECKSUM_AT) == (HEADER_BYTES, PLANE_BYTES, CHECKSUM_AT)


def test_a_chunk_longer_than_its_bytes_ever_take_is_corrupt() -> None:
    """A plane of empty zstd blocks would let a byte take any room."""
    empty_blocks = bytes(3) * 60
    frame = zstandard.compress(b"a")
    padded = frame[:-4] + empty_blocks + frame[-4:]
    content = sealed(header((1, bytes(7), len(padded)), raw_bytes=1), padded, hashed=padded)
    with pytest.raises(CorruptError, match="more than 1 raw bytes ever take"):
        decoded(content, digest(b"a"), 1)
