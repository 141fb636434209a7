"""What people touch most: `Run`. Rooms that need torch or NumPy are imported when they are first needed."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ckptstore import catalog, protocol
from ckptstore import usage as usages
from ckptstore.background import PendingSave
from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import InvalidInputError
from ckptstore.format import MAX_DELTA_DEPTH, Codec, check_digest, check_step
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.pipeline import Progress, background_threads, give_way, worker_threads
from ckptstore.writer import now_text

if TYPE_CHECKING:
    import pandas
    import torch
    from torch.distributed import ProcessGroup

    from ckptstore import compacting, saving, segments
    from ckptstore.portable.content import Portable

__all__ = ["Run", "Shared"]


@dataclass(slots=True)
class Shared:
    """What all `Run` objects of one run and one `Store` share."""

    turn: threading.RLock = field(default_factory=threading.RLock)
    """Held by whoever saves."""
    pending: PendingSave | None = None
    """The last save in the background."""
    room: "segments.Room | None" = None
    """Where the copies of its states go, while nobody uses it."""


class Run:
    """The checkpoints of one training, by step. Made by `Store.run`."""

    def __init__(self, objects: Objects, name: str, shared: Shared, *, codec: Codec, threads: int | None) -> None:
        self.name = name
        self._objects = objects
        self._shared = shared
        self._codec: Codec = codec
        self._threads = threads or worker_threads()
        self._background_threads = threads or background_threads()

    def __repr__(self) -> str:
        return f"Store({self._objects.url!r}).run({self.name!r})"

    def _repr_html_(self) -> str:
        """For notebooks: the checkpoints. Reads a manifest for each that is shown."""
        from ckptstore import notebook

        return notebook.run_html(self._objects, self.name)

    def save(
        self,
        state: Any,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        progress: Progress | None = None,
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
            progress: called with the bytes uploaded so far and those to be uploaded in all, counted before they are
                compressed, from any thread, one at a time. Not called if nothing is new.

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
            return Checkpoint(self._saved(number, snapshot, replace, progress))

    def save_async(
        self,
        state: Any,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        replace: bool = False,
        progress: Progress | None = None,
        if_busy: Literal["wait", "skip"] = "wait",
        overlap: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None" = None,
    ) -> PendingSave:
        """Copy a state to host memory and return; a thread saves the copy while the training goes on.

        One save of a run is under way at a time. The memory of the copy is used again for the next one, and kept as
        long as the `Store` is.

        With `overlap`, what the optimizers hold is copied after this has returned, beside the next forward and backward
        pass; their next `step()` waits for the end of that copy. All else is copied before this returns, and so is what
        is not in host memory.

        Args:
            state: as for `save`.
            step: as for `save`.
            metrics: as for `save`.
            metadata: as for `save`.
            replace: as for `save`.
            progress: as for `save`.
            if_busy: what to do if the save before this one is still under way: "wait" for it, or "skip" this one.
            overlap: the optimizers whose `step()` alone changes their parameters and state. If something else is seen
                to do so before their next step, the save fails with an InvalidInputError, and nothing is committed.
                What PyTorch does not count is not seen: writes through `.data` or NumPy, by collectives such as
                `all_reduce`, by fused steps of other optimizers, by other processes, and replays of CUDA graphs.

        Returns:
            The pending save: `result()` waits and gives the checkpoint, or raises what failed. If this one was skipped,
            the one that is under way, as its `step` says.

        Raises:
            InvalidInputError: something in `state` cannot be saved, or an argument makes no sense.
            CheckpointError: the save before this one failed, and nobody had asked for its result.
        """
        from ckptstore import saving, segments
        from ckptstore.overlapping import Overlap

        if if_busy not in ("wait", "skip"):
            raise InvalidInputError(f"if_busy must be 'wait' or 'skip', not {if_busy!r}.")
        number = check_step(step)
        earlier = self._shared.pending
        if if_busy == "skip" and earlier is not None and earlier._is_under_way():
            return earlier
        during = Overlap(() if overlap is None else overlap)

        with self._turn():
            snapshot = saving.take_apart(state, metrics, metadata)
            # Taken, and given back by who uses it: an interrupt may make this thread forget a save that goes on.
            room, self._shared.room = self._shared.room or segments.Room(), None
            left = room.detach(snapshot.sources, threads=self._threads, later=during.covers)

            def work(given: tuple[saving.Snapshot, list[segments.Move]]) -> Checkpoint:
                copied, left = given
                try:
                    during.copy(left, threads=self._background_threads)
                    self._objects.connect()  # before it gives way, as its threads serve all others too
                    give_way()
                    threads, last_look = self._background_threads, during.require_unchanged
                    return Checkpoint(self._saved(number, copied, replace, progress, threads, last_look))
                finally:
                    during.end()
                    self._shared.room = room

            try:
                during.begin()
                pending = self._shared.pending = PendingSave(self.name, number, work, (snapshot, left))
            except BaseException:  # no thread could be started, or an interrupt: nobody must wait for what never comes
                during.give_up()
                raise
        return pending

    def _saved(
        self,
        step: int,
        snapshot: "saving.Snapshot",
        replace: bool,
        progress: Progress | None = None,
        threads: int | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> Manifest:
        from ckptstore import saving

        return saving.save(
            self._objects,
            self.name,
            step,
            snapshot,
            replace=replace,
            codec=self._codec,
            threads=threads or self._threads,
            progress=progress,
            before_commit=before_commit,
        )

    def restore(
        self,
        destination: Any,
        *,
        step: int | None = None,
        strict: bool = True,
        expect: str | None = None,
        group: "ProcessGroup | None" = None,
        progress: Progress | None = None,
    ) -> Checkpoint | None:
        """Put the newest checkpoint that verifies into `destination`, in place.

        Every byte is compared with its digest. A checkpoint that is damaged is reported by a `CheckpointWarning`, and
        the one before it is taken. What is not a tensor or an object with `load_state_dict()` cannot be filled in
        place: take it from the result, `checkpoint.state["step"]`.

        Args:
            destination: the tree to fill, of the shape that was saved, or a part of it: `{"model": model}`.
            step: restore this step, and raise if it is damaged.
            strict: False leaves out keys of modules that differ, and lists them in the result.
            expect: the `digest` of the checkpoint that it has to be. Then no other one is ever taken: not an older one
                if it is damaged, and no first start if it is gone.
            group: processes that restore the same together, such as `torch.distributed.group.WORLD`. Each byte is read
                from the store by one of them, and given to the others, each of which verifies it. All of them call
                this, get the same checkpoint, or raise.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The checkpoint that was restored; None if the run has none, or there is no store yet: a first start.

        Raises:
            InvalidInputError: the checkpoint does not fit the destination: one text lists all that differs. Nothing
                was changed, unless the text says so. Or `expect` is no digest.
            CorruptError: no checkpoint verifies, or it is not the one that is expected. The text says whether the
                destination was changed.
            NotFoundError: there is no checkpoint at `step`; or, with `expect`, none at all.
            UnavailableError: the store cannot be reached or read; never taken for a first start.
        """
        from ckptstore import restoring
        from ckptstore.peers import peers_of

        number = None if step is None else check_step(step)
        expected = None if expect is None else check_digest(expect)
        self._wait()
        found = restoring.restore(
            self._objects,
            self.name,
            destination,
            step=number,
            expect=expected,
            strict=strict,
            threads=self._threads,
            progress=progress,
            peers=peers_of(group),
        )
        if found is None:
            return None
        return Checkpoint(found.manifest, missing=found.missing, unexpected=found.unexpected)

    def load(
        self,
        step: int | None = None,
        *,
        only: str | None = None,
        device: "torch.device | str" = "cpu",
        expect: str | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The tree as it was saved, every byte of it verified.

        Args:
            step: which checkpoint; None is the newest.
            only: the path of a part of the tree, such as "model" or "optimizer.param_groups[0]"; only that part's
                bytes are read.
            device: where tensors are put.
            expect: the `digest` of the checkpoint that it has to be.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The tree, or the part of it; modules and optimizers as their state dicts.

        Raises:
            NotFoundError: there is no such store, run, step or part.
            CorruptError: it is damaged; the text names the tensors. Or it is not the one that is expected.
            InvalidInputError: a type in it was registered when it was saved and is not now. Or `expect` is no digest.
            UnavailableError: the backend failed.
        """
        from ckptstore import restoring

        expected = None if expect is None else check_digest(expect)
        self._wait()
        manifest = catalog.require_digest(self._manifest(step), expected)
        return restoring.load(
            self._objects, manifest, only=only, device=device, threads=self._threads, progress=progress
        )

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        expect: str | None = None,
        overwrite: bool = False,
        format: Literal["file", "dcp", "folder"] = "file",
        progress: Progress | None = None,
    ) -> Checkpoint:
        """Write a checkpoint to a file or folder that other programs read; every byte of it is verified on the way.

        The ending of its name chooses the format. `.safetensors`: each tensor by its path, and the rest of the tree,
        the metrics and the metadata as JSON in the file's metadata, so that `import_file` gives back all of it.
        `.pt` (`.pth`, `.ckpt`, `.bin`): `torch.save` of the tree, with values of registered types as plain trees.
        File and folder appear whole or not at all.

        Args:
            path: the file, or the folder.
            step: which checkpoint; None is the newest.
            expect: the `digest` of the checkpoint that it has to be.
            overwrite: put the new file in the place of one that is there. A folder gives way if there is nothing in it
                but a checkpoint of this format.
            format: "dcp" writes a folder of torch.distributed.checkpoint. "folder" writes the folder that was saved
                file by file, as those of Hugging Face's Trainer are.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            The checkpoint that was exported.

        Raises:
            InvalidInputError: the format cannot hold a tensor, which is named, or this state; or `path` has another
                ending; or the package safetensors is not installed; or `expect` is no digest. Nothing was written.
            ConflictError: there is such a file or folder, and `overwrite` is False.
            NotFoundError: there is no such store, run, step or folder.
            CorruptError: the checkpoint is damaged, the text names the tensors; or it is not the one that is expected.
            UnavailableError: the backend or the disk failed.
        """
        from ckptstore import portable

        if format not in ("file", "dcp", "folder"):
            raise InvalidInputError(f"format must be 'file', 'dcp' or 'folder', not {format!r:.40}.")
        expected = None if expect is None else check_digest(expect)
        self._wait()
        manifest = catalog.require_digest(self._manifest(step), expected)
        if format == "file":
            portable.export_file(
                self._objects, manifest, path, threads=self._threads, overwrite=overwrite, progress=progress
            )
        else:
            portable.export_folder(
                self._objects, manifest, path, format, threads=self._threads, overwrite=overwrite, progress=progress
            )
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
        from ckptstore import portable, saving

        number = check_step(step)
        with self._turn():
            given = saving.take_apart(None, metrics, metadata)
            found = portable.read_file(path)
            if metrics is not None or found.metrics is None:
                found.metrics = given.metrics
            if metadata is not None or found.metadata is None:
                found.metadata = given.metadata
            return self._save_portable(found, number, replace=replace)

    def _save_portable(
        self,
        found: "Portable",
        step: int,
        *,
        replace: bool,
        progress: Progress | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> Checkpoint:
        """Save what was read from a file, with its metrics and metadata."""
        from ckptstore import saving, segments

        with self._turn():
            snapshot = saving.Snapshot(
                found.tree, segments.find(found.leaves), metrics=found.metrics or {}, metadata=found.metadata or {}
            )
            return Checkpoint(self._saved(step, snapshot, replace, progress, before_commit=before_commit))

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
        return [Checkpoint(manifest) for manifest in usages.manifests(self._objects, self.name)]

    def to_dataframe(self) -> "pandas.DataFrame":
        """The checkpoints as a table of pandas, by step: `created`, each metric, `raw_bytes`, `stored_bytes` and
        `new_bytes`; metrics that are called like one of these as "metrics.NAME". Reads one manifest each.

        Raises:
            InvalidInputError: pandas is not installed.
            CorruptError: a manifest is damaged.
            UnavailableError: the store cannot be reached or read.
        """
        from ckptstore import tabulating

        return tabulating.dataframe(self.checkpoints())

    def tag(self, step: int, name: str) -> None:
        """Give a checkpoint a tag: no prune that begins after this has returned deletes it.

        Args:
            step: the step of the checkpoint.
            name: 1 to 128 letters, digits and `. _ + = , -`, such as "best".

        Raises:
            InvalidInputError: it cannot be a tag.
            NotFoundError: there is no checkpoint at `step`.
            UnavailableError: the backend failed.
        """
        from ckptstore import tagging

        self._wait()
        tagging.add(self._objects, self.name, check_step(step), name)

    def untag(self, step: int, name: str) -> None:
        """Take a tag away; that the step does not have it is fine.

        Raises:
            InvalidInputError: it cannot be a tag.
            UnavailableError: the backend failed.
        """
        from ckptstore import tagging

        tagging.remove(self._objects, self.name, check_step(step), name)

    def tags(self) -> dict[int, tuple[str, ...]]:
        """The tags of each step that has some.

        Raises:
            UnavailableError: the store cannot be reached or read.
        """
        from ckptstore import tagging

        steps = set(self.steps())
        return {step: tags for step, tags in tagging.listed(self._objects, self.name).items() if step in steps}

    def compact(
        self, *, keep_fast: int = 3, depth: int = 4, progress: Progress | None = None
    ) -> "compacting.CompactReport":
        """Store older checkpoints in fewer bytes: as differences, each to the next newer one of the run.

        They stay what they are, and take longer to restore: up to `depth` + 1 objects are read and decoded a chunk. A
        chunk that newer checkpoints of the run or other runs stand on stays as it is.
        Each is committed by itself, so this may be stopped at any moment, and goes on where it was. What it has won
        becomes free with the next `Store.collect`.

        Args:
            keep_fast: so many of the newest checkpoints are left as they are; at least 1.
            depth: how many differences may stand one on another, from 1 to 64.
            progress: called with the bytes in memory of the checkpoints done so far, and of those to be done.

        Returns:
            What was stored anew, and what it has won.

        Raises:
            InvalidInputError: an argument makes no sense.
            NotFoundError: there is no store, or no such run.
            CorruptError: a chunk or a manifest is damaged; what was done until then stays.
            FencedError: a collection took this for a save that is dead; compact again.
            UnavailableError: the backend failed; likewise.
        """
        from ckptstore import compacting

        if type(keep_fast) is not int or keep_fast < 1:
            raise InvalidInputError(f"keep_fast must be a whole number from 1 on, not {keep_fast!r}.")
        if type(depth) is not int or not 1 <= depth <= MAX_DELTA_DEPTH:
            raise InvalidInputError(f"depth must be a whole number from 1 to {MAX_DELTA_DEPTH}, not {depth!r}.")
        self._wait()
        catalog.require_store(self._objects)
        return compacting.compact(
            self._objects,
            self.name,
            keep_fast=keep_fast,
            depth=depth,
            codec="fast" if self._codec == "none" else self._codec,
            threads=self._threads,
            progress=progress,
        )

    def delete(self, step: int) -> None:
        """Delete a checkpoint and its tags. The bytes that no other needs go with the next collection.

        Raises:
            NotFoundError: there is no checkpoint at `step`.
            UnavailableError: the backend failed.
        """
        from ckptstore import tagging
        from ckptstore.performing import Performer

        number = check_step(step)
        self._wait()
        catalog.require_store(self._objects)
        tags = tagging.listed(self._objects, self.name).get(number, ())
        Performer(self._objects).perform(protocol.delete(self.name, number, now_text()))
        if number not in self.steps():  # else it was saved again meanwhile, and tagged, maybe
            for tag in tags:
                tagging.remove(self._objects, self.name, number, tag)

    def _manifest(self, step: int | None) -> Manifest:
        return catalog.pick(self._objects, self.name, None if step is None else check_step(step))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no save of this run is under way, and keep other threads from beginning one.

        Raises the error of a save in the background, if nobody was told of it.
        """
        with self._shared.turn:
            pending = self._shared.pending
            if pending is not None:
                # It stays known while it is waited for: an interrupt must not make the run forget it.
                pending._settle()
            yield

    def _wait(self) -> None:
        pending = self._shared.pending
        if pending is not None:
            pending._wait()
