"""flatten: what skeletons look like, and what is refused with which words."""

import collections
import dataclasses
import decimal
import enum
import functools
import pathlib
import random
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ckptstore.errors import InvalidInputError
from ckptstore.tree import flatten, register
from ckptstore.tree.flatten import _ENCODERS
from ckptstore.tree.registry import NATIVE_TYPES


def skeleton(state: Any) -> Any:
    return flatten(state)[0]


def refusal(value: Any) -> str:
    """The text with which `value` is refused as a leaf called opt.groups[0].x; each must name that path."""
    with pytest.raises(InvalidInputError) as caught:
        flatten({"opt": {"groups": [{"x": value}]}})
    text = str(caught.value)
    assert "opt.groups[0].x" in text
    return text


# ---- skeletons


def test_what_json_has_stands_as_it_is() -> None:
    state = {"a": [None, True, 1, 0.5, "text"], "b": {}}
    assert skeleton(state) == state


@pytest.mark.parametrize(
    ("value", "node"),
    [
        (2**53 - 1, 2**53 - 1),
        (2**53, {"$": "int", "hex": "0x20000000000000"}),
        (-(2**53), {"$": "int", "hex": "-0x20000000000000"}),
        (float("inf"), {"$": "float", "bits": "7ff0000000000000"}),
        (1 - 2j, {"$": "complex", "bits": "3ff0000000000000c000000000000000"}),
        (b"\x00\xff", {"$": "bytes", "hex": "00ff"}),
        ("\ud800", {"$": "str", "hex": "eda080"}),
        ((1, "a"), {"$": "tuple", "items": [1, "a"]}),
        ({2, 1}, {"$": "set", "items": [1, 2]}),
        (frozenset({(1, 2)}), {"$": "frozenset", "items": [{"$": "tuple", "items": [1, 2]}]}),
        (deque([1], maxlen=3), {"$": "deque", "items": [1], "maxlen": 3}),
        ({1: "a"}, {"$": "dict", "items": [[1, "a"]]}),
        ({"$": "a"}, {"$": "dict", "items": [["$", "a"]]}),
        (OrderedDict(a=1), {"$": "ordered_dict", "items": [["a", 1]]}),
        (defaultdict(list, {"a": []}), {"$": "defaultdict", "items": [["a", []]], "factory": "list"}),
        (defaultdict(None), {"$": "defaultdict", "items": [], "factory": None}),
        (Counter("aab"), {"$": "counter", "items": [["a", 2], ["b", 1]]}),
        (torch.Size([2, 3]), {"$": "size", "items": [2, 3]}),
        (torch.half, {"$": "dtype", "name": "float16"}),
        (torch.device("cuda", 1), {"$": "device", "name": "cuda:1"}),
        (np.float32(1), {"$": "scalar", "dtype": "<f4", "hex": "0000803f"}),
        (np.str_("a\0"), {"$": "scalar", "dtype": "<U2", "hex": "6100000000000000"}),
    ],
)
def test_what_json_lacks_is_tagged(value: Any, node: Any) -> None:
    assert skeleton(value) == node


def test_the_versions_that_modules_put_on_their_dicts_are_kept() -> None:
    node = skeleton(torch.nn.BatchNorm1d(2).state_dict())
    assert node["metadata"] == {"$": "ordered_dict", "items": [["", {"version": 2}]]}


def test_tensors_arrays_and_long_bytes_are_leaves_in_the_order_of_the_tree() -> None:
    tensor, array, short, long = torch.ones(1), np.ones(1), bytes(1024), bytes(1025)
    node, leaves = flatten({"t": tensor, "a": array, "l": [short, long], ("k", 1): tensor})
    assert [leaf.path for leaf in leaves] == ["t", "a", "l[1]", "[('k', 1)]"]
    assert [leaf.node["$"] for leaf in leaves] == ["tensor", "ndarray", "blob", "tensor"]
    assert leaves[0].value is leaves[3].value is tensor
    assert node["items"][0] == ["t", leaves[0].node] and node["items"][0][1] is leaves[0].node


def test_what_has_state_dict_is_saved_through_it() -> None:
    model = torch.nn.Linear(2, 1)
    assert [leaf.path for leaf in flatten({"model": model})[1]] == ["model.weight", "model.bias"]


def test_an_error_of_state_dict_says_whose_it_was() -> None:
    class Broken(torch.nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("shards are gone")

    with pytest.raises(RuntimeError, match="shards are gone") as caught:
        flatten({"ema": [Broken(1, 1)]})
    assert caught.value.__notes__ == ["(raised by state_dict() of ema[0])"]


def test_a_lazy_conjugate_is_saved_with_its_real_values() -> None:
    """Its memory holds the opposite of what it stands for."""
    for value in (torch.tensor([1 + 2j]).conj(), torch.nn.Parameter(torch.tensor([1 + 2j]).conj())):
        [leaf] = flatten(value)[1]
        assert isinstance(leaf.value, torch.Tensor) and not leaf.value.is_conj()
        assert torch.equal(leaf.value, torch.tensor([1 - 2j]))
        assert (type(leaf.value), leaf.value.requires_grad) == (type(value), value.requires_grad)
    [leaf] = flatten(torch.tensor([1 + 2j]).conj().imag)[1]
    assert isinstance(leaf.value, torch.Tensor) and not leaf.value.is_neg() and leaf.value.item() == -2
    [leaf] = flatten(torch._efficientzerotensor((2,)))[1]
    assert isinstance(leaf.value, torch.Tensor) and leaf.value.numpy().tolist() == [0, 0]


def test_a_buffer_is_a_tensor() -> None:
    """`torch.nn.Buffer(…)` makes a torch.Tensor with a mark for modules on it; the mark is the module's to set."""
    [leaf] = flatten(torch.nn.Buffer(torch.ones(2)))[1]
    assert type(leaf.value) is torch.Tensor


def test_every_native_type_has_an_encoder() -> None:
    assert {*_ENCODERS, torch.Tensor, torch.nn.Parameter} == NATIVE_TYPES


# ---- refusals


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Steps(list):  # type: ignore[type-arg]
    pass


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Settings:
    rate: float = 0.1


class Float(np.float64):
    pass


class MyTensor(torch.Tensor):
    pass


class Opaque:
    pass


def numbers() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Level.LOW, "Level, which would not come back as the same type: save its .name or its .value"),
        (Colour.RED, "save its .name or its .value"),
        (Text("a"), "Text, a subclass of str: it would not come back as the same type. Save str(…) of it"),
        (Steps(), "a subclass of list"),
        (OrderedDict.__class__, "is a type (type), which cannot be saved without pickle"),
        (Point(1), "Point: save a dict of its fields, or register it once with ckptstore.register(Point, …)"),
        (Settings(), "Settings: save a dict of its fields"),
        (torch.ones(2).max(dim=0), "save a dict of its fields"),
        (lambda: 1, "is a function (<lambda>), which cannot be saved without pickle. Save its parameters instead"),
        (len, "is a builtin_function_or_method (len), which cannot be saved without pickle"),
        (functools.partial(print), "functools.partial, which cannot be saved without pickle"),
        (Settings, "is a type (Settings), which cannot be saved"),
        (numbers(), "is a generator, which would not come back as the same type: save list(…) of it"),
        (range(3), "save list(…)"),
        ({}.keys(), "save list(…)"),
        (pathlib.PurePosixPath("a"), "save str(…) of it"),
        (bytearray(b"a"), "save bytes(…)"),
        (memoryview(b"a"), "save bytes(…)"),
        (torch.Generator(), "torch._C.Generator, which would not come back as the same type: save its .get_state()"),
        (random.Random(1), "save its state"),
        (np.random.default_rng(1), "save its .bit_generator.state"),
        (collections.UserDict(), "which ckptstore does not save. Give it state_dict()"),
        (decimal.Decimal(1), "decimal.Decimal, which ckptstore does not save"),
        (Opaque(), "or register it once with ckptstore.register(Opaque, …)"),
        (np.zeros((1, 1)).view(np.matrix), "save numpy.asarray(…) of it"),
        (np.ma.array([1], mask=[True]), "save its .data and its .mask"),
        (np.zeros(2, "i4,f4").view(np.recarray), "save numpy.asarray(…)"),
        (np.zeros(2, "i4,f4"), "NumPy array of dtype [('f0', '<i4'), ('f1', '<f4')]"),
        (np.array([object()]), "NumPy array of dtype object, which cannot be saved without pickle"),
        (np.zeros(1, np.longdouble), "is not the same on every machine. Convert it (for example .astype('float64'))"),
        (np.zeros(1, "V3"), "NumPy array of dtype |V3"),
        (np.ndarray((2,), "<U0"), "whose items have no bytes"),
        (np.longdouble(1), "not the same on every machine or would not come back as the same type"),
        (np.longlong(1), "would not come back as the same type. Convert it: .item()"),
        (np.void(b"abc"), "is a NumPy scalar of type void"),
        (Float(1), "is a NumPy scalar of type Float"),
        (torch.ones(2).to_sparse(), "is a torch.sparse_coo tensor: save .to_dense()"),
        (torch.ones(2, device="meta"), "is a meta tensor, which has no values"),
        (torch.ones(2).as_subclass(MyTensor), "MyTensor, a subclass of torch.Tensor: save a plain tensor"),
        (torch.nn.UninitializedParameter(), "it has no values yet: run one batch through the lazy module first"),
        (torch.nn.UninitializedBuffer(), "it has no values yet"),
        (torch.zeros([1] * 65), "shape that no checkpoint holds (at most 64 dimensions"),
        (torch.zeros(1).expand(2**48 + 1), "shape that no checkpoint holds"),
        (torch.zeros(1).expand(2**30, 2**30), "shape that no checkpoint holds"),
        (np.broadcast_to(np.zeros(1, "i1"), 2**48 + 1), "shape that no checkpoint holds"),
        (torch.zeros(1, dtype=torch.bits8), "has dtype torch.bits8, which ckptstore does not know: view it as uint8"),
        (defaultdict(Opaque), "Use a factory that is one of bool, bytes, complex, dict"),
        ({1: {2: Opaque()}}, "opt.groups[0].x[1][2] is a"),
    ],
    ids=lambda value: value[:40] if type(value) is str else type(value).__name__,
)
def test_what_cannot_come_back_the_same_is_refused_with_a_way_out(value: Any, words: str) -> None:
    assert words in refusal(value)


def test_tensors_of_other_kinds_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecated parts of torch say so
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        jagged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        compressed = torch.ones(2, 2).to_sparse_csr()
    with FakeTensorMode():
        fake = torch.ones(2)
    assert "is a nested tensor: save .unbind()" in refusal(nested)
    assert "NestedTensor: save .values()" in refusal(jagged)
    assert "is a quantized tensor: save .int_repr()" in refusal(quantized)
    assert "is a torch.sparse_csr tensor" in refusal(compressed)
    assert "FakeTensor: a fake tensor has no values" in refusal(fake)


def test_a_distributed_tensor_is_sent_to_distributed_checkpoints() -> None:
    # By name, for making a real one takes a process group: torch.distributed need not be imported to refuse it.
    class DTensor(torch.Tensor):
        pass

    text = refusal(torch.ones(2).as_subclass(DTensor))
    assert "saved through torch.distributed.checkpoint" in text
    assert ".full_tensor()" in text


def test_a_tensor_without_memory_is_refused_and_never_read() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    assert "has no memory behind it" in refusal(freed)

    def save(row: torch.Tensor) -> torch.Tensor:
        assert "has no memory behind it" in refusal(row)
        return row

    torch.func.vmap(save)(torch.ones(2, 3))


@pytest.mark.parametrize("state", [Opaque(), {1: Opaque()}, [Opaque()]])
def test_a_path_is_named_at_the_root_too(state: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^(the state|\[1\]|\[0\]) is a "):
        flatten(state)


def test_keys_and_members_of_sets_must_be_plain() -> None:
    words = "is or holds a Point; keys and members of sets can be str, int, bool, float, complex, None, bytes, and"
    assert f"a key of opt.groups[0].x {words}" in refusal({Point(1): 1})
    assert f"a key of opt.groups[0].x {words}" in refusal({(1, Point(1)): 1})
    assert f"opt.groups[0].x {words}" in refusal({Point(1)})
    assert "float32" in refusal({np.float32(1): 1})


def test_what_contains_itself_is_refused() -> None:
    inner: list[Any] = [1]
    state = {"a": {"b": inner}}
    inner.append(state["a"])
    with pytest.raises(InvalidInputError, match=re.escape("a.b[1] is the same dict as a, which contains it")):
        flatten(state)
    inner[1] = inner
    with pytest.raises(InvalidInputError, match=re.escape("a.b[1] is the same list as a.b, which contains it")):
        flatten(state)


def test_an_object_that_is_its_own_state_dict_is_refused() -> None:
    class Own:
        def state_dict(self) -> Any:
            return {"me": self}

        def load_state_dict(self, state: Any) -> None:
            pass

    assert "opt.groups[0].x.me is the same Own as opt.groups[0].x" in refusal(Own())


def test_the_same_list_in_two_places_is_fine() -> None:
    twice = [1]
    assert skeleton([twice, twice, None, None, (), ()])[:2] == [[1], [1]]


def test_a_tree_that_is_too_deep_is_refused_before_python_gives_up() -> None:
    deep: Any = 1
    key: Any = 1
    for _ in range(3000):
        deep, key = [deep], (key,)
    assert "is nested deeper than 100 containers" in refusal(deep)
    assert "is nested deeper than 100 tuples" in refusal({key: 1})


def test_metrics_hold_small_values_only() -> None:
    for value in (torch.ones(()), np.ones(1)):
        with pytest.raises(
            InvalidInputError, match=r"^metrics\.loss is a .*: metrics and metadata hold small values.*item"
        ):
            flatten({"loss": value}, tensors=False, root="metrics")
    node, leaves = flatten({"note": bytes(2000)}, tensors=False)
    assert node == {"note": {"$": "bytes", "hex": "00" * 2000}} and not leaves


def test_a_to_tree_that_gives_something_else_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.tree.registry._by_type", {})
    monkeypatch.setattr("ckptstore.tree.registry._by_name", {})
    register(Opaque, "opaque", lambda value: {"inner": lambda: 1}, lambda tree: Opaque())
    assert "opt.groups[0].x.inner is a function" in refusal(Opaque())
    register(Opaque, "opaque", lambda value: value, lambda tree: Opaque())
    assert "opt.groups[0].x is the same Opaque as opt.groups[0].x" in refusal(Opaque())
    register(Opaque, "opaque", lambda value: value.missing, lambda tree: Opaque())
    assert "the to_tree that was registered for it raised AttributeError" in refusal(Opaque())


# ---- register


def test_a_native_type_takes_no_registration() -> None:
    for cls in (int, dict, torch.Tensor, torch.nn.Parameter, np.ndarray, np.float32, torch.Size):
        with pytest.raises(InvalidInputError, match="is saved as it is and needs no registration"):
            register(cls, "mine", list, list)


def test_one_name_stands_for_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.tree.registry._by_type", {})
    monkeypatch.setattr("ckptstore.tree.registry._by_name", {})
    register(Opaque, "mine", vars, lambda tree: Opaque())
    register(Opaque, "mine", vars, lambda tree: Opaque())
    with pytest.raises(InvalidInputError, match="the name 'mine' is registered for Opaque already; choose another"):
        register(Settings, "mine", vars, Settings)


def test_a_class_that_a_notebook_defines_again_can_be_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.tree.registry._by_type", {})
    monkeypatch.setattr("ckptstore.tree.registry._by_name", {})

    def cell() -> Any:
        class Again:
            pass

        register(Again, "again", vars, lambda tree: Again())
        return Again()

    cell()
    assert skeleton(cell()) == {"$": "registered", "name": "again", "tree": {}}


def test_what_is_registered_must_be_a_type_with_a_name() -> None:
    with pytest.raises(InvalidInputError, match="register\\(\\) takes a type"):
        register(Opaque(), "mine", vars, lambda tree: Opaque())  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="use a name such as 'point'"):
        register(Opaque, "", vars, lambda tree: Opaque())
