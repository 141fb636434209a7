"""Whatever is in a state tree comes back the same; whatever is in a skeleton, nothing but our errors comes out."""

import contextlib
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import CheckpointError
from ckptstore.skeleton import MAPPING_TAGS, SEQUENCE_TAGS, TENSOR_TAGS, VALUE_TAGS
from ckptstore.tree import decode_hashable, flatten, unflatten
from ckptstore.tree.values import encode_hashable
from tests.strategies import assert_same, hashables, state_trees, through_json, values


@given(state_trees())
def test_a_tree_comes_back_the_same(state: Any) -> None:
    assert_same(through_json(state), state)


@given(state_trees())
def test_a_tree_that_is_only_described_is_the_same_too(state: Any) -> None:
    assert_same(through_json(state, describe=True), state)


@given(state_trees())
def test_a_skeleton_is_written_the_same_way_twice(state: Any) -> None:
    """Equal states have equal manifests, which is what makes an unchanged save free."""
    assert msgspec.json.encode(flatten(state)[0]) == msgspec.json.encode(flatten(through_json(state))[0])


@given(st.dictionaries(hashables(), values(), max_size=4))
def test_metrics_and_metadata_come_back_the_same(metadata: Any) -> None:
    skeleton, leaves = flatten(metadata, tensors=False, root="metadata")
    assert not leaves
    assert_same(unflatten(msgspec.json.decode(msgspec.json.encode(skeleton)), _nothing, []), metadata)


@given(hashables())
def test_a_key_comes_back_the_same(key: Any) -> None:
    assert_same(decode_hashable(encode_hashable(key, "a key")), key)


def _nothing(node: Any, path: str) -> Any:
    raise AssertionError("there are no tensors in it")


# ---- skeletons that nobody sane wrote

JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TAGS = st.sampled_from(sorted(TENSOR_TAGS | MAPPING_TAGS | SEQUENCE_TAGS | VALUE_TAGS | {"registered"}))
NAMES = st.sampled_from(
    [
        *("items", "hex", "bits", "name", "dtype", "maxlen", "factory", "tree", "metadata"),
        *("shape", "segment", "offset", "stride", "requires_grad", "parameter"),
    ]
)
WORDS = st.sampled_from(
    [
        "load",
        "__class__",
        "cuda:999",
        "npu",
        "float32",
        "float99",
        "<f4",
        "<U99999999",
        "<M8[x]",
        "|u1",
        "00",
        "-0x1",
        "g",
    ]
)


def _nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    # Most tags with the fields that belong to them, so that the checks of the values are reached.
    fields = st.dictionaries(NAMES, inner, max_size=6)
    containers = st.fixed_dictionaries({"$": TAGS, "items": st.lists(inner, max_size=3)})
    pairs = st.fixed_dictionaries({"$": TAGS, "items": st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)})
    leaves = st.fixed_dictionaries({"$": TAGS, "hex": inner, "bits": inner, "name": inner, "dtype": inner})
    tensors = st.fixed_dictionaries(
        {
            "$": TAGS,
            "dtype": WORDS,
            "shape": st.lists(st.integers(-1, 2**50), max_size=3),
            "segment": st.integers(0, 1),
        },
        optional={"stride": st.lists(st.integers(-1, 2**50), max_size=3), "requires_grad": st.booleans()},
    )
    tagged = st.builds(lambda tag, rest: {"$": tag, **rest}, TAGS | inner, fields)
    return st.lists(inner, max_size=3) | fields | tagged | containers | pairs | leaves | tensors


@given(st.recursive(JSON_VALUES | WORDS, _nodes, max_leaves=12), st.booleans())
def test_a_hostile_skeleton_gives_a_tree_or_one_of_our_errors(node: Any, describe: bool) -> None:
    with contextlib.suppress(CheckpointError):
        unflatten(node, lambda node, path: None, [0, 64], describe=describe)


@given(st.recursive(JSON_VALUES | WORDS, _nodes, max_leaves=12))
def test_a_hostile_key_gives_a_value_or_one_of_our_errors(node: Any) -> None:
    try:
        hash(decode_hashable(node))
    except CheckpointError:
        pass
    except TypeError:
        assert isinstance(decode_hashable(node), set | tuple)
