"""`CkptstoreWriter` and `CkptstoreReader` as one process uses them: arguments, planners, values, errors."""

import functools
import io
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import ckptstore
from ckptstore import tagging
from ckptstore.assembly import Assembly
from ckptstore.errors import ConflictError, InvalidInputError, NotFoundError, UnavailableError
from ckptstore.integrations import _dcp_reader
from ckptstore.integrations.dcp import CkptstoreReader, CkptstoreWriter
from ckptstore.tree import TORCH_DTYPES
from tests.strategies import assert_same

# DCP warns in a process without a group, which is what is wanted here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]

STATE = {"model": {"weight": torch.arange(60_000.0).reshape(200, 300), "bias": torch.ones(3)}, "step": 7}


def emptied() -> dict[str, Any]:
    return {"model": {"weight": torch.zeros(200, 300), "bias": torch.zeros(3)}, "step": 0}


def error_of(raised: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    [(error, _)] = raised.value.failures.values()
    return error


def test_a_checkpoint_has_the_metrics_the_metadata_and_the_tags_that_were_given(tmp_path: Path) -> None:
    writer = CkptstoreWriter(
        tmp_path, run="a", step=3, metrics={"loss": 0.5}, metadata={"by": "dcp"}, tags=["best", "kept"]
    )
    assert writer.checkpoint is None
    save(STATE, storage_writer=writer)
    run = ckptstore.Store(tmp_path).run("a")
    checkpoint = run.checkpoint()
    assert writer.checkpoint == checkpoint
    assert (checkpoint.step, dict(checkpoint.metrics), dict(checkpoint.metadata)) == (3, {"loss": 0.5}, {"by": "dcp"})
    assert run.tags() == {3: ("best", "kept")}
    assert_same(run.load(), STATE)


def test_checkpoint_id_names_run_and_step_or_the_step_alone(tmp_path: Path) -> None:
    writer = CkptstoreWriter(tmp_path)
    for checkpoint_id in ("a@1", "2", "b@3"):
        save(STATE, checkpoint_id=checkpoint_id, storage_writer=writer)
    store = ckptstore.Store(tmp_path)
    assert {name: store.run(name).steps() for name in store.runs()} == {"a": [1, 2], "b": [3]}
    assert writer.checkpoint_id == "b@3"
    reader = CkptstoreReader(tmp_path, run="a")
    assert reader.checkpoint_id == "a@latest"
    wanted: list[tuple[str | None, int]] = [(None, 2), ("1", 1), ("b@3", 3)]
    for wanted_id, step in wanted:
        load(state := emptied(), checkpoint_id=wanted_id, storage_reader=reader)
        assert_same(state, STATE)
        assert reader.checkpoint.step == step


@pytest.mark.parametrize(
    ("checkpoint_id", "good"),
    [("a@1", True), ("17", True), ("@17", True), ("a", False), ("./a@1", False), ("a@b", False)],
)
def test_what_a_checkpoint_id_may_be(checkpoint_id: str, good: bool, tmp_path: Path) -> None:
    assert CkptstoreWriter.validate_checkpoint_id(checkpoint_id) is good
    assert CkptstoreReader.validate_checkpoint_id(checkpoint_id) is good
    writer = CkptstoreWriter(tmp_path, run="a")
    if good:
        writer.reset(checkpoint_id)
    else:
        with pytest.raises(InvalidInputError, match="neither RUN@STEP"):
            writer.reset(checkpoint_id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "a/b"}, "cannot be the name of a run"),
        ({"step": -1}, "step must lie between"),
        ({"metrics": {"loss": torch.ones(2)}}, "metrics and metadata hold small values"),
        ({"tags": ["a b"]}, "cannot be a tag"),
        ({"codec": "tiny"}, "codec must be one of"),
        ({"threads": 0}, "threads must be a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_makes_no_sense_is_refused_at_once(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        CkptstoreWriter(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), [({"step": 1}, "no run is given"), ({"run": "a"}, "no step is")])
def test_without_a_run_or_a_step_nothing_is_saved(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as raised:
        save(STATE, storage_writer=CkptstoreWriter(tmp_path, **arguments))
    assert message in str(error_of(raised))
    assert list(tmp_path.iterdir()) == []


def test_a_store_may_be_given_in_place_of_its_url(tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path, codec="none", threads=1)
    save(STATE, storage_writer=CkptstoreWriter(store, run="a", step=1))
    load(state := emptied(), storage_reader=CkptstoreReader(store, run="a", step=1))
    assert_same(state, STATE)
    assert store.run("a").checkpoint().stored_bytes > store.run("a").checkpoint().raw_bytes
    with pytest.raises(InvalidInputError, match="storage_options belong to the Store"):
        CkptstoreReader(store, run="a", storage_options={"key": "x"})


def test_a_writer_made_of_a_url_can_be_sent_to_another_process_and_one_made_of_a_store_says_why_not(
    tmp_path: Path,
) -> None:
    writer = pickle.loads(pickle.dumps(CkptstoreWriter(tmp_path, run="a", step=1)))
    save(STATE, storage_writer=writer)
    assert ckptstore.Store(tmp_path).run("a").steps() == [1]
    with pytest.raises(InvalidInputError, match="give its URL"):
        pickle.dumps(CkptstoreWriter(ckptstore.Store(tmp_path), run="a", step=1))


def test_a_store_in_memory_serves_too() -> None:
    url = "memory://dcp-in-memory"
    save(STATE, storage_writer=CkptstoreWriter(url, run="a", step=1))
    load(state := emptied(), storage_reader=CkptstoreReader(url, run="a"))
    assert_same(state, STATE)


def test_another_state_of_the_same_step_is_refused_unless_it_is_to_replace_it(tmp_path: Path) -> None:
    save({"step": 1}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    save({"step": 1}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    with pytest.raises(CheckpointException) as raised:
        save({"step": 2}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    assert isinstance(error_of(raised), ConflictError)
    save({"step": 2}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1, replace=True))
    assert ckptstore.Store(tmp_path).run("a").load() == {"step": 2}
    assert list((tmp_path / "sessions").iterdir()) == []


@pytest.mark.parametrize("saved_flat", [True, False])
@pytest.mark.parametrize("loaded_flat", [True, False])
def test_planners_that_flatten_and_planners_that_do_not_read_each_others_checkpoints(
    tmp_path: Path, saved_flat: bool, loaded_flat: bool
) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=saved_flat, flatten_sharded_tensors=saved_flat)
    save(STATE, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1), planner=planner)
    assert_same(ckptstore.Store(tmp_path).run("a").load(), STATE)
    load_planner = DefaultLoadPlanner(flatten_state_dict=loaded_flat, flatten_sharded_tensors=loaded_flat)
    load(state := emptied(), storage_reader=CkptstoreReader(tmp_path, run="a"), planner=load_planner)
    assert_same(state, STATE)


def test_dcp_rebuilds_a_state_from_the_checkpoint_alone(tmp_path: Path) -> None:
    save(STATE, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    assert_same(_load_state_dict_from_keys(storage_reader=CkptstoreReader(tmp_path, run="a")), STATE)
    part = _load_state_dict_from_keys({"model.bias"}, storage_reader=CkptstoreReader(tmp_path, run="a"))
    assert_same(part, {"model": {"bias": torch.ones(3)}})


VALUES = {
    "none": None,
    "bool": True,
    "int": 2**80,
    "float": float("inf"),
    "complex": 1j,
    "text": "naïve",
    "bytes": b"\x00" * 5000,
    "tuple": (1, ("a", None)),
    "list": [1, [2, []]],
    "set": {1, 2},
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "array": np.arange(20_000).reshape(100, 200),
    "scalar": np.float32(1.5),
    "tensors": (torch.arange(30_000), "beside", [torch.ones(2)]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were_through_dcp_and_through_run_load(tmp_path: Path, name: str) -> None:
    save({"held": {name: VALUES[name]}}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    assert_same(ckptstore.Store(tmp_path).run("a").load(), {"held": {name: VALUES[name]}})
    state: dict[str, Any] = {"held": {name: None}}
    load(state, storage_reader=CkptstoreReader(tmp_path, run="a"))
    assert_same(state, {"held": {name: VALUES[name]}})


@pytest.mark.parametrize(
    "odd", [print, functools.partial(print), object(), io.BytesIO(b"x"), torch.eye(3).to_sparse()], ids=type
)
def test_what_only_pickle_could_hold_is_refused_and_its_key_named(tmp_path: Path, odd: object) -> None:
    with pytest.raises(CheckpointException) as raised:
        save({"model": {"odd": odd}}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    error = error_of(raised)
    assert isinstance(error, InvalidInputError)
    assert "model.odd" in str(error)
    assert not (tmp_path / "chunks").exists()


class HalvingPlanner(DefaultSavePlanner):
    """As in the documentation of DCP's planners: tensors are saved in half precision."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            if item.tensor_data is not None:
                properties = replace(item.tensor_data.properties, dtype=torch.float16)
                item = replace(item, tensor_data=replace(item.tensor_data, properties=properties))
            items.append(item)
        self.plan = replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        found = super().resolve_data(write_item)
        return found if isinstance(found, io.BytesIO) else found.to(torch.float16)


def test_a_planner_may_save_tensors_in_another_dtype(tmp_path: Path) -> None:
    whole = torch.linspace(-1, 1, 40_000)
    writer = CkptstoreWriter(tmp_path, run="a", step=1)
    save({"weight": whole, "step": 3}, storage_writer=writer, planner=HalvingPlanner())
    assert_same(ckptstore.Store(tmp_path).run("a").load(), {"weight": whole.half(), "step": 3})
    state: dict[str, Any] = {"weight": torch.zeros(40_000), "step": 0}
    load(state, storage_reader=CkptstoreReader(tmp_path, run="a"))
    assert_same(state, {"weight": whole.half().float(), "step": 3})  # converted as DCP does


class SecretivePlanner(DefaultSavePlanner):
    """Writes values in a way of its own."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return io.BytesIO(b"my own") if write_item.type == WriteItemType.BYTE_IO else object


def test_a_planner_that_writes_values_in_a_way_of_its_own_is_told_that_they_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as raised:
        save({"step": 1}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1), planner=SecretivePlanner())
    assert "step: what SecretivePlanner.resolve_data makes of it is not torch.save" in str(error_of(raised))


def test_the_latest_checkpoint_is_loaded_if_no_step_is_given_and_one_that_is_not_there_is_an_error(
    tmp_path: Path,
) -> None:
    for step in (5, 40):
        save({"step": step}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=step))
    state: dict[str, Any] = {"step": 0}
    load(state, storage_reader=CkptstoreReader(tmp_path, run="a"))
    assert state == {"step": 40}
    with pytest.raises(NotFoundError, match="no checkpoint at step 6; it has steps 5, 40"):
        _ = CkptstoreReader(tmp_path, run="a", step=6).checkpoint


def test_tensors_of_any_layout_that_run_save_has_saved_come_back_through_dcp(tmp_path: Path) -> None:
    base = torch.arange(60_000.0)
    state = OrderedDict(
        transposed=base.reshape(200, 300).t(),
        part=base[1000:31_000],
        whole=base,
        expanded=torch.ones(3, 1).expand(3, 4),
        scalar=torch.tensor(2, dtype=torch.int8),
        empty=torch.empty(3, 0),
        complex=torch.ones(100, 200, dtype=torch.complex128),
    )
    ckptstore.Store(tmp_path).run("a").save(state, step=1)
    found = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in state.items()}
    load(found, storage_reader=CkptstoreReader(tmp_path, run="a"))
    for name, each in state.items():
        assert torch.equal(found[name], each), name


def test_a_tensor_of_any_layout_is_saved(tmp_path: Path) -> None:
    base = torch.arange(60_000.0).reshape(200, 300)
    state = {
        "transposed": base.t(),
        "narrow": base[:, 5:50],
        "conjugate": torch.ones(99, 99).to(torch.complex64).conj(),
    }
    save(state, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    found = ckptstore.Store(tmp_path).run("a").load()
    for name, each in state.items():
        assert torch.equal(found[name], each), name
        assert found[name].is_contiguous()


def test_a_writer_that_is_used_again_too_soon_takes_no_session_from_the_save_that_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CkptstoreWriter(tmp_path, run="a", step=1)
    conclude = CkptstoreWriter._conclude
    standing: list[int] = []

    def used_again_meanwhile(self: CkptstoreWriter, *arguments: Any) -> Any:
        self.reset("2")
        self.set_up_storage_writer(True)
        standing.append(len(list((tmp_path / "sessions").iterdir())))
        return conclude(self, *arguments)

    monkeypatch.setattr(CkptstoreWriter, "_conclude", used_again_meanwhile)
    save(STATE, storage_writer=writer)
    assert standing == [1]
    assert ckptstore.Store(tmp_path).run("a").steps() == [1]
    assert list((tmp_path / "sessions").iterdir()) == []


def test_a_state_that_no_reader_would_take_is_not_committed(tmp_path: Path) -> None:
    value: Any = torch.ones(3)
    for _ in range(60):
        value = (value,)
    state: Any = {"deep": value}
    for _ in range(60):
        state = {"deeper": state}
    with pytest.raises(CheckpointException) as raised:
        save(state, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    assert "cannot be saved as it is" in str(error_of(raised))
    assert ckptstore.Store(tmp_path).run("a").steps() == []
    assert list((tmp_path / "sessions").iterdir()) == []


def test_of_two_tensors_with_one_key_neither_is_taken_for_the_other(tmp_path: Path) -> None:
    ckptstore.Store(tmp_path).run("a").save(
        {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}, "c": torch.ones(1)}, step=1
    )
    reader = CkptstoreReader(tmp_path, run="a")
    with pytest.raises(CheckpointException):
        load({"a.b": torch.zeros(2)}, storage_reader=reader)
    c = torch.zeros(1)
    load({"c": c}, storage_reader=reader)
    assert c == 1


def test_a_save_in_the_background_of_one_process(tmp_path: Path) -> None:
    future = async_save(STATE, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    future.result()  # type: ignore[union-attr]
    assert_same(ckptstore.Store(tmp_path).run("a").load(), STATE)


def test_progress_is_told_of_what_is_uploaded(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    writer = CkptstoreWriter(tmp_path, run="a", step=1, progress=lambda done, total: told.append((done, total)))
    save(STATE, storage_writer=writer)
    assert told[-1] == (240_000, 240_000)


def test_tensors_of_every_dtype_are_saved_and_loaded(tmp_path: Path) -> None:
    state = {name: torch.arange(48).to(torch.uint8).view(dtype).reshape(-1, 1) for name, dtype in TORCH_DTYPES.items()}
    state |= {f"wide {name}": torch.arange(96_000).to(torch.uint8).view(each) for name, each in TORCH_DTYPES.items()}
    save(state, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    found = {name: torch.empty_like(each) for name, each in state.items()}
    load(found, storage_reader=CkptstoreReader(tmp_path, run="a"))
    for name, each in state.items():
        assert torch.equal(found[name].view(torch.uint8), each.view(torch.uint8)), name


def test_a_checkpoint_that_stands_and_could_not_be_tagged_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnavailableError("no tags today")

    monkeypatch.setattr(tagging, "add", refuse)
    with pytest.raises(CheckpointException) as raised:
        save(STATE, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1, tags="best"))
    assert "step 1 of run 'a' is saved, and has no tag 'best' yet: no tags today" in str(error_of(raised))
    assert ckptstore.Store(tmp_path).run("a").steps() == [1]


def test_what_is_converted_on_its_way_is_read_in_batches_and_none_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    class Counted(Assembly):
        def fill(self, *args: Any, **kwargs: Any) -> None:
            batches.append(len(self._boxes))
            super().fill(*args, **kwargs)

    monkeypatch.setattr(_dcp_reader, "Assembly", Counted)
    monkeypatch.setattr(_dcp_reader, "MAX_INFLIGHT_BYTES", 50_000)
    state = {f"t{number}": torch.full((5000,), float(number)) for number in range(10)} | {"note": "x"}
    save(state, storage_writer=CkptstoreWriter(tmp_path, run="a", step=1))
    found: dict[str, Any] = {name: torch.zeros(5000, dtype=torch.float64) for name in state if name != "note"}
    load(found := found | {"note": ""}, storage_reader=CkptstoreReader(tmp_path, run="a"))
    assert batches == [3, 3, 3, 1]
    assert found.pop("note") == "x"
    for number, each in enumerate(found.values()):
        assert torch.equal(each, torch.full((5000,), float(number), dtype=torch.float64))


def test_a_checkpoint_that_is_compacted_and_collected_while_it_is_loaded_is_read_in_its_new_form(
    tmp_path: Path,
) -> None:
    store = ckptstore.Store(tmp_path)
    weights = [torch.arange(100_000).float() + step for step in range(3)]
    for step, weight in enumerate(weights):
        save({"weight": weight}, storage_writer=CkptstoreWriter(tmp_path, run="a", step=step))

    class Compacting(DefaultLoadPlanner):
        def create_local_plan(self) -> LoadPlan:
            assert store.run("a").compact(keep_fast=1).compacted
            assert store.collect().deleted
            return super().create_local_plan()

    state = {"weight": torch.zeros(100_000)}
    load(state, storage_reader=CkptstoreReader(tmp_path, run="a", step=0), planner=Compacting())
    assert torch.equal(state["weight"], weights[0])
