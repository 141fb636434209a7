"""Lightning's own Trainer and Fabric, with `CkptstoreIO` below them."""

import argparse
import pickle
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import ckptstore
from ckptstore.integrations.lightning import CkptstoreIO
from ckptstore.migration import import_checkpoints
from ckptstore.objects.base import Bytes, Objects
from ckptstore.objects.memory import MemoryObjects
from ckptstore.testing import RecordingObjects
from tests.integrations_frameworks.training import chunks, damage_newest, kill_example, run_example
from tests.strategies import assert_same

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning"),
]

RUN = "tiny"


class Tiny(LightningModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_index: int) -> None:
        # Worse and worse, so that the first checkpoints are the best.
        self.log("val_loss", torch.tensor(float(self.current_epoch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2)


def trainer(io: CkptstoreIO, *, epochs: int = 3, **settings: Any) -> Trainer:
    settings.setdefault("callbacks", [ModelCheckpoint(dirpath="saved", save_top_k=-1)])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, accelerator="cpu", plugins=[io], **quiet, **settings)


def fit(io: CkptstoreIO, *, model: Tiny | None = None, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    training = trainer(io, **settings)
    training.fit(model or Tiny(), loader(), loader(), ckpt_path=ckpt_path)
    return training


def names(io: CkptstoreIO) -> list[str]:
    return [Path(path).name for path in io.paths()]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    return ckptstore.Store(tmp_path / "store")


@pytest.fixture
def io(store: ckptstore.Store) -> CkptstoreIO:
    return CkptstoreIO(store, RUN)


# ---- resuming


@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["foreground", "background"])
def test_a_killed_training_resumes_on_an_empty_machine_as_if_it_had_not_been_killed(
    tmp_path: Path, mode: list[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run_example("lightning_lstm.py", "--epochs", 12, cwd=whole)
    run = ckptstore.Store(killed / "ckpts").run("lightning-lstm.last")

    kill_example("lightning_lstm.py", "--epochs", 12, *mode, cwd=killed, when=lambda: len(run.steps()) > 0)
    assert 0 < run.steps()[-1] < 12 * 17
    shutil.rmtree(killed / "checkpoints", ignore_errors=True)
    run_example("lightning_lstm.py", "--epochs", 12, *mode, cwd=killed)

    wanted = ckptstore.Store(whole / "ckpts").run("lightning-lstm.last").load()
    found = run.load()
    for state in (wanted, found):
        state.pop("callbacks")  # these hold the paths of the two folders
    assert_same(found, wanted)


def test_latest_is_none_at_a_first_start(io: CkptstoreIO) -> None:
    assert io.latest() is None


@pytest.fixture
def damaged(store: ckptstore.Store, io: CkptstoreIO) -> CkptstoreIO:
    """A run of steps 3, 6 and 9, in which a chunk of step 9 alone is damaged."""
    fit(io, epochs=2)
    before = chunks(Path(store.url))
    fit(io, ckpt_path=io.latest())
    damage_newest(Path(store.url), before)
    return CkptstoreIO(store, RUN)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(damaged: CkptstoreIO) -> None:
    path = damaged.latest()
    assert path is not None and path.endswith("epoch=2-step=9.ckpt")
    with pytest.warns(ckptstore.CheckpointWarning, match="Going back to step 6"):
        assert damaged.load_checkpoint(path)["global_step"] == 6


def test_a_damaged_checkpoint_that_is_asked_for_by_its_path_is_an_error(damaged: CkptstoreIO) -> None:
    with pytest.raises(ckptstore.CorruptError):
        damaged.load_checkpoint("saved/epoch=2-step=9.ckpt")


def test_weights_alone_are_never_what_a_training_is_resumed_from(store: ckptstore.Store, io: CkptstoreIO) -> None:
    whole = ModelCheckpoint(dirpath="saved", save_top_k=1, every_n_epochs=2)
    weights = ModelCheckpoint(dirpath="weights", save_top_k=-1, save_weights_only=True)
    fit(io, callbacks=[whole, weights])
    latest = io.latest()
    assert latest is not None
    assert Path(latest).parent.name == "saved"
    assert "optimizer_states" in io.load_checkpoint(latest)


def test_the_words_last_and_best_of_lightning_mean_what_they_mean_with_files(io: CkptstoreIO) -> None:
    callback = ModelCheckpoint(dirpath="saved", monitor="val_loss", save_top_k=1, save_last=True)
    training = fit(io, callbacks=[callback])
    assert Path(callback.best_model_path).name == "epoch=0-step=3.ckpt"
    training.validate(Tiny(), loader(), ckpt_path="best", verbose=False)
    assert training.ckpt_path == callback.best_model_path
    resumed = fit(io, epochs=4, ckpt_path="last", callbacks=[ModelCheckpoint(dirpath="saved", save_last=True)])
    assert resumed.global_step == 12


def test_a_link_to_the_last_checkpoint_is_followed(store: ckptstore.Store, io: CkptstoreIO) -> None:
    fit(
        io, callbacks=[ModelCheckpoint(dirpath="saved", save_top_k=2, monitor="val_loss", mode="max", save_last="link")]
    )
    assert Path("saved/last.ckpt").is_symlink()
    assert io.load_checkpoint("saved/last.ckpt")["global_step"] == 9
    assert store.runs() == [RUN]


def test_a_checkpoint_of_before_there_was_a_store_is_resumed_from(io: CkptstoreIO) -> None:
    plain = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath="plain", filename="old")],
    )
    plain.fit(Tiny(), loader(), loader())
    assert fit(io, ckpt_path="plain/old.ckpt").global_step == 9


# ---- paths and checkpoints


def test_each_checkpoint_is_the_step_of_its_name_with_what_was_monitored(
    store: ckptstore.Store, io: CkptstoreIO
) -> None:
    fit(io, callbacks=[ModelCheckpoint(dirpath="saved", monitor="val_loss", save_top_k=-1)])
    run = store.run(RUN)
    assert run.steps() == [3, 6, 9]
    assert run.checkpoint(6).metrics == {"val_loss": 1.0}
    assert run.load(6, only="state_dict").keys() == {"layer.weight", "layer.bias"}


def test_what_model_checkpoint_removes_is_deleted_from_the_store(store: ckptstore.Store, io: CkptstoreIO) -> None:
    fit(io, callbacks=[ModelCheckpoint(dirpath="saved", monitor="val_loss", mode="max", save_top_k=1, save_last=True)])
    assert store.run(RUN).steps() == [9]
    assert store.run(f"{RUN}.last").steps() == [9]
    assert names(io) == ["epoch=2-step=9.ckpt", "last.ckpt"]
    assert sorted(path.name for path in Path("saved").iterdir()) == ["epoch=2-step=9.ckpt", "last.ckpt"]


def test_paths_that_share_a_step_and_a_name_are_kept_apart(io: CkptstoreIO) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("a", 4.0)):
        io.save_checkpoint({"global_step": 7, "weights": torch.tensor(value)}, f"{folder}/x.ckpt")
    found = {folder: io.load_checkpoint(f"{folder}/x.ckpt")["weights"].item() for folder in "abc"}
    assert found == {"a": 4.0, "b": 2.0, "c": 3.0}


def test_a_path_that_moves_to_another_step_leaves_nothing_behind(store: ckptstore.Store, io: CkptstoreIO) -> None:
    for step in (1, 2, 3):
        io.save_checkpoint({"global_step": step}, "last.ckpt")
    assert store.run(RUN).steps() == [3]


def test_what_a_killed_move_left_behind_goes_with_the_next_save(store: ckptstore.Store, io: CkptstoreIO) -> None:
    path = str(Path("last.ckpt").absolute())
    for step in (1, 2):
        about = {"run": RUN, "path": path, "resumable": True}
        store.run(RUN).save({"global_step": step}, step=step, metadata={"lightning": about})
    assert io.latest() == path
    assert io.load_checkpoint(path) == {"global_step": 2}
    io.save_checkpoint({"global_step": 3}, "last.ckpt")
    assert store.run(RUN).steps() == [3]


def test_a_step_that_holds_something_else_is_left_alone(store: ckptstore.Store, io: CkptstoreIO) -> None:
    store.run(RUN).save({"mine": 1}, step=5)
    io.save_checkpoint({"global_step": 5}, "x.ckpt")
    assert store.run(RUN).load(5) == {"mine": 1}
    assert io.load_checkpoint("x.ckpt") == {"global_step": 5}


def test_a_path_is_found_by_its_end_on_another_machine(store: ckptstore.Store, io: CkptstoreIO) -> None:
    io.save_checkpoint({"global_step": 5}, "somewhere/saved/x.ckpt")
    io.save_checkpoint({"global_step": 6}, "elsewhere/saved/x.ckpt")
    shutil.rmtree("somewhere")
    shutil.rmtree("elsewhere")
    fresh = CkptstoreIO(store, RUN)
    assert fresh.load_checkpoint("somewhere/saved/x.ckpt") == {"global_step": 5}
    assert fresh.load_checkpoint(Path("elsewhere/saved/x.ckpt")) == {"global_step": 6}
    with pytest.raises(ckptstore.InvalidInputError, match="give more of the path"):
        fresh.load_checkpoint("x.ckpt")


def test_a_path_without_a_checkpoint_is_an_error_that_lists_those_with_one(io: CkptstoreIO) -> None:
    io.save_checkpoint({"global_step": 5}, "x.ckpt")
    with pytest.raises(ckptstore.NotFoundError, match=r"'y.ckpt'. It has: .*x.ckpt"):
        io.load_checkpoint("y.ckpt")


def test_a_placeholder_of_another_store_is_an_error_that_names_the_store(io: CkptstoreIO, tmp_path: Path) -> None:
    CkptstoreIO(tmp_path / "other", RUN).save_checkpoint({"global_step": 5}, "x.ckpt")
    with pytest.raises(ckptstore.InvalidInputError, match="other"):
        io.load_checkpoint("x.ckpt")


def test_a_training_started_anew_by_mistake_replaces_nothing(store: ckptstore.Store, io: CkptstoreIO) -> None:
    fit(io)
    before = store.run(RUN).load(3)
    shutil.rmtree("saved")
    with pytest.raises(ckptstore.ConflictError, match="latest"):
        fit(CkptstoreIO(store, RUN))
    assert_same(store.run(RUN).load(3), before)


def test_what_is_removed_twice_or_was_pruned_is_no_error(store: ckptstore.Store, io: CkptstoreIO) -> None:
    for step in (1, 2):
        io.save_checkpoint({"global_step": step}, f"{step}.ckpt")
    store.run(RUN).delete(1)
    io.remove_checkpoint("1.ckpt")
    io.remove_checkpoint("1.ckpt")
    assert names(io) == ["2.ckpt"]
    assert not Path("1.ckpt").exists()


def test_an_exported_checkpoint_is_a_file_that_a_module_loads(io: CkptstoreIO) -> None:
    fit(io, model=Tiny(width=7))
    io.export("epoch=2-step=9.ckpt", "model.ckpt")
    assert Tiny.load_from_checkpoint("model.ckpt", weights_only=True).hparams["width"] == 7


# ---- what is in a checkpoint


def test_hyper_parameters_of_common_types_come_back_as_they_were(store: ckptstore.Store, io: CkptstoreIO) -> None:
    settings = {"data": Path("/data"), "args": argparse.Namespace(width=3), "sizes": (1, 2), "rate": 1e-3}
    fit(io, model=Tiny(**settings))
    loaded = CkptstoreIO(store, RUN).load_checkpoint(io.latest() or "")
    assert loaded["hyper_parameters"] == settings


def test_a_hyper_parameter_that_cannot_be_saved_is_named_with_the_way_out(io: CkptstoreIO) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match=r"hyper_parameters\.activation is a .*ignore="):
        fit(io, model=Tiny(activation=torch.nn.functional.relu))
    assert io.paths() == []


def test_a_function_that_maps_locations_is_refused(io: CkptstoreIO) -> None:
    io.save_checkpoint({"global_step": 5}, "x.ckpt")
    with pytest.raises(ckptstore.InvalidInputError, match="map_location"):
        io.load_checkpoint("x.ckpt", map_location=lambda storage, location: storage)


# ---- in the background


class Gate(RecordingObjects):
    """Lets no checkpoint be made while it is shut, nor when it is broken."""

    def __init__(self, inner: Objects) -> None:
        super().__init__(inner)
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_broken = False

    def create(self, key: str, content: Bytes) -> bool:
        self.is_open.wait(timeout=20)
        if self.is_broken:
            raise ckptstore.UnavailableError("a failure that a test asked for")
        return super().create(key, content)


def test_in_the_background_an_old_checkpoint_stays_until_the_new_one_is_there() -> None:
    gate = Gate(MemoryObjects(f"memory://{uuid.uuid4()}"))
    run = ckptstore.Store(gate).run(RUN)
    io = CkptstoreIO(ckptstore.Store(gate), RUN, background=True)
    io.save_checkpoint({"global_step": 1}, "1.ckpt")
    io.teardown()

    gate.is_open.clear()
    io.save_checkpoint({"global_step": 2}, "2.ckpt")
    io.remove_checkpoint("1.ckpt")
    assert run.steps() == [1]
    assert Path("1.ckpt").exists()
    gate.is_open.set()
    io.teardown()
    assert run.steps() == [2]
    assert not Path("1.ckpt").exists()


def test_in_the_background_an_old_checkpoint_stays_if_the_new_one_fails() -> None:
    gate = Gate(MemoryObjects(f"memory://{uuid.uuid4()}"))
    run = ckptstore.Store(gate).run(RUN)
    CkptstoreIO(ckptstore.Store(gate), RUN).save_checkpoint({"global_step": 1}, "1.ckpt")
    io = CkptstoreIO(ckptstore.Store(gate), RUN, background=True)
    gate.is_open.clear()
    gate.is_broken = True
    io.save_checkpoint({"global_step": 2}, "2.ckpt")
    io.remove_checkpoint("1.ckpt")
    gate.is_open.set()
    with pytest.raises(ckptstore.UnavailableError):
        io.teardown()
    io.teardown()
    assert run.steps() == [1]
    assert not Path("2.ckpt").exists()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_name_that_exists_is_numbered_as_with_files(store: ckptstore.Store, background: bool) -> None:
    io = CkptstoreIO(store, RUN, background=background)
    fit(io, callbacks=[ModelCheckpoint(dirpath="saved", filename="same", monitor="val_loss", save_top_k=-1)])
    assert names(io) == ["same.ckpt", "same-v1.ckpt", "same-v2.ckpt"]
    assert store.run(RUN).steps() == [3, 6, 9]


def test_in_the_background_what_was_saved_is_the_state_of_that_moment(store: ckptstore.Store) -> None:
    io = CkptstoreIO(store, RUN, background=True)
    weights = torch.zeros(1000)
    io.save_checkpoint({"global_step": 1, "weights": weights}, "1.ckpt")
    weights.add_(1)
    assert io.load_checkpoint("1.ckpt")["weights"].sum() == 0


# ---- several processes, and Fabric


def test_of_two_processes_only_that_of_rank_0_saves_and_both_resume(store: ckptstore.Store) -> None:
    settings: dict[str, Any] = {"strategy": "ddp_spawn", "devices": 2}
    fit(CkptstoreIO(store.url, RUN), epochs=1, **settings)
    assert store.runs() == [RUN]
    assert store.run(RUN).steps() == [2]
    fit(CkptstoreIO(store.url, RUN), epochs=2, ckpt_path=CkptstoreIO(store.url, RUN).latest(), **settings)
    assert store.run(RUN).steps() == [2, 4]


def test_what_is_sent_to_another_process_still_knows_what_the_latest_was(store: ckptstore.Store) -> None:
    io = CkptstoreIO(store.url, RUN, background=True)
    io.save_checkpoint({"global_step": 1}, "1.ckpt")
    before = chunks(Path(store.url))
    io.save_checkpoint({"global_step": 2, "weights": torch.ones(9)}, "2.ckpt")
    latest = io.latest()
    again = pickle.loads(pickle.dumps(io))
    damage_newest(Path(store.url), before)
    with pytest.warns(ckptstore.CheckpointWarning, match="Going back to step 1"):
        assert again.load_checkpoint(latest) == {"global_step": 1}


def test_a_store_object_cannot_be_sent_to_another_process(io: CkptstoreIO) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="URL"):
        pickle.dumps(io)


def test_fabric_saves_and_loads_through_it(store: ckptstore.Store, io: CkptstoreIO) -> None:
    fabric = Fabric(accelerator="cpu", plugins=[io])
    model = torch.nn.Linear(2, 2)
    fabric.save("at-5.ckpt", {"model": model, "step": 5})
    fabric.save("no-step.ckpt", {"model": model})
    other = torch.nn.Linear(2, 2)
    remainder = fabric.load("at-5.ckpt", {"model": other})
    assert remainder == {"step": 5}
    assert torch.equal(other.weight, model.weight)
    assert store.run(RUN).steps() == [5]
    assert names(io) == ["no-step.ckpt", "at-5.ckpt"]
    assert Path(io.latest() or "").name == "at-5.ckpt"


# ---- migration


def fit_without_a_store(epochs: int) -> None:
    """Lightning's own files, as they were before there was a store."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = ModelCheckpoint(dirpath="saved", save_top_k=-1, save_last=True)
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback], **quiet).fit(Tiny(width=7), loader(), loader())


def test_a_training_of_before_there_was_a_store_is_imported_and_goes_on(
    store: ckptstore.Store, io: CkptstoreIO
) -> None:
    fit_without_a_store(epochs=3)
    report = import_checkpoints(store, RUN, "saved")
    assert not report.failed
    assert store.run(RUN).steps() == [3, 6, 9]
    assert store.run(f"{RUN}.last").steps() == [9]
    shutil.rmtree("saved")
    latest = io.latest()
    assert latest is not None
    assert Path(latest).name == "last.ckpt"
    training = fit(io, model=Tiny(width=7), ckpt_path=latest, epochs=5)
    assert training.global_step == 15
    assert store.run(RUN).steps() == [3, 6, 9, 12, 15]


def test_an_imported_checkpoint_is_exported_as_a_file_that_a_module_loads(
    store: ckptstore.Store, io: CkptstoreIO
) -> None:
    fit_without_a_store(epochs=1)
    import_checkpoints(store, RUN, "saved")
    before = torch.load("saved/epoch=0-step=3.ckpt", weights_only=True)
    io.export("epoch=0-step=3.ckpt", "again.ckpt")
    assert_same(torch.load("again.ckpt", weights_only=True), before)
    assert Tiny.load_from_checkpoint("again.ckpt", weights_only=True).hparams["width"] == 7
