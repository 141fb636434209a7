"""Prunes and tags through a store: what is deleted, what is refused with nothing deleted, and what stays whatever."""

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore import pruning
from ckptstore.condemning import condemn_keys
from ckptstore.errors import CorruptError, InvalidInputError, NotFoundError, UnavailableError
from ckptstore.format import TagKey, condemned_key
from ckptstore.manifest import Condemned, encode
from ckptstore.objects.base import Objects
from ckptstore.objects.memory import MemoryObjects
from ckptstore.objects.open import open_objects, store_time
from ckptstore.pruning import PrunedStep, PruneReport
from ckptstore.testing import FailingObjects, RecordingObjects
from ckptstore.testing.wrappers import Call, _Passing
from tests.servers import S3Server

T = TypeVar("T")


@pytest.fixture
def objects() -> Iterator[MemoryObjects]:
    yield MemoryObjects(f"memory://{uuid.uuid4().hex}")
    MemoryFileSystem.store.clear()


@pytest.fixture
def store(objects: Objects) -> ckptstore.Store:
    """The run lstm with five steps, the run base with one that shares a tensor with them."""
    return filled(objects)


def filled(objects: Objects) -> ckptstore.Store:
    found = ckptstore.Store(objects, codec="none")
    shared = torch.arange(20_000.0)
    found.run("base").save({"shared": shared}, step=0)
    for step in (10, 20, 30, 40, 50):
        found.run("lstm").save({"shared": shared, "own": torch.full((5,), step)}, step=step, metrics={"loss": 1 / step})
    return found


def content(objects: Objects) -> dict[str, bytes | None]:
    return {row.key: objects.get(row.key) for row in objects.list("")}


def manifest_keys(objects: Objects, step: int, run: str = "lstm") -> list[str]:
    return [row.key for row in objects.list(f"runs/{run}/{step:020d}.")]


@pytest.fixture(params=["local", "moto", "seaweed"])
def real_store(request: pytest.FixtureRequest, tmp_path: Path) -> ckptstore.Store:
    if request.param == "local":
        return filled(open_objects(tmp_path / "store"))
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    return filled(open_objects(f"s3://{server.new_bucket()}/ckpts", server.storage_options))


def test_a_prune_and_a_collection_keep_a_real_store_small(
    real_store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = real_store.run("lstm")
    run.tag(10, "first")
    monkeypatch.setattr(pruning, "store_time", lambda objects: store_time(objects) + 3600)
    report = real_store.prune("lstm", keep_last=2, keep_within=timedelta(minutes=50))
    assert [row.step for row in report.removed] == [20, 30]
    assert run.steps() == [10, 40, 50]
    assert run.tags() == {10: ("first",)}
    assert real_store.collect().deleted == 2
    assert real_store.verify().damaged == []


def test_the_report_says_what_stays_and_why_and_what_went(store: ckptstore.Store) -> None:
    report = store.prune("lstm", keep_last=1, keep_best="loss:max")
    assert report == PruneReport(
        dry_run=False,
        kept=[PrunedStep("lstm", 10, ("best loss (max)",)), PrunedStep("lstm", 50, ("newest", "last 1"))],
        removed=[PrunedStep("lstm", 20), PrunedStep("lstm", 30), PrunedStep("lstm", 40)],
        freed_bytes=report.freed_bytes,
    )
    assert store.run("lstm").steps() == [10, 50]
    assert store.run("base").steps() == [0]


def test_a_dry_run_reports_the_same_and_changes_nothing(objects: Objects, store: ckptstore.Store) -> None:
    before = content(objects)
    planned = store.prune("lstm", keep_last=2, dry_run=True)
    assert content(objects) == before
    done = store.prune("lstm", keep_last=2)
    assert (planned.dry_run, done.dry_run) == (True, False)
    assert (planned.kept, planned.removed, planned.freed_bytes) == (done.kept, done.removed, done.freed_bytes)


def test_freed_bytes_are_what_the_next_collection_frees_where_no_other_run_shares(store: ckptstore.Store) -> None:
    report = store.prune("lstm", keep_last=2)
    assert report.freed_bytes > 0
    assert store.collect().deleted_bytes == report.freed_bytes


def test_what_a_run_that_is_not_pruned_needs_is_not_freed_in_the_end(store: ckptstore.Store) -> None:
    store.run("base").save({"other": torch.arange(30_000.0)}, step=1)
    report = store.prune(["base"], keep_last=1)
    assert report.freed_bytes > 80_000
    assert store.collect().deleted_bytes < 80_000  # lstm needs the tensor that was shared


def test_every_run_is_pruned_by_itself(store: ckptstore.Store) -> None:
    store.run("base").save({"x": 1}, step=7)
    report = store.prune(keep_last=1)
    assert [(row.run, row.step) for row in report.kept] == [("base", 7), ("lstm", 50)]
    assert (store.run("base").steps(), store.run("lstm").steps()) == ([7], [50])


def test_of_several_runs_only_those_named_are_pruned(store: ckptstore.Store) -> None:
    store.run("other").save({"x": 1}, step=1)
    store.run("other").save({"x": 2}, step=2)
    store.prune(["lstm", "base"], keep_last=1)
    assert (store.run("lstm").steps(), store.run("other").steps()) == ([50], [1, 2])


def test_a_run_named_twice_is_pruned_and_told_of_once(store: ckptstore.Store) -> None:
    report = store.prune(["lstm", "lstm"], keep_last=4)
    assert [row.step for row in report.removed] == [10]
    assert len(report.kept) == 4


def test_no_runs_are_no_prune(objects: Objects, store: ckptstore.Store) -> None:
    before = content(objects)
    assert store.prune([], keep_last=1) == PruneReport(dry_run=False)
    assert content(objects) == before


@pytest.mark.parametrize("runs", ["lstm", ["base", "lstm"], None])
def test_a_misspelt_metric_deletes_nothing_in_any_run(
    objects: Objects, store: ckptstore.Store, runs: str | list[str] | None
) -> None:
    before = content(objects)
    with pytest.raises(InvalidInputError, match="no checkpoint has a metric 'los'"):
        store.prune(runs, keep_last=1, keep_best="los")
    assert content(objects) == before


def test_a_metric_that_one_of_the_runs_lacks_deletes_nothing(objects: Objects, store: ckptstore.Store) -> None:
    store.run("zebra").save({"x": 1}, step=1)
    before = content(objects)
    with pytest.raises(InvalidInputError, match="There are no metrics"):
        store.prune(["lstm", "zebra"], keep_best="loss")
    assert content(objects) == before


def test_a_run_that_is_not_there_deletes_nothing(objects: Objects, store: ckptstore.Store) -> None:
    before = content(objects)
    with pytest.raises(NotFoundError, match="there is no run 'lstn' with a checkpoint in memory://"):
        store.prune(["lstm", "lstn"], keep_last=1)
    assert content(objects) == before


def test_a_name_that_can_be_no_run_is_refused(store: ckptstore.Store) -> None:
    with pytest.raises(InvalidInputError, match="cannot be the name of a run"):
        store.prune("../lstm", keep_last=1)


def test_a_place_without_a_store_is_told_of(objects: Objects) -> None:
    with pytest.raises(NotFoundError, match="is not a ckptstore store"):
        ckptstore.Store(objects).prune(keep_last=1)


def test_how_old_a_checkpoint_is_goes_by_the_clock_of_the_store(
    store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "store_time", lambda objects: store_time(objects) + 3600)
    monkeypatch.setattr("ckptstore.pruning.time.time", lambda: 0.0)
    assert [row.step for row in store.prune("lstm", keep_within="2h", dry_run=True).removed] == []
    assert [row.step for row in store.prune("lstm", keep_within="50m").removed] == [10, 20, 30, 40]


class ReadOnly(_Passing):
    """Lets nothing through that writes."""

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        if call.operation in ("create", "put", "delete"):
            raise UnavailableError("you may only read here")
        return act()


def test_a_dry_run_needs_no_permission_to_write(objects: Objects, store: ckptstore.Store) -> None:
    reading = ckptstore.Store(ReadOnly(objects))
    assert len(reading.prune("lstm", keep_within="1h", dry_run=True).kept) == 5
    with pytest.raises(UnavailableError, match="you may only read here"):
        reading.prune("lstm", keep_within="1h")


def test_the_requests_of_a_prune(objects: Objects, store: ckptstore.Store) -> None:
    recording = RecordingObjects(objects)
    ckptstore.Store(recording).prune("lstm", keep_last=3)
    counts = {name: recording.count(name) for name in ("create", "put", "get", "list", "delete", "sync")}
    # The marker and each manifest; the runs, the condemned lists, the run, its tags; two tombstones.
    assert counts == {"create": 0, "put": 2, "get": 1 + 5, "list": 4, "delete": 0, "sync": 2}


# ---- what is damaged


def test_a_checkpoint_whose_manifest_is_damaged_stays(objects: Objects, store: ckptstore.Store) -> None:
    [key] = manifest_keys(objects, 50)
    objects.put(key, (objects.get(key) or b"").replace(b"lstm", b"LSTM"))
    report = store.prune("lstm", keep_last=1)
    assert report.kept == [PrunedStep("lstm", 40, ("newest", "last 1")), PrunedStep("lstm", 50, ("damaged",))]
    assert store.run("lstm").steps() == [40, 50]


def test_a_manifest_that_was_cut_off_stays(objects: Objects, store: ckptstore.Store) -> None:
    [key] = manifest_keys(objects, 30)
    cut = (objects.get(key) or b"")[:100]
    objects.put(key, cut)
    assert PrunedStep("lstm", 30, ("damaged",)) in store.prune("lstm", keep_last=1).kept
    assert objects.get(key) == cut


def test_a_checkpoint_with_a_chunk_that_is_marked_as_corrupt_stays(objects: Objects, store: ckptstore.Store) -> None:
    own = store.run("lstm").checkpoint(50)._manifest.chunks[-1].key
    assert condemn_keys(objects, [own])
    kept = store.prune("lstm", keep_last=1).kept
    assert kept == [PrunedStep("lstm", 40, ("newest", "last 1")), PrunedStep("lstm", 50, ("damaged",))]


def test_a_chunk_that_a_collection_condemned_is_no_damage(objects: Objects, store: ckptstore.Store) -> None:
    own = store.run("lstm").checkpoint(50)._manifest.chunks[-1].key
    listed = Condemned(collection="a" * 32, reason="unreferenced", created="2026-01-02T03:04:05Z", keys=[own])
    objects.put(condemned_key("a" * 32), encode(listed))
    assert store.prune("lstm", keep_last=1).kept == [PrunedStep("lstm", 50, ("newest", "last 1"))]


# ---- others at work


def test_every_manifest_of_a_step_goes_the_one_that_counts_last(objects: Objects, store: ckptstore.Store) -> None:
    [first] = manifest_keys(objects, 10)
    old = objects.get(first)
    store.run("lstm").save({"x": 1}, step=10, replace=True, metrics={"loss": 5})
    objects.put(first, old or b"")  # as if the save had been killed before it buried what it replaced
    current = str(store.run("lstm").checkpoint(10)._manifest.key)
    recording = RecordingObjects(objects)
    ckptstore.Store(recording).prune("lstm", keep_last=4)
    assert recording.keys("put") == [first, current]
    assert store.run("lstm").steps() == [20, 30, 40, 50]


class Before(_Passing):
    """Lets something happen once before the first put of a tombstone."""

    def __init__(self, inner: Objects, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self._happens: Callable[[], object] | None = happens

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        if call.operation == "put" and self._happens is not None:
            happens, self._happens = self._happens, None
            happens()
        return act()


def test_what_was_saved_since_the_prune_was_planned_stays(objects: Objects, store: ckptstore.Store) -> None:
    def train_on() -> None:
        store.run("lstm").save({"x": 1}, step=5)
        store.run("lstm").save({"x": 2}, step=10, replace=True)
        store.run("lstm").save({"x": 3}, step=60)

    ckptstore.Store(Before(objects, train_on)).prune("lstm", keep_last=1)
    assert store.run("lstm").steps() == [5, 10, 50, 60]
    assert store.run("lstm").load(10) == {"x": 2}


def test_a_prune_that_fails_at_any_request_is_finished_by_the_next(objects: Objects, store: ckptstore.Store) -> None:
    store.run("lstm").tag(20, "kept")
    made = content(objects)
    for fail_at in range(1, 100):
        MemoryFileSystem.store.clear()
        for key, value in made.items():
            objects.put(key, value or b"")
        broken = FailingObjects(objects, fail_at=fail_at)
        try:
            ckptstore.Store(broken).prune("lstm", keep_last=2)
        except UnavailableError:
            assert broken.failed
            assert {20, 40, 50} <= set(store.run("lstm").steps())
        store.prune("lstm", keep_last=2)
        assert store.run("lstm").steps() == [20, 40, 50]
        if not broken.failed:
            assert fail_at > 10
            return
    raise AssertionError("it never came to its end")


# ---- tags


def test_a_tag_keeps_a_checkpoint_and_without_it_it_goes(store: ckptstore.Store) -> None:
    run = store.run("lstm")
    run.tag(20, "release")
    assert store.prune("lstm", keep_last=1).kept[0] == PrunedStep("lstm", 20, ("tag release",))
    run.untag(20, "release")
    assert [row.step for row in store.prune("lstm", keep_last=1).removed] == [20]


def test_tags_are_those_of_each_step_sorted(store: ckptstore.Store) -> None:
    run = store.run("lstm")
    for step, tag in ((20, "z"), (20, "a"), (20, "a"), (10, "best"), (50, "x=1,y+2.5-z_")):
        run.tag(step, tag)
    assert run.tags() == {10: ("best",), 20: ("a", "z"), 50: ("x=1,y+2.5-z_",)}
    assert store.run("base").tags() == {}


def test_a_tag_that_is_not_there_is_taken_away_in_peace(objects: Objects, store: ckptstore.Store) -> None:
    before = content(objects)
    store.run("lstm").untag(20, "never")
    store.run("lstm").untag(99, "never")
    assert content(objects) == before


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "x" * 129, 7, None])
def test_what_cannot_be_a_tag_is_refused(objects: Objects, store: ckptstore.Store, name: Any) -> None:
    before = content(objects)
    for action in (store.run("lstm").tag, store.run("lstm").untag):
        with pytest.raises(InvalidInputError, match="cannot be a tag"):
            action(20, name)
    assert content(objects) == before


def test_a_step_without_a_checkpoint_cannot_be_tagged(objects: Objects, store: ckptstore.Store) -> None:
    before = content(objects)
    with pytest.raises(NotFoundError, match="run 'lstm' has no checkpoint at step 25; it has steps 10, 20"):
        store.run("lstm").tag(25, "release")
    with pytest.raises(NotFoundError, match="there is no run 'none'"):
        store.run("none").tag(25, "release")
    assert content(objects) == before


def test_a_damaged_checkpoint_cannot_be_tagged(objects: Objects, store: ckptstore.Store) -> None:
    [key] = manifest_keys(objects, 20)
    objects.put(key, (objects.get(key) or b"")[:-20])
    with pytest.raises(CorruptError, match="the manifest of step 20"):
        store.run("lstm").tag(20, "release")
    assert objects.list("tags/") == []


def test_a_checkpoint_that_is_deleted_takes_its_tags_along(objects: Objects, store: ckptstore.Store) -> None:
    run = store.run("lstm")
    run.tag(20, "a")
    run.tag(20, "b")
    run.tag(30, "c")
    run.delete(20)
    assert [row.key for row in objects.list("tags/")] == [str(TagKey("lstm", 30, "c"))]


def test_a_step_that_is_deleted_and_saved_again_has_no_tags(store: ckptstore.Store) -> None:
    run = store.run("lstm")
    run.tag(50, "best")
    run.delete(50)
    run.save({"again": True}, step=50)
    assert run.tags() == {}
    assert [row.step for row in store.prune("lstm", keep_tags=["best"], keep_last=1).kept] == [50]  # as the newest


def test_a_step_that_is_replaced_keeps_its_tags(store: ckptstore.Store) -> None:
    run = store.run("lstm")
    run.tag(50, "best")
    run.save({"again": True}, step=50, replace=True)
    assert run.tags() == {50: ("best",)}


def test_a_tag_that_was_left_behind_shows_nowhere(objects: Objects, store: ckptstore.Store) -> None:
    objects.put(str(TagKey("lstm", 25, "ghost")), b"x")
    objects.put("tags/lstm/notes.txt", b"x")
    assert store.run("lstm").tags() == {}
    assert [row.step for row in store.prune("lstm", keep_last=1).kept] == [50]


def test_a_tag_counts_by_its_name_alone_whatever_it_holds(objects: Objects, store: ckptstore.Store) -> None:
    objects.put(str(TagKey("lstm", 20, "unreadable")), b"x")
    assert store.run("lstm").tags() == {20: ("unreadable",)}
    assert [row.step for row in store.prune("lstm", keep_last=1).kept] == [20, 50]


class Taking(_Passing):
    """Deletes a checkpoint just before its tag is created: a prune that had read the tags before."""

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        if call.operation == "create" and call.key.startswith("tags/"):
            ckptstore.Store(self.inner).prune("lstm", keep_last=1)
        return act()


def test_a_tag_for_what_a_prune_took_meanwhile_is_an_error_and_not_left(
    objects: Objects, store: ckptstore.Store
) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint at step 20"):
        ckptstore.Store(Taking(objects)).run("lstm").tag(20, "release")
    assert objects.list("tags/") == []


def test_a_collection_leaves_tags_alone(objects: Objects, store: ckptstore.Store) -> None:
    store.run("lstm").tag(20, "release")
    store.prune("lstm", keep_last=1)
    store.collect()
    assert store.run("lstm").tags() == {20: ("release",)}
    assert store.verify().damaged == []
