"""The trainer on many processes: one of them is killed, or their number changes, and it is the same training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckptstore
from tests.strategies import assert_same

SETTINGS = (
    *("--vocab-size", "60", "--embed-size", "32", "--hidden-size", "48", "--batch-size", "8", "--bptt", "10"),
    *("--epochs", "50", "--save-every", "10", "--print-every", "50", "--threads", "1", "--dropout", "0.2"),
)
SECONDS = 150
STEPS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{number * number % 59}" for number in range(4000)))
    return file


def command(text: Path, store: Path, steps: int, processes: int, *more: str) -> list[str]:
    train = ["train", "--text", str(text), "--store", str(store), "--run", "run", "--steps", str(steps), *SETTINGS]
    if processes == 1:
        return [sys.executable, "-m", "trainer", *train]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, *more, "-m", "--", "trainer", *train]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def trained(arguments: Sequence[str]) -> str:
    """Run it to its end; what it prints."""
    done = subprocess.run(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def training(arguments: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def wait_for_step(store: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    run = ckptstore.Store(store).run("run")
    while not any(saved >= step for saved in run.steps()):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {SECONDS} s"
        time.sleep(0.02)


def assert_same_training(one: Path, other: Path, step: int) -> None:
    ours, theirs = (ckptstore.Store(store).run("run").load(step) for store in (one, other))
    for part in ("model", "optimizer", "hidden", "rng", "rngs", "step"):
        assert_same(ours[part], theirs[part])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    store = tmp_path_factory.mktemp("unbroken") / "store"
    trained(command(text, store, STEPS, 4))
    return store


@pytest.mark.parametrize("how", [(), ("--async",)], ids=["sync", "async"])
def test_a_worker_of_four_is_killed_and_the_training_ends_as_if_it_had_not_been(
    tmp_path: Path, text: Path, unbroken: Path, how: tuple[str, ...]
) -> None:
    store = tmp_path / "killed"
    with training([*command(text, store, STEPS, 4, "--max-restarts", "2"), *how]) as process:
        wait_for_step(store, 20)
        os.kill(workers(process)[2], signal.SIGKILL)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert "resumed from step" in output
    assert_same_training(store, unbroken, STEPS)
    assert ckptstore.Store(store).verify().ok


def test_four_processes_then_two_then_one_and_four_again_train_as_one_does(tmp_path: Path, text: Path) -> None:
    plain = ("--dropout", "0")  # random numbers would be others
    trained([*command(text, tmp_path / "one", 40, 1), *plain])
    for steps, processes in ((10, 4), (20, 2), (30, 1), (40, 4)):
        output = trained([*command(text, tmp_path / "team", steps, processes), *plain])
        assert f"saved step {steps} " in output
        assert ("starting anew" if steps == 10 else f"resumed from step {steps - 10} ") in output
    one, team = (ckptstore.Store(tmp_path / name).run("run") for name in ("one", "team"))
    for step in (10, 20, 30, 40):
        assert team.checkpoint(step).metrics["loss"] == pytest.approx(one.checkpoint(step).metrics["loss"], rel=1e-4)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path, text: Path) -> None:
    arguments = [*command(text, tmp_path / "store", 20, 3), "--batch-size", "8"]
    done = subprocess.run(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
    )
    assert done.returncode != 0
    assert "--batch-size 8 cannot be split over 3 processes" in done.stdout
    assert not (tmp_path / "store").exists()
