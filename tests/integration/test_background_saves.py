"""save_async: a copy is saved while the state changes; errors reach the caller; nothing is lost at exit."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore
from ckptstore import background, performing, segments
from ckptstore.manifest import decode_session
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import FailingObjects, RecordingObjects


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


class Slow(RecordingObjects):
    """Puts of chunks wait until they are let go."""

    def __init__(self, inner: Objects) -> None:
        super().__init__(inner)
        self.go = threading.Event()

    def put(self, key: str, content: Any) -> None:
        if key.startswith("chunks/"):
            assert self.go.wait(30)
        super().put(key, content)


def test_the_state_may_change_while_it_is_saved(place: Objects) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    weight, bias, words, array = torch.zeros(300, 300), torch.zeros(3), [1, 2], np.zeros(9)
    state = {"weight": weight, "bias": bias, "words": words, "array": array}
    pending = run.save_async(state, step=1, metrics={"loss": 1.0})
    array.fill(1)
    weight.fill_(1)
    bias.fill_(1)
    words.append(3)
    assert not pending.done()
    assert "under way" in repr(pending)
    slow.go.set()
    checkpoint = pending.result()
    assert (checkpoint.step, checkpoint.metrics) == (1, {"loss": 1.0})
    loaded = run.load()
    assert loaded["weight"].sum() == loaded["bias"].sum() == loaded["array"].sum() == 0
    assert loaded["words"] == [1, 2]
    assert pending.done()
    assert "saved" in repr(pending)


def test_result_can_be_waited_for_a_while(place: Objects) -> None:
    slow = Slow(place)
    pending = ckptstore.Store(slow).run("run").save_async({"x": torch.ones(3)}, step=1)
    with pytest.raises(TimeoutError, match="step 1 of run 'run' is still under way"):
        pending.result(timeout=0.01)
    slow.go.set()
    assert pending.result().step == 1
    assert pending.result().step == 1


def test_what_cannot_be_saved_is_told_at_once(place: Objects) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="hook is a function"):
        ckptstore.Store(place).run("run").save_async({"hook": lambda: 1}, step=1)


def test_the_next_save_waits_for_the_one_before(place: Objects) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    run.save_async({"x": torch.ones(3)}, step=1)
    threading.Timer(0.2, slow.go.set).start()
    run.save({"x": torch.zeros(3)}, step=2)
    assert run.steps() == [1, 2]


def test_threads_that_share_a_run_save_one_after_the_other(place: Objects) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    run.save_async({"x": torch.ones(3)}, step=1)
    steps = range(2, 6)
    saves = [
        (lambda step=step: run.save_async({"x": torch.full((3,), step)}, step=step)) if step % 2 else
        (lambda step=step: run.save({"x": torch.full((3,), step)}, step=step))
        for step in steps
    ]  # fmt: skip
    threads = [threading.Thread(target=save) for save in saves]
    for thread in threads:
        thread.start()
    slow.go.set()
    for thread in threads:
        thread.join()
    run.load(1)  # which waits for what is under way
    assert run.steps() == [1, *steps]
    open_sessions, most = 0, 0
    for call in slow.calls:
        if call.key.startswith("sessions/"):
            open_sessions += {"put": 1, "delete": -1}.get(call.operation, 0)
            most = max(most, open_sessions)
    assert most == 1


def test_an_interrupt_while_a_save_is_waited_for_does_not_forget_it(
    place: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    run.save_async({"x": torch.ones(3)}, step=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, "join", interrupt)
        run.save({"x": torch.zeros(3)}, step=2)
    slow.go.set()
    assert run.load(1)["x"].tolist() == [1, 1, 1]  # it was waited for, and is there


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_never_says_that_the_save_of_its_parent_is_done(place: Objects) -> None:
    slow = Slow(place)
    pending = ckptstore.Store(slow).run("run").save_async({"x": torch.ones(3)}, step=1)
    child = os.fork()
    if child == 0:
        try:
            pending.result()
        except ckptstore.UnavailableError as error:
            told = str(error)
            fine = not pending.done() and "under way in process" in repr(pending) and "forked" in told
            os._exit(0 if fine else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    slow.go.set()
    assert pending.result().step == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_does_not_skip_its_saves_for_that_of_its_parent(tmp_path: Path) -> None:
    script = """
        import os, sys, threading, torch, ckptstore
        from ckptstore.objects.local import LocalObjects
        go = threading.Event()
        class Slow(LocalObjects):
            def put(self, key, content):
                if key.startswith("chunks/"):
                    go.wait(30)
                super().put(key, content)
        run = ckptstore.Store(Slow(sys.argv[1])).run("run")
        pending = run.save_async({"x": torch.ones(3)}, step=1)
        child = os.fork()
        if child == 0:
            go.set()
            saved = run.save_async({"x": torch.zeros(3)}, step=2, if_busy="skip")
            os._exit(0 if saved.result().step == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
        go.set()
        pending.result()
    """
    child(script, tmp_path / "store")
    run = ckptstore.Store(tmp_path / "store").run("run")
    assert run.load(1)["x"].tolist() == [1, 1, 1]
    assert run.load(2)["x"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda run, path: run.restore({"x": torch.zeros(3)}),
        lambda run, path: run.load(1),
        lambda run, path: run.export(path / "x.pt", step=1),
        lambda run, path: run.delete(1),
    ],
    ids=["restore", "load", "export", "delete"],
)
def test_what_needs_the_checkpoint_waits_for_its_save_under_way(
    place: Objects, tmp_path: Path, call: Callable[[ckptstore.Run, Path], object]
) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    pending = run.save_async({"x": torch.ones(3)}, step=1)
    done: list[object] = []
    waiting = threading.Thread(target=lambda: done.append(call(run, tmp_path)))
    waiting.start()
    waiting.join(0.02)
    slow.go.set()
    waiting.join()
    assert pending.result().step == 1
    assert len(done) == 1
    assert done[0] is not None or run.steps() == []


def test_an_error_is_raised_by_result(place: Objects) -> None:
    run = ckptstore.Store(FailingObjects(place, fail_at=6)).run("run")
    pending = run.save_async({"x": torch.ones(3)}, step=1)
    with pytest.raises(ckptstore.UnavailableError):
        pending.result()
    assert "failed" in repr(pending)
    assert run.save({"x": torch.ones(3)}, step=1).step == 1  # told already, so the next one just saves


def test_an_error_that_nobody_asked_for_is_raised_by_the_next_save(place: Objects) -> None:
    store = ckptstore.Store(FailingObjects(place, fail_at=6))
    store.run("run").save_async({"x": torch.ones(3)}, step=1)
    with pytest.raises(ckptstore.UnavailableError, match=r"step 1 of run 'run' failed in the background: .*asked for"):
        store.run("run").save({"x": torch.zeros(3)}, step=2)
    assert store.run("run").save({"x": torch.zeros(3)}, step=2).step == 2


def test_a_save_while_another_is_under_way_waits_for_it_or_is_skipped(place: Objects) -> None:
    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    first = run.save_async({"x": torch.ones(3)}, step=1)
    assert run.save_async({"x": torch.zeros(3)}, step=2, if_busy="skip") is first
    slow.go.set()
    first.result()
    third = run.save_async({"x": torch.zeros(3)}, step=3, if_busy="skip")
    assert third.result().step == 3
    assert run.steps() == [1, 3]


def test_the_error_of_the_save_before_is_raised_and_not_skipped(place: Objects) -> None:
    run = ckptstore.Store(FailingObjects(place, fail_at=6)).run("run")
    pending = run.save_async({"x": torch.ones(3)}, step=1)
    while not pending.done():
        pass
    with pytest.raises(ckptstore.UnavailableError, match="step 1 of run 'run' failed in the background"):
        run.save_async({"x": torch.ones(3)}, step=2, if_busy="skip")


def test_another_policy_is_refused(place: Objects) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="if_busy must be 'wait' or 'skip', not 'queue'"):
        ckptstore.Store(place).run("run").save_async({}, step=1, if_busy="queue")  # type: ignore[arg-type]


def test_the_memory_of_a_copy_is_used_again_by_the_next_save_of_the_run(place: Objects) -> None:
    store = ckptstore.Store(place)
    model = torch.nn.Linear(300, 300)
    places = set()
    for step in range(4):
        with torch.no_grad():
            model.weight.fill_(step)
        store.run("run").save_async({"model": model}, step=step).result()
        room = store.run("run")._shared.room
        assert room is not None
        places.add(room._memory.ctypes.data)
    assert len(places) == 1
    for step in range(4):
        assert store.run("run").load(step, only="model.weight").unique().tolist() == [step]


def test_an_interrupt_that_makes_a_run_forget_its_save_does_not_let_the_next_one_write_over_its_copy(
    place: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(background.PendingSave):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            raise KeyboardInterrupt

    slow = Slow(place)
    run = ckptstore.Store(slow).run("run")
    with monkeypatch.context() as patch:
        patch.setattr("ckptstore.run.PendingSave", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.save_async({"x": torch.ones(300, 300)}, step=1)
    pending = run.save_async({"x": torch.zeros(300, 300)}, step=2)
    slow.go.set()
    pending.result()
    while 1 not in run.steps():
        pass
    assert run.load(1)["x"].unique().tolist() == [1]
    assert run.load(2)["x"].unique().tolist() == [0]


def test_a_room_that_is_far_too_large_is_given_back() -> None:
    room = segments.Room()

    def copied(count: int) -> int:
        source = segments.Source(np.full(count, 7, np.uint8), 1, private=False)
        room.detach([source], threads=1)
        assert source.private
        assert bytes(source.flat[:3]) == b"\7\7\7"
        return len(room._memory)

    assert copied(1000) == 1024
    assert copied(600) == 1024
    assert copied(100) == 128
    assert copied(3000) == 3008


def test_copies_of_several_tensors_do_not_overlap() -> None:
    sources = [segments.Source(np.full(size, size, np.uint8), 1, private=size == 70) for size in (3, 64, 0, 70, 65)]
    private = sources[3].flat
    segments.Room().detach(sources, threads=2)
    assert [bytes(source.flat) for source in sources] == [bytes([size]) * size for size in (3, 64, 0, 70, 65)]
    assert sources[3].flat is private
    assert all(source.private for source in sources)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_save_in_the_background_gives_way_to_the_training_and_no_other_thread_does(place: Objects) -> None:
    priorities: dict[str, int] = {}

    class Watching(RecordingObjects):
        def connect(self) -> None:
            priorities["connect"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

        def put(self, key: str, content: Any) -> None:
            if key.startswith("chunks/"):
                priorities["put"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            super().put(key, content)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    run = ckptstore.Store(Watching(place)).run("run")
    run.save_async({"x": torch.ones(3)}, step=1).result()
    assert priorities == {"connect": before, "put": min(before + 10, 19)}
    run.save({"x": torch.zeros(3)}, step=2)
    assert priorities["put"] == before
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_progress_is_told_of_what_is_uploaded_and_of_nothing_if_nothing_is(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    state = {"a": torch.arange(40_000), "b": torch.ones(40_000), "small": torch.ones(3)}
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    run.save(state, step=1, progress=tell)
    assert told[-1] == (480_012, 480_012)
    assert told == sorted(told)
    told.clear()
    state["a"] = state["a"] + 1
    run.save_async(state, step=2, progress=tell).result()
    assert told == [(320_000, 320_000)]
    told.clear()
    run.save(state, step=3, progress=tell)
    assert told == []


def test_failed_saves_do_not_keep_their_copies(place: Objects) -> None:
    class Down(RecordingObjects):
        def create(self, key: str, content: Any) -> bool:
            raise ckptstore.UnavailableError("down")

        def get(self, key: str) -> bytes | None:
            raise ckptstore.UnavailableError("down")

    run = ckptstore.Store(Down(place)).run("run")
    for step in range(3):
        state = {"x": torch.ones(300, 300)}
        pending = run.save_async(state, step=step)
        with pytest.raises(ckptstore.UnavailableError):
            pending.result()
    del pending
    gc.collect()
    assert background._under_way == set()
    arrays = [each for each in gc.get_objects() if type(each) is segments.Source and each.bytes == 360_000]
    assert arrays == []


def test_a_long_save_keeps_its_session_beating(place: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performing, "BEAT_SECONDS", 0.01)
    slow = Slow(place)
    pending = ckptstore.Store(slow).run("run").save_async({"x": torch.ones(3)}, step=1)
    while len([key for key in slow.keys("put") if key.startswith("sessions/")]) < 4:
        assert not pending.done()
    [session] = [row.key for row in place.list("sessions/")]
    assert decode_session(place.get(session) or b"", session).beat >= 2
    slow.go.set()
    pending.result()
    assert place.list("sessions/") == []


def child(script: str, folder: Path, *, check: bool = True) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], capture_output=True, text=True, check=check
    )


def test_an_interpreter_that_ends_waits_for_the_save(tmp_path: Path) -> None:
    script = """
        import sys, time, torch, ckptstore
        from ckptstore.objects.local import LocalObjects
        class Slow(LocalObjects):
            def put(self, key, content):
                time.sleep(0.3)
                super().put(key, content)
        ckptstore.Store(Slow(sys.argv[1])).run("run").save_async({"x": torch.ones(300, 300)}, step=1)
        raise SystemExit(3)
    """
    assert child(script, tmp_path / "store", check=False).returncode == 3
    assert ckptstore.Store(tmp_path / "store").run("run").load()["x"].sum() == 90_000


def test_an_error_that_nobody_asked_for_is_printed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    script = """
        import sys, torch, ckptstore
        ckptstore.Store(sys.argv[1]).run("run").save_async({"x": torch.ones(3)}, step=17)
    """
    ended = child(script, tmp_path / "file")
    assert "the save of step 17 of run 'run' FAILED in the background, and nobody asked" in ended.stderr
    assert "is a file, but a store is a folder" in ended.stderr
