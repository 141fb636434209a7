"""Which checkpoints a prune keeps, case by case: each rule alone, rules together, and what no rule may touch."""

import math
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from ckptstore.checkpoint import TensorInfo
from ckptstore.errors import InvalidInputError
from ckptstore.retention import Best, Candidate, Rules, choose, rules

NOW = 1_000_000.0
HOUR, DAY = 3600.0, 86_400.0


def at(step: int, *, age: float = 0.0, tags: str = "", damaged: bool = False, **metrics: Any) -> Candidate:
    return Candidate(step, NOW - age, metrics, tuple(tags.split()), damaged)


def asked(**given: Any) -> Rules:
    none: dict[str, Any] = dict.fromkeys(("keep_last", "keep_every", "keep_within", "keep_best", "keep_tags"))
    return rules(**(none | given))


def kept(candidates: list[Candidate], **given: Any) -> dict[int, list[str]]:
    """What stays, and why."""
    reasons = choose(candidates, asked(**given), NOW)
    assert list(reasons) == [each.step for each in candidates]
    return {step: why for step, why in reasons.items() if why}


FIVE = [at(step) for step in (0, 10, 20, 30, 40)]
LOSSES = [at(1, loss=3.0), at(2, loss=1.0), at(3, loss=2.0)]


@pytest.mark.parametrize(
    ("candidates", "given", "expected"),
    [
        pytest.param([], {"keep_last": 3}, {}, id="no checkpoints"),
        pytest.param(FIVE, {"keep_last": 1}, {40: ["newest", "last 1"]}, id="last 1"),
        pytest.param(FIVE, {"keep_last": 2}, {30: ["last 2"], 40: ["newest", "last 2"]}, id="last 2"),
        pytest.param(
            FIVE[:2], {"keep_last": 9}, {0: ["last 9"], 10: ["newest", "last 9"]}, id="last of more than there are"
        ),
        pytest.param(
            [at(step) for step in (3, 7, 10, 19, 20, 35)],
            {"keep_every": 10},
            {3: ["every 10"], 10: ["every 10"], 20: ["every 10"], 35: ["newest", "every 10"]},
            id="every: the first of each interval, wherever it lies in it",
        ),
        pytest.param(
            [at(step) for step in (5, 6, 2_000_005, 2_000_006)],
            {"keep_every": 10},
            {5: ["every 10"], 2_000_005: ["every 10"], 2_000_006: ["newest"]},
            id="every: intervals without a checkpoint",
        ),
        pytest.param(
            [at(1), at(2)], {"keep_every": 1}, {1: ["every 1"], 2: ["newest", "every 1"]}, id="every 1 is all"
        ),
        pytest.param(
            [at(1, age=2 * HOUR), at(2, age=HOUR), at(3, age=60)],
            {"keep_within": "1h"},
            {2: ["recent"], 3: ["newest", "recent"]},
            id="within: to the second",
        ),
        pytest.param(
            [at(1, age=10), at(2, age=9 * DAY), at(3, age=8 * DAY)],
            {"keep_within": "1w"},
            {1: ["recent"], 3: ["newest"]},
            id="within: by the time of the save, not by the step",
        ),
        pytest.param([at(1, age=9 * DAY)], {"keep_within": "1d"}, {1: ["newest"]}, id="within: none is recent"),
        pytest.param(
            [at(1, age=-DAY), at(2)], {"keep_within": 1}, {1: ["recent"], 2: ["newest", "recent"]}, id="ahead"
        ),
        pytest.param(LOSSES, {"keep_best": "loss"}, {2: ["best loss (min)"], 3: ["newest"]}, id="best: the least"),
        pytest.param(LOSSES, {"keep_best": "loss:max"}, {1: ["best loss (max)"], 3: ["newest"]}, id="best: greatest"),
        pytest.param(
            [at(1, loss=1.0), at(2, loss=1.0), at(3, loss=2.0)],
            {"keep_best": "loss:min"},
            {2: ["best loss (min)"], 3: ["newest"]},
            id="best: of equal ones the newest, for the least",
        ),
        pytest.param(
            [at(1, loss=2.0), at(2, loss=2), at(3, loss=1.0)],
            {"keep_best": "loss:max"},
            {2: ["best loss (max)"], 3: ["newest"]},
            id="best: of equal ones the newest, for the greatest",
        ),
        pytest.param(
            [at(1, loss=math.nan), at(2, loss=5.0), at(3, loss=math.nan)],
            {"keep_best": ["loss:min", "loss:max"]},
            {2: ["best loss (min)", "best loss (max)"], 3: ["newest"]},
            id="best: NaN is neither the least nor the greatest",
        ),
        pytest.param(
            [at(1, loss=-math.inf), at(2, loss=1), at(3, loss=math.inf), at(4)],
            {"keep_best": ["loss", "loss:max"]},
            {1: ["best loss (min)"], 3: ["best loss (max)"], 4: ["newest"]},
            id="best: infinities are numbers",
        ),
        pytest.param(
            [at(1, loss=2.0), at(2), at(3, acc=1.0)],
            {"keep_best": "loss"},
            {1: ["best loss (min)"], 3: ["newest"]},
            id="best: those without the metric do not count",
        ),
        pytest.param(
            [at(1, loss="0"), at(2, loss=True), at(3, loss=7), at(4, loss=None), at(5, loss=[1]), at(6, loss=10**400)],
            {"keep_best": ["loss", "loss:max"]},
            {3: ["best loss (min)", "best loss (max)"], 6: ["newest"]},
            id="best: texts, bools, lists and what no float can hold do not count",
        ),
        pytest.param(
            [at(1, loss=np.float32(2)), at(2, loss=np.int64(1)), at(3, loss=np.bool_(False)), at(4, loss=np.zeros(2))],
            {"keep_best": "loss"},
            {2: ["best loss (min)"], 4: ["newest"]},
            id="best: NumPy's numbers count, its bools and arrays do not",
        ),
        pytest.param(
            [at(1, loss=2.0), at(2, loss=np.complex64(1 + 1j)), at(3, loss=np.datetime64("2026-01-01"))],
            {"keep_best": "loss"},
            {1: ["best loss (min)"], 3: ["newest"]},
            id="best: what has no order does not count",
        ),
        pytest.param(
            [Candidate(1, NOW, {"val:loss": 1.0}), Candidate(2, NOW, {"val:loss": 2.0}), at(3)],
            {"keep_best": "val:loss:max"},
            {2: ["best val:loss (max)"], 3: ["newest"]},
            id="best: a metric with a colon in its name",
        ),
        pytest.param(
            [at(1, loss=1, acc=9), at(2, loss=2, acc=10), at(3, loss=3, acc=1)],
            {"keep_best": ["loss", "acc:max"]},
            {1: ["best loss (min)"], 2: ["best acc (max)"], 3: ["newest"]},
            id="best: several metrics",
        ),
        pytest.param([], {"keep_best": "loss"}, {}, id="best: of no checkpoints"),
        pytest.param(
            [at(1, tags="best"), at(2), at(3)],
            {"keep_tags": "best"},
            {1: ["tag best"], 3: ["newest"]},
            id="tags: alone, all else goes",
        ),
        pytest.param(
            [at(1, tags="a b"), at(2, tags="c"), at(3)],
            {"keep_tags": ["a"]},
            {1: ["tag a", "tag b"], 2: ["tag c"], 3: ["newest"]},
            id="tags: whatever tag is asked for, what has another stays too",
        ),
        pytest.param(
            [at(1, tags="old"), at(2), at(3)],
            {"keep_last": 1},
            {1: ["tag old"], 3: ["newest", "last 1"]},
            id="tags: stay under any rule",
        ),
        pytest.param(
            [at(1), at(2), at(3, tags="x"), at(4, tags="y")],
            {"keep_last": 2},
            {3: ["tag x", "last 2"], 4: ["tag y", "newest", "last 2"]},
            id="tags: count among the last",
        ),
        pytest.param(
            [at(1), at(2), at(3, damaged=True)],
            {"keep_last": 1},
            {2: ["newest", "last 1"], 3: ["damaged"]},
            id="damaged: stays, and the newest is the newest sound one",
        ),
        pytest.param(
            [at(10, damaged=True), at(11), at(12)],
            {"keep_every": 10},
            {10: ["damaged"], 11: ["every 10"], 12: ["newest"]},
            id="damaged: is not the first of an interval",
        ),
        pytest.param(
            [at(1, loss=0, damaged=True), at(2, loss=5), at(3, loss=9)],
            {"keep_best": "loss", "keep_within": "1h"},
            {1: ["damaged"], 2: ["recent", "best loss (min)"], 3: ["newest", "recent"]},
            id="damaged: is neither recent nor the best",
        ),
        pytest.param(
            [at(1, damaged=True, tags="t"), at(2, damaged=True)],
            {"keep_last": 1, "keep_best": "loss"},
            {1: ["damaged", "tag t"], 2: ["damaged"]},
            id="damaged: all of them",
        ),
        pytest.param(
            [
                at(step, age=(50 - step) * HOUR, loss=abs(step - 20), tags="x" * (step == 30))
                for step in range(0, 50, 10)
            ],
            {"keep_last": 1, "keep_every": 40, "keep_within": "11h", "keep_best": "loss", "keep_tags": "x"},
            {
                0: ["every 40"],
                20: ["best loss (min)"],
                30: ["tag x"],
                40: ["newest", "last 1", "every 40", "recent"],
            },
            id="all rules together: what any of them wants stays",
        ),
    ],
)
def test_what_stays_and_why(candidates: list[Candidate], given: dict[str, Any], expected: dict[int, list[str]]) -> None:
    assert kept(candidates, **given) == expected


def test_the_first_of_an_interval_stays_the_same_one_as_the_training_goes_on() -> None:
    steps: list[int] = []
    for step in range(7, 400, 7):
        steps = list(kept([at(each) for each in [*steps, step]], keep_every=50))
    assert steps == [7, 56, 105, 154, 203, 252, 301, 350, 399]


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([at(1, loss=1.0, acc=2), at(2, lr=1)], r"no checkpoint has a metric 'los' that is a number, so nothing was "),
        ([at(1, loss=1.0, acc=2), at(2, lr=1)], r"There are: acc, loss, lr\."),
        ([at(1)], r"There are no metrics\."),
        ([at(1, los=math.nan)], r"There are: los\."),
        ([at(1, los=1.0, damaged=True), at(2)], r"There are no metrics\."),
    ],
    ids=["misspelt", "names those there are", "no metrics at all", "only NaN", "only of a damaged one"],
)
def test_a_metric_that_no_checkpoint_has_is_refused(candidates: list[Candidate], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        kept(candidates, keep_best="los", keep_last=1)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("90s", 90),
        ("5m", 300),
        ("12h", 12 * HOUR),
        ("7d", 7 * DAY),
        ("2w", 14 * DAY),
        ("1.5h", 5400),
        (" 7d ", 7 * DAY),
        (60, 60),
        (0.5, 0.5),
        (timedelta(days=1, hours=1), 25 * HOUR),
    ],
)
def test_a_length_of_time_in_all_its_ways(given: Any, seconds: float) -> None:
    assert asked(keep_within=given).within == seconds


@pytest.mark.parametrize(
    ("given", "best"),
    [("loss", Best("loss", "min")), ("loss:min", Best("loss", "min")), ("a b:max", Best("a b", "max"))],
)
def test_a_metric_and_its_order(given: str, best: Best) -> None:
    assert asked(keep_best=given).best == (best,)


@pytest.mark.parametrize("given", [{}, {"keep_best": []}, {"keep_tags": ()}, {"keep_best": None, "keep_tags": None}])
def test_a_prune_without_a_rule_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="needs at least one rule that says what to keep"):
        asked(**given)


@pytest.mark.parametrize("name", ["keep_last", "keep_every"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", [3], math.nan])
def test_a_count_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{name} must be a whole number from 1 on, not "):
        asked(**{name: value})


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, math.nan, math.inf, True, 10**400, timedelta(0), timedelta(days=-1), [7]),
        *("", "7", "d", "7 d", "-7d", "0d", "7x", "7dd", "7d1h", "1e3s", "9" * 400 + "d"),
        "\N{ARABIC-INDIC DIGIT SEVEN}d",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_length_of_time_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="keep_within must be a length of time: '12h', '7d'"):
        asked(keep_within=value)


@pytest.mark.parametrize("value", ["", "loss:least", "loss:", ":min", "loss:MAX", ["acc", "loss:x"], 3, [3], [None]])
def test_a_metric_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="keep_best must be METRIC, METRIC:min or METRIC:max"):
        asked(keep_best=value)


@pytest.mark.parametrize("value", ["", "a b", "a/b", "-x", ["fine", "../x"], [3], 3, "x" * 129])
def test_a_tag_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="cannot be a tag"):
        asked(keep_tags=value)


def test_what_has_the_shape_of_a_number_and_is_none_does_not_count() -> None:
    described = TensorInfo("float32", (), 4)
    assert kept([at(1, loss=1.0), at(2, loss=described)], keep_best="loss:max")[1] == ["best loss (max)"]
