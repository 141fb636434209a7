"""Whatever bytes go into a chunk come out of it, and whatever is done to a chunk is seen, or harmless."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.chunk import decode, digest, encode
from ckptstore.codec import Sampled, decode_planes
from ckptstore.errors import CorruptError
from ckptstore.kernels import PLANE_WIDTHS, ByteArray, merge, split

ELEMENT_SIZES = st.sampled_from(sorted(PLANE_WIDTHS))


def zeros(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return np.zeros(count, np.uint8)


def noise(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return random.integers(0, 256, count, np.uint8)


def sparse(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return noise(count, random) * (random.random(count) < 0.01).astype(np.uint8)


def weights(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return random.normal(0, 0.05, count // 4 + 1).astype("<f4")


def doubles(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1.0])[random.integers(0, 7, count // 8 + 1)]


def counters(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return np.arange(count // 8 + 1, dtype="<i8")


def half_zero(count: int, random: np.random.Generator) -> "np.ndarray[Any, Any]":
    return np.concatenate([zeros(count // 2, random), noise(count - count // 2, random)])


@st.composite
def raw_bytes(draw: st.DrawFn) -> ByteArray:
    """1 byte to a few hundred KiB (beyond the blocks of the kernels and the codec's sample) of various content."""
    if draw(st.booleans()):
        return np.frombuffer(draw(st.binary(min_size=1, max_size=300)), np.uint8)
    count = draw(st.one_of(st.integers(1, 2000), st.integers(1, 2**18), st.sampled_from([2**15, 2**16, 2**17, 2**18])))
    make: Callable[..., Any] = draw(st.sampled_from([zeros, noise, sparse, weights, doubles, counters, half_zero]))
    made: np.ndarray[Any, Any] = make(count, np.random.default_rng(draw(st.integers(0, 2**32))))
    return made.reshape(-1).view(np.uint8)[:count].copy()


@given(raw_bytes(), ELEMENT_SIZES)
def test_merge_is_the_inverse_of_split(raw: ByteArray, element_size: int) -> None:
    raw = raw[: len(raw) // element_size * element_size]
    planes = [np.empty(len(raw) // element_size * width, np.uint8) for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes)
    out = np.empty(len(raw), np.uint8)
    merge(planes, element_size, out)
    assert np.array_equal(out, raw)


@given(raw_bytes(), ELEMENT_SIZES)
def test_planes_are_decoded_to_what_was_encoded_and_are_no_longer(raw: ByteArray, element_size: int) -> None:
    raw = np.resize(raw, max(len(raw) // element_size, 1) * element_size)
    planes = Sampled(raw, element_size).encode_planes()
    out = np.empty(len(raw), np.uint8)
    decode_planes(planes, element_size, out)
    assert np.array_equal(out, raw)
    assert sum(len(plane.stored) for plane in planes) <= len(raw)


@given(raw_bytes(), st.integers(-1, 20))
def test_a_chunk_of_any_length_and_any_element_size_is_decoded_to_what_was_encoded(
    raw: ByteArray, element_size: int
) -> None:
    content = encode(raw, element_size).tobytes()
    out = np.empty(len(raw), np.uint8)
    decode(content, digest(raw), out)
    assert np.array_equal(out, raw)
    assert len(content) <= len(raw) + 104


def edits(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with bytes overwritten, cut out, put in, or repeated."""

    def edit(at: int, removed: int, put_in: bytes) -> bytes:
        return content[:at] + put_in + content[at + removed :]

    position = st.one_of(st.integers(0, min(110, len(content))), st.integers(0, len(content)))
    return st.builds(edit, position, st.integers(0, 64), st.binary(max_size=64))


@given(st.data(), raw_bytes(), ELEMENT_SIZES)
def test_an_edited_chunk_is_corrupt(data: st.DataObject, raw: ByteArray, element_size: int) -> None:
    content = encode(raw, element_size).tobytes()
    edited = data.draw(edits(content))
    out = np.empty(len(raw), np.uint8)
    try:
        decode(edited, digest(raw), out)
    except CorruptError:
        assert edited != content
    else:
        assert edited == content


@given(st.binary(max_size=400), st.integers(0, 100))
def test_no_bytes_make_decode_fail_in_another_way(content: bytes, length: int) -> None:
    for hostile in (content, b"\x89CKPTCH\n" + content, b"\x89CKPTCH\n\x01\x01\x01\x01\0\0\0\0" + content):
        try:
            decode(hostile, digest(b"x"), np.empty(length, np.uint8))
        except CorruptError:
            continue
        raise AssertionError("random bytes were taken for a chunk")
