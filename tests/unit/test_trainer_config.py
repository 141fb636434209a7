"""The trainer's options, and when it saves."""

import re
from pathlib import Path

import pytest

from trainer.config import ConfigError, Options, SaveSchedule, parse_options, steps_between_saves, young_daly_seconds


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    for command in ("train", "evaluate", "generate"):
        assert parse_options([command]) == (command, Options())


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_help_explains_each_option_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options([command, "--help"])
    printed = capsys.readouterr().out
    options = re.findall(r"^  (?:-h, )?(--[a-z-]+(?: [A-Z]+)?(?: \[[A-Z]+ \.\.\.\])?)\s+(\S.*)", printed, re.MULTILINE)
    assert len(options) == printed.partition("options:")[2].count("  --") + 1
    assert "None" not in printed
    assert "()" not in printed
    assert "CKPTSTORE_URL" in printed


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_URL", "s3://bucket/ckpts")
    arguments = "--run r --text a b --save-every auto --mtbf 2 --async --epochs 3 --steps 4 --batch-size 5 --bptt 6"
    arguments += " --lr 0.1 --clip 2 --dropout 0.5 --vocab-size 7 --embed-size 8 --hidden-size 9 --log l"
    arguments += ' --print-every 1 --seed 10 --threads 2 --device meta --storage-options {"anon":true}'
    assert parse_options(["train", *arguments.split()])[1] == Options(
        store="s3://bucket/ckpts",
        storage_options={"anon": True},
        run="r",
        text=[Path("a"), Path("b")],
        device="meta",
        threads=2,
        seed=10,
        save_every="auto",
        mtbf=2.0,
        save_async=True,
        epochs=3,
        steps=4,
        batch_size=5,
        bptt=6,
        lr=0.1,
        clip=2.0,
        dropout=0.5,
        vocab_size=7,
        embed_size=8,
        hidden_size=9,
        log=Path("l"),
        print_every=1,
    )
    generate = ["--step", "5", "--prompt", "Hear", "--words", "3", "--temperature", "0"]
    assert parse_options(["generate", "--store", "x", *generate])[1] == Options(
        store="x", step=5, prompt="Hear", words=3, temperature=0.0
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "--steps must be above 0, not 0"),
        ({"batch_size": -1}, "--batch-size must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0, not nan"),
        ({"mtbf": float("inf")}, "--mtbf"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1"),
        ({"temperature": -0.5}, "--temperature must be at least 0"),
        ({"save_every": "often"}, "--save-every is a number of steps"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Options(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[1]", "{", "anon=true"])
def test_storage_options_that_are_no_object(text: str) -> None:
    with pytest.raises(ConfigError, match="--storage-options is a JSON object"):
        parse_options(["train", "--storage-options", text])


@pytest.mark.parametrize(("text", "steps"), [("200", 200), ("1", 1), ("10ep", 370), ("1ep", 37), ("auto", None)])
def test_save_every(text: str, steps: int | None) -> None:
    assert steps_between_saves(text, steps_per_epoch=37) == steps


@pytest.mark.parametrize("text", ["", "0", "0ep", "-5", "1.5", "10 ep", "10epochs", "ep", "AUTO", "٣"])
def test_save_every_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        steps_between_saves(text, steps_per_epoch=37)


def test_young_daly() -> None:
    # A save of half a second, a failure a day: every 294 s. One of 2 minutes, a failure every 50 hours: every 110 min.
    assert young_daly_seconds(0.5, 86_400) == pytest.approx(293.94, abs=0.01)
    assert young_daly_seconds(120, 50 * 3600) == pytest.approx(6572.7, abs=0.1)
    assert young_daly_seconds(0, 86_400) == 0


def test_schedule_of_steps_and_epochs() -> None:
    for save_every, expected in (("20", [20, 40, 60]), ("2ep", [30, 60])):
        schedule = SaveSchedule(Options(save_every=save_every), steps_per_epoch=15, start=7)
        assert [step for step in range(8, 61) if schedule.due(step)] == expected


def test_schedule_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("trainer.config.time.monotonic", lambda: now)
    schedule = SaveSchedule(Options(save_every="auto", mtbf=1.0), steps_per_epoch=15, start=100)
    assert not schedule.due(109)
    assert schedule.due(110)
    schedule.saved(stall_seconds=2.0)
    now = 1000 + 119.9  # √(2 · 2 s · 3600 s) = 120 s
    assert not schedule.due(500)
    now = 1000 + 120.1
    assert schedule.due(501)
