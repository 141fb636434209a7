"""torch.distributed.checkpoint on a store: four ranks on gloo, sharded and replicated, saved, resharded and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from tests import dcp_scenarios as scenarios
from tests.ranks import Ranks
from tests.servers import S3Server

RUN = scenarios.RUN


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything, saved by four ranks as step 4, by two as step 2, by a grid of 2 x 2 as step 22."""
    root = tmp_path_factory.mktemp("saved") / "store"
    for step, shape in ((4, (4,)), (2, (2,)), (22, (2, 2)), (1, (1,))):
        ranks.run(scenarios.save_all, str(root), step, *shape)
    return root


def everything() -> dict[str, Any]:
    return {"sharded": scenarios.tensors(), "replicated": scenarios.tensors(), **scenarios.values()}


@pytest.mark.parametrize("step", [4, 2, 22, 1])
def test_without_torch_distributed_it_is_an_ordinary_checkpoint(saved: Path, step: int) -> None:
    store = ckptstore.Store(saved)
    state = store.run(RUN).load(step)
    expected = everything()
    held, nested = state.pop("held"), state.pop("nested")
    assert torch.equal(held[0], expected.pop("held")[0])
    assert torch.equal(nested["a"]["b"][1]["d"], expected.pop("nested")["a"]["b"][1]["d"])
    scenarios.assert_holds(state, expected)
    assert list(state) == list(expected)


def test_everything_verifies_and_no_session_is_left(saved: Path) -> None:
    assert ckptstore.Store(saved).verify().ok
    assert list((saved / "sessions").iterdir()) == []


@pytest.mark.parametrize("step", [4, 2, 22, 1])
@pytest.mark.parametrize("shape", [(4,), (2,), (1,), (2, 2)], ids=str)
def test_what_any_number_of_ranks_has_saved_any_other_loads(
    ranks: Ranks, saved: Path, step: int, shape: tuple[int, ...]
) -> None:
    ranks.run(scenarios.load_all, str(saved), step, *shape)


def test_a_replicated_tensor_is_stored_once_and_ranks_share_the_work(ranks: Ranks, tmp_path: Path) -> None:
    done = ranks.run(scenarios.save_and_count, str(tmp_path), 1, 4)
    chunks = [[key for key in keys if key.startswith("chunks/")] for keys in done]
    digests = [key.split(".")[0] for keys in chunks for key in keys]
    assert all(chunks)
    manifest = ckptstore.Store(tmp_path).run(RUN).checkpoint()._manifest
    assert len(digests) == len(set(digests)) == len(manifest.chunks)


def test_one_session_is_opened_by_rank_0_before_anything_else_and_the_manifest_comes_last(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(scenarios.save_all, str(tmp_path), 1, 1)  # the store is there
    first, *others = ranks.run(scenarios.save_and_count, str(tmp_path), 2, 4)
    assert first[0].startswith("sessions/")
    assert first[-1].startswith(f"runs/{RUN}/")
    assert not [key for key in first[1:-1] if not key.startswith("chunks/")]
    assert not [key for keys in others for key in keys if not key.startswith("chunks/")]


def test_no_two_ranks_upload_under_one_id_and_all_are_told_to_be_of_the_session(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks.run(scenarios.save_and_count, str(tmp_path), 1, 4)
    [session] = [key for key in first if key.startswith("sessions/")]
    ids = [{key.split(".")[1] for key in keys if key.startswith("chunks/")} for keys in (first, *others)]
    for number, own in enumerate(ids):
        assert not own & set().union(*ids[:number])
        assert all(session.removesuffix(".json").endswith(each[8:]) for each in own)


def test_saving_the_same_again_uploads_nothing(ranks: Ranks, tmp_path: Path) -> None:
    raw, new = ranks.run(scenarios.save_all, str(tmp_path), 1, 4)[0]
    assert new > 0.5 * raw
    for keys in ranks.run(scenarios.save_and_count, str(tmp_path), 2, 4):
        assert not [key for key in keys if key.startswith("chunks/")]
    assert ckptstore.Store(tmp_path).run(RUN).checkpoint(2).new_bytes == 0
    assert ranks.run(scenarios.save_all, str(tmp_path), 2, 4)[0] == (raw, 0)  # the step itself again: what is there


def test_what_is_cut_alike_is_stored_once_for_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """With chunks shorter than shards, those inside of them are the same for two ranks, for four, and for one."""
    store = scenarios.small_chunks(tmp_path)
    for step, count in ((4, 4), (2, 2), (1, 1)):
        ranks.run(scenarios.save_all, store, step, count)
    run = ckptstore.Store(tmp_path).run(RUN)

    def chunks_of(step: int, name: str) -> set[str]:
        manifest = run.checkpoint(step)._manifest
        segment = manifest.segments[manifest.tree["sharded"][name]["segment"]]
        return {manifest.chunks[index].digest for index in segment.chunks}

    for name in ("rows", "halves", "bytes"):
        for step in (2, 4):
            whole, cut = chunks_of(1, name), chunks_of(step, name)
            assert len(whole - cut) <= step - 1, name  # those that a border of shards goes through
    plain = run.save({"sharded": scenarios.tensors(), "replicated": scenarios.tensors(), **scenarios.values()}, step=9)
    assert plain.new_bytes < 0.01 * plain.stored_bytes


def test_what_is_small_is_bundled_alike_for_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(scenarios.save_small, str(tmp_path), 1, 4)
    ranks.run(scenarios.save_small, str(tmp_path), 2, 2)
    run = ckptstore.Store(tmp_path).run(RUN)
    assert run.checkpoint(2).new_bytes == 0
    assert len(run.checkpoint()._manifest.chunks) == 1
    assert (
        run.save({name: scenarios.numbers(7, 5, seed=number) for number, name in enumerate("abc")}, step=3).new_bytes
        == 0
    )


def test_each_rank_reads_only_chunks_that_hold_a_part_of_its_shards(ranks: Ranks, tmp_path: Path) -> None:
    store = scenarios.small_chunks(tmp_path)
    ranks.run(scenarios.save_all, store, 1, 1)
    read = [set(keys) for keys in ranks.run(scenarios.load_and_count, store, 1)]
    run = ckptstore.Store(tmp_path).run(RUN)
    manifest = run.checkpoint()._manifest
    number = manifest.tree["sharded"]["rows"]["segment"]
    whole = {manifest.chunks[index].key for index in manifest.segments[number].chunks}
    assert len(whole) > 8
    assert set().union(*read) == whole
    for own in read:
        assert len(own) <= len(whole) // 4 + 2


def test_shards_that_make_up_no_grid_are_saved_too(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(scenarios.save_old_shards, str(tmp_path), 1)
    store = ckptstore.Store(tmp_path)
    assert torch.equal(store.run(RUN).load()["odd"], scenarios.numbers(200, 200))
    assert store.verify().ok


def test_a_part_of_a_state_is_loaded(ranks: Ranks, saved: Path) -> None:
    ranks.run(scenarios.load_a_part, str(saved), 4)


def test_what_the_checkpoint_lacks_is_left_alone_or_refused_as_the_planner_says(ranks: Ranks, saved: Path) -> None:
    ranks.run(scenarios.load_what_is_not_there, str(saved), 4, True)
    for failed in ranks.outcomes(scenarios.load_what_is_not_there, str(saved), 4, False):
        assert "Missing key in checkpoint state_dict: unheard of" in str(failed)


@pytest.mark.parametrize(("in_process", "count"), [(False, 4), (True, 2)], ids=["thread", "process"])
def test_a_save_in_the_background_holds_what_was_there_when_it_began(
    ranks: Ranks, tmp_path: Path, in_process: bool, count: int
) -> None:
    ranks.run(scenarios.save_in_the_background, str(tmp_path), 5, in_process, count)
    ranks.run(scenarios.load_from_the_background, str(tmp_path), 5)
    assert torch.equal(ckptstore.Store(tmp_path).run(RUN).load()["rows"], scenarios.tensors()["rows"])


def test_planners_that_cache_plans_save_every_step_in_a_session_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    """From the second save on ranks are given the plan of the first, and with it what they were told then."""
    for step, changed in ((1, False), (2, False), (3, True), (4, True)):
        ranks.run(scenarios.save_plans_cached, str(tmp_path), step, changed)
    store = ckptstore.Store(tmp_path)
    run = store.run(RUN)
    for step, changed in ((1, False), (2, False), (3, True), (4, True)):
        expected = {"rows": scenarios.tensors()["rows"], "weight": scenarios.numbers(30, 40) + step, "step": step}
        scenarios.assert_holds(run.load(step), expected | ({"more": scenarios.tensors()["columns"]} if changed else {}))
        manifest = run.checkpoint(step)._manifest
        assert any(chunk.save[8:] == manifest.save[8:] for chunk in manifest.chunks)
    assert store.verify().ok


def test_ranks_save_to_a_bucket_and_load_from_it(ranks: Ranks, seaweed_s3: S3Server) -> None:
    place = (f"s3://{seaweed_s3.new_bucket()}/ckpts", seaweed_s3.storage_options)
    ranks.run(scenarios.save_all, place, 1, 4)
    ranks.run(scenarios.load_all, place, 1, 2, 2)
    store = ckptstore.Store(*place)
    assert store.verify().ok
    assert ranks.run(scenarios.save_all, place, 2, 4)[0][1] == 0


def test_fsdp_over_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(scenarios.save_in_two_dimensions, str(tmp_path), 1)[0]
    state = ckptstore.Store(tmp_path).run(RUN).load()
    scenarios.assert_holds(scenarios.only_tensors(state), scenarios.only_tensors(expected))
