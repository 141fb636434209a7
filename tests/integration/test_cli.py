"""The command line as people and scripts use it: what it prints, its exit status, and what it never does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore
from ckptstore.cli import main, printing
from ckptstore.errors import UnavailableError
from ckptstore.format import MARKER_KEY
from ckptstore.objects.local import LocalObjects
from tests.servers import SECRET, S3Server

WITHOUT_TORCH = """
import sys
from ckptstore.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(status)
"""
ATTACK = "\x1b]0;owned\x07\x9b31m[bold red]a[/bold red]\u202e\nsecond line"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON on stdout, which must hold no NaN."""
        return json.loads(self.out, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("CKPTSTORE_URL", "CKPTSTORE_STORAGE_OPTIONS"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        status = main(words)
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return run


@pytest.fixture
def ckpts(tmp_path: Path) -> str:
    """A store at ./ckpts: the run lstm with two steps, and the run base that shares a tensor with it."""
    fill(tmp_path / "ckpts")
    return "./ckpts"


def fill(place: "str | Path", storage_options: dict[str, Any] | None = None) -> ckptstore.Store:
    store = ckptstore.Store(place, storage_options)
    shared = torch.arange(20_000.0)
    store.run("base").save({"embed": shared}, step=0)
    for step in (100, 200):
        model = torch.nn.Linear(3, 2)
        state = {
            "model": model,
            "embed": shared,
            "tied": shared,
            "lr": float("inf"),
            "step": step,
            "rng": ckptstore.RngState(),
            "name": "first",
            "sizes": [1, 2, 3],
            "empty": {},
        }
        metrics = {"loss": 25 / step, "norm": float("nan"), "accuracy": np.float32(0.5)}
        store.run("lstm").save(state, step=step, metrics=metrics, metadata={"config": {"layers": 2}})
    return store


def files_of(run: str = "lstm", step: int = 200) -> Path:
    [path] = Path(f"ckpts/runs/{run}").glob(f"{step:020d}.*.json")
    return path


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def chunk_of(tensor: str, step: int = 200) -> Path:
    """The file of the chunk that holds a tensor."""
    manifest = ckptstore.Store("ckpts").run("lstm").checkpoint(step)._manifest
    node = manifest.tree
    for name in tensor.split("."):
        node = dict(node["items"])[name] if "items" in node else node[name]
    return Path("ckpts", manifest.chunks[manifest.segments[node["segment"]].chunks[0]].key)


# ---- ls


def test_ls_shows_the_runs_of_a_store_the_newest_last(cli: Cli, ckpts: str) -> None:
    lines = cli("ls", ckpts).out.splitlines()
    assert lines[0].split() == ["RUN", "CHECKPOINTS", "NEWEST", "SAVED", "(UTC)", "LOGICAL", "STORED"]
    assert [line.split()[:3] for line in lines[1:]] == [["base", "1", "0"], ["lstm", "2", "200"]]


def test_ls_shows_the_steps_of_a_run_with_their_metrics(cli: Cli, ckpts: str) -> None:
    lines = cli("ls", f"{ckpts}/lstm").out.splitlines()
    assert lines[0].split() == ["STEP", "SAVED", "(UTC)", "LOGICAL", "STORED", "NEW", "METRICS"]
    assert [line.split()[0] for line in lines[1:]] == ["100", "200"]
    assert lines[1].endswith("loss=0.25  norm=nan  accuracy=0.5")


def test_ls_and_show_tell_of_chunks_that_were_found_damaged(cli: Cli, ckpts: str) -> None:
    ckptstore.Store("ckpts").run("lstm").tag(200, "best")
    flip(chunk_of("model.weight"))
    assert "DAMAGE" not in cli("ls", f"{ckpts}/lstm").out
    assert cli("verify", ckpts).status == 1
    done = cli("ls", f"{ckpts}/lstm")
    assert done.status == 0
    assert [line.split()[-1] for line in done.out.splitlines()] == ["DAMAGE", "accuracy=0.5", "damaged"]
    assert "1 checkpoint cannot be restored whole" in done.err
    assert [row["damaged"] for row in cli("ls", f"{ckpts}/lstm", "--json").document["checkpoints"]] == [False, True]
    out = cli("show", f"{ckpts}/lstm").out
    assert re.search("^tags +best$", out, re.MULTILINE)
    assert re.search("^damaged +1 chunk: see ckptstore repair$", out, re.MULTILINE)
    assert cli("show", f"{ckpts}/lstm@100", "--json").document["damaged"] == []


def test_verify_tells_of_a_damaged_chunk_once_whatever_needs_it(cli: Cli, ckpts: str) -> None:
    for step in range(300, 310):
        ckptstore.Store("ckpts").run("lstm").save({"embed": torch.arange(20_000.0)}, step=step)
    flip(chunk_of("embed"))
    lines = cli("verify", ckpts).out.splitlines()
    assert sum("key " in line for line in lines) == 1
    assert lines[0] == "damaged: run base, step 0: embed"
    assert lines[1] == "         run lstm, step 100: embed"
    assert lines[8].startswith("         and ")


def test_ls_shows_one_step_alone_if_it_is_named(cli: Cli, ckpts: str) -> None:
    assert [line.split()[0] for line in cli("ls", f"{ckpts}/lstm@100").out.splitlines()] == ["STEP", "100"]


def test_ls_without_a_target_shows_the_default_store(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_URL", ckpts)
    assert cli("ls").out == cli("ls", ckpts).out
    assert cli("ls", "lstm").out == cli("ls", f"{ckpts}/lstm").out


def test_ls_goes_on_past_a_damaged_manifest_and_reports_it(cli: Cli, ckpts: str) -> None:
    flip(files_of(step=100), 300)
    done = cli("ls", f"{ckpts}/lstm")
    assert [line.split()[0] for line in done.out.splitlines()] == ["STEP", "200"]
    assert done.err.startswith("warning: the manifest of step 100 of run 'lstm' is damaged: runs/lstm/")
    assert done.status == 1
    assert cli("ls", ckpts, "--json").document["damaged"][0]["step"] == 100


def test_ls_warns_of_a_lost_marker_and_goes_on(cli: Cli, ckpts: str) -> None:
    Path("ckpts", MARKER_KEY).unlink()
    done = cli("ls", ckpts)
    assert "lstm" in done.out
    assert re.fullmatch(r"warning: .* holds checkpoints and no ckptstore\.json: .*\n", done.err)
    assert done.status == 0


def test_ls_of_an_emptied_store_says_so(cli: Cli) -> None:
    run = ckptstore.Store("ckpts").run("lstm")
    run.save({}, step=0)
    run.delete(0)
    assert cli("ls", "ckpts").out.startswith("no checkpoints in ")


# ---- show


def test_show_draws_the_tree_with_shapes_and_values(cli: Cli, ckpts: str) -> None:
    out = cli("show", f"{ckpts}/lstm@100").out
    lines = [re.sub(r" {2,}", "  ", line) for line in out.splitlines()]
    assert lines[0] == "lstm@100"
    for expected in (
        "metrics.loss  0.25",
        "metrics.norm  nan",
        'metadata.config  {"layers": 2}',
        "model  OrderedDict of 2, 2 tensors, 32 B",
        "  weight  float32 [2, 3]  24 B",
        "embed  float32 [20000]  80.0 kB",
        "tied  float32 [20000]  80.0 kB, shares memory with embed",
        "lr  inf",
        "step  100",
        'name  "first"',
        "sizes  list [1, 2, 3]",
        "empty  dict of 0",
    ):
        assert expected in lines, out


def test_show_without_a_step_shows_the_newest(cli: Cli, ckpts: str) -> None:
    assert cli("show", f"{ckpts}/lstm").out == cli("show", f"{ckpts}/lstm@200").out


def test_show_sums_up_what_lies_deeper(cli: Cli, ckpts: str) -> None:
    out = cli("show", f"{ckpts}/lstm", "--depth", "1").out
    assert "OrderedDict of 2, 2 tensors, 32 B" in out
    assert "weight" not in out


def test_show_says_who_saved_it(cli: Cli, ckpts: str) -> None:
    assert f"process {os.getpid()} on " in cli("show", f"{ckpts}/lstm").out


def test_show_of_a_whole_store_asks_for_a_run(cli: Cli, ckpts: str) -> None:
    done = cli("show", ckpts)
    assert done.status == 2
    assert "Name a run in it" in done.err


# ---- verify


def test_verify_of_a_sound_store_says_what_was_read(cli: Cli, ckpts: str) -> None:
    done = cli("verify", ckpts)
    assert re.match(r"ok: 3 checkpoints, \d+ chunks, .* read; every byte is as it was saved", done.out)
    assert done.status == 0
    assert done.err == ""


def test_verify_names_each_damaged_tensor_and_says_what_to_do(cli: Cli, ckpts: str) -> None:
    chunk = chunk_of("embed")
    flip(chunk)
    done = cli("verify", ckpts)
    assert done.status == 1
    for name in ("run lstm, step 100: embed", "run lstm, step 200: tied", "run base, step 0: embed"):
        assert f" {name}\n" in done.out
    assert f"  key     {chunk.relative_to('ckpts')}\n  reason  " in done.out
    assert "What to do:\n- " in done.out


@pytest.mark.parametrize(
    ("damage", "advice", "not_advised"),
    [
        (lambda: flip(chunk_of("embed")), "ckptstore rm STORE/RUN@STEP", "A session"),
        (lambda: flip(files_of("base", 0), 300), "ckptstore rm STORE/RUN@STEP", "chunks are marked"),
        (lambda: Path("ckpts", MARKER_KEY).write_text("no JSON"), "move it away", "restore()"),
        (lambda: Path("ckpts", "sessions", "x.json").write_text("no JSON"), "A session", "restore()"),
        (lambda: lists_of_marks("no JSON"), "list of marks", "restore()"),
    ],
    ids=["chunk", "manifest", "marker", "session", "list"],
)
def test_verify_advises_on_the_kind_of_damage_that_it_found(
    cli: Cli, ckpts: str, damage: Callable[[], object], advice: str, not_advised: str
) -> None:
    damage()
    done = cli("verify", ckpts)
    assert done.status == 1
    assert advice in done.out
    assert not_advised not in done.out


def lists_of_marks(text: str) -> None:
    folder = Path("ckpts", "condemned")
    folder.mkdir()
    (folder / "x.json").write_text(text)


def test_verify_is_content_when_no_checkpoint_needs_what_is_damaged(cli: Cli, ckpts: str) -> None:
    chunk = chunk_of("model.bias")
    flip(chunk)
    assert cli("verify", ckpts).status == 1
    assert cli("rm", f"{ckpts}/lstm@200").status == 0
    done = cli("verify", ckpts)
    assert done.status == 0
    assert f"harmless: {chunk.relative_to('ckpts')} is damaged" in done.out


def test_verify_of_a_run_reads_only_what_it_needs(cli: Cli, ckpts: str) -> None:
    flip(files_of("base", 0), 300)
    assert cli("verify", f"{ckpts}/lstm").status == 0
    assert cli("verify", f"{ckpts}/base").status == 1


def test_verify_reports_a_lost_marker_as_damage(cli: Cli, ckpts: str) -> None:
    Path("ckpts", MARKER_KEY).unlink()
    assert cli("verify", ckpts, "--json").document["damaged"][0]["key"] == MARKER_KEY


def test_verify_leaves_strange_files_alone_and_mentions_them(cli: Cli, ckpts: str) -> None:
    Path("ckpts", "notes.txt").write_text("mine")  # beside the store's own folders nothing is looked at
    Path("ckpts", "runs", "lstm", "notes.txt").write_text("mine")
    done = cli("verify", ckpts)
    assert "unknown: runs/lstm/notes.txt" in done.out
    assert "unknown: notes.txt" not in done.out
    assert done.status == 0


def test_verify_of_one_step_is_refused(cli: Cli, ckpts: str) -> None:
    assert cli("verify", f"{ckpts}/lstm@100").status == 2


def test_verify_draws_its_bar_on_a_terminal_alone(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("verify", ckpts).err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "verifying" in cli("verify", ckpts).err
    assert cli("verify", ckpts, "--json").err == ""


# ---- du


def test_du_adds_up_run_by_run(cli: Cli, ckpts: str) -> None:
    lines = cli("du", ckpts).out.splitlines()
    assert lines[0].split() == ["RUN", "CHECKPOINTS", "LOGICAL", "STORED", "SHARED"]
    assert [line.split()[:2] for line in lines[1:4]] == [["base", "1"], ["lstm", "2"], ["total", "3"]]
    assert lines[-1] == "unreferenced: 0 B that no checkpoint needs"


def test_du_counts_what_runs_share_once(cli: Cli, ckpts: str) -> None:
    found = cli("du", ckpts, "--json").document
    runs = {row["run"]: row for row in found["runs"]}
    assert runs["base"]["shared_bytes"] == runs["base"]["stored_bytes"] == runs["lstm"]["shared_bytes"] > 0
    assert found["stored_bytes"] == runs["lstm"]["stored_bytes"]


def test_du_counts_what_a_deleted_checkpoint_leaves_behind(cli: Cli, ckpts: str) -> None:
    ckptstore.Store("ckpts").run("lstm").delete(100)
    assert cli("du", ckpts, "--json").document["unreferenced_bytes"] > 0


def test_du_of_a_run_shows_it_alone(cli: Cli, ckpts: str) -> None:
    assert [line.split()[0] for line in cli("du", f"{ckpts}/base").out.splitlines()] == ["RUN", "base"]


def test_du_names_the_checkpoint_whose_manifest_is_damaged(cli: Cli, ckpts: str) -> None:
    flip(files_of("lstm", 100), 300)
    done = cli("du", ckpts)
    assert done.status == 1
    assert "step 100 of run 'lstm'" in done.err
    assert "ckptstore verify" in done.err


# ---- rm


def test_rm_deletes_one_checkpoint_and_no_other(cli: Cli, ckpts: str) -> None:
    assert cli("rm", f"{ckpts}/lstm@100") == Outcome(0, "deleted lstm@100\n", "")
    assert ckptstore.Store("ckpts").run("lstm").steps() == [200]
    assert cli("verify", ckpts).status == 0


def test_rm_deletes_a_checkpoint_whose_manifest_is_damaged(cli: Cli, ckpts: str) -> None:
    flip(files_of("lstm", 100), 300)
    assert cli("rm", f"{ckpts}/lstm@100").status == 0
    assert cli("verify", ckpts).status == 0


# ---- export and import


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_export_and_import_move_a_checkpoint(cli: Cli, ckpts: str, ending: str) -> None:
    done = cli("export", f"{ckpts}/lstm@100", f"out.{ending}")
    assert re.fullmatch(rf"exported lstm@100 to out\.{ending} \(.* kB\)\n", done.out)
    done = cli("import", f"out.{ending}", "./other/copy@7")
    assert re.fullmatch(rf"imported out\.{ending} as copy@7: .* stored, .* of it new\n", done.out)
    old, new = (ckptstore.Store(place).run(run).checkpoint() for place, run in ((ckpts, "lstm"), ("other", "copy")))
    assert [*old.tensors()] == [*new.tensors()]


def test_export_overwrites_only_when_told(cli: Cli, ckpts: str) -> None:
    Path("out.pt").write_text("precious")
    done = cli("export", f"{ckpts}/lstm", "out.pt")
    assert done.status == 2
    assert "give --force" in done.err
    assert Path("out.pt").read_text() == "precious"
    assert cli("export", f"{ckpts}/lstm", "out.pt", "--force").status == 0
    assert torch.load("out.pt", weights_only=False)["step"] == 200


def test_export_of_a_damaged_checkpoint_writes_nothing(cli: Cli, ckpts: str) -> None:
    flip(chunk_of("embed"))
    done = cli("export", f"{ckpts}/lstm", "out.pt")
    assert done.status == 1
    assert "embed" in done.err
    assert not Path("out.pt").exists()


def test_import_needs_a_step_from_somewhere(cli: Cli, ckpts: str) -> None:
    cli("export", f"{ckpts}/lstm", "out.pt")
    assert cli("import", "out.pt", f"{ckpts}/copy", "--json").document["checkpoints"][0]["step"] == 200
    torch.save({"w": torch.ones(1)}, "weights.pt")
    done = cli("import", "weights.pt", f"{ckpts}/copy")
    assert done.status == 2
    assert "STORE/RUN@STEP" in done.err


def test_import_over_another_state_is_refused(cli: Cli, ckpts: str) -> None:
    cli("export", f"{ckpts}/lstm@100", "out.pt")
    done = cli("import", "out.pt", f"{ckpts}/lstm@200")
    assert done.status == 2
    assert "another state" in done.err
    assert "--replace" in done.err
    assert cli("import", "out.pt", f"{ckpts}/lstm@200", "--replace").status == 0
    assert ckptstore.Store("ckpts").run("lstm").load(200)["step"] == 100


def old_files(*steps: int) -> Path:
    """A folder of a plain torch.save loop."""
    Path("old").mkdir()
    for step in steps:
        torch.save({"embed": torch.arange(20_000.0), "bias": torch.full((3,), float(step))}, f"old/ckpt_{step}.pt")
    return Path("old")


def test_import_of_a_folder_shows_each_checkpoint_and_what_dedup_saved(cli: Cli, ckpts: str) -> None:
    old_files(9, 10)
    Path("old/log.txt").touch()
    done = cli("import", "old", f"{ckpts}/copy", "--dry-run")
    assert done.status == 0
    assert [line.split()[:3] for line in done.out.splitlines()[3:5]] == [
        ["copy", "9", "ckpt_9.pt"],
        ["copy", "10", "ckpt_10.pt"],
    ]
    assert "2 checkpoints would be imported, 0 are there already" in done.out
    done = cli("import", "old", f"{ckpts}/copy")
    assert done.status == 0
    assert "passed over log.txt: no checkpoint" in done.out
    assert re.search(
        r"2 checkpoints imported, 0 were there already, 1 passed over .*\n.* of 4 chunks were there already", done.out
    )
    assert "0 checkpoints imported, 2 were there already" in cli("import", "old", f"{ckpts}/copy").out


def test_import_of_a_folder_with_a_damaged_file_has_status_1_and_goes_on(cli: Cli, ckpts: str) -> None:
    old_files(1, 2, 3)
    Path("old/ckpt_2.pt").write_bytes(b"")
    done = cli("import", "old", f"{ckpts}/copy")
    assert done.status == 1
    assert done.err.startswith("warning: ckpt_2.pt was not imported: ")
    assert ckptstore.Store("ckpts").run("copy").steps() == [1, 3]
    document = cli("import", "old", f"{ckpts}/copy", "--json").document
    assert [row["outcome"] for row in document["checkpoints"]] == ["there", "failed", "there"]
    assert "ckpt_2.pt" in document["checkpoints"][1]["error"]
    assert cli("import", "old", f"{ckpts}/other", "--stop-on-error").status == 1
    assert ckptstore.Store("ckpts").run("other").steps() == [1]


def test_import_of_a_folder_into_a_whole_store_asks_for_a_run(cli: Cli, ckpts: str) -> None:
    done = cli("import", str(old_files(1)), ckpts)
    assert done.status == 2
    assert "whole store" in done.err


def test_import_takes_the_options_that_its_errors_name(cli: Cli, ckpts: str) -> None:
    old_files(1)
    torch.save({"w": torch.ones(1)}, "old/final.pt")
    torch.save({"w": torch.ones(1), "junk": 1}, "old/net5_2.pt")
    done = cli("import", "old", f"{ckpts}/copy")
    assert done.status == 2
    assert "--step-from" in done.err
    words = ("--exclude", "final*", "--step-from", r"_(\d+)\.pt", "--leave-out", "junk")
    assert cli("import", "old", f"{ckpts}/copy", *words).status == 0
    assert list(ckptstore.Store("ckpts").run("copy").load(2)) == ["w"]


def test_hostile_names_of_files_do_nothing_but_show(cli: Cli, ckpts: str) -> None:
    names = [
        f"{ATTACK.replace('/', '|')}_1.pt",
        "--trust_2.pt",
        "a" * 240 + "_3.pt",
        "$(touch owned)_4.pt",
        "größe_5.pt",
    ]
    Path("old").mkdir()
    for name in names:
        torch.save({"w": torch.ones(1)}, Path("old", name))
    Path("old", os.fsdecode(b"no-\xff-text_6.pt")).write_bytes(Path("old", names[0]).read_bytes())
    Path("old", f"{ATTACK.replace('/', '|')}.txt").touch()
    Path("old", f"{ATTACK.replace('/', '|')}_7.pt").write_bytes(b"")
    for words in (("--dry-run",), (), (), ("--json",)):
        done = cli("import", "old", f"{ckpts}/copy", *words)
        assert done.status == int(words != ("--dry-run",)), done.err
        assert not set(done.out + done.err) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert not any(line.startswith("second line") for line in done.out.splitlines())
    assert ckptstore.Store("ckpts").run("copy").steps() == [1, 2, 3, 4, 5, 6]
    assert not Path("owned").exists()


def test_export_writes_folders_too(cli: Cli, ckpts: str) -> None:
    done = cli("export", f"{ckpts}/base", "out", "--format", "dcp")
    assert done.status == 0, done.err
    assert sorted(path.name for path in Path("out").iterdir()) == [".metadata", "__0_0.distcp"]
    assert cli("export", f"{ckpts}/base", "out", "--format", "dcp").status == 2
    assert cli("export", f"{ckpts}/base", "out", "--format", "dcp", "--force").status == 0
    assert cli("import", "out", "./other/copy@3", "--json").document["step"] == 3
    assert cli("export", f"{ckpts}/base", "more", "--format", "folder").status == 2
    assert cli("export", f"{ckpts}/base", "more", "--format", "nonsense").status == 2
    assert not Path("more").exists()


# ---- --json


ROWS: dict[tuple[str, ...], tuple[str, set[str]]] = {
    ("ls", "ckpts"): (
        "runs",
        {"run", "checkpoints", "damaged", "newest_step", "created", "logical_bytes", "stored_bytes"},
    ),
    ("ls", "ckpts/lstm"): (
        "checkpoints",
        {"step", "created", "tags", "metrics", "raw_bytes", "stored_bytes", "new_bytes", "damaged"},
    ),
    ("du", "ckpts"): ("runs", {"run", "checkpoints", "logical_bytes", "stored_bytes", "shared_bytes"}),
    ("import", ".", "ckpts/copy"): (
        "checkpoints",
        {"source", "run", "step", "outcome", "error", "source_bytes", "raw_bytes", "stored_bytes", "new_bytes"},
    ),
}
FIELDS: dict[tuple[str, ...], set[str]] = {
    ("ls", "ckpts"): {"store", "runs", "damaged"},
    ("ls", "ckpts/lstm"): {"store", "run", "checkpoints", "damaged"},
    ("show", "ckpts/lstm"): {
        *("store", "run", "step", "save", "digest", "created", "host", "pid", "version", "metrics", "metadata"),
        *("tags", "damaged", "raw_bytes", "stored_bytes", "new_bytes", "tree"),
    },
    ("verify", "ckpts"): {
        *("store", "run", "ok", "quick", "checkpoints", "chunks", "bytes", "damaged", "harmless", "unknown", "marked"),
    },
    ("du", "ckpts"): {"store", "runs", "logical_bytes", "stored_bytes", "unreferenced_bytes"},
    ("export", "ckpts/lstm", "out.pt"): {"store", "run", "step", "file", "file_bytes"},
    ("import", "in.pt", "ckpts/copy@1"): {
        *("store", "run", "step", "file", "raw_bytes", "stored_bytes", "new_bytes"),
    },
    ("import", ".", "ckpts/copy"): {
        *("store", "run", "source", "dry_run", "checkpoints", "passed_over"),
        *("source_bytes", "raw_bytes", "new_bytes", "chunks", "reused_chunks"),
    },
    ("rm", "ckpts/lstm@100"): {"store", "run", "step"},
    ("diff", "ckpts/lstm"): {
        *("before", "after", "summary", "raw_bytes", "shared_bytes", "read_bytes", "tensors"),
        *("changes", "metrics", "metadata"),
    },
}


@pytest.mark.parametrize("words", FIELDS, ids=" ".join)
def test_json_has_the_documented_fields(cli: Cli, ckpts: str, words: tuple[str, ...]) -> None:
    torch.save({"w": torch.ones(1), "step": 7}, "in.pt")
    done = cli(*words, "--json")
    assert done.status == 0, done.err
    assert set(done.document) == FIELDS[words]
    if words in ROWS:
        name, fields = ROWS[words]
        assert all(set(row) == fields for row in done.document[name])


def test_json_of_show_has_an_entry_for_each_leaf(cli: Cli, ckpts: str) -> None:
    found = cli("show", f"{ckpts}/lstm@100", "--json").document
    tree = {entry["path"]: entry for entry in found["tree"]}
    assert tree["model.weight"] == {
        "path": "model.weight",
        "type": "tensor",
        "dtype": "float32",
        "shape": [2, 3],
        "bytes": 24,
        "shares_memory_with": None,
    }
    assert tree["tied"]["shares_memory_with"] == "embed"
    assert tree["lr"] == {"path": "lr", "type": "float", "value": "inf"}
    assert tree["empty"] == {"path": "empty", "type": "dict", "value": {}}
    assert tree["sizes[2]"] == {"path": "sizes[2]", "type": "int", "value": 3}
    assert found["metrics"] == {"loss": 0.25, "norm": "nan", "accuracy": 0.5}


def test_json_of_show_sums_up_what_lies_deeper(cli: Cli, ckpts: str) -> None:
    found = cli("show", f"{ckpts}/lstm@100", "--json", "--depth", "1").document
    [model] = [entry for entry in found["tree"] if entry["path"] == "model"]
    assert model == {"path": "model", "type": "OrderedDict", "items": 2, "tensors": 2, "bytes": 32}


def test_json_of_verify_names_the_damage(cli: Cli, ckpts: str) -> None:
    flip(chunk_of("embed"))
    found = cli("verify", ckpts, "--json").document
    assert found["ok"] is False
    assert all(set(row) == {"run", "step", "path", "key", "reason"} for row in found["damaged"])
    assert {(row["run"], row["step"], row["path"]) for row in found["damaged"]} >= {
        ("base", 0, "embed"),
        ("lstm", 100, "tied"),
    }


def test_times_in_json_are_utc(cli: Cli, ckpts: str) -> None:
    created = cli("show", f"{ckpts}/lstm", "--json").document["created"]
    assert created.endswith("Z")
    assert abs(datetime.fromisoformat(created).timestamp() - time.time()) < 600


@pytest.mark.parametrize("words", [("ls", "./none"), ("show", "./none/lstm@3"), ("ls", "--bogus"), ("bogus",)])
def test_errors_are_a_document_too(cli: Cli, words: tuple[str, ...]) -> None:
    done = cli(*words, "--json")
    assert set(done.document) == {"error"}
    assert set(done.document["error"]) == {"type", "message", "status"}
    assert done.document["error"]["status"] == done.status
    assert done.err.startswith("error: ")


def test_values_that_json_lacks_are_written_as_documented(cli: Cli) -> None:
    state = {
        "long": 2**70,
        "endless": 1 << 20_000,
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "surrogate": "\ud800",
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "scalar": np.int16(-3),
        "when": np.datetime64("2026-01-02"),
        "minus": float("-inf"),
    }
    ckptstore.Store("ckpts").run("values").save(state, step=0, metrics={"pairs": {1: "one", (2, 3): None}})
    found = cli("show", "ckpts/values", "--json").document
    assert {entry["path"]: entry["value"] for entry in found["tree"]} == {
        "long": "1180591620717411303424",
        "endless": hex(1 << 20_000),
        "complex": "(1+2j)",
        "bytes": "00ff",
        "surrogate": "\\ud800",
        "size": [2, 3],
        "dtype": "bfloat16",
        "device": "cpu",
        "scalar": -3,
        "when": "2026-01-02",
        "minus": "-inf",
    }
    assert found["metrics"] == {"pairs": [[1, "one"], [[2, 3], None]]}


# ---- errors and their exit status


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("ls", "./none"), 3),
        (("ls", "./ckpts/none"), 3),
        (("du", "./ckpts/none"), 3),
        (("verify", "./ckpts/none"), 3),
        (("show", "./ckpts/lstm@7"), 3),
        (("export", "./ckpts/none", "out.pt"), 3),
        (("export", "./ckpts/lstm", "nowhere/out.pt"), 3),
        (("import", "none.pt", "./ckpts/copy@1"), 3),
        (("show", "./ckpts/lstm@x"), 2),
        (("show",), 2),
        (("show", "./ckpts/lstm", "--depth", "0"), 2),
        (("ls", "--bogus"), 2),
        (("bogus",), 2),
        (("ls", "./ckpts", "--storage-options", "{"), 2),
        (("export", "./ckpts/lstm", "out.onnx"), 2),
        (("ls", "nonsense://place/x"), 2),
        (("ls", "s3:///bucket/x"), 2),
        (("rm", "./ckpts/lstm"), 2),
        (("rm", "./ckpts"), 2),
        (("rm", "./ckpts/lstm@7"), 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_each_error_is_one_line_and_has_its_status(cli: Cli, ckpts: str, words: tuple[str, ...], status: int) -> None:
    done = cli(*words)
    assert done.status == status, done.err
    assert done.out == ""
    first, *rest = done.err.splitlines()
    assert first.startswith("error: ")
    assert all(line.startswith("Try: ckptstore ") and line.endswith(" --help") for line in rest)


def test_a_file_in_the_place_of_a_store_has_status_4(cli: Cli) -> None:
    Path("nr").write_text("no store")
    for target in ("nr", "nr/", "./nr"):
        done = cli("ls", target)
        assert done.status == 4, target
        assert "nr" in done.err


def test_a_store_that_cannot_be_read_has_status_4(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, key: str) -> bytes:
        raise UnavailableError("the disk is on fire")

    monkeypatch.setattr(LocalObjects, "get", fail)
    done = cli("ls", ckpts)
    assert done.status == 4
    assert done.err == "error: the disk is on fire\n"


def test_an_interrupt_has_status_130(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: object, key: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalObjects, "get", interrupt)
    assert cli("ls", ckpts) == Outcome(130, "", "interrupted\n")


def test_a_bug_is_never_taken_for_damage(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, key: str) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(LocalObjects, "get", fail)
    done = cli("ls", ckpts)
    assert done.status == 70
    assert "ZeroDivisionError" in done.err


def test_storage_options_are_never_shown(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_STORAGE_OPTIONS", '{"secret": "hunter2"')
    done = cli("ls", ckpts)
    assert done.status == 2
    assert "hunter2" not in done.err
    assert "hunter2" not in cli("ls", "--help").out


# ---- help


@pytest.mark.parametrize("command", ["ls", "show", "verify", "du", "export", "import", "rm"])
def test_help_of_each_command_has_a_sentence_and_examples(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.status == 0
    examples = [line.strip() for line in done.out.partition("Examples:")[2].splitlines()]
    assert sum(f"ckptstore {command} " in line for line in examples) >= 2


def test_help_of_the_program_lists_the_commands_and_the_exit_status(cli: Cli) -> None:
    out = cli("--help").out
    for word in ("ls", "show", "verify", "du", "export", "import", "rm", "130  interrupted"):
        assert f"  {word}" in out


def test_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version") == Outcome(0, f"ckptstore {ckptstore.__version__}\n", "")


def test_no_command_shows_the_help(cli: Cli) -> None:
    assert cli() == Outcome(2, cli("--help").out, "")


# ---- hostile stores, pipes, terminals


def test_nothing_in_a_store_acts_on_the_terminal(cli: Cli) -> None:
    state = {ATTACK: {"inner": torch.ones(2)}, "text": ATTACK}
    run = ckptstore.Store("ckpts").run("evil")
    run.save(state, step=0, metrics={ATTACK: ATTACK}, metadata={ATTACK: [ATTACK]})
    [manifest] = Path("ckpts/runs/evil").glob("*.json")
    [chunk] = (path for path in Path("ckpts/chunks").rglob("*") if path.is_file())
    flip(chunk)
    Path("ckpts", "odd\x1b[31mname").write_text("strange")
    outcomes = [cli("ls", "ckpts/evil"), cli("show", "ckpts/evil"), cli("verify", "ckpts")]
    outcomes += [cli("export", "ckpts/evil", "out.pt"), cli("verify", "ckpts", "--json")]
    outcomes += [cli("show", "ckpts/evil\x1b[31m"), cli("ls", "./none\x1b[31m")]
    run.save({ATTACK: {"inner": torch.zeros(2)}, "text": f"{ATTACK}!"}, step=1, metrics={ATTACK: 2})
    outcomes += [cli("diff", "ckpts/evil", "--read", read) for read in ("changed", "nothing")]
    for done in outcomes:
        text = done.out + done.err
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert not any(line.startswith("second line") for line in text.splitlines())
    assert "[bold red]a[/bold red]" in outcomes[1].out
    assert manifest.exists()


def test_long_names_are_neither_cut_off_nor_wrapped(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    run, key, metric = "r" * 128, "k" * 300, "m" * 300
    ckptstore.Store("ckpts").run(run).save({key: torch.ones(1)}, step=0, metrics={metric: 1.0})
    assert run in cli("ls", "ckpts").out
    assert f"{metric}=1" in cli("ls", f"ckpts/{run}").out
    assert key in cli("show", f"ckpts/{run}").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run in cli("ls", "ckpts").out


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (115_000_000, "115 MB"),
        (2**40, "1.10 TB"),
        (10**21, "1000 EB"),
    ],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert printing.bytes_text(count) == text


# ---- as a process


def spawn(*words: str, program: tuple[str, ...] = ("-m", "ckptstore"), **environment: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, *program, *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={name: value for name, value in os.environ.items() if not name.startswith("CKPTSTORE_")} | environment,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("ls", "{}"),
        ("ls", "{}/lstm"),
        ("show", "{}/lstm"),
        ("verify", "{}"),
        ("du", "{}", "--json"),
        ("rm", "{}/lstm@100"),
    ],
    ids=" ".join,
)
def test_looking_at_a_store_does_not_import_torch(ckpts: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = spawn(*(word.format(tmp_path / "ckpts") for word in words), program=("-c", WITHOUT_TORCH))
    assert done.status == 0, done.err


@pytest.mark.parametrize("words", [("--help",), ("ls", "{}"), ("du", "{}")], ids=" ".join)
def test_what_one_asks_often_does_not_import_numpy_either(ckpts: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    program = WITHOUT_TORCH.replace('"torch"', '"numpy"')
    done = spawn(*(word.format(tmp_path / "ckpts") for word in words), program=("-c", program))
    assert done.status == 0, done.err


def test_the_module_and_its_exit_status(ckpts: str, tmp_path: Path) -> None:
    assert spawn("verify", str(tmp_path / "ckpts")).status == 0
    assert spawn("ls", str(tmp_path / "none")).status == 3


def test_a_terminal_that_knows_ascii_alone_is_no_error(tmp_path: Path) -> None:
    ckptstore.Store(tmp_path / "ckpts").run("r").save({"größe": 1}, step=0)
    done = spawn("show", str(tmp_path / "ckpts/r"), PYTHONIOENCODING="ascii")
    assert done.status == 0
    assert r"gr\xf6\xdfe" in done.out


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    ckptstore.Store(tmp_path / "ckpts").run("r").save({f"key{number}": "x" * 150 for number in range(2000)}, step=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptstore", "show", str(tmp_path / "ckpts/r")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


# ---- other backends


def test_a_store_in_memory_is_named_by_its_url(cli: Cli) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    fill(url)
    assert cli("verify", url).status == 0
    assert cli("show", f"{url}/lstm@100", "--json").document["store"] == url


def test_a_bucket_is_reached_with_the_options_of_the_variable(
    cli: Cli, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{moto_s3.new_bucket()}/ckpts"
    fill(url, moto_s3.storage_options)
    monkeypatch.setenv("CKPTSTORE_STORAGE_OPTIONS", json.dumps(moto_s3.storage_options))
    assert cli("ls", f"{url}/lstm", "--json").document["store"] == url
    assert cli("verify", url).status == 0
    monkeypatch.setenv("CKPTSTORE_URL", url)
    assert cli("export", "lstm@100", "out.safetensors").status == 0
    assert cli("import", "out.safetensors", "copy@1", "--json").document["new_bytes"] == 0


def test_a_bucket_that_is_not_there_is_unavailable_and_no_secret_is_shown(cli: Cli, moto_s3: S3Server) -> None:
    done = cli("ls", "s3://no-such-bucket/ckpts", "--storage-options", json.dumps(moto_s3.storage_options), "--json")
    assert done.status == 4
    assert done.document["error"]["type"] == "UnavailableError"
    assert SECRET not in done.out + done.err
