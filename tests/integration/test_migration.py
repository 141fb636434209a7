"""Folders of other programs' checkpoints become runs: in order, whole, going on after a kill, and running no code."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import ckptstore
from ckptstore import InvalidInputError, NotFoundError, Run, Store
from ckptstore.errors import UnavailableError
from ckptstore.migration import ImportReport, import_checkpoints
from ckptstore.objects.local import LocalObjects
from ckptstore.portable import torch_files
from tests import dcp_scenarios as scenarios
from tests.ranks import Ranks
from tests.strategies import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def run(store: Store) -> Run:
    return store.run("run")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old").mkdir()
    return tmp_path / "old"


def train(folder: Path, steps: range, name: str = "ckpt_{}.pt") -> None:
    """A plain loop, as they are written everywhere: a frozen part, Adam, a scheduler, generators."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(2000, 30), "rnn": torch.nn.LSTM(30, 20)})
    model["embed"].requires_grad_(False)
    optimizer = torch.optim.Adam(model["rnn"].parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for step in range(1, steps.stop):
        optimizer.zero_grad()
        model["rnn"](model["embed"](torch.randint(2000, (5, 2))))[0].square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step in steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step,
            }
            torch.save(state, folder / name.format(step))


def loaded(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def outcomes(report: ImportReport) -> list[tuple[str, int | None, str]]:
    return [(row.source, row.step, row.outcome) for row in report.checkpoints]


# ---- files of torch.save


def test_a_plain_loops_files_become_a_run_bit_by_bit(store: Store, run: Run, old: Path) -> None:
    train(old, range(8, 13))
    report = import_checkpoints(store, "run", old)
    assert [row.step for row in report.checkpoints] == run.steps() == [8, 9, 10, 11, 12]
    for step in run.steps():
        assert_same(run.load(step), loaded(old / f"ckpt_{step}.pt"))
    assert store.verify().ok


def test_the_report_says_what_dedup_saved(store: Store, old: Path) -> None:
    train(old, range(1, 5))
    report = import_checkpoints(store, "run", old)
    first, *others = report.checkpoints
    assert first.reused_chunks == 0
    assert all(row.reused_chunks > 0 and row.new_bytes < first.new_bytes / 3 for row in others)
    assert report.new_bytes == sum(row.new_bytes for row in report.checkpoints) == store.usage().stored_bytes
    assert report.source_bytes == sum(path.stat().st_size for path in old.iterdir())


def test_tensors_are_mapped_and_not_read_into_memory(old: Path) -> None:
    torch.save({"weight": torch.ones(1000)}, old / "ckpt_1.pt")
    state = torch_files.read(old / "ckpt_1.pt", mapped=True)
    assert str(old / "ckpt_1.pt") in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert state["weight"].sum() == 1000


def test_files_of_before_zip_files_are_read_as_well(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(3)}, old / "ckpt_1.pt", _use_new_zipfile_serialization=False)
    assert not import_checkpoints(store, "run", old).failed
    assert run.load(1)["w"].tolist() == [1, 1, 1]


def test_safetensors_files_become_flat_dicts(store: Store, run: Run, old: Path) -> None:
    for step in (200, 1000):
        safetensors.torch.save_file({"a.b": torch.full((3,), float(step))}, old / f"model-{step}.safetensors")
    import_checkpoints(store, "run", old)
    assert run.steps() == [200, 1000]
    assert run.load(1000)["a.b"].tolist() == [1000.0] * 3


def test_files_that_ckptstore_exported_come_back_whole_with_their_own_step(store: Store, run: Run, old: Path) -> None:
    state = {"model": torch.nn.Linear(2, 2).state_dict(), "betas": (0.9, 0.99), "seen": deque([1])}
    Store(old / "before").run("run").save(state, step=70, metrics={"loss": 0.5}, metadata={"who": "me"})
    Store(old / "before").run("run").export(old / "exported.safetensors")
    report = import_checkpoints(store, "run", old)
    assert outcomes(report) == [("exported.safetensors", 70, "imported")]
    assert_same(run.load(70), state)
    assert run.checkpoint().metrics == {"loss": 0.5}
    assert run.checkpoint().metadata["who"] == "me"
    assert outcomes(import_checkpoints(store, "run", old)) == [("exported.safetensors", 70, "there")]


# ---- going on

KILLED = """
import os, signal, sys
from ckptstore.cli import main
from ckptstore.objects.local import LocalObjects

how, count = sys.argv[1], int(sys.argv[2])
create, made = LocalObjects.create, 0

def counted(self, key, content):
    global made
    made += key.startswith("runs/")
    if made == count and how == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    created = create(self, key, content)
    if made == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return created

LocalObjects.create = counted
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("how", "there"), [("before", 9), ("after", 10)])
def test_killed_halfway_and_started_again_it_goes_on(
    store: Store, run: Run, old: Path, tmp_path: Path, how: str, there: int
) -> None:
    """A SIGKILL around the commit of the tenth of twenty."""
    train(old, range(1, 21))
    words = ["import", str(old), str(tmp_path / "store" / "run")]
    killed = subprocess.run([sys.executable, "-c", KILLED, how, "10", *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert run.steps() == list(range(1, there + 1))
    report = import_checkpoints(store, "run", old)
    assert [row.outcome for row in report.checkpoints] == ["there"] * there + ["imported"] * (20 - there)
    for step in range(1, 21):
        assert_same(run.load(step), loaded(old / f"ckpt_{step}.pt"))
    assert store.verify().ok
    assert report.new_bytes <= store.usage().stored_bytes


def test_what_is_there_is_not_read_again(store: Store, run: Run, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(old, range(1, 4))
    import_checkpoints(store, "run", old)
    before = [run.checkpoint(step) for step in run.steps()]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr("ckptstore.migration.identity.digest_of", lambda source: pytest.fail(f"{source} was read"))
    assert {row.outcome for row in import_checkpoints(store, "run", old).checkpoints} == {"there"}
    assert [run.checkpoint(step) for step in run.steps()] == before


def test_a_copy_with_another_time_is_known_by_its_digest(store: Store, old: Path) -> None:
    train(old, range(1, 3))
    import_checkpoints(store, "run", old)
    for path in old.iterdir():
        os.utime(path, (1, 1))
    assert {row.outcome for row in import_checkpoints(store, "run", old).checkpoints} == {"there"}


def test_a_source_that_has_changed_is_an_error_unless_told(store: Store, run: Run, old: Path) -> None:
    train(old, range(1, 4))
    import_checkpoints(store, "run", old)
    torch.save({"other": 7}, old / "ckpt_2.pt")
    report = import_checkpoints(store, "run", old)
    assert [row.outcome for row in report.checkpoints] == ["there", "failed", "there"]
    assert "ckpt_2.pt' as it was then" in report.failed[0].error
    assert "--replace" in report.failed[0].error
    assert "model" in run.load(2)
    report = import_checkpoints(store, "run", old, replace=True)
    assert [row.outcome for row in report.checkpoints] == ["there", "imported", "there"]
    assert run.load(2) == {"other": 7}


def test_a_step_that_the_training_saved_itself_is_left_as_it_is(store: Store, run: Run, old: Path) -> None:
    train(old, range(1, 3))
    run.save(loaded(old / "ckpt_1.pt"), step=1)
    run.save({"mine": 1}, step=2)
    report = import_checkpoints(store, "run", old)
    assert [row.outcome for row in report.checkpoints] == ["there", "failed"]
    assert run.load(2) == {"mine": 1}


@pytest.fixture
def changing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write to the file of step 1 while its tensors are stored."""
    saved = Run._saved

    def and_change(self: Run, step: int, *arguments: Any, **options: Any) -> Any:
        if step == 1:
            torch.save({"other": 7}, old / "ckpt_1.pt.new")
            (old / "ckpt_1.pt.new").replace(old / "ckpt_1.pt")
        return saved(self, step, *arguments, **options)

    monkeypatch.setattr(Run, "_saved", and_change)


def test_a_file_that_is_written_to_meanwhile_is_never_committed(
    store: Store, run: Run, old: Path, request: pytest.FixtureRequest
) -> None:
    train(old, range(1, 3))
    request.getfixturevalue("changing")
    report = import_checkpoints(store, "run", old)
    assert [row.outcome for row in report.checkpoints] == ["failed", "imported"]
    assert "written to while it was imported" in report.failed[0].error
    assert run.steps() == [2]


def test_what_was_to_be_replaced_stays_if_the_new_file_changes_meanwhile(
    store: Store, run: Run, old: Path, request: pytest.FixtureRequest
) -> None:
    torch.save({"w": torch.ones(1000)}, old / "ckpt_1.pt")
    import_checkpoints(store, "run", old)
    torch.save({"w": torch.zeros(1000)}, old / "ckpt_1.pt")
    request.getfixturevalue("changing")
    assert import_checkpoints(store, "run", old, replace=True).failed
    assert torch.equal(run.load(1)["w"], torch.ones(1000))


def test_a_shard_that_was_put_back_with_an_older_time_is_another_source(store: Store, run: Run, old: Path) -> None:
    folder = old / "checkpoint-5"
    folder.mkdir()
    for name, value, time in (("a.pt", 1.0, 1_000_000_000), ("b.pt", 2.0, 2_000_000_000)):
        torch.save({"w": torch.full((100,), value)}, folder / name)
        os.utime(folder / name, (time, time))
    import_checkpoints(store, "run", old)
    torch.save({"w": torch.zeros(100)}, folder / "a.pt")
    os.utime(folder / "a.pt", (1_500_000_000, 1_500_000_000))
    assert [row.outcome for row in import_checkpoints(store, "run", old).checkpoints] == ["failed"]
    assert [row.outcome for row in import_checkpoints(store, "run", old, replace=True).checkpoints] == ["imported"]


def test_what_was_left_out_is_not_taken_for_imported(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(3), "opt": torch.ones(4)}, old / "ckpt_1.pt")
    import_checkpoints(store, "run", old, leave_out=["opt"])
    [row] = import_checkpoints(store, "run", old).checkpoints
    assert row.outcome == "failed"
    assert "--leave-out" in row.error
    assert [row.outcome for row in import_checkpoints(store, "run", old, leave_out=["opt"]).checkpoints] == ["there"]
    import_checkpoints(store, "run", old, replace=True)
    assert set(run.load(1)) == {"w", "opt"}


def test_folders_of_trainings_are_not_taken_for_checkpoints(store: Store, run: Run, old: Path) -> None:
    for name in ("run0", "run1"):
        (old / name).mkdir()
        train(old / name, range(1, 4))
    with pytest.raises(InvalidInputError, match=r"holds files of several steps .* it is a training"):
        import_checkpoints(store, "run", old)
    assert import_checkpoints(store, "run", old / "run1").checkpoints[-1].step == 3


def test_endings_in_capitals_are_endings(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(3)}, old / "STEP_10.PT")
    import_checkpoints(store, "run", old)
    assert run.steps() == [10]


def test_a_file_with_compressed_parts_is_refused(store: Store, old: Path) -> None:
    torch.save({"w": torch.ones(3)}, old / "plain.pt")
    with zipfile.ZipFile(old / "plain.pt") as plain, zipfile.ZipFile(old / "ckpt_1.pt", "w") as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    (old / "plain.pt").unlink()
    [row] = import_checkpoints(store, "run", old).checkpoints
    assert "compressed parts" in row.error


def test_a_dry_run_lists_the_order_and_changes_nothing(store: Store, old: Path, tmp_path: Path) -> None:
    train(old, range(8, 12))
    report = import_checkpoints(store, "run", old, dry_run=True)
    assert outcomes(report) == [(f"ckpt_{step}.pt", step, "planned") for step in (8, 9, 10, 11)]
    assert not (tmp_path / "store").exists()
    import_checkpoints(store, "run", old)
    assert {row.outcome for row in import_checkpoints(store, "run", old, dry_run=True).checkpoints} == {"there"}


def test_progress_goes_up_to_all_the_bytes(store: Store, old: Path) -> None:
    train(old, range(1, 4))
    seen: list[tuple[int, int]] = []
    report = import_checkpoints(store, "run", old, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.source_bytes, report.source_bytes)


# ---- steps


def test_a_name_without_a_number_goes_by_the_step_inside_and_beside_the_run(store: Store, old: Path) -> None:
    train(old, range(1, 4))
    train(old, range(3, 4), "last.pt")
    train(old, range(2, 3), "best.pt")
    report = import_checkpoints(store, "run", old)
    assert [(row.source, row.run, row.step) for row in report.checkpoints] == [
        ("ckpt_1.pt", "run", 1),
        ("ckpt_2.pt", "run", 2),
        ("best.pt", "run.best", 2),
        ("ckpt_3.pt", "run", 3),
        ("last.pt", "run.last", 3),
    ]
    assert store.runs() == ["run", "run.best", "run.last"]
    assert store.run("run.last").checkpoint(3).new_bytes == 0


def test_a_name_without_a_number_is_a_step_of_the_run_where_it_is_alone(store: Store, run: Run, old: Path) -> None:
    train(old, range(5, 6), "final.pt")
    import_checkpoints(store, "run", old)
    assert run.steps() == [5]


def test_names_that_count_epochs_give_way_to_the_steps_inside(store: Store, run: Run, old: Path) -> None:
    for epoch in (1, 2):
        torch.save({"w": torch.ones(1), "global_step": 300 * epoch}, old / f"epoch_{epoch}.pt")
    import_checkpoints(store, "run", old)
    assert run.steps() == [300, 600]


def test_epochs_are_steps_where_not_every_file_knows_better(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(1), "global_step": 300}, old / "epoch_1.pt")
    torch.save({"w": torch.ones(1)}, old / "epoch_2.pt")
    import_checkpoints(store, "run", old)
    assert run.steps() == [1, 2]


@pytest.mark.parametrize("value", [7, torch.tensor(7), torch.tensor([7])])
def test_the_step_inside_may_be_a_tensor(store: Store, run: Run, old: Path, value: Any) -> None:
    torch.save({"iteration": value, "step": "first"}, old / "model.pt")
    import_checkpoints(store, "run", old)
    assert run.steps() == [7]


@pytest.mark.parametrize("state", [{"step": True}, {"step": -1}, {"step": 1.5}, {"steps": 3}, [1], torch.ones(2)])
def test_a_step_that_nothing_tells_is_an_error_before_anything_is_imported(
    store: Store, run: Run, old: Path, state: Any
) -> None:
    train(old, range(1, 3))
    torch.save(state, old / "model_final.pt")
    with pytest.raises(InvalidInputError, match=r"'model_final\.pt'.*--exclude.*STORE/RUN@STEP"):
        import_checkpoints(store, "run", old)
    assert run.steps() == []
    assert not import_checkpoints(store, "run", old, exclude=["*_final*"]).failed
    assert run.steps() == [1, 2]


def test_two_names_of_one_step_are_an_error(store: Store, old: Path) -> None:
    train(old, range(1, 3), "a_{}.pt")
    train(old, range(2, 3), "b_{}.pt")
    with pytest.raises(InvalidInputError, match=r"'a_2\.pt', 'b_2\.pt' are all step 2.*--exclude"):
        import_checkpoints(store, "run", old)


def test_how_the_step_is_told_can_be_said(store: Store, run: Run, old: Path) -> None:
    for epoch, updates in ((1, 500), (2, 900)):
        torch.save({"w": torch.ones(1), "step": updates * 10}, old / f"checkpoint_{epoch}_{updates}.pt")
    with pytest.raises(InvalidInputError, match="--step-from"):
        import_checkpoints(store, "run", old)
    import_checkpoints(store, "run", old, step_from=r"_(\d+)\.pt$")
    import_checkpoints(store, "inside", old, step_from="content")
    assert run.steps() == [500, 900]
    assert store.run("inside").steps() == [5000, 9000]


def test_one_checkpoint_can_be_given_its_step(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(2)}, old / "weights.pt")
    import_checkpoints(store, "run", old / "weights.pt", step=3)
    assert run.load(3)["w"].tolist() == [1, 1]


def test_links_and_unfinished_files_are_passed_over(store: Store, run: Run, old: Path) -> None:
    train(old, range(1, 3))
    (old / "last.pt").symlink_to("ckpt_2.pt")
    (old / "ckpt_3.pt.tmp").write_bytes(b"half")
    (old / ".ckpt_4.pt").write_bytes(b"half")
    (old / "log.txt").write_text("text")
    report = import_checkpoints(store, "run", old)
    assert run.steps() == [1, 2]
    assert sorted(line.partition(":")[0] for line in report.passed_over) == [
        *(".ckpt_4.pt", "ckpt_3.pt.tmp", "last.pt", "log.txt"),
    ]


def test_a_folder_without_checkpoints_says_what_it_has(store: Store, old: Path) -> None:
    (old / "log.txt").write_text("text")
    with pytest.raises(InvalidInputError, match=r"no checkpoints.*log\.txt"):
        import_checkpoints(store, "run", old)
    with pytest.raises(NotFoundError):
        import_checkpoints(store, "run", old / "none")


# ---- damage, and code


def flip(file: Path, at: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(at)] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in a tensor": lambda file: flip(file, torch.ones(500).numpy().tobytes()),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "half of it": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "a page of an error": lambda file: file.write_text("<html>404</html>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_others_are_imported(store: Store, run: Run, old: Path, damage: str) -> None:
    for step in (1, 2, 3):
        torch.save({"w": torch.ones(500), "step": step}, old / f"ckpt_{step}.pt")
    DAMAGES[damage](old / "ckpt_2.pt")
    report = import_checkpoints(store, "run", old)
    assert [row.source for row in report.failed] == ["ckpt_2.pt"]
    assert "ckpt_2.pt" in report.failed[0].error
    assert run.steps() == [1, 3]


def test_the_first_damaged_one_can_be_the_end(store: Store, run: Run, old: Path) -> None:
    train(old, range(1, 4))
    (old / "ckpt_2.pt").write_bytes(b"")
    report = import_checkpoints(store, "run", old, stop_on_error=True)
    assert [row.outcome for row in report.checkpoints] == ["imported", "failed"]
    assert run.steps() == [1]


def test_a_damaged_file_without_a_number_is_named_as_well(store: Store, run: Run, old: Path) -> None:
    train(old, range(1, 3))
    (old / "last.pt").write_bytes(b"")
    report = import_checkpoints(store, "run", old)
    assert [(row.source, row.step) for row in report.failed] == [("last.pt", None)]
    assert run.steps() == [1, 2]


def test_files_without_checksums_are_no_damage(store: Store, old: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(500)}, old / "ckpt_1.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not import_checkpoints(store, "run", old).failed


def test_a_store_that_fails_ends_the_import(store: Store, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(old, range(1, 4))
    puts = LocalObjects.create

    def fail(self: LocalObjects, key: str, content: Any) -> bool:
        if key.startswith("runs/"):
            raise UnavailableError("the disk is on fire")
        return puts(self, key, content)

    monkeypatch.setattr(LocalObjects, "create", fail)
    with pytest.raises(UnavailableError, match="on fire"):
        import_checkpoints(store, "run", old)


class Code:
    """What only code can make."""

    ran: bool = False

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


class Settings:
    """What many loops save beside their tensors."""

    def __init__(self) -> None:
        self.layers = 2


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    Code.ran = False


def test_code_in_a_file_does_not_run_unless_it_is_trusted(store: Store, run: Run, old: Path) -> None:
    torch.save({"w": torch.ones(1), "args": Code()}, old / "ckpt_1.pt")
    report = import_checkpoints(store, "run", old)
    assert not Code.ran
    assert "--trust" in report.failed[0].error
    assert "setattr" in report.failed[0].error
    assert not import_checkpoints(store, "run", old, trust=True).failed
    assert vars(Code)["ran"]
    assert run.load(1)["args"] is None


def test_what_cannot_be_stored_can_be_left_out(store: Store, run: Run, old: Path) -> None:
    state = {"model": OrderedDict({"a.w": torch.ones(1), "b": torch.zeros(1)}), "args": Settings(), "more": {"x": 1}}
    torch.save(state, old / "ckpt_1.pt")
    report = import_checkpoints(store, "run", old, trust=True)
    assert re.search("args.*Settings.*--leave-out", report.failed[0].error)
    report = import_checkpoints(store, "run", old, trust=True, leave_out=["args", "model.a.*", "more.x"])
    assert not report.failed
    assert_same(run.load(1), {"model": OrderedDict({"b": torch.zeros(1)}), "more": {}})


# ---- folders of torch.distributed.checkpoint


def dcp_state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        "model": {"linear.weight": torch.randn(30, 40), "bias": torch.randn(3).bfloat16()},
        "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["linear.weight"]}]},
        "list": [1, torch.ones(2)],
        "step": step,
        "name": "größe",
    }


def test_folders_of_dcp_become_steps(store: Store, run: Run, old: Path) -> None:
    for step in (5, 100):
        dcp_save(dcp_state(step), checkpoint_id=old / f"step-{step}", no_dist=True)
    report = import_checkpoints(store, "run", old)
    assert outcomes(report) == [("step-5", 5, "imported"), ("step-100", 100, "imported")]
    for step in (5, 100):
        assert_same(run.load(step), dcp_state(step))
    assert {row.outcome for row in import_checkpoints(store, "run", old).checkpoints} == {"there"}


def test_a_folder_that_four_ranks_wrote_in_shards_is_put_together(
    ranks: Ranks, store: Store, run: Run, old: Path
) -> None:
    ranks.run(scenarios.save_folder, str(old / "sharded"))
    assert len(list((old / "sharded").glob("*.distcp"))) == 4
    import_checkpoints(store, "run", old)
    assert_same(run.load(4), {"model": scenarios.tensors(), "step": 4})


def test_an_imported_folder_of_dcp_is_loaded_by_dcp_from_the_store(store: Store, old: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    from ckptstore.integrations.dcp import CkptstoreReader

    dcp_save(dcp_state(5), checkpoint_id=old / "step-5", no_dist=True)
    import_checkpoints(store, "run", old)
    state = dcp_state(6)
    load(state, storage_reader=CkptstoreReader(store, run="run"), no_dist=True)
    assert_same(state, dcp_state(5))


def test_one_folder_of_dcp_tells_its_step_itself(store: Store, run: Run, old: Path) -> None:
    dcp_save(dcp_state(5), checkpoint_id=old / "latest", no_dist=True)
    import_checkpoints(store, "run", old / "latest")
    assert run.steps() == [5]


def test_a_folder_of_dcp_whose_bytes_are_missing_is_named(store: Store, old: Path) -> None:
    dcp_save(dcp_state(5), checkpoint_id=old / "step-5", no_dist=True)
    [data] = (old / "step-5").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    [row] = import_checkpoints(store, "run", old).failed
    assert str(old / "step-5") in row.error


class Metadata:
    """A pickle that runs code in the place of a folder's description."""

    def __reduce__(self) -> Any:
        return setattr, (Code, "ran", True)


def changed_metadata(folder: Path, change: Any) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))


def outside(metadata: Any) -> Any:
    for info in metadata.storage_data.values():
        info.relative_path = "../secret.pt"
    return metadata


def far_index(metadata: Any) -> Any:
    metadata.planner_data["list.0"] = ("list", 10**12)
    return metadata


def no_tensor(metadata: Any) -> Any:
    metadata.state_dict_metadata["list.1"].size = "large"
    return metadata


METADATA = {
    "code": (lambda _: Metadata(), "only running code"),
    "code within": (lambda metadata: vars(metadata)["storage_data"].update(x=Metadata()) or metadata, "running code"),
    "a file outside": (outside, "outside of the folder"),
    "an index beyond all memory": (far_index, "describes no checkpoint"),
    "a shape that is none": (no_tensor, "describes no checkpoint"),
    "something else": (lambda _: {"a": 1}, "describes no checkpoint"),
    "nothing": (lambda _: None, "describes no checkpoint"),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_hostile_description_is_refused_and_runs_nothing(store: Store, old: Path, name: str) -> None:
    change, text = METADATA[name]
    dcp_save(dcp_state(5), checkpoint_id=old / "step-5", no_dist=True)
    changed_metadata(old / "step-5", change)
    [row] = import_checkpoints(store, "run", old).failed
    assert text in row.error
    assert not Code.ran


def test_code_in_a_value_of_dcp_does_not_run_unless_it_is_trusted(store: Store, run: Run, old: Path) -> None:
    dcp_save({"w": torch.ones(2), "value": Code()}, checkpoint_id=old / "step-5", no_dist=True)
    Code.ran = False
    [row] = import_checkpoints(store, "run", old).failed
    assert "'value' holds objects that only running code could make" in row.error
    assert "--trust" in row.error
    assert not Code.ran
    assert not import_checkpoints(store, "run", old, trust=True).failed
    assert vars(Code)["ran"]


# ---- folders of Hugging Face's Trainer


def trainer_folder(folder: Path, step: int) -> None:
    """What a Trainer writes, with the model in two shards."""
    folder.mkdir(parents=True)
    torch.manual_seed(step)
    weights = {f"layer{number}.weight": torch.randn(20, 30) for number in range(2)}
    for number, (name, weight) in enumerate(weights.items(), 1):
        safetensors.torch.save_file(
            {name: weight}, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    torch.save({"state": {0: {"exp_avg": weights["layer0.weight"] * 2}}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    torch.save(Code(), folder / "training_args.bin")
    log = [{"step": step, "epoch": 0.5, "loss": 2.5, "eval_runtime": 3.0}, {"step": step - 1, "loss": 9.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5, "log_history": log}))


def test_folders_of_a_trainer_become_what_its_callback_saves(store: Store, run: Run, old: Path) -> None:
    for step in (500, 1000):
        trainer_folder(old / f"checkpoint-{step}", step)
    safetensors.torch.save_file({"final": torch.ones(2)}, old / "model.safetensors")
    report = import_checkpoints(store, "run", old)
    assert outcomes(report) == [("checkpoint-500", 500, "imported"), ("checkpoint-1000", 1000, "imported")]
    assert report.passed_over == ["model.safetensors: a file beside the folders of a Trainer"]
    found = run.checkpoint(500)
    assert found.metrics == {"loss": 2.5}
    assert found.metadata["transformers"] == {"epoch": 0.5}
    files = run.load(500)
    assert files["model-00001-of-00002.safetensors"]["tensors"]["layer0.weight"].shape == (20, 30)
    assert files["scheduler.pt"] == {"torch": {"last_epoch": 500}}
    assert not Code.ran


@pytest.mark.parametrize("file", ["optimizer.pt", "model-00002-of-00002.safetensors", "trainer_state.json"])
def test_a_trainers_folder_with_a_damaged_file_is_named(store: Store, run: Run, old: Path, file: str) -> None:
    for step in (500, 1000):
        trainer_folder(old / f"checkpoint-{step}", step)
    damaged = old / "checkpoint-500" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    report = import_checkpoints(store, "run", old)
    assert [row.source for row in report.failed] == ["checkpoint-500"]
    assert file in report.failed[0].error
    assert run.steps() == [1000]


# ---- back again


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_trainers_folder_is_exported_as_it_was(store: Store, run: Run, old: Path, tmp_path: Path) -> None:
    trainer_folder(old / "checkpoint-500", 500)
    import_checkpoints(store, "run", old)
    run.export(tmp_path / "again", format="folder")
    before, after = files_of(old / "checkpoint-500"), files_of(tmp_path / "again")
    assert before.keys() == after.keys()
    rewritten = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {name for name in before if before[name] != after[name]} <= rewritten
    for name in rewritten:
        assert_same(loaded(tmp_path / "again" / name), loaded(old / "checkpoint-500" / name))


def test_a_checkpoint_is_exported_as_a_folder_that_dcp_reads(run: Run, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    run.save(dcp_state(5), step=5)
    run.export(tmp_path / "out", format="dcp")
    state = dcp_state(6)
    load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert_same(state, dcp_state(5))


def test_two_types_of_one_memory_are_no_matter_to_dcp(run: Run, tmp_path: Path) -> None:
    words = torch.arange(4, dtype=torch.int32)
    run.save({"words": words, "bits": words.view(torch.float32)}, step=5)
    run.export(tmp_path / "out", format="dcp")
    assert not import_checkpoints(Store(tmp_path / "other"), "run", tmp_path / "out", step=5).failed


def test_a_run_that_was_imported_comes_back_as_a_file_of_the_same_content(
    store: Store, run: Run, old: Path, tmp_path: Path
) -> None:
    train(old, range(1, 2), "epoch=0-step={}.ckpt")
    import_checkpoints(store, "run", old)
    run.export(tmp_path / "again.ckpt")
    assert_same(loaded(tmp_path / "again.ckpt"), loaded(old / "epoch=0-step=1.ckpt"))


@pytest.mark.parametrize("form", ["dcp", "folder"])
def test_a_folder_that_is_there_is_left_as_it_is_unless_told(run: Run, tmp_path: Path, form: Any) -> None:
    run.save({"file.json": b"{}"}, step=1)
    run.export(tmp_path / "out", format=form)
    before = files_of(tmp_path / "out")
    with pytest.raises(ckptstore.ConflictError, match="exists"):
        run.export(tmp_path / "out", format=form)
    assert files_of(tmp_path / "out") == before
    run.export(tmp_path / "out", format=form, overwrite=True)
    assert files_of(tmp_path / "out").keys() == before.keys()


@pytest.mark.parametrize("form", ["dcp", "folder"])
def test_a_folder_of_other_things_is_never_replaced(run: Run, tmp_path: Path, form: Any) -> None:
    run.save({"file.json": b"{}"}, step=1)
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ckptstore.ConflictError, match=r"photos/cat\.jpg"):
        run.export(tmp_path / "home", format=form, overwrite=True)
    assert files_of(tmp_path / "home") == {"photos/cat.jpg": b"cat"}


@pytest.mark.parametrize("form", ["dcp", "folder"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_finished_leaves_nothing_behind(
    run: Run, tmp_path: Path, form: Any, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save({"file.json": b"{}"}, step=1)
    (tmp_path / "place").mkdir()

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UnavailableError if isinstance(failure, OSError) else KeyboardInterrupt):
        run.export(tmp_path / "place" / "out", format=form)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_checkpoint_that_came_from_no_folder_is_not_written_as_one(run: Run, tmp_path: Path) -> None:
    run.save({"model": torch.nn.Linear(2, 2)}, step=1)
    with pytest.raises(InvalidInputError, match="not saved from a folder"):
        run.export(tmp_path / "out", format="folder")
    run.save([torch.ones(1)], step=2)
    with pytest.raises(InvalidInputError, match=r"export it to a \.pt file"):
        run.export(tmp_path / "out", format="dcp")
    assert not (tmp_path / "out").exists()


def test_code_in_the_description_of_a_dcp_folder_is_refused_in_our_words(store: Store, old: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {old}/owned",)

    (old / "step_5").mkdir()
    (old / "step_5" / ".metadata").write_bytes(pickle.dumps(Evil()))
    [row] = import_checkpoints(store, "run", old).checkpoints
    assert row.error.startswith(f"{old}/step_5: its .metadata holds an object that only running code could make")
    assert not (old / "owned").exists()
