"""Stores of every format version that was ever released can be read, and still hold what they held."""

import shutil
from pathlib import Path

import pytest
import torch

import ckptstore
from ckptstore.format import BLOCK_FORMAT_VERSION
from ckptstore.manifest import decode_tag
from tests.golden import states
from tests.strategies import assert_same

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = range(1, BLOCK_FORMAT_VERSION + 1)
STEPS = {1: [0, 7], 2: [0, 7], 3: [0, 3, 7]}
RUN = "run_1.a+b=c,d-e"


@pytest.fixture(params=VERSIONS, ids=lambda version: f"v{version}")
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    return request.param, shutil.copytree(GOLDEN / f"v{request.param}", tmp_path / "store")


def test_every_version_has_a_golden_store() -> None:
    assert sorted(path.name for path in GOLDEN.glob("v*")) == [f"v{version}" for version in VERSIONS]


def test_its_checkpoints_are_what_they_were(golden: tuple[int, Path]) -> None:
    version, root = golden
    run = ckptstore.Store(root).run(RUN)
    assert run.steps() == STEPS[version]
    assert_same(run.load(7), getattr(states, f"version_{version}")())
    assert torch.equal(run.load(0)["first"], torch.linspace(-1, 1, 6000))
    checkpoint = run.checkpoint()
    assert checkpoint.step == 7
    assert checkpoint.metrics["loss"] == 0.25
    assert checkpoint.metrics["bad"] != checkpoint.metrics["bad"]
    assert checkpoint.metadata == {"note": "golden", "sizes": [1, 2]}


def test_it_verifies_and_can_be_saved_into(golden: tuple[int, Path]) -> None:
    version, root = golden
    report = ckptstore.Store(root).verify()
    assert report.ok
    assert report.checkpoints == len(STEPS[version])
    assert not report.unknown
    run = ckptstore.Store(root).run(RUN)
    saved = run.save(getattr(states, f"version_{version}")(), step=10)
    assert saved.new_bytes == 0  # chunks are named by what they hold, so nothing is uploaded again
    assert_same(run.load(), run.load(7))


def test_the_store_of_version_2_has_deltas_of_every_width() -> None:
    run = ckptstore.Store(GOLDEN / "v2").run(RUN)
    manifest = run.checkpoint(7)._manifest
    assert manifest.format == 2
    assert run.checkpoint(0)._manifest.format == 1
    elements = {
        segment.element
        for segment in manifest.segments
        for index in segment.chunks
        if manifest.chunks[index].base is not None
    }
    assert elements == {1, 2, 4, 8}
    assert_same(run.load(0)["moving"], states.moving(0))


def test_the_store_of_version_3_has_blocks_of_every_kind_some_of_them_as_deltas() -> None:
    run = ckptstore.Store(GOLDEN / "v3").run(RUN)
    manifest = run.checkpoint(0)._manifest
    assert manifest.format == 3
    cut = [segment for segment in manifest.segments if segment.blocks]
    assert {len(segment.shape or ()) for segment in cut} == {1, 2, 3}
    assert {block.offset is None for segment in cut for block in segment.blocks or ()} == {True, False}
    assert any(chunk.base is not None for chunk in manifest.chunks)
    for step in (0, 3):
        state = run.load(step)
        assert state.pop("note") == "cut"
        assert_same(state, states.cut(step))


def test_a_collection_takes_only_what_is_needed_by_nothing(golden: tuple[int, Path]) -> None:
    version, root = golden
    store = ckptstore.Store(root)
    report = store.collect()
    assert report.deleted == report.garbage
    assert store.usage().unreferenced_bytes == 0
    assert store.verify().ok
    assert_same(store.run(RUN).load(7), getattr(states, f"version_{version}")())


def test_a_tag_of_the_first_format_can_be_read(tmp_path: Path) -> None:
    [path] = (GOLDEN / "tags").rglob("*.json")
    key = path.relative_to(GOLDEN / "tags").as_posix()
    tag = decode_tag(path.read_bytes(), key)
    assert (tag.run, tag.step, tag.tag, tag.writer.host) == ("lstm", 300, "best", "trainbox")
    run = ckptstore.Store(tmp_path).run("lstm")
    run.save({"step": 300}, step=300)
    shutil.copytree(GOLDEN / "tags", tmp_path, dirs_exist_ok=True)
    assert run.tags() == {300: ("best",)}
    assert ckptstore.Store(tmp_path).verify().ok
