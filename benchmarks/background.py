"""What save_async costs a training: how long it stands still, and how much longer its steps take meanwhile.

Compared with torch.save and fsync, which the training would wait for. The first save of a process is left out: it
makes the memory that the others use again.
"""

import statistics
from pathlib import Path

import ckptstore
from benchmarks.save import BASE, timed_torch_save
from benchmarks.states import Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, Stopwatch, Took, compared, in_turn, target

QUESTION = "async: how long the training stands still for a save, LSTM and Adam to local disk"
OURS = "save_async"
TARGET = 10.0


def ask(folder: Path, rounds: int) -> Report:
    """What save_async costs a training: how long it stands still, and how much longer its steps take meanwhile."""
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    alone: list[float] = []
    beside: list[float] = []

    def step(times: list[float]) -> None:
        with Stopwatch() as watch:
            training.train(batches, 1)
        times.append(watch.took[0])

    with work_folder(folder) as work:
        run = ckptstore.Store(work / "store").run("lstm")

        def stalled(_: int) -> Took:
            for _ in range(3):
                step(alone)
            with Stopwatch() as watch:
                pending = run.save_async(training.state(), step=training.step)
            while not pending.done():
                step(beside)
            pending.result()
            return watch.took

        def saved(number: int) -> Took:
            step(alone)
            return timed_torch_save(work / f"{number}.pt", training)

        measured = in_turn(rounds, {OURS: stalled, BASE: saved})
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    ratio = statistics.mean(beside) / statistics.mean(alone)
    text = (
        f"{ratio:.2f} x as long ({statistics.mean(alone):.3f} s alone, {statistics.mean(beside):.3f} s beside a save)"
    )
    rows.append(Row("a step of training", text, {"alone": alone, "beside": beside, "ratio": ratio}))
    verdict = target(f"{BASE} takes this many times as long as the stall:", rows[0].figures["speed"], at_least=TARGET)
    return Report(QUESTION, rows, f"{verdict}; {target('steps take', ratio, at_most=1.25)}")
