"""Sums over elements before and after, of every type that a checkpoint holds."""

import math

import numpy as np
import pytest
import torch

from ckptstore.diffing.numbers import Elements, Moved
from ckptstore.skeleton import ITEM_SIZES

NUMBERS = sorted(
    set(ITEM_SIZES) - {"float4_e2m1fn_x2", "bits8", "bits16"} - {name for name in ITEM_SIZES if name.startswith("q")}
)


def bytes_of(tensor: torch.Tensor) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.frombuffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8)


def elements_of(tensor: torch.Tensor) -> Elements:
    return Elements(str(tensor.dtype).removeprefix("torch."), tensor.element_size(), is_torch=True)


def compare(before: torch.Tensor, after: torch.Tensor) -> Moved:
    return elements_of(before).compare(bytes_of(before), bytes_of(after))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", NUMBERS)
def test_the_sums_of_a_type_are_those_that_torch_finds_in_double_precision(name: str) -> None:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(1)
    before, after = torch.rand(2, 1000, generator=generator) * 4
    after[:400] = before[:400]
    if dtype.is_complex:
        before, after = torch.complex(before, after), torch.complex(after, before)
    old, new = before.to(dtype), after.to(dtype)
    found = compare(old, new)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = old.to(wide), new.to(wide)
    assert found.elements == 1000
    assert found.changed == int((old.to(wide) != new.to(wide)).sum())
    if found.changed:
        assert found.relative_l2 == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert found.cosine == pytest.approx(float(torch.vdot(a, b).real / (a.norm() * b.norm())), rel=1e-12)
    assert found.largest == pytest.approx(float((b - a).abs().max()), rel=1e-12)
    assert (found.new_nan, found.new_inf) == (0, 0)


def test_every_type_of_torch_that_has_values_is_compared_by_them() -> None:
    assert {name for name in ITEM_SIZES if not Elements(name, ITEM_SIZES[name], is_torch=True).are_numbers} == {
        "float4_e2m1fn_x2"
    }


def test_what_becomes_nan_or_infinite_is_counted_and_summed_into_nothing() -> None:
    before = torch.tensor([1.0, 2.0, math.nan, math.inf, 5.0, 6.0])
    after = torch.tensor([1.0, math.nan, math.nan, math.inf, -math.inf, 6.5])
    found = compare(before, after)
    assert (found.changed, found.new_nan, found.new_inf) == (3, 1, 1)
    assert found.largest == 0.5
    assert found.relative_l2 == pytest.approx(0.5 / math.sqrt(37))


def test_a_minus_before_zero_is_a_changed_element_that_has_not_moved() -> None:
    found = compare(torch.zeros(3), torch.tensor([0.0, -0.0, 0.0]))
    assert (found.changed, found.largest, found.relative_l2, found.cosine) == (1, 0.0, 0.0, 1.0)


def test_what_leaves_zero_has_moved_infinitely_far_and_has_no_angle() -> None:
    found = compare(torch.zeros(3), torch.ones(3))
    assert found.relative_l2 == math.inf
    assert found.cosine is None


def test_sums_too_large_for_doubles_are_not_told_rather_than_wrong() -> None:
    found = compare(torch.full((2,), 1e300, dtype=torch.float64), torch.full((2,), 2e300, dtype=torch.float64))
    assert (found.relative_l2, found.cosine) == (None, None)
    assert found.largest == 1e300


def test_parts_add_up_to_the_whole() -> None:
    before, after = torch.rand(2, 200_000)
    whole, sum_of_parts = compare(before, after), Moved()
    for start in range(0, 200_000, 30_000):
        sum_of_parts += compare(before[start : start + 30_000], after[start : start + 30_000])
    assert sum_of_parts.changed == whole.changed
    assert sum_of_parts.largest == whole.largest
    assert sum_of_parts.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)


def test_elements_that_are_the_same_add_their_length_alone() -> None:
    values = torch.tensor([3.0, 4.0, math.nan])
    found = elements_of(values).unchanged(bytes_of(values))
    assert found == Moved(elements=3, before_squared=25.0, after_squared=25.0, product=25.0)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<i8", ">u2", "|b1", "<c8"])
def test_arrays_of_numpy_are_compared_in_their_own_byte_order(dtype: str) -> None:
    before, after = np.array([0, 1, 1, 0]).astype(dtype), np.array([0, 1, 0, 0]).astype(dtype)
    found = Elements(dtype, before.itemsize, is_torch=False).compare(before.view(np.uint8), after.view(np.uint8))
    assert (found.changed, found.largest) == (1, 1.0)
    assert found.relative_l2 == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("dtype", "before", "after"), [("<U3", ["abc", "de"], ["abc", "df"]), ("|S5", ["a", "b"], ["a", "c"])]
)
def test_of_text_only_whether_it_has_changed_is_told(dtype: str, before: list[str], after: list[str]) -> None:
    old, new = np.array(before, dtype), np.array(after, dtype)
    elements = Elements(dtype, old.itemsize, is_torch=False)
    assert not elements.are_numbers
    assert elements.compare(old.view(np.uint8), new.view(np.uint8)) == Moved(elements=2, changed=1)
