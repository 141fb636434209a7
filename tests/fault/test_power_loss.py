"""The power goes after any call that a save makes to its disk: what had returned by then is there, whole.

What a disk may forget is said at the top of power.py: bytes and names that were not fsynced, each by itself, in any
order. CKPTSTORE_TORTURE_SCALE (default 1) multiplies how many of the possible losses are tried where there are too many
to try all.
"""

import contextlib
import copy
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore import chunk
from ckptstore.objects.local import LocalObjects
from tests.fault.power import Disk, RecordingOs, SyncedFile, Tree, seen, write_tree

MEMORY = Path("/dev/shm")

SCALE = float(os.environ.get("CKPTSTORE_TORTURE_SCALE", "1"))

SAMPLES = round(10 * SCALE)
"""How many losses are chosen by chance after each call, beside the extremes."""

MOMENTS = round(20 * SCALE)
"""After how many calls of a long history the power goes."""

Promises = Mapping[tuple[str, int], frozenset[int | None]]
"""(run, step) -> the seeds of the states that it may hold; None: it may not be there."""

ABSENT = frozenset([None])


class Loss(AssertionError):
    """A power loss took what was promised."""


def state(seed: int) -> dict[str, Any]:
    """A chunk that every state has, and one that only this one has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.arange(50, dtype=torch.float64),
        "weight": torch.randn(40, generator=generator),
        "step": seed,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


class WithoutFsync:
    """`os` for preparing and looking at disks: nothing there has to survive anything."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        pass


class Machine:
    """A machine with one disk: what its processes ask of the disk, and what they have been promised by then."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, looked_at: set[Any] | None = None) -> None:
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.recorder: RecordingOs | None = None
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._marks: list[tuple[int, Promises]] = []
        self._now: dict[tuple[str, int], frozenset[int | None]] = {}
        self._looked_at = set() if looked_at is None else looked_at
        self._processes = itertools.count(1)
        self._ids: dict[ckptstore.Store, Iterator[str]] = {}
        self.use(WithoutFsync())

    def use(self, os_module: Any) -> None:
        self._monkeypatch.setattr("ckptstore.objects.local.os", os_module)

    def record(self, recording: type[RecordingOs] = RecordingOs) -> RecordingOs:
        """From here on the power may go; what was done before is safe."""
        self.recorder = recording(self.disk)
        self._marks = [(0, dict(self._now))]
        self.use(self.recorder)
        return self.recorder

    def new_process(self, **options: Any) -> ckptstore.Store:
        """The store, as a process sees it that has done nothing yet. The store's folder is to be made, and its
        parent.
        """
        store = ckptstore.Store(self.disk / "above" / "store", threads=1, **options)
        process = next(self._processes)
        self._ids[store] = (f"{process:x}{number:031x}" for number in itertools.count(1))
        return store

    def save(self, store: ckptstore.Store, seed: int, step: int, run: str = "run", *, replace: bool = False) -> None:
        self._may_hold(run, step, self._now.get((run, step), ABSENT) | {seed})
        with self._monkeypatch.context() as patch:
            # The same ids and times whatever else happens: then there are few different trees to look at.
            ids = self._ids[store]
            patch.setattr("ckptstore.saving.new_save_id", lambda: next(ids))
            patch.setattr("ckptstore.saving.now_text", lambda: "2026-11-25T01:02:03Z")
            patch.setattr("ckptstore.objects.open.uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=next(ids))))
            store.run(run).save(state(seed), step=step, replace=replace)
        self._holds(run, step, frozenset([seed]))

    def delete(self, store: ckptstore.Store, step: int, run: str = "run") -> None:
        self._may_hold(run, step, self._now[run, step] | ABSENT)
        store.run(run).delete(step)
        # Nobody was promised that what is deleted stays away: it may be back, whole.

    def _may_hold(self, run: str, step: int, seeds: frozenset[int | None]) -> None:
        """From the next call on."""
        self._now[run, step] = seeds
        if self.recorder is not None:
            self._marks.append((self.call_count + 1, dict(self._now)))

    def _holds(self, run: str, step: int, seeds: frozenset[int | None]) -> None:
        """From now on, before any other call."""
        self._now[run, step] = seeds
        if self.recorder is not None:
            self._marks.append((self.call_count, dict(self._now)))

    @property
    def call_count(self) -> int:
        """How many calls the disk has had since the record began."""
        return 0 if self.recorder is None else len(self.recorder.events)

    def lose_power_after_each_call(self) -> None:
        """Raise Loss if there is a moment at which the power may not go. No process runs any more."""
        self.lose_power_after(*range(self.call_count + 1))

    def lose_power_after(self, *numbers: int) -> None:
        """Raise Loss if the power may not go after so many calls, or so many, ..."""
        assert self.recorder is not None
        disk = copy.deepcopy(self.recorder.start)
        for number in range(self.call_count + 1):
            if number:
                disk.apply(self.recorder.events[number - 1])
            if number in numbers:
                self._lose_power(disk, number)

    def _lose_power(self, disk: Disk, number: int) -> None:
        assert self.recorder is not None
        promises = [promises for since, promises in self._marks if since <= number][-1]
        for text, tree in disk.losses(random.Random(number), SAMPLES):
            found = seen(tree), frozenset(promises.items())
            if found in self._looked_at:
                continue
            self._looked_at.add(found)
            self.use(WithoutFsync())
            try:
                self._start_again(tree, promises)
            except (ckptstore.CheckpointError, ckptstore.CheckpointWarning, AssertionError) as error:
                last = self.recorder.events[number - 1] if number else "nothing"
                raise Loss(f"after call {number} ({last}): {text}: {type(error).__name__}: {error}") from error
            finally:
                self.use(self.recorder)

    def _start_again(self, tree: Tree, promises: Promises) -> None:
        """Look at what is there as the next process would, then save."""
        place = self._folder / "found"
        write_tree(tree, place)
        try:
            store = ckptstore.Store(place / "above" / "store", threads=1)
            runs = sorted({run for run, _ in promises})
            there = {(run, step) for run in runs for step in store.run(run).steps()}
            assert there <= set(promises), f"{there - set(promises)} were never saved"
            for (run, step), seeds in promises.items():
                if (run, step) in there:
                    loaded = store.run(run).load(step)
                    assert any(seed is not None and same(loaded, state(seed)) for seed in seeds), (
                        f"step {step} of {run} holds {loaded['step']}, and not one of {seeds}"
                    )
                else:
                    assert None in seeds, f"step {step} of {run} is gone"
            if there:
                report = store.verify()
                assert report.ok, f"damaged: {report.damaged}"
            store.run("run").save(state(99), step=99)
            assert same(store.run("run").load(), state(99))
            report = store.verify()
            assert report.ok, f"damaged, after the next save: {report.damaged}"
        finally:
            shutil.rmtree(place)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a place: many small files are made and removed there."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    # One call at a time, so that they come in the same order each time.
    monkeypatch.setattr("ckptstore.verifying.worker_threads", lambda: 1)
    monkeypatch.setattr(LocalObjects, "request_threads", 1)
    return Machine(folder / "machine", monkeypatch)


def test_the_first_saves_of_a_new_store(machine: Machine) -> None:
    machine.record()
    store = machine.new_process()
    machine.save(store, seed=1, step=1)
    machine.save(store, seed=2, step=2)
    machine.lose_power_after_each_call()


def two_checkpoints(machine: Machine, **options: Any) -> ckptstore.Store:
    """A store that has stood for a while, and a process that comes to it."""
    store = machine.new_process(**options)
    machine.save(store, seed=1, step=1)
    machine.save(store, seed=2, step=2)
    machine.record()
    return machine.new_process(**options)


def test_saves_to_a_store_that_stands(machine: Machine) -> None:
    store = two_checkpoints(machine)
    machine.save(store, seed=3, step=3)
    machine.save(store, seed=3, step=3)
    machine.save(store, seed=4, step=4, run="another")
    machine.save(machine.new_process(), seed=5, step=5)
    machine.lose_power_after_each_call()


def test_saves_that_take_the_place_of_others(machine: Machine) -> None:
    store = two_checkpoints(machine)
    machine.save(store, seed=3, step=2, replace=True)
    machine.save(store, seed=4, step=1, replace=True)
    machine.save(store, seed=2, step=2, replace=True)
    machine.lose_power_after_each_call()


def test_deleted_checkpoints_that_are_saved_again(machine: Machine) -> None:
    store = two_checkpoints(machine)
    machine.delete(store, step=2)
    machine.save(store, seed=3, step=2, replace=True)
    machine.delete(store, step=1)
    machine.save(store, seed=4, step=4)
    machine.lose_power_after_each_call()


def test_saves_of_differences(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)  # wherever there is a base
    store = two_checkpoints(machine, codec="small")
    machine.save(store, seed=3, step=3)
    machine.save(store, seed=4, step=4)
    machine.lose_power_after_each_call()
    assert (machine.disk / "above/store/deltas").exists()


def test_a_long_history_of_two_processes(machine: Machine) -> None:
    chance = random.Random(20)
    two_checkpoints(machine)
    stores = [machine.new_process(), machine.new_process(codec="none")]
    held = {1: 1, 2: 2}
    for seed in range(3, 15):
        store, step = chance.choice(stores), chance.randint(1, 6)
        if step in held and chance.random() < 0.4:
            machine.delete(store, step)
            del held[step]
        else:
            machine.save(store, seed, step, replace=True)
            held[step] = seed
    assert len(held) > 2
    moments = chance.sample(range(machine.call_count), k=min(machine.call_count, MOMENTS))
    machine.lose_power_after(*moments, machine.call_count)


# ---- a second process comes to the store between any two calls of the first, which may never go on


OTHERS: dict[str, dict[str, Any]] = {
    "the-same-step": {"seed": 1, "step": 1},
    "another-state": {"seed": 2, "step": 1, "replace": True},
    "another-run": {"seed": 1, "step": 7, "run": "another"},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("new", [True, False], ids=["new-store", "store-that-stands"])
def test_a_save_that_finds_what_another_process_has_not_made_durable(
    folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, new: bool, other: str
) -> None:
    come_in_before_each_call(folder, monkeypatch, OTHERS[other], new=new)


def come_in_before_each_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], *, new: bool
) -> None:
    """One process saves step 1. A second one saves `other` before the first call of that, before the second, ...; when
    it is done, the power goes.
    """
    looked_at: set[Any] = set()
    for first in itertools.count(0):
        machine = Machine(folder / str(first), monkeypatch, looked_at)
        if not new:
            machine.save(machine.new_process(), seed=0, step=0)
        machine.record()
        if not came_in_before(first, machine, other):
            break
    assert first > 20


def came_in_before(call: int, machine: Machine, other: dict[str, Any]) -> bool:
    """False if the first process is done without having come to that call."""
    assert machine.recorder is not None
    returned: list[int] = []

    def come_in(number: int) -> None:
        if number == call and not returned:
            machine.save(machine.new_process(), **other)
            returned.append(machine.call_count)

    machine.recorder.before = come_in
    with contextlib.suppress(ckptstore.ConflictError):  # the other was quicker, with another state
        machine.save(machine.new_process(), seed=1, step=1)
    if returned:
        machine.lose_power_after(returned[0])
    return bool(returned)


# ---- that these tests see a loss: each thing that saves do against one, left out


class NoFsyncOfFiles(RecordingOs):
    def fsync(self, descriptor: int) -> None:
        if isinstance(self.opened[descriptor], str):
            super().fsync(descriptor)


class NoFsyncOfFolders(RecordingOs):
    def fsync(self, descriptor: int) -> None:
        if isinstance(self.opened[descriptor], int):
            super().fsync(descriptor)


class FsyncAfterTheName(RecordingOs):
    """Files are fsynced, but only when they have got their names."""

    def fsync(self, descriptor: int) -> None:
        if isinstance(self.opened[descriptor], str):
            super().fsync(descriptor)

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self.events.append(SyncedFile(self.files[target]))

    def replace(self, source: str, target: str) -> None:
        super().replace(source, target)
        self.events.append(SyncedFile(self.files[target]))


@pytest.mark.parametrize("broken", [NoFsyncOfFiles, NoFsyncOfFolders, FsyncAfterTheName])
@pytest.mark.parametrize("new", [True, False], ids=["new-store", "store-that-stands"])
def test_a_disk_that_leaves_this_out_is_seen_to_lose_a_save(
    machine: Machine, broken: type[RecordingOs], new: bool
) -> None:
    if not new:
        machine.save(machine.new_process(), seed=1, step=1)
    machine.record(broken)
    machine.save(machine.new_process(), seed=2, step=2)
    with pytest.raises(Loss, match=r"is gone|damaged|MissingChunkError"):
        machine.lose_power_after_each_call()


@pytest.mark.parametrize("new", [True, False], ids=["new-store", "store-that-stands"])
def test_a_save_without_sync_before_the_commit_is_seen_to_lose_chunks(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    monkeypatch.setattr(LocalObjects, "sync", lambda self, keys: None)
    if not new:
        machine.save(machine.new_process(), seed=1, step=1)
    machine.record()
    machine.save(machine.new_process(), seed=2, step=2)
    with pytest.raises(Loss, match=r"MissingChunkError|damaged"):
        machine.lose_power_after_each_call()


def test_a_save_that_trusts_a_folder_of_the_same_store_is_seen_to_lose_what_another_put_there(
    folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that makes durable only what it has put itself."""
    put, sync = LocalObjects.put, LocalObjects.sync
    own: set[tuple[LocalObjects, str]] = set()

    def put_own(self: LocalObjects, key: str, content: Any) -> None:
        own.add((self, key))
        put(self, key, content)

    monkeypatch.setattr(LocalObjects, "put", put_own)
    monkeypatch.setattr(
        LocalObjects, "sync", lambda self, keys: sync(self, [key for key in keys if (self, key) in own])
    )
    with pytest.raises(Loss, match=r"MissingChunkError|is gone"):
        come_in_before_each_call(folder, monkeypatch, OTHERS["the-same-step"], new=False)


def test_a_save_that_trusts_the_folder_of_the_store_is_seen_to_lose_it(
    folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that makes the name of the store's folder durable only where it has made that folder."""
    anchor_root = LocalObjects._anchor_root
    monkeypatch.setattr(LocalObjects, "_anchor_root", lambda self: anchor_root(self) if self._made_above else None)
    with pytest.raises(Loss, match=r"mkdir /above.*is gone"):
        come_in_before_each_call(folder, monkeypatch, OTHERS["the-same-step"], new=True)


def test_without_a_fsync_of_the_folders_above_the_names_a_create_is_seen_to_be_lost(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalObjects, "_anchor", lambda self, folder: None)
    store = two_checkpoints(machine)
    machine.save(store, seed=1, step=7, run="another")
    with pytest.raises(Loss, match=r"mkdir /above/store/runs/another.*is gone"):
        machine.lose_power_after_each_call()
