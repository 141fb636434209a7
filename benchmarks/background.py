"""How long save_async keeps the training waiting, compared with save."""

from pathlib import Path

import ckptstore
from benchmarks.save import timed_save
from benchmarks.states import Training, raw_bytes, real_batches, state_file, work_folder
from benchmarks.timing import Report, Stopwatch, Took, compared, in_turn

QUESTION = "async: how long the training stands still for a save, LSTM and Adam to local disk"
BASE = "save"
OURS = "save_async"


def ask(folder: Path, rounds: int) -> Report:
    training = Training.resumed(state_file(folder))
    batches = real_batches(folder)
    with work_folder(folder) as work:
        run = ckptstore.Store(work / "store").run("lstm")

        def saved(_: int) -> Took:
            training.train(batches, 1)
            return timed_save(run, training)

        def stalled(_: int) -> Took:
            training.train(batches, 1)
            with Stopwatch() as watch:
                pending = run.save_async(training.state(), step=training.step)
            pending.result()
            return watch.took

        measured = in_turn(rounds, {OURS: stalled, BASE: saved})
    rows = compared(measured, BASE, raw_bytes(training.state_dicts()))
    return Report(QUESTION, rows, f"save_async stalls for {1 / rows[0].figures['speed']:.2f} of the time of save")
