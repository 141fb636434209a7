"""A checkpoint that is pinned by its digest is that one, or an error: whoever can write to the store."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ckptstore import Checkpoint, CheckpointWarning, CorruptError, InvalidInputError, NotFoundError, Run, Store
from ckptstore.cli import main
from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest, checkpoint_digest, decode_manifest, encode
from tests.golden import states

GOLDEN = Path(__file__).parents[1] / "golden"
OTHER = 64 * "0"


def state(number: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((30_000,), number), "b": torch.arange(10), "step": 3, "names": {"a": 1, "b": 2}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "ckpts")


@pytest.fixture
def run(store: Store) -> Run:
    return store.run("lstm")


@pytest.fixture
def saved(run: Run) -> Checkpoint:
    return run.save(state(), step=3, metrics={"loss": 0.5}, metadata={"config": {"layers": 2}})


def manifest_file(tmp_path: Path, step: int) -> Path:
    [found] = (tmp_path / "ckpts/runs/lstm").glob(f"{step:020d}.*")
    return found


def rewrite(tmp_path: Path, change: Callable[[Manifest], Manifest], step: int = 3) -> None:
    """What somebody can do who may write to the store: another manifest, with a seal that fits."""
    path = manifest_file(tmp_path, step)
    key = ManifestKey.parse(f"runs/lstm/{path.name}")
    assert key is not None
    manifest = decode_manifest(path.read_bytes(), key)
    assert isinstance(manifest, Manifest)
    path.write_bytes(encode(change(manifest)))


def test_the_checkpoint_that_is_expected_is_loaded_and_restored(run: Run, saved: Checkpoint) -> None:
    assert torch.equal(run.load(3, expect=saved.digest)["w"], state()["w"])
    assert torch.equal(run.load(only="b", expect=saved.digest), state()["b"])
    w = torch.zeros(30_000)
    found = run.restore({"w": w}, expect=saved.digest)
    assert found is not None
    assert found.digest == saved.digest
    assert torch.equal(w, state()["w"])


def test_the_digest_is_64_hex_digits_and_the_same_whenever_it_is_asked_for(run: Run, saved: Checkpoint) -> None:
    assert len(bytes.fromhex(saved.digest)) == 32
    assert saved.digest == run.checkpoint(3).digest == run.checkpoints()[0].digest


def test_another_state_that_was_saved_in_its_place_is_refused_and_both_digests_are_named(
    run: Run, saved: Checkpoint
) -> None:
    other = run.save(state(2.0), step=3, replace=True)
    with pytest.raises(CorruptError, match="lstm") as told:
        run.load(3, expect=saved.digest)
    assert saved.digest in str(told.value)
    assert other.digest in str(told.value)


def test_a_restore_of_something_else_does_not_touch_the_destination(run: Run, saved: Checkpoint) -> None:
    w = torch.zeros(30_000)
    with pytest.raises(CorruptError, match=f"{saved.digest}, and not {OTHER}"):
        run.restore({"w": w}, step=3, expect=OTHER)
    assert not w.any()


def test_a_restore_of_what_is_expected_does_not_go_back_to_an_older_step(run: Run, saved: Checkpoint) -> None:
    run.save(state(2.0), step=4)
    with pytest.raises(CorruptError, match=r"step 4 .* is not the checkpoint that is expected"):
        run.restore({"w": torch.zeros(30_000)}, expect=saved.digest)


@pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning")
def test_a_damaged_chunk_of_what_is_expected_ends_the_restore(tmp_path: Path, run: Run, saved: Checkpoint) -> None:
    newest = run.save(state(2.0), step=4)
    own = [ref for ref in newest._manifest.chunks if ref.save == newest._manifest.save]
    (tmp_path / "ckpts" / own[0].key).unlink()
    with pytest.raises(CorruptError, match="step 4"):
        run.restore({"w": torch.zeros(30_000)}, expect=newest.digest)
    with pytest.warns(CheckpointWarning, match="Going back to step 3"):
        assert run.restore({"w": torch.zeros(30_000)}) == saved  # so there was something to go back to


def test_a_damaged_manifest_of_what_is_expected_ends_the_restore(tmp_path: Path, run: Run, saved: Checkpoint) -> None:
    newest = run.save(state(2.0), step=4)
    manifest_file(tmp_path, 4).write_bytes(b"{}")
    with pytest.raises(CorruptError, match="step 4"):
        run.restore({"w": torch.zeros(30_000)}, expect=newest.digest)


def test_a_checkpoint_that_is_expected_and_gone_is_no_first_start(run: Run, saved: Checkpoint) -> None:
    run.delete(3)
    assert run.restore({"w": torch.zeros(30_000)}) is None
    with pytest.raises(NotFoundError):
        run.restore({"w": torch.zeros(30_000)}, expect=saved.digest)


def test_a_store_that_is_expected_and_gone_is_no_first_start(tmp_path: Path, run: Run, saved: Checkpoint) -> None:
    shutil.rmtree(tmp_path / "ckpts")
    with pytest.raises(NotFoundError):
        run.restore({"w": torch.zeros(30_000)}, expect=saved.digest)


@pytest.mark.parametrize("bad", ["", "abc", 63 * "a", 65 * "a", 64 * "A", 64 * "g", 64 * "a" + "\n", 5, b"a" * 64])
def test_what_is_no_digest_is_refused_before_the_store_is_asked(tmp_path: Path, bad: Any) -> None:
    run = Store(tmp_path / "none").run("lstm")
    with pytest.raises(InvalidInputError, match="cannot be the digest of a checkpoint"):
        run.load(expect=bad)
    with pytest.raises(InvalidInputError, match="cannot be the digest of a checkpoint"):
        run.restore({}, expect=bad)


# ---- what it covers

CHANGES: dict[str, Callable[[Manifest], Manifest]] = {
    "a value of the tree": lambda old: msgspec.structs.replace(old, tree={**old.tree, "step": 4}),
    "the type of a value": lambda old: msgspec.structs.replace(old, tree={**old.tree, "step": 3.0}),
    "the order of a dict": lambda old: msgspec.structs.replace(old, tree=dict(reversed(old.tree.items()))),
    "a tensor's shape": lambda old: msgspec.structs.replace(
        old, tree={**old.tree, "w": {**old.tree["w"], "shape": [300, 100]}}
    ),
    "a metric": lambda old: msgspec.structs.replace(old, metrics={"loss": 0.25}),
    "the metadata": lambda old: msgspec.structs.replace(old, metadata={}),
    "where a segment lies in its bundle": lambda old: msgspec.structs.replace(
        old,
        segments=[
            segment if segment.offset is None else msgspec.structs.replace(segment, bytes=segment.bytes - 8)
            for segment in old.segments
        ],
        tree={**old.tree, "b": {**old.tree["b"], "shape": [9]}},
    ),
    "a chunk": lambda old: msgspec.structs.replace(
        old, chunks=[msgspec.structs.replace(old.chunks[0], digest=OTHER), *old.chunks[1:]]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forged_manifest_does_not_pass_though_its_seal_and_its_content_do(
    tmp_path: Path, run: Run, saved: Checkpoint, change: str
) -> None:
    rewrite(tmp_path, CHANGES[change])
    assert run.checkpoint(3)._manifest.content == saved._manifest.content  # which nobody checks
    with pytest.raises(CorruptError, match="is not the checkpoint that is expected"):
        run.load(3, expect=saved.digest)


def test_the_same_state_as_another_step_or_run_has_another_digest(store: Store, run: Run, saved: Checkpoint) -> None:
    again = [
        to.save(state(), step=step, metrics=saved.metrics, metadata=saved.metadata).digest
        for to, step in ((run, 4), (store.run("other"), 3))
    ]
    assert len({saved.digest, *again}) == 3


def test_the_same_saved_again_has_the_same_digest_however_it_is_written(
    tmp_path: Path, run: Run, saved: Checkpoint
) -> None:
    run.delete(3)
    other = Store(tmp_path / "other", codec="none").run("lstm")
    for again in (run, other):
        found = again.save(state(), step=3, metrics=saved.metrics, metadata=saved.metadata)
        assert found != saved
        assert found.digest == saved.digest


def test_a_state_that_is_stored_as_differences_has_the_digest_of_the_whole(tmp_path: Path, saved: Checkpoint) -> None:
    noise = torch.randn(30_000, generator=torch.Generator().manual_seed(1))
    digests = []
    for codec in ("small", "fast"):
        run = Store(tmp_path / codec, codec=codec).run("lstm")
        run.save({"w": noise}, step=1)
        found = run.save({"w": noise * 1.0001}, step=2)
        assert (found._manifest.format == 2) == (codec == "small")
        digests.append(found.digest)
    assert digests[0] == digests[1]


def test_a_repair_keeps_the_digest_though_it_makes_another_manifest(
    tmp_path: Path, store: Store, run: Run, saved: Checkpoint
) -> None:
    damaged = tmp_path / "ckpts" / saved._manifest.chunks[0].key
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert not store.verify().ok
    store.run("other").save(state(), step=0)  # uploads good copies
    assert [row.step for row in store.repair().repaired] == [3]
    assert run.checkpoint(3) != saved
    assert torch.equal(run.load(3, expect=saved.digest)["w"], state()["w"])


def test_a_chunk_that_somebody_changed_does_not_pass_either(tmp_path: Path, run: Run, saved: Checkpoint) -> None:
    run.save(state(2.0), step=4)
    donor = run.checkpoint(4)._manifest.chunks[0]
    shutil.copyfile(tmp_path / "ckpts" / donor.key, tmp_path / "ckpts" / saved._manifest.chunks[0].key)
    with pytest.raises(CorruptError):
        run.load(3, expect=saved.digest)


def test_a_manifest_whose_digest_cannot_be_made_is_corrupt(saved: Checkpoint) -> None:
    for tree in ({"n": 10**5000}, {"n": float("nan")}):
        with pytest.raises(CorruptError, match="holds what no save writes"):
            checkpoint_digest(msgspec.structs.replace(saved._manifest, tree=tree))


GOLDEN_DIGESTS = {
    1: "fc3d16e0b9eface1904f6736b3be27c4bc114797160e1d602f8ec589aa7589b4",
    2: "25e18a5dfc6c1655ebccf91c6c1dbd0af06642389c88597263126467c33772fa",
}


@pytest.mark.parametrize("version", GOLDEN_DIGESTS)
def test_digests_that_people_have_written_down_stay_valid(version: int) -> None:
    run = Store(GOLDEN / f"v{version}").run("run_1.a+b=c,d-e")
    assert run.checkpoint(7).digest == GOLDEN_DIGESTS[version]
    assert run.load(7, expect=GOLDEN_DIGESTS[version]).keys() == getattr(states, f"version_{version}")().keys()


# ---- the command line


def test_only_what_is_expected_is_exported(
    tmp_path: Path, run: Run, saved: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lstm.safetensors"
    with pytest.raises(CorruptError, match="is not the checkpoint that is expected"):
        run.export(file, expect=OTHER)
    with pytest.raises(InvalidInputError):
        run.export(file, expect="latest")
    assert main(["export", f"{tmp_path}/ckpts/lstm", str(file), "--expect", OTHER]) == 1
    assert not file.exists()
    assert main(["export", f"{tmp_path}/ckpts/lstm", str(file), "--expect", saved.digest]) == 0
    run.export(file, expect=saved.digest, overwrite=True)
    assert file.exists()


def test_show_prints_the_digest(tmp_path: Path, saved: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "ckpts/lstm@3")]) == 0
    assert f"digest           {saved.digest}\n" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "ckpts/lstm@3"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == saved.digest
