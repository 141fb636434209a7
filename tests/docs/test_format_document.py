"""docs/format.md is true: its reader reads what ckptstore writes, its tables name what there is, and nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ckptstore import chunk, format, kernels, skeleton
from ckptstore.codec import Sampled
from ckptstore.errors import CorruptError, UnsupportedFormatError
from ckptstore.format import ManifestKey, TagKey, condemned_key, session_key
from ckptstore.manifest import (
    Block,
    ChunkRef,
    Condemned,
    Ended,
    Manifest,
    Marker,
    Segment,
    Session,
    Tag,
    Writer,
    decode_condemned,
    decode_manifest,
    decode_marker,
    decode_session,
    decode_tag,
    encode,
)
from ckptstore.sealed import seal
from ckptstore.skeleton import MAPPING_TAGS, SEQUENCE_TAGS, TENSOR_TAGS, VALUE_TAGS, TensorNode
from ckptstore.tree import flatten, register, unflatten
from ckptstore.tree.values import MAX_EQUAL_HASHES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
SAVE = "3d1f0b8c5e7a42d9b6c0f1e2a3948576"


def section(title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", DOCUMENT, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return sections[title]


def rows(title: str, number: int = 0) -> list[list[str]]:
    """The cells of a table below a heading, without its head."""
    tables = re.findall(r"^\|.*\n\|[ :|-]+\n((?:\|.*\n)+)", section(title), re.MULTILINE)
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in tables[number].splitlines()
    ]


def names(cells: list[list[str]]) -> list[str]:
    return [name for row in cells for name in re.findall(r"`([^`]+)`", row[0])]


@pytest.fixture(scope="module")
def reader() -> dict[str, Callable[..., Any]]:
    """The functions that the document's Python blocks define; they know nothing of ckptstore."""
    scope: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert "ckptstore" not in "".join(blocks)
    for block in blocks:
        exec(compile(block, "docs/format.md", "exec"), scope)
    return scope


def noise(count: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.random.default_rng(3).integers(0, 256, count, np.uint8)


# ---- chunks


@pytest.mark.parametrize("element_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["noise", "zeros", "repetitive", "weights"])
def test_the_documents_reader_reads_chunks_of_ckptstore(
    reader: dict[str, Callable[..., Any]], kind: str, element_size: int
) -> None:
    contents = {
        "noise": noise(4096),
        "zeros": np.zeros(4096, np.uint8),
        "repetitive": np.tile(np.arange(64, dtype=np.uint8), 64),
        "weights": np.random.default_rng(4).normal(0, 0.05, 100_000).astype("<f4").view(np.uint8),
    }
    raw = contents[kind]
    content = chunk.encode(raw, element_size).tobytes()
    assert reader["read_chunk"](content, chunk.digest(raw)) == raw.tobytes()


def test_ckptstore_reads_the_chunk_that_the_document_makes_by_hand(reader: dict[str, Any]) -> None:
    out = np.empty(8, np.uint8)
    chunk.decode(reader["chunk"], chunk.digest(reader["raw"]), out)
    assert out.tobytes() == reader["raw"]


@pytest.mark.parametrize("element_size", [1, 2, 4, 8])
def test_the_documents_reader_reads_deltas_of_ckptstore(
    reader: dict[str, Callable[..., Any]], element_size: int
) -> None:
    base = noise(4096)
    steps = np.random.default_rng(5).integers(-3, 4, len(base) // element_size)
    raw = (base.view(f"<i{element_size}") + steps.astype(f"<i{element_size}")).view(np.uint8)
    content, is_delta = chunk.encode_over(raw, element_size, chunk.Base(chunk.digest(base), base))
    assert is_delta
    assert reader["read_chunk"](content.tobytes(), chunk.digest(raw), base.tobytes()) == raw.tobytes()
    with pytest.raises(AssertionError):
        reader["read_chunk"](content.tobytes(), chunk.digest(raw), raw.tobytes())


def test_ckptstore_codes_the_documents_example_of_a_delta_as_it_says() -> None:
    raw, base, codes = (np.frombuffer(bytes.fromhex(text), np.uint8) for text in ("0500", "0301", "0401"))
    assert "`05 00`, as elements of 1 byte over the base `03 01`" in section("Deltas")
    assert "the codes `04 01`" in section("Deltas")
    found = [np.empty(2, np.uint8)]
    kernels.split(raw, 1, found, base)
    assert np.array_equal(found[0], codes)


def by_tables(values: dict[str, bytes]) -> bytes:
    """Bytes put together from the offsets and sizes of the header's and the plane table's rows alone."""
    made = bytearray(40)
    for offset, size, field, _ in rows("Header"):
        value = values[field]
        assert len(value) == int(size)
        made[int(offset) : int(offset) + int(size)] = value
    assert sum(int(size) for _, size, _, _ in rows("Header")) == len(made)
    return bytes(made)


def little(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def planes_by_table(raw: bytes, element_size: int) -> list[bytes]:
    """Raw bytes split as the table of planes says."""
    [row] = [row for row in rows("Planes") if row[0] == str(element_size)]
    planes = []
    for cell in filter(None, row[1:]):
        first, last = re.fullmatch(r"bytes? (\d)(?:-(\d))?", cell).groups()  # type: ignore[union-attr]
        elements = [raw[start : start + element_size] for start in range(0, len(raw), element_size)]
        planes.append(b"".join(element[int(first) : int(last or first) + 1] for element in elements))
    return planes


@pytest.mark.parametrize("element_size", [1, 2, 4, 8])
def test_ckptstore_reads_chunks_put_together_from_the_tables_alone(element_size: int) -> None:
    import blake3

    raw = noise(48).tobytes()
    planes = planes_by_table(raw, element_size)
    values = {
        "magic": bytes.fromhex(re.match(r"`([0-9a-f ]+)`", rows("Header")[0][3])[1]),  # type: ignore[index]
        "version": b"\1",
        "filter": b"\1",
        "element size": little(element_size, 1),
        "number of planes": little(len(planes), 1),
        "reserved": bytes(4),
        "raw length": little(len(raw), 8),
        "checksum": bytes(16),
    }
    assert [(row[0], row[1]) for row in rows("Table of planes")] == [("0", "1"), ("1", "7"), ("8", "8")]
    table = b"".join(bytes(8) + little(len(plane), 8) for plane in planes)
    values["checksum"] = blake3.blake3(by_tables(values) + table).digest(16)
    out = np.empty(len(raw), np.uint8)
    chunk.decode(by_tables(values) + table + b"".join(planes), blake3.blake3(raw).hexdigest(), out)
    assert out.tobytes() == raw


def test_the_modes_are_those_of_the_codec() -> None:
    from ckptstore.codec import Mode

    assert [(int(row[0]), row[1]) for row in rows("Modes")] == [(mode.value, mode.name.lower()) for mode in Mode]


# ---- a whole checkpoint


def test_the_documents_reader_reads_tensors_of_a_manifest(reader: dict[str, Callable[..., Any]]) -> None:
    """A long one in two chunks, two in a bundle, one of them transposed, and one that begins within its segment."""
    long = np.random.default_rng(5).normal(0, 1, (30, 100)).astype("<f4")
    pair = [np.arange(6, dtype="<i8"), np.array([1.5, -2.5], "<f8")]
    raws = [long.view(np.uint8).reshape(-1)[:8000], long.view(np.uint8).reshape(-1)[8000:]]
    raws.append(np.concatenate([part.view(np.uint8) for part in pair]))
    objects: dict[str, bytes] = {}
    refs = []
    for raw, size in zip(raws, (4, 4, 8), strict=True):
        content = chunk.encode(raw, size).tobytes()
        ref = ChunkRef(digest=chunk.digest(raw), save=SAVE, raw=len(raw), stored=len(content))
        objects[ref.key] = content
        refs.append(ref)
    nodes = {
        "long": TensorNode("tensor", "float32", (30, 100), 0),
        "row": TensorNode("tensor", "float32", (100,), 0, offset=400),
        "transposed": TensorNode("tensor", "int64", (3, 2), 1, stride=(1, 3)),
        "array": TensorNode("ndarray", "<f8", (2,), 2),
    }
    manifest = Manifest(
        run="run",
        step=3,
        save=SAVE,
        created="2026-11-25T01:02:03.000004Z",
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=64 * "0",
        raw_bytes=12064,
        stored_bytes=sum(ref.stored for ref in refs),
        new_bytes=0,
        tree={name: node.to_json() for name, node in nodes.items()},
        segments=[
            Segment(bytes=12000, element=4, chunks=[0, 1]),
            Segment(bytes=48, element=8, chunks=[2], offset=0),
            Segment(bytes=16, element=8, chunks=[2], offset=48),
        ],
        chunks=refs,
    )
    assert isinstance(decode_manifest(encode(manifest), manifest.key), Manifest)
    read = reader["unseal"](encode(manifest))
    found = {name: reader["read_tensor"](read, node, objects.__getitem__) for name, node in read["tree"].items()}
    assert np.array_equal(found["long"], long)
    assert np.array_equal(found["row"], long[1])
    assert np.array_equal(found["transposed"], pair[0].reshape(2, 3).T)
    assert np.array_equal(found["array"], pair[1])
    assert [array.dtype for array in found.values()] == ["<f4", "<f4", "<i8", "<f8"]


def test_the_documents_reader_reads_a_tensor_that_is_put_together_of_blocks(reader: dict[str, Any]) -> None:
    """Of two halves, one below the other, one of which is in two columns; the last lies in a bundle."""
    whole = np.arange(24, dtype="<i2").reshape(4, 6)
    parts = [whole[:2], whole[2:, :4], whole[2:, 4:]]
    raws = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]
    raws = [raws[0][:8], raws[0][8:], raws[1], np.concatenate([np.zeros(6, np.uint8), raws[2]])]
    contents = [chunk.encode(raw, 2).tobytes() for raw in raws]
    refs = [
        ChunkRef(digest=chunk.digest(raw), save=SAVE, raw=len(raw), stored=len(content))
        for raw, content in zip(raws, contents, strict=True)
    ]
    segment = Segment(
        bytes=48,
        element=2,
        chunks=[0, 1, 2, 3],
        shape=[4, 6],
        blocks=[
            Block(at=[0, 0], shape=[2, 6], chunks=2),
            Block(at=[2, 0], shape=[2, 4], chunks=1),
            Block(at=[2, 4], shape=[2, 2], chunks=1, offset=6),
        ],
    )
    manifest = json.loads(msgspec.json.encode({"segments": [segment], "chunks": refs}))
    objects = dict(zip((ref.key for ref in refs), contents, strict=True))
    node = {"$": "tensor", "dtype": "int16", "shape": [4, 6], "segment": 0}
    assert np.array_equal(reader["read_tensor"](manifest, node, objects.__getitem__), whole)


def test_the_documents_reader_reads_a_tensor_whose_chunk_stands_on_others(
    reader: dict[str, Callable[..., Any]],
) -> None:
    raws = [np.full(64, number, "<f4").view(np.uint8) for number in (1.0, 1.5, 1.25)]
    objects: dict[str, bytes] = {}
    refs: list[ChunkRef] = []
    for number, raw in enumerate(raws):
        below = None if number == 0 else chunk.Base(chunk.digest(raws[number - 1]), raws[number - 1])
        made = chunk.encode(raw, 4) if below is None else chunk._encode(Sampled(raw, 4, below.raw), below)
        base = None if number == 0 else number - 1
        refs.append(ChunkRef(digest=chunk.digest(raw), save=SAVE, raw=len(raw), stored=len(made), base=base))
        objects[refs[-1].key] = made.tobytes()
    manifest = {
        "segments": [{"bytes": 256, "element": 4, "chunks": [2]}],
        "chunks": json.loads(msgspec.json.encode(refs)),
    }
    node = {"$": "tensor", "dtype": "float32", "shape": [64], "segment": 0}
    assert reader["read_tensor"](manifest, node, objects.__getitem__).tolist() == [1.25] * 64


def test_the_documents_reader_sees_damage(reader: dict[str, Callable[..., Any]]) -> None:
    raw = noise(64)
    content = chunk.encode(raw, 4).tobytes()
    sealed = seal(b'{"format":1}')
    for position in range(len(content)):
        with pytest.raises((AssertionError, KeyError)):
            flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
            reader["read_chunk"](flipped, chunk.digest(raw))
    for position in range(len(sealed)):
        with pytest.raises(AssertionError):
            reader["unseal"](sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :])


# ---- sealed JSON

STRUCTS: dict[str, Any] = {
    "Marker": Marker,
    "Session": Session,
    "Writer": Writer,
    "Manifest": Manifest,
    "Segments": Segment,
    "Blocks": Block,
    "Chunk references": ChunkRef,
    "Fence and tombstone": Ended,
    "Condemned list": Condemned,
    "Tag": Tag,
}
OPTIONAL = {"Segments": {"offset", "shape", "blocks"}, "Blocks": {"offset"}, "Chunk references": {"base"}}
COLLECTION = "9e8d7c6b5a49382716050f1e2d3c4b5a"
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "Marker": lambda content: decode_marker(content, "ckptstore.json"),
    "Session": lambda content: decode_session(content, session_key(SAVE)),
    "Manifest": lambda content: decode_manifest(content, ManifestKey("lstm-bible", 300, SAVE)),
    "Fence and tombstone": lambda content: decode_manifest(content, ManifestKey("lstm-bible", 300, SAVE)),
    "Condemned list": lambda content: decode_condemned(content, condemned_key(COLLECTION)),
    "Tag": lambda content: decode_tag(content, str(TagKey("lstm", 300, "best"))),
}


def example(title: str) -> dict[str, Any]:
    [text] = re.findall(r"^```json\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)
    members = json.loads(text)
    assert isinstance(members, dict)
    return members


def sealed_example(title: str, **changes: Any) -> bytes:
    text = msgspec.json.encode(example(title) | changes)
    return seal(text, min_bytes=1024 if title == "Manifest" else 0)


@pytest.mark.parametrize("title", STRUCTS)
def test_each_table_names_the_members_that_there_are_in_their_order(title: str) -> None:
    assert names(rows(title)) == list(STRUCTS[title].__struct_fields__)


@pytest.mark.parametrize("title", STRUCTS)
def test_each_table_says_which_members_are_optional(title: str) -> None:
    optional = {row[0].strip("`") for row in rows(title) if "optional" in row[1]}
    assert optional == OPTIONAL.get(title, set())


@pytest.mark.parametrize("title", DECODERS)
def test_each_example_is_read_as_what_it_is_an_example_of(title: str) -> None:
    value = DECODERS[title](sealed_example(title))
    assert type(value) is STRUCTS[title]
    assert json.loads(msgspec.json.encode(value)) == example(title)


@pytest.mark.parametrize("title", DECODERS)
def test_a_newer_version_is_unsupported_and_not_corrupt(title: str) -> None:
    with pytest.raises(UnsupportedFormatError):
        DECODERS[title](sealed_example(title, format=format.BLOCK_FORMAT_VERSION + 1, new="member"))


@pytest.mark.parametrize("title", DECODERS)
def test_members_that_the_document_does_not_name_are_not_allowed(title: str) -> None:
    with pytest.raises(CorruptError):
        DECODERS[title](sealed_example(title, new="member"))


def test_the_states_and_reasons_are_all_of_them() -> None:
    for state in re.findall(r"`(\w+)`", next(row[2] for row in rows("Fence and tombstone") if row[0] == "`state`")):
        assert DECODERS["Fence and tombstone"](sealed_example("Fence and tombstone", state=state)).state == state
    for reason in ("unreferenced", "corrupt"):
        assert f"`{reason}`" in next(row[2] for row in rows("Condemned list") if row[0] == "`reason`")
        assert DECODERS["Condemned list"](sealed_example("Condemned list", reason=reason)).reason == reason


# ---- the tree

TAG_ROWS = rows("The tree", 1)
TAGS = [row[0].strip("`") for row in TAG_ROWS]
EXAMPLES = {row[0].strip("`"): json.loads(row[3].strip("`")) for row in TAG_ROWS}


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


def test_every_tag_has_its_row_and_no_other_has() -> None:
    assert sorted(TAGS) == sorted([*TENSOR_TAGS, *MAPPING_TAGS, *SEQUENCE_TAGS, *VALUE_TAGS, "registered"])


@pytest.mark.parametrize("tag", TAGS)
def test_the_example_of_each_tag_is_read_and_written_again_as_it_was(tag: str) -> None:
    register(Point, "point", lambda point: {"x": point.x, "y": point.y}, lambda tree: Point(**tree))
    node = EXAMPLES[tag]
    assert node["$"] == tag
    if tag in TENSOR_TAGS:
        described = TensorNode.from_json(node, "example", [12])
        assert described.to_json() == node
        assert described.span_bytes == 12
    else:
        value = unflatten(node, lambda tensor, path: None, [])
        again, _ = flatten(value)
        assert json.dumps(again) == json.dumps(node)
        assert type(value).__name__.lower().strip("_") in (tag.replace("_", ""), "point", "float32")


@pytest.mark.parametrize("tag", sorted(set(TAGS) - TENSOR_TAGS))
def test_the_members_of_each_tag_are_those_of_its_example(tag: str) -> None:
    [row] = [row for row in TAG_ROWS if row[0] == f"`{tag}`"]
    assert set(re.findall(r"`(\w+)`", row[1])) == EXAMPLES[tag].keys() - {"$"}


def test_the_members_of_tensors_are_all_of_them() -> None:
    every = TensorNode("tensor", "float32", (1,), 0, offset=4, stride=(1,), requires_grad=True, parameter=True)
    assert names(rows("Tensors")) == [name for name in every.to_json() if name != "$"]
    required = TensorNode("tensor", "float32", (1,), 0).to_json().keys() - {"$"}
    assert {row[0].strip("`") for row in rows("Tensors") if "optional" not in row[1]} == required


def test_the_dtypes_are_all_of_them_with_their_sizes() -> None:
    table = {name: int(row[1]) for row in rows("Tensors", 1) for name in names([row])}
    assert table == skeleton.ITEM_SIZES


def test_the_numpy_dtypes_are_all_of_them() -> None:
    said = section("Tensors")
    for kinds in re.findall(r"`((?:[iufc]\d+ ?)+)`", said):
        for kind in kinds.split():
            assert skeleton.numpy_item_bytes(f"<{kind}") == skeleton.numpy_item_bytes(f">{kind}") == int(kind[1:])
    for text in ("|b1", "|i1", "|u1", "<f4", ">i8", "<M8[25us]"):
        assert f"`{text}`" in said
        assert skeleton.numpy_item_bytes(text) == np.dtype(text).itemsize


# ---- numbers in the text


def test_the_limits_are_those_of_the_code() -> None:
    powers = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    limits = {
        row[0]: re.sub(r"2([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda power: f"2**{power[1].translate(powers)}", row[1])
        for row in rows("Limits")
    }
    assert limits["raw bytes of a chunk"] == "2**30"
    assert format.MAX_CHUNK_BYTES == 2**30
    assert limits["length of a chunk object"] == f"its raw bytes and {chunk._HEADER.size + 4 * chunk._PLANE.size}"
    assert limits["length of a delta object"] == f"its raw bytes and {format.MAX_OVERHEAD_BYTES + chunk._BASE.size}"
    assert limits["deltas one on another"] == str(format.MAX_DELTA_DEPTH)
    assert limits["step"] == "2**63-1"
    assert format.MAX_STEP == 2**63 - 1
    assert limits["length of a run's name"] == "128"
    assert format.is_run_name(128 * "a") and not format.is_run_name(129 * "a")
    assert limits["containers within containers"] == str(skeleton.MAX_DEPTH)
    assert limits["members of a set, or keys of a dict, with one hash"] == str(MAX_EQUAL_HASHES)
    assert limits["bytes of a tensor"] == "below 2**62"
    assert skeleton.MAX_TENSOR_BYTES == 2**62
    sizes = [TensorNode("tensor", "uint8", shape, 0) for shape in (64 * (1,), (2**48,), 65 * (1,), (2**48 + 1,))]
    for node, allowed in zip(sizes, (True, True, False, False), strict=True):
        if allowed:
            TensorNode.from_json(node.to_json(), "t", [2**50])
        else:
            with pytest.raises(CorruptError):
                TensorNode.from_json(node.to_json(), "t", [2**50])


def test_the_keys_are_those_of_the_code() -> None:
    digest = chunk.digest(b"x")
    forms = dict(
        zip(("marker", "chunk", "delta", "manifest", "session", "condemned", "tag"), names(rows("Keys")), strict=True)
    )
    parts = {
        "aa": digest[:2],
        "digest": digest,
        "save id": SAVE,
        "collection id": SAVE,
        "run": "a",
        "step": f"{7:020d}",
        "tag": "best",
    }
    made = {name: re.sub(r"<([\w ]+)>", lambda part: parts[part[1]], form) for name, form in forms.items()}
    assert made == {
        "marker": format.MARKER_KEY,
        "chunk": format.chunk_key(digest, SAVE),
        "delta": format.chunk_key(digest, SAVE, is_delta=True),
        "manifest": format.manifest_key("a", 7, SAVE),
        "session": format.session_key(SAVE),
        "condemned": format.condemned_key(SAVE),
        "tag": str(TagKey("a", 7, "best")),
    }
    assert sorted(names(rows("Keys", 1))) == sorted(parts)


def test_a_manifest_has_the_length_that_tells_it_from_a_fence() -> None:
    assert f"at least {format.MIN_MANIFEST_BYTES} bytes" in section("Manifest")
    assert f"shorter than {format.MIN_MANIFEST_BYTES} bytes" in section("Fence and tombstone")


def test_every_link_within_the_document_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", DOCUMENT)) <= anchors
