"""Which manifest of a step counts, and which chunks no save may take up: what saves, deletes and readers agree on."""

from collections.abc import Generator, Sequence
from typing import Any

from msgspec import Struct

from ckptstore.errors import ConflictError, CorruptError
from ckptstore.format import CONDEMNED, MIN_MANIFEST_BYTES, ManifestKey
from ckptstore.manifest import Condemned, Ended, Manifest, decode_condemned, decode_manifest
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.operations import Get, List, Operation

UNREADABLE_LIST = (
    "a list of condemned chunks cannot be read, so which chunks are good is not known. Nothing was changed. `ckptstore "
    "verify` names the list; delete it when no job saves, verify the store again, which makes the marks anew, and do "
    "this again then."
)


class Candidate(Struct, frozen=True):
    """A manifest of a step: what it says, or None if it cannot be read, and the store's last-modified time."""

    key: ManifestKey
    modified: float
    manifest: Manifest | None
    is_foreign: bool = False
    """Whether it is a sound manifest, and another one's."""


def current(candidates: Sequence[Candidate]) -> Candidate | None:
    """Which manifest of a step counts: one that can be read and no other replaces, the latest by the store's clock,
    then by id. What cannot be read stands in the way of nothing: a sound one beside it must not be lost.
    """
    replaced = {save for found in candidates if found.manifest for save in found.manifest.replaces}
    standing = [found for found in candidates if found.manifest and found.key.save_id not in replaced]
    return max(standing, key=lambda found: (found.modified, found.key.save_id), default=None)


def may_be_committed(row: ObjectInfo) -> bool:
    """Tells manifests from fences and tombstones by size alone."""
    return row.size >= MIN_MANIFEST_BYTES


def read_candidates(found: list[tuple[ManifestKey, ObjectInfo]]) -> Generator[Operation, Any, list[Candidate]]:
    contents: list[bytes | None] = yield Get(tuple(str(key) for key, _ in found))
    candidates = (
        read_candidate(key, row.modified, content) for (key, row), content in zip(found, contents, strict=True)
    )
    return [candidate for candidate in candidates if candidate is not None]


def refuse_foreign(candidates: Sequence[Candidate]) -> None:
    """Raise ConflictError rather than let a manifest be overwritten that is another run's."""
    for found in candidates:
        if found.is_foreign:
            raise ConflictError(
                f"{found.key} holds a sound manifest of another run or step. On a disk that does not tell capitals "
                "from small letters two runs whose names differ by these alone lie in one folder: choose another name. "
                "Or it was copied there: move it away. Nothing was changed."
            )


def read_candidate(key: ManifestKey, modified: float, content: bytes | None) -> Candidate | None:
    """What stands at a manifest's key; None for a fence, a tombstone, or nothing."""
    if content is None:
        return None
    try:
        value = decode_manifest(content, key)
    except CorruptError as error:
        return Candidate(key, modified, None, is_foreign=error.is_foreign)
    return None if isinstance(value, Ended) else Candidate(key, modified, value)


def read_condemned() -> Generator[Operation, Any, "list[Condemned | None]"]:
    """Every condemned list that stands now, None for one that cannot be read; one that is gone by then is left out."""
    rows: list[ObjectInfo] = yield List((CONDEMNED,))
    if not rows:
        return []
    keys = tuple(row.key for row in rows)
    contents: list[bytes | None] = yield Get(keys)
    lists: list[Condemned | None] = []
    for key, content in zip(keys, contents, strict=True):
        if content is not None:
            try:
                lists.append(decode_condemned(content, key))
            except CorruptError:
                lists.append(None)
    return lists
