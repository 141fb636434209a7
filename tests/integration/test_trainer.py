"""The trainer with a real store: killed anywhere and started again, it ends where an unbroken run ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from tests.tiny_trainer import tiny_options, write_tiny_text
from trainer import __main__, loop
from trainer.config import ConfigError, Options
from trainer.demo import count_equal_tensors
from trainer.model import LanguageModel


class Killed(Exception):
    """Stands for a kill: nothing of the training runs after it."""


def losses(path: Path) -> dict[int, float]:
    """Return the loss of each step; of a step done twice, both must agree."""
    found: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        assert found.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return found


def final_state(options: Options) -> Any:
    return ckptstore.Store(options.store).run(options.run).load()


def test_the_model_is_the_fixed_one() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in LanguageModel().state_dict().items()}
    assert shapes == {
        "embedding.weight": (10_000, 300),
        "lstm.weight_ih_l0": (2000, 300),
        "lstm.weight_hh_l0": (2000, 500),
        "lstm.bias_ih_l0": (2000,),
        "lstm.bias_hh_l0": (2000,),
        "linear.weight": (10_000, 500),
        "linear.bias": (10_000,),
    }


@pytest.mark.parametrize("save_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("killed_at", [1, 6, 12, 38, 45])
def test_killed_and_resumed_ends_as_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_async: bool, killed_at: int
) -> None:
    common = {"dropout": 0.3, "save_every": "6", "save_async": save_async}
    unbroken = tiny_options(tmp_path, run="unbroken", log=tmp_path / "unbroken.jsonl", **common)
    broken = tiny_options(tmp_path, run="broken", log=tmp_path / "broken.jsonl", **common)
    loop.train(unbroken)

    with monkeypatch.context() as patch:
        step_of_optimizer = torch.optim.Adam.step
        calls = 0

        def step(self: torch.optim.Adam) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed
            step_of_optimizer(self)

        patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(Killed):
            loop.train(broken)
    torch.rand(killed_at)  # whatever the generators were, the checkpoint brings its own
    loop.train(broken)

    assert losses(tmp_path / "broken.jsonl") == losses(tmp_path / "unbroken.jsonl")
    assert count_equal_tensors(final_state(broken), final_state(unbroken)) > 20


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny_options(tmp_path, steps=3)
    loop.train(options)
    capsys.readouterr()
    loop.train(options)
    printed = capsys.readouterr().out
    assert "resumed from step 3" in printed
    assert "nothing to do: step 3 of 3 is done" in printed


def test_auto_saves_after_the_warm_up_and_at_the_end(tmp_path: Path) -> None:
    options = tiny_options(tmp_path, save_every="auto", steps=15)
    loop.train(options)
    assert ckptstore.Store(options.store).run(options.run).steps() == [10, 15]


def test_other_options_are_refused(tmp_path: Path) -> None:
    loop.train(tiny_options(tmp_path, steps=2))
    with pytest.raises(ConfigError, match=r"--lr was 0\.001, now 0\.1"):
        loop.train(tiny_options(tmp_path, steps=4, lr=0.1))
    with pytest.raises(ConfigError, match=r"--hidden-size was \d+, now 16"):
        loop.train(tiny_options(tmp_path, steps=4, hidden_size=16))
    other = write_tiny_text(tmp_path / "other.txt", seed=1)
    with pytest.raises(ConfigError, match="--text is another text"):
        loop.train(tiny_options(tmp_path, steps=4, text=(other,)))
    with pytest.raises(ConfigError, match="another text"):
        loop.evaluate(tiny_options(tmp_path, text=(other,)))


def test_evaluate_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_tiny_text(tmp_path / "tiny.txt")
    loop.train(tiny_options(tmp_path, save_every="10", steps=20))
    capsys.readouterr()
    shared = ["--store", str(tmp_path / "store"), "--text", str(text)]
    for step in (10, 20):
        assert run_trainer("evaluate", *shared, "--step", str(step)) == 0
        assert capsys.readouterr().out.startswith(f"step {step}: validation loss ")
    written = []
    for seed in ("1", "1", "2"):
        assert run_trainer("generate", *shared, "--prompt", "Ba be", "--words", "30", "--seed", seed) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != written[2]
    assert written[0].startswith("Ba be")
    assert "<unk>" not in written[0]


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_tiny_text(tmp_path / "tiny.txt")
    store = str(tmp_path / "store")
    assert run_trainer("generate", "--store", store, "--text", str(text)) == 1
    assert run_trainer("train", "--store", store, "--text", str(text), "--batch-size", "5000") == 2
    assert run_trainer("train", "--store", store, "--save-every", "x") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)


def run_trainer(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["trainer", *arguments])
        return __main__.main()
