"""Sealed objects of any content come back as they were; hostile ones raise CorruptError and nothing else."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import CorruptError
from ckptstore.format import MAX_STEP, MIN_MANIFEST_BYTES, ManifestKey
from ckptstore.manifest import ChunkRef, Manifest, Segment, Writer, decode_manifest, encode
from ckptstore.sealed import seal, unseal
from ckptstore.skeleton import ITEM_SIZES, MAPPING_TAGS, SEQUENCE_TAGS, TENSOR_TAGS, VALUE_TAGS, find, leaves, tensors

SAVE = 32 * "a"
KEY = ManifestKey("run", 7, SAVE)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# In metrics and metadata a dict that holds "$" is a tagged node, and has to make sense.
KEYS = TEXT.filter(lambda key: key != "$")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20,
)
TAGS = [*sorted(TENSOR_TAGS | MAPPING_TAGS | SEQUENCE_TAGS | VALUE_TAGS), "registered", "unknown"]
NUMBERS = st.one_of(st.integers(-1, 30), st.sampled_from([2**48, 2**63, 2**64, 0.5, True, None, "1"]))
NODES = st.fixed_dictionaries(
    {"$": st.one_of(st.sampled_from(TAGS), JSON)},
    optional={
        "items": JSON,
        "tree": JSON,
        "metadata": JSON,
        "dtype": st.one_of(st.sampled_from([*ITEM_SIZES, "<f4", "|u1", "<U3", "|O"]), JSON),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), JSON),
        "stride": st.one_of(st.lists(NUMBERS, max_size=3), JSON),
        "segment": NUMBERS,
        "offset": NUMBERS,
        "requires_grad": NUMBERS,
        "other": JSON,
    },
)
VALUES = st.dictionaries(KEYS, JSON, max_size=4)
TREES = st.recursive(
    st.one_of(NODES, SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "a.b", "", "[0]"]), inner, max_size=3),
        st.builds(lambda tag, items: {"$": tag, "items": items}, st.sampled_from(TAGS), st.lists(inner, max_size=3)),
        st.builds(
            lambda tag, items: {"$": tag, "items": items},
            st.sampled_from(sorted(MAPPING_TAGS)),
            st.lists(st.tuples(JSON, inner).map(list), max_size=3),
        ),
    ),
    max_leaves=10,
)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "run": "run",
        "step": 7,
        "save": SAVE,
        "created": "2026-11-25T01:02:03.000004Z",
        "writer": Writer(host="node7", pid=42, version="0.1.0"),
        "replaces": [],
        "metrics": {},
        "metadata": {},
        "content": 64 * "0",
        "raw_bytes": 0,
        "stored_bytes": 0,
        "new_bytes": 0,
        "tree": None,
        "segments": [],
        "chunks": [],
    }
    return Manifest(**(values | changes))


@given(JSON, VALUES, VALUES, TEXT, st.integers(0, MAX_STEP))
def test_a_manifest_of_any_tree_comes_back_as_it_was(
    tree: Any, metrics: Any, metadata: Any, host: str, step: int
) -> None:
    writer = Writer(host=host, pid=1, version="1")
    value = manifest(tree=tree, metrics=metrics, metadata=metadata, writer=writer, step=step)
    content = encode(value)
    found = decode_manifest(content, value.key)
    assert found == value
    # Equality takes 1 for 1.0 and for True, 0.0 for -0.0, and one order of a dict for another; this does not.
    assert encode(found) == content
    assert len(content) >= MIN_MANIFEST_BYTES
    assert json.loads(content)["tree"] == tree


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.data())
def test_segments_are_taken_only_if_their_chunks_hold_exactly_their_bytes(
    lengths: list[int], data: st.DataObject
) -> None:
    chunks = [ChunkRef(digest=f"{number:064x}", save=SAVE, raw=raw, stored=raw) for number, raw in enumerate(lengths)]
    indices = data.draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    claimed = data.draw(st.one_of(st.integers(0, 400), st.just(sum(lengths[i] for i in indices if i < len(lengths)))))
    offset = data.draw(st.one_of(st.none(), st.integers(0, 100)))
    value = manifest(chunks=chunks, segments=[Segment(bytes=claimed, element=1, chunks=indices, offset=offset)])
    known = all(index < len(lengths) for index in indices)
    held = sum(lengths[index] for index in indices) if known else 0
    fits = claimed == held if offset is None else len(indices) == 1 and offset + claimed <= held
    try:
        decode_manifest(encode(value), KEY)
    except CorruptError:
        assert not (known and fits)
    else:
        assert known and fits


@given(JSON.filter(lambda value: isinstance(value, dict) and value != {}), st.integers(0, 300))
def test_any_object_is_unsealed_to_what_was_sealed(value: Any, min_bytes: int) -> None:
    content = seal(msgspec.json.encode(value), min_bytes=min_bytes)
    assert json.loads(unseal(content, "key")) == value
    assert len(content) >= min_bytes


@given(st.binary(max_size=300))
def test_no_bytes_make_decoding_fail_in_another_way_not_even_under_a_seal_that_is_right(text: bytes) -> None:
    whole = msgspec.json.encode(manifest(tree="HERE"))
    for content in (text, seal(b"{" + text + b" }"), seal(whole.replace(b'"HERE"', text))):
        try:
            decode_manifest(content.ljust(MIN_MANIFEST_BYTES), KEY)
            decode_manifest(content, KEY)
        except CorruptError:
            continue


@given(st.dictionaries(st.sampled_from([*Manifest.__struct_fields__, "other"]), st.one_of(JSON, NUMBERS), max_size=3))
def test_members_of_any_type_make_decoding_fail_in_no_other_way(changes: dict[str, Any]) -> None:
    members = json.loads(msgspec.json.encode(manifest())) | changes
    content = seal(json.dumps(members).encode(), min_bytes=MIN_MANIFEST_BYTES)
    try:
        found = decode_manifest(content, KEY)
    except CorruptError:
        return
    except Exception as error:
        assert type(error).__name__ == "UnsupportedFormatError"
        assert isinstance(changes["format"], int) and changes["format"] > 1
        return
    assert json.loads(msgspec.json.encode(found)) == members


@given(TREES, st.lists(st.integers(0, 100), max_size=3), st.sampled_from(["a", "a.b", "[0]", "a[0].b", "b.a"]))
def test_a_hostile_tree_is_walked_or_corrupt(tree: Any, segment_bytes: list[int], path: str) -> None:
    try:
        list(leaves(tree))
        described = list(tensors(tree, segment_bytes))
    except CorruptError:
        return
    for _, node in described:
        assert 0 <= node.offset <= node.offset + node.span_bytes <= segment_bytes[node.segment]
        assert node.offset % node.item_bytes == 0
    try:
        find(tree, path)
    except LookupError:
        return
