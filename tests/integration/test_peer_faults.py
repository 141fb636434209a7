"""Faults of other ways to keep checkpoints, made to happen beside ckptstore: the table in the documents holds.

Each fault runs once, in a process of its own, however many tests ask what was seen in it.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "explanation" / "faults.md"
NEEDS_RESTIC = pytest.mark.skipif(shutil.which("restic") is None, reason="restic is not installed")
FAULTS = [
    "disk-full",
    "resave",
    "flips",
    "upload",
    "background",
    "pickle",
    pytest.param("prune", marks=NEEDS_RESTIC),
]
Rows = dict[str, dict[str, Any]]
See = Callable[[str], Rows]


@pytest.fixture
def see(tmp_path_factory: pytest.TempPathFactory) -> See:
    """What was seen in a fault: its rows by key. Workers of xdist share it."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def rows(name: str) -> Rows:
        file = folder / f"fault-{name}.json"
        with (folder / f"fault-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                run(name, file)
        seen = json.loads(file.read_text())
        assert "error" not in seen, seen["error"]
        return {row["key"]: row for row in seen["rows"]}

    return rows


def run(name: str, file: Path) -> None:
    """Write what was seen to `file`; or why nothing was, so that the other tests need not wait for it again."""
    command = [sys.executable, "-m", "benchmarks.faults", name, "--json", str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        file.write_text(json.dumps({"error": ended.stderr}))


def table() -> list[str]:
    """The lines of the document's table, without its head."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return lines[2:]


@pytest.mark.parametrize("name", FAULTS)
def test_the_document_says_what_is_seen(see: See, name: str) -> None:
    seen = [row["line"] for row in see(name).values()]
    documented = table()
    start = documented.index(seen[0]) if seen[0] in documented else 0
    assert documented[start : start + len(seen)] == seen, f"put what python -m benchmarks.faults {name} prints there"


def test_the_document_has_no_other_faults(see: See) -> None:
    seen = sum(len(see(name)) for name in FAULTS if isinstance(name, str))
    assert len(table()) == seen + 1  # that of restic, which may not be installed


# ---- the disk is full


@pytest.mark.parametrize("key", ["disk-full-dcp-worker", "disk-full-fsspec-worker"])
def test_dcp_commits_a_checkpoint_that_lacks_what_a_worker_thread_could_not_write(see: See, key: str) -> None:
    facts = see("disk-full")[key]["facts"]
    assert facts["raised"] == ""
    assert facts["looks_committed"]
    assert "KeyError" in facts["load"]


def test_dcp_raises_what_the_thread_that_called_met(see: See) -> None:
    facts = see("disk-full")["disk-full-dcp"]["facts"]
    assert "OSError" in facts["raised"]
    assert not facts["looks_committed"]


@pytest.mark.parametrize("key", ["disk-full-dcp", "disk-full-dcp-worker"])
def test_our_save_raises_and_says_why_whichever_thread_met_the_full_disk(see: See, key: str) -> None:
    facts = see("disk-full")[key]["our_facts"]
    assert facts == {"raised": "UnavailableError", "says_why": True, "steps": [], "load": ""}


# ---- killed while it saves over the last good checkpoint


@pytest.mark.parametrize("key", ["resave-torch", "resave-dcp"])
def test_a_peer_that_is_killed_midway_in_a_file_has_lost_the_old_checkpoint(see: See, key: str) -> None:
    [load] = see("resave")[key]["facts"]["load"]
    assert load.startswith("an error")


def test_dcp_with_several_files_that_is_killed_between_them_leaves_a_mix_that_loads(see: See) -> None:
    loads = see("resave")["resave-dcp-files-fsync"]["facts"]["load"]
    assert loads[0] == "a mix of both states, without an error"
    assert "the old state" not in loads


def test_dcp_with_one_file_has_the_new_state_once_that_is_on_the_disk(see: See) -> None:
    assert set(see("resave")["resave-dcp-fsync"]["facts"]["load"]) == {"the new state"}


def test_our_save_that_is_killed_midway_in_a_file_leaves_the_old_checkpoint(see: See) -> None:
    assert see("resave")["resave-torch"]["our_facts"]["load"] == ["the old state"]


def test_our_save_that_is_killed_at_any_fsync_leaves_the_old_checkpoint_or_the_new_one(see: See) -> None:
    loads = see("resave")["resave-dcp-fsync"]["our_facts"]["load"]
    committed = loads.index("the new state")
    assert committed > 0
    assert loads[:committed] == committed * ["the old state"]
    assert set(loads[committed:]) == {"the new state"}


# ---- a bit flips


@pytest.mark.parametrize("key", ["flip-torch", "flip-dcp", "flip-safetensors"])
def test_a_peer_loads_a_flipped_bit_without_an_error(see: See, key: str) -> None:
    assert see("flips")[key]["facts"]["noticed"] == 0


def test_a_look_at_the_checksums_of_the_zip_file_notices_every_flip(see: See) -> None:
    facts = see("flips")["flip-zip"]["facts"]
    assert facts["noticed"] == facts["flips"] > 0


def test_our_load_notices_every_flip(see: See) -> None:
    facts = see("flips")["flip-torch"]["our_facts"]
    assert facts["outcomes"] == {"an error (CorruptError)": facts["flips"]}
    assert facts["flips"] > 0


def test_our_restore_goes_back_to_the_checkpoint_before_with_a_warning(see: See) -> None:
    facts = see("flips")["flip-torch"]["our_facts"]
    assert (facts["restore"], facts["warned"]) == ("the old state", True)


# ---- an upload breaks off


@pytest.mark.parametrize("key", ["upload-unpicklable", "upload-interrupted"])
def test_a_file_object_of_fsspec_that_is_left_by_an_error_replaces_the_good_object(see: See, key: str) -> None:
    facts = see("upload")[key]["facts"]
    assert facts["raised"]
    assert facts["load"].startswith("an error")


def test_a_transaction_of_fsspec_keeps_the_good_object(see: See) -> None:
    facts = see("upload")["upload-transaction"]["facts"]
    assert facts["raised"]
    assert facts["load"] == "the old state"


def test_the_fsspec_writer_of_dcp_uploads_the_truncated_file_after_it_has_deleted_it(see: See) -> None:
    facts = see("upload")["upload-dcp"]["facts"]
    assert facts["load"].startswith("an error")
    assert "__0_0.distcp" in facts["files"]


def test_our_save_of_what_cannot_be_saved_leaves_the_old_checkpoint(see: See) -> None:
    facts = see("upload")["upload-unpicklable"]["our_facts"]
    assert facts == {"raised": "InvalidInputError", "load": "the old state"}


def test_our_save_that_is_interrupted_at_any_request_leaves_the_old_checkpoint_or_the_new_one(see: See) -> None:
    loads = see("upload")["upload-interrupted"]["our_facts"]["load"]
    committed = loads.index("the new state")
    assert committed > 0
    assert loads[:committed] == committed * ["the old state"]
    assert set(loads[committed:]) == {"the new state"}


# ---- a save in the background fails


def test_dcp_says_nothing_of_a_background_save_whose_future_was_dropped(see: See) -> None:
    assert see("background")["background-next"]["facts"] == {"next_raised": "", "printed": False}


def test_our_next_save_raises_what_failed_in_the_background(see: See) -> None:
    assert see("background")["background-next"]["our_facts"]["next_raised"] == "UnavailableError"


def test_our_last_save_that_failed_in_the_background_is_printed_at_the_end(see: See) -> None:
    assert see("background")["background-last"]["our_facts"]["printed"]


# ---- a pickle that runs code


@pytest.mark.parametrize("key", ["pickle-torch", "pickle-safetensors"])
def test_a_careful_load_of_a_peer_runs_no_code(see: See, key: str) -> None:
    facts = see("pickle")[key]["facts"]
    assert not facts["code_ran"]
    assert facts["raised"]


@pytest.mark.parametrize("key", ["pickle-torch-unsafe", "pickle-dcp"])
def test_torch_load_without_weights_only_and_dcp_run_the_code_of_a_file(see: See, key: str) -> None:
    assert see("pickle")[key]["facts"]["code_ran"]


def test_no_object_of_our_store_runs_code_nor_does_an_import(see: See) -> None:
    facts = see("pickle")["pickle-torch"]["our_facts"]
    assert not facts["code_ran"]
    assert facts["import"] == "InvalidInputError"
    assert "an error (CorruptError)" in facts["load"]


# ---- what a save counts on is cleaned up


@NEEDS_RESTIC
def test_restic_refuses_to_prune_beside_a_backup_unless_all_locks_are_removed(see: See) -> None:
    facts = see("prune")["prune"]["facts"]
    assert not facts["pruned_locked"]
    assert not facts["pruned_unlock"]
    assert facts["pruned_remove_all"]


@NEEDS_RESTIC
def test_a_backup_of_restic_that_was_pruned_beneath_is_damaged(see: See) -> None:
    facts = see("prune")["prune"]["facts"]
    assert not facts["restored"]
    assert not facts["check"]


@NEEDS_RESTIC
def test_our_save_keeps_the_chunks_that_it_shares_with_a_step_deleted_meanwhile(see: See) -> None:
    facts = see("prune")["prune"]["our_facts"]
    assert facts == {
        "deleted_beside": 0,
        "fenced": 1,
        "shared": True,
        "load": "the new state",
        "verified": True,
    }
