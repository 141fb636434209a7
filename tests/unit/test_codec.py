"""Which plane is stored how, and that hostile planes neither pass nor take more memory than was asked for."""

import contextlib
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import zstandard

from ckptstore import codec
from ckptstore.codec import Mode, Plane, Sampled, decode_planes
from ckptstore.errors import CorruptError
from ckptstore.kernels import PLANE_WIDTHS, ByteArray

SIZES = sorted(PLANE_WIDTHS)
RANDOM = np.random.default_rng(1)


def as_bytes(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> ByteArray:
    return array.reshape(-1).view(np.uint8)


def plane(mode: Mode, stored: bytes) -> Plane:
    return Plane(mode, np.frombuffer(stored, np.uint8))


def decoded(planes: list[Plane], element_size: int, length: int) -> bytes:
    out = np.full(length, 0xEE, np.uint8)
    decode_planes(planes, element_size, out)
    return out.tobytes()


def modes(raw: ByteArray, element_size: int) -> list[Mode]:
    return [plane.mode for plane in Sampled(raw, element_size).encode_planes()]


@pytest.mark.parametrize("element_size", SIZES)
def test_noise_is_stored_as_it_is(element_size: int) -> None:
    raw = RANDOM.integers(0, 256, 4096 * element_size, np.uint8)
    assert set(modes(raw, element_size)) == {Mode.RAW}


@pytest.mark.parametrize("element_size", SIZES)
def test_zeros_take_no_bytes(element_size: int) -> None:
    planes = Sampled(np.zeros(4096 * element_size, np.uint8), element_size).encode_planes()
    assert {plane.mode for plane in planes} == {Mode.ZERO}
    assert sum(len(plane.stored) for plane in planes) == 0


def test_the_exponents_of_weights_are_compressed_and_their_low_bits_are_not() -> None:
    weights = RANDOM.normal(0, 0.05, 100_000).astype("<f4")
    assert modes(as_bytes(weights), 4) == [Mode.RAW, Mode.RAW, Mode.ZSTD]


def test_small_whole_numbers_leave_only_their_lowest_half() -> None:
    tokens = RANDOM.integers(0, 10_000, 100_000).astype("<i8")
    assert modes(as_bytes(tokens), 8) == [Mode.ZSTD, Mode.ZERO, Mode.ZERO, Mode.ZERO]


def test_one_byte_that_no_sample_sees_keeps_a_plane_from_counting_as_zeros() -> None:
    raw = np.zeros(1_000_000, np.uint8)
    raw[123_457] = 1
    planes = Sampled(raw, 1).encode_planes()
    assert planes[0].mode is Mode.ZSTD
    assert decoded(planes, 1, len(raw)) == raw.tobytes()


def test_a_sample_that_promised_too_much_leaves_the_plane_raw() -> None:
    """Zeros where the sample looks, noise everywhere else."""
    raw = RANDOM.integers(0, 256, 1_000_000, np.uint8)
    for start in np.linspace(0, len(raw) - codec._SAMPLE_ELEMENTS, codec._SAMPLE_SLICES, dtype=np.int64):
        raw[start : start + codec._SAMPLE_ELEMENTS] = 0
    assert modes(raw, 1) == [Mode.RAW]


@pytest.mark.parametrize("element_size", SIZES)
def test_what_is_stored_is_never_longer_than_the_plane(element_size: int) -> None:
    for count in [*range(1, 40), 1000]:
        raw = RANDOM.integers(0, 256, count * element_size, np.uint8)
        for found, width in zip(Sampled(raw, element_size).encode_planes(), PLANE_WIDTHS[element_size], strict=True):
            assert len(found.stored) <= count * width


def test_encoding_does_not_change_what_it_reads() -> None:
    raw = RANDOM.integers(0, 3, 4096, np.uint8)
    raw.flags.writeable = False
    assert decoded(Sampled(raw, 4).encode_planes(), 4, 4096) == raw.tobytes()


def test_threads_do_not_share_zstd_contexts() -> None:
    raw = [as_bytes(RANDOM.normal(0, 0.05, 50_000).astype("<f4")) for _ in range(8)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if decoded(Sampled(raw[number], 4).encode_planes(), 4, len(raw[number])) != raw[number].tobytes():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- planes that nobody of us wrote


def frame(content: bytes, *, content_size: int | None, window_log: int = 10) -> bytes:
    """A zstd frame with one uncompressed block, by hand (RFC 8878)."""
    sized = content_size is not None
    header = struct.pack("<IBB", 0xFD2FB528, 0xC0 if sized else 0, (window_log - 10) << 3)
    header += struct.pack("<Q", content_size) if sized else b""
    return header + (len(content) << 3 | 1).to_bytes(3, "little") + content


def compressed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def test_a_frame_made_by_hand_is_read() -> None:
    assert decoded([plane(Mode.ZSTD, frame(b"abcd", content_size=4))], 1, 4) == b"abcd"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"", "cannot be read"),
        (b"abcd", "cannot be read"),
        (compressed(b"abcd")[:-1], "cannot be read"),
        (compressed(b"abcd") + b"e", "cannot be read"),
        (compressed(b"abcd") + compressed(b"efgh"), "cannot be read"),
        (compressed(b"abc"), "does not hold 4 bytes"),
        (compressed(b"abcde"), "does not hold 4 bytes"),
        (frame(b"abcd", content_size=None), "does not hold 4 bytes"),
        (frame(b"abc", content_size=4), "cannot be read"),
        (frame(b"abcde", content_size=4), "cannot be read"),
        (struct.pack("<II4s", 0x184D2A50, 4, b"abcd"), "cannot be read|holds 0 bytes|does not hold 4"),
    ],
    ids=[
        *("nothing", "no-frame", "cut", "a-byte-more", "two-frames", "shorter", "longer", "no-size"),
        *("claims-more", "claims-less", "skippable"),
    ],
)
def test_a_compressed_plane_that_is_not_one_frame_of_its_length_is_corrupt(stored: bytes, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        decoded([plane(Mode.ZSTD, stored)], 1, 4)


def test_a_frame_that_needs_a_dictionary_is_corrupt() -> None:
    with_dictionary_id = bytearray(frame(b"abcd", content_size=4))
    with_dictionary_id[4] |= 1
    with_dictionary_id.insert(6, 77)
    with pytest.raises(CorruptError, match="cannot be read"):
        decoded([plane(Mode.ZSTD, bytes(with_dictionary_id))], 1, 4)


@pytest.mark.parametrize("stored", [b"", b"abc", b"abcde"])
def test_a_raw_plane_of_another_length_is_corrupt(stored: bytes) -> None:
    with pytest.raises(CorruptError, match=f"a raw plane has {len(stored)} bytes in place of 4"):
        decoded([plane(Mode.RAW, stored)], 1, 4)


def test_a_plane_of_zeros_that_has_bytes_is_corrupt() -> None:
    """No checksum covers them: a bit could flip there that nobody sees."""
    with pytest.raises(CorruptError, match="a plane of zeros has 4 bytes"):
        decoded([plane(Mode.ZERO, bytes(4))], 1, 4)


def peak_bytes(stored: bytes, length: int) -> int:
    """What decoding allocates at most beyond `out`; zstd's own buffers are counted too."""
    out = np.empty(length, np.uint8)
    planes = [plane(Mode.ZSTD, stored)]
    tracemalloc.start()
    try:
        with contextlib.suppress(CorruptError):
            decode_planes(planes, 1, out)
        return tracemalloc.get_traced_memory()[1] + codec._zstd.decompressor.memory_size()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "stored",
    [
        zstandard.ZstdCompressor().compress(bytes(2**28)),
        frame(b"abcd", content_size=2**40),
        frame(b"abcd", content_size=2**64 - 1),
        frame(b"abcd", content_size=4, window_log=30),
        frame(b"abcd", content_size=4, window_log=30)[:-1],
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**28)),
    ],
    ids=["bomb", "claims-1-TiB", "claims-no-size", "window-1-GiB", "window-1-GiB-cut", "bomb-without-size"],
)
def test_decoding_takes_no_more_memory_than_was_asked_for(stored: bytes) -> None:
    assert peak_bytes(stored, 4) < 2**20


def test_a_bomb_that_lies_about_its_size_is_stopped_at_that_size() -> None:
    bomb = bytearray(zstandard.ZstdCompressor().compress(bytes(2**28)))
    at = bomb.index(struct.pack("<I", 2**28))
    bomb[at : at + 4] = struct.pack("<I", 300)
    with pytest.raises(CorruptError, match="cannot be read"):
        decoded([plane(Mode.ZSTD, bytes(bomb))], 1, 300)
    assert peak_bytes(bytes(bomb), 300) < 2**20


def test_a_whole_chunk_is_decoded_within_twice_its_length() -> None:
    """Once for `out`, once for the planes."""
    length = 2**24
    planes = Sampled(as_bytes(RANDOM.integers(0, 2**20, length // 8).astype("<i8")), 8).encode_planes()
    out = np.empty(length, np.uint8)
    tracemalloc.start()
    decode_planes(planes, 8, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= length + 4 * 2**20
