"""What the checkpoints of a store need: the roots of a collection. Manifest by manifest, each read once.

A manifest at a key never changes but for its tombstone. So a second reading asks only for what is new since the first,
and still counts what has been deleted meanwhile: a collection may keep too much, never too little.
"""

from collections.abc import Generator, Iterator
from itertools import groupby
from typing import Any

from msgspec import Struct, field

from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import RUNS, ChunkKey, ManifestKey
from ckptstore.manifest import Ended, Manifest, decode_manifest
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import may_be_committed
from ckptstore.protocol.operations import Get, List, Operation, in_batches

MANIFESTS_AT_A_TIME = 64
"""So many are held in memory at once, as they were read."""


class Roots(Struct):
    """All that was found so far."""

    seen: set[str] = field(default_factory=set)
    """Keys below `runs/` that were read."""
    named: set[bytes] = field(default_factory=set)
    """The chunk keys that manifests name, shortened."""
    checkpoints: int = 0
    deltas: int = 0
    """How many of `named` are deltas."""
    replaced: list[ManifestKey] = field(default_factory=list)
    """Manifests that stand, although another one has taken their place: its save did not come to bury them."""
    tombstones: dict[str, float] = field(default_factory=dict)
    """Key -> the store's last-modified time."""
    fences: int = 0
    unknown: list[str] = field(default_factory=list)
    """Keys below `runs/` that are none of ours."""
    was_read: bool = False
    """Whether this is not the first reading."""

    def names(self, key: str) -> bool:
        """Whether a manifest needs this chunk."""
        parsed = ChunkKey.parse(key)
        assert parsed is not None, f"{key} was not checked"
        return self.needs(parsed)

    def needs(self, key: ChunkKey) -> bool:
        """The same of a key that is parsed."""
        return short_name(key.digest, key.save_id, is_delta=key.is_delta) in self.named

    def add(self, manifest: Manifest) -> None:
        self.checkpoints += 1
        self.named.update([short_name(ref.digest, ref.save) for ref in manifest.chunks if ref.base is None])
        before = len(self.named)
        self.named.update(
            [short_name(ref.digest, ref.save, is_delta=True) for ref in manifest.chunks if ref.base is not None]
        )
        self.deltas += len(self.named) - before


def short_name(digest: str, save_id: str, *, is_delta: bool = False) -> bytes:
    """A chunk's key in a third of the memory. Half of its digest: that two keys of one save share it is as good as
    impossible, and would keep a chunk too many.
    """
    short = bytes.fromhex(digest[:32] + save_id)
    return short + b"d" if is_delta else short


def read_roots(roots: Roots) -> Generator[Operation, Any, None]:
    """Read every manifest that stands now and is not among `roots`, and add it.

    Raises:
        CorruptError: one cannot be read, so what it needs is not known.
        UnsupportedFormatError: likewise, as a newer ckptstore wrote it.
        UnavailableError: one is listed, and then not there.
    """
    rows: list[ObjectInfo] = yield List((RUNS,))
    fresh: list[tuple[ManifestKey, ObjectInfo]] = []
    for row in rows:
        if row.key in roots.seen:
            continue
        key = ManifestKey.parse(row.key)
        if key is None:
            roots.seen.add(row.key)
            roots.unknown.append(row.key)
        else:
            fresh.append((key, row))
    for steps in _by_step(fresh):
        asked = [found for step in steps for found in step]
        contents: list[bytes | None] = yield Get(tuple(row.key for _, row in asked))
        given = iter(contents)
        for step in steps:
            _add_step(roots, [(key, row, next(given)) for key, row in step])
    roots.was_read = True


def _by_step(
    rows: list[tuple[ManifestKey, ObjectInfo]],
) -> Iterator[list[list[tuple[ManifestKey, ObjectInfo]]]]:
    """Rows in batches of whole steps, as what counts in a step is seen by all of its manifests."""
    rows.sort(key=lambda pair: pair[0])
    steps = [list(group) for _, group in groupby(rows, key=lambda pair: (pair[0].run, pair[0].step))]
    return in_batches(steps, MANIFESTS_AT_A_TIME)


def _add_step(roots: Roots, found: list[tuple[ManifestKey, ObjectInfo, bytes | None]]) -> None:
    manifests: list[Manifest] = []
    for key, row, content in found:
        value = _decode(key, row, content)
        if isinstance(value, Manifest):
            manifests.append(value)
        elif value is not None and value.state == "deleted":
            roots.tombstones[row.key] = row.modified
        else:
            roots.fences += value is not None
        roots.seen.add(row.key)
    replaced = {save_id for manifest in manifests for save_id in manifest.replaces}
    for manifest in manifests:
        # Later on a save may be about to take chunks from it, and it is buried before that only by the first reading.
        if manifest.save in replaced and not roots.was_read:
            roots.replaced.append(manifest.key)
        else:
            roots.add(manifest)


def _decode(key: ManifestKey, row: ObjectInfo, content: bytes | None) -> Manifest | Ended | None:
    if content is None:
        if may_be_committed(row):
            # Manifests do not vanish. That one seems to have is a sign of a store whose answers cannot be trusted.
            raise UnavailableError(
                f"{key} is listed, and cannot be read. Nothing was deleted. Collect again; if it goes on, the store's "
                "listings are not consistent, and nothing in it can be collected."
            )
        return None
    try:
        return decode_manifest(content, key)
    except CorruptError as error:
        raise CorruptError(
            f"the manifest of step {key.step} of run {key.run!r} is damaged ({error}), so which chunks it needs is not "
            f"known. Nothing was deleted. Put {key} back from a copy, save the step again with replace=True, or delete "
            f"it: ckptstore rm STORE/{key.run}@{key.step}."
        ) from error
