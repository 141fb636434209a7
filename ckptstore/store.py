"""What people touch: `Store` and `Run`. Rooms that need torch are imported when a state is first saved or restored."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from ckptstore import catalog, protocol, verifying
from ckptstore import usage as usages
from ckptstore.background import PendingSave
from ckptstore.checkpoint import Checkpoint
from ckptstore.chunk import Codec
from ckptstore.errors import InvalidInputError
from ckptstore.format import check_run_name, check_step
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.performing import Performer
from ckptstore.pipeline import Progress
from ckptstore.usage import Usage
from ckptstore.verifying import VerifyReport
from ckptstore.writer import now_text

if TYPE_CHECKING:
    import torch

__all__ = ["Run", "Store"]


class Store:
    """A place where checkpoints are kept: a folder, a bucket, or memory; many jobs may use one at the same time.

    Making a `Store` touches nothing: the first save makes the store at its place.

    Args:
        url: a path, `s3://bucket/prefix`, `memory://name`, or any other URL that fsspec knows and whose backend has an
            exclusive create. Or a backend of your own, a `ckptstore.objects.base.Objects`.
        storage_options: what fsspec's file system for the URL takes, such as `{"profile": "team"}` or
            `{"endpoint_url": "http://localhost:9000"}` for S3. Never written anywhere.
        codec: how saves write chunks; every reader reads all of them, and equal chunks are found whatever they were
            written with. "fast": compressed where that pays. "none": as they are, for a disk that is faster than the
            processor. "small": as "fast", and where that is clearly smaller as the difference to the run's newest
            checkpoint, which a save then reads, and a restore too.

    Raises:
        InvalidInputError: the URL is not one that a store can be at, or there is no such codec.
    """

    def __init__(
        self,
        url: "str | os.PathLike[str] | Objects",
        storage_options: Mapping[str, Any] | None = None,
        *,
        codec: Codec = "fast",
    ) -> None:
        if codec not in get_args(Codec):
            raise InvalidInputError(f"codec must be one of {', '.join(map(repr, get_args(Codec)))}, not {codec!r}.")
        self._codec: Codec = codec
        self._objects = url if isinstance(url, Objects) else open_objects(url, storage_options)
        self._pending: dict[str, PendingSave] = {}
        self._turns: dict[str, threading.RLock] = {}

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        return self._objects.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def run(self, name: str) -> "Run":
        """The run of that name, which need not exist yet.

        Args:
            name: 1 to 128 letters, digits and `. _ + = , -`, a letter, digit or `_` first.

        Raises:
            InvalidInputError: it cannot be a name.
        """
        return Run(self, check_run_name(name))

    def runs(self) -> list[str]:
        """The names of the runs that have a checkpoint, sorted; empty where there is no store.

        Raises:
            UnavailableError: the place cannot be reached or read.
        """
        found = catalog.list_runs(self._objects)
        return [name for name, rows in found.items() if rows.committed_steps()]

    def verify(self, run: str | None = None, *, progress: Progress | None = None) -> VerifyReport:
        """Read every byte of the store (or of one run) again and compare it with what was saved.

        Chunks found damaged are marked, so that no save takes them up again: the next save of the same content
        uploads a good copy. On a read-only store that is left out, and the report says so.

        Args:
            run: verify only this run.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Raises:
            NotFoundError: there is no store, or no such run.
            UnavailableError: the backend failed, so nothing is known.
            UnsupportedFormatError: an object was written by a newer ckptstore.
        """
        if run is None:
            catalog.require_store(self._objects, warn=False)  # the report says it
        elif not catalog.list_run(self._objects, check_run_name(run)).by_step:
            catalog.manifest_of(self._objects, run, 0)  # raises what fits: no store, or no such run
        return verifying.verify(self._objects, run, progress)

    def usage(self) -> Usage:
        """What the store costs: logical, stored and shared bytes, run by run.

        Raises:
            NotFoundError: there is no store.
            CorruptError: a manifest is damaged, so the sums would be wrong.
        """
        return usages.usage(self._objects)


class Run:
    """The checkpoints of one training, by step. Made by `Store.run`."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._objects = store._objects
        self._codec = store._codec
        self.name = name

    def __repr__(self) -> str:
        return f"{self._store!r}.run({self.name!r})"

    def save(
        self,
        state: Any,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Checkpoint:
        """Save a state; when this returns, it is durable and stays.

        Only chunks that the store does not hold yet are uploaded. A process that is killed in here leaves the store
        as it was. Saving the same state as the same step again returns the checkpoint that is there.

        Args:
            state: a tree of dicts, lists, tensors, numbers and so on (docs/reference/api.md lists them), and of objects
                with `state_dict()` and `load_state_dict()`: modules, optimizers, schedulers, `RngState`.
            step: a whole number from 0 to 2**63-1.
            metrics: small values to show beside the step, such as `{"loss": 2.5}`. Where the step holds the same state
                already, its own metrics and metadata stay, unless `replace` is given.
            metadata: small values of your own, such as the configuration.
            replace: put this state in the place of another one that was saved as the same step.

        Returns:
            The checkpoint.

        Raises:
            InvalidInputError: something in `state` cannot be saved, or `step` is no step; nothing was changed.
            ConflictError: the step holds another state; nothing was changed.
            UnavailableError: the backend failed after its own retries; no checkpoint was made, or the text says that
                this is not known.
            CorruptError, UnsupportedFormatError: the store's marker is damaged, or of a newer ckptstore.
            CheckpointError: an earlier `save_async` of this run failed, and nobody had asked for its result.
        """
        from ckptstore import saving

        number = check_step(step)
        with self._turn():
            snapshot = saving.take_apart(state, metrics, metadata)
            return Checkpoint(
                saving.save(self._objects, self.name, number, snapshot, replace=replace, codec=self._codec)
            )

    def save_async(
        self,
        state: Any,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> PendingSave:
        """Copy a state to host memory and return; a thread saves the copy while the training goes on.

        One save of a run is under way at a time: the next one waits for it. Arguments as for `save`.

        Returns:
            The pending save: `result()` waits and gives the checkpoint, or raises what failed.

        Raises:
            InvalidInputError: something in `state` cannot be saved, or `step` is no step.
            CheckpointError: the save before this one failed, and nobody had asked for its result.
        """
        from ckptstore import saving, segments
        from ckptstore.pipeline import worker_threads

        number = check_step(step)
        objects, name, codec = self._objects, self.name, self._codec

        def work(copied: saving.Snapshot) -> Checkpoint:
            return Checkpoint(saving.save(objects, name, number, copied, replace=replace, codec=codec))

        with self._turn():
            snapshot = saving.take_apart(state, metrics, metadata)
            segments.detach(snapshot.sources, threads=worker_threads())
            pending = self._store._pending[name] = PendingSave(name, number, work, snapshot)
        return pending

    def restore(
        self, destination: Any, *, step: int | None = None, strict: bool = True, progress: Progress | None = None
    ) -> Checkpoint | None:
        """Put the newest checkpoint that verifies into `destination`, in place.

        Every byte is compared with its digest. A checkpoint that is damaged is reported by a `CheckpointWarning`, and
        the one before it is taken. What is not a tensor or an object with `load_state_dict()` cannot be filled in
        place: take it from the result, `checkpoint.state["step"]`.

        Args:
            destination: the tree to fill, of the shape that was saved, or a part of it: `{"model": model}`.
            step: restore this step, and raise if it is damaged.
            strict: False leaves out keys of modules that differ, and lists them in the result.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The checkpoint that was restored; None if the run has none, or there is no store yet: a first start.

        Raises:
            InvalidInputError: the checkpoint does not fit the destination: one text lists all that differs. Nothing
                was changed, unless the text says so.
            CorruptError: no checkpoint verifies. The text says whether the destination was changed.
            NotFoundError: there is no checkpoint at `step`.
            UnavailableError: the store cannot be reached or read; never taken for a first start.
        """
        from ckptstore import restoring

        number = None if step is None else check_step(step)
        self._wait()
        found = restoring.restore(self._objects, self.name, destination, step=number, strict=strict, progress=progress)
        if found is None:
            return None
        return Checkpoint(found.manifest, missing=found.missing, unexpected=found.unexpected)

    def load(
        self,
        step: int | None = None,
        *,
        only: str | None = None,
        device: "torch.device | str" = "cpu",
        progress: Progress | None = None,
    ) -> Any:
        """The tree as it was saved, every byte of it verified.

        Args:
            step: which checkpoint; None is the newest.
            only: the path of a part of the tree, such as "model" or "optimizer.param_groups[0]"; only that part's
                bytes are read.
            device: where tensors are put.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The tree, or the part of it; modules and optimizers as their state dicts.

        Raises:
            NotFoundError: there is no such store, run, step or part.
            CorruptError: it is damaged; the text names the tensors.
            InvalidInputError: a type in it was registered when it was saved and is not now.
            UnavailableError: the backend failed.
        """
        from ckptstore import restoring

        self._wait()
        return restoring.load(self._objects, self._manifest(step), only=only, device=device, progress=progress)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Write a checkpoint to a file that other programs read; every byte of it is verified on the way.

        The ending of its name chooses the format. `.safetensors`: each tensor by its path, and the rest of the tree,
        the metrics and the metadata as JSON in the file's metadata, so that `import_file` gives back all of it.
        `.pt` (`.pth`, `.ckpt`, `.bin`): `torch.save` of the tree, with values of registered types as plain trees.
        The file appears whole or not at all.

        Args:
            path: the file.
            step: which checkpoint; None is the newest.
            overwrite: put the new file in the place of one that is there.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The checkpoint that was exported.

        Raises:
            InvalidInputError: the format cannot hold a tensor, which is named; or `path` has another ending; or the
                package safetensors is not installed. No file was written.
            ConflictError: there is such a file, and `overwrite` is False.
            NotFoundError: there is no such store, run, step or folder.
            CorruptError: the checkpoint is damaged; the text names the tensors.
            UnavailableError: the backend or the disk failed.
        """
        from ckptstore import portable

        self._wait()
        manifest = self._manifest(step)
        portable.export_file(self._objects, manifest, path, overwrite=overwrite, progress=progress)
        return Checkpoint(manifest)

    def import_file(
        self,
        path: str | os.PathLike[str],
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> Checkpoint:
        """Save the content of a file as a checkpoint. No code that the file brings along runs.

        Args:
            path: a `.safetensors` file: what `export` put in comes out; one of another program becomes a flat dict of
                tensors. Or a `.pt` (`.pth`, `.ckpt`, `.bin`) file of `torch.save`, read with `weights_only=True`.
            step: the step to save it as.
            metrics: as for `save`; None takes those that an exported file brings along.
            metadata: likewise.
            replace: as for `save`.

        Returns:
            The checkpoint.

        Raises:
            NotFoundError: there is no such file.
            InvalidInputError: it is no such file, or it holds what only running code could make, or what a checkpoint
                cannot hold; nothing was changed.
            ConflictError: the step holds another state; nothing was changed.
            UnavailableError: the file cannot be read, or the backend failed.
            CheckpointError: an earlier `save_async` of this run failed, and nobody had asked for its result.
        """
        from ckptstore import portable, saving, segments

        number = check_step(step)
        with self._turn():
            given = saving.take_apart(None, metrics, metadata)
            found = portable.read_file(path)
            snapshot = saving.Snapshot(
                found.tree,
                segments.find(found.leaves),
                metrics=found.metrics if metrics is None and found.metrics is not None else given.metrics,
                metadata=found.metadata if metadata is None and found.metadata is not None else given.metadata,
            )
            return Checkpoint(
                saving.save(self._objects, self.name, number, snapshot, replace=replace, codec=self._codec)
            )

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order, from one listing; empty if there is none.

        Raises:
            UnavailableError: the store cannot be reached or read.
        """
        return catalog.list_run(self._objects, self.name).committed_steps()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest can be read; None if the run has none. Its tensors are not verified.

        Raises:
            CorruptError: there are manifests, and none can be read.
            UnavailableError: the store cannot be reached or read.
        """
        if not catalog.exists(self._objects):
            return None
        manifest = catalog.newest(self._objects, self.name)
        return None if manifest is None else Checkpoint(manifest)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """What is known of a checkpoint (None: the newest) without reading its tensors.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError: its manifest is damaged.
            UnavailableError: the store cannot be reached or read.
        """
        return Checkpoint(self._manifest(step))

    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint of the run, by step. Reads one manifest each.

        Raises:
            CorruptError: a manifest is damaged.
            UnavailableError: the store cannot be reached or read.
        """
        return [Checkpoint(manifest) for manifest in usages.read_all(self._objects, self.name).get(self.name, [])]

    def delete(self, step: int) -> None:
        """Delete a checkpoint. The bytes that no other needs go with the next collection.

        Raises:
            NotFoundError: there is no checkpoint at `step`.
            UnavailableError: the backend failed.
        """
        number = check_step(step)
        self._wait()
        catalog.require_store(self._objects)
        Performer(self._objects).perform(protocol.delete(self.name, number, now_text()))

    def _manifest(self, step: int | None) -> Manifest:
        if step is not None:
            return catalog.manifest_of(self._objects, self.name, check_step(step))
        catalog.require_store(self._objects)
        return catalog.newest_or_raise(self._objects, self.name)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no save of this run is under way, and keep other threads from beginning one.

        Raises the error of a save in the background, if nobody was told of it.
        """
        with self._store._turns.setdefault(self.name, threading.RLock()):
            pending = self._store._pending.get(self.name)
            if pending is not None:
                # It stays known while it is waited for: an interrupt must not make the run forget it.
                pending._settle()
            yield

    def _wait(self) -> None:
        pending = self._store._pending.get(self.name)
        if pending is not None:
            pending._wait()
