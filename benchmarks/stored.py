"""How many bytes a training state takes in the store."""

from dataclasses import dataclass
from pathlib import Path

import ckptstore
from benchmarks.states import STEPS, Training, state_file, work_folder
from benchmarks.timing import Report, Row, target

QUESTION = f"stored: bytes of the LSTM's training state after {STEPS} steps, in the store and raw"
TARGET = 0.73


@dataclass(frozen=True)
class _Part:
    name: str
    raw_bytes: int
    stored_bytes: int


def ask(folder: Path, rounds: int) -> Report:
    training = Training.resumed(state_file(folder))
    with work_folder(folder) as work:
        store = ckptstore.Store(work / "store")
        whole = store.run("whole").save(training.state(), step=STEPS)
        weights = store.run("weights").save({"model": training.model}, step=STEPS)
    parts = [
        _Part("whole state", whole.raw_bytes, whole.stored_bytes),
        _Part("weights alone", weights.raw_bytes, weights.stored_bytes),
        _Part("Adam alone", whole.raw_bytes - weights.raw_bytes, whole.stored_bytes - weights.stored_bytes),
    ]
    rows = [
        Row(
            part.name,
            f"{part.stored_bytes:>11,} of {part.raw_bytes:>11,} bytes: {part.stored_bytes / part.raw_bytes:.3f}",
            {"raw_bytes": part.raw_bytes, "stored_bytes": part.stored_bytes},
        )
        for part in parts
    ]
    return Report(QUESTION, rows, target("stored / raw is", whole.stored_bytes / whole.raw_bytes, at_most=TARGET))
