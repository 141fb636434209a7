"""What a save does beside its decisions: the beat of its session, new tries after a fence, bounded memory."""

import threading
import time
import uuid
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore import assembly, performing, pipeline, saving
from ckptstore.errors import FencedError, UnavailableError
from ckptstore.format import MARKER_KEY, SESSIONS, ManifestKey, new_save_id
from ckptstore.manifest import Ended, Marker, decode_session, encode
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects
from ckptstore.writer import now_text


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


def test_no_beat_puts_a_session_back_that_has_ended(place: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowToEnd(RecordingObjects):
        def delete(self, key: str) -> None:
            super().delete(key)
            if key.startswith(SESSIONS):
                time.sleep(0.03)  # in which a heart that was not stopped would beat

    monkeypatch.setattr(performing, "BEAT_SECONDS", 0.002)
    ckptstore.Store(SlowToEnd(place)).run("run").save({"x": torch.ones(3)}, step=1)
    assert place.list(SESSIONS) == []


def test_a_beat_that_fails_neither_ends_the_save_nor_the_beating(
    place: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = threading.Semaphore(0)

    class FailingBeats(RecordingObjects):
        def put(self, key: str, content: Any) -> None:
            if key.startswith(SESSIONS) and decode_session(bytes(content), key).beat:
                beats.release()
                raise UnavailableError("the network is down")
            if key.startswith("chunks/"):
                assert beats.acquire(timeout=30)
                assert beats.acquire(timeout=30)
            super().put(key, content)

    monkeypatch.setattr(performing, "BEAT_SECONDS", 0.002)
    run = ckptstore.Store(FailingBeats(place)).run("run")
    assert run.save({"x": torch.ones(3)}, step=1).step == 1


class Fencing(RecordingObjects):
    """A collector takes the next saves for dead, just before they commit."""

    def __init__(self, inner: Objects, times: int) -> None:
        super().__init__(inner)
        self.times = times
        self.fenced: list[str] = []

    def create(self, key: str, content: Any) -> bool:
        manifest = ManifestKey.parse(key)
        if manifest and self.times:
            self.times -= 1
            self.fenced.append(manifest.save_id)
            fence = Ended(
                state="fenced", run=manifest.run, step=manifest.step, save=manifest.save_id, created=now_text()
            )
            assert self.inner.create(key, encode(fence))
        return super().create(key, content)


def test_a_save_that_was_fenced_starts_again_under_a_new_id_and_uploads_nothing_twice(place: Objects) -> None:
    fencing = Fencing(place, times=saving.FENCED_TRIES - 1)
    run = ckptstore.Store(fencing).run("run")
    saved = run.save({"x": torch.ones(3)}, step=1)
    assert saved._manifest.save not in fencing.fenced
    assert len(set(fencing.fenced)) == saving.FENCED_TRIES - 1
    assert sum(call.operation == "put" and call.key.startswith("chunks/") for call in fencing.calls) == 1
    assert run.load(1)["x"].tolist() == [1, 1, 1]


def test_a_save_that_is_fenced_again_and_again_says_so(place: Objects) -> None:
    fencing = Fencing(place, times=100)
    run = ckptstore.Store(fencing).run("run")
    with pytest.raises(FencedError, match="step 1 of run 'run'"):
        run.save({"x": torch.ones(3)}, step=1)
    assert len(fencing.fenced) == saving.FENCED_TRIES
    assert run.steps() == []
    assert place.list(SESSIONS) == []


def test_who_loses_the_race_for_the_marker_cuts_chunks_as_the_winner_says(place: Objects) -> None:
    class Racing(RecordingObjects):
        def create(self, key: str, content: Any) -> bool:
            if key == MARKER_KEY:
                winner = Marker(store=new_save_id(), created=now_text(), chunk_bytes=65536, small_bytes=0)
                assert self.inner.create(key, encode(winner))
            return super().create(key, content)

    saved = ckptstore.Store(Racing(place)).run("run").save({"x": torch.arange(65536)}, step=1)
    assert [chunk.raw for chunk in saved._manifest.chunks] == [65536] * 8


def test_a_bundle_holds_no_more_than_a_chunk(place: Objects) -> None:
    place.create(
        MARKER_KEY, encode(Marker(store=new_save_id(), created=now_text(), chunk_bytes=4096, small_bytes=2048))
    )
    state = {str(number): torch.full((250,), float(number)) for number in range(20)}
    saved = ckptstore.Store(place).run("run").save(state, step=1)
    sizes = [chunk.raw for chunk in saved._manifest.chunks]
    assert sum(sizes) == 20_000
    assert max(sizes) == 4000
    assert len(sizes) == 5


@pytest.mark.parametrize("module", [performing, assembly], ids=["save", "restore"])
def test_what_is_under_way_is_bounded_by_its_bytes(
    place: Objects, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    state = {"x": torch.arange(65536)}
    place.create(MARKER_KEY, encode(Marker(store=new_save_id(), created=now_text(), chunk_bytes=65536, small_bytes=0)))
    run = ckptstore.Store(place).run("run")
    if module is assembly:
        run.save(state, step=1)
    weights: list[int] = []
    staged = pipeline.staged

    def watched(items: Any, stages: Any, *, weigh: Any, max_inflight_bytes: int, **others: Any) -> Any:
        weights.extend(map(weigh, items))
        assert max_inflight_bytes == pipeline.MAX_INFLIGHT_BYTES
        return staged(items, stages, weigh=weigh, max_inflight_bytes=max_inflight_bytes, **others)

    monkeypatch.setattr(module, "staged", watched)
    if module is assembly:
        run.load(1)
    else:
        run.save(state, step=1)
    assert len(weights) == 8
    assert all(weight >= 65536 for weight in weights)  # what a chunk holds at least while it is under way


def test_an_interrupt_while_the_heart_is_started_leaves_none_that_beats(
    place: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "ckptstore-heart":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckptstore.Store(place).run("run").save({"x": torch.ones(3)}, step=1)
    assert not any(thread.name == "ckptstore-heart" for thread in threading.enumerate())
