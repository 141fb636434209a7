"""What a comparison says of itself: which tensors moved, in as few words as are true."""

import itertools
import math
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.diffing.report import TensorDiff, by_drift, groups


def tensor(
    path: str, *, drift: float | None = 0.0, changed: float | None = 0.0, equal: int = 0, nan: int = 0
) -> TensorDiff:
    return TensorDiff(path, "float32", (25,), 100, equal, changed, drift, 0.0, 1.0, nan, 0, is_whole=True)


@pytest.mark.parametrize(
    ("some", "others", "expected"),
    [
        (["model.linear.weight", "model.linear.bias"], ["model.lstm.weight"], ["model.linear.*"]),
        (["model.linear.weight"], ["model.lstm.weight"], ["model.linear.weight"]),
        (["a.x", "b.x", "b.y"], ["a.y"], ["a.x", "b.*"]),
        (["o.state[0].exp_avg", "o.state[0].step"], ["o.state[1].step"], ["o.state[0].*"]),
        (["a", "b"], [], ["*"]),
        ([], ["a"], []),
        (["a"], ["a.b"], ["a"]),
    ],
)
def test_groups_are_as_wide_as_what_did_not_move_lets_them_be(
    some: list[str], others: list[str], expected: list[str]
) -> None:
    assert groups(some, others) == expected


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


@given(st.sets(PATHS, max_size=12), st.sets(PATHS, max_size=12))
def test_groups_cover_all_of_some_and_none_of_the_others(some: set[str], others: set[str]) -> None:
    others -= some
    patterns = groups(sorted(some), sorted(others))
    for path in some:
        assert any(fnmatchcase(path, pattern) or path == pattern.removesuffix(".*") for pattern in patterns)
    for path, pattern in itertools.product(others, patterns):
        assert not fnmatchcase(path, pattern)


def test_what_became_nan_comes_before_what_moved_and_that_before_what_did_not() -> None:
    tensors = [tensor("still"), tensor("far", drift=math.inf), tensor("near", drift=0.1), tensor("broken", nan=1)]
    assert [each.path for each in by_drift(tensors)] == ["broken", "far", "near", "still"]


def test_a_tensor_that_was_not_read_has_moved_if_a_chunk_of_it_has() -> None:
    assert tensor("a", changed=None, equal=50).has_moved
    assert not tensor("a", changed=None, equal=100).has_moved


def test_what_is_infinite_is_text_in_json() -> None:
    assert tensor("a", drift=math.inf).to_json()["relative_l2"] == "inf"
