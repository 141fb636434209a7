"""Repair and `verify(quick=True)` on whole stores: damage of every kind found, marked and mended, and nothing else."""

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore import chunk
from ckptstore.errors import CorruptError, FencedError, NotFoundError
from ckptstore.format import ManifestKey
from ckptstore.manifest import ChunkRef, Ended, encode
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.repairing import RepairedStep
from ckptstore.testing import FailingObjects, RecordingObjects
from ckptstore.writer import now_text

CODECS = ["fast", "none", "small"]


class Killed(BaseException):
    """What a SIGKILL looks like from within: nothing of ours runs after it."""


def state(step: int) -> dict[str, Any]:
    """One tensor that never changes, and two that change a little with each step; each makes a chunk of its own."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randint(0, 30_000, (300,), generator=generator, dtype=torch.int16)
    weight[step] = step
    return {
        "frozen": torch.randn(500, generator=generator),
        "weight": weight,
        "moment": torch.randn(100, generator=generator).double() * (1 + step / 2**40),
        "step": step,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else one[name] == other[name]
        for name in one
    )


@pytest.fixture(params=["memory", "local"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Objects]:
    yield open_objects(tmp_path / "ckpts" if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    MemoryFileSystem.store.clear()


@pytest.fixture
def memory() -> Iterator[Objects]:
    yield open_objects(f"memory://{uuid.uuid4().hex}")
    MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def small_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks this small do not pay as differences otherwise."""
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)


def fill(place: Objects, codec: Any = "fast") -> ckptstore.Run:
    """Three checkpoints of one run; with "small", the tensors of the later two are differences to the first."""
    run = ckptstore.Store(place, codec=codec).run("run")
    for step in (1, 2, 3):
        run.save(state(step), step=step, metrics={"loss": 1 / step}, metadata={"note": f"number {step}"})
    run.tag(2, "kept")
    return run


def refs(run: ckptstore.Run, step: int) -> list[ChunkRef]:
    return run.checkpoint(step)._manifest.chunks


def key_of(run: ckptstore.Run, step: int, tensor: str) -> str:
    """The chunk that a tensor of these is made of."""
    manifest = run.checkpoint(step)._manifest
    [index] = manifest.segments[manifest.tree[tensor]["segment"]].chunks
    return str(manifest.chunks[index].key)


def flip(place: Objects, key: str) -> None:
    content = bytearray(place.get(key) or b"")
    content[len(content) // 2] ^= 4
    place.put(key, content)


def cut(place: Objects, key: str) -> None:
    place.put(key, (place.get(key) or b"")[:-3])


def remove(place: Objects, key: str) -> None:
    place.delete(key)


HURTS = [flip, cut, remove]


def content_of(place: Objects) -> dict[str, bytes | None]:
    return {row.key: place.get(row.key) for row in place.list("")}


def described(run: ckptstore.Run, step: int) -> tuple[Any, ...]:
    """What is told of a checkpoint, and what a repair may not change."""
    found = run.checkpoint(step)
    return (found.step, found.created, found.metrics, found.metadata)


def save_elsewhere(place: Objects, *steps: int) -> None:
    """The same content once more, in full, in another run: what a job that was started again does."""
    for step in steps:
        ckptstore.Store(place, codec="fast").run("again").save(state(step), step=step)


class Meanwhile(RecordingObjects):
    """Does something of somebody else's just before the n-th call, counted from 1."""

    def __init__(self, inner: Objects, number: int, act: Callable[[], object]) -> None:
        super().__init__(inner)
        self._left = number
        self._act = act
        self._turn = threading.Lock()

    @property
    def done(self) -> bool:
        return self._left <= 0

    def _pass(self, call: Any, act: Callable[[], Any]) -> Any:
        with self._turn:
            self._left -= 1
            if self._left == 0:
                self._act()
        return super()._pass(call, act)


# ---- repair


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("hurt", HURTS)
def test_every_checkpoint_is_whole_again_and_otherwise_as_it_was(
    place: Objects, codec: str, hurt: Callable[[Objects, str], None]
) -> None:
    run = fill(place, codec)
    before = {step: described(run, step) for step in run.steps()}
    for key in {key_of(run, step, tensor) for step in run.steps() for tensor in ("frozen", "weight", "moment")}:
        hurt(place, key)
    store = ckptstore.Store(place)
    assert {found.step for found in store.verify().damaged} == {1, 2, 3}
    save_elsewhere(place, 1, 2, 3)
    report = store.repair()
    assert [(row.run, row.step) for row in report.repaired] == [("run", 1), ("run", 2), ("run", 3)]
    assert all(set(row.paths) == {"frozen", "weight", "moment"} for row in report.repaired)
    assert (report.lost, report.unreadable) == ([], [])
    # A damaged delta on a damaged base could not be told of before; now no checkpoint needs it.
    assert all(found.run is None for found in store.verify().damaged)
    assert store.verify().ok
    assert run.steps() == [1, 2, 3]
    for step in run.steps():
        assert same(run.load(step=step), state(step))
        assert described(run, step) == before[step]
    assert run.tags() == {2: ("kept",)}


def test_with_the_base_alone_damaged_every_difference_to_it_is_whole_again(place: Objects) -> None:
    run = fill(place, "small")
    deltas = [key_of(run, step, "weight") for step in (2, 3)]
    assert all(key.startswith("deltas/") for key in deltas)
    flip(place, key_of(run, 1, "weight"))
    store = ckptstore.Store(place)
    store.verify()
    save_elsewhere(place, 1)
    assert [row.step for row in store.repair().repaired] == [1, 2, 3]
    assert [key_of(run, step, "weight") for step in (2, 3)] == deltas  # they stand on another base now
    assert store.verify().ok
    assert all(same(run.load(step=step), state(step)) for step in (1, 2, 3))


def test_a_difference_whose_base_nobody_has_is_mended_by_a_full_copy_of_itself(memory: Objects) -> None:
    run = fill(memory, "small")
    flip(memory, key_of(run, 1, "weight"))
    store = ckptstore.Store(memory)
    store.verify()
    save_elsewhere(memory, 3)
    report = store.repair()
    assert [row.step for row in report.repaired] == [3]
    assert report.lost == [RepairedStep("run", 1, ("weight",)), RepairedStep("run", 2, ("weight",))]
    assert same(run.load(step=3), state(3))


def test_what_only_the_manifest_of_a_repaired_checkpoint_names_is_found(memory: Objects) -> None:
    """A delta is found only through a manifest, and the first repair has put another one in the place of that."""
    common = {"left": torch.arange(300.0), "right": torch.arange(300.0).double()}
    changed = {name: tensor + 2**-10 for name, tensor in common.items()}
    for name in ("one", "two"):  # equal, but for the keys of their differences
        run = ckptstore.Store(memory, codec="small").run(name)
        run.save(common, step=1)
        run.save(changed, step=2)
    store = ckptstore.Store(memory)
    one, two = store.run("one"), store.run("two")
    assert key_of(one, 2, "left").startswith("deltas/")
    flip(memory, key_of(one, 2, "left"))
    flip(memory, key_of(two, 2, "right"))
    store.verify()
    assert [(row.run, row.paths) for row in store.repair().repaired] == [("one", ("left",)), ("two", ("right",))]
    assert store.verify().ok


def test_a_collection_afterwards_takes_the_damaged_chunks_and_their_marks(place: Objects) -> None:
    run = fill(place, "small")
    damaged = [key_of(run, step, "weight") for step in (1, 2)]
    for key in damaged:
        flip(place, key)
    store = ckptstore.Store(place)
    store.verify()
    save_elsewhere(place, 1, 2)
    store.repair()
    store.collect()
    there = {row.key for row in place.list("")}
    assert there.isdisjoint(damaged)
    assert not any(key.startswith("condemned/") for key in there)
    report = store.verify()
    assert (report.damaged, report.harmless) == ([], [])
    assert all(same(run.load(step=step), state(step)) for step in (1, 2, 3))


def test_a_second_repair_finds_nothing_to_do(memory: Objects) -> None:
    run = fill(memory)
    flip(memory, key_of(run, 1, "frozen"))
    store = ckptstore.Store(memory)
    store.verify()
    save_elsewhere(memory, 1)
    assert len(store.repair().repaired) == 3
    before = content_of(memory)
    report = store.repair()
    assert (report.marked, report.repaired, report.lost) == (1, [], [])
    assert content_of(memory) == before


def test_a_run_alone_is_repaired_with_the_copies_of_another(memory: Objects) -> None:
    run = fill(memory)
    other = ckptstore.Store(memory).run("other")
    other.save(state(1), step=7)
    flip(memory, key_of(run, 1, "frozen"))
    store = ckptstore.Store(memory)
    store.verify()
    save_elsewhere(memory, 1)
    assert [(row.run, row.step) for row in store.repair("other").repaired] == [("other", 7)]
    assert same(other.load(step=7), state(1))
    with pytest.raises(CorruptError):
        run.load(step=1)


def test_a_run_that_is_not_there_is_an_error(memory: Objects) -> None:
    fill(memory)
    with pytest.raises(NotFoundError, match="there is no run 'other'"):
        ckptstore.Store(memory).repair("other")


def test_what_is_lost_is_named_with_its_tensors_and_left_as_it_is(place: Objects) -> None:
    run = fill(place)
    flip(place, key_of(run, 2, "weight"))
    flip(place, key_of(run, 2, "moment"))
    store = ckptstore.Store(place)
    store.verify()
    before = content_of(place)
    report = store.repair()
    assert report.lost == [RepairedStep("run", 2, ("weight", "moment"))]
    assert (report.marked, report.repaired) == (2, [])
    assert content_of(place) == before
    assert torch.equal(run.load(step=2, only="frozen"), state(2)["frozen"])


def test_only_the_tensors_without_a_good_copy_are_named_as_lost(memory: Objects) -> None:
    run = fill(memory)
    flip(memory, key_of(run, 2, "weight"))
    flip(memory, key_of(run, 2, "moment"))
    store = ckptstore.Store(memory)
    store.verify()
    ckptstore.Store(memory).run("again").save({"weight": state(2)["weight"]}, step=1)
    assert store.repair().lost == [RepairedStep("run", 2, ("moment",))]


def test_a_checkpoint_whose_manifest_cannot_be_read_is_told_and_keeps_nobody_from_repair(place: Objects) -> None:
    run = fill(place)
    flip(place, str(run.checkpoint(2)._manifest.key))
    flip(place, key_of(run, 3, "weight"))
    store = ckptstore.Store(place)
    store.verify()
    save_elsewhere(place, 3)
    report = store.repair()
    assert report.unreadable == [RepairedStep("run", 2, ())]
    assert [row.step for row in report.repaired] == [3]
    assert store.repair("again").unreadable == []


def test_where_a_list_of_marks_cannot_be_read_nothing_is_said_to_be_whole(memory: Objects) -> None:
    """It may be the one that names what is damaged."""
    run = fill(memory)
    flip(memory, key_of(run, 1, "weight"))
    store = ckptstore.Store(memory)
    store.verify()
    [row] = memory.list("condemned/")
    flip(memory, row.key)
    with pytest.raises(CorruptError, match="`ckptstore verify` names the list"):
        store.repair()


def test_a_copy_that_is_damaged_too_is_not_taken(memory: Objects) -> None:
    run = fill(memory)
    flip(memory, key_of(run, 1, "weight"))
    store = ckptstore.Store(memory)
    store.verify()
    save_elsewhere(memory, 1)
    flip(memory, key_of(store.run("again"), 1, "weight"))
    assert store.repair().lost == [RepairedStep("run", 1, ("weight",))]


def test_two_repairs_at_once_leave_every_checkpoint_whole(memory: Objects) -> None:
    """One of them carried out whole just before each call of the other."""
    for number in itertools.count(1):
        for row in memory.list(""):
            memory.delete(row.key)
        run = fill(memory)
        flip(memory, key_of(run, 2, "weight"))
        ckptstore.Store(memory).verify()
        save_elsewhere(memory, 2)
        place = Meanwhile(memory, number, lambda: ckptstore.Store(memory).repair())
        ckptstore.Store(place).repair()
        assert run.steps() == [1, 2, 3]
        assert same(run.load(step=2), state(2))
        assert ckptstore.Store(memory).verify().ok
        assert memory.list("sessions/") == []
        if not place.done:
            break
    assert number > 15


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_at_any_call_the_old_checkpoint_or_the_repaired_one_stands(memory: Objects, how: Any) -> None:
    run = fill(memory, "small")
    flip(memory, key_of(run, 1, "weight"))
    ckptstore.Store(memory).verify()
    save_elsewhere(memory, 1)
    start = content_of(memory)
    old = {step: run.checkpoint(step)._manifest for step in (1, 2, 3)}
    seen = set()
    for fail_at in itertools.count(1):
        for row in memory.list(""):
            memory.delete(row.key)
        for name, content in start.items():
            memory.put(name, content or b"")
        broken = FailingObjects(memory, fail_at=fail_at, how=how, error=Killed, dead=True)
        try:
            ckptstore.Store(broken).repair()
        except Killed:
            pass
        else:
            break
        after = content_of(memory)
        assert {name: after[name] for name in start if name.split("/")[0] != "runs"} == {
            name: content for name, content in start.items() if name.split("/")[0] != "runs"
        }
        assert {name.split("/")[0] for name in after.keys() - start.keys()} <= {"runs", "sessions"}
        for step in (1, 2, 3):
            if run.checkpoint(step)._manifest == old[step]:
                seen.add((step, "old"))
            else:
                seen.add((step, "repaired"))
                assert same(run.load(step=step), state(step))
        assert ckptstore.Store(memory).repair().lost == []
        assert all(same(run.load(step=step), state(step)) for step in (1, 2, 3))
    # Of the last step too, where the call is done before the process dies: the last calls tidy up after its commit.
    assert seen == set(itertools.product((1, 2, 3), ("old", "repaired")))


def test_a_checkpoint_deleted_just_before_any_call_but_the_commit_does_not_come_back(memory: Objects) -> None:
    came_back: list[str] = []
    for number in itertools.count(1):
        for row in memory.list(""):
            memory.delete(row.key)
        run = fill(memory)
        flip(memory, key_of(run, 2, "weight"))
        ckptstore.Store(memory).verify()
        save_elsewhere(memory, 2)
        place = Meanwhile(memory, number, lambda run=run: run.delete(2))  # type: ignore[misc]
        report = ckptstore.Store(place).repair()
        if not place.done:
            assert [row.step for row in report.repaired] == [2]
            break
        if run.steps() == [1, 2, 3]:
            came_back.append(place.calls[number - 1].operation)
        else:
            assert run.steps() == [1, 3]
        assert report.lost == []
        assert memory.list("sessions/") == []
    assert number > 15
    assert came_back == ["create"]  # a tombstone that it finds afterwards may be a collection's as well


def test_a_step_saved_again_just_before_any_call_holds_what_was_saved(memory: Objects) -> None:
    new = {"weight": torch.ones(3)}
    for number in itertools.count(1):
        for row in memory.list(""):
            memory.delete(row.key)
        run = fill(memory)
        flip(memory, key_of(run, 2, "weight"))
        ckptstore.Store(memory).verify()
        save_elsewhere(memory, 2)
        place = Meanwhile(memory, number, lambda run=run: run.save(new, step=2, replace=True))  # type: ignore[misc]
        ckptstore.Store(place).repair()
        if not place.done:
            break
        assert same(run.load(step=2), new)
        assert memory.list("sessions/") == []
    assert number > 15


def test_a_collection_just_before_any_call_takes_nothing_that_is_needed(memory: Objects) -> None:
    for number in itertools.count(1):
        for row in memory.list(""):
            memory.delete(row.key)
        run = fill(memory)
        flip(memory, key_of(run, 2, "weight"))
        store = ckptstore.Store(memory)
        store.verify()
        save_elsewhere(memory, 2)
        store.run("again").delete(2)  # the good copy is garbage, and may go
        place = Meanwhile(memory, number, store.collect)
        report = ckptstore.Store(place).repair()
        if not place.done:
            break
        assert len(report.repaired) + len(report.lost) == 1
        if report.repaired:
            assert same(run.load(step=2), state(2))
            assert store.verify().ok
        store.collect()
        assert all(same(run.load(step=step), state(step)) for step in (1, 3))
        assert run.steps() == [1, 2, 3]
    assert number > 15


class Fencing(FailingObjects):
    """A collector that takes the first `times` repairs for dead, just before they commit."""

    times = 1

    def create(self, key: str, content: Any) -> bool:
        parsed = ManifestKey.parse(key)
        if parsed is not None and self.times > 0:
            self.times -= 1
            fence = Ended(state="fenced", run=parsed.run, step=parsed.step, save=parsed.save_id, created=now_text())
            assert super().create(key, encode(fence))
        return super().create(key, content)


@pytest.mark.parametrize(("times", "repaired"), [(2, True), (3, False)])
def test_a_repair_that_was_fenced_begins_again_three_times_at_most(memory: Objects, times: int, repaired: bool) -> None:
    run = fill(memory)
    flip(memory, key_of(run, 2, "weight"))
    ckptstore.Store(memory).verify()
    save_elsewhere(memory, 2)
    fencing = Fencing(memory, fail_at=10**9)
    fencing.times = times
    if repaired:
        assert [row.step for row in ckptstore.Store(fencing).repair().repaired] == [2]
        assert same(run.load(step=2), state(2))
    else:
        with pytest.raises(FencedError, match=r"Nothing was changed\. Do it again\."):
            ckptstore.Store(fencing).repair()
    assert memory.list("sessions/") == []


# ---- verify(quick=True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("hurt", [cut, remove])
def test_a_quick_verify_finds_what_is_missing_or_cut(
    place: Objects, codec: str, hurt: Callable[[Objects, str], None]
) -> None:
    run = fill(place, codec)
    key = key_of(run, 3, "weight")
    hurt(place, key)
    report = ckptstore.Store(place).verify(quick=True)
    assert [(found.run, found.step, found.path, found.key) for found in report.damaged] == [("run", 3, "weight", key)]
    assert report.quick


def test_a_quick_verify_of_a_damaged_base_names_what_stands_on_it(memory: Objects) -> None:
    run = fill(memory, "small")
    key = key_of(run, 1, "weight")
    cut(memory, key)
    report = ckptstore.Store(memory).verify(quick=True)
    assert [(found.step, found.path) for found in report.damaged] == [(step, "weight") for step in (1, 2, 3)]
    assert {found.key for found in report.damaged} == {key}


def test_a_quick_verify_does_not_see_a_flipped_bit(memory: Objects) -> None:
    run = fill(memory)
    flip(memory, key_of(run, 1, "weight"))
    assert ckptstore.Store(memory).verify(quick=True).ok
    assert not ckptstore.Store(memory).verify().ok


def test_a_quick_verify_of_a_sound_store_reads_no_chunk(memory: Objects) -> None:
    fill(memory, "small")
    recording = RecordingObjects(memory)
    report = ckptstore.Store(recording).verify(quick=True)
    assert report.ok
    assert (report.checkpoints, report.bytes) == (3, 0)
    assert report.chunks == len(memory.list("chunks/")) + len(memory.list("deltas/"))
    assert {key.split("/")[0] for key in recording.keys("get")} == {"ckptstore.json", "runs", "tags"}
    assert recording.count("create", "put", "delete") == 0


def test_a_quick_verify_reads_of_the_chunks_only_what_looks_wrong(memory: Objects) -> None:
    run = fill(memory)
    key = key_of(run, 2, "moment")
    cut(memory, key)
    recording = RecordingObjects(memory)
    ckptstore.Store(recording).verify(quick=True)
    assert {name for name in recording.keys("get") if name.startswith("chunks/")} == {key}


def test_a_quick_verify_looks_at_what_one_run_needs_alone(memory: Objects) -> None:
    run = fill(memory)
    ckptstore.Store(memory).run("other").save({"x": torch.ones(9)}, step=1)
    cut(memory, key_of(run, 1, "weight"))
    recording = RecordingObjects(memory)
    store = ckptstore.Store(recording)
    other = store.verify("other", quick=True)
    assert not any(key.startswith("chunks/") for key in recording.keys("get"))
    assert other.ok
    assert (other.checkpoints, other.chunks) == (1, 1)
    assert [found.run for found in store.verify("run", quick=True).damaged] == ["run"]


def test_a_quick_verify_passes_over_chunks_that_no_checkpoint_needs(memory: Objects) -> None:
    """Nothing says how long they should be."""
    run = fill(memory)
    key = key_of(run, 3, "weight")
    run.delete(3)
    cut(memory, key)
    recording = RecordingObjects(memory)
    report = ckptstore.Store(recording).verify(quick=True)
    assert report.ok
    assert report.chunks == len(refs(run, 1)) + len(refs(run, 2)) - 1  # one is shared
    assert key not in recording.keys("get")


def test_what_a_quick_verify_finds_is_marked_after_it_was_read(memory: Objects) -> None:
    run = fill(memory)
    key = key_of(run, 2, "weight")
    cut(memory, key)
    recording = RecordingObjects(memory)
    store = ckptstore.Store(recording)
    report = store.verify(quick=True)
    assert report.marked
    calls = [(call.operation, call.key) for call in recording.calls]
    [mark] = [place for place, call in enumerate(calls) if call[0] == "create"]
    assert calls[mark][1].startswith("condemned/")
    assert ("get", key) in calls[:mark]
    save_elsewhere(memory, 2)
    assert [row.step for row in store.repair().repaired] == [2]


def test_a_listing_that_is_wrong_about_a_sound_chunk_marks_nothing(memory: Objects) -> None:
    """What a quick verify suspects it reads; only what is damaged is marked."""
    run = fill(memory)
    hidden = key_of(run, 2, "weight")

    class Forgets(RecordingObjects):
        def list(self, prefix: str) -> Any:
            return [row for row in super().list(prefix) if row.key != hidden]

    recording = Forgets(memory)
    assert ckptstore.Store(recording).verify(quick=True).ok
    assert hidden in recording.keys("get")
    assert memory.list("condemned/") == []
