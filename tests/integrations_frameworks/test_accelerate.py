"""Accelerate's own Accelerator, its states saved to a store and loaded from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch.utils.data import DataLoader

import ckptstore
from ckptstore.integrations import accelerate as integration
from ckptstore.integrations.accelerate import load_state, save_state, save_state_async
from tests.integrations_frameworks.training import chunks, damage_newest, kill_example, run_example
from tests.strategies import assert_same

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning"),
]

EXAMPLE = "accelerate_gru.py"


@pytest.fixture
def run(tmp_path: Path) -> ckptstore.Run:
    return ckptstore.Store(tmp_path / "store").run("tiny")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Counter:
    """A registered object."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Training:
    def __init__(self, **settings: Any) -> None:
        self.accelerator = Accelerator(cpu=True, **settings)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def step(self) -> None:
        self.accelerator.backward(self.model(torch.randn(2, 4)).square().mean())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.counter.count += 1

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "counter")}
        return {name: part.state_dict() for name, part in parts.items()} | {"rng": torch.get_rng_state()}


def test_a_killed_training_resumes_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run_example(EXAMPLE, "--steps", 400, cwd=whole)
    run = ckptstore.Store(killed / "ckpts").run("accelerate-gru")

    kill_example(EXAMPLE, "--steps", 400, cwd=killed, when=lambda: len(run.steps()) > 1)
    newest = run.steps()[-1]
    assert 0 < newest < 400
    assert f"beginning at step {newest}" in run_example(EXAMPLE, "--steps", 400, cwd=killed)

    assert_same(run.load(400), ckptstore.Store(whole / "ckpts").run("accelerate-gru").load(400))


def test_all_that_was_prepared_and_registered_comes_back(run: ckptstore.Run) -> None:
    saved = Training()
    for _ in range(3):
        saved.step()
    checkpoint = save_state(saved.accelerator, run, step=3, metrics={"loss": 1.0}, metadata={"note": "x"})
    assert (checkpoint.step, checkpoint.metrics, checkpoint.metadata) == (3, {"loss": 1.0}, {"note": "x"})
    wanted = saved.state()

    loaded = Training()
    found = load_state(loaded.accelerator, run)
    assert found is not None and found.step == 3
    assert_same(loaded.state(), wanted)


def test_the_position_of_a_stateful_data_loader_comes_back(run: ckptstore.Run) -> None:
    def prepared() -> tuple[Accelerator, Any]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
        return accelerator, accelerator.prepare(DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]

    accelerator, loader = prepared()
    batches = iter(loader)
    next(batches)
    save_state(accelerator, run, step=1)
    wanted = [batch.tolist() for batch in batches]

    again, loader_again = prepared()
    load_state(again, run)
    assert [batch.tolist() for batch in loader_again] == wanted


def test_nothing_is_loaded_at_a_first_start(run: ckptstore.Run) -> None:
    training = Training()
    before = training.state()
    assert load_state(training.accelerator, run) is None
    assert_same(training.state(), before)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: ckptstore.Run, tmp_path: Path) -> None:
    training = Training()
    save_state(training.accelerator, run, step=1)
    before = chunks(tmp_path / "store")
    training.step()
    save_state(training.accelerator, run, step=2)
    damage_newest(tmp_path / "store", before)
    with pytest.warns(ckptstore.CheckpointWarning, match="Going back to step 1"):
        found = load_state(training.accelerator, run)
    assert found is not None and found.step == 1
    assert training.counter.count == 0


def test_a_damaged_checkpoint_changes_nothing(run: ckptstore.Run, tmp_path: Path) -> None:
    training = Training()
    save_state(training.accelerator, run, step=1)
    damage_newest(tmp_path / "store", set())
    training.step()
    before = training.state()
    with pytest.raises(ckptstore.CorruptError):
        load_state(training.accelerator, run, step=1)
    assert_same(training.state(), before)


def test_a_save_in_the_background_holds_the_state_of_that_moment(run: ckptstore.Run) -> None:
    training = Training()
    wanted = training.state()
    pending = save_state_async(training.accelerator, run, step=0)
    training.step()
    assert pending is not None and pending.result().step == 0
    load_state(training.accelerator, run)
    assert_same(training.state(), wanted)


def test_the_folder_is_gone_afterwards(run: ckptstore.Run, tmp_path: Path) -> None:
    training = Training()
    save_state(training.accelerator, run, step=1, folder=tmp_path / "shared")
    load_state(training.accelerator, run, folder=tmp_path / "shared")
    assert list((tmp_path / "shared").iterdir()) == []


def test_settings_go_to_accelerate(run: ckptstore.Run) -> None:
    training = Training()
    saved = save_state(training.accelerator, run, step=1, safe_serialization=False)
    assert "pytorch_model.bin" in saved.state
    load_state(training.accelerator, run)


def test_another_state_of_the_same_step_is_refused_unless_it_is_to_be_replaced(run: ckptstore.Run) -> None:
    training = Training()
    save_state(training.accelerator, run, step=1)
    training.step()
    with pytest.raises(ckptstore.ConflictError):
        save_state(training.accelerator, run, step=1)
    save_state(training.accelerator, run, step=1, replace=True)


def test_folders_that_accelerate_names_itself_are_refused(run: ckptstore.Run, tmp_path: Path) -> None:
    project = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    training = Training(project_config=project)
    with pytest.raises(ckptstore.InvalidInputError, match="automatic_checkpoint_naming"):
        save_state(training.accelerator, run, step=1)


def test_a_run_of_something_else_is_refused(run: ckptstore.Run) -> None:
    run.save({"model": torch.zeros(1)}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match="no state of an Accelerator"):
        load_state(Training().accelerator, run)


def test_a_folder_that_other_machines_do_not_see_is_an_error(
    run: ckptstore.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()

    class Two:
        num_processes = 2

    monkeypatch.setattr(integration, "_first", lambda accelerator, act: act())
    read = integration._read
    monkeypatch.setattr(integration, "_read", lambda accelerator, place: read(Two, place))
    with pytest.raises(ckptstore.InvalidInputError, match="of 2 processes only 1"):
        save_state(training.accelerator, run, step=1)


def test_two_processes_save_one_checkpoint_and_resume_from_it_together(tmp_path: Path) -> None:
    run = ckptstore.Store(tmp_path / "ckpts").run("accelerate-gru")
    run_example(EXAMPLE, "--steps", 20, cwd=tmp_path, processes=2)
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= run.checkpoint(20).state.keys()
    assert "beginning at step 20" in run_example(EXAMPLE, "--steps", 40, cwd=tmp_path, processes=2)
    assert run.steps() == [20, 40]
