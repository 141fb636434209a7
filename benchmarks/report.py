"""How long a report of a thousand checkpoints takes, and how large the page is.

The store is real: ten runs of a hundred checkpoints, of forty tensors each. The command runs as a user runs it.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import ckptstore
from benchmarks.states import work_folder
from benchmarks.timing import Report, Row

TENSORS = 40
SECONDS_LIMIT, BYTES_LIMIT = 10.0, 5_000_000


def ask(folder: Path, rounds: int, runs: int = 10, checkpoints: int = 100) -> Report:
    """How long a report of a thousand checkpoints takes, and how large the page is."""
    with work_folder(folder) as work:
        _make(work, runs, checkpoints)
        size, seconds = 0, []
        for _ in range(rounds):
            began = time.perf_counter()
            file = work / "report.html"
            command = [sys.executable, "-m", "ckptstore", "report", str(work / "store"), "-o", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
            size = file.stat().st_size
    middle = statistics.median(seconds)
    text = f"{middle:5.1f} s ({min(seconds):.1f}-{max(seconds):.1f})  {size / 1e6:.2f} MB"
    met = middle <= SECONDS_LIMIT and size <= BYTES_LIMIT
    return Report(
        f"report: {runs * checkpoints} checkpoints in {runs} runs, {TENSORS} tensors each, local disk",
        [Row("ckptstore report", text, {"seconds": middle, "bytes": size})],
        f"targets at most {SECONDS_LIMIT:.0f} s and {BYTES_LIMIT / 1e6:.0f} MB: {'met' if met else 'MISSED'}",
    )


def _make(work: Path, runs: int, checkpoints: int) -> None:
    store = ckptstore.Store(work / "store")
    generator = torch.Generator().manual_seed(0)
    for number in range(runs):
        model = {f"layer{each}.weight": torch.randn(50, 50, generator=generator) for each in range(TENSORS)}
        for step in range(checkpoints):
            model[f"layer{step % TENSORS}.weight"] += 0.01
            metrics = {"loss": 1 / (step + 1), "lr": 0.1}
            store.run(f"run-{number}").save({"model": model, "step": step}, step=step, metrics=metrics)
