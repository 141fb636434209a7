"""The decisions of a collection: what is garbage, when it is safe to delete, when a list of it may go.

The numbers in the comments are those of the section "Collect" of docs/explanation/protocol.md, which says why the steps
stand in this order, and why no clock and no crash can make them lose a chunk.
"""

from collections.abc import Generator, Iterable
from typing import Any

from msgspec import Struct, field

from ckptstore.errors import CorruptError, UnavailableError
from ckptstore.format import (
    CHUNKS,
    DELTAS,
    SESSIONS,
    ChunkKey,
    chunk_prefixes,
    condemned_key,
    family,
    session_key,
    session_of,
)
from ckptstore.manifest import Condemned, Ended, Session, decode_session, encode, format_naming
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import read_condemned
from ckptstore.protocol.deletes import bury
from ckptstore.protocol.operations import (
    PREFIXES_AT_A_TIME,
    Clock,
    Create,
    Delete,
    Get,
    List,
    Operation,
    Pause,
    Sync,
    in_batches,
)
from ckptstore.protocol.roots import Roots, read_roots

TOMBSTONE_SECONDS = 7 * 24 * 3600.0
"""How long a tombstone stands: longer than any network delivers a request late."""
KEYS_IN_A_LIST = 50_000
"""A save reads every condemned list, so none is larger than some MB."""
KEYS_AT_A_TIME = 10_000
POLL_SECONDS = 2.0


class CollectRequest(Struct, frozen=True):
    """What a collection is asked to do."""

    collection: str
    """A new id, for the condemned list."""
    created: str
    grace: float
    """Seconds without a sign of life after which a save is taken for dead."""
    wait: bool = False
    """Whether to wait for saves under way, rather than leave the sweep to a later collection."""
    dry_run: bool = False


class Collected(Struct):
    """What a collection found and did."""

    checkpoints: int = 0
    chunks: int = 0
    """How many chunk objects there were."""
    chunk_bytes: int = 0
    unreferenced: dict[str, int] = field(default_factory=dict)
    """Key -> bytes of the chunks that no checkpoint needs and that no save under way has uploaded."""
    condemned: dict[str, int] = field(default_factory=dict)
    """Key -> bytes of the chunks of older lists that still stand and that no checkpoint needs."""
    expired: list[str] = field(default_factory=list)
    """Keys of tombstones that are old enough to go."""
    replaced: list[str] = field(default_factory=list)
    """Keys of manifests that another one has replaced, and that nobody buried yet."""
    fenced: list[Session] = field(default_factory=list)
    """Saves that were taken for dead; in a dry run, those that would be."""
    waiting: list[Session] = field(default_factory=list)
    """Saves under way, because of which nothing was deleted yet."""
    swept: int = 0
    """How many chunks were deleted."""
    swept_bytes: int = 0
    unreadable: int = 0
    """How many condemned lists cannot be read. They stay."""
    unknown: list[str] = field(default_factory=list)
    """Keys in the store's folders that are none of its own. They stay."""


def collect(request: CollectRequest) -> Generator[Operation, Any, Collected]:
    """One collection.

    Raises:
        CorruptError: a manifest or a session cannot be read, so what is needed is not known. Nothing was deleted.
        UnsupportedFormatError: likewise, as a newer ckptstore wrote it.
        UnavailableError: a request failed. What was done is safe, and the next collection goes on with it.
    """
    found, roots = Collected(), Roots()
    gone = yield from _mark(request, roots, found)
    if request.dry_run:
        return found
    yield from _condemn(request, found.unreferenced)
    lists = yield from _lists()
    # Listed after the lists were read: a save that is not seen here has ended, or opened so late that it reads them.
    yield from _wait_out(request, found)
    if not found.waiting:
        yield from read_roots(roots)  # 4
        # Whoever deleted these may not have made that durable yet; they must not come back without their chunks.
        yield Sync(tuple(roots.tombstones))
        yield from _sweep(lists, gone, roots, found)
        yield from _drop(lists, roots)
    yield from _delete(found.expired)
    return found


def _mark(request: CollectRequest, roots: Roots, found: Collected) -> Generator[Operation, Any, set[str]]:
    """Step 1: what no checkpoint needs. Wrong in either direction it does no harm; it is made as right as can be.

    Returns the keys of older lists that stand no more.
    """
    lists = yield from read_condemned()
    found.unreadable = lists.count(None)
    older = {key for each in lists if each for key in each.keys}
    yield from read_roots(roots)
    found.replaced = [str(key) for key in roots.replaced]
    if not request.dry_run:
        for key in roots.replaced:
            yield from bury(key, request.created)
    gone = yield from _list_chunks(roots, older, found)
    # After the chunks: a chunk whose save is not seen to live here was uploaded by one that has ended.
    now: float = yield Clock(about=request.dry_run)
    sessions: list[ObjectInfo] = yield List((SESSIONS,))
    beating = [session_of(row.key) for row in sessions if _beats(row, now, request.grace)]
    alive = {family(save_id) for save_id in beating if save_id is not None}
    yield from read_roots(roots)  # what these have committed meanwhile
    found.unreferenced = {
        key: size
        for key, size in found.unreferenced.items()
        if not roots.names(key) and family(key.rpartition(".")[2]) not in alive
    }
    found.condemned = {key: size for key, size in found.condemned.items() if not roots.names(key)}
    found.expired = [key for key, modified in roots.tombstones.items() if 0 < modified < now - TOMBSTONE_SECONDS]
    found.checkpoints = roots.checkpoints
    found.unknown += roots.unknown
    if request.dry_run:
        found.waiting, found.fenced = yield from _read_sessions(sessions, now, request.grace)
    return gone


def _list_chunks(roots: Roots, older: set[str], found: Collected) -> Generator[Operation, Any, set[str]]:
    """Look at every chunk; return those of the keys `older` that are not among them."""
    gone = set(older)
    prefixes = chunk_prefixes(CHUNKS, len(roots.named) - roots.deltas) + chunk_prefixes(DELTAS, roots.deltas)
    for some in in_batches(prefixes, PREFIXES_AT_A_TIME):
        rows: list[ObjectInfo] = yield List(tuple(some))
        for row in rows:
            key = ChunkKey.parse(row.key)
            if key is None:
                found.unknown.append(row.key)
                continue
            found.chunks += 1
            found.chunk_bytes += row.size
            gone.discard(row.key)
            if not roots.needs(key):
                (found.condemned if row.key in older else found.unreferenced)[row.key] = row.size
    return gone


def _condemn(request: CollectRequest, keys: Iterable[str]) -> Generator[Operation, Any, None]:
    """Step 2: name what is to go, before anything goes."""
    for number, some in enumerate(in_batches(sorted(keys), KEYS_IN_A_LIST)):
        collection = f"{(int(request.collection, 16) + number) % 2**128:032x}"
        content = encode(
            Condemned(
                format=format_naming(some),
                collection=collection,
                reason="unreferenced",
                created=request.created,
                keys=some,
            )
        )
        key = condemned_key(collection)
        if not (yield Create(key, content)):
            [there] = yield Get((key,))
            if there != content:  # else the answer to our own create was lost
                raise UnavailableError(f"{key} was made by somebody else. Nothing was deleted; collect again.")


def _lists() -> Generator[Operation, Any, list[Condemned]]:
    """Every condemned list that can be read now."""
    lists = yield from read_condemned()
    return [each for each in lists if each is not None]


def _wait_out(request: CollectRequest, found: Collected) -> Generator[Operation, Any, None]:
    """Step 3: end, fence or wait for every save that stands now and so may not know what was condemned."""
    rows: list[ObjectInfo] = yield List((SESSIONS,))
    old = {row.key for row in rows}
    while True:
        now: float = yield Clock()
        found.waiting, dead = yield from _read_sessions(rows, now, request.grace)
        for session in dead:
            yield from _fence(session, request.created)
        found.fenced += dead
        if not found.waiting or not request.wait:
            return
        yield Pause(POLL_SECONDS)
        rows = yield List((SESSIONS,))
        rows = [row for row in rows if row.key in old]  # those that opened later know


def _read_sessions(
    rows: list[ObjectInfo], now: float, grace: float
) -> Generator[Operation, Any, tuple[list[Session], list[Session]]]:
    """The saves that live, and those that do not."""
    ours = [row for row in rows if session_of(row.key)]
    if not ours:
        return [], []
    contents: list[bytes | None] = yield Get(tuple(row.key for row in ours))
    alive: list[Session] = []
    dead: list[Session] = []
    for row, content in zip(ours, contents, strict=True):
        if content is None:
            continue  # it has ended meanwhile
        try:
            session = decode_session(content, row.key)
        except CorruptError as error:
            raise CorruptError(
                f"the session {row.key} is damaged ({error}), so the save that it stands for cannot be fenced. No "
                "chunk was deleted. Delete it when no job saves to this store, and collect again."
            ) from error
        (alive if _beats(row, now, grace) else dead).append(session)
    return alive, dead


def _beats(row: ObjectInfo, now: float, grace: float) -> bool:
    """Whether a session was put again not long ago. A wrong answer costs a save, never a chunk.

    One of the future, which a machine with a wrong clock has left on a disk, must not stand for years.
    """
    return abs(now - row.modified) <= grace


def _fence(session: Session, created: str) -> Generator[Operation, Any, None]:
    """Keep a save from ever committing; if it has, that is as good. Then it needs no session any more."""
    fence = Ended(state="fenced", run=session.run, step=session.step, save=session.save, created=created)
    yield Create(str(fence.key), encode(fence))
    yield Delete((session_key(session.save),))


def _sweep(lists: list[Condemned], gone: set[str], roots: Roots, found: Collected) -> Generator[Operation, Any, None]:
    """Step 4: delete what is condemned and still needed by nothing."""
    condemned = {key for each in lists for key in each.keys}
    dead = sorted(key for key in condemned - gone if not roots.names(key))
    yield from _delete(dead)  # for good, before the list that names them goes
    found.swept = len(dead)
    found.swept_bytes = sum(found.unreferenced.get(key, 0) + found.condemned.get(key, 0) for key in dead)


def _drop(lists: list[Condemned], roots: Roots) -> Generator[Operation, Any, None]:
    """Step 5: what was condemned is never freed again. A list goes when all of its keys are gone, and none before."""
    done = [each for each in lists if not any(roots.names(key) for key in each.keys)]
    yield from _delete([condemned_key(each.collection) for each in done])


def _delete(keys: list[str]) -> Generator[Operation, Any, None]:
    for some in in_batches(keys, KEYS_AT_A_TIME):
        yield Delete(tuple(some))
