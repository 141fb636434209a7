"""Which step a checkpoint is, as its name tells it. Plain texts in, numbers out; nothing is read here.

docs/how-to/migrate.md has the rule for people, and `step_names` below is the whole of it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptstore.errors import InvalidInputError
from ckptstore.format import MAX_STEP

__all__ = ["CONTENT", "Named", "listed", "pattern_of", "stem", "step_by_pattern", "step_names"]

CONTENT = "content"
"""The value of `step_from` that asks for the step inside the file, whatever its name says."""
_ENDINGS = re.compile(r"(\.(safetensors|pt|pth|ckpt|bin|tar))+\Z", re.IGNORECASE)
_VERSION = re.compile(r"(?<=\d)-v\d+\Z")
"""What Lightning adds to a name that exists already: another file of the same step, and no number of its own."""
_NUMBER = re.compile(r"(?<![0-9])[0-9]+\.[0-9]+(?:e-?[0-9]+)?(?![0-9])|[0-9]+", re.IGNORECASE)
_STEP_LABEL = re.compile(r"(?:step|iteration|iter|update)s?\W*_*\Z|(?<![a-z])it\W*_*\Z", re.IGNORECASE)
_EPOCH_LABEL = re.compile(r"epochs?\W*_*\Z|(?<![a-z])ep\W*_*\Z", re.IGNORECASE)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Named:
    """What a name says.

    Attributes:
        step: the number; None if there is none.
        is_epoch: whether it counts epochs, so that a step inside the file is to be preferred.
    """

    step: int | None = None
    is_epoch: bool = False


def stem(name: str) -> str:
    """A file's or folder's name without the endings that say its format."""
    return _ENDINGS.sub("", name)


def step_names(names: Sequence[str]) -> dict[str, Named]:
    """The step in each of the names of one folder.

    1. A number after `step`, `global_step`, `iter`, `iteration`, `update` or `it` is the step.
    2. Else the only number of the name is; after `epoch` or `ep` it is an epoch.
    3. Else, of several numbers, the one that differs among the names that are alike but for their numbers; and if
       several differ, the one after `epoch`.

    Numbers with a fraction (a loss, say) are not looked at.

    Raises:
        InvalidInputError: several numbers of a name could be its step.
    """
    found: dict[str, Named] = {}
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        texts, numbers = _parts(name)
        named = _labelled(texts, numbers)
        if named is None:
            alike[texts].append(name)
        else:
            found[name] = named
    unclear: list[str] = []
    for texts, group in alike.items():
        place = _place(texts, group)
        if place is None:
            unclear += group
        else:
            is_epoch = _EPOCH_LABEL.search(texts[place]) is not None
            found |= {name: Named(_checked(_parts(name)[1][place], name), is_epoch) for name in group}
    if unclear:
        raise InvalidInputError(
            f"{listed(unclear)}: several numbers could be the step. Say which with a regular expression that has one "
            r"group, such as --step-from '_(\d+)\.pt$' (step_from= in Python), or take the step inside the files: "
            f"--step-from {CONTENT}."
        )
    return found


def pattern_of(step_from: str) -> "re.Pattern[str]":
    """A regular expression with one group, the step. Raises InvalidInputError."""
    try:
        pattern = re.compile(step_from)
    except re.error as error:
        raise InvalidInputError(f"step_from {step_from!r} is no regular expression: {error}.") from error
    if pattern.groups != 1:
        raise InvalidInputError(
            rf"step_from {step_from!r} must have one group, which is the step, as in 'ckpt_(\d+)'; or be {CONTENT!r}."
        )
    return pattern


def step_by_pattern(names: Iterable[str], pattern: "re.Pattern[str]") -> dict[str, Named]:
    """The step in each name, by a regular expression. Raises InvalidInputError if one does not match a number."""
    found: dict[str, Named] = {}
    strange: list[str] = []
    for name in names:
        match = pattern.search(name)
        digits = match[1] if match else None
        if digits is None or not (digits.isascii() and digits.isdigit()):
            strange.append(name)
        else:
            found[name] = Named(_checked(digits, name))
    if strange:
        raise InvalidInputError(
            f"{listed(strange)}: step_from {pattern.pattern!r} finds no number in the name. Change it, or leave such "
            "names out with --exclude (exclude= in Python)."
        )
    return found


def _parts(name: str) -> tuple[tuple[str, ...], list[str]]:
    """The texts before each whole number and after the last, and the numbers."""
    bare = _VERSION.sub("", stem(name))
    matches = [match for match in _NUMBER.finditer(bare) if "." not in match[0]]
    texts, position = [], 0
    for match in matches:
        texts.append(bare[position : match.start()])
        position = match.end()
    # A loss in the name differs from file to file, and must not keep names from being alike.
    return tuple(_NUMBER.sub("#", text) for text in (*texts, bare[position:])), [match[0] for match in matches]


def _labelled(texts: Sequence[str], numbers: Sequence[str]) -> Named | None:
    """What a name says without the others; None if it has several numbers, of which none says that it is a step."""
    if not numbers:
        return Named()
    steps = [number for text, number in zip(texts, numbers, strict=False) if _STEP_LABEL.search(text)]
    if steps:
        return Named(_checked(steps[-1], "".join(texts)))
    if len(numbers) == 1:
        return Named(_checked(numbers[0], "".join(texts)), _EPOCH_LABEL.search(texts[0]) is not None)
    return None


def _place(texts: Sequence[str], group: Sequence[str]) -> int | None:
    """Which number of names that are alike is the step; None if that is not clear."""
    columns = list(zip(*(map(int, _parts(name)[1]) for name in group), strict=True))
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) == 1:
        return differing[0]
    epochs = [place for place in differing or range(len(columns)) if _EPOCH_LABEL.search(texts[place])]
    return epochs[0] if len(epochs) == 1 else None


def _checked(digits: str, name: str) -> int:
    if len(digits) > 30 or int(digits) > MAX_STEP:
        raise InvalidInputError(f"the number {digits[:40]} in {name!r:.80} is too large for a step: at most 2**63-1.")
    return int(digits)


def listed(names: Sequence[str]) -> str:
    """The first few names, for an error."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
