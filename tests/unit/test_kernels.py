"""Planes: which byte of an element lands where, and that merge is the inverse of split."""

import numpy as np
import pytest

from ckptstore import kernels
from ckptstore.kernels import PLANE_WIDTHS, ByteArray, merge, split

SIZES = sorted(PLANE_WIDTHS)


def planes_of(raw: ByteArray, element_size: int) -> list[ByteArray]:
    planes = [np.full(len(raw) // element_size * width, 0xEE, np.uint8) for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes)
    return planes


def random_bytes(count: int) -> ByteArray:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize(
    ("element_size", "planes"),
    [
        (1, ["0001020304050607 08090a0b0c0d0e0f"]),
        (2, ["00020406080a0c0e", "01030507090b0d0f"]),
        (4, ["0001 0405 0809 0c0d", "02060a0e", "03070b0f"]),
        (8, ["00010203 08090a0b", "0405 0c0d", "060e", "070f"]),
    ],
)
def test_the_low_half_comes_first_and_the_high_half_is_halved_again(element_size: int, planes: list[str]) -> None:
    raw = np.arange(16, dtype=np.uint8)
    assert [plane.tobytes() for plane in planes_of(raw, element_size)] == [bytes.fromhex(plane) for plane in planes]


@pytest.mark.parametrize("element_size", SIZES)
def test_the_planes_of_an_element_are_as_wide_as_the_element(element_size: int) -> None:
    assert sum(PLANE_WIDTHS[element_size]) == element_size


@pytest.mark.parametrize("element_size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 2, kernels._BLOCK - 1, kernels._BLOCK, kernels._BLOCK + 1, 3 * kernels._BLOCK])
def test_merge_is_the_inverse_of_split_at_every_boundary_of_blocks(element_size: int, count: int) -> None:
    raw = random_bytes(count * element_size)
    out = np.full(len(raw), 0xEE, np.uint8)
    merge(planes_of(raw, element_size), element_size, out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("element_size", SIZES)
def test_split_and_merge_take_memory_at_odd_addresses(element_size: int) -> None:
    """Views of a file or a bundle begin anywhere."""
    memory = random_bytes(1 + 40 * element_size)
    raw, out = memory[1:], np.zeros(1 + 40 * element_size, np.uint8)[1:]
    planes = [np.empty(1 + 40 * width, np.uint8)[1:] for width in PLANE_WIDTHS[element_size]]
    split(raw, element_size, planes)
    merge(planes, element_size, out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("element_size", SIZES)
def test_neither_changes_what_it_reads(element_size: int) -> None:
    raw = random_bytes(24)
    raw.flags.writeable = False
    planes = planes_of(raw, element_size)
    for plane in planes:
        plane.flags.writeable = False
    merge(planes, element_size, np.empty(24, np.uint8))


def test_planes_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        split(random_bytes(16), 4, [np.empty(8, np.uint8), np.empty(4, np.uint8), np.empty(3, np.uint8)])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        merge([np.empty(8, np.uint8)], 4, np.empty(16, np.uint8))
