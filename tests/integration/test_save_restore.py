"""What users do with a run: save, restore, load a part, save again, delete; and how many requests that takes."""

import uuid
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore
from ckptstore import chunk
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects
from tests.strategies import assert_same


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def run(place: Objects) -> ckptstore.Run:
    return ckptstore.Store(place).run("run")


class Net(torch.nn.Module):
    """Tied weights, a buffer, BatchNorm; large enough for chunks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.linear = torch.nn.Linear(64, 300, bias=False)
        self.linear.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.embedding(words)))  # type: ignore[no-any-return]


def trained(steps: int = 3) -> tuple[Net, torch.optim.Adam]:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randint(0, 300, (16,))).square().mean().backward()
        optimizer.step()
    return net, optimizer


def equal(one: Net, other: Net) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---- restore


def test_restore_of_a_place_without_a_store_is_a_first_start(run: ckptstore.Run) -> None:
    net = Net()
    assert run.restore({"model": net}) is None
    assert run.latest() is None
    assert run.steps() == []
    assert run.checkpoints() == []


def test_restore_puts_the_newest_in_place(run: ckptstore.Run) -> None:
    net, optimizer = trained()
    run.save({"model": Net(), "optimizer": optimizer, "step": 1}, step=1)
    run.save({"model": net, "optimizer": optimizer, "step": 2}, step=2, metrics={"loss": 0.5}, metadata={"lr": 0.1})
    fresh = Net()
    memory = [parameter.data_ptr() for parameter in fresh.parameters()]
    fresh_optimizer = torch.optim.Adam(fresh.parameters())
    checkpoint = run.restore({"model": fresh, "optimizer": fresh_optimizer})
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["step"]) == (2, 2)
    assert (checkpoint.metrics, checkpoint.metadata) == ({"loss": 0.5}, {"lr": 0.1})
    assert equal(fresh, net)
    assert [parameter.data_ptr() for parameter in fresh.parameters()] == memory
    assert fresh.linear.weight is fresh.embedding.weight
    assert_same(fresh_optimizer.state_dict(), optimizer.state_dict())


def test_restored_moments_are_the_optimizers_own(run: ckptstore.Run) -> None:
    _, optimizer = trained()
    run.save({"optimizer": optimizer}, step=1)
    memory = [state["exp_avg"].data_ptr() for state in optimizer.state.values()]
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    run.restore({"optimizer": optimizer})
    assert [state["exp_avg"].data_ptr() for state in optimizer.state.values()] == memory
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before)


def test_a_step_can_be_named(run: ckptstore.Run) -> None:
    for step in (1, 2, 3):
        run.save({"weight": torch.full((4,), step)}, step=step)
    weight = torch.zeros(4, dtype=torch.int64)
    checkpoint = run.restore({"weight": weight}, step=2)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert weight.tolist() == [2] * 4
    with pytest.raises(ckptstore.NotFoundError, match="no checkpoint at step 7; it has steps 1, 2, 3"):
        run.restore({"weight": weight}, step=7)


def test_a_part_of_what_was_saved_can_be_restored(run: ckptstore.Run) -> None:
    net, optimizer = trained()
    run.save({"model": net, "optimizer": optimizer, "more": [torch.ones(2), {"x": torch.zeros(3)}]}, step=1)
    fresh = Net()
    assert run.restore({"model": fresh}) is not None
    assert equal(fresh, net)
    x = torch.ones(3)
    assert run.restore({"more": [torch.zeros(2), {"x": x}]}) is not None
    assert x.tolist() == [0, 0, 0]


def test_arrays_and_nested_tensors_are_filled_in_place(run: ckptstore.Run) -> None:
    state = {
        "array": np.arange(5.0),
        "pair": (torch.ones(2, 3), torch.zeros(1)),
        "ordered": OrderedDict(a=torch.ones(1)),
    }
    run.save(state, step=1)
    destination: dict[str, Any] = {
        "array": np.zeros(5),
        "pair": (torch.zeros(3, 2).t(), torch.ones(1)),
        "ordered": {"a": torch.zeros(1)},
    }
    run.restore(destination)
    assert destination["array"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(destination["pair"][0], torch.ones(2, 3))
    assert destination["ordered"]["a"].item() == 1


def test_tied_weights_come_back_tied_by_load_and_are_stored_once(run: ckptstore.Run) -> None:
    net = Net()
    saved = run.save({"model": net}, step=1)
    assert saved.raw_bytes < 300 * 64 * 4 * 1.1
    model = run.load(only="model")
    assert model["linear.weight"].data_ptr() == model["embedding.weight"].data_ptr()
    assert type(model) is OrderedDict
    assert model._metadata == net.state_dict()._metadata  # type: ignore[attr-defined]


def test_what_was_tied_can_be_restored_untied_and_the_other_way_round(run: ckptstore.Run) -> None:
    shared = torch.arange(6.0)
    run.save({"a": shared, "b": shared}, step=1)
    a, b = torch.zeros(6), torch.zeros(6)
    run.restore({"a": a, "b": b})
    assert torch.equal(a, shared)
    assert torch.equal(b, shared)
    both = torch.zeros(6)
    run.restore({"a": both, "b": both})
    assert torch.equal(both, shared)


# ---- what does not fit


def test_everything_that_does_not_fit_is_one_error_and_nothing_is_changed(run: ckptstore.Run) -> None:
    run.save({"model": torch.nn.Linear(4, 3), "x": torch.ones(2), "y": torch.ones(2)}, step=5)
    model, x, y = torch.nn.Linear(5, 3), torch.zeros(3), torch.zeros(2, dtype=torch.float64)
    before = model.weight.detach().clone()
    with pytest.raises(ckptstore.InvalidInputError) as caught:
        run.restore({"model": model, "x": x, "y": y, "z": torch.zeros(1)})
    told = str(caught.value)
    assert "step 5 of run 'run' does not fit" in told
    assert "model.weight has shape (3, 5) and (3, 4) in the checkpoint" in told
    assert "x has shape (3,) and (2,) in the checkpoint" in told
    assert "y is float64 and float32 in the checkpoint" in told
    assert "z is not in the checkpoint" in told
    assert "Nothing was changed" in told
    assert torch.equal(model.weight, before)
    assert y.tolist() == [0, 0]


def test_missing_and_unexpected_keys_are_listed_together(run: ckptstore.Run) -> None:
    run.save({"model": torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 2)))}, step=1)
    other = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(2, 2), c=torch.nn.Linear(2, 2)))
    kept = other.c.weight.detach().clone()  # type: ignore[union-attr, operator]
    with pytest.raises(ckptstore.InvalidInputError) as caught:
        run.restore({"model": other})
    for text in ("model.c.weight is not in the checkpoint", "model.b.bias is in the checkpoint and not in the dest"):
        assert text in str(caught.value)
    checkpoint = run.restore({"model": other}, strict=False)
    assert checkpoint is not None
    assert checkpoint.missing == ("model.c.weight", "model.c.bias")
    assert checkpoint.unexpected == ("model.b.weight", "model.b.bias")
    assert torch.equal(other.c.weight, kept)  # type: ignore[union-attr, arg-type]
    assert torch.equal(other.a.weight, run.load(only="model.a.weight"))  # type: ignore[union-attr, arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, at its own import
@pytest.mark.parametrize("wrap", [lambda net: torch.nn.ModuleDict({"module": net}), torch.compile])
def test_keys_that_differ_by_a_wrappers_prefix_are_told_as_such(run: ckptstore.Run, wrap: Any) -> None:
    run.save({"model": wrap(torch.nn.Linear(2, 2))}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match=r"differ only by the prefix .* save and restore the module"):
        run.restore({"model": torch.nn.Linear(2, 2)})


def test_an_optimizer_with_other_groups_is_refused_before_anything_changes(run: ckptstore.Run) -> None:
    net, optimizer = trained()
    run.save({"model": net, "optimizer": optimizer}, step=1)
    fresh = Net()
    before = fresh.embedding.weight.detach().clone()
    groups = [{"params": [parameter]} for parameter in fresh.parameters()]
    with pytest.raises(
        ckptstore.InvalidInputError, match=r"optimizer has parameter groups of \[1, 1, 1\] tensors and \[3\]"
    ):
        run.restore({"model": fresh, "optimizer": torch.optim.Adam(groups)})
    assert torch.equal(fresh.embedding.weight, before)


def test_a_load_state_dict_that_refuses_is_told_with_its_place(run: ckptstore.Run) -> None:
    class Picky:
        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("y")

    run.save({"picky": Picky()}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match=r"load_state_dict\(\) of picky \(Picky\) refused .*'y'"):
        run.restore({"picky": Picky()})


# ---- saving again


def test_the_same_state_again_uploads_nothing_and_takes_few_requests(place: Objects) -> None:
    recording = RecordingObjects(place)
    run = ckptstore.Store(recording).run("run")
    net, optimizer = trained()
    first = run.save({"model": net, "optimizer": optimizer}, step=1)
    assert first.new_bytes == first.stored_bytes > 0
    recording.clear()
    second = run.save({"model": net, "optimizer": optimizer}, step=2)
    assert second.new_bytes == 0
    assert second.stored_bytes == first.stored_bytes
    assert not any(key.startswith("chunks/") for key in recording.keys("put") + recording.keys("list"))
    requests = [(call.operation, call.key.split("/")[0]) for call in recording.calls if call.operation != "sync"]
    assert requests == [
        ("get", "ckptstore.json"),
        ("list", "runs"),
        ("put", "sessions"),
        ("list", "condemned"),
        ("get", "runs"),
        ("create", "runs"),
        ("delete", "sessions"),
    ]


def test_the_same_state_as_the_same_step_is_the_checkpoint_that_is_there(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    first = run.save({"x": torch.ones(3)}, step=1)
    recording = RecordingObjects(place)
    assert ckptstore.Store(recording).run("run").save({"x": torch.ones(3)}, step=1) == first
    assert recording.count("put", "create", "delete") == 0


def test_another_state_as_the_same_step_is_a_conflict_unless_it_is_to_replace(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.ones(3)}, step=1)
    keys = [row.key for row in place.list("")]
    with pytest.raises(ckptstore.ConflictError, match=r"step 1 of run 'run' is saved already.*replace=True"):
        run.save({"x": torch.zeros(3)}, step=1)
    assert [row.key for row in place.list("")] == keys
    run.save({"x": torch.zeros(3)}, step=1, replace=True)
    assert run.load()["x"].tolist() == [0, 0, 0]
    assert run.steps() == [1]
    assert len(run.checkpoints()) == 1


def test_a_fine_tune_with_frozen_layers_uploads_only_what_changed(place: Objects) -> None:
    base = torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(512, 512), head=torch.nn.Linear(512, 64)))
    store = ckptstore.Store(place)
    first = store.run("base").save({"model": base}, step=1)
    tuned = torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(512, 512), head=torch.nn.Linear(512, 64)))
    store.run("base").restore({"model": tuned})
    torch.nn.init.normal_(tuned.head.weight)  # type: ignore[union-attr, arg-type]
    second = store.run("tuned").save({"model": tuned}, step=1)
    head_bytes = 512 * 64 * 4
    assert 0 < second.new_bytes < 1.1 * head_bytes + 4096
    assert first.stored_bytes > 5 * second.new_bytes
    usage = store.usage()
    assert usage.runs["tuned"].shared_bytes == usage.runs["base"].shared_bytes > 0
    assert usage.stored_bytes < usage.runs["base"].stored_bytes + usage.runs["tuned"].stored_bytes


def test_equal_tensors_in_one_state_are_stored_once(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    run.save({str(number): torch.full((200, 200), 3.0) for number in range(5)}, step=1)
    assert len(place.list("chunks/")) == 1
    assert all(value.eq(3).all() for value in run.load().values())


def test_many_small_tensors_are_few_objects(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    state = {str(number): torch.full((10,), number) for number in range(3000)}
    run.save(state, step=1)
    assert len(place.list("chunks/")) == 1
    assert_same(run.load(), state)


# ---- looking and deleting


def test_a_part_reads_only_that_parts_chunks(place: Objects) -> None:
    ckptstore.Store(place).run("run").save({"a": torch.randn(200, 200), "b": torch.randn(200, 200), "n": 3}, step=1)
    recording = RecordingObjects(place)
    run = ckptstore.Store(recording).run("run")
    assert run.load(only="a").shape == (200, 200)
    assert sum(key.startswith("chunks/") for key in recording.keys("get")) == 1
    recording.clear()
    assert run.load(only="n") == 3
    assert not any(key.startswith("chunks/") for key in recording.keys("get"))


def test_a_part_that_is_not_there_is_told_with_what_is(run: ckptstore.Run) -> None:
    run.save({"model": {"a": 1, "b": 2}, "step": 1}, step=1)
    with pytest.raises(ckptstore.NotFoundError, match=r"no 'model.c' .* model.a, model.b"):
        run.load(only="model.c")


def test_state_metrics_and_tensors_are_seen_without_reading_chunks(place: Objects) -> None:
    state = {"model": {"w": torch.zeros(2, 3)}, "step": 4, "names": ("a", "b")}
    ckptstore.Store(place).run("run").save(state, step=4, metrics={"loss": float("inf"), "top": [1, 2]})
    recording = RecordingObjects(place)
    checkpoint = ckptstore.Store(recording).run("run").latest()
    assert checkpoint is not None
    info = ckptstore.TensorInfo("float32", (2, 3), 24)
    assert checkpoint.state == {"model": {"w": info}, "step": 4, "names": ("a", "b")}
    assert checkpoint.tensors() == {"model.w": info}
    assert checkpoint.metrics == {"loss": float("inf"), "top": [1, 2]}
    assert "run@4" in repr(checkpoint)
    assert not any(key.startswith("chunks/") for key in recording.keys("get"))


def test_steps_and_runs_are_listed_in_order(place: Objects) -> None:
    store = ckptstore.Store(place)
    assert store.runs() == []
    for name, step in [("b", 10), ("a", 2), ("b", 9), ("b", 100)]:
        store.run(name).save({"x": step}, step=step)
    assert store.runs() == ["a", "b"]
    assert store.run("b").steps() == [9, 10, 100]
    assert [checkpoint.step for checkpoint in store.run("b").checkpoints()] == [9, 10, 100]


def test_a_deleted_step_is_gone_and_its_chunks_stay_for_others(place: Objects) -> None:
    store = ckptstore.Store(place)
    run = store.run("run")
    for step in (1, 2):
        run.save({"x": torch.arange(40_000), "step": step}, step=step)
    run.delete(2)
    assert run.steps() == [1]
    latest = run.latest()
    assert latest is not None
    assert latest.step == 1
    assert run.load(step=1)["x"].shape == (40_000,)
    with pytest.raises(ckptstore.NotFoundError, match="no checkpoint at step 2, so there is nothing to delete"):
        run.delete(2)
    run.delete(1)
    assert store.runs() == []
    assert run.restore({"x": torch.zeros(40_000)}) is None
    assert store.usage().unreferenced_bytes > 0
    assert run.save({"x": torch.arange(40_000), "step": 2}, step=2).new_bytes == 0


def test_two_saves_that_raced_to_one_step_are_one_checkpoint(place: Objects) -> None:
    store = ckptstore.Store(place)

    class Racing(RecordingObjects):
        """Just before the first manifest is created, another job saves the same step."""

        raced = False

        def create(self, key: str, content: Any) -> bool:
            if key.startswith("runs/") and not self.raced:
                Racing.raced = True
                store.run("run").save({"x": torch.zeros(3)}, step=1)
            return super().create(key, content)

    ckptstore.Store(Racing(place)).run("run").save({"x": torch.ones(3)}, step=1)
    assert len(place.list("runs/run/")) == 2
    assert store.run("run").steps() == [1]
    assert store.run("run").load()["x"].tolist() in ([0, 0, 0], [1, 1, 1])
    assert store.run("run").load()["x"].tolist() == store.run("run").load(step=1)["x"].tolist()
    store.run("run").delete(1)
    assert store.run("run").steps() == []


def test_a_state_that_changes_while_it_is_saved_is_an_error_and_no_checkpoint(place: Objects) -> None:
    weight = torch.zeros(200, 200)

    class Training(RecordingObjects):
        """Trains on just when the save looks for what is there."""

        def list(self, prefix: str) -> Any:
            if prefix.startswith("chunks/"):
                weight.add_(1)
            return super().list(prefix)

    with pytest.raises(ckptstore.InvalidInputError, match="the state changed while it was saved"):
        ckptstore.Store(Training(place)).run("run").save({"weight": weight}, step=1)
    assert ckptstore.Store(place).run("run").steps() == []
    assert place.list("sessions/") == []


def test_a_write_between_hash_and_encoding_is_seen(place: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(200, 200)
    encode = chunk.encode

    def encode_after_a_write(*args: Any) -> Any:
        weight.add_(1)
        return encode(*args)

    monkeypatch.setattr("ckptstore.performing.encode_chunk", encode_after_a_write)
    run = ckptstore.Store(place).run("run")
    with pytest.raises(ckptstore.InvalidInputError, match="the state changed while it was saved"):
        run.save({"weight": weight}, step=1)
    assert place.list("chunks/") == []
    run.save_async({"weight": weight}, step=1).result()  # of a copy, so nothing can write to it
    assert run.load()["weight"].max() == run.load()["weight"].min()


def test_new_metrics_of_the_same_state_count_only_with_replace(run: ckptstore.Run) -> None:
    run.save({"x": 1}, step=1, metrics={"loss": 2.0})
    assert run.save({"x": 1}, step=1, metrics={"loss": 3.0}).metrics == {"loss": 2.0}
    assert run.save({"x": 1}, step=1, metrics={"loss": 3.0}, replace=True).metrics == {"loss": 3.0}
    assert run.checkpoint().metrics == {"loss": 3.0}
    assert run.steps() == [1]


def test_a_view_with_gaps_is_stored_without_what_lies_between(run: ckptstore.Run) -> None:
    table = torch.arange(400_000.0).reshape(1000, 400)
    assert run.save({"part": table[:, :10]}, step=1).raw_bytes == 1000 * 10 * 4
    assert torch.equal(run.load()["part"], table[:, :10])


def test_loaded_tensors_are_aligned_as_torchs_own(run: ckptstore.Run) -> None:
    run.save([torch.ones(size) for size in (3, 5, 70_000, 1_100_000)], step=1)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in run.load())


def test_nothing_warns_in_good_order(run: ckptstore.Run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = np.arange(10)
        array.flags.writeable = False
        run.save({"array": array, "long": bytes(5000)}, step=1)
        assert run.load()["array"].tolist() == list(range(10))


def test_tensors_under_very_long_keys_are_restored_each_to_its_place(run: ckptstore.Run) -> None:
    long = "k" * 2000
    saved = {long: {"a": torch.ones(3), "b": torch.zeros(3)}, f"{long}2": {"a": torch.full((3,), 2.0)}}
    run.save(saved, step=1)
    live = {long: {"a": torch.empty(3), "b": torch.empty(3)}, f"{long}2": {"a": torch.empty(3)}}
    run.restore(live)
    assert_same(live, saved)
    assert torch.equal(run.load(only=f"{long}2.a"), saved[f"{long}2"]["a"])
    assert len(run.checkpoint().tensors()) == 3
