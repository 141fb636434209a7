"""Real training states: the trainer's LSTM after N steps on the real text, kept on disk between runs.

The states hold model, Adam's moments and the step: 115 MB. Trained as `python -m trainer train` does by default.
"""

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.data import Batches, load_corpus
from trainer.model import LanguageModel

BATCH_SIZE, BPTT, LEARNING_RATE, CLIP = 20, 35, 0.001, 1.0
STEPS = int(os.environ.get("CKPTSTORE_BENCHMARK_STEPS", "100"))
"""Of training, to the state that most questions are asked of. `--quick` sets the variable, for child processes too."""
LATER_STEPS = () if "CKPTSTORE_BENCHMARK_STEPS" in os.environ else (101, 110, 200, 550)
"""At which steps of the same training its size is told as well."""
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "ckptstore-benchmarks"


@dataclass
class Training:
    """A model, its optimizer and where it stands."""

    model: LanguageModel
    optimizer: torch.optim.Adam
    step: int = 0
    hidden: Any = None

    @classmethod
    def fresh(cls) -> "Training":
        """As a training begins, before it restores: the optimizer has no state yet."""
        torch.manual_seed(0)
        model = LanguageModel()
        return cls(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE))

    @classmethod
    def resumed(cls, file: Path | str) -> "Training":
        """From a file of `state_file`."""
        training = cls.fresh()
        state = torch.load(file)
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.step = state["step"]
        return training

    def train(self, batches: Batches, steps: int) -> None:
        """Go on for so many steps."""
        if self.hidden is None:
            self.hidden = self.model.initial_state(BATCH_SIZE)
        for _ in range(steps):
            words, targets = batches[self.step % len(batches)]
            logits, hidden = self.model(words, self.hidden)
            self.hidden = (hidden[0].detach(), hidden[1].detach())
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.step += 1

    def state(self) -> dict[str, Any]:
        """As one gives it to ckptstore."""
        return {"model": self.model, "optimizer": self.optimizer, "step": self.step}

    def state_dicts(self) -> dict[str, Any]:
        """As one gives it to torch.save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}


def state_file(folder: Path, steps: int = STEPS) -> Path:
    """The file of torch.save with the state after `steps` steps; trains it if it is not there.

    One of the later steps goes on from the file of the one before it.
    """
    file = folder / f"lstm-{steps}.pt"
    if not file.exists():
        earlier = max((each for each in (STEPS, *LATER_STEPS) if each < steps), default=0)
        training = Training.resumed(state_file(folder, earlier)) if earlier else Training.fresh()
        print(f"training the LSTM for {steps - training.step} steps into {file} …", file=sys.stderr, flush=True)
        training.train(real_batches(folder), steps - training.step)
        _write(training.state_dicts(), file)
    return file


def real_batches(folder: Path) -> Batches:
    """The trainer's text in batches; its words in numbers are kept in `folder`."""
    file = folder / "words.pt"
    if not file.exists():
        _write(load_corpus((), 10_000).train, file)
    return Batches(torch.load(file), BATCH_SIZE, BPTT)


def raw_bytes(value: Any) -> int:
    """Bytes of all tensors below."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(raw_bytes(member) for member in members)


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder for what one question writes, on the same disk as the states, gone afterwards."""
    path = folder / f"work-{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _write(value: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{uuid.uuid4().hex[:8]}")
    torch.save(value, unfinished)
    unfinished.rename(file)
