"""Reads every byte of a store (or of a run) and says which tensor of which checkpoint is damaged. Needs no torch."""

import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ckptstore import chunk as chunks
from ckptstore.catalog import list_chunks, read_marker
from ckptstore.condemning import condemn_keys
from ckptstore.decoding import decode_chain, each_of_chain
from ckptstore.errors import CheckpointError, CorruptError, UnsupportedFormatError
from ckptstore.format import (
    CONDEMNED,
    MARKER_KEY,
    RUNS,
    SESSIONS,
    TAGS,
    ChunkKey,
    ManifestKey,
    TagKey,
    run_prefix,
    tag_prefix,
)
from ckptstore.kernels import compiled
from ckptstore.manifest import (
    ChunkRef,
    Manifest,
    TensorPaths,
    decode_condemned,
    decode_manifest,
    decode_session,
    decode_tag,
)
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.pipeline import Progress, Stage, each, staged, worker_threads
from ckptstore.protocol.operations import in_batches
from ckptstore.skeleton import tensors

DOCUMENTS_AT_A_TIME = 64
_undescribed = threading.Lock()


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is damaged.

    Attributes:
        run, step: the checkpoint concerned; None for an object that belongs to none.
        path: the tensor concerned, such as "model.linear.weight"; None if it is not a tensor's chunk that is damaged.
        key: the object.
        reason: what is wrong with it.
    """

    run: str | None
    step: int | None
    path: str | None
    key: str
    reason: str


@dataclass(slots=True)
class VerifyReport:
    """The outcome of `Store.verify`.

    Attributes:
        checkpoints: how many were verified.
        chunks: how many chunk objects were read; if `quick`, how many the checkpoints need, each of which was looked
            for.
        bytes: how many bytes were read of them.
        quick: whether chunks were read only if a listing showed that something is wrong.
        damaged: all that was found damaged; one row for each tensor of each checkpoint that needs a damaged chunk.
        harmless: damaged chunks that no checkpoint needs and that were marked before, so that no save takes them up:
            what a checkpoint that was saved again or deleted has left. Nothing is to be done about them.
        unknown: keys in the store's folders that are none of its own, such as somebody's files; not damage.
        marked: whether damaged chunks could be marked, so that no save takes them up again.
    """

    checkpoints: int = 0
    chunks: int = 0
    bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)
    harmless: list[Damage] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    marked: bool = True
    quick: bool = False

    @property
    def ok(self) -> bool:
        """True if nothing is damaged that a checkpoint needs or a save might take up."""
        return not self.damaged


class _Identity(NamedTuple):
    """A chunk as one manifest describes it; another one may tell a lie about the same object."""

    key: ChunkKey
    raw: int
    stored: int
    base_digest: str | None


@dataclass(slots=True)
class _Wanted:
    """A chunk to read: its size as a manifest or the listing has it, and the checkpoints that need it."""

    key: ChunkKey
    stored: int
    users: list[tuple[Manifest, int]] = field(default_factory=list)
    """With its index in their tables; none if no manifest describes it."""

    @property
    def chain(self) -> list[ChunkRef]:
        """What decoding it takes, the chunk itself last; empty if no manifest describes it."""
        manifest, index = self.users[0] if self.users else (None, 0)
        return [] if manifest is None else manifest.chain(index)

    @property
    def raw_bytes(self) -> int:
        return sum(ref.raw for ref in self.chain)

    @property
    def held_bytes(self) -> int:
        """What checking it holds in memory: an object and its planes, what they make, and a delta's base."""
        chain = self.chain
        if not chain:
            return 3 * self.stored  # a guess, as only the object says how long it is
        return max(ref.stored for ref in chain) + (3 if len(chain) > 1 else 2) * chain[-1].raw


def verify(
    objects: Objects, run: str | None = None, progress: Progress | None = None, *, quick: bool = False
) -> VerifyReport:
    """Verify a whole store, or one run and what it needs.

    quick: of chunks that are there and as long as they should be, read nothing.

    Raises:
        UnavailableError: the backend failed, so nothing is known.
        UnsupportedFormatError: an object was written by a newer ckptstore.
    """
    report = VerifyReport(quick=quick)
    try:
        read_marker(objects)
    except CorruptError as error:
        report.damaged.append(Damage(None, None, None, MARKER_KEY, str(error)))
    # Not the whole place: a disk's root has folders that nobody may list.
    prefixes = (RUNS, TAGS, SESSIONS, CONDEMNED) if run is None else (run_prefix(run), tag_prefix(run))
    documents = [row.key for prefix in prefixes for row in objects.list(prefix)]
    if quick:
        wanted, marked = _suspects(objects, documents, run, report)
    else:
        manifests: list[Manifest] = []
        marked = _check_documents(objects, documents, manifests.append, report)
        report.checkpoints = len(manifests)
        full = {ref.key for manifest in manifests for ref in manifest.chunks if ref.base is None}
        deltas = {ref.key for manifest in manifests for ref in manifest.chunks if ref.base is not None}
        # Of one run only what it needs is looked at.
        rows = () if run else list_chunks(objects, len(full), len(deltas))
        wanted = _wanted_chunks(manifests, {row.key: row.size for row in rows}, report)
    total = sum(each.stored for each in wanted)
    compiled.expect(sum(each.raw_bytes for each in wanted))
    damaged: list[tuple[_Wanted, str]] = []
    sound: set[ChunkKey] = set()

    def check(each: _Wanted) -> None:
        try:
            _check_chunk(objects, each)
            sound.add(each.key)
        except CorruptError as error:
            # What a damaged chunk is the base of cannot be checked. It is told of as needing that one.
            if error.key is None or error.key == str(each.key):
                damaged.append((each, str(error)))

    def count(each: _Wanted) -> None:
        report.chunks += not quick
        report.bytes += each.stored
        if progress:
            progress(report.bytes, total)

    threads = max(worker_threads(), objects.request_threads)
    staged(wanted, [Stage(check, threads)], weigh=lambda each: each.held_bytes, done=count)
    _report_chunks(objects, sorted(damaged, key=lambda found: found[0].key), sound, marked, report)
    return report


def _check_documents(
    objects: Objects, keys: list[str], take: Callable[[Manifest], None], report: VerifyReport
) -> set[str]:
    """Read everything that is JSON; `take` the committed manifests, return the chunk keys that no save takes up."""
    condemned: set[str] = set()
    known = [
        key for key in keys if ManifestKey.parse(key) or TagKey.parse(key) or key.startswith((SESSIONS, CONDEMNED))
    ]
    report.unknown += sorted(set(keys).difference(known))
    for some in in_batches(known, DOCUMENTS_AT_A_TIME):
        contents = each(objects.get, some, threads=objects.request_threads)
        for key, content in zip(some, contents, strict=True):
            if content is not None:  # else it has ended meanwhile
                _check_document(key, content, take, condemned, report)
    return condemned


def _check_document(
    key: str, content: bytes, take: Callable[[Manifest], None], condemned: set[str], report: VerifyReport
) -> None:
    manifest_key = ManifestKey.parse(key)
    try:
        if manifest_key is not None:
            value = decode_manifest(content, manifest_key)
            if isinstance(value, Manifest):
                for _ in tensors(value.tree, value.segment_bytes):
                    pass  # each is checked on the way
                take(value)
        elif key.startswith(SESSIONS):
            decode_session(content, key)
        elif key.startswith(TAGS):
            decode_tag(content, key)
        else:
            condemned |= set(decode_condemned(content, key).keys)
    except UnsupportedFormatError:
        raise
    except CheckpointError as error:
        run, step = (manifest_key.run, manifest_key.step) if manifest_key else (None, None)
        report.damaged.append(Damage(run, step, None, key, str(error)))


class _Described:
    """What manifests say of their chunks, and how each is listed, without the manifests: for a quick verify."""

    def __init__(self) -> None:
        self.manifests: list[tuple[ManifestKey, array[int]]] = []
        """With the numbers of the chunks that each names."""
        self.deltas = 0
        self._numbers: dict[bytes, int] = {}
        self._stored, self._raw = array("q"), array("q")
        self._bases: dict[int, str] = {}
        self._is_good = bytearray()
        self._doubtful: set[int] = set()
        """Numbers of those that two manifests describe in two ways."""

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, manifest: Manifest) -> None:
        """Keep what a quick look needs of a manifest."""
        named = array("I")
        for ref in manifest.chunks:
            base = None if ref.base is None else manifest.chunks[ref.base].digest
            number = self._numbers.setdefault(_name(ref.digest, ref.save, is_delta=base is not None), len(self))
            if number == len(self._stored):
                self._stored.append(ref.stored)
                self._raw.append(ref.raw)
                self._is_good.append(False)
                if base is not None:
                    self._bases[number] = base
                    self.deltas += 1
            elif (self._stored[number], self._raw[number], self._bases.get(number)) != (ref.stored, ref.raw, base):
                self._doubtful.add(number)
            named.append(number)
        self.manifests.append((manifest.key, named))

    def see(self, row: ObjectInfo, key: ChunkKey) -> bool:
        """Take up a row of a listing; False if no manifest names it."""
        number = self._number(key)
        if number is None:
            return False
        self._is_good[number] = self._stored[number] == row.size and number not in self._doubtful
        return True

    def is_good(self, key: ChunkKey) -> bool:
        """Whether it was seen, and is as long as all manifests say that name it."""
        number = self._number(key)
        return number is not None and bool(self._is_good[number])

    def good(self) -> int:
        """How many are."""
        return sum(self._is_good)

    def concerned(self) -> list[str]:
        """The keys of the manifests that name others."""
        return [str(key) for key, named in self.manifests if not all(self._is_good[number] for number in named)]

    def _number(self, key: ChunkKey) -> int | None:
        return self._numbers.get(_name(key.digest, key.save_id, is_delta=key.is_delta))


def _name(digest: str, save_id: str, *, is_delta: bool) -> bytes:
    """A chunk's key in a third of the memory."""
    return bytes.fromhex(digest + save_id) + (b"d" if is_delta else b"")


def _suspects(
    objects: Objects, documents: list[str], run: str | None, report: VerifyReport
) -> tuple[list[_Wanted], set[str]]:
    """The chunks that are not listed as they should be, and the chunk keys that no save takes up.

    Holds no manifest but those that name such a chunk: these are read once more.
    """
    described = _Described()
    marked = _check_documents(objects, documents, described.add, report)
    report.checkpoints = len(described.manifests)
    doubtful: dict[str, int] = {}
    for row in list_chunks(objects, len(described) - described.deltas, described.deltas):
        key = ChunkKey.parse(row.key)
        if key is not None and described.see(row, key):
            if not described.is_good(key):
                doubtful[row.key] = row.size
        elif run is None and key is None:
            report.unknown.append(row.key)
    manifests: list[Manifest] = []
    _check_documents(objects, described.concerned(), manifests.append, report)
    wanted = [each for each in _wanted_chunks(manifests, {}, report) if not described.is_good(each.key)]
    report.chunks += described.good() + len(wanted)
    return [each for each in wanted if doubtful.get(str(each.key)) != each.stored], marked


def _wanted_chunks(manifests: list[Manifest], sizes: dict[str, int], report: VerifyReport) -> list[_Wanted]:
    """Every chunk that a manifest needs, and every other one: a save might take it up."""
    wanted: dict[_Identity, _Wanted] = {}
    for manifest in manifests:
        for index, ref in enumerate(manifest.chunks):
            key = ChunkKey(ref.digest, ref.save, ref.base is not None)
            base_digest = None if ref.base is None else manifest.chunks[ref.base].digest
            identity = _Identity(key, ref.raw, ref.stored, base_digest)
            wanted.setdefault(identity, _Wanted(key, ref.stored)).users.append((manifest, index))
    found = list(wanted.values())
    described = {each.key for each in found}
    for name, size in sizes.items():
        listed = ChunkKey.parse(name)
        if listed is None:
            report.unknown.append(name)
        elif listed not in described:
            found.append(_Wanted(listed, size))
    return sorted(found, key=lambda each: each.key)


def _check_chunk(objects: Objects, wanted: _Wanted) -> None:
    if chain := wanted.chain:
        room = np.empty(chain[-1].raw, np.uint8)
        decode_chain(chain, each_of_chain(objects, chain), room, verify_each=True)
        return
    content = objects.get(str(wanted.key))
    if content is None:
        return  # no manifest needs it: a collection has taken it meanwhile
    # How long a chunk is that no manifest describes, only it says itself: one at a time, should it claim a lot.
    with _undescribed:
        raw_bytes = chunks.raw_length(content)
        if wanted.key.is_delta != chunks.is_delta(content):
            raise CorruptError("it is a delta among full chunks, or the other way round")
        if not wanted.key.is_delta:  # the base of a delta only a manifest names
            chunks.decode(content, wanted.key.digest, np.empty(raw_bytes, np.uint8))


def _report_chunks(
    objects: Objects, damaged: list[tuple[_Wanted, str]], sound: set[ChunkKey], marked: set[str], report: VerifyReport
) -> None:
    needed: dict[ManifestKey, set[int]] = {}
    manifest_of: dict[ManifestKey, Manifest] = {}
    for found, _ in damaged:
        for manifest, index in found.users:
            needed.setdefault(manifest.key, set()).add(index)
            manifest_of[manifest.key] = manifest
    # A checkpoint that was deleted while it was verified is not damaged.
    paths = {
        key: TensorPaths(manifest_of[key], indices)
        for key, indices in needed.items()
        if _stands(objects, manifest_of[key])
    }
    condemned: list[str] = []
    for found, reason in damaged:
        standing = [(manifest, index) for manifest, index in found.users if manifest.key in paths]
        rows = [
            Damage(manifest.run, manifest.step, path, str(found.key), reason)
            for manifest, index in standing
            for path in paths[manifest.key].of(index)
        ]
        if standing or not found.users:
            if rows:
                report.damaged += rows
            else:
                row = Damage(None, None, None, str(found.key), reason)
                # Where it is not marked yet, a save could have taken it up: that is worth an alarm, once.
                (report.harmless if str(found.key) in marked else report.damaged).append(row)
            # Where another manifest describes it as it is, it is not the object that is wrong.
            if found.key not in sound:
                condemned.append(str(found.key))
    report.marked = condemn_keys(objects, condemned)


def _stands(objects: Objects, manifest: Manifest) -> bool:
    content = objects.get(str(manifest.key))
    return content is not None and isinstance(decode_manifest(content, manifest.key), Manifest)
