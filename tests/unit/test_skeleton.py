"""Skeletons: walking them, finding a path in them, and refusing those that make no sense. No torch is needed for it."""

import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from ckptstore.errors import CorruptError, NotFoundError
from ckptstore.skeleton import (
    ITEM_SIZES,
    MAPPING_TAGS,
    MAX_DEPTH,
    MAX_PATH_CHARACTERS,
    SEQUENCE_TAGS,
    TENSOR_TAGS,
    VALUE_TAGS,
    TensorNode,
    children,
    contiguous_stride,
    find,
    is_tensor,
    join,
    leaves,
    numpy_item_bytes,
    tensors,
)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"$": "tensor", "dtype": "float32", "shape": [2, 3], "segment": 0} | changes


def tagged(tag: str, *items: Any, **more: Any) -> dict[str, Any]:
    return {"$": tag, "items": list(items), **more}


def parse(node: dict[str, Any], segment_bytes: list[int] | None = None) -> TensorNode:
    return TensorNode.from_json(node, "model.w", [24] if segment_bytes is None else segment_bytes)


TREE = {
    "model": tagged("ordered_dict", ["a.weight", tensor()], ["a.bias", tensor(shape=[3])], metadata={"v": tensor()}),
    "list": [1, {"x": None}, []],
    "tuple": tagged("tuple", "t", tagged("set", 3, 4)),
    "keys": tagged("dict", [1, "int"], ["1", "str"], [None, "none"], [{"$": "bytes", "hex": "00"}, "bytes"]),
    "size": tagged("size", 1, 2),
    "point": {"$": "registered", "name": "point", "tree": {"x": 1.5}},
}


# ---- walking


def test_leaves_are_named_by_their_paths_in_order() -> None:
    assert [path for path, _ in leaves(TREE)] == [
        "model.a.weight",
        "model.a.bias",
        "list[0]",
        "list[1].x",
        "list[2]",
        "tuple[0]",
        "tuple[1][0]",
        "tuple[1][1]",
        "keys[1]",
        "keys.1",
        "keys[None]",
        "keys[b'\\x00']",
        "size",
        "point.x",
    ]


def test_tensors_that_modules_hide_in_their_metadata_are_seen_too() -> None:
    """Their chunks have to be fetched like all others, though people need not see them."""
    assert [path for path, _ in tensors(TREE, [24])] == ["model.a.weight", "model.a.bias", "model._metadata.v"]


def test_tensors_of_a_part_are_named_by_their_paths_in_the_whole() -> None:
    found = tensors(find(TREE, "model"), [24], "model")
    assert [path for path, _ in found] == ["model.a.weight", "model.a.bias", "model._metadata.v"]


def test_the_tree_may_be_a_leaf() -> None:
    assert list(leaves(5)) == [("", 5)]
    assert [path for path, _ in tensors(tensor(), [24])] == [""]


@pytest.mark.parametrize("tag", sorted(MAPPING_TAGS))
def test_mappings_name_their_members_by_key(tag: str) -> None:
    assert children(tagged(tag, ["a", 1], [2, 3]), "p") == [("p.a", 1), ("p[2]", 3)]


@pytest.mark.parametrize("tag", sorted(SEQUENCE_TAGS))
def test_sequences_name_their_members_by_index(tag: str) -> None:
    assert children(tagged(tag, "x", "y"), "p") == [("p[0]", "x"), ("p[1]", "y")]


@pytest.mark.parametrize("tag", sorted(VALUE_TAGS | TENSOR_TAGS))
def test_values_and_tensors_have_no_members(tag: str) -> None:
    assert children({"$": tag, "items": [1, 2]}, "p") == []


def test_paths_join_as_python_would_write_them() -> None:
    assert [join("a", key) for key in ("b", 0, None, 1.5, True)] == ["a.b", "a[0]", "a[None]", "a[1.5]", "a[True]"]
    assert [join("", key) for key in ("b", 0)] == ["b", "[0]"]


def nested(depth: int) -> Any:
    node: Any = 1
    for _ in range(depth):
        node = [node]
    return node


def test_containers_may_be_nested_only_so_deep() -> None:
    assert len(list(leaves(nested(MAX_DEPTH)))) == 1
    for deep in (nested(MAX_DEPTH + 1), nested(900)):
        with pytest.raises(CorruptError, match="nested deeper than 100 containers"):
            list(leaves(deep))


@pytest.mark.parametrize(
    "node",
    [
        *(
            {"$": tag}
            for tag in (None, True, 5, 0.5, [], ["tensor"], {}, {"$": "tensor"}, "", "Tensor", "pickle", "list")
        ),
        *({"$": tag} for tag in sorted(MAPPING_TAGS | SEQUENCE_TAGS)),
        *({"$": tag, "items": items} for tag in ("dict", "tuple") for items in (None, 5, "ab", {"ab": 1}, True)),
        *({"$": "dict", "items": [item]} for item in (5, "ab", {"a": 1, "b": 2}, [], [1], [1, 2, 3], None)),
        {"$": "registered", "name": "point"},
    ],
    ids=repr,
)
def test_what_is_tagged_in_a_way_that_makes_no_sense_is_corrupt(node: Any) -> None:
    with pytest.raises(CorruptError, match=r"a\.b: what is tagged"):
        list(leaves({"b": node}, "a"))


@pytest.mark.parametrize("node", [None, 5, "tensor", ["tensor"], {}, {"$": []}, {"$": {}}, {"tensor": 1}], ids=repr)
def test_what_has_no_tensors_tag_is_no_tensor(node: Any) -> None:
    assert not is_tensor(node)


def test_walking_needs_no_torch() -> None:
    code = "import sys, ckptstore.skeleton, ckptstore.manifest, ckptstore.chunk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- finding


@pytest.mark.parametrize(
    "path", ["model", "model.a.weight", "list", "list[1]", "list[1].x", "tuple[1][0]", "keys[1]", "keys.1", "point.x"]
)
def test_a_path_finds_its_node(path: str) -> None:
    everything: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", TREE)]
    while stack:
        here, node = stack.pop()
        everything[here] = node
        stack.extend(children(node, here))
    assert find(TREE, path) is everything[path]


def test_of_two_keys_that_begin_a_path_the_longer_one_leads_on() -> None:
    assert find({"a": {"b": 1}, "a.b": {"c": 2}}, "a.b.c") == 2


def test_the_empty_path_is_the_tree() -> None:
    assert find(TREE, "") is TREE


@pytest.mark.parametrize(
    "path", ["mode", "models", "model.a", "list[9]", "list[1].x.y", "size[0]", ".", "[0]", "model."]
)
def test_a_path_that_leads_nowhere_is_not_found(path: str) -> None:
    with pytest.raises(NotFoundError, match="there is no "):
        find(TREE, path)


def test_not_found_says_what_stands_there_instead() -> None:
    with pytest.raises(
        NotFoundError, match=r"no 'model\.b' in the checkpoint; under 'model' stand: model\.a\.weight, model"
    ):
        find(TREE, "model.b")


# ---- tensors


def test_a_tensor_comes_back_as_it_was_described() -> None:
    for node in (
        TensorNode("tensor", "float32", (2, 3), 0),
        TensorNode("tensor", "float32", (), 0, offset=20, requires_grad=True, parameter=True),
        TensorNode("tensor", "bfloat16", (3, 2), 0, offset=2, stride=(1, 3)),
        TensorNode("tensor", "int64", (1000,), 0, stride=(0,)),
        TensorNode("ndarray", "<f8", (3,), 0),
        TensorNode("ndarray", ">M8[25us]", (), 0, offset=16),
        TensorNode("blob", "|u1", (24,), 0),
        TensorNode("tensor", "float32", (0, 5), 0, offset=24),
    ):
        assert parse(node.to_json()) == node


def test_what_is_the_default_is_not_written() -> None:
    assert TensorNode("tensor", "float32", (2, 3), 0).to_json() == tensor()


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"dtype": dtype}
            for dtype in ("float31", "torch.float32", "<f4", "", "object", "quint8", 5, None, ["float32"])
        ),
        *(
            {"shape": shape}
            for shape in ([2, 4], [7], [-2, 3], [2.0, 3], [True, 3], ["2"], 6, None, "23", [2**48 + 1], 65 * [1])
        ),
        *({"shape": shape, "stride": [0, 0]} for shape in ([2**48, 2**48], [2**48, 2**12])),
        *({"shape": [0, *more]} for more in ([2**48, 2**48], [2**48, 2**12])),
        *(
            {"stride": stride}
            for stride in ([3], [3, 1, 1], [], [4, 1], [3, 2], [-3, 1], [2**48, 1], [2**64, 1], 3, [1.0, 3])
        ),
        *({"offset": offset} for offset in (4, 24, -4, 2**64, 0.0, None, "0")),
        *({"segment": segment} for segment in (1, -1, 2**64, 0.0, None, True)),
        *({flag: value} for flag in ("requires_grad", "parameter") for value in (1, 0, "true", None)),
        {"strides": [3, 1]},
        {"device": "cuda"},
        {"shape": [1], "offset": 2},
        {"shape": [1], "offset": 1},
        {"shape": [0], "offset": 28},
        {"dtype": "complex128", "shape": [1], "offset": 8},
        *({"dtype": dtype, "shape": [3], "requires_grad": True} for dtype in ("int64", "bool", "uint8")),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_segment_is_corrupt(changes: dict[str, Any]) -> None:
    parse(tensor())
    with pytest.raises(CorruptError, match=r"^model\.w is described"):
        parse(tensor(**changes))


@pytest.mark.parametrize(
    "node",
    [
        *(
            {"$": "ndarray", "dtype": dtype}
            for dtype in ("float32", "|O", "|V8", "<f2,<i4", "<f16", "|S0", "<U0", "=f4", "f4")
        ),
        *({"$": "ndarray", "dtype": "<f4", flag: True} for flag in ("requires_grad", "parameter")),
        {"$": "ndarray", "dtype": "<f4", "stride": [1]},
        *({"$": "blob", "dtype": dtype} for dtype in ("<f4", "uint8", "|i1", "|S1")),
        {"$": "blob", "dtype": "|u1", "shape": [1, 1]},
        {"$": "blob", "dtype": "|u1", "shape": []},
    ],
    ids=str,
)
def test_an_array_or_bytes_with_what_only_tensors_have_is_corrupt(node: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"^model\.w is described"):
        parse({"shape": [1], "segment": 0} | node)


@pytest.mark.parametrize("missing", ["dtype", "shape", "segment"])
def test_a_tensor_without_its_place_is_corrupt(missing: str) -> None:
    with pytest.raises(CorruptError, match=f"missing required field `{missing}`"):
        parse({key: value for key, value in tensor().items() if key != missing})


def test_there_may_be_no_segments_at_all() -> None:
    with pytest.raises(CorruptError):
        parse(tensor(shape=[0]), [])


@pytest.mark.parametrize(
    ("changes", "logical", "span"),
    [
        ({}, 24, 24),
        ({"shape": []}, 4, 4),
        ({"shape": [0, 3]}, 0, 0),
        ({"shape": [2, 2], "stride": [3, 1]}, 16, 20),
        ({"shape": [5, 6], "stride": [0, 1]}, 120, 24),
        ({"dtype": "complex128", "shape": [1]}, 16, 16),
    ],
)
def test_logical_bytes_count_elements_and_span_bytes_what_they_touch(changes: Any, logical: int, span: int) -> None:
    node = parse(tensor(**changes))
    assert (node.logical_bytes, node.span_bytes) == (logical, span)


def test_item_sizes_are_those_of_torch() -> None:
    known = {name: getattr(torch, name).itemsize for name in ITEM_SIZES if hasattr(torch, name)}
    assert known == {name: size for name, size in ITEM_SIZES.items() if name in known}
    assert len(known) > 15


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 1, 5), (4, 3, 2, 1)])
def test_contiguous_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize(
    "dtype",
    [
        *("?", "b", "B", "<i2", ">u2", "<i4", ">i8", "<f2", ">f4", "<f8", "<c8", ">c16"),
        *("S5", "<U3", ">U3", "<M8", "<M8[ns]", ">m8[25s]", "M8[W]", "m8[as]"),
    ],
)
def test_item_bytes_of_numpys_dtypes_are_numpys(dtype: str) -> None:
    found = np.dtype(dtype)
    assert numpy_item_bytes(found.str) == found.itemsize


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "f4",
            "<f4 ",
            "<f4\n",
            "<f3",
            "<f16",
            "<c32",
            "|O",
            "|O8",
            "|V4",
            "<i1",
            "|i4",
            "=i4",
            "|S٣",
            "<U٣",
            "|S",
            "<U",
        ),
        *("<U999999999", "|S999999999999", "|S-1", "<M8[]", "<M8[x]", "<M8[0s]", "<M8[generic]", "<M8[٣s]", "<m4[s]"),
        *("<f4,<f4", "(2,)<f4", "float32", "<M8[s", "<M8[9999999999s]"),
    ],
)
def test_what_is_no_dtype_that_is_the_same_everywhere_has_no_item_bytes(text: str) -> None:
    assert numpy_item_bytes(text) is None


# ---- what somebody crafted


def test_a_path_that_would_be_too_long_ends_in_a_digest_and_stays_different_from_others() -> None:
    long = "k" * 10_000
    tree = {long: {"a": [1, 2], "b": 3}, f"{long}2": {"a": 4}}
    paths = [path for path, _ in leaves(tree)]
    assert len(set(paths)) == 4
    assert {len(path) for path in paths} == {MAX_PATH_CHARACTERS}
    assert all(path.startswith("kkk") and "…" in path for path in paths)
    assert paths == [path for path, _ in leaves(tree)]


def test_a_path_of_the_greatest_length_stands_as_it_is() -> None:
    key = "k" * (MAX_PATH_CHARACTERS - 2)
    assert [path for path, _ in leaves({key: {"a": 1}})] == [f"{key}.a"]
    assert [path for path, _ in leaves({key: {"ab": 1}})] != [f"{key}.ab"]


def test_what_stands_at_a_long_path_is_found_by_all_of_it() -> None:
    long = "k" * 10_000
    tree = {long: {"a": [1, {"b": 2}]}}
    assert find(tree, f"{long}.a[1].b") == 2
    with pytest.raises(NotFoundError, match=r"stand: k+….*\[0\]|stand: k+…"):
        find(tree, f"{long}.a[7]")


def deep(levels: int) -> Any:
    """Lists within lists, too deep for Python to write out."""
    node: Any = 1
    for _ in range(levels):
        node = [node]
    return node


@pytest.mark.parametrize("levels", [300, 5000])
def test_keys_and_tags_that_are_nested_too_deep_to_be_written_out_are_corrupt(levels: int) -> None:
    for tree in (
        tagged("dict", [deep(levels), 1]),
        tagged("dict", [{"$": "frozenset", "items": deep(levels)}, 1]),
        {"$": deep(levels)},
    ):
        with pytest.raises(CorruptError) as caught:
            list(leaves(tree))
        assert len(str(caught.value)) < 200


def test_a_key_that_is_a_tuple_of_tuples_too_deep_is_corrupt() -> None:
    def nested(levels: int) -> Any:
        node: Any = 1
        for _ in range(levels):
            node = {"$": "tuple", "items": [node]}
        return node

    assert len(list(leaves(tagged("dict", [nested(100), 1])))) == 1
    for levels in (102, 5000):
        with pytest.raises(CorruptError, match="nested deeper than 100 tuples"):
            list(leaves(tagged("dict", [nested(levels), 1])))


def test_walking_a_long_list_holds_one_path_at_a_time() -> None:
    tree = [0] * 100_000
    tracemalloc.start()
    count = sum(1 for _ in leaves(tree))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(tree)
    assert peak < 100_000
