"""Collections of real stores, in memory, on a disk and on two S3 servers, with real saves beside them."""

import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore import performing
from ckptstore.collecting import CollectReport
from ckptstore.condemning import condemn_keys
from ckptstore.errors import CorruptError, InvalidInputError, NotFoundError, UnavailableError, UnsupportedFormatError
from ckptstore.format import MARKER_KEY, ManifestKey
from ckptstore.manifest import Ended, decode_manifest
from ckptstore.objects import local
from ckptstore.objects.base import Objects
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.open import open_objects, store_time
from ckptstore.protocol import collects
from ckptstore.sealed import seal, unseal
from ckptstore.testing import FailingObjects, RecordingObjects
from ckptstore.testing.wrappers import Call, _Passing
from tests.servers import S3Server

T = TypeVar("T")
HOUR, WEEK = 3600.0, 7 * 86_400.0


class Hooked(_Passing):
    """Lets something happen once, just before the first call of its kind: what another job does meanwhile."""

    def __init__(self, inner: Objects, operation: str, prefix: str, happens: Callable[[], object]) -> None:
        super().__init__(inner)
        self._at = (operation, prefix)
        self._happens: Callable[[], object] | None = happens

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        operation, prefix = self._at
        if self._happens is not None and call.operation == operation and call.key.startswith(prefix):
            happens, self._happens = self._happens, None
            happens()
        return act()


class Killed(BaseException):
    """What a SIGKILL looks like from within: nothing of ours runs after it."""


class Dying(_Passing):
    """Dies when a manifest is to be created: all is uploaded, and nothing committed."""

    dead = False

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        self.dead = self.dead or (call.operation == "create" and call.key.startswith("runs/"))
        if self.dead:
            raise Killed
        return act()


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    """Drop what is in memory after each test: every listing there looks at all of it."""
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["memory", "local", "moto", "seaweed"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """A place on each backend."""
    if request.param == "memory":
        return in_memory()
    if request.param == "local":
        return open_objects(tmp_path / "store")
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    return open_objects(f"s3://{server.new_bucket()}/ckpts", server.storage_options)


@pytest.fixture
def memory() -> Objects:
    return in_memory()


def in_memory() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make collections believe that so many seconds have passed."""

    def put_forward(seconds: float) -> None:
        monkeypatch.setattr(performing, "store_time", lambda objects: store_time(objects) + seconds)

    return put_forward


def state(seed: int) -> dict[str, Any]:
    """A large tensor that never changes, one that does, and a small one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.arange(20_000, dtype=torch.float32),
        "weight": torch.randn(130, 130, generator=generator),
        "bias": torch.randn(7, generator=generator),
        "step": seed,
    }


def saved(objects: Objects, *steps: int, run: str = "run", codec: Any = "fast") -> ckptstore.Run:
    found = ckptstore.Store(objects, codec=codec).run(run)
    for step in steps:
        found.save(state(step), step=step)
    return found


def killed_save(objects: Objects, step: int, run: str = "run") -> None:
    """A save of which all but the manifest is done, and whose session still stands."""
    with pytest.raises(Killed):
        saved(Dying(objects), step, run=run)


def content(objects: Objects) -> dict[str, bytes | None]:
    return {row.key: objects.get(row.key) for row in objects.list("")}


def chunks(objects: Objects) -> set[str]:
    return {row.key for folder in ("chunks/", "deltas/") for row in objects.list(folder)}


def needed(objects: Objects) -> set[str]:
    """The chunks that committed manifests name."""
    found: set[str] = set()
    for row in objects.list("runs/"):
        key = ManifestKey.parse(row.key)
        assert key is not None
        value = decode_manifest(objects.get(row.key) or b"", key)
        if not isinstance(value, Ended):
            found |= {ref.key for ref in value.chunks}
    return found


def is_whole(objects: Objects, *steps: int, run: str = "run") -> None:
    """Each step loads as it was saved, all verifies, and there is nothing that no checkpoint needs."""
    found = ckptstore.Store(objects)
    assert found.run(run).steps() == list(steps)
    for step in steps:
        loaded, expected = found.run(run).load(step), state(step)
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[name], expected[name]) for name in ("frozen", "weight", "bias"))
    assert found.verify().damaged == []
    assert chunks(objects) == needed(objects)


def collected(objects: Objects, **given: Any) -> CollectReport:
    return ckptstore.Store(objects).collect(**given)


# ---- on every backend


def test_just_the_garbage_goes_and_the_dry_run_had_said_so(objects: Objects) -> None:
    run = saved(objects, 1, 2, 3)
    run.delete(1)
    run.delete(2)
    before, were = chunks(objects), content(objects)
    planned = collected(objects, dry_run=True)
    assert content(objects) == were
    done = collected(objects)
    gone = before - chunks(objects)
    assert len(gone) == planned.garbage == done.garbage == done.deleted
    assert planned.garbage_bytes == done.deleted_bytes == sum(len(were[key] or b"") for key in gone)
    assert (planned.dry_run, planned.deleted, done.dry_run) == (True, 0, False)
    assert (done.checkpoints, done.chunks, done.chunk_bytes) == (
        1,
        len(before),
        sum(len(were[key] or b"") for key in before),
    )
    assert objects.list("condemned/") == objects.list("scratch/") == []
    is_whole(objects, 3)


def test_while_a_save_is_under_way_nothing_goes_and_the_next_collection_finishes(objects: Objects) -> None:
    saved(objects, 1, 2).delete(1)
    reports: list[CollectReport] = []
    before = chunks(objects)
    hooked = Hooked(objects, "create", "runs/", lambda: reports.append(collected(objects)))
    saved(hooked, 3)
    [report] = reports
    [waiting] = report.waiting
    assert (waiting.run, waiting.step, waiting.pid > 0) == ("run", 3, True)
    assert (report.deleted, report.fenced, report.garbage > 0) == (0, [], True)
    assert before <= chunks(objects)
    assert len(objects.list("condemned/")) == 1
    after = collected(objects)
    assert (after.garbage, after.deleted, after.waiting) == (report.garbage, report.garbage, [])
    assert objects.list("condemned/") == []
    is_whole(objects, 2, 3)


def test_a_dead_save_is_fenced_and_its_chunks_go(objects: Objects, later: Callable[[float], None]) -> None:
    saved(objects, 1)
    killed_save(objects, 2)
    assert chunks(objects) != needed(objects)
    later(HOUR)
    report = collected(objects)
    assert [(each.run, each.step) for each in report.fenced] == [("run", 2)]
    assert (report.waiting, report.deleted > 0) == ([], True)
    assert objects.list("sessions/") == []
    is_whole(objects, 1)


def test_a_save_that_was_fenced_while_it_stalled_saves_again(objects: Objects, later: Callable[[float], None]) -> None:
    saved(objects, 1)
    later(HOUR)
    reports: list[CollectReport] = []
    saved(Hooked(objects, "create", "runs/", lambda: reports.append(collected(objects))), 2)
    assert [(each.run, each.step) for each in reports[0].fenced] == [("run", 2)]
    assert reports[0].deleted > 0
    is_whole(objects, 1, 2)


def test_tombstones_go_after_a_week(objects: Objects, later: Callable[[float], None]) -> None:
    run = saved(objects, 1, 2)
    run.delete(1)
    assert collected(objects).tombstones == 0
    assert len(objects.list("runs/")) == 2
    later(WEEK - HOUR)
    assert collected(objects, dry_run=True).tombstones == 0
    later(WEEK + HOUR)
    assert collected(objects, dry_run=True).tombstones == 1
    assert collected(objects).tombstones == 1
    assert len(objects.list("runs/")) == 1
    is_whole(objects, 2)


def test_a_store_of_differences_keeps_what_they_stand_on(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.chunk.DELTA_PAYS", 100.0)  # wherever there is a base
    run = saved(objects, 1, 2, 3, codec="small")
    assert len(objects.list("deltas/")) >= 2
    run.delete(1)
    run.delete(2)
    assert collected(objects).deleted > 0
    is_whole(objects, 3)


def test_what_a_killed_replacement_left_is_buried(objects: Objects) -> None:
    run = saved(objects, 1)
    buried = []

    def die() -> None:
        buried.append(True)
        raise Killed

    # Dies when it comes to put the tombstone of the checkpoint that it replaced.
    hooked = Hooked(objects, "put", "runs/", die)
    with pytest.raises(Killed):
        ckptstore.Store(hooked).run("run").save(state(2), step=1, replace=True)
    assert buried
    [session] = objects.list("sessions/")
    objects.delete(session.key)
    report = collected(objects)
    assert (report.replaced, report.checkpoints) == (1, 1)
    assert torch.equal(run.load(1)["weight"], state(2)["weight"])
    assert chunks(objects) == needed(objects)


def test_a_corrupt_chunk_stays_as_long_as_a_checkpoint_needs_it(objects: Objects) -> None:
    run = saved(objects, 1, 2)
    bad = sorted(needed(objects))[0]
    assert condemn_keys(objects, [bad])
    collected(objects)
    assert bad in chunks(objects)
    assert len(objects.list("condemned/")) == 1
    for step in (1, 2):
        run.delete(step)
    collected(objects)
    assert (chunks(objects), objects.list("condemned/")) == (set(), [])


# ---- what ends one, and what it needs


def test_a_place_without_a_store_is_told_of(memory: Objects) -> None:
    with pytest.raises(NotFoundError, match="is not a ckptstore store, or nothing was ever saved there"):
        collected(memory)
    assert content(memory) == {}


def newer(content: bytes, key: str) -> bytes:
    return seal(msgspec.json.encode(msgspec.json.decode(unseal(content, key)) | {"format": 99}))


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("prefix", "change", "error"),
    [
        pytest.param(MARKER_KEY, lambda value, key: value[:-9], CorruptError, id="marker damaged"),
        pytest.param(MARKER_KEY, None, CorruptError, id="marker gone"),
        pytest.param(MARKER_KEY, newer, UnsupportedFormatError, id="marker of a newer version"),
        pytest.param("runs/", lambda value, key: value[:-9] + b"123456789", CorruptError, id="manifest damaged"),
        pytest.param("runs/", lambda value, key: value[:700], CorruptError, id="manifest cut off"),
        pytest.param("runs/", newer, UnsupportedFormatError, id="manifest of a newer version"),
        pytest.param("sessions/", lambda value, key: value[:-9], CorruptError, id="session damaged"),
    ],
)
def test_what_cannot_be_read_ends_it_and_no_chunk_goes(
    memory: Objects,
    prefix: str,
    change: Callable[[bytes, str], bytes] | None,
    error: type[ckptstore.CheckpointError],
    dry_run: bool,
) -> None:
    saved(memory, 1, 2).delete(1)
    killed_save(memory, 3)
    key = memory.list(prefix)[-1].key
    value = memory.get(key)
    assert value is not None
    if change is None:
        memory.delete(key)
    else:
        memory.put(key, change(value, key))
    before = chunks(memory)
    with pytest.raises(error):
        collected(memory, dry_run=dry_run)
    assert chunks(memory) == before


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf"), True, "600", None])
def test_a_grace_that_makes_no_sense_is_refused(memory: Objects, grace: Any) -> None:
    with pytest.raises(InvalidInputError, match="grace must be a number of seconds, not"):
        collected(memory, grace=grace)


def test_a_backend_whose_create_overwrites_is_not_collected(memory: Objects) -> None:
    class Overwriting(_Passing):
        def _pass(self, call: Call, act: Callable[[], T]) -> T:
            return act()

        def create(self, key: str, content: Any) -> bool:
            self.inner.put(key, content)
            return True

    saved(memory, 1, 2).delete(1)
    before = chunks(memory)
    with pytest.raises(UnavailableError, match="a second create of one key succeeds"):
        collected(Overwriting(memory))
    assert chunks(memory) == before


class ReadOnly(_Passing):
    """Lets nothing through that writes."""

    def _pass(self, call: Call, act: Callable[[], T]) -> T:
        if call.operation in ("create", "put", "delete"):
            raise UnavailableError("you may only read here")
        return act()


def test_a_dry_run_needs_no_permission_to_write(memory: Objects) -> None:
    saved(memory, 1, 2).delete(1)
    assert collected(ReadOnly(memory), dry_run=True).garbage > 0
    with pytest.raises(UnavailableError, match="you may only read here"):
        collected(ReadOnly(memory))


def test_an_answer_lost_to_a_list_does_no_harm(memory: Objects) -> None:
    class Losing(_Passing):
        lost = 0

        def _pass(self, call: Call, act: Callable[[], T]) -> T:
            result = act()
            if call.operation == "create" and call.key.startswith("condemned/"):
                self.lost += 1
                return False  # type: ignore[return-value]
            return result

    saved(memory, 1, 2).delete(1)
    losing = Losing(memory)
    assert collected(losing).deleted > 0
    assert losing.lost == 1
    is_whole(memory, 2)


def test_a_failure_at_any_request_loses_nothing_and_the_next_collection_finishes(memory: Objects) -> None:
    saved(memory, 1, 2, 3).delete(2)
    made = content(memory)
    for fail_at in itertools.count(1):
        MemoryFileSystem.store.clear()
        for key, value in made.items():
            memory.put(key, value or b"")
        broken = FailingObjects(memory, fail_at=fail_at)
        try:
            collected(broken)
        except UnavailableError:
            assert broken.failed
            assert needed(memory) <= chunks(memory)
            collected(memory)
        is_whole(memory, 1, 3)
        if not broken.failed:
            assert fail_at > 20
            break


# ---- waiting


def test_wait_waits_for_a_save_that_then_ends(memory: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(memory, 1, 2).delete(1)
    killed_save(memory, 3)
    [session] = memory.list("sessions/")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            memory.delete(session.key)  # it has given up

    monkeypatch.setattr("ckptstore.performing.time.sleep", pause)
    report = collected(memory, wait=True)
    assert pauses == [collects.POLL_SECONDS] * 2
    assert (report.waiting, report.fenced, report.deleted > 0) == ([], [], True)
    assert collected(memory).deleted > 0  # what it had uploaded
    is_whole(memory, 2)


def test_grace_says_when_a_save_is_dead(memory: Objects, later: Callable[[float], None]) -> None:
    saved(memory, 1)
    killed_save(memory, 2)
    later(HOUR)
    assert [each.step for each in collected(memory, dry_run=True, grace=2 * HOUR).waiting] == [2]
    assert [each.step for each in collected(memory, dry_run=True, grace=HOUR - 60).fenced] == [2]


# ---- requests


def test_the_requests_of_a_collection_with_nothing_to_do(memory: Objects) -> None:
    saved(memory, 1, 2, 3)
    recording = RecordingObjects(memory)
    collected(recording)
    trial_and_clock = {"create": 2, "put": 1, "get": 2, "list": 2, "delete": 2}
    asked = {
        # Lists twice, manifests three times, sessions twice, chunks and deltas once.
        "list": 2 + 3 + 2 + 2,
        # The marker, and each manifest once.
        "get": 1 + 3,
        "sync": 1,
    }
    for operation in ("create", "put", "get", "list", "delete", "children", "sync"):
        expected = trial_and_clock.get(operation, 0) + asked.get(operation, 0)
        assert recording.count(operation) == expected, operation


def test_the_requests_of_a_collection_with_garbage(memory: Objects) -> None:
    saved(memory, 1, 2, 3).delete(2)
    recording = RecordingObjects(memory)
    report = collected(recording)
    assert [call for call in recording.keys("create") if call.startswith("condemned/")] == recording.keys("create")[2:]
    assert recording.count("create") == 2 + 1
    assert recording.count("delete") == 2 + report.deleted + 1
    assert recording.count("get") == 2 + 1 + 3 + 1


# ---- disks


def test_unfinished_files_of_dead_writers_go_from_a_disk(tmp_path: Path) -> None:
    place = LocalObjects(tmp_path / "store")
    saved(place, 1)
    dead = tmp_path / "store/chunks" / f".tmp-{uuid.uuid4().hex}"
    dead.write_bytes(b"half")
    before = time.time() - HOUR
    os.utime(dead, (before, before))
    young = tmp_path / "store/runs" / f".tmp-{uuid.uuid4().hex}"
    young.write_bytes(b"half")
    assert collected(place, dry_run=True).leftovers == [f"chunks/{dead.name}"]
    assert dead.exists()
    assert collected(place, grace=2 * HOUR).leftovers == []
    assert collected(place).leftovers == [f"chunks/{dead.name}"]
    assert (dead.exists(), young.exists()) == (False, True)


def test_files_of_others_in_the_folder_of_a_store_stay(tmp_path: Path) -> None:
    place = LocalObjects(tmp_path / "store")
    saved(place, 1)
    others = ["notes.txt", "chunks/README", "runs/run/plot.png", "mine/.tmp-draft"]
    for name in others:
        path = tmp_path / "store" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    report = collected(place, grace=0)
    assert sorted(report.unknown) == ["chunks/README", "runs/run/plot.png"]
    assert all((tmp_path / "store" / name).exists() for name in others)


@pytest.fixture
def on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalObjects]:
    """A store that is said to lie on NFS, with garbage in it."""
    place = LocalObjects(tmp_path / "store")
    saved(place, 1, 2).delete(1)
    monkeypatch.setattr(local, "_file_system", lambda path: "nfs4")
    yield place


def test_a_network_file_system_is_collected_only_alone(on_nfs: LocalObjects) -> None:
    before = content(on_nfs)
    with pytest.raises(UnavailableError, match=r"of type nfs4.*Collect when no job uses the store.*gc --alone"):
        collected(on_nfs)
    assert content(on_nfs) == before
    assert collected(on_nfs, alone=True).deleted > 0
    is_whole(on_nfs, 2)


def test_a_dry_run_is_allowed_on_a_network_file_system(on_nfs: LocalObjects) -> None:
    assert collected(on_nfs, dry_run=True).garbage > 0


def test_alone_changes_nothing_elsewhere(memory: Objects) -> None:
    saved(memory, 1, 2).delete(1)
    assert collected(memory, alone=True).deleted > 0
    is_whole(memory, 2)
