"""PyTorch Lightning's checkpoints in a store: a `CheckpointIO` plugin for its `Trainer`, and for `Fabric`.

Lightning speaks of files by their paths. A path stands here for one checkpoint of a run, and is written into that
checkpoint's metadata, so that an empty machine finds everything again. Where Lightning expects the file there is a
placeholder of a few bytes, as its callbacks look at what exists. Why: docs/decisions/0017-framework-integrations.md.
"""

import argparse
import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PosixPath
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.data import AttributeDict

from ckptstore import Checkpoint, PendingSave, Run, Store, register
from ckptstore.errors import (
    CheckpointWarning,
    ConflictError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    retold,
)
from ckptstore.portable import lightning_files, read_plain
from ckptstore.tree import registration_of

__all__ = ["CkptstoreIO"]

PLACEHOLDER = "ckptstore.placeholder"
"""The key in a placeholder that tells it from any other JSON file."""
MAX_PLACEHOLDER_BYTES = 65536


class CkptstoreIO(CheckpointIO):
    """Keeps the checkpoints of a Lightning `Trainer` (or `Fabric`) in a store.

        io = CkptstoreIO("s3://bucket/ckpts", "lstm")
        trainer = Trainer(plugins=[io], callbacks=[ModelCheckpoint(dirpath="checkpoints", save_last=True)])
        trainer.fit(model, ckpt_path=io.latest())

    The checkpoint of global step 100 is step 100 of the run. If another path holds that step already, as when
    `last.ckpt` is saved beside `epoch=1-step=100.ckpt`, it goes to a run of its own, `lstm.last`; its tensors are in
    the store by then and are not stored again. Nothing is ever unpickled, whatever `weights_only` says.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        run: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Touches nothing yet.

        Args:
            store: the store, or its URL. With a URL this object can be pickled, as `strategy="ddp_spawn"` does.
            run: the name of the run, at most 100 characters. One training, one run.
            storage_options: for a URL, as for `Store`.
            background: return from a save when the state has been copied to host memory, and write it in a thread. A
                failure is raised by the next save, or at the end of the training. Do not put Lightning's
                `AsyncCheckpointIO` around it: that deletes old checkpoints before the new one is written.

        Raises:
            InvalidInputError: `run` cannot be a name, or no store can be at the URL.
        """
        self._url = None if isinstance(store, Store) else os.fspath(store)
        if isinstance(store, Store) and storage_options is not None:
            raise InvalidInputError("storage_options go with a URL: the Store that was given has its own.")
        self._options = storage_options
        self._store = store if isinstance(store, Store) else Store(os.fspath(store), storage_options)
        if len(self._store.run(run).name) > lightning_files.MAX_RUN_NAME:
            raise InvalidInputError(
                f"{run!r} is too long for a run of Lightning's: use at most {lightning_files.MAX_RUN_NAME} letters."
            )
        self._run = run
        self._background = background
        self._files = _Files(self._store, run)
        self._pending: _Pending | None = None
        self._to_remove: list[str] = []
        self._own: set[str] = set()
        """Paths that this object has saved."""
        self._has_resumed = False
        self._latest: str | None = None
        _register_types()

    def __repr__(self) -> str:
        return f"CkptstoreIO({self._store.url!r}, {self._run!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self._url is None:
            raise InvalidInputError(
                f"{self!r} cannot be sent to another process: give it the URL of the store in place of a Store."
            )
        self._settle()
        names = ("_url", "_run", "_options", "_background", "_latest")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(  # type: ignore[misc]
            state["_url"], state["_run"], storage_options=state["_options"], background=state["_background"]
        )
        self._latest = state["_latest"]

    # ---- what users call

    def latest(self) -> str | None:
        """The path of the newest checkpoint that a training can be resumed from, for `Trainer.fit(ckpt_path=…)`.

        It is looked for in the store, so it needs no file on this machine. If that checkpoint turns out damaged when it
        is loaded, a `CheckpointWarning` says so, and the one before it is loaded.

        Returns:
            The path that it was saved as; None if there is none, a first start.

        Raises:
            UnavailableError: the store cannot be reached or read; never taken for a first start.
        """
        self._settle()
        self._files.read()
        newest = next(self._files.resumable(), None)
        self._latest = None if newest is None else newest.path
        return self._latest

    def paths(self) -> list[str]:
        """The paths that have a checkpoint, in the order of their steps.

        Raises:
            UnavailableError: the store cannot be reached or read.
        """
        self._settle()
        self._files.read()
        return list(dict.fromkeys(place.path for place in self._files.places()))

    def export(self, path: str | os.PathLike[str], file: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a checkpoint to a file, such as a `.ckpt` for `LightningModule.load_from_checkpoint`.

        Args:
            path: the path that it was saved as, or the end of it: "last.ckpt".
            file: the file; see `Run.export`.
            overwrite: put it in the place of a file that is there.

        Raises:
            NotFoundError: no checkpoint has this path.
            InvalidInputError, ConflictError, CorruptError, UnavailableError: as `Run.export` does.
        """
        self._settle()
        place = self._locate(path)
        if place is None:
            raise self._not_found(path)
        self._store.run(place.run).export(file, step=place.step, overwrite=overwrite)

    # ---- what Lightning calls

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save what Lightning has gathered; it does so in the process of rank 0 alone.

        Raises:
            InvalidInputError: something in it cannot be saved; the text names it. Nothing was changed.
            ConflictError: another training saved this path in the same run, and was not resumed from.
            TypeError: `storage_options` were given: they belong to the store.
            CheckpointError: the save in the background before this one failed; or as `Run.save` does.
        """
        if storage_options is not None:
            raise TypeError("storage_options of a single save make no sense here: give them to CkptstoreIO.")
        self._settle()
        name = _normal(path)
        step = lightning_files.step_of(checkpoint)
        self._files.read_once()
        self._require_own(name)
        chosen, number = self._files.choose(name, step)
        run = self._store.run(chosen)
        arguments: dict[str, Any] = {
            "step": number,
            "metrics": lightning_files.metrics_of(checkpoint),
            "metadata": lightning_files.metadata_of(checkpoint, self._run, name),
            "replace": self._files.taken.get((chosen, number)) == name,
        }
        try:
            if self._background:
                pending = run.save_async(checkpoint, **arguments)
                # At once, as callbacks number a name that exists already.
                is_new = not get_filesystem(name).exists(name)
                if is_new:
                    self._write_placeholder(name, chosen, number)
                self._pending = _Pending(pending, name, is_new)
            else:
                self._finish(run.save(checkpoint, **arguments), name)
        except InvalidInputError as error:
            hint = " A hyper-parameter is left out by save_hyperparameters(ignore=[…])."
            raise retold(error, f"{error}{hint if 'hyper_parameters' in str(error) else ''}") from error
        self._own.add(name)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, every byte of it verified; nothing is unpickled.

        Args:
            path: what it was saved as, or the end of that, if it is the end of one path alone. A link to a placeholder,
                and a copy of one, will do; so will a file of `torch.save`, which is read with `weights_only=True`.
            map_location: None (the CPU), a device or its name.
            weights_only: makes no difference.

        Raises:
            NotFoundError: no checkpoint has this path.
            CorruptError: it is damaged, and it was not given by `latest`, or all before it are damaged too.
            InvalidInputError: `map_location` is a function or a dict; or a file needs code to be run.
        """
        self._settle()
        if map_location is not None and not isinstance(map_location, str | torch.device):
            raise InvalidInputError(f"map_location must be a device or its name, not {map_location!r:.80}.")
        device = "cpu" if map_location is None else map_location
        place = self._locate(path)
        if place is None:
            return self._read_plain_file(path)
        state = self._load(place, device)
        self._has_resumed = self._has_resumed or place.run == self._run or place.run.startswith(f"{self._run}.")
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint; its bytes go with the next `ckptstore gc`. That it is gone already is fine.

        While a save is under way in the background, this is put off until that one is durable.
        """
        name = _normal(path)
        if self._pending is not None and not self._pending.save.done():
            self._to_remove.append(name)
            return
        self._settle()
        self._remove(name)

    def teardown(self) -> None:
        """Wait for the save in the background; raise what it failed with."""
        self._settle()

    # ---- how

    def _settle(self) -> None:
        """Wait for the pending save, and do what had to wait for it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                saved = pending.save.result()
            except BaseException:
                self._to_remove.clear()  # what they were to make room for is not there
                if pending.is_new:
                    _remove_file(pending.path)
                raise
            self._finish(saved, pending.path)
        while self._to_remove:
            self._remove(self._to_remove.pop(0))

    def _finish(self, saved: Checkpoint, name: str) -> None:
        """The checkpoint is durable: let its path stand for it, and delete what the path stood for before."""
        earlier = self._files.add(_Place.of(saved, name))
        for place in earlier:
            self._delete(place)
        self._write_placeholder(name, saved.run, saved.step)

    def _write_placeholder(self, name: str, run: str, step: int) -> None:
        _write_json(name, {PLACEHOLDER: 1, "store": self._store.url, "run": run, "step": step})

    def _require_own(self, name: str) -> None:
        """Keep a training that was started anew by mistake from replacing an older one's checkpoints."""
        if self._has_resumed or name in self._own or not self._files.has(name):
            return
        raise ConflictError(
            f"{name} is in run {self._run!r} of {self._store.url} already, saved by a training that this one was not "
            "resumed from. Resume it with Trainer.fit(…, ckpt_path=io.latest()), or choose another run for a new "
            "training; nothing was changed."
        )

    def _load(self, place: "_Place", device: "torch.device | str") -> dict[str, Any]:
        candidates = iter([place])
        if place.path == self._latest:
            candidates = (older for older in self._files.resumable() if older.order <= place.order)
        damage: CorruptError | None = None
        for candidate in candidates:
            if damage is not None:
                warnings.warn(
                    CheckpointWarning(f"damaged: {damage} Going back to step {candidate.step} ({candidate.path})."),
                    stacklevel=3,
                )
            try:
                state = self._store.run(candidate.run).load(candidate.step, device=device)
            except CorruptError as error:
                damage = error
                continue
            assert isinstance(state, dict)
            return state
        assert damage is not None
        raise damage

    def _locate(self, path: str | os.PathLike[str]) -> "_Place | None":
        """The place that `path` means; None if there is none, or a file of another kind."""
        name = _normal(path)
        place = self._files.exact(name) or self._read_placeholder(name)
        if place is None and not _is_plain_file(name):
            place = self._files.ending(os.fspath(path))
        return place

    def _read_plain_file(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """A checkpoint of before there was a store."""
        if not _is_plain_file(_normal(path)):
            raise self._not_found(path)
        loaded = read_plain(path)
        if not isinstance(loaded, dict):
            raise InvalidInputError(f"{path} is no checkpoint of Lightning's: it holds a {type(loaded).__name__}.")
        return loaded

    def _read_placeholder(self, name: str) -> "_Place | None":
        """What the file at `name`, a copy of a placeholder or a link to one, stands for."""
        about = _placeholder_at(name)
        if about is None:
            return None
        if about["store"] != self._store.url:
            raise InvalidInputError(
                f"{name} stands for a checkpoint in {about['store']}, and this is {self!r}: load it with a CkptstoreIO "
                "of that store."
            )
        run, step = about["run"], about["step"]
        saved = self._store.run(run).checkpoint(step)
        return _Place.of(saved, str(saved.metadata.get("lightning", {}).get("path", name)))

    def _remove(self, name: str) -> None:
        self._files.read_once()
        for place in self._files.forget(name):
            self._delete(place)
        _remove_file(name)

    def _delete(self, place: "_Place") -> None:
        with contextlib.suppress(NotFoundError):  # pruned meanwhile
            self._store.run(place.run).delete(place.step)

    def _not_found(self, path: str | os.PathLike[str]) -> NotFoundError:
        known = ", ".join(dict.fromkeys(place.path for place in self._files.places())) or "none"
        return NotFoundError(
            f"run {self._run!r} of {self._store.url} has no checkpoint {os.fspath(path)!r}. It has: {known}."
        )


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save in the background."""

    save: PendingSave
    path: str
    is_new: bool
    """Whether nothing stood at the path before."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the checkpoint of a path is."""

    path: str
    run: str
    step: int
    created: datetime
    is_resumable: bool

    @classmethod
    def of(cls, saved: Checkpoint, path: str) -> "_Place":
        about = saved.metadata.get("lightning", {})
        return cls(path, saved.run, saved.step, saved.created, bool(about.get("resumable")))

    @property
    def order(self) -> tuple[int, datetime]:
        """By step; at one step, what was saved last is the newest."""
        return self.step, self.created


@dataclass(slots=True)
class _Files:
    """Which path stands for which checkpoint: what the metadata of the run's checkpoints say, read once and kept up."""

    store: Store
    run: str
    was_read: bool = False
    by_path: dict[str, list[_Place]] = field(default_factory=dict)
    """The places of a path, the valid one last; others are left over from a process that was killed."""
    taken: dict[tuple[str, int], str | None] = field(default_factory=dict)
    """What path each step of each run belongs to; None if it is not Lightning's, or cannot be read."""

    def read(self) -> None:
        """Read it anew: a listing of the store, and a manifest for each checkpoint."""
        self.by_path.clear()
        self.taken.clear()
        for name in self.store.runs():
            if name == self.run or name.startswith(f"{self.run}."):
                self._read_run(self.store.run(name))
        for places in self.by_path.values():
            places.sort(key=lambda place: place.order[::-1])
        self.was_read = True

    def _read_run(self, run: Run) -> None:
        for step in run.steps():
            self.taken[run.name, step] = None
            try:
                saved = run.checkpoint(step)
            except CorruptError as error:
                warnings.warn(CheckpointWarning(f"passed over: {error}"), stacklevel=4)
                continue
            except NotFoundError:  # deleted since it was listed
                continue
            about = saved.metadata.get("lightning")
            if isinstance(about, dict) and about.get("run") == self.run and isinstance(about.get("path"), str):
                self.taken[run.name, step] = about["path"]
                self.by_path.setdefault(about["path"], []).append(_Place.of(saved, about["path"]))

    def read_once(self) -> None:
        if not self.was_read:
            self.read()

    def places(self) -> list[_Place]:
        """The valid place of each path, the oldest first."""
        return sorted((places[-1] for places in self.by_path.values()), key=lambda place: place.order)

    def resumable(self) -> Iterator[_Place]:
        """Those that a training can go on from, the newest first."""
        return (place for place in reversed(self.places()) if place.is_resumable)

    def has(self, path: str) -> bool:
        return path in self.by_path

    def exact(self, path: str) -> _Place | None:
        """The place of just this path; looks into the store again before it says that there is none."""
        if path not in self.by_path:
            self.read()
        places = self.by_path.get(path)
        return places[-1] if places else None

    def ending(self, given: str) -> _Place | None:
        """The place of the path that ends in the parts of `given`. Raises InvalidInputError if several do."""
        parts = Path(given).parts
        found = [place for place in self.places() if Path(place.path).parts[-len(parts) :] == parts]
        if len(found) > 1:
            paths = ", ".join(place.path for place in found)
            raise InvalidInputError(f"{given!r} may be any of {paths}: give more of the path.")
        return found[0] if found else None

    def choose(self, path: str, step: int | None) -> tuple[str, int]:
        """The run and the step to save `path` as: those that it has if the step is the same, else what is free."""
        number = step or 0
        for place in self.by_path.get(path, ()):
            if place.step == number:
                return place.run, number
        side = lightning_files.side_run(self.run, path)
        numbered = (f"{side}.{number}" for number in range(2, len(self.taken) + 3))
        names = (side, *numbered) if step is None else (self.run, side, *numbered)
        return next((name, number) for name in names if (name, number) not in self.taken)

    def add(self, place: _Place) -> list[_Place]:
        """Let a path stand for what was just saved; returns where it stood before."""
        earlier = [old for old in self.by_path.get(place.path, ()) if (old.run, old.step) != (place.run, place.step)]
        for old in earlier:
            self.taken.pop((old.run, old.step), None)
        self.by_path[place.path] = [place]
        self.taken[place.run, place.step] = place.path
        return earlier

    def forget(self, path: str) -> list[_Place]:
        """Drop a path; returns where it stood."""
        places = self.by_path.pop(path, [])
        for place in places:
            self.taken.pop((place.run, place.step), None)
        return places


def _normal(path: str | os.PathLike[str]) -> str:
    """A path as its checkpoint's metadata have it: absolute, or a URL."""
    text = os.fspath(path)
    return text if "://" in text else os.path.normpath(Path(text).absolute())


def _write_json(name: str, about: Mapping[str, Any]) -> None:
    """Show Lightning, and people, that there is a checkpoint of this name."""
    filesystem = get_filesystem(name)
    filesystem.makedirs(name.rpartition("/")[0], exist_ok=True)
    if "://" not in name and Path(name).is_symlink():
        Path(name).unlink()  # else what the link leads to would be written to
    with filesystem.open(name, "w") as opened:
        json.dump(
            {**about, "note": "this stands for a checkpoint in a ckptstore; `ckptstore export` makes a file"}, opened
        )


def _remove_file(name: str) -> None:
    """Never a folder: names come out of checkpoints, too."""
    filesystem = get_filesystem(name)
    if filesystem.isfile(name):
        filesystem.rm_file(name)


def _placeholder_at(name: str) -> dict[str, Any] | None:
    filesystem = get_filesystem(name)
    if not filesystem.isfile(name) or filesystem.size(name) > MAX_PLACEHOLDER_BYTES:
        return None
    try:
        about = json.loads(filesystem.cat_file(name))
    except ValueError:
        return None
    if not isinstance(about, dict) or PLACEHOLDER not in about:
        return None
    kinds = {"store": str, "run": str, "step": int}
    if any(type(about.get(part)) is not kind for part, kind in kinds.items()):
        raise InvalidInputError(f"{name} is the placeholder of a checkpoint, but what it says makes no sense.")
    return about


def _is_plain_file(name: str) -> bool:
    return "://" not in name and Path(name).is_file()


def _register_types() -> None:
    """Types that hyper-parameters often have, unless the program has registered them already."""
    if registration_of(AttributeDict()) is None:
        register(AttributeDict, "lightning.AttributeDict", dict, AttributeDict)
    if registration_of(PosixPath()) is None:
        register(PosixPath, "pathlib.PosixPath", str, PosixPath)
    if registration_of(argparse.Namespace()) is None:
        register(argparse.Namespace, "argparse.Namespace", vars, lambda tree: argparse.Namespace(**tree))
