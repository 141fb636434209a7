"""`Store(codec=…)`: whatever chunks are written with, what comes back is what went in, and equal chunks are found."""

import copy
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.objects.base import Objects
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects
from tests.servers import S3Server
from tests.strategies import assert_same

CODECS = ["none", "fast", "small"]


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


class Training:
    """A small model that is really trained: its steps are as floats move in training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Tanh(), torch.nn.Linear(256, 128))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.step = 0

    def train(self, steps: int = 1) -> "Training":
        for _ in range(steps):
            inputs = torch.randn(32, 128)
            self.optimizer.zero_grad()
            (self.model(inputs) - inputs).square().mean().backward()
            self.optimizer.step()
            self.step += 1
        return self

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "step": self.step}

    def state_dicts(self) -> dict[str, Any]:
        """A copy, which training on does not change."""
        dicts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        return copy.deepcopy(dicts)


def deltas_in(checkpoint: ckptstore.Checkpoint) -> int:
    return sum(ref.base is not None for ref in checkpoint._manifest.chunks)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", ["save", "save_async"])
def test_every_checkpoint_of_a_training_comes_back_as_it_was(place: Objects, codec: Any, how: str) -> None:
    run = ckptstore.Store(place, codec=codec).run("run")
    training, states = Training(), {}
    for _ in range(4):
        training.train()
        states[training.step] = training.state_dicts()
        saved = getattr(run, how)(training.state(), step=training.step)
    if how == "save_async":
        saved.result()
    reader = ckptstore.Store(place).run("run")
    for step, state in states.items():
        assert_same(reader.load(step), state)
    restored = Training()
    assert reader.restore(restored.state()) is not None
    assert_same(restored.state_dicts() | {"step": 4}, states[4])
    assert ckptstore.Store(place).verify().ok


def test_small_stores_differences_where_these_are_clearly_smaller(place: Objects) -> None:
    fast, small = (ckptstore.Store(place, codec=codec).run(codec) for codec in ("fast", "small"))
    training = Training().train(50)
    small.save(training.state(), step=50)
    in_differences = small.save(training.train().state(), step=51)
    in_full = fast.save(training.train().state(), step=52)
    assert deltas_in(in_differences) > 0
    assert deltas_in(in_full) == 0
    assert in_differences.new_bytes < 0.9 * in_full.new_bytes


def test_no_delta_stands_on_a_delta(place: Objects) -> None:
    run = ckptstore.Store(place, codec="small").run("run")
    training = Training().train(50)
    saved = [run.save(training.train(5).state(), step=training.step) for _ in range(4)]
    assert deltas_in(saved[-1]) > 0
    for checkpoint in saved:
        refs = checkpoint._manifest.chunks
        assert all(ref.base is None or refs[ref.base].base is None for ref in refs)


def test_equal_chunks_are_found_whatever_they_were_written_with(place: Objects) -> None:
    training = Training().train(50)
    ckptstore.Store(place, codec="fast").run("first").save(training.state(), step=1)
    for codec in CODECS:
        run = ckptstore.Store(place, codec=codec).run("first")  # type: ignore[arg-type]
        assert run.save(training.state(), step=2 + CODECS.index(codec)).new_bytes == 0
        assert ckptstore.Store(place, codec=codec).run(codec).save(training.state(), step=1).new_bytes == 0  # type: ignore[arg-type]


def test_an_unchanged_save_of_differences_uploads_nothing_and_keeps_what_they_stand_on(place: Objects) -> None:
    run = ckptstore.Store(place, codec="small").run("run")
    training = Training().train(50)
    run.save(training.state(), step=1)
    once = run.save(training.train().state(), step=2)
    for codec in CODECS:
        step = 3 + CODECS.index(codec)
        again = ckptstore.Store(place, codec=codec).run("run").save(training.state(), step=step)  # type: ignore[arg-type]
        assert again.new_bytes == 0
        assert {ref.key for ref in again._manifest.chunks} == {ref.key for ref in once._manifest.chunks}


def test_du_counts_what_differences_stand_on(place: Objects) -> None:
    store = ckptstore.Store(place, codec="small")
    training = Training().train(50)
    run = store.run("run")
    run.save(training.state(), step=1)
    run.save(training.train().state(), step=2)
    run.delete(1)
    usage = store.usage()
    assert usage.runs["run"].stored_bytes == run.checkpoint(2).stored_bytes
    run.delete(2)
    usage = store.usage()
    assert usage.stored_bytes == 0
    assert usage.unreferenced_bytes == sum(row.size for prefix in ("chunks/", "deltas/") for row in place.list(prefix))


def test_a_part_reads_only_that_parts_chunks_and_what_they_stand_on(place: Objects) -> None:
    recording = RecordingObjects(place)
    run = ckptstore.Store(recording, codec="small").run("run")
    training = Training().train(50)
    run.save(training.state(), step=1)
    run.save(training.train().state(), step=2)
    recording.clear()
    weight = run.load(2, only="model.0.weight")
    assert torch.equal(weight, training.model.state_dict()["0.weight"])
    fetched = sorted(key.split("/")[0] for key in recording.keys("get") if key.startswith(("chunks/", "deltas/")))
    assert fetched == ["chunks", "deltas"]


def test_a_checkpoint_of_differences_can_be_exported_and_imported(place: Objects, tmp_path: Path) -> None:
    run = ckptstore.Store(place, codec="small").run("run")
    training = Training().train(50)
    run.save(training.state(), step=1)
    saved = run.save(training.train().state(), step=2)
    assert deltas_in(saved) > 0
    run.export(tmp_path / "x.safetensors", step=2)
    other = ckptstore.Store(tmp_path / "other").run("run")
    other.import_file(tmp_path / "x.safetensors", step=2)
    assert_same(other.load(), training.state_dicts())


def test_differences_on_a_disk_are_durable_before_the_manifest_is_created(tmp_path: Path) -> None:
    recording = RecordingObjects(LocalObjects(tmp_path / "store"))
    run = ckptstore.Store(recording, codec="small").run("run")
    training = Training().train(50)
    run.save(training.state(), step=1)
    recording.clear()
    saved = run.save(training.train().state(), step=2)
    calls = [(call.operation, call.key) for call in recording.calls]
    [created] = [number for number, (operation, _) in enumerate(calls) if operation == "create"]
    uploaded = {key for operation, key in calls[:created] if operation == "put" and "sessions" not in key}
    assert uploaded == {ref.key for ref in saved._manifest.chunks if ref.save == saved._manifest.save}
    assert any(key.startswith("deltas/") for key in uploaded)
    assert calls[created - 1][0] == "sync"


def test_another_codec_is_refused(place: Objects) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="codec must be one of 'none', 'fast', 'small', not 'zip'"):
        ckptstore.Store(place, codec="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("server", ["moto_s3", "seaweed_s3"])
def test_differences_in_a_bucket(server: str, request: pytest.FixtureRequest) -> None:
    s3: S3Server = request.getfixturevalue(server)
    run = ckptstore.Store(f"s3://{s3.new_bucket()}/ckpts", s3.storage_options, codec="small").run("run")
    training = Training().train(50)
    run.save(training.state(), step=1)
    assert deltas_in(run.save(training.train().state(), step=2)) > 0
    assert_same(run.load(), training.state_dicts())
