"""How many bytes a training state takes in the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ckptstore
from benchmarks.states import LATER_STEPS, STEPS, Training, state_file, work_folder
from benchmarks.timing import Report, Row, target

QUESTION = "stored: bytes of the LSTM's training state, in the store and raw, each state in a store of its own"
TARGETS = {100: 0.72, 550: 0.81}
"""What part of the raw bytes may be stored, by step: it grows as training touches every word."""


@dataclass(frozen=True)
class _Part:
    name: str
    raw_bytes: int
    stored_bytes: int

    @property
    def share(self) -> float:
        return self.stored_bytes / self.raw_bytes


def ask(folder: Path, rounds: int, steps: Sequence[int] = (STEPS, *LATER_STEPS)) -> Report:
    parts: list[_Part] = []
    verdicts = []
    for step in steps:
        whole, *rest = _parts(folder, step)
        # What the whole is made of, of the first and the last alone.
        parts += [whole, *rest] if step in (steps[0], steps[-1]) else [whole]
        if step in TARGETS:
            verdicts.append(target(f"stored / raw after {step} steps is", whole.share, at_most=TARGETS[step]))
    rows = [
        Row(
            part.name,
            f"{part.stored_bytes:>11,} of {part.raw_bytes:>11,} bytes: {part.share:.3f}",
            {"raw_bytes": part.raw_bytes, "stored_bytes": part.stored_bytes},
        )
        for part in parts
    ]
    return Report(QUESTION, rows, "; ".join(verdicts))


def _parts(folder: Path, step: int) -> list[_Part]:
    training = Training.resumed(state_file(folder, step))
    with work_folder(folder) as work:
        store = ckptstore.Store(work / "store")
        whole = store.run("whole").save(training.state(), step=step)
        weights = store.run("weights").save({"model": training.model}, step=step)
    return [
        _Part(f"after {step} steps, whole state", whole.raw_bytes, whole.stored_bytes),
        _Part("  weights alone", weights.raw_bytes, weights.stored_bytes),
        _Part("  Adam alone", whole.raw_bytes - weights.raw_bytes, whole.stored_bytes - weights.stored_bytes),
    ]
