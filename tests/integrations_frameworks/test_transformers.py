"""Hugging Face's own Trainer, with `CkptstoreCallback` among its callbacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerControl, TrainerState, TrainingArguments

import ckptstore
from ckptstore.integrations.transformers import CkptstoreCallback
from ckptstore.migration import import_checkpoints
from tests.integrations_frameworks.training import chunks, damage_newest, kill_example, run_example
from tests.strategies import assert_same

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning"),
]

EXAMPLE = "transformers_gpt2.py"
SAME_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json")
"""Those that hold no times and no speeds."""


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> ckptstore.Run:
    return ckptstore.Store(tmp_path / "store").run("tiny")


@pytest.fixture
def callback(run: ckptstore.Run) -> CkptstoreCallback:
    return CkptstoreCallback(run)


def arguments(**settings: Any) -> TrainingArguments:
    steps = {"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir="out", **(steps | quiet | settings))


def trainer(callback: CkptstoreCallback, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(16, (16, 8))]
    return Trainer(model, arguments(**settings), train_dataset=data, eval_dataset=data[:2], callbacks=[callback])


def train(callback: CkptstoreCallback, **settings: Any) -> Trainer:
    training = trainer(callback, **settings)
    training.train(resume_from_checkpoint=callback.restore(training.args))
    return training


# ---- resuming


@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["foreground", "background"])
def test_a_killed_training_resumes_on_an_empty_machine_as_if_it_had_not_been_killed(
    tmp_path: Path, mode: list[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run_example(EXAMPLE, "--steps", 120, cwd=whole)
    run = ckptstore.Store(killed / "ckpts").run("transformers-gpt2")

    kill_example(EXAMPLE, "--steps", 120, *mode, cwd=killed, when=lambda: len(run.steps()) > 1)
    assert 0 < run.steps()[-1] < 120
    shutil.rmtree(killed / "out")
    run_example(EXAMPLE, "--steps", 120, *mode, cwd=killed)

    wanted = ckptstore.Store(whole / "ckpts").run("transformers-gpt2").load(120)
    found = run.load(120)
    for name in SAME_FILES:
        assert_same(found[name], wanted[name])


def test_restore_gives_none_at_a_first_start(callback: CkptstoreCallback) -> None:
    assert callback.restore("out") is None
    assert not Path("out").exists()


def test_a_folder_comes_back_with_every_file_byte_by_byte_but_those_of_torch_save(callback: CkptstoreCallback) -> None:
    train(callback)
    folder = Path("out/checkpoint-6")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    held = {name: torch.load(folder / name, weights_only=False) for name in ("optimizer.pt", "scheduler.pt")}
    shutil.rmtree("out")
    assert callback.restore(arguments()) == str(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    same = {name for name in before if before[name] == after[name]}
    assert same >= before.keys() - {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in held:
        assert_same(torch.load(folder / name, weights_only=True), held[name])


def test_a_broken_folder_of_a_killed_trainer_is_replaced(callback: CkptstoreCallback) -> None:
    train(callback)
    Path("out/checkpoint-6/model.safetensors").write_bytes(b"cut")
    Path("out/checkpoint-6/of-another-time").touch()
    callback.restore("out")
    assert Path("out/checkpoint-6/model.safetensors").stat().st_size > 1000
    assert not Path("out/checkpoint-6/of-another-time").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: ckptstore.Run, tmp_path: Path) -> None:
    train(CkptstoreCallback(run), max_steps=4)
    before = chunks(tmp_path / "store")
    train(CkptstoreCallback(run))
    damage_newest(tmp_path / "store", before)
    with pytest.warns(ckptstore.CheckpointWarning, match="Going back to step 4"):
        assert CkptstoreCallback(run).restore("again") == "again/checkpoint-4"
    assert [path.name for path in Path("again").iterdir()] == ["checkpoint-4"]
    with pytest.raises(ckptstore.CorruptError):
        CkptstoreCallback(run).restore("again", step=6)


def test_the_best_checkpoint_is_written_back_too(run: ckptstore.Run, callback: CkptstoreCallback) -> None:
    train(callback, learning_rate=0.0, load_best_model_at_end=True, save_total_limit=1)
    best = json.loads(run.load(6, only="trainer_state.json"))["best_global_step"]
    shutil.rmtree("out")
    callback.restore("out")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted({f"checkpoint-{best}", "checkpoint-6"})
    assert best == 2


def test_a_training_that_goes_back_to_an_older_step_replaces_those_after_it(run: ckptstore.Run) -> None:
    train(CkptstoreCallback(run))
    before = run.checkpoint(6).digest
    again = CkptstoreCallback(run)
    folder = again.restore("out", step=2)
    trainer(again, learning_rate=0.1).train(resume_from_checkpoint=folder)
    assert run.steps() == [2, 4, 6]
    assert run.checkpoint(6).digest != before


def test_a_run_of_something_else_is_no_training_to_go_on_with(run: ckptstore.Run, callback: CkptstoreCallback) -> None:
    run.save({"model": torch.zeros(1)}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match=r"trainer_state\.json"):
        callback.restore("out")


# ---- saving


def test_each_folder_is_a_step_with_what_was_logged_and_the_tensors_of_its_files(
    run: ckptstore.Run, callback: CkptstoreCallback
) -> None:
    training = train(callback)
    assert run.steps() == [2, 4, 6]
    assert {"loss", "eval_loss", "learning_rate"} <= run.checkpoint(4).metrics.keys()
    assert not any("runtime" in name or "per_second" in name for name in run.checkpoint(4).metrics)
    weight = run.load(6, only="model.safetensors.tensors.transformer.wte.weight")
    assert torch.equal(weight, training.model.transformer.wte.weight)
    assert run.load(6, only="optimizer.pt.torch.param_groups[0].initial_lr") == training.args.learning_rate


def test_the_limit_of_the_trainer_is_for_its_disk_and_prune_for_the_store(
    run: ckptstore.Run, callback: CkptstoreCallback, tmp_path: Path
) -> None:
    train(callback, save_total_limit=1)
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-6"]
    assert run.steps() == [2, 4, 6]
    ckptstore.Store(tmp_path / "store").prune("tiny", keep_last=1, keep_best="eval_loss")
    assert run.steps()[-1] == 6 and len(run.steps()) < 3


def test_shards_are_stored_and_written_back(run: ckptstore.Run, callback: CkptstoreCallback) -> None:
    model = trainer(callback).model
    folder = Path("out/checkpoint-7")
    model.save_pretrained(folder, max_shard_size="2KB")
    TrainerState(global_step=7).save_to_json(str(folder / "trainer_state.json"))
    shards = len(list(folder.glob("model-*-of-*.safetensors")))
    assert shards > 1
    callback.on_save(arguments(), TrainerState(global_step=7), TrainerControl())
    shutil.rmtree("out")
    folder_again = callback.restore("out")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) == shards
    assert_same(GPT2LMHeadModel.from_pretrained(folder_again).state_dict(), model.state_dict())


def test_a_model_that_is_saved_in_shards_takes_no_room_again(run: ckptstore.Run, callback: CkptstoreCallback) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=256, n_layer=1, n_head=1))
    for step, size in ((1, "1GB"), (2, "1MB")):
        folder = Path(f"out/checkpoint-{step}")
        model.save_pretrained(folder, max_shard_size=size)
        callback.on_save(arguments(), TrainerState(global_step=step), TrainerControl())
    assert run.checkpoint(2).new_bytes < run.checkpoint(1).new_bytes / 10


def test_a_training_started_anew_by_mistake_is_stopped_before_its_first_step(run: ckptstore.Run) -> None:
    train(CkptstoreCallback(run))
    anew = trainer(CkptstoreCallback(run))
    with pytest.raises(ckptstore.ConflictError, match=r"up to step 6.*restore"):
        anew.train()
    assert anew.state.global_step == 0


def test_a_training_that_resumes_from_its_own_disk_goes_on_in_the_run(run: ckptstore.Run) -> None:
    train(CkptstoreCallback(run))
    run.delete(6)
    shutil.rmtree("out/checkpoint-6")
    trainer(CkptstoreCallback(run)).train(resume_from_checkpoint=True)
    assert run.steps() == [2, 4, 6]


def test_a_search_for_hyper_parameters_is_refused(callback: CkptstoreCallback) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="hyper-parameters"):
        callback.on_save(arguments(), TrainerState(global_step=1, is_hyper_param_search=True), TrainerControl())


def test_a_failed_save_in_the_background_fails_the_training(run: ckptstore.Run, tmp_path: Path) -> None:
    run.save({"another": 1}, step=6)  # the last step, so that nothing but the end of the training can tell
    callback = CkptstoreCallback(run, background=True)
    callback._goes_on = False
    training = trainer(callback, save_steps=6)
    callback.on_train_begin = lambda *given, **named: None  # type: ignore[method-assign]
    with pytest.raises(ckptstore.ConflictError):
        training.train()


# ---- several processes


def test_two_processes_save_one_folder_and_resume_from_it_together(tmp_path: Path) -> None:
    run_example(EXAMPLE, "--steps", 20, cwd=tmp_path, processes=2)
    run = ckptstore.Store(tmp_path / "ckpts").run("transformers-gpt2")
    assert run.steps() == [10, 20]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= run.checkpoint(20).state.keys()
    shutil.rmtree("out")
    run_example(EXAMPLE, "--steps", 30, cwd=tmp_path, processes=2)
    assert run.steps() == [10, 20, 30]
    assert not Path("out/checkpoint-10").exists()


# ---- migration


def test_a_training_of_before_there_was_a_store_is_imported_and_goes_on_with_the_same_bits(
    run: ckptstore.Run, tmp_path: Path
) -> None:
    constant = {"lr_scheduler_type": "constant"}  # else it depends on the steps that there will be
    train(CkptstoreCallback(ckptstore.Store(tmp_path / "store").run("whole")), **constant)
    shutil.rmtree("out")

    training = trainer(CkptstoreCallback(run), max_steps=4, **constant)
    training.callback_handler.remove_callback(CkptstoreCallback)
    training.train()
    report = import_checkpoints(ckptstore.Store(tmp_path / "store"), "tiny", "out")
    assert [(row.source, row.outcome) for row in report.checkpoints] == [
        ("checkpoint-2", "imported"),
        ("checkpoint-4", "imported"),
    ]
    assert "loss" in run.checkpoint(4).metrics
    shutil.rmtree("out")

    train(CkptstoreCallback(run), **constant)
    assert run.steps() == [2, 4, 6]
    wanted = ckptstore.Store(tmp_path / "store").run("whole").load(6)
    found = run.load(6)
    for name in SAME_FILES:
        assert_same(found[name], wanted[name])


def test_what_the_callback_saved_is_there_already_for_an_import(run: ckptstore.Run, tmp_path: Path) -> None:
    train(CkptstoreCallback(run), max_steps=4)
    report = import_checkpoints(ckptstore.Store(tmp_path / "store"), "tiny", "out")
    assert [row.outcome for row in report.checkpoints] == ["there", "there"]
