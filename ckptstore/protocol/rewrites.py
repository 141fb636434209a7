"""A checkpoint put in another form: what repairs and compactions have in common.

A rewrite is a save of what is there already. It opens a session, makes a manifest that holds the same state in other
chunks, and creates it under an id of its own, in the place of the old one. So what is safe for saves is safe for it.

A save of another state, with `replace=True`, may come between its last look and its commit. It looks once more after
the commit, and takes itself back if there is one. It never takes itself back because the old manifest is gone: that may
be a delete, or a collection that has buried what was replaced, and a deleted checkpoint that is back is better than one
that is lost.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from ckptstore.errors import ConflictError, CorruptError, FencedError, UnavailableError
from ckptstore.format import ManifestKey, run_prefix
from ckptstore.manifest import Manifest, Session, Writer, decode_manifest, encode
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import Candidate, current, read_candidates
from ckptstore.protocol.deletes import bury
from ckptstore.protocol.operations import List, Open, Operation
from ckptstore.protocol.saves import close_quietly, commit

T = TypeVar("T")


def rewrite(
    key: ManifestKey,
    save: str,
    created: str,
    writer: Writer,
    making: Generator[Operation, Any, tuple[Manifest | None, T]],
    what: str,
) -> Generator[Operation, Any, T]:
    """Put what `making` returns in the place of the manifest `key`, if it returns one; return its other result.

    Args:
        key: the checkpoint.
        save: a new id, that of the new manifest.
        created: now.
        writer: who we are.
        making: looks at the store, uploads what it has to; begins after the session is open.
        what: "repair" or "compaction", for messages.

    Raises:
        ConflictError: the checkpoint is there no more, counts no more, or was saved again.
        FencedError: a collector took this for dead; nothing was changed.
        UnavailableError: a request failed. If it was the commit's, its outcome is unknown and the session stands.
        What `making` raises; nothing was changed then.
    """
    try:
        yield Open(Session(save=save, run=key.run, step=key.step, writer=writer, opened=created, beat=0))
        manifest, result = yield from making
        before = yield from _of_step(key)
        _require_current(key, before, what)  # what was deleted or saved again meanwhile must not come back
    except (Exception, KeyboardInterrupt):
        yield from close_quietly(save)
        raise
    if manifest is None:
        yield from close_quietly(save)
        return result
    try:
        decode_manifest(encode(manifest), manifest.key)
    except CorruptError as error:  # the old one is read, and a new one that nobody could read must not take its place
        yield from close_quietly(save)
        raise ConflictError(f"no {what} of step {key.step} of run {key.run!r} can be written: {error}") from error
    yield from _commit(manifest, what)
    yield from _settle(key, manifest, before, what)
    return result


def in_place_of(old: Manifest) -> list[str]:
    """What a rewrite replaces: what the old one has replaced must not count again when the old one is gone."""
    return [*old.replaces, old.save]


def changed(key: ManifestKey, what: str) -> ConflictError:
    """What to raise if the checkpoint is not any more what it was."""
    return ConflictError(
        f"step {key.step} of run {key.run!r} was deleted, saved again or damaged meanwhile ({key}), so there is no "
        f"{what} of it."
    )


def _of_step(key: ManifestKey) -> Generator[Operation, Any, list[Candidate]]:
    rows: list[ObjectInfo] = yield List((f"{run_prefix(key.run)}{key.step:020d}.",))
    return (yield from read_candidates([(found, row) for row in rows if (found := ManifestKey.parse(row.key))]))


def _require_current(key: ManifestKey, candidates: Sequence[Candidate], what: str) -> None:
    standing = current(candidates)
    if standing is None or standing.key != key:
        raise changed(key, what)


def _commit(manifest: Manifest, what: str) -> Generator[Operation, Any, None]:
    """As for a save; but what to do after a failure is another thing."""
    step = f"step {manifest.step} of run {manifest.run!r}"
    try:
        yield from commit(manifest, [])
    except FencedError as error:
        raise FencedError(
            f"the {what} of {step} was taken for dead by a collection, because this process did not show itself in "
            "time. Nothing was changed. Do it again."
        ) from error
    except UnavailableError as error:
        raise UnavailableError(
            f"whether the {what} of {step} was committed is not known: {error.__cause__ or error} Once the store can "
            "be reached again, do it again: that is safe either way."
        ) from error


def _settle(
    key: ManifestKey, manifest: Manifest, before: Sequence[Candidate], what: str
) -> Generator[Operation, Any, None]:
    """Look again after the commit; bury what it replaces, or, if the step was saved again just before it, this one."""
    try:
        after = yield from _of_step(key)
        known = {manifest.save, *(found.key.save_id for found in before)}
        others = [found.manifest for found in after if found.manifest and found.key.save_id not in known]
        if any(not _same(other, manifest) for other in others):
            yield from bury(manifest.key, manifest.created)
        elif any(other.save > manifest.save for other in others):
            # Another rewrite of the same checkpoint. One of the two goes, and both know which.
            yield from bury(manifest.key, manifest.created)
            return
        else:
            for found in before:
                if found.key.save_id in manifest.replaces:
                    yield from bury(found.key, manifest.created)
            return
    except UnavailableError:
        return  # the new manifest stands, and what it replaces is not current even so
    raise changed(key, what)


def _same(one: Manifest, other: Manifest) -> bool:
    return (one.content, one.metrics, one.metadata) == (other.content, other.metrics, other.metadata)
