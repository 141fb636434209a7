"""Which checkpoints of a run a prune keeps, and why. Pure; no I/O.

Rules add up: what any of them wants stays. Besides, three things always stay: the newest sound checkpoint, so that a
training can go on; what has a tag; and what is known to be damaged, of which somebody may yet save a part, and which
counts for no rule.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from ckptstore.errors import InvalidInputError
from ckptstore.format import check_tag

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the checkpoint with the least, or the greatest, value of a metric."""

    metric: str
    order: Literal["min", "max"] = "min"

    def __str__(self) -> str:
        return f"best {self.metric} ({self.order})"


@dataclass(frozen=True, slots=True)
class Rules:
    """What to keep of each run. Made by `rules`, which checks it."""

    last: int | None = None
    every: int | None = None
    within: float | None = None
    """Seconds."""
    best: tuple[Best, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one checkpoint."""

    step: int
    modified: float
    """When it was committed, by the store's clock."""
    metrics: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    damaged: bool = False


def rules(
    *,
    keep_last: int | None,
    keep_every: int | None,
    keep_within: "float | timedelta | str | None",
    keep_best: str | Sequence[str] | None,
    keep_tags: str | Sequence[str] | None,
) -> Rules:
    """Rules from what a user gives. Raises InvalidInputError if there is none, or one makes no sense."""
    found = Rules(
        last=_count(keep_last, "keep_last"),
        every=_count(keep_every, "keep_every"),
        within=None if keep_within is None else _seconds(keep_within),
        best=tuple(_best(text) for text in _several(keep_best)),
        tags=tuple(check_tag(tag) for tag in _several(keep_tags)),
    )
    if found == Rules():
        raise InvalidInputError(
            "a prune needs at least one rule that says what to keep: keep_last=3, keep_every=1000, keep_within='7d', "
            "keep_best='loss' or keep_tags='release'."
        )
    return found


def choose(candidates: Sequence[Candidate], rules: Rules, now: float) -> dict[int, list[str]]:
    """Why each step of a run stays; those with no reason are to go.

    Args:
        candidates: the checkpoints of one run, in the order of their steps.
        rules: what to keep.
        now: the store's time.

    Raises:
        InvalidInputError: no checkpoint has a metric that is asked for: its name may be misspelt, and then nothing
            must go.
    """
    reasons: dict[int, list[str]] = {each.step: [] for each in candidates}
    sound = [each for each in candidates if not each.damaged]
    for each in candidates:
        if each.damaged:
            reasons[each.step].append("damaged")
        reasons[each.step] += [f"tag {tag}" for tag in each.tags]
    if sound:
        reasons[sound[-1].step].append("newest")
    if rules.last is not None:
        for each in sound[-rules.last :]:
            reasons[each.step].append(f"last {rules.last}")
    if rules.every is not None:
        # The first in each interval, not the last: which one it is does not change as the training goes on.
        seen: set[int] = set()
        for each in sound:
            if each.step // rules.every not in seen:
                seen.add(each.step // rules.every)
                reasons[each.step].append(f"every {rules.every}")
    if rules.within is not None:
        for each in sound:
            if each.modified >= now - rules.within:
                reasons[each.step].append("recent")
    for best in rules.best:
        if sound:
            reasons[_best_of(sound, best)].append(str(best))
    return reasons


def _best_of(sound: Sequence[Candidate], best: Best) -> int:
    """The step with the best value; the newest of several."""
    values = {each.step: value for each in sound if (value := _number(each.metrics.get(best.metric))) is not None}
    if not values:
        known = sorted({name for each in sound for name in each.metrics})
        raise InvalidInputError(
            f"no checkpoint has a metric {best.metric!r} that is a number, so nothing was deleted. "
            f"There {'are' if known else 'are no metrics'}{': ' if known else ''}{', '.join(known)}."
        )
    sign = 1 if best.order == "max" else -1
    return max(values, key=lambda step: (sign * values[step], step))


def _number(value: Any) -> float | None:
    """A metric's value; None for what cannot be compared: NaN, text, a bool, a complex number, an array."""
    of_numpy = getattr(value, "shape", None) == () and getattr(getattr(value, "dtype", None), "kind", "none") in (
        "i",
        "u",
        "f",
    )
    if isinstance(value, bool) or not (isinstance(value, int | float) or of_numpy):
        return None
    try:
        number = float(value)
    except OverflowError:  # a larger whole number than a float can be
        return None
    return None if math.isnan(number) else number


def _count(value: int | None, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise InvalidInputError(f"{name} must be a whole number from 1 on, not {value!r}.")
    return value


def _seconds(value: "float | timedelta | str") -> float:
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", value.strip())
        seconds = float(match[1]) * UNITS[match[2]] if match else -1.0
    else:
        try:
            seconds = float(value) if type(value) in (int, float) else -1.0
        except OverflowError:
            seconds = math.inf
    if not seconds > 0 or math.isinf(seconds):
        raise InvalidInputError(
            f"keep_within must be a length of time: '12h', '7d', '2w', a timedelta, or seconds; not {value!r}."
        )
    return seconds


def _several(value: str | Sequence[str] | None) -> Iterable[str]:
    if value is None:
        return ()
    given: Any = value  # whatever the annotations say
    return given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _best(text: str) -> Best:
    given: Any = text  # whatever the annotations say
    name = given if isinstance(given, str) else ""
    metric, order = name.rsplit(":", 1) if ":" in name else (name, "min")
    if order not in ("min", "max") or not metric:
        raise InvalidInputError(f"keep_best must be METRIC, METRIC:min or METRIC:max, not {given!r}.")
    return Best(metric, "max" if order == "max" else "min")
