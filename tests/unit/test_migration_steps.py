"""Which step a name means: the names that people and frameworks give, and properties of the rule."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import InvalidInputError
from ckptstore.migration.steps import Named, pattern_of, stem, step_by_pattern, step_names


def steps_of(*names: str) -> list[int | None]:
    found = step_names(names)
    return [found[name].step for name in names]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ckpt_100.pt", 100),
        ("step-000100.pt", 100),
        ("model.100.pth", 100),
        ("100.pt", 100),
        ("checkpoint-500", 500),
        ("checkpoint100.pth.tar", 100),
        ("epoch=3-step=300.ckpt", 300),
        ("epoch=3-step=300-v1.ckpt", 300),
        ("epoch=3-step=300-val_loss=0.25.ckpt", 300),
        ("epoch=3-val_loss=0.25.ckpt", 3),
        ("epoch_12.pt", 12),
        ("global_step1000", 1000),
        ("iter_0000500", 500),
        ("iteration-7.pt", 7),
        ("resnet50_step100.pt", 100),
        ("lstm-2layer-it100.pt", 100),
        ("step_100_loss_2.51.pt", 100),
        ("STEP=7.PT", 7),
        ("loss=1.5e-3_step=8.pt", 8),
        ("model-v2.pt", 2),
    ],
)
def test_a_name_by_itself(name: str, step: int) -> None:
    assert steps_of(name) == [step]


@pytest.mark.parametrize("name", ["model_final.pt", "last.ckpt", "best.safetensors", "loss=0.25.ckpt", "größe.pt"])
def test_a_name_without_a_whole_number_tells_nothing(name: str) -> None:
    assert steps_of(name) == [None]


def test_digits_of_other_scripts_are_letters() -> None:
    assert steps_of("ckpt_٣.pt") == [None]


def test_of_several_numbers_the_one_that_differs_is_the_step() -> None:
    assert steps_of("resnet50_v2_100.pt", "resnet50_v2_200.pt") == [100, 200]
    assert steps_of("2026-01-05_ckpt_100.pt", "2026-01-05_ckpt_50.pt") == [100, 50]


def test_a_loss_in_the_name_is_no_step_and_does_not_keep_names_from_being_alike() -> None:
    assert steps_of("gpt2_100_0.53.pt", "gpt2_200_1.25.pt") == [100, 200]


def test_of_several_numbers_that_differ_the_epoch_is_the_step() -> None:
    assert steps_of("epoch_1_seen_3000.pt", "epoch_2_seen_6100.pt") == [1, 2]


def test_a_step_goes_before_an_epoch() -> None:
    assert steps_of("epoch3_iter300.pt", "epoch4_iter400.pt") == [300, 400]


def test_a_name_that_counts_epochs_says_so() -> None:
    assert step_names(["epoch=3.ckpt"]) == {"epoch=3.ckpt": Named(3, is_epoch=True)}
    assert step_names(["step=3.ckpt"]) == {"step=3.ckpt": Named(3)}


@pytest.mark.parametrize(
    "names",
    [["checkpoint_3_1000.pt", "checkpoint_4_2000.pt"], ["resnet50_100.pt"], ["a1_b2.pt", "a2_b2.pt", "a1_b3.pt"]],
)
def test_what_is_not_clear_is_an_error_that_says_what_to_pass(names: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="--step-from") as caught:
        step_names(names)
    assert repr(names[0]) in str(caught.value)


@pytest.mark.parametrize("digits", [str(2**63), "9" * 31, "9" * 5000])
def test_a_number_that_is_no_step_is_an_error(digits: str) -> None:
    with pytest.raises(InvalidInputError, match="too large"):
        step_names([f"ckpt_{digits}.pt"])
    assert steps_of(f"ckpt_{2**63 - 1}.pt") == [2**63 - 1]


def test_a_pattern_says_which_number_it_is() -> None:
    names = ["checkpoint_3_1000.pt", "checkpoint_4_2000.pt"]
    found = step_by_pattern(names, pattern_of(r"_(\d+)\.pt$"))
    assert [found[name].step for name in names] == [1000, 2000]


@pytest.mark.parametrize("text", ["(", "no group", "(two)(groups)"])
def test_a_pattern_must_have_one_group(text: str) -> None:
    with pytest.raises(InvalidInputError, match="step_from"):
        pattern_of(text)


@pytest.mark.parametrize("pattern", [r"step(\d+)", r"(a)"])
def test_a_name_in_which_a_pattern_finds_no_number_is_named(pattern: str) -> None:
    with pytest.raises(InvalidInputError, match=r"'last\.pt'"):
        step_by_pattern(["last.pt"], re.compile(pattern))


@pytest.mark.parametrize(
    ("name", "bare"), [("a.pt", "a"), ("a.pth.tar", "a"), ("a.1.safetensors", "a.1"), ("a.txt", "a.txt"), (".pt", "")]
)
def test_the_endings_of_formats_are_no_part_of_a_name(name: str, bare: str) -> None:
    assert stem(name) == bare


# ---- properties

words = st.text(st.sampled_from("abcxyz_- "), max_size=6).filter(lambda text: "it" not in text and "ep" not in text)
numbers = st.integers(0, 2**63 - 1)


@given(prefix=words, suffix=words, steps=st.sets(numbers, min_size=1, max_size=8), zeros=st.integers(0, 6))
def test_whatever_a_loop_puts_around_its_counter_the_counter_is_found(
    prefix: str, suffix: str, steps: set[int], zeros: int
) -> None:
    names = {f"{prefix}{'0' * zeros}{step}{suffix}.pt": step for step in steps}
    assert {name: found.step for name, found in step_names(list(names)).items()} == names


@given(version=st.integers(0, 999), steps=st.sets(numbers, min_size=2, max_size=8))
def test_a_number_that_all_names_have_is_never_the_step(version: int, steps: set[int]) -> None:
    names = {f"net{version}_{step}.pt": step for step in steps}
    assert {name: found.step for name, found in step_names(list(names)).items()} == names


@given(name=st.text(max_size=30))
def test_any_name_has_a_step_or_none_or_is_refused(name: str) -> None:
    try:
        found = step_names([name])[name]
    except InvalidInputError:
        return
    assert found.step is None or 0 <= found.step < 2**63


@given(
    names=st.lists(st.from_regex(r"\A[a-z]{0,3}[0-9]{1,2}[_.=-][a-z]{0,4}[0-9]{0,2}\.pt\Z"), unique=True, max_size=6)
)
def test_the_order_of_the_names_makes_no_difference(names: list[str]) -> None:
    def outcome(order: list[str]) -> object:
        try:
            return step_names(order)
        except InvalidInputError:
            return None

    assert outcome(names) == outcome(names[::-1])
