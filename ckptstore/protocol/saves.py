"""The decisions of a save, from the friendly look to the closed session: what to reuse, what to upload, when it counts.

The numbers in the comments are those of the section "Save" of docs/explanation/protocol.md, which says why the steps
stand in this order.
"""

from collections.abc import Generator, Sequence
from typing import Any

from msgspec import Struct, field

from ckptstore.deltas import Held, find_bases, held_chunks, table
from ckptstore.errors import ConflictError, CorruptError, FencedError, UnavailableError
from ckptstore.format import CHUNKS, MAX_OVERHEAD_BYTES, ChunkKey, ManifestKey, family, run_prefix
from ckptstore.manifest import ChunkRef, Manifest, Segment, Session, Writer, encode, format_naming
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import (
    current,
    may_be_committed,
    read_candidate,
    read_candidates,
    read_condemned,
    refuse_foreign,
)
from ckptstore.protocol.deletes import bury
from ckptstore.protocol.operations import Close, Create, Get, List, Open, Operation, Sync, Upload, Uploaded

FEW_CHUNKS = 16
"""Up to so many chunks are looked for one by one, more by whole prefixes, of which there are 256."""


class SaveRequest(Struct, frozen=True):
    """All that is known of a checkpoint before the store is looked at."""

    run: str
    step: int
    save: str
    created: str
    writer: Writer
    metrics: Any
    metadata: Any
    content: str
    tree: Any
    segments: list[Segment]
    chunks: dict[str, int]
    """Digest -> raw bytes of each different chunk, in the order of the manifest's table."""
    raw_bytes: int
    replace: bool = False
    deltas: bool = False
    """Whether chunks may be stored as differences to those of the run's newest checkpoint."""


class JointRequest(Struct, frozen=True):
    """What is known of a save of many processes before they have looked at their state."""

    run: str
    step: int
    save: str
    created: str
    writer: Writer


class PartRequest(Struct, frozen=True):
    """Chunks that are to be held for a save whose session is open: all of them, or those of one of its processes."""

    save: str
    """The id to upload under: no other process of the save has it."""
    chunks: dict[str, int]
    """Digest -> raw bytes."""
    newest: ManifestKey | None = None
    """A manifest of the run, whose chunks may be among them."""


class Found(Struct):
    """What the friendly check found: what to replace, and the newest manifest, whose chunks may be ours too."""

    replaces: list[str] = field(default_factory=list)
    newest: ManifestKey | None = None


def save(request: SaveRequest) -> Generator[Operation, Any, Manifest]:
    """One save, from the friendly check to the closed session; returns the manifest that stands for the step.

    Raises:
        ConflictError: the step holds another state.
        FencedError: a collector took this save for dead; it never committed and never will.
        UnavailableError: a request failed. If it was the commit's, its outcome is unknown and the session stands.
    """
    found = yield from look(request)
    if isinstance(found, Manifest):
        return found
    try:
        yield Open(session_of(request))  # 1
        manifest = yield from _assemble(request, found)
    except (Exception, KeyboardInterrupt):
        # No manifest was created, so the outcome is known. What was uploaded stays for the collector: another save
        # may have found it and reuse it.
        yield from close_quietly(request.save)
        raise
    yield from commit(manifest, [ManifestKey(request.run, request.step, save) for save in found.replaces])
    return manifest


def close_quietly(save_id: str) -> Generator[Operation, Any, None]:
    """Close a session once the outcome is known: a failure to do so must not hide it, be it an error or a success."""
    try:
        yield Close(save_id)
    except UnavailableError:
        return  # a session without a save ends by itself


def session_of(request: "SaveRequest | JointRequest") -> Session:
    return Session(
        save=request.save,
        run=request.run,
        step=request.step,
        writer=request.writer,
        opened=request.created,
        beat=0,
    )


def look(request: SaveRequest) -> Generator[Operation, Any, "Manifest | Found"]:
    """The friendly check before step 1: whether this step is saved already."""
    rows: list[ObjectInfo] = yield List((run_prefix(request.run),))
    keyed = [(key, row) for row in rows if (key := ManifestKey.parse(row.key))]
    manifests = [(key, row) for key, row in keyed if may_be_committed(row)]
    found = Found()
    if manifests:
        found.newest = max(manifests, key=lambda pair: (pair[0].step, pair[1].modified))[0]
    # Of any size: a manifest that was cut off is to be replaced as well.
    of_step = [(key, row) for key, row in keyed if key.step == request.step]
    if not of_step:
        return found
    candidates = yield from read_candidates(of_step)
    refuse_foreign(candidates)
    standing = current(candidates)
    if standing is not None and standing.manifest is not None:
        # Only what was found corrupt: a chunk condemned as garbage may have come to be referenced, and is sound then.
        lists = yield from read_condemned()
        damaged = {key for each in lists if each and each.reason == "corrupt" for key in each.keys}
        sound = not any(chunk.key in damaged for chunk in standing.manifest.chunks)
        same = standing.manifest.content == request.content
        notes = [standing.manifest.metrics, standing.manifest.metadata] == [request.metrics, request.metadata]
        if sound and same and (notes or not request.replace):
            # Its writer may have been killed before it made the manifest durable.
            yield Sync((str(standing.key),))
            return standing.manifest
        if sound and not request.replace:
            raise ConflictError(
                f"step {request.step} of run {request.run!r} is saved already, with another state, by process "
                f"{standing.manifest.writer.pid} on {standing.manifest.writer.host} ({standing.manifest.created}). If "
                "that is another job, give this one a run of its own; else save under another step, or pass "
                "replace=True to put this state in its place."
            )
    # What is damaged, or cannot be read, is no checkpoint that a save could take anything from.
    found.replaces = [candidate.key.save_id for candidate in candidates]
    return found


def _assemble(request: SaveRequest, found: Found) -> Generator[Operation, Any, Manifest]:
    """Steps 2 to 4: a manifest, each of whose chunks is in the store and durable."""
    held = yield from hold(PartRequest(request.save, request.chunks, found.newest), request)
    return make_manifest(request, found.replaces, held)


def hold(part: PartRequest, whole: SaveRequest | None = None) -> Generator[Operation, Any, dict[str, Held]]:
    """Steps 2 to 4, after the session was opened by whoever did: every chunk of `part` in the store, and durable.

    whole: the save that `part` is all of, if its chunks may be stored as differences.
    """
    lists = yield from read_condemned()  # 2
    condemned = {key for each in lists if each for key in each.keys}
    held: dict[str, Held] = {}
    may_reuse = None not in lists  # a list that cannot be read may name any key
    newest: Manifest | None = None
    if may_reuse and part.newest is not None:  # 3: what stands in a manifest that is read now
        [content] = yield Get((str(part.newest),))
        candidate = read_candidate(part.newest, 0.0, content)
        newest = None if candidate is None else candidate.manifest
    if newest is not None:
        _reuse(part, held, held_chunks(newest), condemned)
    missing = [name for name in part.chunks if name not in held]
    listed: list[str] = []
    if may_reuse and missing:  # 3: what a listing shows now
        rows: list[ObjectInfo] = yield List(_prefixes(missing))
        seen = [
            Held(key.digest, key.save_id, part.chunks[key.digest], row.size)
            for row in rows
            if (key := ChunkKey.parse(row.key)) and key.digest in part.chunks
        ]
        _reuse(part, held, seen, condemned)
        listed = [held[name].key for name in missing if name in held]
        missing = [name for name in missing if name not in held]
    if missing:  # 4
        bases = {} if newest is None or whole is None else _bases(whole, missing, newest, condemned)
        uploaded: dict[str, Uploaded] = yield Upload(part.save, tuple(missing), bases)
        for name in missing:
            base = bases[name] if uploaded[name].is_delta else None
            held[name] = Held(name, part.save, part.chunks[name], uploaded[name].stored, base)
        # What turned out damaged on the way is not to be needed by any chunk of this checkpoint.
        damaged = {each.damaged for each in uploaded.values() if each.damaged}
        again = [name for name, chunk in held.items() if not _is_sound(chunk, damaged)]
        if again:
            uploaded = yield Upload(part.save, tuple(again))
            for name in again:
                held[name] = Held(name, part.save, part.chunks[name], uploaded[name].stored)
            missing += [name for name in again if name not in missing]
            listed = [key for key in listed if key not in damaged]
    # What was found in a listing may have been put by a save that has not made it durable yet. What stands in a
    # manifest is durable, and so is what it stands on.
    yield Sync((*listed, *(held[name].key for name in missing)))
    return held


def _reuse(part: PartRequest, held: dict[str, Held], seen: list[Held], condemned: set[str]) -> None:
    for chunk in seen:
        wanted = part.chunks.get(chunk.digest) == chunk.raw and chunk.stored <= chunk.raw + MAX_OVERHEAD_BYTES
        if wanted and chunk.digest not in held and _is_sound(chunk, condemned):
            held[chunk.digest] = chunk


def _is_sound(chunk: Held, condemned: set[str]) -> bool:
    """A delta is worth what all of its chain is worth."""
    return not any(link.key in condemned for link in chunk.chain)


def _bases(request: SaveRequest, missing: list[str], newest: Manifest, condemned: set[str]) -> dict[str, Held]:
    """What may be stored as a difference to what. A base is reused as much as a chunk is, by the same rules."""
    if not request.deltas:
        return {}
    names = list(request.chunks)
    wanted = set(missing)
    indices = [index for index, name in enumerate(names) if name in wanted]
    lengths = list(request.chunks.values())
    try:
        found = find_bases(indices, lengths, request.tree, request.segments, newest)
    except CorruptError:  # its tree makes no sense, which is no reason for a save to fail
        return {}
    return {names[index]: base for index, base in found.items() if _is_sound(base, condemned)}


def _prefixes(digests: list[str]) -> tuple[str, ...]:
    if len(digests) <= FEW_CHUNKS:
        return tuple(f"{CHUNKS}{name[:2]}/{name}" for name in digests)
    return tuple(sorted({f"{CHUNKS}{name[:2]}/" for name in digests}))


def make_manifest(request: SaveRequest, replaces: list[str], held: dict[str, Held]) -> Manifest:
    """The manifest of a save whose chunks are held."""
    chunks: list[ChunkRef] = table([held[name] for name in request.chunks])
    ours = family(request.save)
    return Manifest(
        format=format_naming((chunk.key for chunk in chunks), request.segments),
        run=request.run,
        step=request.step,
        save=request.save,
        created=request.created,
        writer=request.writer,
        replaces=replaces,
        metrics=request.metrics,
        metadata=request.metadata,
        content=request.content,
        raw_bytes=request.raw_bytes,
        stored_bytes=sum(chunk.stored for chunk in chunks),
        new_bytes=sum(chunk.stored for chunk in chunks if family(chunk.save) == ours),
        tree=request.tree,
        segments=request.segments,
        chunks=chunks,
    )


def commit(manifest: Manifest, replaced: Sequence[ManifestKey]) -> Generator[Operation, Any, None]:
    """Steps 5 and 6: create the manifest, bury what it replaces, close the session.

    Returns when the manifest is known to stand; a lost answer is told from a lost race by reading.
    """
    key, content = manifest.key, encode(manifest)
    try:
        if not (yield Create(str(key), content)):
            [found] = yield Get((str(key),))
        else:
            found = content
    except UnavailableError as error:
        found = yield from _look_after_lost_answer(key, error)
    if found != content:
        yield from close_quietly(manifest.save)
        raise FencedError(
            f"the save of step {key.step} of run {key.run!r} was taken for dead by a collection, because this process "
            f"did not show itself in time, and can no longer commit ({key}). Save again."
        )
    try:
        for each in replaced:
            yield from bury(each, manifest.created)
    except UnavailableError:
        pass  # the manifest stands, and what it replaces is not current even so
    yield from close_quietly(manifest.save)


def _look_after_lost_answer(key: ManifestKey, error: UnavailableError) -> Generator[Operation, Any, bytes]:
    """What stands where a manifest could not be created, or could, but the answer was lost."""
    try:
        [found] = yield Get((str(key),))
        if found is not None:
            yield Sync((str(key),))
    except UnavailableError:
        raise UnavailableError(
            f"whether step {key.step} of run {key.run!r} was saved is not known: {error} Once the store can be "
            "reached again, save the step again: that is safe either way."
        ) from error
    if found is None:
        raise UnavailableError(
            f"step {key.step} of run {key.run!r} was not saved, as far as can be seen now: {error} "
            "Save it again: that is safe either way."
        ) from error
    return found  # type: ignore[no-any-return]
