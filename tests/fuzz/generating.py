"""Inputs by structure: trees that hypothesis makes up, of all that a manifest can say, in manifests that fit them."""

import contextlib
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ckptstore.format import MAX_BLOCK_DIMENSIONS, MIN_MANIFEST_BYTES, ManifestKey
from ckptstore.manifest import Block, ChunkRef, Manifest, Segment, Writer, encode, format_naming
from ckptstore.skeleton import TensorNode
from ckptstore.tree import flatten
from tests.fuzz import mutating
from tests.fuzz.mutating import SAVES
from tests.strategies import state_trees

KEY = ManifestKey("lstm", 7, SAVES[0])

Parts = dict[str, bytes]


def each_generated(count: int, number: int, use: Callable[[Parts], None]) -> None:
    """Call `use` with `count` inputs that follow from the seed `number`."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(manifests())
    def run(parts: Parts) -> None:
        use(parts)

    run()


@st.composite
def manifests(draw: st.DrawFn) -> Parts:
    """A manifest of any state, as it was saved or made hostile; or of any JSON in the place of a tree."""
    if draw(st.booleans()):
        skeleton, segments, chunks = _of_a_state(draw(state_trees()))
    else:
        skeleton = draw(_trees())
        lengths = draw(st.lists(st.integers(0, 64), max_size=4))
        segments = [Segment(bytes=n, element=1, chunks=[i] if n else []) for i, n in enumerate(lengths)]
        chunks = [_ref(i, max(n, 1)) for i, n in enumerate(lengths)]
    value = Manifest(
        format=format_naming([], segments),
        run=KEY.run,
        step=KEY.step,
        save=KEY.save_id,
        created="2026-11-25T01:02:03Z",
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=64 * "0",
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=skeleton,
        segments=segments,
        chunks=chunks,
    )
    content = encode(value)
    if draw(st.booleans()):
        random = Random(draw(st.integers(0, 2**32)))
        changed = mutating.with_hostile_values(random, msgspec.json.decode(msgspec.json.encode(value)))
        with contextlib.suppress(RecursionError):  # deeper than the fuzzer itself could write; it is hostile as it is
            content = mutating.resealed(random, changed, MIN_MANIFEST_BYTES)
    return {str(KEY): content}


def _of_a_state(state: Any) -> tuple[Any, list[Segment], list[ChunkRef]]:
    skeleton, found = flatten(state)
    segments: list[Segment] = []
    refs: list[ChunkRef] = []
    for leaf in found:
        value: Any = leaf.value
        dtype = str(value.dtype).removeprefix("torch.") if leaf.node["$"] == "tensor" else value.dtype.str
        node = TensorNode(leaf.node["$"], dtype, tuple(value.shape), len(segments))
        leaf.node.update(node.to_json())
        segments.append(_segment(node, refs))
    return skeleton, segments, refs


def _segment(node: TensorNode, refs: list[ChunkRef]) -> Segment:
    """A segment that is put together of two blocks, if the tensor has two rows or more; else a plain one."""
    if not node.span_bytes:
        return Segment(bytes=0, element=1, chunks=[])
    number = len(refs)
    if not node.shape or node.shape[0] < 2 or len(node.shape) > MAX_BLOCK_DIMENSIONS:
        refs.append(_ref(number, node.span_bytes))
        return Segment(bytes=node.span_bytes, element=1, chunks=[number])
    row = node.span_bytes // node.shape[0]
    refs += [_ref(number, row), _ref(number + 1, node.span_bytes)]
    rest = list(node.shape[1:])
    blocks = [
        Block(at=[0] * len(node.shape), shape=[1, *rest], chunks=1),
        Block(at=[1, *[0] * len(rest)], shape=[node.shape[0] - 1, *rest], chunks=1, offset=row),
    ]
    chunks = [number, number + 1]
    return Segment(bytes=node.span_bytes, element=1, chunks=chunks, shape=list(node.shape), blocks=blocks)


def _ref(number: int, raw: int) -> ChunkRef:
    return ChunkRef(digest=f"{number:064x}", save=SAVES[0], raw=raw, stored=raw + 56)


def _trees() -> st.SearchStrategy[Any]:
    """Any JSON, with nodes of every tag in it, whose members are now right, now wrong."""
    hostile = st.builds(_hostile, st.integers(0, 2**32))
    return st.recursive(
        hostile | st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "b", "a.b", "", "[0]", "_metadata"]), inner, max_size=3)
            | st.builds(_sequence, st.sampled_from(["tuple", "set", "frozenset", "deque"]), st.lists(inner, max_size=3))
            | st.builds(
                _mapping,
                st.sampled_from(["dict", "ordered_dict", "defaultdict", "counter"]),
                st.lists(st.tuples(inner, inner).map(list), max_size=3),
                inner,
            )
        ),
        max_leaves=10,
    )


def _hostile(number: int) -> Any:
    """A hostile node that is JSON, however wrong."""
    random = Random(number)
    while True:
        try:
            return msgspec.json.decode(mutating.json_text(mutating.hostile_value(random)))
        except (msgspec.DecodeError, RecursionError, ValueError):
            continue


def _sequence(tag: str, items: list[Any]) -> Any:
    return {"$": tag, "items": items}


def _mapping(tag: str, items: list[Any], metadata: Any) -> Any:
    return {"$": tag, "items": items, "metadata": metadata}
