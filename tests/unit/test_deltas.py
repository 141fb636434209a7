"""Which chunk a delta may stand on, and the table of a manifest whose chunks stand on others."""

from typing import Any

import pytest

from ckptstore.deltas import Held, find_bases, held_chunks, table
from ckptstore.manifest import ChunkRef, Manifest, Segment, Writer

SAVE = 32 * "a"


def name(number: int) -> str:
    return f"{number:064x}"


def tensor(segment: int, floats: int) -> dict[str, Any]:
    return {"$": "tensor", "dtype": "float32", "shape": [floats], "segment": segment}


def ref(number: int, raw: int = 40, base: int | None = None) -> ChunkRef:
    return ChunkRef(digest=name(number), save=SAVE, raw=raw, stored=10, base=base)


def manifest(tree: Any, segments: list[Segment], chunks: list[ChunkRef]) -> Manifest:
    return Manifest(
        run="run",
        step=1,
        save=SAVE,
        created="2026-11-25T01:02:03Z",
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=name(0),
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=tree,
        segments=segments,
        chunks=chunks,
    )


TREE = {"a": tensor(0, 20), "b": tensor(1, 10)}
SEGMENTS = [Segment(bytes=80, element=4, chunks=[0, 1]), Segment(bytes=40, element=4, chunks=[2])]
EARLIER = manifest(TREE, SEGMENTS, [ref(1), ref(2), ref(3)])


def bases(tree: Any, segments: list[Segment], lengths: list[int], earlier: Manifest = EARLIER) -> dict[int, str]:
    found = find_bases(range(len(lengths)), lengths, tree, segments, earlier)
    return {index: held.digest for index, held in found.items()}


def test_a_chunk_stands_on_the_one_at_the_same_place_of_the_same_tensor() -> None:
    tree = {"b": tensor(0, 10), "new": tensor(1, 10), "a": tensor(2, 20)}
    segments = [
        Segment(bytes=40, element=4, chunks=[0]),
        Segment(bytes=40, element=4, chunks=[1]),
        Segment(bytes=80, element=4, chunks=[2, 3]),
    ]
    assert bases(tree, segments, [40, 40, 40, 40]) == {0: name(3), 2: name(1), 3: name(2)}


def test_a_chunk_of_another_length_is_no_base() -> None:
    tree = {"a": tensor(0, 20), "b": tensor(1, 11)}
    segments = [Segment(bytes=80, element=4, chunks=[0, 1]), Segment(bytes=44, element=4, chunks=[2])]
    assert bases(tree, segments, [40, 40, 44]) == {0: name(1), 1: name(2)}


def test_only_what_is_wanted_gets_a_base() -> None:
    assert list(find_bases([1], [40, 40, 40], TREE, SEGMENTS, EARLIER)) == [1]


def test_a_bundle_stands_on_the_bundle_that_begins_with_the_same_tensor() -> None:
    segments = [
        Segment(bytes=16, element=4, chunks=[0], offset=0),
        Segment(bytes=24, element=4, chunks=[0], offset=16),
    ]
    tree = {"a": tensor(0, 4), "b": tensor(1, 6)}
    assert bases(tree, segments, [40], manifest(tree, segments, [ref(7)])) == {0: name(7)}
    swapped = {"b": tensor(0, 4), "a": tensor(1, 6)}
    assert bases(swapped, segments, [40], manifest(tree, segments, [ref(7)])) == {}


def test_what_stands_on_another_itself_is_no_base_but_what_it_stands_on_is() -> None:
    earlier = manifest(TREE, SEGMENTS, [ref(1, base=3), ref(2), ref(3), ref(9)])
    assert bases(TREE, SEGMENTS, [40, 40, 40], earlier) == {0: name(9), 1: name(2), 2: name(3)}


def test_chains_are_read_whatever_the_order_of_the_table() -> None:
    refs = [ref(1, base=2), ref(2), ref(3, base=3), ref(4, base=1)]
    held = held_chunks(manifest(None, [], refs))
    assert [link.digest for link in held[0].chain] == [name(2), name(4), name(3), name(1)]
    assert [link.key.split("/")[0] for link in held[0].chain] == ["chunks", "deltas", "deltas", "deltas"]


def test_bases_stand_behind_the_rest_of_the_table_once_each() -> None:
    base, other = Held(name(8), SAVE, 40, 10), Held(name(2), SAVE, 40, 10)
    chunks = [
        Held(name(1), SAVE, 40, 5, base),
        other,
        Held(name(3), SAVE, 40, 5, base),
        Held(name(4), SAVE, 40, 5, other),
    ]
    found = table(chunks)
    assert [each.digest for each in found] == [name(1), name(2), name(3), name(4), name(8)]
    assert [each.base for each in found] == [4, None, 4, 1, None]


def test_a_chain_of_any_length_stands_in_the_table() -> None:
    chain = Held(name(1), SAVE, 40, 10)
    for number in (2, 3, 4):
        chain = Held(name(number), SAVE, 40, 10, chain)
    found = table([chain])
    assert held_chunks(manifest(None, [], found))[0] == chain


@pytest.mark.parametrize("segments", [[], [Segment(bytes=0, element=1, chunks=[])]])
def test_a_state_without_bytes_has_no_bases(segments: list[Segment]) -> None:
    assert bases(None, segments, []) == {}
