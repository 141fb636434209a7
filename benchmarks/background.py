"""What a save in the background costs a training: how long it stands still, and how much longer its steps take.

Ours beside that of torch.distributed.checkpoint, and beside torch.save and fsync, which the training would wait for.
The first save of a process is left out: it makes the memory that our others use again. DCP can do the same only where
there is a GPU, in pinned memory, so here it takes new memory each time. With `overlap`, what the next step of the
optimizer waits for the copy counts as well.
"""

import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

import ckptstore
from benchmarks.save import BASE, synced_writer, timed_torch_save
from benchmarks.states import Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, Stopwatch, Took, compared, in_turn, target

QUESTION = "async: how long the training stands still for a save, LSTM and Adam to local disk"
OURS, OVERLAP, DCP = "save_async", "save_async, overlap", "DCP async_save"
OF_TORCH_SAVE, OF_DCP, STEPS = 1 / 10, 1 / 2, 1.25
"""What the stall may be of theirs, and how many times as long a step may take meanwhile."""

Pending = Any
"""Of ours and of theirs: it has done() and result()."""


def ask(folder: Path, rounds: int) -> Report:
    """How long a training stands still for a save in the background, and how much longer its steps take meanwhile."""
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    alone: list[float] = []
    beside: dict[str, list[float]] = {OURS: [], OVERLAP: [], DCP: []}
    waits = _Waits(training.optimizer)

    def step(times: list[float]) -> None:
        with Stopwatch() as watch:
            training.train(batches, 1)
        times.append(watch.took[0])

    with work_folder(folder) as work:
        run = ckptstore.Store(work / "store").run("lstm")
        begins: dict[str, Callable[[int], Pending]] = {
            OURS: lambda _: run.save_async(training.state(), step=training.step),
            OVERLAP: lambda _: run.save_async(training.state(), step=training.step, overlap=training.optimizer),
            DCP: lambda number: _dcp_save(training, work / f"dcp-{number}"),
        }

        def stalled(name: str, number: int) -> Took:
            for _ in range(3):
                step(alone)
            with Stopwatch() as watch:
                pending = begins[name](number)
            waits.begin()
            while not pending.done():
                step(beside[name])
            pending.result()
            shutil.rmtree(work / f"dcp-{number}", ignore_errors=True)
            return watch.took[0] + waits.seconds, watch.took[1]

        def saved(number: int) -> Took:
            step(alone)
            return timed_torch_save(work / f"{number}.pt", training)

        measured = in_turn(rounds, {**{name: partial(stalled, name) for name in begins}, BASE: saved})
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    ratios = {name: statistics.mean(times) / statistics.mean(alone) for name, times in beside.items()}
    for name, ratio in ratios.items():
        text = f"{ratio:.2f} x as long ({statistics.mean(alone):.3f} s alone, {statistics.mean(beside[name]):.3f} s)"
        figures = {"alone": alone, "beside": beside[name], "ratio": ratio}
        rows.append(Row(f"a step of training beside {name}", text, figures))
    stalls = {name: [seconds for seconds, _ in times] for name, times in measured.items()}
    verdicts = [
        target(f"the stall of {ours}, of that of {name}, is", _part(stalls[ours], stalls[name]), at_most=limit)
        for ours in (OVERLAP, OURS)
        for name, limit in ((BASE, OF_TORCH_SAVE), (DCP, OF_DCP))
    ]
    steps = [target(f"steps beside {ours} take", ratios[ours], at_most=STEPS) for ours in (OVERLAP, OURS)]
    return Report(QUESTION, rows, "; ".join([*verdicts, *steps]))


class _Waits:
    """How long steps of an optimizer wait between its first hook, made here, and its last one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._began = self.seconds = 0.0
        self._last: RemovableHandle | None = None
        optimizer.register_step_pre_hook(self._begin)

    def begin(self) -> None:
        """Count from now on; the hooks that are there are those that may wait."""
        self.seconds = 0.0
        if self._last is not None:
            self._last.remove()
        self._last = self._optimizer.register_step_pre_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def _part(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(ours, theirs, strict=True))


def _dcp_save(training: Training, path: Path) -> Pending:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # also said on threads, later
    return async_save(training.state_dicts(), storage_writer=synced_writer(path))
