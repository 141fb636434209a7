"""What is to be restored against what was saved: every way not to fit is told, and nothing is touched."""

import uuid
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore


@pytest.fixture
def run() -> ckptstore.Run:
    return ckptstore.Store(f"memory://{uuid.uuid4().hex}").run("run")


def refusal(run: ckptstore.Run, saved: Any, destination: Any) -> str:
    run.save(saved, step=len(run.steps()))
    with pytest.raises(ckptstore.InvalidInputError) as caught:
        run.restore(destination)
    assert "Nothing was changed" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("saved", "destination", "told"),
    [
        ({"x": [1, 2]}, {"x": {"a": torch.ones(1)}}, "x is a dict here and a list in the checkpoint"),
        ({"x": {"a": 1}}, {"x": [torch.ones(1)]}, "x is a list here and a dict in the checkpoint"),
        ({"x": (1,)}, {"x": {"a": torch.ones(1)}}, "x is a dict here and a tuple in the checkpoint"),
        ({"x": [torch.ones(1)]}, {"x": [torch.ones(1)] * 2}, "x has 2 members and 1 in the checkpoint"),
        ({"x": 3}, {"x": torch.ones(1)}, "x is a tensor here and a int in the checkpoint"),
        ({"x": None}, {"x": torch.ones(1)}, "x is a tensor here and None in the checkpoint"),
        ({"x": np.ones(2)}, {"x": torch.ones(2)}, "x is a tensor here and a ndarray in the checkpoint"),
        ({"x": torch.ones(2)}, {"x": np.ones(2)}, "x is a ndarray here and a tensor in the checkpoint"),
        ({"x": np.ones(2)}, {"x": np.ones(2, np.float32)}, "x is <f4 and <f8 in the checkpoint"),
        ({"m": [1]}, {"m": torch.nn.Linear(2, 2)}, r"m is a module \(Linear\) here and a list in the checkpoint"),
        ({"x": 1}, torch.ones(1), "the state is a tensor here and a dict in the checkpoint"),
    ],
)
def test_another_type_is_told(run: ckptstore.Run, saved: Any, destination: Any, told: str) -> None:
    import re

    assert re.search(told, refusal(run, saved, destination))


def test_an_array_that_cannot_be_written_to(run: ckptstore.Run) -> None:
    array = np.zeros(2)
    array.flags.writeable = False
    assert "x is an array that cannot be written to" in refusal(run, {"x": np.ones(2)}, {"x": array})


def test_an_optimizer_where_none_was_saved(run: ckptstore.Run) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert "o is an optimizer (SGD) here and a dict in the checkpoint" in refusal(
        run, {"o": {"x": 1}}, {"o": optimizer}
    )


def test_a_missing_number_is_no_problem_and_a_missing_tensor_is(run: ckptstore.Run) -> None:
    told = refusal(run, {"a": torch.ones(1)}, {"a": torch.zeros(1), "step": 0, "deep": {"list": [torch.ones(1)]}})
    assert "deep is not in the checkpoint" in told
    assert "step" not in told.replace("step 0 of run", "")


def test_many_problems_are_not_all_listed(run: ckptstore.Run) -> None:
    told = refusal(run, {}, {str(number): torch.ones(1) for number in range(30)})
    assert "and 18 more" in told


def test_a_module_whose_state_dict_takes_no_keep_vars_is_restored_too(run: ckptstore.Run) -> None:
    class Own(torch.nn.Linear):
        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return super().state_dict()

    saved, fresh = Own(2, 2), Own(2, 2)
    run.save({"m": saved}, step=1)
    run.restore({"m": fresh})
    assert torch.equal(saved.weight, fresh.weight)


def test_keys_with_dots_that_mean_two_places_are_not_mixed_up(run: ckptstore.Run) -> None:
    state = {"a.b": torch.full((3,), 1.0), "a": {"b": torch.full((3,), 2.0)}}
    run.save(state, step=1)
    destination: dict[str, Any] = {"a.b": torch.zeros(3), "a": {"b": torch.zeros(3)}}
    run.restore(destination)
    assert destination["a.b"].tolist() == [1, 1, 1]
    assert destination["a"]["b"].tolist() == [2, 2, 2]
    loaded = run.load()
    assert loaded["a"]["b"].tolist() == [2, 2, 2]

    class Holder:
        """A Stateful whose keys collide as well."""

        def __init__(self, value: float) -> None:
            self.state: dict[str, Any] = {"a.b": torch.full((3,), value), "a": {"b": torch.full((3,), -value)}}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    holder = Holder(0.0)
    run.save({"h": Holder(5.0)}, step=2)
    run.restore({"h": holder})
    assert holder.state["a.b"].tolist() == [5, 5, 5]
    assert holder.state["a"]["b"].tolist() == [-5, -5, -5]


def test_an_int_and_a_text_key_are_two(run: ckptstore.Run) -> None:
    run.save({1: torch.ones(2), "1": torch.zeros(2)}, step=1)
    destination = {"1": torch.ones(2), 1: torch.zeros(2)}
    run.restore(destination)
    assert destination[1].tolist() == [1, 1]
    assert destination["1"].tolist() == [0, 0]


def test_deques_and_ordered_dicts_of_tensors_are_filled(run: ckptstore.Run) -> None:
    run.save({"o": OrderedDict(x=torch.ones(1)), "t": (torch.ones(1), 5)}, step=1)
    x, t = torch.zeros(1), torch.zeros(1)
    run.restore({"o": {"x": x}, "t": [t, 0]})
    assert (x.item(), t.item()) == (1, 1)
