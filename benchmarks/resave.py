"""What it costs to save a state that the store holds already."""

import statistics
import time
from collections import Counter
from pathlib import Path

import ckptstore
from benchmarks.states import STEPS, Training, state_file, work_folder
from benchmarks.timing import Report, Row
from ckptstore.objects.local import LocalObjects
from ckptstore.testing import RecordingObjects

QUESTION = "resave: the same state once more, local disk"


def ask(folder: Path, rounds: int) -> Report:
    training = Training.resumed(state_file(folder))
    with work_folder(folder) as work:
        objects = RecordingObjects(LocalObjects(work / "store"))
        run = ckptstore.Store(objects).run("lstm")
        first = _measure(run, objects, training, [STEPS])
        again = _measure(run, objects, training, range(STEPS + 1, STEPS + 1 + rounds))
        same = _measure(run, objects, training, [STEPS + rounds] * rounds)
        checkpoint = run.checkpoint(STEPS + rounds)
        assert checkpoint.new_bytes == 0
    rows = [
        _row("first save, store and all", *first),
        _row("as another step", *again),
        _row("as the same step", *same),
    ]
    rate = checkpoint.raw_bytes / statistics.median(again[0]) / 1e9
    return Report(QUESTION, rows, f"{rate:.1f} GB/s of state, all of it read and hashed")


def _measure(
    run: ckptstore.Run, objects: RecordingObjects, training: Training, steps: "list[int] | range"
) -> tuple[list[float], Counter[str]]:
    """Seconds of each save, and the calls of the last one."""
    seconds = []
    for step in steps:
        objects.clear()
        began = time.perf_counter()
        run.save(training.state() | {"step": STEPS}, step=step)
        seconds.append(time.perf_counter() - began)
    return seconds, Counter(call.operation for call in objects.calls)


def _row(name: str, seconds: list[float], calls: Counter[str]) -> Row:
    said = ", ".join(f"{number} {operation}" for operation, number in sorted(calls.items()))
    middle = statistics.median(seconds)
    return Row(name, f"{middle:6.3f} s  calls: {said}", {"median": middle, "seconds": seconds, "calls": dict(calls)})
