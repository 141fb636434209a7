"""A save killed at any storage call leaves the store as it was, and the next save works."""

import itertools
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import ckptstore
from ckptstore import chunk
from ckptstore.format import ManifestKey
from ckptstore.manifest import Ended, encode
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import FailingObjects
from ckptstore.writer import now_text


class Killed(BaseException):
    """What a SIGKILL looks like from within: nothing of ours runs after it."""


def state(seed: int) -> dict[str, Any]:
    """Two large tensors, one of which never changes, and small ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.arange(40_000, dtype=torch.float32),
        "weight": torch.randn(150, 150, generator=generator),
        "bias": torch.randn(7, generator=generator),
        "step": seed,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


@pytest.fixture(params=["local", "memory"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Objects]:
    if request.param == "local":
        return lambda: open_objects(tmp_path / uuid.uuid4().hex)
    return lambda: open_objects(f"memory://{uuid.uuid4().hex}")


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("replace", [False, True], ids=["new-step", "replace"])
def test_killed_at_any_call(new_place: Callable[[], Objects], how: Any, replace: bool) -> None:
    kill_at_every_call(new_place, how, replace, "fast")


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("replace", [False, True], ids=["new-step", "replace"])
def test_killed_at_any_call_of_a_save_of_differences(how: Any, replace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)  # wherever there is a base
    kill_at_every_call(lambda: open_objects(f"memory://{uuid.uuid4().hex}"), how, replace, "small")


def kill_at_every_call(new_place: Callable[[], Objects], how: Any, replace: bool, codec: Any) -> None:
    committed = 0
    for fail_at in itertools.count(1):
        place = new_place()
        run = ckptstore.Store(place, codec=codec).run("run")
        run.save(state(1), step=1)
        run.save(state(2), step=2)
        broken = FailingObjects(place, fail_at=fail_at, how=how, error=Killed, dead=True)
        new, step = state(3), 2 if replace else 3
        try:
            ckptstore.Store(broken, codec=codec).run("run").save(new, step=step, replace=replace)
        except Killed:
            pass
        else:
            assert not broken.failed
            break
        assert same(run.load(step=1), state(1))
        loaded = run.load(step=step) if step in run.steps() else None
        if loaded is not None and same(loaded, new):
            committed += 1
        else:  # as before, to the last bit
            assert loaded is None if not replace else loaded is not None and same(loaded, state(2))
        assert ckptstore.Store(place).verify().ok
        # The next save works, whatever was left behind.
        run.save(new, step=step, replace=True)
        assert same(run.load(step=step), new)
        assert run.steps() == ([1, 2] if replace else [1, 2, 3])
    assert fail_at > 10  # the walk did walk
    # Killed after the manifest was created: the checkpoint is there, only the session is left.
    assert committed >= (1 if how == "before" else 2)


def test_the_very_first_save_killed_at_any_call(new_place: Callable[[], Objects]) -> None:
    for fail_at in itertools.count(1):
        place = new_place()
        broken = FailingObjects(place, fail_at=fail_at, error=Killed, dead=True)
        try:
            ckptstore.Store(broken).run("run").save(state(1), step=1)
        except Killed:
            pass
        else:
            break
        run = ckptstore.Store(place).run("run")
        found = run.restore({"weight": torch.zeros(150, 150)})
        assert found is None or found.step == 1
        run.save(state(1), step=1)
        assert same(run.load(), state(1))
    assert fail_at > 15


def test_any_call_failing_once_is_an_error_or_a_success_that_holds(new_place: Callable[[], Objects]) -> None:
    hows: list[Literal["before", "after"]] = ["before", "after"]
    for how in hows:
        for fail_at in itertools.count(1):
            place = new_place()
            run = ckptstore.Store(place).run("run")
            run.save(state(1), step=1)
            broken = FailingObjects(place, fail_at=fail_at, how=how)
            try:
                saved = ckptstore.Store(broken).run("run").save(state(2), step=2)
            except ckptstore.UnavailableError:
                saved = None
            if saved is not None:
                assert same(run.load(step=2), state(2))
            assert same(run.load(step=1), state(1))
            run.save(state(2), step=2)
            assert same(run.load(), state(2))
            if not broken.failed:
                break
        assert fail_at > 8


def test_a_save_that_failed_before_its_commit_leaves_no_session(new_place: Callable[[], Objects]) -> None:
    place = new_place()
    ckptstore.Store(place).run("run").save(state(1), step=1)

    class FullDisk(FailingObjects):
        def put(self, key: str, content: Any) -> None:
            if key.startswith("chunks/"):
                raise ckptstore.UnavailableError("the disk is full")
            super().put(key, content)

    with pytest.raises(ckptstore.UnavailableError, match="the disk is full"):
        ckptstore.Store(FullDisk(place, fail_at=10**9)).run("run").save(state(2), step=2)
    assert place.list("sessions/") == []
    assert ckptstore.Store(place).run("run").steps() == [1]


class Fencing(FailingObjects):
    """A collector that takes the first `times` saves for dead, just before they commit."""

    times = 1

    def create(self, key: str, content: Any) -> bool:
        parsed = ManifestKey.parse(key)
        if parsed is not None and self.times > 0:
            self.times -= 1
            fence = Ended(state="fenced", run=parsed.run, step=parsed.step, save=parsed.save_id, created=now_text())
            assert super().create(key, encode(fence))
        return super().create(key, content)


def test_a_save_that_was_fenced_is_done_again_under_another_id(new_place: Callable[[], Objects]) -> None:
    place = new_place()
    fencing = Fencing(place, fail_at=10**9)
    saved = ckptstore.Store(fencing).run("run").save(state(1), step=1)
    assert fencing.times == 0
    assert saved.new_bytes == 0  # what the first try uploaded was found again
    assert same(ckptstore.Store(place).run("run").load(), state(1))
    assert place.list("sessions/") == []


def test_a_save_that_is_fenced_again_and_again_is_an_error(new_place: Callable[[], Objects]) -> None:
    place = new_place()
    fencing = Fencing(place, fail_at=10**9)
    fencing.times = 99
    with pytest.raises(ckptstore.FencedError, match="Save again"):
        ckptstore.Store(fencing).run("run").save(state(1), step=1)
    assert ckptstore.Store(place).run("run").steps() == []


def test_an_interrupt_stops_a_save_in_good_order(new_place: Callable[[], Objects]) -> None:
    place = new_place()
    for fail_at in itertools.count(1):
        broken = FailingObjects(place, fail_at=fail_at, error=KeyboardInterrupt)
        try:
            ckptstore.Store(broken).run("run").save(state(fail_at), step=fail_at)
        except KeyboardInterrupt:
            assert not any(thread.name.startswith("ckptstore") for thread in threading.enumerate())
        else:
            break
    assert fail_at > 10
    assert ckptstore.Store(place).verify().ok


def test_a_lost_answer_to_the_commit_is_told_from_a_lost_race() -> None:
    place = open_objects(f"memory://{uuid.uuid4().hex}")

    class LostAnswer(FailingObjects):
        """The manifest arrives; the answer does not, and the retry is refused, as by S3."""

        def create(self, key: str, content: Any) -> bool:
            created = super().create(key, content)
            return False if key.startswith("runs/") else created

    saved = ckptstore.Store(LostAnswer(place, fail_at=10**9)).run("run").save(state(1), step=1)
    assert saved.step == 1
    assert place.list("sessions/") == []
    assert same(ckptstore.Store(place).run("run").load(), state(1))
