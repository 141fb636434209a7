"""Checkpoints taken away: a tombstone in the place of each manifest."""

from collections.abc import Generator, Iterable
from typing import Any

from ckptstore.errors import NotFoundError
from ckptstore.format import ManifestKey, run_prefix
from ckptstore.manifest import Ended, encode
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol.candidates import current, read_candidates, refuse_foreign
from ckptstore.protocol.operations import List, Operation, Put, Sync


def bury(key: ManifestKey, created: str) -> Generator[Operation, Any, None]:
    """Put a tombstone in a manifest's place."""
    tombstone = Ended(state="deleted", run=key.run, step=key.step, save=key.save_id, created=created)
    yield Put(str(key), encode(tombstone))
    yield Sync((str(key),))


def bury_all(keys: Iterable[ManifestKey], created: str) -> Generator[Operation, Any, None]:
    """Delete the manifests of a step that were found before, in this order, the current one last."""
    for key in keys:
        yield from bury(key, created)


def delete(run: str, step: int, created: str) -> Generator[Operation, Any, None]:
    """Delete a step: every manifest of it, the current one last, so that none comes back if this is cut short.

    Raises:
        NotFoundError: the step holds no checkpoint.
        ConflictError: another run's manifest lies there.
    """
    rows: list[ObjectInfo] = yield List((run_prefix(run),))
    # Of any size: a manifest that was cut off is to go as well.
    of_step = [(key, row) for row in rows if (key := ManifestKey.parse(row.key)) and key.step == step]
    candidates = yield from read_candidates(of_step)
    if not candidates:
        raise NotFoundError(f"run {run!r} has no checkpoint at step {step}, so there is nothing to delete.")
    refuse_foreign(candidates)
    last = current(candidates)
    yield from bury_all([found.key for found in sorted(candidates, key=lambda found: found is last)], created)
