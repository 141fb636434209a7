"""The text in numbers: counts of the Bible, the vocabulary, batches that go on where the last one ended."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ConfigError
from trainer.data import Batches, Corpus, Vocabulary, load_corpus, read_text, tokenize


@pytest.fixture(scope="module")
def bible() -> Corpus:
    return load_corpus((), 10_000)


def test_the_bible_has_its_known_numbers_of_words() -> None:
    tokens = tokenize(read_text())
    assert len(tokens) == 912_890
    assert len(set(tokens)) == 12_821


def test_the_bible_is_split_nine_to_one_without_loss(bible: Corpus) -> None:
    assert (len(bible.train), len(bible.validation)) == (821_601, 91_289)
    assert len(bible.vocabulary) == 10_000
    assert int(torch.cat([bible.train, bible.validation]).max()) == 9_999


def test_the_bible_reads_back(bible: Corpus) -> None:
    words = bible.train[:12].tolist()
    assert bible.vocabulary.decode(words) == "In the beginning god created the heaven and the earth. And"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The LORD's house, (and) mine!", ["the", "lord's", "house", ",", "and", "mine", "!"]),
        ("sons' sons: 'tis", ["sons", "sons", ":", "tis"]),
        ("Baal-zebub", ["baal", "zebub"]),
        ("a\nb", ["a", "b"]),
        (" \n", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def test_vocabulary_goes_by_frequency_then_by_place() -> None:
    vocabulary = Vocabulary(["b", "a", "c", "a", "c", "d"], 4)
    assert vocabulary.words == ["<unk>", "a", "c", "b"]
    assert vocabulary.encode(["d", "b", "a", "never"]) == [0, 3, 1, 0]


def test_vocabulary_of_a_short_text_is_shorter() -> None:
    assert len(Vocabulary(["a", "b"], 10_000)) == 3


@given(st.integers(2, 400), st.integers(1, 5), st.integers(1, 9))
def test_batches_read_each_column_on_and_on(length: int, batch_size: int, bptt: int) -> None:
    numbers = torch.arange(length)
    if (length - 1) // batch_size < bptt:
        with pytest.raises(ConfigError, match="too short"):
            Batches(numbers, batch_size, bptt)
        return
    batches = Batches(numbers, batch_size, bptt)
    inputs = torch.cat([words for words, _ in batches], dim=1)
    targets = torch.cat([words for _, words in batches], dim=1)
    assert inputs.shape == targets.shape == (batch_size, len(batches) * bptt)
    assert torch.equal(targets, inputs + 1)
    assert (inputs.diff(dim=1) == 1).all()
    assert len(set(inputs.flatten().tolist())) == inputs.numel()
    # No more than the rest of a batch is left out of each column.
    assert length - 1 - inputs.numel() < batch_size * bptt + batch_size


def test_batch_outside_the_text() -> None:
    batches = Batches(torch.arange(21), 2, 5)
    with pytest.raises(IndexError):
        batches[len(batches)]
    with pytest.raises(IndexError):
        batches[-1]


def test_digest_tells_texts_and_vocabularies_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a b c a b c a b" * 5, encoding="utf-8")
    other.write_text("a b c a b c b a" * 5, encoding="utf-8")
    digests = [load_corpus([one], 10).digest, load_corpus([other], 10).digest, load_corpus([one], 3).digest]
    assert len(set(digests)) == 3
    assert load_corpus([one], 10).digest == digests[0]


def test_several_files_are_one_text(tmp_path: Path) -> None:
    files = [tmp_path / "1", tmp_path / "2"]
    for path, text in zip(files, ("one", "two"), strict=True):
        path.write_text(text, encoding="utf-8")
    assert tokenize(read_text(files)) == ["one", "two"]


def test_text_without_words_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a b c", encoding="utf-8")
    with pytest.raises(ConfigError, match="3 words leave nothing to validate on"):
        load_corpus([tmp_path / "short"], 10)


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.txt"):
        read_text([tmp_path / "missing.txt"])
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="utf-8"):
        read_text([tmp_path / "latin"])
