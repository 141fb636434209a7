"""The comparison that property tests rest on sees every difference."""

import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch

from tests.strategies import assert_same


def nan(bits: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value


def overlapping(shift: int) -> list[torch.Tensor]:
    memory = torch.zeros(9)
    return [memory[:4], memory[shift : shift + 4]]


SHARED = torch.zeros(2)
PAIRS: list[tuple[Any, Any]] = [
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    (nan("7ff8000000000000"), nan("7ff8000000000001")),
    (complex(0, 0.0), complex(0, -0.0)),
    ([1], (1,)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1: 0}, {True: 0}),
    ({0.0}, {-0.0}),
    ({"a": 1}, OrderedDict(a=1)),
    (Counter("a"), {"a": 1}),
    (defaultdict(int), defaultdict(list)),
    (deque([1], 1), deque([1])),
    (np.float64(1), 1.0),
    (np.str_("a\0"), np.str_("a")),
    (np.zeros(1, "<f4"), np.zeros(1, ">f4")),
    (np.zeros(2), np.zeros((2, 1))),
    (np.zeros(1), np.array([-0.0])),
    (torch.zeros(1), torch.tensor([-0.0])),
    (torch.zeros(1), torch.zeros(1, dtype=torch.half)),
    (torch.zeros(2), torch.zeros(2, 1)),
    (torch.zeros(1), torch.zeros(1, requires_grad=True)),
    (torch.zeros(1, requires_grad=True), torch.nn.Parameter(torch.zeros(1))),
    ([SHARED, SHARED], [torch.zeros(2), torch.zeros(2)]),
    ([torch.zeros(2), torch.zeros(2)], [SHARED, SHARED[:]]),
    (overlapping(1), overlapping(2)),
    (overlapping(3), overlapping(4)),
]


@pytest.mark.parametrize(("found", "wanted"), PAIRS, ids=[f"{a!r:.30} {b!r:.30}" for a, b in PAIRS])
def test_a_difference_is_seen(found: Any, wanted: Any) -> None:
    assert_same(found, found)
    assert_same(wanted, wanted)
    with pytest.raises(AssertionError):
        assert_same(found, wanted)
    with pytest.raises(AssertionError):
        assert_same([{"k": (found,)}], [{"k": (wanted,)}])


def test_the_attribute_of_a_module_s_dict_is_compared() -> None:
    first = torch.nn.BatchNorm1d(1).state_dict()
    second = OrderedDict(first)
    with pytest.raises(AssertionError, match="_metadata"):
        assert_same(second, first)


def test_strides_and_storages_may_differ_where_nothing_overlaps() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert_same([base.T, base[:0]], [base.T.contiguous(), torch.zeros(0, 3)])
