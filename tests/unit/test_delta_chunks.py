"""Delta objects: they come back over their base alone, and every flipped, cut or added byte is seen."""

from collections.abc import Callable

import numpy as np
import pytest

from ckptstore import chunk
from ckptstore.chunk import Base, decode, digest, encode, encode_over, is_delta, raw_length
from ckptstore.errors import CorruptError
from ckptstore.kernels import PLANE_WIDTHS, ByteArray

SIZES = sorted(PLANE_WIDTHS)
sizes = pytest.mark.parametrize("element_size", SIZES)


def noise(count: int, seed: int = 7) -> ByteArray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def stepped(base: ByteArray, element_size: int) -> ByteArray:
    """The numbers of `base`, each a few up or down, some of them beyond the ends of their range."""
    steps = np.random.default_rng(8).integers(-3, 4, len(base) // element_size)
    moved: ByteArray = (base.view(f"<u{element_size}") + steps.astype(f"<u{element_size}")).view(np.uint8)
    return moved


def delta(raw: ByteArray, element_size: int, base: ByteArray) -> bytes:
    content, is_smaller = encode_over(raw, element_size, Base(digest(base), base))
    assert is_smaller
    return content.tobytes()


def decoded(content: bytes, raw: ByteArray, base: ByteArray | None) -> bytes:
    out = np.full(len(raw), 0xEE, np.uint8)
    decode(content, digest(raw), out, None if base is None else Base(digest(base), base))
    return out.tobytes()


@sizes
@pytest.mark.parametrize("count", [64, 2**18 + 8])
def test_a_delta_is_decoded_to_the_bytes_that_were_encoded(element_size: int, count: int) -> None:
    base = noise(count)
    raw = stepped(base, element_size)
    content = delta(raw, element_size, base)
    assert is_delta(content)
    assert raw_length(content) == len(raw)
    assert decoded(content, raw, base) == raw.tobytes()


@sizes
def test_a_delta_of_a_small_change_is_smaller_than_the_chunk(element_size: int) -> None:
    base = noise(80_000)
    raw = stepped(base, element_size)
    assert len(delta(raw, element_size, base)) < 0.8 * len(encode(raw, element_size))


def test_what_has_nothing_in_common_with_the_base_is_no_delta() -> None:
    base = noise(80_000)
    raw = noise(80_000, seed=9)
    content, is_smaller = encode_over(raw, 4, Base(digest(base), base))
    assert not is_smaller
    assert content.tobytes() == encode(raw, 4).tobytes()


def test_what_compresses_better_as_it_is_is_no_delta() -> None:
    base = noise(80_000)
    _, is_smaller = encode_over(np.zeros(80_000, np.uint8), 4, Base(digest(base), base))
    assert not is_smaller


def damaged(content: bytes) -> list[bytes]:
    flipped = [
        content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        for position in range(len(content))
        for bit in range(8)
    ]
    return [*flipped, *(content[:length] for length in range(len(content))), content + b"\0", content + content]


@sizes
def test_every_flipped_bit_and_every_missing_or_added_byte_is_seen(element_size: int) -> None:
    base = noise(64)
    raw = stepped(base, element_size)
    for content in damaged(delta(raw, element_size, base)):
        with pytest.raises(CorruptError):
            decoded(content, raw, base)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda base: None, "its base is [0-9a-f]{16}… in place of none"),
        (lambda base: noise(64, seed=1), "its base is [0-9a-f]{16}… in place of [0-9a-f]{16}…"),
    ],
    ids=["none", "another"],
)
def test_a_delta_is_not_decoded_over_another_base(base: Callable[[ByteArray], ByteArray | None], message: str) -> None:
    own = noise(64)
    raw = stepped(own, 4)
    with pytest.raises(CorruptError, match=message):
        decoded(delta(raw, 4, own), raw, base(own))


def test_a_full_chunk_is_not_decoded_over_a_base() -> None:
    raw = noise(64)
    with pytest.raises(CorruptError, match="its base is none in place of"):
        decoded(encode(raw, 4).tobytes(), raw, raw)


def test_a_base_of_another_length_is_corrupt() -> None:
    base = noise(64)
    raw = stepped(base, 4)
    content = delta(raw, 4, base)
    with pytest.raises(CorruptError, match="its base has 32 bytes in place of 64"):
        decode(content, digest(raw), np.empty(64, np.uint8), Base(digest(base), base[:32]))


def test_bytes_of_the_base_that_are_not_its_own_are_seen() -> None:
    base = noise(64)
    raw = stepped(base, 4)
    content = delta(raw, 4, base)
    wrong = base.copy()
    wrong[5] ^= 1
    with pytest.raises(CorruptError, match="hash to"):
        decode(content, digest(raw), np.empty(64, np.uint8), Base(digest(base), wrong))


@sizes
def test_codec_none_keeps_the_bytes_as_they_are(element_size: int) -> None:
    raw = stepped(noise(64), element_size)
    content = encode(raw, element_size, "none").tobytes()
    assert content.endswith(raw.tobytes())
    assert len(content) == chunk._HEADER.size + chunk._PLANE.size + 64
    assert decoded(content, raw, None) == raw.tobytes()


def test_codec_none_stores_no_zeros() -> None:
    raw = np.zeros(2**20, np.uint8)
    content = encode(raw, 4, "none").tobytes()
    assert len(content) == chunk._HEADER.size + chunk._PLANE.size
    assert decoded(content, raw, None) == raw.tobytes()
