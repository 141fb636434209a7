"""The JSON objects: they come back as they were, and nothing that was changed, or makes no sense, comes back at all."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ckptstore
from ckptstore.errors import CorruptError, UnsupportedFormatError
from ckptstore.format import MARKER_KEY, MIN_MANIFEST_BYTES, ManifestKey, condemned_key, session_key
from ckptstore.manifest import (
    Block,
    ChunkRef,
    Condemned,
    Ended,
    Manifest,
    Marker,
    Segment,
    Session,
    Writer,
    checkpoint_digest,
    content_digest,
    decode_condemned,
    decode_manifest,
    decode_marker,
    decode_session,
    encode,
    format_naming,
)
from ckptstore.sealed import seal

SAVE, OTHER = 32 * "a", 32 * "b"
DIGEST, DIGEST_2 = 64 * "1", 64 * "2"
TIME = "2026-11-25T01:02:03.000004Z"
WRITER = Writer(host="node7", pid=42, version="0.1.0")
KEY = ManifestKey("lstm", 300, SAVE)
TREE: dict[str, Any] = {
    "w": {"$": "tensor", "dtype": "float32", "shape": [3], "segment": 0},
    "b": {"$": "tensor", "dtype": "float32", "shape": [1], "segment": 1},
    "odd": [None, True, -0.0, 1e300, 0.1, 2**53 - 1, "é\u0000\U0001f600", {"": {}}],
}

Any_ = Marker | Session | Manifest | Ended | Condemned


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "run": "lstm",
        "step": 300,
        "save": SAVE,
        "created": TIME,
        "writer": WRITER,
        "replaces": [OTHER],
        "metrics": {"loss": 0.5},
        "metadata": {},
        "content": DIGEST,
        "raw_bytes": 16,
        "stored_bytes": 90,
        "new_bytes": 45,
        "tree": TREE,
        "segments": [
            Segment(bytes=12, element=4, chunks=[0, 1]),
            Segment(bytes=4, element=4, chunks=[1], offset=0),
            Segment(bytes=0, element=1, chunks=[]),
        ],
        "chunks": [
            ChunkRef(digest=DIGEST, save=SAVE, raw=8, stored=45),
            ChunkRef(digest=DIGEST_2, save=OTHER, raw=4, stored=45),
        ],
    }
    return Manifest(**(values | changes))


@dataclass(frozen=True)
class Kind:
    """One kind of sealed object: an example, and how it is read from where it belongs."""

    value: Any_
    decode: Callable[[bytes], Any_]

    @property
    def content(self) -> bytes:
        return encode(self.value)

    def changed(self, **changes: Any) -> bytes:
        """The object with other members, under a seal that is right. Longer ones keep the length of a manifest."""
        members = json.loads(msgspec.json.encode(self.value)) | changes
        return self.sealed(json.dumps(members, separators=(",", ":")).encode())

    def sealed(self, text: bytes) -> bytes:
        return seal(text, min_bytes=MIN_MANIFEST_BYTES if isinstance(self.value, Manifest) else 0)


def ended(state: Any) -> Ended:
    return Ended(state=state, run="lstm", step=300, save=SAVE, created=TIME)


KINDS = {
    "marker": Kind(
        Marker(store=SAVE, created=TIME, chunk_bytes=2**23, small_bytes=2**16),
        lambda content: decode_marker(content, MARKER_KEY),
    ),
    "session": Kind(
        Session(save=SAVE, run="lstm", step=300, writer=WRITER, opened=TIME, beat=3),
        lambda content: decode_session(content, session_key(SAVE)),
    ),
    "manifest": Kind(manifest(), lambda content: decode_manifest(content, KEY)),
    "fence": Kind(ended("fenced"), lambda content: decode_manifest(content, KEY)),
    "tombstone": Kind(ended("deleted"), lambda content: decode_manifest(content, KEY)),
    "condemned": Kind(
        Condemned(collection=SAVE, reason="corrupt", created=TIME, keys=[f"chunks/11/{DIGEST}.{SAVE}"]),
        lambda content: decode_condemned(content, condemned_key(SAVE)),
    ),
}
MANIFEST = KINDS["manifest"]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
def test_each_object_comes_back_as_it_was(kind: Kind) -> None:
    assert kind.decode(kind.content) == kind.value


@each_kind
def test_each_object_is_json_that_begins_with_its_version(kind: Kind) -> None:
    assert kind.content.startswith(b'{"format":1,')
    assert json.loads(kind.content).keys() >= {"format", "digest"}


@each_kind
def test_every_flipped_bit_of_each_object_is_seen(kind: Kind) -> None:
    content = kind.content
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            with pytest.raises(CorruptError):
                kind.decode(bytes(flipped))


@each_kind
def test_every_truncation_of_each_object_is_seen(kind: Kind) -> None:
    content = kind.content
    for length in range(len(content)):
        with pytest.raises(CorruptError):
            kind.decode(content[:length])


@each_kind
def test_a_newer_version_is_named_as_such_whatever_else_it_holds(kind: Kind) -> None:
    newest = {Manifest: 3, Condemned: 2}.get(type(kind.value), 1)
    members = json.loads(msgspec.json.encode(kind.value)) | {"format": newest + 1}
    for text in (
        f'{{"format":{newest + 1}}}'.encode(),
        b'{"format":4,"state":{"of":"affairs"}}',
        b'{"wholly":["other"],"format":1000}',
        json.dumps(members).encode(),
    ):
        with pytest.raises(UnsupportedFormatError, match=r"reads up to [123]\. Install a newer ckptstore"):
            kind.decode(seal(text))


@each_kind
@pytest.mark.parametrize(
    "version", ["0", "-1", '"1"', "null", "1.5", "1.0", "true", "[1]", 5000 * "9"], ids=lambda text: text[:9]
)
def test_a_version_that_is_none_is_corrupt(kind: Kind, version: str) -> None:
    text = version.encode()
    with pytest.raises(CorruptError):
        kind.decode(kind.sealed(b'{"format":' + text + b',"state":"committed"}'))


@each_kind
def test_no_kind_is_taken_for_another(kind: Kind) -> None:
    for other in KINDS.values():
        if type(other.value) is not type(kind.value):
            try:
                found = kind.decode(other.content)
            except CorruptError:
                continue
            # A manifest, a fence and a tombstone have one key: which it is, the object says.
            assert found == other.value
            assert {type(found), type(kind.value)} == {Manifest, Ended}


@each_kind
def test_an_unknown_member_is_corrupt(kind: Kind) -> None:
    with pytest.raises(CorruptError, match="unknown"):
        kind.decode(kind.changed(unknown=1))


@each_kind
def test_a_missing_member_is_corrupt(kind: Kind) -> None:
    members = json.loads(msgspec.json.encode(kind.value))
    for name in members.keys() - {"kind"}:
        rest = {key: value for key, value in members.items() if key != name}
        with pytest.raises(CorruptError):
            kind.decode(kind.sealed(json.dumps(rest).encode()))


@each_kind
@pytest.mark.parametrize("space", [{"indent": 1}, {"sort_keys": True}, {"ensure_ascii": False}])
def test_how_another_program_writes_the_same_json_does_not_matter(kind: Kind, space: Any) -> None:
    text = json.dumps(json.loads(msgspec.json.encode(kind.value)), **space).encode()
    assert kind.decode(kind.sealed(text)) == kind.value


@each_kind
def test_a_key_that_stands_twice_is_corrupt(kind: Kind) -> None:
    text = msgspec.json.encode(kind.value)
    with pytest.raises(CorruptError, match="twice"):
        kind.decode(kind.sealed(b'{"format":1,' + text[1:]))


@pytest.mark.parametrize(
    "tree", ['{"w":1,"w":2}', '[{"a":[{"w":1,"w":1}]}]', '{"w":1,"\\u0077":2}', '{"$":"tuple","items":[],"items":[]}']
)
def test_a_key_that_stands_twice_in_the_tree_is_corrupt(tree: str) -> None:
    text = msgspec.json.encode(manifest(tree="HERE")).replace(b'"HERE"', tree.encode())
    with pytest.raises(CorruptError, match="twice"):
        MANIFEST.decode(MANIFEST.sealed(text))


@pytest.mark.parametrize(
    "tree",
    [
        *(b"\xff", b'"\xff"', b'{"\xff":1}', b'"\xed\xa0\x80"', b'"\\ud800"', b"NaN", b"Infinity", b"1e999"),
        *(b"01", b"'a'", b"[1,]", b"", b"9" * 5000, b'"\n"', b"[" * 10**5 + b"]" * 10**5, b'{"a":' * 10**5),
    ],
    ids=lambda tree: repr(tree[:12]),
)
def test_what_is_not_json_is_corrupt(tree: bytes) -> None:
    text = msgspec.json.encode(manifest(tree="HERE")).replace(b'"HERE"', tree)
    with pytest.raises(CorruptError, match=r"runs/lstm/0+300\.a+\.json"):
        MANIFEST.decode(MANIFEST.sealed(text))


BAD_NAMES = ["", "..", "../../etc", "a/b", "/a", ".x", "a\n", "a\0", 129 * "a", None, 5]
BAD_IDS = ["", SAVE[1:], SAVE + "a", SAVE + "\n", SAVE.upper(), "../" + SAVE[3:], None, 5]
BAD_TIMES = [
    *("", "now", TIME + "\n", TIME[:-1], TIME[:-1] + "+01:00", TIME.replace("-11-", "-13-"), TIME.replace("T", " ")),
    *("2026-11-25T24:00:00Z", "2026-02-30T00:00:00Z", "0000-01-01T00:00:00Z", "\x1b[31m", None, 5, 1.5),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
@pytest.mark.parametrize("kind", [KINDS["session"], MANIFEST, KINDS["fence"]], ids=["session", "manifest", "fence"])
def test_a_run_that_cannot_be_in_a_key_is_corrupt(kind: Kind, name: Any) -> None:
    with pytest.raises(CorruptError):
        kind.decode(kind.changed(run=name))


@pytest.mark.parametrize("name", BAD_IDS, ids=repr)
@pytest.mark.parametrize("member", ["save", "store", "collection"])
def test_an_id_that_is_none_is_corrupt(member: str, name: Any) -> None:
    for kind in KINDS.values():
        if hasattr(kind.value, member):
            with pytest.raises(CorruptError):
                kind.decode(kind.changed(**{member: name}))


@pytest.mark.parametrize("time", BAD_TIMES, ids=repr)
@pytest.mark.parametrize("member", ["created", "opened"])
def test_a_time_that_is_none_is_corrupt(member: str, time: Any) -> None:
    for kind in KINDS.values():
        if hasattr(kind.value, member):
            with pytest.raises(CorruptError):
                kind.decode(kind.changed(**{member: time}))


def test_a_time_may_have_no_fraction() -> None:
    """`datetime.isoformat` leaves it out once in a million seconds."""
    kind = KINDS["session"]
    assert kind.decode(kind.changed(opened="2026-11-25T01:02:03Z")) == msgspec.structs.replace(
        kind.value, opened="2026-11-25T01:02:03Z"
    )


@pytest.mark.parametrize("changes", [{"run": "other"}, {"step": 301}, {"save": OTHER}])
def test_an_object_at_anothers_key_is_corrupt(changes: dict[str, Any]) -> None:
    for name in ("manifest", "fence", "tombstone"):
        with pytest.raises(CorruptError, match="says that it is the manifest"):
            KINDS[name].decode(KINDS[name].changed(**changes))


def test_a_session_and_a_list_at_anothers_key_are_corrupt() -> None:
    """A collector would fence the wrong save."""
    with pytest.raises(CorruptError, match="says that it is the session"):
        decode_session(KINDS["session"].content, session_key(OTHER))
    with pytest.raises(CorruptError, match="says that it is the condemned list"):
        decode_condemned(KINDS["condemned"].content, condemned_key(OTHER))


# ---- length: a listing alone tells manifests from fences and tombstones


def test_the_smallest_manifest_is_longer_than_the_longest_fence() -> None:
    smallest = manifest(run="a", metrics={}, metadata={}, tree={}, segments=[], chunks=[], replaces=[])
    longest = Ended(state="deleted", run=128 * "a", step=2**63 - 1, save=SAVE, created=TIME)
    assert len(encode(longest)) < MIN_MANIFEST_BYTES == len(encode(smallest))


def test_a_manifest_that_a_listing_takes_for_a_fence_is_corrupt() -> None:
    value = manifest(tree={}, segments=[], chunks=[], replaces=[])
    short = seal(msgspec.json.encode(value))
    assert len(short) < MIN_MANIFEST_BYTES
    with pytest.raises(CorruptError, match="is committed, which"):
        decode_manifest(short, KEY)


@pytest.mark.parametrize("state", ["fenced", "deleted"])
def test_a_fence_or_tombstone_that_a_listing_takes_for_a_manifest_is_corrupt(state: str) -> None:
    padded = seal(msgspec.json.encode(ended(state)), min_bytes=MIN_MANIFEST_BYTES)
    with pytest.raises(CorruptError, match=f"is {state}, which"):
        decode_manifest(padded, KEY)


@pytest.mark.parametrize("state", [None, "", "Committed", "gone", 1, ["committed"], {}])
def test_another_state_is_corrupt(state: Any) -> None:
    for name in ("manifest", "fence"):
        with pytest.raises(CorruptError):
            KINDS[name].decode(KINDS[name].changed(state=state))


# ---- numbers


@pytest.mark.parametrize("number", [-1, 2**62 + 1, 2**64, 10**30, 0.5, 1.0, True, "1", None])
@pytest.mark.parametrize("member", ["step", "raw_bytes", "stored_bytes", "new_bytes"])
def test_a_count_that_is_none_is_corrupt(member: str, number: Any) -> None:
    if (member, number) == ("step", 2**62 + 1):
        number = 2**63
    with pytest.raises(CorruptError):
        MANIFEST.decode(MANIFEST.changed(**{member: number}))


def chunks(**changes: Any) -> dict[str, Any]:
    first, second = json.loads(msgspec.json.encode(manifest().chunks))
    return {"chunks": [first | changes, second]}


def segments(number: int, **changes: Any) -> dict[str, Any]:
    found = json.loads(msgspec.json.encode(manifest().segments))
    found[number] |= changes
    return {"segments": found}


@pytest.mark.parametrize(
    "changes",
    [
        *(chunks(raw=raw) for raw in (0, -1, 2**30 + 1, 2**64, 8.0, "8")),
        *(chunks(stored=stored) for stored in (-1, 2**63, 1.5, None)),
        *(chunks(digest=digest) for digest in ("", DIGEST[1:], DIGEST + "\n", DIGEST.replace("1", "A"), 5)),
        *(chunks(save=save) for save in BAD_IDS),
        chunks(unknown=1),
        {"chunks": []},
        {"chunks": {}},
        *(segments(0, element=element) for element in (0, -4, 3, 8, 16, "4", 4.0)),
        *(segments(0, bytes=count) for count in (0, 8, 11, 16, -12, 2**63)),
        *(
            segments(0, chunks=indices)
            for indices in ([], [0], [0, 2], [0, -1], [0, 2**63], [0, 0.5], [[0], 1], [1, 0, 0])
        ),
        segments(0, bytes=10, element=4, chunks=[0, 1]),
        segments(0, offset=0),
        segments(1, bytes=8),
        segments(1, bytes=0, chunks=[]),
        segments(1, bytes=8, chunks=[0, 1]),
        *(segments(1, offset=offset) for offset in (-4, -1, 1, 4, 2**62, 2**64, "0")),
        segments(1, bytes=2, element=2, offset=1),
        segments(2, chunks=[0]),
        segments(2, bytes=2**40),
    ],
    ids=str,
)
def test_chunks_and_segments_that_do_not_fit_together_are_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        MANIFEST.decode(MANIFEST.changed(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        segments(0, chunks=[1, 0]),
        segments(0, bytes=24, chunks=[0, 0, 0]),
        segments(1, bytes=2, element=2, offset=2),
        segments(1, bytes=4, chunks=[0], offset=4),
        segments(1, bytes=0, chunks=[1], offset=4),
    ],
    ids=str,
)
def test_chunks_and_segments_that_do_are_not(changes: dict[str, Any]) -> None:
    """A chunk may stand in many segments, and many times in one: equal bytes are stored once."""
    assert isinstance(MANIFEST.decode(MANIFEST.changed(**changes)), Manifest)


def test_a_full_chunk_and_a_delta_of_one_name_are_two() -> None:
    first, second = json.loads(msgspec.json.encode(manifest().chunks))
    content = MANIFEST.changed(format=2, chunks=[first, second, first | {"base": 0}])
    assert isinstance(MANIFEST.decode(content), Manifest)


@pytest.mark.parametrize(
    "key",
    ["", "runs/a", f"chunks/12/{DIGEST}.{SAVE}", f"chunks/11/{DIGEST}.{SAVE}\n", f"../chunks/11/{DIGEST}.{SAVE}", 5],
)
def test_a_condemned_key_that_is_not_a_chunks_is_corrupt(key: Any) -> None:
    kind = KINDS["condemned"]
    with pytest.raises(CorruptError):
        kind.decode(kind.changed(keys=[f"chunks/11/{DIGEST}.{SAVE}", key]))


def test_a_chunks_key_is_made_of_its_digest_and_the_save_that_put_it() -> None:
    assert [chunk.key for chunk in manifest().chunks] == [f"chunks/11/{DIGEST}.{SAVE}", f"chunks/22/{DIGEST_2}.{OTHER}"]


@pytest.mark.parametrize(
    "value",
    [
        *(None, 5, "loss", [], [["loss", 0.5]], {"a": {"$": "unknown"}}, {"$": []}),
        *({"$": "tuple", "items": [["loss", 0.5]]}, {"$": "set", "items": []}, {"$": "float", "bits": 16 * "0"}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("member", ["metrics", "metadata"])
def test_metrics_and_metadata_that_are_no_dict_of_values_are_corrupt(member: str, value: Any) -> None:
    with pytest.raises(CorruptError):
        MANIFEST.decode(MANIFEST.changed(**{member: value}))


def test_metrics_and_metadata_may_be_nested_only_so_deep() -> None:
    deep: Any = 1
    for _ in range(101):
        deep = [deep]
    for member in ("metrics", "metadata"):
        MANIFEST.decode(MANIFEST.changed(**{member: {"a": deep[0][0]}}))
        with pytest.raises(CorruptError, match="nested deeper"):
            MANIFEST.decode(MANIFEST.changed(**{member: {"a": deep}}))


# ---- the content digest


def test_the_content_digest_changes_with_tree_segments_and_chunks_and_with_nothing_else() -> None:
    value = manifest()
    digests = [chunk.digest for chunk in value.chunks]
    same = content_digest(TREE, value.segments, digests)
    assert same == content_digest(json.loads(json.dumps(TREE)), list(value.segments), list(digests))
    others = {
        content_digest({**TREE, "odd": 1}, value.segments, digests),
        content_digest(dict(reversed(TREE.items())), value.segments, digests),
        content_digest(TREE, value.segments[:1], digests),
        content_digest(TREE, value.segments, digests[::-1]),
    }
    assert len(others | {same}) == 5


# ---- deltas


def delta_manifest(*bases: int | None, raw: int = 8, **changes: Any) -> Manifest:
    """Chunk i stands on chunk bases[i]; the first two hold the segments."""
    refs = [
        ChunkRef(digest=f"{number:064x}", save=SAVE, raw=raw if number != 1 else 4, stored=45, base=base)
        for number, base in enumerate(bases)
    ]
    return manifest(chunks=refs, **({"format": 2} | changes))


def read(value: Manifest) -> Manifest | Ended:
    return decode_manifest(encode(value), KEY)


def test_a_manifest_with_deltas_comes_back_as_it_was_and_says_that_it_is_of_version_2() -> None:
    value = delta_manifest(2, None, 3, None)
    assert read(value) == value
    assert b'{"format":2,' in encode(value)
    assert [ref.key.split("/")[0] for ref in value.chunks] == ["deltas", "chunks", "deltas", "chunks"]
    assert [ref.digest[-1] for ref in value.chain(0)] == ["3", "2", "0"]
    assert [ref.digest[-1] for ref in value.chain(1)] == ["1"]


def test_the_tensors_that_need_a_base_are_those_of_all_that_stands_on_it() -> None:
    value = delta_manifest(2, None, 3, None)
    assert value.paths_of_chunk(3) == value.paths_of_chunk(2) == value.paths_of_chunk(0) == ["w"]
    assert value.paths_of_chunk(1) == ["w", "b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (delta_manifest(2, None, None, format=1), "names a delta and says that its format is 1"),
        (delta_manifest(7, None, None), "the base of chunk 0 is not listed"),
        (delta_manifest(1, None), "the base of chunk 0 is not listed, or of another length"),
        (delta_manifest(0, None), "more than 64 deltas"),
        (delta_manifest(2, None, 3, 2), "more than 64 deltas"),
        (delta_manifest(2, None, *range(3, 67), None), "more than 64 deltas"),
        (delta_manifest(66, None, None, *range(2, 66)), "more than 64 deltas"),
    ],
    ids=["version", "unlisted", "length", "itself", "circle", "deep", "deep-backwards"],
)
def test_bases_that_make_no_sense_are_corrupt(value: Manifest, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        read(value)


def test_as_many_deltas_as_are_allowed_may_stand_one_on_another() -> None:
    for value in (delta_manifest(2, None, *range(3, 66), None), delta_manifest(65, None, None, *range(2, 65))):
        assert read(value) == value
        assert len(value.chain(0)) == 65


@pytest.mark.parametrize("other", [{"base": 1}, {"base": 2}, {"stored": 46}], ids=str)
def test_a_chunk_that_is_listed_twice_is_corrupt(other: dict[str, Any]) -> None:
    """With two bases, one reader would believe the first and another the last."""
    refs = delta_manifest(2, None, None).chunks
    twice = msgspec.structs.replace(refs[0], **other)
    with pytest.raises(CorruptError, match=f"chunk 3 \\({twice.key}\\) is listed twice"):
        read(manifest(format=2, chunks=[*refs, twice]))


def test_a_digest_may_be_listed_as_a_full_chunk_and_as_a_delta_and_of_several_saves() -> None:
    refs = delta_manifest(2, None, None).chunks
    value = manifest(
        format=2,
        chunks=[*refs, msgspec.structs.replace(refs[0], base=None), msgspec.structs.replace(refs[0], save=OTHER)],
    )
    assert read(value) == value


def test_a_condemned_list_that_names_a_delta_says_that_it_is_of_version_2() -> None:
    key = f"deltas/11/{DIGEST}.{SAVE}"
    value = Condemned(format=2, collection=SAVE, reason="corrupt", created=TIME, keys=[key])
    assert decode_condemned(encode(value), condemned_key(SAVE)) == value
    with pytest.raises(CorruptError, match="names a delta and says that its format is 1"):
        decode_condemned(encode(msgspec.structs.replace(value, format=1)), condemned_key(SAVE))


# ---- blocks


def blocks_manifest(**changes: Any) -> Manifest:
    """One segment, an array of 4 x 6 items of 2 bytes in three blocks, the last of them in a bundle."""
    version = changes.pop("format", 3)
    given: dict[str, Any] = {
        "bytes": 48,
        "element": 2,
        "chunks": [0, 1, 2, 3],
        "shape": [4, 6],
        "blocks": [
            Block(at=[0, 0], shape=[2, 6], chunks=2),
            Block(at=[2, 0], shape=[2, 4], chunks=1),
            Block(at=[2, 4], shape=[2, 2], chunks=1, offset=6),
        ],
    }
    segment = Segment(**(given | changes))
    lengths = [8, 16, 16, 14]
    refs = [
        ChunkRef(digest=f"{number:064x}", save=SAVE, raw=raw, stored=raw + 56) for number, raw in enumerate(lengths)
    ]
    tree = {"w": {"$": "tensor", "dtype": "int16", "shape": [4, 6], "segment": 0}}
    return manifest(format=version, chunks=refs, segments=[segment], tree=tree)


BLOCKS = blocks_manifest().segments[0].blocks or []


def test_a_manifest_with_blocks_comes_back_as_it_was_and_says_that_it_is_of_version_3() -> None:
    value = blocks_manifest()
    assert read(value) == value
    assert b'{"format":3,' in encode(value)
    assert format_naming((ref.key for ref in value.chunks), value.segments) == 3
    placed = [(each.chunk, each.offset, each.start, each.stop) for each in value.placed(0)]
    assert placed == [(0, 0, 0, 8), (1, 0, 8, 24), (2, 0, 0, 16), (3, 6, 0, 8)]
    assert value.paths_of_chunk(3) == ["w"]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"format": 2},
        {"blocks": None},
        {"shape": None},
        {"offset": 0},
        {"shape": []},
        {"shape": [4, 0]},
        {"shape": [24]},
        {"shape": [6, 4]},
        {"bytes": 50},
        {"bytes": 0, "chunks": [], "blocks": []},
        {"blocks": []},
        {"blocks": BLOCKS[:2]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], offset=8)]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], offset=5)]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], offset=None)]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], at=[2, 3])]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], at=[2])]},
        {"blocks": [*BLOCKS[:2], msgspec.structs.replace(BLOCKS[2], chunks=2**62)]},
        {"blocks": [msgspec.structs.replace(BLOCKS[0], chunks=1), *BLOCKS[1:]]},
        {"blocks": [msgspec.structs.replace(BLOCKS[0], offset=0), *BLOCKS[1:]]},
        {"chunks": [0, 1, 2]},
        {"chunks": [0, 1, 2, 3, 3]},
        {"chunks": [0, 1, 2, 4]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_blocks_that_make_no_sense_are_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        read(blocks_manifest(**changes))


def test_the_digest_of_a_checkpoint_covers_how_it_is_put_together() -> None:
    swapped = [
        BLOCKS[0],
        Block(at=[2, 2], shape=[2, 4], chunks=1),
        Block(at=[2, 0], shape=[2, 2], chunks=1, offset=6),
    ]
    digests = {checkpoint_digest(value) for value in (blocks_manifest(), blocks_manifest(blocks=swapped))}
    assert len(digests) == 2


# ---- from threads

RACE = """
import importlib, sys, threading
from pathlib import Path
from ckptstore import manifest, skeleton
from ckptstore.format import ManifestKey

content, run, step, save = Path(sys.argv[1]).read_bytes(), sys.argv[2], int(sys.argv[3]), sys.argv[4]
sys.setswitchinterval(1e-6)
for _ in range(40):
    importlib.reload(skeleton)  # each time with classes that msgspec has not seen
    importlib.reload(manifest)
    start = threading.Barrier(16)

    def decode():
        start.wait(60)
        found = manifest.decode_manifest(content, ManifestKey(run, step, save))
        start.wait(60)
        list(skeleton.tensors(found.tree, found.segment_bytes))

    threads = [threading.Thread(target=decode) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("done")
"""


def test_threads_may_be_the_first_to_decode(tmp_path: Path) -> None:
    # A race within msgspec ends the whole process, hence one of its own.
    (tmp_path / "manifest").write_bytes(encode(manifest()))
    command = [sys.executable, "-c", RACE, str(tmp_path / "manifest"), KEY.run, str(KEY.step), KEY.save_id]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_no_type_is_taken_apart_at_the_first_call() -> None:
    # The same race: `decode(…, type=…)` within a function takes its type apart when the first thread calls it.
    sources = Path(ckptstore.__file__).parent.rglob("*.py")
    lazy = [source.name for source in sources if re.search(r"json\.decode\([^#\n]*type=", source.read_text())]
    assert lazy == []
