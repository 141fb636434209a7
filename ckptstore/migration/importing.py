"""The import itself: source by source in the order of the steps, each committed by itself, so that it can go on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ckptstore import saving
from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import CheckpointError, ConflictError, CorruptError, InvalidInputError, NotFoundError
from ckptstore.migration import identity, reading
from ckptstore.migration.identity import METADATA_KEY, Identity
from ckptstore.migration.planning import Planned, plan
from ckptstore.migration.report import ImportedCheckpoint, ImportReport
from ckptstore.pipeline import Progress
from ckptstore.portable import lightning_files
from ckptstore.skeleton import TAG
from ckptstore.store import Store
from ckptstore.tree import flatten

__all__ = ["import_checkpoints"]


def import_checkpoints(
    store: Store,
    run: str,
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    step_from: str | None = None,
    exclude: Sequence[str] = (),
    trust: bool = False,
    leave_out: Sequence[str] = (),
    replace: bool = False,
    stop_on_error: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Bring the checkpoints of another program into a run, in the order of their steps.

    Each is a commit of its own. Killed at any moment and called again, it goes on: what was imported is recognised by
    name, size and time, or by a digest of the source, which stand in the checkpoint's metadata under "import". A
    source that fails is reported, and the others are imported.

    Args:
        store: the store, which may be new.
        run: the run.
        source: a folder of checkpoints: files of `torch.save` or safetensors, folders of
            `torch.distributed.checkpoint`, of Hugging Face's `Trainer`, or of such files. Or one of these.
        step: take `source` for one checkpoint, and import it as this step.
        step_from: how the step is told: a regular expression with one group, searched in each name; or "content", for
            the step inside the files. None goes by the names, as `steps.step_names` says.
        exclude: patterns of names to leave alone, such as "best*".
        trust: let Python's unpickler read the files, which runs whatever code they bring along.
        leave_out: patterns of paths in the states to leave out, such as "args" or "callbacks.*"; for files of
            `torch.save` and folders of `torch.distributed.checkpoint`.
        replace: put a source in the place of another state that its step holds.
        stop_on_error: end with the first source that fails.
        dry_run: change nothing; say what would be imported, in which order.
        progress: called with the bytes of the sources that are done, and of all.

    Returns:
        What became of each source.

    Raises:
        NotFoundError: there is no `source`.
        InvalidInputError: there are no checkpoints in it; or which step one is, is not clear. Nothing was changed.
        UnavailableError: the store cannot be used. What was imported until then stays.
        CorruptError, UnsupportedFormatError: the store's marker is damaged, or of a newer ckptstore.
    """
    place = Path(source)
    planned = plan(place, run, step=step, step_from=step_from, exclude=exclude, trust=trust)
    report = ImportReport(str(source), run, dry_run, passed_over=planned.passed_over)
    importer = _Importer(store, run, trust, tuple(leave_out), replace)
    failures = [
        ImportedCheckpoint(unread.name, run, None, "failed", failure=error) for unread, error in planned.unreadable
    ]
    done_bytes = 0
    sizes = {each.source.name: importer.size(each) for each in planned.checkpoints}
    for each in planned.checkpoints if not (failures and stop_on_error) else ():
        size = sizes[each.source.name]
        report.checkpoints.append(
            importer.look(each, size)
            if dry_run
            else importer.bring(each, size, _part(progress, done_bytes, size, sum(sizes.values())))
        )
        done_bytes += size
        if progress:
            progress(done_bytes, sum(sizes.values()))
        if stop_on_error and report.failed:
            break
    report.checkpoints += failures
    return report


def _part(progress: Progress | None, before: int, size: int, total: int) -> Progress | None:
    """The progress of one save as that of the whole import: it counts other bytes, those that are new to the store."""
    if progress is None:
        return None
    return lambda done, of: progress(before + int(size * done / of) if of else before, total)


class _Importer:
    """What all sources of an import have in common."""

    def __init__(self, store: Store, run: str, trust: bool, leave_out: tuple[str, ...], replace: bool) -> None:
        self._store = store
        self._run = run
        self._trust = trust
        self._leave_out = leave_out
        self._replace = replace
        self._steps: dict[str, set[int]] = {}

    def size(self, planned: Planned) -> int:
        """The bytes of a source; 0 if it cannot even be looked at, which comes out in its turn."""
        try:
            return identity.look(planned.source).bytes
        except CheckpointError:
            return 0

    def look(self, planned: Planned, size: int) -> ImportedCheckpoint:
        """What would become of a source."""
        try:
            there = self._there(planned)
            if there is not None and self._is_same(planned, there, identity.look(planned.source)):
                return _row(planned, size, there, "there")
        except CheckpointError as error:
            return _failure(planned, size, error)
        return ImportedCheckpoint(planned.source.name, planned.run, planned.step, "planned", size)

    def bring(self, planned: Planned, size: int, progress: Progress | None) -> ImportedCheckpoint:
        """Import a source, unless it is there. What is wrong with it becomes a part of the report."""
        try:
            there = self._there(planned)
            before = identity.look(planned.source)
            if there is not None and self._is_same(planned, there, before):
                return _row(planned, size, there, "there")
            if there is not None and METADATA_KEY in there.metadata and not self._replace:
                raise ConflictError(
                    f"{planned.run}@{planned.step} was imported from {_source_of(there)!r} as it was then, and "
                    f"{planned.source.path} is another one now, or other parts of it were left out (--leave-out). It "
                    "is left as it is; give --replace (replace=True in Python) to put this one in its place."
                )
            identity.check_whole(planned.source)
            about = before.metadata(planned.source.kind, identity.digest_of(planned.source), self._leave_out)
            content = reading.read(planned.source, trust=self._trust, leave_out=self._leave_out)
        except CheckpointError as error:
            return _failure(planned, size, error)
        # A failure of the store, from here on, ends the import: it would be that of all the others as well.
        try:
            saved = self._save(planned, content, about, progress, lambda: _require_still(planned, before))
        except InvalidInputError as error:
            return _failure(planned, size, reading.explained_leaf(error, planned.source))
        except ConflictError as error:
            return _failure(planned, size, error)
        return _row(planned, size, saved, "there" if there == saved else "imported")

    def _there(self, planned: Planned) -> Checkpoint | None:
        """What the step holds already. Raises CorruptError."""
        run = self._store.run(planned.run)
        if planned.run not in self._steps:
            self._steps[planned.run] = set(run.steps())
        if planned.step not in self._steps[planned.run]:
            return None
        try:
            return run.checkpoint(planned.step)
        except NotFoundError:  # deleted meanwhile
            return None
        except CorruptError:
            if self._replace:
                return None
            raise

    def _is_same(self, planned: Planned, there: Checkpoint, now: Identity) -> bool:
        """Whether a checkpoint was made from this source as it is now."""
        about = there.metadata.get(METADATA_KEY)
        if isinstance(about, dict) and about.get("leave_out", []) != list(self._leave_out):
            return False
        if now.is_that_of(about):
            return True
        return (
            isinstance(about, dict)
            and about.get("bytes") == now.bytes
            and about.get("digest") == identity.digest_of(planned.source)
        )

    def _save(
        self,
        planned: Planned,
        content: reading.Content,
        about: dict[str, Any],
        progress: Progress | None,
        before_commit: Callable[[], None],
    ) -> Checkpoint:
        run = self._store.run(planned.run)
        if content.portable is not None:
            found = content.portable
            added, _ = flatten(about, tensors=False, root="metadata")
            if found.metadata is None or TAG not in found.metadata:  # else it is no plain object that keys fit into
                found.metadata = {**(found.metadata or {}), **added}
            return run._save_portable(
                found, planned.step, replace=self._replace, progress=progress, before_commit=before_commit
            )
        metadata = {**content.metadata, **about}
        if content.is_lightning:
            # Where CkptstoreIO looks for the checkpoints that it can go on from.
            path = os.path.normpath(planned.source.path.absolute())
            metadata |= lightning_files.metadata_of(content.state, self._run, path)
        with run._turn():
            snapshot = saving.take_apart(content.state, content.metrics, metadata)
            return Checkpoint(run._saved(planned.step, snapshot, self._replace, progress, before_commit=before_commit))


def _require_still(planned: Planned, before: Identity) -> None:
    """Raise ConflictError unless a source is as it was when it began to be read.

    Asked when all of it is uploaded and nothing committed: its tensors are read from the file while they are stored, so
    of one that changed meanwhile nobody knows which of its states they are.
    """
    try:
        is_still = identity.look(planned.source) == before
    except CheckpointError:  # it is gone
        is_still = False
    if not is_still:
        raise ConflictError(
            f"{planned.source.path} was written to while it was imported. Nothing was saved of it; import it again."
        )


def _source_of(there: Checkpoint) -> Any:
    about = there.metadata[METADATA_KEY]
    return about.get("source") if isinstance(about, dict) else about


def _failure(planned: Planned, size: int, error: CheckpointError) -> ImportedCheckpoint:
    return ImportedCheckpoint(planned.source.name, planned.run, planned.step, "failed", size, error)


def _row(planned: Planned, size: int, saved: Checkpoint, outcome: Any) -> ImportedCheckpoint:
    chunks = saved._manifest.chunks
    return ImportedCheckpoint(
        planned.source.name,
        planned.run,
        planned.step,
        outcome,
        size,
        raw_bytes=saved.raw_bytes,
        stored_bytes=saved.stored_bytes,
        new_bytes=saved.new_bytes,
        chunks=len(chunks),
        reused_chunks=sum(chunk.save != saved._manifest.save for chunk in chunks),
    )
