"""What is to be restored against what was saved: every way not to fit is told, and nothing is touched."""

import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore
from ckptstore.errors import CorruptError, InvalidInputError
from ckptstore.manifest import Manifest, Writer
from ckptstore.matching import Match, match
from ckptstore.tree import registry


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


def test_an_optimizer_of_another_kind(run: ckptstore.Run) -> None:
    weights = [torch.nn.Parameter(torch.ones(1))]
    told = refusal(run, {"o": torch.optim.SGD(weights)}, {"o": torch.optim.Adam(weights)})
    assert "o is a Adam here" in told
    assert "momentum" in told


def test_an_optimizer_of_an_older_version_and_one_with_a_scheduler_are_no_other_kind(run: ckptstore.Run) -> None:
    weights = [torch.nn.Parameter(torch.ones(1))]
    saved = torch.optim.Adam(weights)
    torch.optim.lr_scheduler.OneCycleLR(saved, max_lr=0.1, total_steps=10)  # which adds settings to the groups
    state = saved.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]  # torch before 2.7 had none
    run.save({"o": state}, step=1)
    optimizer = torch.optim.Adam(weights)
    run.restore({"o": optimizer})
    assert optimizer.param_groups[0]["lr"] == saved.param_groups[0]["lr"]


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


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.empty(2, 3, device="meta"), "is a meta tensor here"),
        (lambda: torch.zeros(2, 3).to_sparse(), "is a torch.sparse_coo tensor here"),
        (lambda: torch.zeros(1, 3).expand(2, 3), "is expanded here"),
        (lambda: inference_tensor(), "is an inference tensor here"),
        (lambda: torch.nn.parameter.UninitializedParameter(), "is a UninitializedParameter here"),
    ],
)
def test_a_tensor_that_cannot_be_written_to_is_told(run: ckptstore.Run, make: Any, told: str) -> None:
    assert told in refusal(run, {"x": torch.ones(2, 3)}, {"x": make()})


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 3)


def test_a_module_on_the_meta_device_is_refused(run: ckptstore.Run) -> None:
    assert "m.weight is a meta tensor here" in refusal(
        run, {"m": torch.nn.Linear(2, 2)}, {"m": torch.nn.Linear(2, 2, device="meta")}
    )


@pytest.mark.parametrize("live", [{"a": torch.zeros(2)}, {}, None, 3])
def test_saved_tensors_that_a_nested_destination_lacks_are_told(run: ckptstore.Run, live: Any) -> None:
    saved = {"ema": {"a": torch.ones(2), "b": torch.ones(2)}, "more": torch.ones(1)}
    assert "is in the checkpoint and not in the destination" in refusal(run, saved, {"ema": live})
    checkpoint = run.restore({"ema": live}, strict=False)
    assert checkpoint is not None
    assert set(checkpoint.unexpected) <= {"ema", "ema.a", "ema.b"}
    assert checkpoint.unexpected


def test_a_type_that_is_not_registered_is_told_before_anything_is_written(run: ckptstore.Run) -> None:
    class Kept:
        def __init__(self, value: int) -> None:
            self.value = value

    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"kept": Kept(3)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("not to be called")

    ckptstore.register(Kept, "test.Kept", lambda kept: kept.value, Kept)
    run.save({"h": Holder(), "w": torch.ones(300, 300)}, step=1)
    registry._by_name.pop("test.Kept")
    weight = torch.zeros(300, 300)
    with pytest.raises(ckptstore.InvalidInputError, match=r"'test.Kept', which is not registered here"):
        run.restore({"h": Holder(), "w": weight})
    assert weight.sum() == 0


def test_extra_state_of_another_length_is_the_modules_to_take(run: ckptstore.Run) -> None:
    class Growing(torch.nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.history = torch.ones(length)

        def get_extra_state(self) -> torch.Tensor:
            return self.history

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.history = state

    run.save({"m": Growing(7)}, step=1)
    fresh = Growing(0)
    run.restore({"m": fresh})
    assert fresh.history.tolist() == [1] * 7


def test_a_module_that_takes_buffers_of_any_length_by_code_of_its_own(run: ckptstore.Run) -> None:
    class Resizing(torch.nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.register_buffer("seen", torch.ones(length))

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            self.seen = torch.zeros_like(state_dict[f"{prefix}seen"])
            super()._load_from_state_dict(state_dict, prefix, *rest)

    run.save({"m": torch.nn.Sequential(Resizing(5), torch.nn.Linear(2, 2))}, step=1)
    resizing = Resizing(0)
    run.restore({"m": torch.nn.Sequential(resizing, torch.nn.Linear(2, 2))})
    assert resizing.get_buffer("seen").tolist() == [1] * 5


def test_a_module_whose_load_state_dict_takes_no_strict(run: ckptstore.Run) -> None:
    class Own(torch.nn.Linear):
        def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
            return super().load_state_dict(state)

    saved, fresh = Own(2, 2), Own(2, 2)
    run.save({"m": saved}, step=1)
    run.restore({"m": fresh}, strict=False)
    assert torch.equal(saved.weight, fresh.weight)


def test_an_optimizer_in_half_precision_takes_moments_in_single(run: ckptstore.Run) -> None:
    def stepped(dtype: torch.dtype) -> torch.optim.Adam:
        parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.Adam([parameter])
        parameter.grad = torch.ones(3, dtype=dtype)
        optimizer.step()
        return optimizer

    run.save({"o": stepped(torch.float32)}, step=1)
    half = stepped(torch.bfloat16)
    run.restore({"o": half})
    assert half.state_dict()["state"][0]["exp_avg"].dtype is torch.bfloat16


def test_a_graph_from_before_the_restore_no_longer_holds(run: ckptstore.Run) -> None:
    weight = torch.nn.Parameter(torch.ones(300, 300))
    run.save({"w": weight}, step=1)
    loss = (weight * weight).sum()
    run.restore({"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_the_default_device_does_not_matter(run: ckptstore.Run) -> None:
    weight = torch.zeros(300, 300)
    run.save({"w": torch.ones(300, 300), "b": torch.ones(3)}, step=1)
    torch.set_default_device("meta")
    try:
        run.restore({"w": weight})
        assert run.load(only="b").device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert weight.sum() == 90_000


@pytest.mark.parametrize(
    "live", [{"modle": torch.nn.Linear(2, 2)}, {"model": torch.nn.Sequential(torch.nn.Linear(2, 2))}]
)
def test_a_restore_that_would_fill_nothing_is_refused_without_strict_too(run: ckptstore.Run, live: Any) -> None:
    run.save({"model": torch.nn.Linear(2, 2)}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match="nothing of the destination is in the checkpoint"):
        run.restore(live, strict=False)


def test_deques_and_ordered_dicts_of_tensors_are_filled(run: ckptstore.Run) -> None:
    run.save({"o": OrderedDict(x=torch.ones(1)), "t": (torch.ones(1), 5)}, step=1)
    x, t = torch.zeros(1), torch.zeros(1)
    run.restore({"o": {"x": x}, "t": [t, 0]})
    assert (x.item(), t.item()) == (1, 1)


# ---- trees that somebody crafted


def matched(tree: Any, destination: Any) -> Match:
    value = Manifest(
        run="run",
        step=1,
        save=32 * "a",
        created="2026-11-25T01:02:03Z",
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=64 * "0",
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=tree,
        segments=[],
        chunks=[],
    )
    return match(destination, value)


def deep() -> Any:
    node: Any = 1
    for _ in range(5000):
        node = [node]
    return node


HUGE = {"$": "int", "hex": "0x" + "f" * 5000}
"""Python does not write it out in decimal."""


@pytest.mark.parametrize("params", [5, None, "ab", {"$": "tuple", "items": [0, 1]}], ids=repr)
def test_params_of_an_optimizer_that_are_no_list_are_none(params: Any) -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    found = matched({"o": {"state": {}, "param_groups": [{"params": params}]}}, {"o": optimizer})
    assert found.problems == ["o has parameter groups of [2] tensors and [0] in the checkpoint"]


def test_keys_that_python_does_not_write_out_are_told_in_another_way() -> None:
    tensor = {"$": "tensor", "dtype": "float32", "shape": [0], "segment": 0}
    found = matched({"x": {"$": "dict", "items": [[HUGE, tensor]]}}, {"x": {}})
    assert found.unexpected == [f"x[int {hash(int(HUGE['hex'], 16)):x}]"]
    found = matched({"x": {"$": "dict", "items": [[HUGE, 1]]}}, {"x": torch.nn.Linear(2, 2)})
    assert found.unexpected == [f"x[int {hash(int(HUGE['hex'], 16)):x}]"]
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    group = {"$": "dict", "items": [[HUGE, 1], ["params", [0, 1]]]}
    found = matched({"x": {"state": {}, "param_groups": [group]}}, {"x": optimizer})
    assert "is a SGD here, and its settings in the checkpoint are those of another optimizer" in found.problems[0]


@pytest.mark.parametrize("live", [torch.ones(1), [torch.ones(1)], {"a": torch.ones(1)}], ids=["tensor", "list", "dict"])
def test_a_tag_that_is_nested_too_deep_to_be_written_out_is_told(live: Any) -> None:
    assert "here and a dict in the checkpoint" in matched({"x": {"$": deep()}}, {"x": live}).problems[0]


@pytest.mark.parametrize("items", [None, 5, [1], [[1, 2, 3]], [[[], 1]], [["a", 1], ["a", 2]], "ab"], ids=repr)
def test_members_of_a_dict_that_make_no_sense_are_corrupt(items: Any) -> None:
    with pytest.raises(CorruptError):
        matched({"x": {"$": "dict", "items": items}}, {"x": {"a": torch.ones(1)}})


def test_what_stands_at_the_root_is_named_where_a_name_there_is_missing(tmp_path: Path) -> None:
    run = ckptstore.Store(tmp_path).run("a")
    run.save({"model_state_dict": {"w": torch.ones(3)}, "epoch": 3}, step=1)
    with pytest.raises(InvalidInputError, match="At its root stand: model_state_dict, epoch"):
        run.restore({"model": {"w": torch.zeros(3)}})
