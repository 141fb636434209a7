"""`doctor`, `repair` and `verify --quick` as people and scripts use them: what they print, and their exit status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.cli import main
from ckptstore.format import condemned_key, new_save_id

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process, in an empty folder: the status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("CKPTSTORE_URL", "CKPTSTORE_STORAGE_OPTIONS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(words)
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def lstm(cli: Cli) -> ckptstore.Run:
    """A run of two steps in the store ./ckpts, each with a tensor of its own and one that both share."""
    run = ckptstore.Store("ckpts").run("lstm")
    for step in (1, 2):
        run.save({"embed": torch.ones(50), "weight": torch.full((50,), step)}, step=step)
    return run


def file_of(run: ckptstore.Run, step: int, tensor: str) -> Path:
    manifest = run.checkpoint(step)._manifest
    [index] = manifest.segments[manifest.tree[tensor]["segment"]].chunks
    return Path("ckpts", manifest.chunks[index].key)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


# ---- verify --quick


def test_a_quick_verify_says_that_it_has_not_read_the_chunks(cli: Cli, lstm: ckptstore.Run) -> None:
    status, out, _ = cli("verify", "./ckpts", "--quick")
    assert status == 0
    assert out == (
        "ok: 2 checkpoints, 3 chunks, each there and as long as it was saved; what is in them was not read\n"
    )


def test_a_quick_verify_names_a_missing_chunk(cli: Cli, lstm: ckptstore.Run) -> None:
    file_of(lstm, 2, "weight").unlink()
    status, out, _ = cli("verify", "./ckpts/lstm", "--quick")
    assert status == 1
    assert "damaged: run lstm, step 2: weight\n" in out
    assert "DAMAGED: 1 finding in 2 checkpoints, 3 chunks" in out


def test_a_quick_verify_says_so_in_its_document(cli: Cli, lstm: ckptstore.Run) -> None:
    damage(file_of(lstm, 2, "weight"))
    quick: dict[str, Any] = json.loads(cli("verify", "./ckpts", "--quick", "--json")[1])
    whole: dict[str, Any] = json.loads(cli("verify", "./ckpts", "--json")[1])
    assert (quick["quick"], quick["ok"], quick["bytes"]) == (True, True, 0)
    assert (whole["quick"], whole["ok"]) == (False, False)


# ---- repair


def test_repair_says_what_it_has_repaired(cli: Cli, lstm: ckptstore.Run) -> None:
    damage(file_of(lstm, 1, "embed"))
    cli("verify", "./ckpts")
    ckptstore.Store("ckpts").run("again").save({"embed": torch.ones(50)}, step=0)
    status, out, _ = cli("repair", "./ckpts")
    assert status == 0
    assert out == (
        "repaired: lstm@1: embed\n"
        "repaired: lstm@2: embed\n"
        "1 chunk marked as damaged; 2 checkpoints repaired, 0 cannot be repaired\n"
    )
    assert cli("verify", "./ckpts")[0] == 0
    status, out, _ = cli("repair", "./ckpts")
    assert status == 0
    assert out == (
        "1 chunk marked as damaged; no checkpoint needs any of them. ckptstore gc deletes those that no other needs.\n"
    )


def test_repair_of_a_store_without_marks_leads_to_verify(cli: Cli, lstm: ckptstore.Run) -> None:
    assert cli("repair", "./ckpts") == (
        0,
        "nothing is marked as damaged. ckptstore verify reads every byte and marks what is.\n",
        "",
    )


def test_repair_names_what_is_lost_and_says_what_to_do(cli: Cli, lstm: ckptstore.Run) -> None:
    damage(file_of(lstm, 2, "weight"))
    damage(Path("ckpts", str(lstm.checkpoint(1)._manifest.key)))
    cli("verify", "./ckpts")
    status, out, _ = cli("repair", "./ckpts")
    assert status == 1
    assert "LOST: lstm@2: there is no good copy of weight\n" in out
    assert "LOST: lstm@1: its manifest cannot be read\n" in out
    assert "1 chunk marked as damaged; 0 checkpoints repaired, 2 cannot be repaired\n" in out
    assert "What to do:\n- Save the same state again under any step" in out


def test_the_document_of_a_repair_has_every_checkpoint(cli: Cli, lstm: ckptstore.Run) -> None:
    damage(file_of(lstm, 1, "embed"))
    damage(file_of(lstm, 2, "weight"))
    cli("verify", "./ckpts")
    ckptstore.Store("ckpts").run("again").save({"embed": torch.ones(50)}, step=0)
    status, out, _ = cli("repair", "./ckpts/lstm", "--json")
    assert status == 1
    document: dict[str, Any] = json.loads(out)
    assert document.pop("store").endswith("/ckpts")
    assert document == {
        "run": "lstm",
        "marked": 2,
        "repaired": [{"run": "lstm", "step": 1, "paths": ["embed"]}],
        "lost": [{"run": "lstm", "step": 2, "paths": ["weight"]}],
        "unreadable": [],
    }


def test_repair_with_a_list_that_cannot_be_read_is_damage(cli: Cli, lstm: ckptstore.Run) -> None:
    path = Path("ckpts", condemned_key(new_save_id()))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no list")
    status, _, err = cli("repair", "./ckpts")
    assert status == 1
    assert err.startswith("error: a list of condemned chunks cannot be read")


def test_repair_of_one_step_is_refused(cli: Cli, lstm: ckptstore.Run) -> None:
    status, _, err = cli("repair", "./ckpts/lstm@1")
    assert status == 2
    assert "repair takes a store or a whole run, not one step" in err


# ---- doctor


def test_doctor_of_a_healthy_store_ends_with_no_problems(cli: Cli, lstm: ckptstore.Run) -> None:
    status, out, err = cli("doctor", "./ckpts")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert all(line.startswith("ok       ") for line in lines[:-1])
    assert lines[-1] == "no problems"
    assert not list(Path("ckpts", "scratch").iterdir())


def test_doctor_counts_problems_and_prints_the_advice_below_each(cli: Cli, lstm: ckptstore.Run) -> None:
    damage(Path("ckpts", str(lstm.checkpoint(1)._manifest.key)))
    status, out, _ = cli("doctor", "./ckpts")
    assert status == 1
    lines = out.splitlines()
    [place] = [number for number, line in enumerate(lines) if line.startswith("PROBLEM  ")]
    assert "the manifest of step 1 of run 'lstm' is damaged" in lines[place]
    assert lines[place + 1].startswith("         ckptstore verify names all that is damaged")
    assert lines[-1] == "1 problem"


def test_a_note_is_no_problem(cli: Cli, lstm: ckptstore.Run) -> None:
    lstm.delete(2)
    status, out, _ = cli("doctor", "./ckpts")
    assert status == 0
    assert "note     1 chunk (" in out
    assert out.endswith("no problems\n")


def test_doctor_tries_a_place_where_no_store_is_yet(cli: Cli) -> None:
    status, out, _ = cli("doctor", "./new")
    assert status == 0
    assert "holds no store yet\n         The first save makes one.\n" in out


def test_doctor_of_a_place_that_cannot_be_used_tells_why_as_a_finding(cli: Cli) -> None:
    Path("file").write_text("no folder")
    status, out, _ = cli("doctor", "./file")
    assert status == 1
    assert "PROBLEM  the place does not do what saves need of it: " in out


def test_doctor_without_a_target_needs_a_default_store(cli: Cli) -> None:
    status, _, err = cli("doctor")
    assert status == 3
    assert "there is no default store" in err


def test_doctor_of_a_run_is_refused_and_says_how_a_folder_is_given(cli: Cli, lstm: ckptstore.Run) -> None:
    status, _, err = cli("doctor", "./ckpts/lstm")
    assert status == 2
    assert "doctor examines a whole store, and lstm is taken for a run of " in err
    assert "if it is a folder, give it as ./lstm." in err


def test_the_document_of_doctor_has_every_finding(cli: Cli, lstm: ckptstore.Run) -> None:
    lstm.delete(2)
    status, out, _ = cli("doctor", "./ckpts", "--json")
    document: dict[str, Any] = json.loads(out)
    assert status == 0
    assert set(document) == {"store", "ok", "findings"}
    assert document["ok"] is True
    assert all(set(row) == {"level", "what", "advice"} for row in document["findings"])
    assert [row["advice"] for row in document["findings"] if row["level"] == "note"] == [
        "ckptstore gc deletes what is garbage."
    ]


@pytest.mark.parametrize("words", [("doctor",), ("repair",), ("verify", "--quick")], ids=" ".join)
def test_help_has_an_example_that_can_be_copied(cli: Cli, words: tuple[str, ...]) -> None:
    status, out, _ = cli(words[0], "--help")
    assert status == 0
    assert any(
        all(word in line for word in ("ckptstore", *words)) for line in out.partition("Examples:")[2].splitlines()
    )
