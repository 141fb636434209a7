"""A collection: what no checkpoint needs any more is found, condemned, and deleted once that is safe. Needs no torch.

What to do in which order is for `protocol.collect` to say; this room adds the trial of the backend, what dead writers
left on a disk, and the report.
"""

from dataclasses import dataclass, field

from ckptstore import protocol
from ckptstore.catalog import read_marker
from ckptstore.errors import NotFoundError, UnavailableError
from ckptstore.format import new_save_id
from ckptstore.manifest import Session
from ckptstore.objects.base import Objects
from ckptstore.objects.open import self_test
from ckptstore.performing import Performer
from ckptstore.writer import now_text

__all__ = ["GRACE_SECONDS", "CollectReport", "WaitingSave", "collect"]

GRACE_SECONDS = 600.0
"""A save that lives shows itself every 20 s; a machine that swaps or a network that stalls may take minutes."""


@dataclass(frozen=True, slots=True)
class WaitingSave:
    """A save that is, or was, under way.

    Attributes:
        run, step: what it saves.
        host, pid: where.
        opened: when it began, by the clock of that machine (UTC, ISO 8601).
    """

    run: str
    step: int
    host: str
    pid: int
    opened: str


@dataclass(frozen=True, slots=True)
class CollectReport:
    """The outcome of `Store.collect`: of a dry run what would be done, else what was.

    Attributes:
        dry_run: whether this only says what would be done, and nothing was changed.
        checkpoints: how many there are, each of which keeps all that it needs.
        chunks, chunk_bytes: how many chunk objects were there before, and their size.
        garbage, garbage_bytes: how many of them no checkpoint needs, and their size; those of saves under way do not
            count.
        deleted, deleted_bytes: how many chunks were deleted, and their size as far as it is known.
        waiting: saves under way that opened before the collection. As long as they go on nothing is deleted: what is
            garbage was marked, and a later collection (or one with `wait=True`) takes it.
        fenced: saves that gave no sign of life for `grace` seconds, and can never commit now.
        replaced: how many manifests were left of checkpoints that were saved again.
        tombstones: how many traces of checkpoints that were deleted more than a week ago were removed.
        leftovers: names of unfinished files of writers that died.
        unreadable: how many condemned lists cannot be read; `verify` names them.
        unknown: keys in the store's folders that are none of its own. They stay.
    """

    dry_run: bool
    checkpoints: int
    chunks: int
    chunk_bytes: int
    garbage: int
    garbage_bytes: int
    deleted: int
    deleted_bytes: int
    replaced: int
    tombstones: int
    unreadable: int
    waiting: list[WaitingSave] = field(default_factory=list)
    fenced: list[WaitingSave] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def collect(objects: Objects, *, dry_run: bool, wait: bool, grace: float, alone: bool) -> CollectReport:
    """Collect a store.

    alone: whether the caller says that nobody else uses the store meanwhile.

    Raises:
        NotFoundError: there is no store.
        CorruptError, UnsupportedFormatError: the marker, a manifest or a session cannot be read. Nothing was deleted.
        UnavailableError: the backend failed, or lacks what a collection needs.
    """
    if read_marker(objects) is None:
        raise NotFoundError(f"{objects.url} is not a ckptstore store, or nothing was ever saved there. Check the URL.")
    if not dry_run:
        if (stale := objects.stale_listings()) and not alone:
            raise UnavailableError(
                f"{stale}, so a collection could miss what another machine has just saved. Collect when no job uses "
                "the store, and say so: collect(alone=True), ckptstore gc --alone."
            )
        self_test(objects)
    request = protocol.CollectRequest(
        collection=new_save_id(), created=now_text(), grace=grace, wait=wait, dry_run=dry_run
    )
    found = Performer(objects).perform(protocol.collect(request))
    garbage = found.unreferenced | found.condemned
    return CollectReport(
        dry_run=dry_run,
        checkpoints=found.checkpoints,
        chunks=found.chunks,
        chunk_bytes=found.chunk_bytes,
        garbage=len(garbage),
        garbage_bytes=sum(garbage.values()),
        deleted=found.swept,
        deleted_bytes=found.swept_bytes,
        replaced=len(found.replaced),
        tombstones=len(found.expired),
        unreadable=found.unreadable,
        waiting=[_told(session) for session in found.waiting],
        fenced=[_told(session) for session in found.fenced],
        leftovers=objects.leftovers(grace, remove=not dry_run),
        unknown=found.unknown,
    )


def _told(session: Session) -> WaitingSave:
    return WaitingSave(session.run, session.step, session.writer.host, session.writer.pid, session.opened)
