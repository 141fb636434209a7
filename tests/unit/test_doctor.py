"""What an examination says: of a place that keeps its promises, of one that breaks each of them, of what lies about."""

import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore.doctor import Finding, examine
from ckptstore.errors import UnavailableError
from ckptstore.format import condemned_key, new_save_id, session_key
from ckptstore.manifest import Session, encode
from ckptstore.objects.base import Bytes, ObjectInfo, Objects
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects
from ckptstore.writer import now_text, this_writer

GRACE = 600.0


@pytest.fixture
def place() -> Iterator[Objects]:
    yield open_objects(f"memory://{uuid.uuid4().hex}")
    MemoryFileSystem.store.clear()


def fill(place: Objects) -> ckptstore.Run:
    run = ckptstore.Store(place).run("lstm")
    for step in (1, 2):
        run.save({"weight": torch.full((100,), float(step))}, step=step)
    return run


def told(place: Objects, level: str, grace: float = GRACE) -> list[str]:
    """What is found of one level, each with its advice."""
    return [f"{each.what} | {each.advice}" for each in examine(place, grace) if each.level == level]


def only(found: list[str]) -> str:
    [one] = found
    return one


def test_a_healthy_store_has_no_problem_and_nothing_to_tidy_up(place: Objects) -> None:
    fill(place)
    findings = examine(place, GRACE)
    assert {each.level for each in findings} == {"ok"}
    whats = [each.what for each in findings]
    assert whats[0].startswith("installed: Python ")
    assert f"{place.url} holds the store " in whats[1]
    assert whats[2:] == [
        "create is exclusive; a get and a list show what was just put; delete works",
        "of 8 creates of one key at the same time, one won",
        "the clock of the place and that of this machine agree",
        "2 checkpoints, 2 chunks; every manifest can be read",
    ]


def test_it_leaves_the_store_as_it_was(place: Objects) -> None:
    fill(place)
    before = {row.key: place.get(row.key) for row in place.list("")}
    recording = RecordingObjects(place)
    examine(recording, GRACE)
    assert {row.key: place.get(row.key) for row in place.list("")} == before
    written = {key for kind in ("create", "put", "delete") for key in recording.keys(kind)}
    assert written
    assert all(key.startswith("scratch/") for key in written)


def test_a_place_without_a_store_is_tried_as_well(place: Objects) -> None:
    assert only(told(place, "note")) == f"{place.url} holds no store yet | The first save makes one."
    assert told(place, "problem") == []
    assert place.list("") == []


# ---- promises


class ReadOnly(RecordingObjects):
    def create(self, key: str, content: Bytes) -> bool:
        raise UnavailableError(f"cannot create {key}: permission denied.")

    def put(self, key: str, content: Bytes) -> None:
        raise UnavailableError(f"cannot write {key}: permission denied.")


def test_a_place_that_is_only_read_is_one_problem_and_its_checkpoints_are_counted_all_the_same(place: Objects) -> None:
    fill(place)
    found = only(told(ReadOnly(place), "problem"))
    assert found.startswith("the place does not do what saves need of it: cannot create scratch/")
    assert "Checkpoints that are there can be restored." in found
    assert "2 checkpoints, 2 chunks; every manifest can be read | " in told(ReadOnly(place), "ok")


def test_a_folder_that_is_only_read_is_a_problem() -> None:
    """A child looks, as root may write anywhere and has to become somebody else."""
    with tempfile.TemporaryDirectory() as name:  # unlike pytest's own, below folders that anybody may pass
        folder = Path(name)
        fill(LocalObjects(folder))
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                os.write(write, "\n".join(told(LocalObjects(folder), "problem")).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            lines = pipe.read().splitlines()
        os.waitpid(child, 0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o700)
    assert "the place does not do what saves need of it: cannot create" in only(lines)
    assert "Check who owns this folder" in only(lines)


class Overwrites(RecordingObjects):
    """Looks, and then puts."""

    def create(self, key: str, content: Bytes) -> bool:
        self.inner.put(key, content)
        return True


class Races(RecordingObjects):
    """Exclusive, unless several come at once: all have looked before one has put."""

    def __init__(self, inner: Objects) -> None:
        super().__init__(inner)
        self.racers = threading.Barrier(8)

    def create(self, key: str, content: Bytes) -> bool:
        there = self.inner.get(key) is not None
        if memoryview(content).nbytes == 1000:  # one of those that come at once
            self.racers.wait()
        if not there:
            self.inner.put(key, content)
        return not there


class StaleGet(RecordingObjects):
    def get(self, key: str) -> bytes | None:
        return None if key.startswith("scratch/") else super().get(key)


class StaleList(RecordingObjects):
    def list(self, prefix: str) -> list[ObjectInfo]:
        return [] if prefix.startswith("scratch/") else super().list(prefix)


class Timeless(RecordingObjects):
    def list(self, prefix: str) -> Any:
        return [ObjectInfo(row.key, row.size, 0.0) for row in super().list(prefix)]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (Overwrites, "a second create of one key succeeds"),
        (Races, "of 8 creates of one key at the same time, 8 won | Two jobs could overwrite each other's checkpoints"),
        (StaleGet, "get does not see a key that was just created"),
        (StaleList, "list does not show a key that was just created"),
        (Timeless, "tells no last-modified times, so whether a save is alive cannot be seen"),
    ],
)
def test_each_promise_that_is_broken_is_a_problem_of_its_own(
    place: Objects, broken: Callable[[Objects], Objects], problem: str
) -> None:
    fill(place)
    assert problem in only(told(broken(place), "problem"))
    assert place.list("scratch/") == []


def test_a_race_that_fails_leaves_nothing_behind(place: Objects) -> None:
    class Fails(RecordingObjects):
        def create(self, key: str, content: Bytes) -> bool:
            created = super().create(key, content)
            if memoryview(content).nbytes == 1000:
                raise UnavailableError("the connection was cut.")
            return created

    assert only(told(Fails(place), "problem")) == "the connection was cut. | "
    assert place.list("scratch/") == []


def test_a_place_that_cannot_be_reached_at_all_is_told_once_for_each_thing_that_failed(place: Objects) -> None:
    class Gone(RecordingObjects):
        def _pass(self, call: Any, act: Callable[[], Any]) -> Any:
            raise UnavailableError("no route to the host.")

    found = told(Gone(place), "problem")
    assert [each.partition(" | ")[0] for each in found] == [
        "no route to the host.",
        "the place does not do what saves need of it: no route to the host.",
    ]


def test_listings_that_may_be_old_are_told_with_what_it_means(place: Objects) -> None:
    class Network(RecordingObjects):
        def stale_listings(self) -> str:
            return "it lies on a file system of type nfs"

    found = only(told(Network(place), "note")[1:])
    assert found.startswith("it lies on a file system of type nfs | Saves are safe.")
    assert "gc --alone" in found


# ---- clocks


@pytest.mark.parametrize(("ahead", "text"), [(3600.0, "3600 s ahead of"), (-90.0, "90 s behind")])
def test_a_clock_that_is_wrong_is_told_and_said_to_be_harmless(place: Objects, ahead: float, text: str) -> None:
    class Elsewhere(RecordingObjects):
        def list(self, prefix: str) -> Any:
            return [ObjectInfo(row.key, row.size, row.modified + ahead) for row in super().list(prefix)]

    fill(place)
    found = only(told(Elsewhere(place), "note"))
    assert f"the clock of the place is {text} that of this machine | Nothing depends on it" in found
    assert told(Elsewhere(place), "problem") == []


# ---- what lies about


def begin(place: Objects) -> Session:
    session = Session(save=new_save_id(), run="lstm", step=3, writer=this_writer(), opened=now_text(), beat=0)
    place.put(session_key(session.save), encode(session))
    return session


def test_a_save_under_way_is_told_and_is_nothing_to_tidy_up(place: Objects) -> None:
    fill(place)
    session = begin(place)
    writer = session.writer
    assert f"a save is under way: lstm@3, process {writer.pid} on {writer.host} | " in told(place, "ok")
    assert told(place, "note") == []


def test_a_save_without_a_sign_of_life_is_told_with_who_and_since_when(place: Objects) -> None:
    fill(place)
    session = begin(place)

    class Later(RecordingObjects):
        """The session was put an hour ago."""

        def list(self, prefix: str) -> Any:
            hour = 3600.0 if prefix.startswith("sessions/") else 0.0
            return [ObjectInfo(row.key, row.size, row.modified - hour) for row in super().list(prefix)]

    found = only(told(Later(place), "note"))
    assert told(Later(place), "note", grace=4000.0) == []
    assert f"by process {session.writer.pid} on {session.writer.host}, begun {session.opened}" in found
    assert "shows no sign of life | If that job was killed, all is well" in found
    assert place.get(session_key(session.save)) is not None


def test_garbage_is_counted(place: Objects) -> None:
    run = fill(place)
    [chunk] = [ref.key for ref in run.checkpoint(2)._manifest.chunks]
    size = len(place.get(chunk) or b"")
    run.delete(2)
    assert only(told(place, "note")) == (
        f"1 chunk ({size} bytes) that no checkpoint needs | ckptstore gc deletes what is garbage."
    )


def test_marks_are_counted_and_lead_to_repair(place: Objects) -> None:
    run = fill(place)
    [chunk] = [ref.key for ref in run.checkpoint(2)._manifest.chunks]
    place.delete(chunk)
    ckptstore.Store(place).verify()
    run_, marks = told(place, "note")
    assert run_ == "run lstm: 1 of 2 checkpoints damaged; the newest whole one is step 1 | See ckptstore repair."
    assert marks.startswith("1 chunk marked as damaged | ckptstore repair makes checkpoints that need them whole")


def test_a_run_of_which_nothing_is_whole_is_a_problem(place: Objects) -> None:
    fill(place)
    for row in place.list("chunks/"):
        place.delete(row.key)
    ckptstore.Store(place).verify()
    assert only(told(place, "problem")).startswith("run lstm: 2 of 2 checkpoints damaged; none can be restored")


def test_a_list_that_cannot_be_read_is_a_problem(place: Objects) -> None:
    fill(place)
    place.put(condemned_key(new_save_id()), b"no list")
    found = only(told(place, "problem"))
    assert found.startswith("1 list of condemned chunks cannot be read, so every save uploads all of its chunks")
    assert "ckptstore verify names each." in found


def test_a_damaged_manifest_is_a_problem_that_says_which_and_what_to_do(place: Objects) -> None:
    run = fill(place)
    key = str(run.checkpoint(2)._manifest.key)
    place.put(key, (place.get(key) or b"")[:-1])
    found = only(told(place, "problem"))
    assert "the manifest of step 2 of run 'lstm' is damaged" in found
    assert "ckptstore rm STORE/lstm@2" in found
    assert "ckptstore verify names all that is damaged" in found


def test_a_lost_marker_is_one_problem_and_keeps_nothing_else_from_being_looked_at(place: Objects) -> None:
    fill(place)
    place.delete("ckptstore.json")
    found = only(told(place, "problem"))
    assert "holds checkpoints and no ckptstore.json" in found
    assert "2 checkpoints, 2 chunks; every manifest can be read | " in told(place, "ok")


def test_unfinished_files_of_dead_writers_are_counted_and_stay(tmp_path: Path) -> None:
    place = LocalObjects(tmp_path)
    fill(place)
    unfinished = tmp_path / "chunks" / f".tmp-{'a' * 32}"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (0, 0))
    found = only(told(place, "note"))
    assert found == "1 unfinished file of writers that died | ckptstore gc removes them."
    assert unfinished.exists()


def test_strange_files_are_named(place: Objects) -> None:
    fill(place)
    place.put("runs/lstm/notes.txt", b"mine")
    assert only(told(place, "note")) == "runs/lstm/notes.txt is none of the store's objects | It is left alone."


def test_the_store_answers_with_the_same_findings(place: Objects) -> None:
    fill(place)
    findings = ckptstore.Store(place).examine()
    assert all(isinstance(each, Finding) for each in findings)
    assert findings == examine(place, GRACE)
