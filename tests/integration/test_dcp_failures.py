"""Saves and loads of many ranks when something goes wrong: on one rank, on all, or in the store."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import ckptstore
from ckptstore.errors import CorruptError, FencedError, InvalidInputError, UnavailableError
from tests import dcp_scenarios as scenarios
from tests.ranks import Failed, Ranks

RUN = scenarios.RUN
NOBODY = -1


def failures(outcomes: list[Any]) -> list[dict[int, BaseException]]:
    """What each rank was told: the errors by rank. All of them have to have raised DCP's exception."""
    told = []
    for outcome in outcomes:
        assert isinstance(outcome, Failed), outcome
        assert isinstance(outcome.error, CheckpointException), outcome
        told.append({rank: error for rank, (error, _) in outcome.error.failures.items()})
    return told


@pytest.mark.parametrize("failing", [0, 2])
def test_if_one_rank_fails_all_ranks_raise_its_error_and_nothing_is_to_be_seen(
    ranks: Ranks, tmp_path: Path, failing: int
) -> None:
    store = ckptstore.Store(tmp_path)
    ranks.run(scenarios.save_all, str(tmp_path), 1, 4)
    outcomes = ranks.outcomes(scenarios.save_while_one_fails, str(tmp_path), 2, failing)
    for told in failures(outcomes):
        assert list(told) == [failing]
        assert isinstance(told[failing], UnavailableError)
        assert "no room for chunks/" in str(told[failing])
    assert store.run(RUN).steps() == [1]
    ranks.run(scenarios.load_all, str(tmp_path), 1, 4)


def test_the_session_of_a_save_that_failed_is_closed_and_a_collection_takes_what_it_left(
    ranks: Ranks, tmp_path: Path
) -> None:
    store = ckptstore.Store(tmp_path)
    ranks.run(scenarios.save_all, str(tmp_path), 1, 4)
    outcomes = ranks.outcomes(scenarios.save_while_one_fails, str(tmp_path), 2, 3)
    assert all(isinstance(outcome, Failed) for outcome in outcomes)
    del outcomes
    assert ranks.run(scenarios.sessions_after_the_failure, str(tmp_path)) == [0] * 4
    report = store.collect()
    assert report.waiting == []
    assert report.garbage == report.deleted > 0
    assert store.verify().ok
    assert store.usage().unreferenced_bytes == 0


def test_after_a_failure_the_next_save_finds_what_was_uploaded(ranks: Ranks, tmp_path: Path) -> None:
    ranks.outcomes(scenarios.save_while_one_fails, str(tmp_path), 1, 3)
    left = {path.name for path in (tmp_path / "chunks").rglob("*.*")}
    ranks.run(scenarios.save_while_one_fails, str(tmp_path), 1, NOBODY)
    manifest = ckptstore.Store(tmp_path).run(RUN).checkpoint()._manifest
    assert left & {f"{chunk.digest}.{chunk.save}" for chunk in manifest.chunks}


def test_if_a_rank_is_killed_nothing_is_to_be_seen_and_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    pair = Ranks(2)
    try:
        pair.start(scenarios.save_while_one_is_killed, str(tmp_path), 1)
        assert pair.outcome(1) is None
        assert isinstance(pair.outcome(0), Failed)
    finally:
        pair.stop()
    store = ckptstore.Store(tmp_path)
    assert store.run(RUN).steps() == []
    assert list((tmp_path / "chunks").rglob("*.*"))
    saved = store.run(RUN).save({"rows": scenarios.numbers(400, 300)}, step=1)
    assert saved.step == 1
    store.collect(grace=0)
    assert store.usage().unreferenced_bytes == 0
    assert torch.equal(store.run(RUN).load()["rows"], scenarios.numbers(400, 300))


def test_a_collection_takes_nothing_from_ranks_that_are_saving(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.run(scenarios.save_during_a_collection, str(tmp_path), 1, 600.0)
    assert outcomes[1] == [1]
    store = ckptstore.Store(tmp_path)
    assert store.verify().ok
    assert list((tmp_path / "condemned").glob("*")) == []  # not even marked
    ranks.run(scenarios.load_all, str(tmp_path), 1, 4)


def test_a_save_that_a_collection_has_taken_for_dead_fails_on_all_ranks_and_can_be_repeated(
    ranks: Ranks, tmp_path: Path
) -> None:
    outcomes = ranks.outcomes(scenarios.save_during_a_collection, str(tmp_path), 1, 0.0)
    for told in failures(outcomes):
        assert list(told) == [0]
        assert isinstance(told[0], FencedError)
        assert "step 1 of run 'lstm'" in str(told[0])
    store = ckptstore.Store(tmp_path)
    assert store.run(RUN).steps() == []
    ranks.run(scenarios.save_all, str(tmp_path), 1, 4)
    assert store.verify().ok


def test_another_state_of_a_saved_step_is_a_conflict_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(scenarios.save_values, str(tmp_path), 1, 1)
    for told in failures(ranks.outcomes(scenarios.save_values, str(tmp_path), 1, 2)):
        assert isinstance(told[0], ckptstore.ConflictError)
    assert ckptstore.Store(tmp_path).run(RUN).load()["odd"] == {"one": 1}


def test_what_cannot_be_saved_is_refused_by_its_key_before_a_chunk_is_put(ranks: Ranks, tmp_path: Path) -> None:
    for told in failures(ranks.outcomes(scenarios.save_values, str(tmp_path), 1, pickle.dumps)):
        [error] = told.values()
        assert isinstance(error, InvalidInputError)
        assert "odd.one is a builtin_function_or_method" in str(error)
    assert ckptstore.Store(tmp_path).run(RUN).steps() == []


def test_a_damaged_chunk_fails_the_load_of_the_ranks_that_need_it_and_is_named(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(scenarios.save_all, str(tmp_path), 1, 4)
    ranks.run(scenarios.save_all, str(tmp_path), 2, 2)
    manifest = ckptstore.Store(tmp_path).run(RUN).checkpoint(2)._manifest
    first = {chunk.key for chunk in ckptstore.Store(tmp_path).run(RUN).checkpoint(1)._manifest.chunks}
    segment = manifest.segments[manifest.tree["sharded"]["rows"]["segment"]]
    keys = [manifest.chunks[index].key for index in segment.chunks]
    assert not first & set(keys)
    path = tmp_path / keys[-1]  # the lower half of the rows, which the first of four ranks has nothing of
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for told in failures(ranks.outcomes(scenarios.load_and_count, str(tmp_path), 2)):
        assert set(told) == {1, 2, 3}
        assert isinstance(told[3], CorruptError)
        assert f"step 2 of run 'lstm': sharded.rows: the chunk {keys[-1]}" in str(told[3])
    # It is marked now: the newest checkpoint that is known to be good is the one before.
    assert ranks.run(scenarios.load_the_newest, str(tmp_path)) == [1] * 4


def test_ranks_that_have_found_different_newest_checkpoints_say_so(ranks: Ranks, tmp_path: Path) -> None:
    for step in (1, 2):
        ranks.run(scenarios.save_values, str(tmp_path), step, step)
    for told in failures(ranks.outcomes(scenarios.load_the_newest_that_only_some_see, str(tmp_path), [1, 2, 1, 1])):
        assert "the ranks have found different newest checkpoints (lstm@1, lstm@2)" in str(told[0])


def test_a_checkpoint_that_is_not_there_is_an_error_of_ckptstore_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for told in failures(ranks.outcomes(scenarios.load_the_newest, str(tmp_path))):
        assert set(told) == {0, 1, 2, 3}
        assert all(isinstance(error, ckptstore.NotFoundError) for error in told.values())


def test_ranks_that_do_not_see_one_store_say_so_and_nothing_is_saved(ranks: Ranks, tmp_path: Path) -> None:
    for told in failures(ranks.outcomes(scenarios.save_to_places_of_their_own, str(tmp_path), 1)):
        assert set(told) == {1, 2, 3}
        assert all("does not see the store that the coordinator sees" in str(error) for error in told.values())
    assert ckptstore.Store(tmp_path / "0").run(RUN).steps() == []


def test_of_ranks_that_save_each_by_itself_the_first_alone_may(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks.run(scenarios.save_without_the_others, str(tmp_path))
    assert first == "saved"
    assert all("saves by itself (no_dist=True" in told for told in others)
    assert torch.equal(ckptstore.Store(tmp_path).run(RUN).load(1)["x"], torch.zeros(3))
