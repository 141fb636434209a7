"""Models and optimizers through torch.distributed.checkpoint, between DDP, FSDP2, one process, and Run."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import ckptstore
from ckptstore.cli import main
from ckptstore.integrations.dcp import CkptstoreReader, CkptstoreWriter
from tests import dcp_scenarios as scenarios
from tests.ranks import Ranks
from tests.strategies import assert_same

RUN = scenarios.RUN
CHAIN = [("fsdp", 4), ("fsdp", 2), ("ddp", 1), ("fsdp", 4), ("ddp", 2)]

# DCP warns in a process without a group, which is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_training_goes_from_4_ranks_to_2_to_1_and_back_between_fsdp_and_ddp(ranks: Ranks, tmp_path: Path) -> None:
    kind, count = CHAIN[0]
    saved = ranks.run(scenarios.train_and_save, str(tmp_path), kind, count, 1)[0]
    for step, (kind, count) in enumerate(CHAIN[1:], 1):
        found = ranks.run(scenarios.load_and_train, str(tmp_path), kind, count, step)
        assert found[count:] == [None] * (4 - count)
        for loaded in found[:count]:
            scenarios.assert_holds(loaded, saved)
        saved = ranks.run(scenarios.train_and_save, str(tmp_path), kind, count, step + 1)[0]
    assert ckptstore.Store(tmp_path).verify().ok


def test_one_process_restores_what_ranks_have_saved_into_a_plain_model(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run(scenarios.train_and_save, str(tmp_path), "fsdp", 4, 1)[0]
    model, _ = scenarios.model_and_optimizer(seed=3)
    checkpoint = ckptstore.Store(tmp_path).run(RUN).restore({"model": model})
    assert checkpoint is not None
    scenarios.assert_holds(dict(model.state_dict()), saved["model"])
    assert checkpoint.state["optimizer"]["param_groups"][0]["lr"] == 0.01


def test_ranks_load_what_one_process_has_saved_by_run_save(ranks: Ranks, tmp_path: Path) -> None:
    model, optimizer = scenarios.model_and_optimizer(seed=1)
    state = {"model": model, "optimizer": optimizer, "step": 12, "noise": scenarios.numbers(20, 30)}
    ckptstore.Store(tmp_path).run(RUN).save(state, step=12)
    ranks.run(scenarios.load_plain, str(tmp_path), 12)


def test_the_optimizer_of_run_save_comes_back_through_dcp_in_one_process(tmp_path: Path) -> None:
    model, optimizer = scenarios.model_and_optimizer(seed=1)
    scenarios.train(model, optimizer)
    ckptstore.Store(tmp_path).run(RUN).save({"model": model, "optimizer": optimizer}, step=1)
    other, other_optimizer = scenarios.model_and_optimizer(seed=2)
    scenarios.train(other, other_optimizer)
    state = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict()}
    load(state, storage_reader=CkptstoreReader(tmp_path, run=RUN))
    scenarios.assert_holds(state["model"], dict(model.state_dict()))
    moments = optimizer.state_dict()["state"]
    for number, found in state["optimizer"]["state"].items():
        scenarios.assert_holds(found, moments[int(number)])


@pytest.mark.parametrize("as_object", [False, True])
def test_one_process_restores_an_optimizer_of_which_dcp_saved_the_plain_state(tmp_path: Path, as_object: bool) -> None:
    model, optimizer = scenarios.model_and_optimizer(seed=1)
    scenarios.train(model, optimizer)
    plain = optimizer if as_object else optimizer.state_dict()
    save({"model": model.state_dict(), "optimizer": plain}, storage_writer=CkptstoreWriter(tmp_path, run=RUN, step=1))
    other, other_optimizer = scenarios.model_and_optimizer(seed=2)
    ckptstore.Store(tmp_path).run(RUN).restore({"model": other, "optimizer": other_optimizer})
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())


def test_an_optimizer_whose_parameters_are_texts_is_refused(tmp_path: Path) -> None:
    model, optimizer = scenarios.model_and_optimizer(seed=1)
    scenarios.train(model, optimizer)
    plain = optimizer.state_dict()
    state = {"optimizer": {**plain, "state": {str(number): each for number, each in plain["state"].items()}}}
    ckptstore.Store(tmp_path).run(RUN).save(state, step=1)
    _, other_optimizer = scenarios.model_and_optimizer(seed=2)
    with pytest.raises(ckptstore.InvalidInputError, match="under texts"):
        ckptstore.Store(tmp_path).run(RUN).restore({"optimizer": other_optimizer})
    assert not other_optimizer.state


def test_stateful_objects_are_saved_and_loaded_through_their_methods(tmp_path: Path) -> None:
    model, _ = scenarios.model_and_optimizer(seed=1)
    save({"model": model}, storage_writer=CkptstoreWriter(tmp_path, run=RUN, step=1))
    other, _ = scenarios.model_and_optimizer(seed=2)
    load({"model": other}, storage_reader=CkptstoreReader(tmp_path, run=RUN))
    scenarios.assert_holds(dict(other.state_dict()), dict(model.state_dict()))


def test_the_command_line_shows_verifies_weighs_and_exports_it(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "store")
    for step, shape in ((1, (2, 2)), (2, (4,))):
        ranks.run(scenarios.save_all, place, step, *shape)
    manifest = ckptstore.Store(place).run(RUN).checkpoint(1)._manifest
    assert manifest.format == 3
    assert main(["verify", place]) == 0
    capsys.readouterr()
    assert main(["show", f"{place}/{RUN}@1"]) == 0
    assert "grid" in (shown := capsys.readouterr().out)
    assert "[301, 203]" in shown
    assert main(["du", place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["export", f"{place}/{RUN}@1", str(tmp_path / "all.pt")]) == 0
    exported = torch.load(tmp_path / "all.pt", weights_only=True)
    scenarios.assert_holds(exported["sharded"], scenarios.tensors())


def test_compaction_prune_and_collection_keep_what_ranks_have_saved(ranks: Ranks, tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path)
    for step, shape in ((1, (2, 2)), (2, (2, 2)), (3, (4,))):
        ranks.run(scenarios.save_all, str(tmp_path), step, *shape)
    store.run(RUN).compact(keep_fast=1)
    store.prune(keep_last=2)
    store.collect()
    assert store.run(RUN).steps() == [2, 3]
    assert store.verify().ok
    ranks.run(scenarios.load_all, str(tmp_path), 2, 2, 2)
