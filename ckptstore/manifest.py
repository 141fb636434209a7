"""The JSON objects of a store: marker, session, manifest (committed, fenced, deleted), condemned list.

Structs <-> sealed bytes, with every bound checked on the way in: what `decode_…` returns can be trusted to be
well-formed, whoever wrote it. Knows nothing of tensors' values and nothing of storage.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import blake3
import msgspec
from msgspec import Meta, Struct

from ckptstore import blocks as boxes
from ckptstore.errors import CorruptError, UnsupportedFormatError
from ckptstore.format import (
    BLOCK_FORMAT_VERSION,
    DELTA_FORMAT_VERSION,
    DELTAS,
    FORMAT_VERSION,
    MAX_BLOCK_DIMENSIONS,
    MAX_CHUNK_BYTES,
    MAX_DELTA_DEPTH,
    MAX_STEP,
    MIN_MANIFEST_BYTES,
    RUN_NAME,
    ChunkKey,
    ManifestKey,
    TagKey,
    chunk_key,
    condemned_key,
    is_digest,
    is_save_id,
    session_key,
)
from ckptstore.sealed import seal, unseal
from ckptstore.skeleton import MAPPING_TAGS, TAG, leaves, tensors

# \Z and not $, which would let a line break at the end pass, into a key.
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
SaveId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
RunName = Annotated[str, Meta(pattern=rf"^{RUN_NAME}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Step = Annotated[int, Meta(ge=0, le=MAX_STEP)]
ChunkLength = Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
ElementSize = Literal[1, 2, 4, 8]
Sizes = Annotated[list[Annotated[int, Meta(ge=0, le=2**48)]], Meta(max_length=MAX_BLOCK_DIMENSIONS)]
Time = Annotated[
    str,
    Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z\Z"),
]
"""UTC, ISO 8601 with microseconds and a Z: the writer's clock, for people; no decision rests on it."""
T = TypeVar("T")


class _Head(Struct):
    """What every object of every version has: the version; and the state, of those that have one.

    A later version may put anything into the state, so it is not looked at before the version is known.
    """

    format: Annotated[int, Meta(ge=1)]
    state: Any = None


class Marker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`ckptstore.json`: that this is a store, and how all its writers cut tensors into chunks."""

    format: int = FORMAT_VERSION
    kind: Literal["ckptstore"] = "ckptstore"
    store: SaveId
    created: Time
    chunk_bytes: ChunkLength
    small_bytes: Annotated[int, Meta(ge=0, le=MAX_CHUNK_BYTES)]


class Writer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who wrote an object: for people who look for a job that died."""

    host: str
    pid: int
    version: str


class Session(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`sessions/<save id>.json`: a save under way. Put again with a greater `beat` as long as it lives."""

    format: int = FORMAT_VERSION
    save: SaveId
    run: RunName
    step: Step
    writer: Writer
    opened: Time
    beat: Count


class ChunkRef(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, gc=False):
    """One chunk object that decoding a checkpoint takes.

    A manifest has thousands of them, which is why they are none of the garbage collector's business, and why digest and
    save id are checked by `decode_manifest`, for all at once: patterns took nine tenths of the time to decode one.
    """

    digest: str
    save: str
    raw: ChunkLength
    stored: Count
    base: Count | None = None
    """A delta's: index of the chunk, full or a delta itself, in the same table that it is the difference to."""

    @property
    def key(self) -> str:
        return chunk_key(self.digest, self.save, is_delta=self.base is not None)


class Block(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A part of a segment that is put together: a box of its array, row-major by itself.

    Its bytes are those of the next `chunks` chunks of the segment's, or `offset` is where they begin in the one chunk.
    """

    at: Sizes
    shape: Sizes
    chunks: Count
    offset: Count | None = None


class Segment(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A run of bytes that one tensor, or several that share memory, live in.

    Its bytes are those of `chunks` (indices into the manifest's table) one after the other; or, if it lies in a
    bundle, `bytes` bytes from `offset` on of the one chunk; or it is a row-major array of `shape`, put together of
    `blocks`.
    """

    bytes: Count
    element: ElementSize
    chunks: list[Count]
    offset: Count | None = None
    shape: Sizes | None = None
    blocks: list[Block] | None = None

    @property
    def is_bundled(self) -> bool:
        """Whether a chunk of it may hold other segments, too."""
        return self.offset is not None or any(block.offset is not None for block in self.blocks or ())

    @property
    def item_bytes(self) -> int:
        """Bytes of an item of the array, if it is put together of blocks; else 1."""
        return 1 if self.shape is None else self.bytes // math.prod(self.shape)


class Placed(Struct, frozen=True):
    """Where bytes of a chunk go: those from `offset` on to those from `start` to `stop` of a block."""

    chunk: int
    offset: int
    box: boxes.Box
    """The block, in items of the segment's array; a segment that has no blocks is one, of bytes."""
    start: int
    stop: int


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`runs/<run>/<step>.<save id>.json`: one committed checkpoint."""

    format: int = FORMAT_VERSION
    state: Literal["committed"] = "committed"
    run: RunName
    step: Step
    save: SaveId
    created: Time
    writer: Writer
    replaces: list[SaveId]
    metrics: dict[str, Any]
    metadata: dict[str, Any]
    content: Digest
    """BLAKE3 of the tree and the chunks' digests: equal for equal states, whoever uploaded what."""
    raw_bytes: Count
    stored_bytes: Count
    new_bytes: Count
    tree: Any
    segments: list[Segment]
    chunks: list[ChunkRef]

    @property
    def key(self) -> ManifestKey:
        return ManifestKey(self.run, self.step, self.save)

    @property
    def segment_bytes(self) -> list[int]:
        """The length of each segment, against which the tree's tensors are checked."""
        return [segment.bytes for segment in self.segments]

    def placed(self, number: int) -> Iterator[Placed]:
        """What the chunks of a segment hold of it, one after the other."""
        segment = self.segments[number]
        one = Block(at=[0], shape=[segment.bytes], chunks=len(segment.chunks), offset=segment.offset)
        rest = iter(segment.chunks)
        for block in segment.blocks or [one]:
            box, length = (tuple(block.at), tuple(block.shape)), math.prod(block.shape) * segment.item_bytes
            position = 0
            for index in itertools.islice(rest, block.chunks):
                held = length if block.offset is not None else self.chunks[index].raw
                yield Placed(index, block.offset or 0, box, position, position + held)
                position += held

    def chain(self, index: int) -> list[ChunkRef]:
        """What decoding a chunk of the table takes, in the order of decoding: a full chunk, and the deltas on it."""
        refs = [self.chunks[index]]
        while (base := refs[-1].base) is not None:
            refs.append(self.chunks[base])
        return refs[::-1]

    def paths_of_chunk(self, index: int) -> list[str]:
        """The paths of the tensors that need a chunk of the table, be it as a base."""
        return TensorPaths(self, [index]).of(index)


class TensorPaths:
    """Which tensors need which of some chunks of a manifest: found in one pass over it, however many chunks there are.

    What many tensors share, in many chunks, would be told of once for each pair of them: after `MAX_TOLD` chunks of a
    segment, its tensors are named for no further one, but for the first where that would have none.
    """

    MAX_TOLD = 16

    def __init__(self, manifest: Manifest, wanted: Iterable[int]) -> None:
        self._segments: dict[int, set[int]] = {index: set() for index in wanted}
        segments_with: dict[int, set[int]] = {}
        for number, segment in enumerate(manifest.segments):
            for index in segment.chunks:
                segments_with.setdefault(index, set()).add(number)
        for index, numbers in segments_with.items():
            needed: int | None = index
            while needed is not None:  # the chunk, and what it stands on
                if needed in self._segments:
                    self._segments[needed] |= numbers
                needed = manifest.chunks[needed].base
        concerned = {number for numbers in self._segments.values() for number in numbers}
        self._paths: dict[int, list[tuple[int, str]]] = {number: [] for number in concerned}
        for place, (path, node) in enumerate(tensors(manifest.tree, manifest.segment_bytes)):
            if node.segment in concerned:
                self._paths[node.segment].append((place, path))
        self._told: Counter[int] = Counter()

    def of(self, index: int) -> list[str]:
        """The paths of the tensors that need a chunk, be it as a base, in the order of the tree."""
        found: list[tuple[int, str]] = []
        for number in self._segments[index]:
            self._told[number] += 1
            if self._told[number] <= self.MAX_TOLD:
                found += self._paths[number]
        if not found:
            found = [place for number in self._segments[index] for place in self._paths[number][:1]][:1]
        return [path for _, path in sorted(found)]


class Ended(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """In a manifest's place: a fence (the save can never commit) or a tombstone (the checkpoint was deleted)."""

    format: int = FORMAT_VERSION
    state: Literal["fenced", "deleted"]
    run: RunName
    step: Step
    save: SaveId
    created: Time

    @property
    def key(self) -> ManifestKey:
        return ManifestKey(self.run, self.step, self.save)


class Condemned(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`condemned/<id>.json`: exact chunk keys that no save may reuse, because they go or are corrupt."""

    format: int = FORMAT_VERSION
    collection: SaveId
    reason: Literal["unreferenced", "corrupt"]
    created: Time
    keys: list[str]


class Tag(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`tags/<run>/<step>/<tag>.json`: that a step has this tag. What counts is that it is there."""

    format: int = FORMAT_VERSION
    run: RunName
    step: Step
    tag: RunName
    created: Time
    writer: Writer


# Made now, and not at the first decode: msgspec (0.22) reads types that it has taken half apart, and crashes, if two
# threads are the first to decode one at the same time. Half a millisecond.
_HEAD_DECODER = msgspec.json.Decoder(_Head)
_DECODERS: dict[type[Any], msgspec.json.Decoder[Any]] = {
    type_: msgspec.json.Decoder(type_) for type_ in (Marker, Session, Manifest, Ended, Condemned, Tag)
}


def format_naming(keys: Iterable[str], segments: Iterable[Segment] = ()) -> int:
    """The version of a manifest, which has `segments`, or of a condemned list, that names these chunk keys."""
    if any(segment.blocks is not None for segment in segments):
        return BLOCK_FORMAT_VERSION
    return DELTA_FORMAT_VERSION if any(key.startswith(DELTAS) for key in keys) else FORMAT_VERSION


def content_digest(tree: Any, segments: list[Segment], digests: list[str]) -> str:
    """What makes two checkpoints the same state: the tree, the segments and the chunks' digests in their order."""
    return blake3.blake3(msgspec.json.encode([tree, segments, digests])).hexdigest()


def checkpoint_digest(manifest: Manifest) -> str:
    """What a reader pins a checkpoint by: its run, its step, and all that a load of it returns.

    Made from the decoded values, whoever encoded them and however, and not from `content`, which nobody checks. Chunks
    count by the digests of their raw bytes alone, so that a repair, or a save of the same again, changes nothing.
    docs/reference/api.md says what is covered and what is not; it may never change.

    Raises CorruptError if the tree is not one that a save could have made.
    """
    segments = [
        [
            segment.bytes,
            segment.offset,
            [manifest.chunks[index].digest for index in segment.chunks],
            *_put_together(segment),
        ]
        for segment in manifest.segments
    ]
    covered = [manifest.run, manifest.step, manifest.tree, manifest.metrics, manifest.metadata, segments]
    try:
        text = json.dumps(covered, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise CorruptError(f"{manifest.key} holds what no save writes ({error})") from error
    return blake3.blake3(text.encode("ascii")).hexdigest()


def _put_together(segment: Segment) -> list[Any]:
    """What a digest covers of a segment's blocks; nothing if it has none, as it was before there were any."""
    if segment.blocks is None:
        return []
    return [[segment.shape, [[block.at, block.shape, block.chunks, block.offset] for block in segment.blocks]]]


def encode(value: Marker | Session | Manifest | Ended | Condemned | Tag) -> bytes:
    """The sealed bytes of any object."""
    return seal(msgspec.json.encode(value), min_bytes=MIN_MANIFEST_BYTES if isinstance(value, Manifest) else 0)


def decode_marker(content: bytes, key: str) -> Marker:
    """Raises CorruptError or UnsupportedFormatError, as all of these do."""
    return _decode(_known(content, key), key, Marker)


def decode_session(content: bytes, key: str) -> Session:
    value = _decode(_known(content, key), key, Session)
    if session_key(value.save) != key:
        raise CorruptError(f"{key} says that it is the session {value.save}")
    return value


def decode_tag(content: bytes, key: str) -> Tag:
    value = _decode(_known(content, key), key, Tag)
    if str(TagKey(value.run, value.step, value.tag)) != key:
        raise CorruptError(f"{key} says that it is the tag {value.tag} of {value.run}@{value.step}")
    return value


def decode_condemned(content: bytes, key: str) -> Condemned:
    value = _decode(_known(content, key, DELTA_FORMAT_VERSION), key, Condemned)
    if condemned_key(value.collection) != key:
        raise CorruptError(f"{key} says that it is the condemned list {value.collection}")
    if not all(ChunkKey.parse(condemned) for condemned in value.keys):
        raise CorruptError(f"{key} names a key that is not a chunk's")
    _check_version(value.format, format_naming(value.keys), key)
    return value


def decode_manifest(content: bytes, key: ManifestKey) -> Manifest | Ended:
    """The manifest, fence or tombstone at `key`, each index and length in it checked."""
    head, text = _open(content, str(key))
    value: Manifest | Ended
    if head.state == "committed":
        _require_known(head, BLOCK_FORMAT_VERSION, str(key))
        value = _decode(text, str(key), Manifest)
    else:
        _require_known(head, FORMAT_VERSION, str(key))
        value = _decode(text, str(key), Ended)
    if value.key != key:
        error = CorruptError(f"{key} says that it is the manifest {value.key}")
        error.is_foreign = True
        raise error
    if isinstance(value, Manifest) != (len(content) >= MIN_MANIFEST_BYTES):
        raise CorruptError(f"{key} is {value.state}, which {len(content)} bytes are not the length of")
    if isinstance(value, Manifest):
        _check_keys(value)
        bases = [chunk.base for chunk in value.chunks]
        if bases.count(None) < len(bases):
            _check_version(value.format, DELTA_FORMAT_VERSION, str(key))
            _check_bases(value)
        if any(segment.blocks is not None or segment.shape is not None for segment in value.segments):
            _check_version(value.format, BLOCK_FORMAT_VERSION, str(key))
        _check_segments(value)
        # The tree may be long and is checked where it is walked; these two are short, and read as they stand.
        for name, node in (("metrics", value.metrics), ("metadata", value.metadata)):
            for _ in leaves(node):
                pass
            if TAG in node and node[TAG] not in MAPPING_TAGS:
                raise CorruptError(f"{key}: its {name} are no dict")
    return value


def _known(content: bytes, key: str, newest: int = FORMAT_VERSION) -> bytes:
    """The text of an object whose seal is whole and whose version is known here."""
    head, text = _open(content, key)
    _require_known(head, newest, key)
    return text


def _require_known(head: _Head, newest: int, key: str) -> None:
    if head.format > newest:
        raise UnsupportedFormatError(
            f"{key} has format version {head.format}; this ckptstore reads up to {newest}. "
            "Install a newer ckptstore to use this store."
        )


def _open(content: bytes, key: str) -> tuple[_Head, bytes]:
    """The head and the text of an object whose seal is whole."""
    text = unseal(content, key)
    try:
        head = _HEAD_DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise CorruptError(f"{key} does not hold what its name says ({error})") from error
    return head, text


def _decode(text: bytes, key: str, type_: type[T]) -> T:
    try:
        value: T = _DECODERS[type_].decode(text)
        # A key that stands twice in a JSON object means one thing to this reader and another to the next. Looking for
        # one is slow and only needed for text that is not what we would write for this value, which has none.
        if msgspec.json.encode(value)[:-1] != text[:-1].rstrip(b" "):
            json.loads(text, object_pairs_hook=_distinct)
        for name in ("created", "opened"):  # the pattern lets a 30th of February pass
            datetime.fromisoformat(getattr(value, name, "2026-01-01"))
    except (msgspec.DecodeError, RecursionError, ValueError) as error:  # ValueError: text that is not UTF-8, too
        raise CorruptError(f"{key} does not hold what its name says ({error})") from error
    return value


def _distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        raise ValueError(f"of the keys {[name for name, _ in members][:20]} one stands there twice")
    return found


def _check_version(version: int, needed: int, key: str) -> None:
    """What says that it is of an older version holds nothing that a reader of that version would not know."""
    if version < needed:
        what = "has blocks" if needed == BLOCK_FORMAT_VERSION else "names a delta"
        raise CorruptError(f"{key} {what} and says that its format is {version}")


def _check_keys(manifest: Manifest) -> None:
    """Every key is one, and none is listed twice: with two bases or two lengths, readers would not agree on it."""
    digests = [chunk.digest for chunk in manifest.chunks]
    save_ids = [chunk.save for chunk in manifest.chunks]
    if not _are_hex(digests, 64) or not _are_hex(save_ids, 32):
        for index, chunk in enumerate(manifest.chunks):
            if not (is_digest(chunk.digest) and is_save_id(chunk.save)):
                raise CorruptError(f"{manifest.key}: the digest or the save id of chunk {index} is none")
    if len(set(zip(digests, save_ids, strict=True))) < len(digests):  # or one is a full chunk, and one a delta
        seen: set[str] = set()
        for index, chunk in enumerate(manifest.chunks):
            if chunk.key in seen:
                raise CorruptError(f"{manifest.key}: chunk {index} ({chunk.key}) is listed twice")
            seen.add(chunk.key)


def _are_hex(texts: list[str], length: int) -> bool:
    """Whether each is made of so many hex digits, lower case."""
    joined = "".join(texts)
    return set(map(len, texts)) <= {length} and not joined.encode().translate(None, b"0123456789abcdef")


def _check_bases(manifest: Manifest) -> None:
    """Each delta stands, over at most so many others, on a full chunk of its own length."""
    depths: dict[int, int] = {}
    for start in range(len(manifest.chunks)):
        climbed: list[int] = []
        index = start
        while index not in depths and (base := manifest.chunks[index].base) is not None:
            climbed.append(index)
            if base >= len(manifest.chunks) or manifest.chunks[base].raw != manifest.chunks[index].raw:
                raise CorruptError(f"{manifest.key}: the base of chunk {index} is not listed, or of another length")
            if len(climbed) > MAX_DELTA_DEPTH:
                break
            index = base
        depth = depths.get(index, 0)
        for index in reversed(climbed):
            depth = depths[index] = depth + 1
        if depth > MAX_DELTA_DEPTH:
            raise CorruptError(f"{manifest.key}: more than {MAX_DELTA_DEPTH} deltas stand one on another")


def _check_segments(manifest: Manifest) -> None:
    """Each segment's chunks exist in the table and hold exactly its bytes."""
    lengths = [chunk.raw for chunk in manifest.chunks]
    for number, segment in enumerate(manifest.segments):
        if max(segment.chunks, default=-1) >= len(lengths):
            raise CorruptError(f"{manifest.key}: segment {number} refers to chunks that are not listed")
        if segment.bytes % segment.element or (segment.offset or 0) % segment.element:
            raise CorruptError(f"{manifest.key}: segment {number} is not made of {segment.element}-byte numbers")
        held = sum([lengths[index] for index in segment.chunks])
        if segment.blocks is not None or segment.shape is not None:
            fits = _blocks_fit(segment, lengths)
        elif segment.offset is None:
            fits = held == segment.bytes
        else:
            fits = len(segment.chunks) == 1 and segment.offset + segment.bytes <= held
        if not fits:
            raise CorruptError(f"{manifest.key}: segment {number} has {segment.bytes} bytes, its chunks {held}")


def _blocks_fit(segment: Segment, lengths: list[int]) -> bool:
    """Whether the blocks of a segment make up its array, and their chunks hold exactly their bytes."""
    shape, blocks = segment.shape, segment.blocks
    if not shape or blocks is None or segment.offset is not None:
        return False
    items = math.prod(shape)
    if not items or not segment.bytes or segment.bytes % items:
        return False
    rest = iter(segment.chunks)
    for block in blocks:
        length = math.prod(block.shape) * segment.item_bytes
        held = [lengths[index] for index in itertools.islice(rest, block.chunks)]
        if len(held) != block.chunks or (block.offset or 0) % segment.element:
            return False
        if sum(held) != length if block.offset is None else len(held) != 1 or block.offset + length > held[0]:
            return False
    return next(rest, None) is None and boxes.tile(shape, [(tuple(block.at), tuple(block.shape)) for block in blocks])
