"""The trainer on a small scale: a made text of a few thousand words and a model that takes milliseconds a step."""

import random
from pathlib import Path
from typing import Any

from trainer.config import Options

TINY_SIZES = {"vocab_size": 60, "embed_size": 8, "hidden_size": 12, "batch_size": 4, "bptt": 8}


def write_tiny_text(path: Path, *, words: int = 1200, seed: int = 0) -> Path:
    """Write sentences of made words, some frequent, some rare; the same ones for the same arguments."""
    choose = random.Random(seed)
    names = [f"{first}{second}" for first in "bdgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "en", "or")]
    text: list[str] = []
    while len(text) < words:
        sentence = [names[int(len(names) * choose.random() ** 2)] for _ in range(choose.randint(3, 9))]
        text += [*sentence[:-1], sentence[-1] + choose.choice(".?!")]
    path.write_text(" ".join(text), encoding="utf-8")
    return path


def tiny_options(folder: Path, **changes: Any) -> Options:
    """Return options that train for 2 epochs into a store in `folder`."""
    text = folder / "tiny.txt"
    if not text.exists():
        write_tiny_text(text)
    settings: dict[str, Any] = {"store": str(folder / "store"), "text": (text,), "epochs": 2, "threads": 1}
    return Options(**(settings | TINY_SIZES | changes))
