"""unflatten: values come back by their bits; hostile skeletons give CorruptError; others' errors pass through."""

import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch

from ckptstore.errors import CorruptError, InvalidInputError, UnsupportedFormatError
from ckptstore.skeleton import ITEM_SIZES, TensorNode
from ckptstore.tree import TORCH_DTYPES, decode_hashable, flatten, register, unflatten
from ckptstore.tree.values import MAX_EQUAL_HASHES
from tests.strategies import assert_same, through_json


class Point:
    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and bool(self.x == other.x)

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.tree.registry._by_type", {})
    monkeypatch.setattr("ckptstore.tree.registry._by_name", {})


def no_tensor(node: TensorNode, path: str) -> Any:
    raise AssertionError("no tensor was to be supplied")


def read(node: Any, **options: Any) -> Any:
    return unflatten(
        {"opt": {"x": node}}, options.pop("supply", no_tensor), options.pop("segment_bytes", []), **options
    )


# ---- there and back


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2**53, -(2**64), 10**5000, -(10**5000)),
        *(-0.0, 1e308, 5e-324, float("-inf"), 1e16, 0.1),
        *("", "\0", "\ud800", "\U0001f600", "$"),
        *(complex(-0.0, float("nan")), b"", bytes(range(256)) * 9),
        *(np.str_("a\0"), np.str_(""), np.bytes_(b"a\0"), np.bytes_(b""), np.bool_(True), np.float16("nan")),
        *(np.datetime64("NaT"), np.datetime64(1, ("s", 25)), np.timedelta64(-1, "as"), np.complex64(1j)),
        *(torch.Size([]), torch.Size([2**60, -1]), torch.bool, torch.quint8, torch.device("cuda", 7)),
        {True: 1, 2: None, 2.5: "", None: [], b"k": {}, ("a", (1, -0.0)): 0, 10**5000: 1},
        {float("nan"): 1, -0.0: 2},
        {"b": 1, "a": 2, "$": 3},
        {float("inf"), "a", b"a", None, (1, frozenset({2}))},
        deque([1, 2], maxlen=2),
        defaultdict(int, a=1),
        Counter({"a": -1, "b": 2.5}),
        OrderedDict([("z", 1), ("a", 2)]),
        [(), [], {}, set(), frozenset(), deque(), ((),)],
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_a_value_comes_back_the_same(value: Any) -> None:
    assert_same(through_json({"x": value}), {"x": value})


def test_the_payload_of_a_nan_is_kept() -> None:
    for bits in ("7ff0000000000001", "fff8dead0000beef"):  # the first would signal
        value = struct.unpack(">d", bytes.fromhex(bits))[0]
        assert_same(through_json([value]), [value])


def test_a_module_s_versions_come_back() -> None:
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    assert through_json(state)._metadata == state._metadata  # type: ignore[attr-defined]


def test_tensors_are_asked_for_by_description_and_path() -> None:
    state = {"a": [torch.ones(2, 3, dtype=torch.bfloat16)], "b": bytes(3000)}
    skeleton, leaves = flatten(state)
    leaves[0].node.update(TensorNode("tensor", "bfloat16", (2, 3), 0, requires_grad=True).to_json())
    leaves[1].node.update(TensorNode("blob", "|u1", (3000,), 1).to_json())
    asked: list[tuple[str, str, tuple[int, ...]]] = []

    def supply(node: TensorNode, path: str) -> str:
        asked.append((path, node.dtype, node.shape))
        return path

    assert unflatten(skeleton, supply, [12, 3000], "run") == {"a": ["run.a[0]"], "b": "run.b"}
    assert asked == [("run.a[0]", "bfloat16", (2, 3)), ("run.b", "|u1", (3000,))]


# ---- registered types


def test_a_registered_type_comes_back_through_its_functions() -> None:
    register(Point, "point", lambda point: {"x": point.x}, lambda tree: Point(tree["x"]))
    assert through_json([Point(1), (Point((2,)),)]) == [Point(1), (Point((2,)),)]


def test_a_type_that_is_not_registered_here_is_named() -> None:
    node = {"$": "tuple", "items": [{"$": "registered", "name": "point", "tree": {}}]}
    with pytest.raises(InvalidInputError, match=re.escape("opt.x[0] is of a type saved under the name 'point'")):
        read(node)


def test_a_description_needs_no_registration_and_runs_none() -> None:
    register(Point, "point", lambda point: {"x": point.x}, lambda tree: pytest.fail("from_tree was called"))
    state = {"p": Point([1, (2, Point(3))])}
    assert through_json(state, describe=True) == {"p": {"x": [1, (2, {"x": 3})]}}
    assert read({"$": "registered", "name": "unknown", "tree": [1]}, describe=True) == {"opt": {"x": [1]}}


def test_a_from_tree_that_fails_is_named() -> None:
    register(Point, "point", vars, lambda tree: tree["y"])
    with pytest.raises(
        InvalidInputError, match=re.escape("[0] was saved under the name 'point', and the from_tree")
    ) as e:
        through_json((Point(1),))
    assert isinstance(e.value.__cause__, KeyError)


@pytest.mark.parametrize("raised", [ValueError("x"), RuntimeError("out of memory"), KeyError("x"), TypeError("x")])
@pytest.mark.parametrize("tag", ["tuple", "deque", "dict", "ordered_dict", "defaultdict", "counter", "registered"])
def test_an_error_of_the_supply_passes_through_every_container(tag: str, raised: Exception) -> None:
    """A device that is out of memory must not look like a corrupt checkpoint: restore would take an older one."""
    tensor = TensorNode("tensor", "float32", (1,), 0).to_json()
    register(Point, "point", vars, Point)
    item: Any = ["k", tensor] if "dict" in tag or tag == "counter" else tensor
    node = {"$": tag, "items": [item], "maxlen": None, "factory": None, "name": "point", "tree": [tensor]}

    def supply(node: TensorNode, path: str) -> Any:
        raise raised

    with pytest.raises(type(raised)) as caught:
        read(node, supply=supply, segment_bytes=[4])
    assert caught.value is raised


# ---- skeletons that make no sense

HOSTILE: list[Any] = [
    {"$": "no such tag"},
    {"$": None},
    {"$": []},
    {"$": {"$": "int"}},
    {"$": "tuple"},
    {"$": "tuple", "items": "ab"},
    {"$": "tuple", "items": {"a": 1}},
    {"$": "dict", "items": [1]},
    {"$": "dict", "items": [["a"]]},
    {"$": "dict", "items": ["ab"]},
    {"$": "dict", "items": [["a", 1], ["a", 2]]},
    {"$": "dict", "items": [[1, 1], [True, 2]]},
    {"$": "dict", "items": [[[], 1]]},
    {"$": "dict", "items": [[{"$": "set", "items": []}, 1]]},
    {"$": "dict", "items": [[{"$": "dict", "items": []}, 1]]},
    {"$": "dict", "items": [[{"a": 1}, 1]]},
    {"$": "set", "items": [[]]},
    {"$": "set", "items": [1, 1]},
    {"$": "set", "items": [{"$": "set", "items": []}]},
    {"$": "deque", "items": [], "maxlen": -1},
    {"$": "deque", "items": [], "maxlen": 10**30},
    {"$": "deque", "items": [], "maxlen": True},
    {"$": "deque", "items": [], "maxlen": 2.0},
    {"$": "deque", "items": [1, 2], "maxlen": 1},
    {"$": "defaultdict", "items": [], "factory": "eval"},
    {"$": "defaultdict", "items": [], "factory": []},
    {"$": "counter", "items": 3},
    {"$": "ordered_dict", "items": [], "metadata": {"$": "?"}},
    {"$": "int"},
    {"$": "int", "hex": 5},
    {"$": "int", "hex": "zz" * 10000},
    {"$": "float", "bits": "00"},
    {"$": "complex", "bits": "00" * 8},
    {"$": "bytes", "hex": "0"},
    {"$": "str", "hex": "ff"},
    {"$": "size", "items": [1.5]},
    {"$": "size", "items": [True]},
    {"$": "size", "items": "12"},
    {"$": "dtype", "name": "__class__"},
    {"$": "dtype", "name": "load"},
    {"$": "dtype", "name": "hub"},
    {"$": "dtype", "name": ["float32"]},
    {"$": "device", "name": "cuda:-1"},
    {"$": "device", "name": "cpu:300"},
    {"$": "device", "name": "cpu:99999999999999999999"},
    {"$": "device", "name": 0},
    {"$": "device", "name": "Not a device"},
    {"$": "scalar", "dtype": "<f4", "hex": "00"},
    {"$": "scalar", "dtype": "|O", "hex": "00" * 8},
    {"$": "scalar", "dtype": "<U1", "hex": "ffffffff"},
    {"$": "scalar", "dtype": 4, "hex": ""},
    {"$": "registered"},
    {"$": "registered", "name": [], "tree": 1},
    {"$": "registered", "name": "point"},
    {"$": "tensor"},
    {"$": "tensor", "dtype": "load", "shape": [1], "segment": 0},
    {"$": "tensor", "dtype": "float32", "shape": [3], "segment": 0},
    {"$": "tensor", "dtype": "float32", "shape": [2**40, 2**40, 0], "segment": 0},
    {"$": "tensor", "dtype": "float32", "shape": [2**40, 2**40], "stride": [0, 0], "segment": 0},
    {"$": "tensor", "dtype": "int32", "shape": [1], "segment": 0, "requires_grad": True},
    {"$": "ndarray", "dtype": "|O", "shape": [1], "segment": 0},
    {"$": "ndarray", "dtype": "<M8[x]", "shape": [1], "segment": 0},
    {"$": "ndarray", "dtype": "<f4", "shape": [1], "segment": 0, "parameter": True},
    {"$": "blob", "dtype": "<f4", "shape": [1], "segment": 0},
    {"$": "blob", "dtype": "|u1", "shape": [2, 2], "segment": 0},
]


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node)[:70])
def test_what_makes_no_sense_is_corrupt_and_named(node: Any) -> None:
    with pytest.raises(CorruptError) as caught:
        read(node, segment_bytes=[8])
    assert "opt.x" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_skeleton_that_is_too_deep_is_corrupt() -> None:
    node: Any = 1
    key: Any = 1
    for _ in range(900):
        node, key = [node], {"$": "tuple", "items": [key]}
    with pytest.raises(CorruptError, match="nested deeper than 100"):
        read(node)
    with pytest.raises(CorruptError, match="nested deeper than 100"):
        read({"$": "dict", "items": [[key, 1]]})
    with pytest.raises(CorruptError, match="nested deeper than 100"):
        decode_hashable(key)


def test_what_another_torch_wrote_is_unsupported_not_corrupt() -> None:
    """An older checkpoint would not help: restore must not go back to one."""
    with pytest.raises(UnsupportedFormatError, match="has no dtype float99: install a newer torch"):
        read({"$": "dtype", "name": "float99"})
    with pytest.raises(UnsupportedFormatError, match="knows no device 'npu:0' here: import the package that brings it"):
        read({"$": "device", "name": "npu:0"})


def test_a_tensor_of_a_dtype_that_this_torch_lacks_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TORCH_DTYPES, "float8_e8m0fnu")
    node = TensorNode("tensor", "float8_e8m0fnu", (4,), 0).to_json()
    with pytest.raises(UnsupportedFormatError, match=r"opt\.x has dtype float8_e8m0fnu, which torch .* lacks"):
        read(node, segment_bytes=[4])
    assert read(node, segment_bytes=[4], supply=lambda node, path: "…", describe=True) == {"opt": {"x": "…"}}


def test_the_dtypes_have_the_sizes_that_the_format_says() -> None:
    """Those of them, at least, that this torch has."""
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}.items() <= ITEM_SIZES.items()


# ---- numbers that were chosen for their hashes

SAME_HASH = 2**61 - 1
"""Python's hash of an int is its remainder by this."""


def numbers_of_one_hash(count: int) -> list[dict[str, Any]]:
    return [{"$": "int", "hex": hex((number + 1) * SAME_HASH)} for number in range(count)]


def with_members(tag: str, members: list[Any]) -> dict[str, Any]:
    if tag in ("set", "frozenset"):
        return {"$": tag, "items": members}
    return {"$": tag, "items": [[member, 1] for member in members]}


@pytest.mark.parametrize("tag", ["set", "frozenset", "dict", "ordered_dict", "defaultdict", "counter"])
def test_so_many_equal_hashes_that_they_would_cost_time_for_each_pair_are_corrupt(tag: str) -> None:
    assert len(read(with_members(tag, numbers_of_one_hash(MAX_EQUAL_HASHES)))["opt"]["x"]) == MAX_EQUAL_HASHES
    with pytest.raises(CorruptError, match=f"more than {MAX_EQUAL_HASHES} (members|keys) have the same hash"):
        read(with_members(tag, numbers_of_one_hash(MAX_EQUAL_HASHES + 1)))


def test_tuples_of_such_numbers_have_equal_hashes_too() -> None:
    members = [{"$": "tuple", "items": [number, 1]} for number in numbers_of_one_hash(MAX_EQUAL_HASHES + 1)]
    with pytest.raises(CorruptError, match="members have the same hash"):
        read(with_members("set", members))


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys, Counter])
def test_what_could_not_be_read_again_is_not_saved(make: Any) -> None:
    numbers = [(number + 1) * SAME_HASH for number in range(MAX_EQUAL_HASHES + 1)]
    flatten({"x": make(numbers[:-1])})
    with pytest.raises(InvalidInputError, match=r"x.*more than 100 (members|keys) have the same hash"):
        flatten({"x": make(numbers)})


def test_numbers_as_they_come_are_read_however_many_there_are() -> None:
    numbers = [*range(-5000, 5000), *(2**60 + number for number in range(1000)), *(number / 7 for number in range(999))]
    assert read(with_members("set", sorted(set(numbers))))["opt"]["x"] == set(numbers)
