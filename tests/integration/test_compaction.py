"""Older checkpoints stored as differences to newer ones: they stay what they are, in fewer bytes, whatever happens."""

import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.cli import main
from ckptstore.condemning import condemn_keys
from ckptstore.format import condemned_key
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import FailingObjects
from tests.strategies import assert_same

FLOATS = 100_000


@pytest.fixture(params=["memory", "local"])
def place(request: pytest.FixtureRequest, tmp_path: Any) -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else tmp_path / "store")


def states(count: int) -> Iterator[dict[str, Any]]:
    """A training: weights that move a little with each step, some that do not, and small ones in bundles."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(FLOATS, generator=generator)
    frozen = torch.randn(FLOATS, generator=generator)
    for step in range(count):
        weights = weights + 1e-4 * torch.randn(FLOATS, generator=generator)
        yield {"weights": weights, "frozen": frozen, "bias": torch.full((50,), step), "step": step}


def trained(place: Objects, count: int, codec: Any = "fast", name: str = "run") -> dict[int, dict[str, Any]]:
    run = ckptstore.Store(place, codec=codec).run(name)
    saved = dict(enumerate(states(count)))
    for step, state in saved.items():
        run.save(state, step=step, metrics={"loss": 1.0 / (step + 1)}, metadata={"note": "n"})
    return saved


def check(place: Objects, saved: dict[int, dict[str, Any]], name: str = "run") -> None:
    run = ckptstore.Store(place).run(name)
    assert run.steps() == list(saved)
    for step, state in saved.items():
        assert_same(run.load(step), state)
        assert run.checkpoint(step).metrics == {"loss": 1.0 / (step + 1)}
    assert ckptstore.Store(place).verify().ok


def links(place: Objects, step: int) -> int:
    """How many differences the weights that move are stored as, one on another."""
    manifest = ckptstore.Store(place).run("run").checkpoint(step)._manifest
    index = next(index for index in range(len(manifest.chunks)) if manifest.paths_of_chunk(index) == ["weights"])
    return len(manifest.chain(index)) - 1


def depths(place: Objects, name: str = "run") -> list[int]:
    """How many differences stand one on another in each checkpoint, at most."""
    manifests = [checkpoint._manifest for checkpoint in ckptstore.Store(place).run(name).checkpoints()]
    return [max(len(each.chain(index)) for index in range(len(each.chunks))) - 1 for each in manifests]


@pytest.mark.parametrize("codec", ["fast", "none", "small"])
def test_compacted_checkpoints_are_what_they_were_in_fewer_bytes(place: Objects, codec: str) -> None:
    saved = trained(place, 7, codec)
    store = ckptstore.Store(place, codec=codec)  # type: ignore[arg-type]
    before = store.usage().stored_bytes
    report = store.run("run").compact(keep_fast=2)
    check(place, saved)
    store.collect()
    check(place, saved)
    after = store.usage().stored_bytes
    assert (report.bytes_before, report.bytes_after) == (before, after)
    assert report.passed_over == []
    assert after < before
    if codec != "small":  # which has stored differences already
        assert report.compacted == [4, 3, 2, 1, 0]
        assert after < 0.8 * before


def test_a_difference_moves_to_the_newer_checkpoint_so_that_what_it_stood_on_can_become_one(place: Objects) -> None:
    saved = dict(enumerate(states(7)))
    for step, state in saved.items():  # in full and as the difference to that, in turn
        codec: Any = "small" if step % 2 else "fast"
        ckptstore.Store(place, codec=codec).run("run").save(state, step=step, metrics={"loss": 1.0 / (step + 1)})
    assert [links(place, step) for step in saved] == [0, 1, 0, 1, 0, 1, 0]
    ckptstore.Store(place).run("run").compact(keep_fast=1, depth=6)
    assert [links(place, step) for step in saved] == [6, 5, 4, 3, 2, 1, 0]
    ckptstore.Store(place).collect()
    check(place, saved)


def test_differences_to_the_first_checkpoint_become_differences_to_their_neighbours(place: Objects) -> None:
    saved = trained(place, 6, "small")
    assert [links(place, step) for step in saved] == [0, 1, 1, 1, 1, 1]
    ckptstore.Store(place).run("run").compact(keep_fast=1)
    assert [links(place, step) for step in saved] == [0, 1, 4, 3, 2, 1]
    check(place, saved)


def test_what_a_newer_checkpoint_stands_on_is_not_stored_twice(place: Objects) -> None:
    store = ckptstore.Store(place, codec="small")
    weights = next(states(1))["weights"]
    for step, moved in enumerate([weights, 1.0001 * weights, torch.randn(FLOATS)]):
        store.run("run").save({"weights": moved}, step=step)
    assert [links(place, step) for step in range(3)] == [0, 1, 0]  # the last has nothing in common with the others
    before = store.usage().stored_bytes
    store.run("run").compact(keep_fast=1)
    store.collect()
    assert store.usage().stored_bytes == before
    assert [links(place, step) for step in range(3)] == [0, 1, 0]


def test_a_chain_that_is_as_long_as_it_may_be_is_followed_by_a_leap_to_its_end(place: Objects) -> None:
    trained(place, 6)
    ckptstore.Store(place).run("run").compact(keep_fast=1, depth=2)
    assert depths(place) == [1, 2, 1, 2, 1, 0]


def test_the_newest_stay_as_they_are(place: Objects) -> None:
    trained(place, 6)
    before = [checkpoint._manifest for checkpoint in ckptstore.Store(place).run("run").checkpoints()]
    ckptstore.Store(place).run("run").compact(keep_fast=3)
    after = [checkpoint._manifest for checkpoint in ckptstore.Store(place).run("run").checkpoints()]
    assert after[3:] == before[3:]
    assert all(new.save != old.save for new, old in zip(after[:3], before[:3], strict=True))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_chain_is_longer_than_asked_for_also_when_the_run_has_grown(place: Objects, depth: int) -> None:
    trained(place, 5)
    run = ckptstore.Store(place).run("run")
    run.compact(keep_fast=1, depth=depth)
    assert max(depths(place)) == min(depth, 4)
    saved = trained(place, 9)
    run.compact(keep_fast=1, depth=depth)
    assert max(depths(place)) <= depth
    check(place, saved)
    ckptstore.Store(place).collect()
    check(place, saved)


def test_compacting_again_changes_nothing(place: Objects) -> None:
    trained(place, 5)
    run = ckptstore.Store(place).run("run")
    run.compact(keep_fast=1)
    again = run.compact(keep_fast=1)
    assert again.compacted == []
    assert again.bytes_before == again.bytes_after


def test_what_another_run_needs_is_not_stored_twice(place: Objects) -> None:
    trained(place, 4)
    saved = trained(place, 4, name="other")
    before = ckptstore.Store(place).usage().stored_bytes
    report = ckptstore.Store(place).run("run").compact(keep_fast=1)
    assert report.compacted == []
    assert ckptstore.Store(place).usage().stored_bytes == before
    check(place, saved, "other")


def test_a_newer_checkpoint_may_be_deleted_and_collected(place: Objects) -> None:
    saved = trained(place, 5)
    store = ckptstore.Store(place)
    store.run("run").compact(keep_fast=1)
    store.prune("run", keep_last=1, keep_every=2)
    store.collect()
    check(place, {step: saved[step] for step in (0, 2, 4)})


def test_training_goes_on_from_a_compacted_run(place: Objects) -> None:
    trained(place, 4, "small")
    ckptstore.Store(place).run("run").compact(keep_fast=1)
    check(place, trained(place, 8, "small"))
    ckptstore.Store(place).collect()
    check(place, dict(enumerate(states(8))))


def test_a_damaged_checkpoint_is_named_and_the_others_stay(place: Objects) -> None:
    saved = trained(place, 4)
    [ref] = [
        ref
        for ref in ckptstore.Store(place).run("run").checkpoint(0)._manifest.chunks
        if ref.save == ckptstore.Store(place).run("run").checkpoint(0)._manifest.save and ref.raw == 4 * FLOATS
    ][:1]
    place.put(ref.key, b"damaged")
    with pytest.raises(ckptstore.CorruptError, match="step 0 of run 'run'"):
        ckptstore.Store(place).run("run").compact(keep_fast=1)
    run = ckptstore.Store(place).run("run")
    for step in (1, 2, 3):
        assert_same(run.load(step), saved[step])
    # It is marked now, so the next compaction passes over it.
    assert ckptstore.Store(place).run("run").compact(keep_fast=1).passed_over == [0]


def two_copies(place: Objects) -> tuple[str, str]:
    """Checkpoints 0 and 1 that need the same content and have a copy each, of which these are the keys."""
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.arange(FLOATS)}, step=0)
    [old] = [ref.key for ref in run.checkpoint(0)._manifest.chunks]
    condemn_keys(place, [old])
    ckptstore.Store(place).run("run").save({"x": torch.arange(FLOATS), "more": 1}, step=1)
    for row in place.list("condemned/"):
        place.delete(row.key)
    [new] = [ref.key for ref in run.checkpoint(1)._manifest.chunks]
    assert old != new
    return old, new


def test_of_two_copies_the_older_checkpoint_takes_up_that_of_the_newer(place: Objects) -> None:
    old, new = two_copies(place)
    ckptstore.Store(place).run("run").compact(keep_fast=1)
    assert [ref.key for ref in ckptstore.Store(place).run("run").checkpoint(0)._manifest.chunks] == [new]
    ckptstore.Store(place).collect()
    assert place.get(old) is None
    assert_same(ckptstore.Store(place).run("run").load(0), {"x": torch.arange(FLOATS)})


def test_a_copy_that_is_rotten_is_not_taken_up(place: Objects) -> None:
    old, new = two_copies(place)
    content = bytearray(place.get(new) or b"")
    content[len(content) // 2] ^= 1
    place.put(new, content)
    ckptstore.Store(place).run("run").compact(keep_fast=1)
    assert [ref.key for ref in ckptstore.Store(place).run("run").checkpoint(0)._manifest.chunks] == [old]
    assert_same(ckptstore.Store(place).run("run").load(0), {"x": torch.arange(FLOATS)})


def test_a_list_of_marks_that_cannot_be_read_stops_it(place: Objects) -> None:
    saved = trained(place, 3)
    place.put(condemned_key(32 * "a"), b"damaged")
    with pytest.raises(ckptstore.CorruptError, match="a list of condemned chunks cannot be read"):
        ckptstore.Store(place).run("run").compact(keep_fast=1)
    place.delete(condemned_key(32 * "a"))
    check(place, saved)


def test_killed_at_any_call_it_leaves_every_checkpoint_whole() -> None:
    for fail_at in itertools.count(1):
        place = open_objects(f"memory://{uuid.uuid4().hex}")
        saved = trained(place, 3)
        broken = FailingObjects(place, fail_at=fail_at, error=KeyboardInterrupt)
        try:
            ckptstore.Store(broken).run("run").compact(keep_fast=1)
        except KeyboardInterrupt:
            check(place, saved)
            ckptstore.Store(place).collect(grace=0)
            check(place, saved)
        else:
            break
    assert fail_at > 20


@pytest.mark.parametrize("bad", [{"keep_fast": 0}, {"keep_fast": True}, {"depth": 0}, {"depth": 65}, {"depth": "8"}])
def test_arguments_that_make_no_sense_are_refused(place: Objects, bad: dict[str, Any]) -> None:
    trained(place, 2)
    with pytest.raises(ckptstore.InvalidInputError):
        ckptstore.Store(place).run("run").compact(**bad)


def test_a_run_that_is_not_there_is_not_found(place: Objects) -> None:
    with pytest.raises(ckptstore.NotFoundError):
        ckptstore.Store(place).run("run").compact()
    trained(place, 1)
    with pytest.raises(ckptstore.NotFoundError):
        ckptstore.Store(place).run("none").compact()


def test_the_command_line_compacts_a_run(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    trained(open_objects(store), 4)
    assert main(["compact", f"{store}/run", "--keep-fast", "1"]) == 0
    assert "3 checkpoints of 4 stored anew" in capsys.readouterr().out
    assert main(["compact", f"{store}/run", "--keep-fast", "1", "--json"]) == 0
    assert '"compacted": []' in capsys.readouterr().out
    assert main(["compact", str(store)]) == 2
    assert main(["compact", f"{store}/run@1"]) == 2


@pytest.mark.parametrize("how", ["load", "restore"])
def test_a_checkpoint_that_is_compacted_and_collected_while_it_is_read_is_read_all_the_same(how: str) -> None:
    place = open_objects(f"memory://{uuid.uuid4().hex}")
    saved = trained(place, 4)

    class Beneath(FailingObjects):
        """The first get of a chunk comes after a compaction and a collection."""

        done = False

        def get(self, key: str) -> bytes | None:
            if key.startswith("chunks/") and not self.done:
                self.done = True
                ckptstore.Store(place).run("run").compact(keep_fast=1)
                assert ckptstore.Store(place).collect().deleted > 0
            return super().get(key)

    run = ckptstore.Store(Beneath(place, fail_at=10**9)).run("run")
    if how == "load":
        assert_same(run.load(1), saved[1])
    else:
        destination = {
            "weights": torch.zeros(FLOATS),
            "frozen": torch.zeros(FLOATS),
            "bias": torch.zeros(50, dtype=torch.int64),
        }
        run.restore(destination, step=1)
        assert torch.equal(destination["weights"], saved[1]["weights"])
    assert place.list("condemned/") == []
