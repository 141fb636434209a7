"""What has changed between two checkpoints: between steps, runs and stores, and what is read to find out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.errors import CorruptError, InvalidInputError, NotFoundError
from ckptstore.format import CHUNKS
from ckptstore.objects.memory import MemoryObjects
from ckptstore.testing import RecordingObjects

MIB = 2**20


def make(tmp_path: Path, name: str = "store", **options: Any) -> tuple[ckptstore.Store, RecordingObjects]:
    from ckptstore.objects.open import open_objects

    objects = RecordingObjects(open_objects(tmp_path / name))
    return ckptstore.Store(objects, **options), objects


def chunks_read(objects: RecordingObjects) -> int:
    """Bytes of chunks that were fetched."""
    return sum(call.size or 0 for call in objects.calls if call.operation == "get" and call.key.startswith(CHUNKS))


def a_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model": {
            "big": torch.rand(3000, 1000, generator=generator),  # two chunks
            "small": {f"p{number}": torch.rand(100, generator=generator) for number in range(20)},
            "frozen": torch.rand(1000, 1000, generator=generator),
        },
        "step": 1,
    }


def test_of_equal_states_nothing_is_read_and_nothing_moved(tmp_path: Path) -> None:
    store, objects = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    store.run("lstm").save(state, step=2)
    objects.clear()
    found = store.diff("lstm@1", "lstm@2")
    assert found.is_empty
    assert (found.read_bytes, chunks_read(objects)) == (0, 0)
    assert found.shared_bytes == found.raw_bytes
    assert str(found) == "lstm@1 → lstm@2: no tensor moved, of 22; 100 % of the bytes are shared"


def test_only_chunks_that_differ_are_read_and_figures_are_those_of_the_tensor(tmp_path: Path) -> None:
    store, objects = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    before = {name: value.clone() for name, value in state["model"]["small"].items()}
    state["model"]["small"]["p3"][7] += 2.0
    state["model"]["big"][0, :5] = math.nan  # in the first chunk
    store.run("lstm").save(state, step=2)
    objects.clear()
    found = store.diff("lstm@1", "lstm@2")
    assert [each.path for each in found.moved] == ["model.big", "model.small.p3"]
    big, small = found.moved
    assert (big.new_nan, big.new_inf, big.is_whole) == (5, 0, False)
    assert big.changed == 5 / 3_000_000
    assert big.equal_bytes == 3_000_000 * 4 - 8 * MIB
    assert small.changed == 0.01
    assert small.largest == pytest.approx(2.0)
    assert small.relative_l2 == pytest.approx(2.0 / float(before["p3"].norm()), rel=1e-6)
    assert small.is_whole
    # Both sides of one chunk of `big` and of the bundle of small tensors, and nothing else.
    assert chunks_read(objects) == found.read_bytes < 2 * (8 * MIB + 20 * 400) * 1.01
    assert "only model.big and model.small.p3 moved" in found.summary
    assert "NaN or infinity is new in model.big" in found.summary


def test_all_of_a_tensor_is_read_on_demand_so_that_lengths_are_exact(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    before = state["model"]["big"].double().clone()
    state["model"]["big"][0] *= 1.5
    store.run("lstm").save(state, step=2)
    after = state["model"]["big"].double()
    part, whole = (store.diff("lstm@1", "lstm@2", read=read).moved[0] for read in ("changed", "all"))
    assert (part.is_whole, whole.is_whole) == (False, True)
    assert whole.relative_l2 == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-9)
    cosine = float(before.flatten() @ after.flatten() / (before.norm() * after.norm()))
    assert whole.cosine == pytest.approx(cosine, abs=1e-12)
    assert part.relative_l2 is not None
    assert whole.relative_l2 is not None
    assert part.relative_l2 > whole.relative_l2
    assert (part.changed, part.largest) == (whole.changed, whole.largest)


def test_digests_alone_tell_which_tensors_may_have_moved(tmp_path: Path) -> None:
    store, objects = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    state["model"]["big"][0, 0] += 1
    store.run("lstm").save(state, step=2)
    objects.clear()
    found = store.diff("lstm@1", "lstm@2", read="nothing")
    assert chunks_read(objects) == 0
    (big,) = found.moved
    assert (big.path, big.changed, big.relative_l2) == ("model.big", None, None)
    assert found.summary.startswith("only model.big may have moved")


def test_what_else_changed_is_told_by_its_path(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    run = store.run("lstm")
    weight = torch.ones(4)
    run.save(
        {
            "w": weight,
            "lr": 0.1,
            "gone": torch.zeros(3),
            "list": [1],
            "same": {"x": 1},
            "dtype": torch.ones(4),
            "kind": 1,
        },
        step=1,
        metrics={"loss": 2.0},
        metadata={"git": "a"},
    )
    run.save(
        {
            "w": weight.requires_grad_(),
            "lr": 0.2,
            "list": (1,),
            "same": {"x": 1},
            "new": 5,
            "dtype": torch.ones(4).half(),
            "kind": 1.0,
        },
        step=2,
        metrics={"loss": 1.0, "accuracy": 0.5},
        metadata={"git": "a"},
    )
    found = store.diff("lstm@1", "lstm@2")
    changes = {each.path: (each.kind, each.before, each.after) for each in found.changes}
    assert changes == {
        "w.requires_grad": ("value", False, True),
        "lr": ("value", 0.1, 0.2),
        "gone": ("removed", "float32 [3]", None),
        "list": ("type", "list of 1", "tuple of 1"),
        "new": ("added", None, 5),
        "dtype": ("type", "float32 [4]", "float16 [4]"),
        "kind": ("type", 1, 1.0),
    }
    assert [(each.path, each.kind) for each in found.metrics] == [("loss", "value"), ("accuracy", "added")]
    assert found.metadata == ()
    assert [each.path for each in found.tensors] == ["w"]


def test_runs_and_stores_are_compared_like_steps(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    other, objects = make(tmp_path, "other")
    state = a_state()
    store.run("lstm").save(state, step=1)
    other.run("copy").save(state, step=7)
    state["model"]["frozen"][5, 5] += 1
    store.run("tuned").save(state, step=1)
    assert [each.path for each in store.diff("lstm", "tuned").moved] == ["model.frozen"]
    objects.clear()
    assert store.diff("lstm@1", "copy@7", other=other).is_empty
    assert chunks_read(objects) == 0
    assert [each.path for each in store.diff("tuned", "copy", other=other).moved] == ["model.frozen"]


def test_stores_that_cut_tensors_elsewhere_are_compared_all_the_same(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    objects = MemoryObjects("memory://cut-elsewhere")
    other = ckptstore.Store(objects)
    from ckptstore.format import MARKER_KEY
    from ckptstore.manifest import Marker, encode
    from ckptstore.writer import now_text

    objects.create(MARKER_KEY, encode(Marker(store="0" * 32, created=now_text(), chunk_bytes=1_000_003, small_bytes=0)))
    state = a_state()
    store.run("lstm").save(state, step=1)
    assert not store.diff("lstm", "lstm", other=store).moved
    state["model"]["big"][1500, 3] += 1
    other.run("lstm").save(state, step=1)
    (moved,) = store.diff("lstm", "lstm", other=other).moved
    assert (moved.path, moved.changed) == ("model.big", 1 / 3_000_000)


@pytest.mark.parametrize("codec", ["none", "small"])
def test_checkpoints_are_compared_whatever_they_were_written_with(tmp_path: Path, codec: Any) -> None:
    store, _ = make(tmp_path, codec=codec)
    state = a_state()
    for step in (1, 2, 3):
        store.run("lstm").save(state, step=step)
        state["model"]["big"] += 1e-6 * torch.rand(3000, 1000)
    (moved,) = store.diff("lstm@1", "lstm@3").moved
    assert moved.path == "model.big"
    assert moved.largest is not None
    assert 1e-6 < moved.largest < 3e-6


def test_tensors_that_lie_in_another_order_are_compared_element_by_element(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    run = store.run("lstm")
    image = torch.rand(2, 3, 40, 50)
    base = torch.arange(12.0).reshape(3, 4)
    run.save({"image": image, "t": base, "rows": base[:, ::2], "e": torch.ones(1).expand(5)}, step=1)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    channels_last[1, 2, 3, 4] += 1
    moved = base.clone()
    moved[2, 2] += 1
    run.save(
        {"image": channels_last, "t": base.t().contiguous().t(), "rows": moved[:, ::2], "e": torch.ones(5)}, step=2
    )
    run.save({"image": channels_last + 1, "t": base, "rows": moved[:, ::2], "e": torch.ones(5)}, step=3)
    found = {each.path: each for each in store.diff("lstm@1", "lstm@2").tensors}
    assert found["image"].changed == 1 / image.numel()
    assert found["rows"].changed == 1 / 6
    assert found["t"].changed == found["e"].changed == 0
    assert all(each.is_whole for each in found.values())
    assert store.diff("lstm@2", "lstm@3").tensors[0].changed == 1


def test_only_tensors_that_match_are_read(tmp_path: Path) -> None:
    store, objects = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    state["model"]["big"] += 1
    state["model"]["small"]["p1"] += 1
    store.run("lstm").save(state, step=2)
    objects.clear()
    found = store.diff("lstm@1", "lstm@2", tensors="model.small.*")
    assert [each.path for each in found.moved] == ["model.small.p1"]
    assert len(found.tensors) == 20
    assert chunks_read(objects) < 20_000


def test_a_damaged_chunk_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    state = {"w": torch.rand(100_000)}
    store.run("lstm").save(state, step=1)
    (chunk,) = [path for path in (tmp_path / "store" / "chunks").rglob("*") if path.is_file()]
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    store.run("lstm").save({"w": torch.rand(100_000)}, step=2)
    with pytest.raises(CorruptError, match=r"step 1 of run 'lstm': w: the chunk chunks/"):
        store.diff("lstm@1", "lstm@2")


def test_what_is_not_there_or_makes_no_sense_is_said(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    with pytest.raises(NotFoundError, match="nothing was ever saved"):
        store.diff("lstm@1", "lstm@2")
    store.run("lstm").save({"a": 1}, step=1)
    with pytest.raises(NotFoundError, match="no checkpoint at step 2"):
        store.diff("lstm@1", "lstm@2")
    with pytest.raises(NotFoundError, match="no run 'other'"):
        store.diff("lstm@1", "other")
    with pytest.raises(InvalidInputError, match="RUN@STEP"):
        store.diff("lstm@x", "lstm@1")
    with pytest.raises(InvalidInputError, match="'nothing', 'changed', 'all'"):
        store.diff("lstm", "lstm", read="some")  # type: ignore[arg-type]


def test_progress_ends_at_what_was_to_be_read(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    state = a_state()
    store.run("lstm").save(state, step=1)
    state["model"]["big"] += 1
    store.run("lstm").save(state, step=2)
    seen: list[tuple[int, int]] = []
    found = store.diff("lstm@1", store.run("lstm").latest() or "", progress=lambda *each: seen.append(each))
    assert seen[-1] == (found.read_bytes, found.read_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_pattern_that_no_tensor_matches_is_an_error_that_names_some(tmp_path: Path) -> None:
    store, _ = make(tmp_path)
    for step in (1, 2):
        store.run("lstm").save({"model": {"w": torch.full((3,), float(step))}}, step=step)
    with pytest.raises(InvalidInputError, match=r"no tensor that both have matches 'modle.\*'. There are model.w"):
        store.diff("lstm@1", "lstm@2", tensors="modle.*")
