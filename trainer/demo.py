"""`python -m trainer.demo`: train, kill the training in the middle of a save, resume it, prove that nothing was lost.

Every line of its verdict is computed from what happened. Uses the commands and files that every user has: the trainer's
and ckptstore's command lines, the logs of losses, and what lies in the store's folder (docs/format.md).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.text import Text

import ckptstore

STORE = Path("demo-ckpts")
STEPS, SAVE_EVERY = 120, 30
TRIES = 3
"""To meet a save in the act. It takes a tenth of a second or more, so the first try all but always does."""

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo could not be carried out; says nothing about what it was to prove."""


@dataclass
class Child:
    """A command that runs beside us: its lines are shown as they come, and kept."""

    arguments: list[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        console.print(Text(f"$ python -m {' '.join(self.arguments)}", style="bold"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "110"},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            console.print(Text("  │ ", style="dim"), Text(line.rstrip()), sep="")

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join()
        return code

    def run(self) -> list[str]:
        """Wait for it to succeed; return its lines."""
        if code := self.wait():
            raise DemoError(f"python -m {' '.join(self.arguments)} ended with exit code {code}.")
        return self.lines


def train_command(run: str, log: Path) -> list[str]:
    schedule = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--print-every", "10"]
    return ["trainer", "train", "--store", str(STORE), "--run", run, *schedule, "--log", str(log)]


def kill_in_save(child: Child, run: str) -> str | None:
    """Kill `child` while it saves, when an older checkpoint stands; return the save's id, or None if it got through."""
    try:
        while child.process.poll() is None:
            for session in STORE.glob("sessions/*.json"):
                manifests = [path.name for path in STORE.glob(f"runs/{run}/*.json")]
                # The first save has its manifest for a moment before its session goes: that one is not meant.
                others = [name for name in manifests if session.stem not in name]
                if others == manifests and others and written_files(session.stem):
                    child.process.send_signal(signal.SIGKILL)
                    killed = child.wait() == -signal.SIGKILL
                    committed = any(STORE.glob(f"runs/{run}/*.{session.stem}.json"))
                    return session.stem if killed and not committed else None
            time.sleep(0.001)
    except BaseException:
        child.process.kill()
        raise
    child.run()
    return None


def written_files(save_id: str) -> int:
    """Count the chunks, and their temporary files, that a save has written."""
    return sum(1 for folder in ("chunks", "deltas") for _ in STORE.glob(f"{folder}/*/*{save_id}*"))


def read_log(path: Path) -> list[tuple[int, float]]:
    """Return (step, loss) as logged. JSON keeps a float's every bit. A line cut off by the kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def count_equal_tensors(one: Any, other: Any) -> int:
    """Return how many tensors and arrays two states hold; -1 if anything in them differs."""
    if type(one) is not type(other):
        return -1
    if isinstance(one, torch.Tensor):
        # Bytes, not numbers: 0.0 and -0.0 differ.
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        return 1 if same else -1
    if isinstance(one, numpy.ndarray):
        return 1 if one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes() else -1
    if isinstance(one, dict):
        pairs = [*zip(one.values(), other.values(), strict=False)] if list(one) == list(other) else [(0, "")]
    elif isinstance(one, list | tuple):
        pairs = [*zip(one, other, strict=True)] if len(one) == len(other) else [(0, "")]
    else:
        return 0 if one == other else -1
    counts = [count_equal_tensors(*pair) for pair in pairs]
    return -1 if -1 in counts else sum(counts)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def demo(logs: Path) -> bool:
    """Carry it out; return whether all that was to be proven holds."""
    if (STORE / "ckptstore.json").exists():
        shutil.rmtree(STORE)
    elif STORE.exists():
        raise DemoError(f"{STORE} exists and is no checkpoint store: move it away.")
    started_at = time.monotonic()

    heading("1. Train, and kill the training in the middle of a save")
    broken_log, unbroken_log = logs / "demo.jsonl", logs / "unbroken.jsonl"
    for _ in range(TRIES):
        save_id = kill_in_save(Child(train_command("demo", broken_log)), "demo")
        if save_id:
            break
        shutil.rmtree(STORE)
        broken_log.unlink()
    else:
        raise DemoError(f"{TRIES} trainings ended before a save could be met in the act.")
    killed_log = read_log(broken_log)
    killed_step = killed_log[-1][0]
    half_written = written_files(save_id)
    counted = "1 file" if half_written == 1 else f"{half_written} files"
    console.print(Text(f"  SIGKILL while it saved step {killed_step}: {counted} written, no manifest."))

    heading("2. The same command again")
    resumed_lines = Child(train_command("demo", broken_log)).run()
    resumed_from = next((int(line.split()[3]) for line in resumed_lines if line.startswith("resumed from step ")), 0)

    heading("3. What the model writes by now, and what the store holds")
    store = ["--store", str(STORE), "--run", "demo"]
    Child(["trainer", "generate", *store, "--words", "25"]).run()
    Child(["ckptstore", "ls", str(STORE)]).run()
    Child(["ckptstore", "du", str(STORE)]).run()

    heading("4. The same training unbroken, to compare with")
    Child(train_command("unbroken", unbroken_log)).run()
    verified = Child(["ckptstore", "verify", str(STORE)]).wait() == 0

    resumed_log = read_log(broken_log)[len(killed_log) :]
    twice = killed_log[resumed_from:]
    whole = killed_log[:resumed_from] + resumed_log
    runs = [ckptstore.Store(str(STORE)).run(name) for name in ("demo", "unbroken")]
    tensors = count_equal_tensors(*(run.load(step=STEPS) for run in runs))
    heading("What this has shown")
    claims = [
        (half_written > 0, f"A SIGKILL hit the save of step {killed_step} with {counted} of it written."),
        (
            resumed_from == killed_step - SAVE_EVERY,
            f"That half-written save was not taken for a checkpoint: the training resumed from step {resumed_from}.",
        ),
        (
            bool(twice) and resumed_log[: len(twice)] == twice,
            f"Steps {resumed_from + 1} to {killed_step}, done twice, had the same {len(twice)} losses, bit by bit.",
        ),
        (
            len(whole) == STEPS and whole == read_log(unbroken_log),
            f"So had all {len(whole)} steps of the killed and resumed run and of the unbroken one.",
        ),
        (
            tensors > 0,
            f"Both ended in the same state: {max(tensors, 0)} tensors of weights, Adam and generators, bit by bit.",
        ),
        (verified, "ckptstore verify has read every byte of the store again, and each is as it was saved."),
    ]
    for holds, text in claims:
        mark = Text("✓ ", style="bold green") if holds else Text("✗ does NOT hold: ", style="bold red")
        console.print(mark, Text(text), sep="")
    console.print(f"{time.monotonic() - started_at:.0f} seconds. The store is in ./{STORE}; look around in it.")
    return all(holds for holds, _ in claims)


def heading(text: str) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"))


def main() -> int:
    """Return 0 if all that was to be proven holds, 1 if not."""
    try:
        with tempfile.TemporaryDirectory(prefix="ckptstore-demo-") as logs:
            return 0 if demo(Path(logs)) else 1
    except (DemoError, ckptstore.CheckpointError) as error:
        console.print(Text(f"error: {error}", style="red"))
        return 1


if __name__ == "__main__":
    sys.exit(main())
