"""`gc`, `prune` and `tag` on the command line: what they print, their exit status, and what they refuse."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore import performing
from ckptstore.cli import main
from ckptstore.collecting import CollectReport, WaitingSave
from ckptstore.format import session_key
from ckptstore.manifest import Session, Writer, encode
from ckptstore.objects import local
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.open import store_time


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


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
def store(cli: Cli) -> ckptstore.Store:
    """A store at ./ckpts: the run lstm with three steps of 400 bytes each, and the run base with one."""
    found = ckptstore.Store("ckpts", codec="none")
    for step in (100, 200, 300):
        found.run("lstm").save({"t": torch.full((100,), float(step))}, step=step, metrics={"loss": 100 / step})
    found.run("base").save({"t": torch.zeros(100)}, step=0)
    return found


def files() -> set[str]:
    return {str(path) for path in Path("ckpts").rglob("*") if path.is_file()}


def dead_session() -> None:
    """The session of a save that began and never ended."""
    writer = Writer(host="nodé\x1b[1m", pid=12, version="0")
    session = Session(save="a" * 32, run="lstm", step=400, writer=writer, opened="2026-01-02T03:04:05Z", beat=3)
    LocalObjects("ckpts").put(session_key("a" * 32), encode(session))


# ---- gc


def test_gc_says_what_it_deleted(cli: Cli, store: ckptstore.Store) -> None:
    store.run("lstm").delete(100)
    ran = cli("gc", "ckpts")
    assert (ran.status, ran.err) == (0, "")
    assert re.fullmatch(
        r"3 checkpoints; 4 chunks \(1\.\d\d kB\), of which no checkpoint needs 1 chunk \((\d+) B\)\n"
        r"deleted 1 chunk \(\1 B\)\n",
        ran.out,
    )
    assert len(list(Path("ckpts/chunks").rglob("*.*"))) == 3


def test_gc_with_nothing_to_do_says_so(cli: Cli, store: ckptstore.Store) -> None:
    assert cli("gc", "ckpts").lines[1] == "deleted 0 chunks (0 B)"


def test_a_dry_run_of_gc_changes_nothing(cli: Cli, store: ckptstore.Store) -> None:
    store.run("lstm").delete(100)
    before = files()
    ran = cli("gc", "ckpts", "--dry-run")
    assert ran.lines[-1] == "nothing was changed"
    assert "of which no checkpoint needs 1 chunk" in ran.lines[0]
    assert len(ran.lines) == 2
    assert files() == before


def test_gc_names_a_save_under_way_and_says_what_to_do(cli: Cli, store: ckptstore.Store) -> None:
    store.run("lstm").delete(100)
    dead_session()
    ran = cli("gc", "ckpts")
    assert ran.status == 0
    assert ran.lines[1:] == [
        r"under way: the save of lstm@400 by process 12 on nodé\x1b[1m, since 2026-01-02T03:04:05Z",
        "nothing was deleted yet: these saves may need what no checkpoint does. Collect again when they have ended, or "
        "--wait.",
    ]


def test_gc_names_the_saves_that_it_fenced(cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dead_session()
    monkeypatch.setattr(performing, "store_time", lambda objects: store_time(objects) + 60)
    said = r"the save of lstm@400 by process 12 on nodé\x1b[1m, since 2026-01-02T03:04:05Z"
    because = "which gave no sign of life for too long"
    assert cli("gc", "ckpts", "--grace", "30", "--dry-run").lines[1] == f"would be fenced: {said}, {because}"
    assert cli("gc", "ckpts", "--grace", "30").lines[1:] == [
        f"fenced: {said}, {because}",
        "deleted 0 chunks (0 B)",
        "collect once more to delete what the fenced saves have left",
    ]
    assert list(Path("ckpts/sessions").iterdir()) == []


def test_wait_waits(cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.run("lstm").delete(100)
    dead_session()

    def until_it_ends(seconds: float) -> None:
        for path in Path("ckpts/sessions").iterdir():
            path.unlink()

    monkeypatch.setattr("ckptstore.performing.time.sleep", until_it_ends)
    assert "deleted 1 chunk" in cli("gc", "ckpts", "--wait").lines[-1]


def report(**changes: Any) -> CollectReport:
    given: dict[str, Any] = dict.fromkeys(CollectReport.__dataclass_fields__, 0)
    given |= {name: [] for name in ("waiting", "fenced", "leftovers", "unknown")}
    return CollectReport(**(given | {"dry_run": False} | changes))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"replaced": 2}, ["removed: 2 manifests of checkpoints that were saved again"]),
        ({"tombstones": 1}, ["removed: 1 trace of checkpoints that were deleted more than a week ago"]),
        ({"leftovers": ["a", "b"]}, ["removed: 2 unfinished files of writers that died"]),
        ({"leftovers": ["a"], "dry_run": True}, ["would be removed: 1 unfinished file of writers that died"]),
        (
            {"unknown": ["chunks/\x1b[31m\n"]},
            [r"unknown: chunks/\x1b[31m\n is none of the store's objects; it was left alone"],
        ),
        ({"unreadable": 1}, ["1 condemned list cannot be read: see ckptstore verify"]),
    ],
)
def test_gc_tells_of_all_else_that_it_found(
    cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], lines: list[str]
) -> None:
    monkeypatch.setattr(ckptstore.Store, "collect", lambda *_, **__: report(**changes))
    assert cli("gc", "ckpts").lines[1:-1] == lines


def test_gc_hands_its_options_on(cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def collect(self: ckptstore.Store, **options: Any) -> CollectReport:
        given.append(options)
        return report()

    monkeypatch.setattr(ckptstore.Store, "collect", collect)
    cli("gc", "ckpts")
    cli("gc", "ckpts", "--wait", "--grace", "5", "--alone", "--dry-run")
    assert given == [
        {"dry_run": False, "wait": False, "grace": 600.0, "alone": False},
        {"dry_run": True, "wait": True, "grace": 5.0, "alone": True},
    ]


def test_gc_gives_one_document(cli: Cli, store: ckptstore.Store, tmp_path: Path) -> None:
    store.run("lstm").delete(100)
    dead_session()
    Path("ckpts/chunks/notes").write_text("x")
    ran = cli("gc", "ckpts", "--json")
    document = ran.document
    assert (document.pop("chunk_bytes"), document.pop("garbage_bytes")) == (
        sum(path.stat().st_size for path in Path("ckpts/chunks").rglob("*.*")),
        max(path.stat().st_size for path in Path("ckpts/chunks").rglob("*.*")),
    )
    assert document == {
        "store": str(tmp_path / "ckpts"),
        "dry_run": False,
        "checkpoints": 3,
        "chunks": 4,
        "garbage": 1,
        "deleted": 0,
        "deleted_bytes": 0,
        "waiting": [{"run": "lstm", "step": 400, "host": "nodé\x1b[1m", "pid": 12, "opened": "2026-01-02T03:04:05Z"}],
        "fenced": [],
        "replaced": 0,
        "tombstones": 0,
        "leftovers": [],
        "unreadable": 0,
        "unknown": ["chunks/notes"],
    }


def test_gc_gives_the_saves_that_it_fenced_as_those_that_it_waits_for(
    cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = WaitingSave("lstm", 1, "host", 2, "2026-01-02T03:04:05Z")
    monkeypatch.setattr(ckptstore.Store, "collect", lambda *_, **__: report(fenced=[save], leftovers=["x"]))
    document = cli("gc", "ckpts", "--json").document
    told = {"run": "lstm", "step": 1, "host": "host", "pid": 2, "opened": "2026-01-02T03:04:05Z"}
    assert (document["fenced"], document["leftovers"]) == ([told], ["x"])


def test_gc_takes_the_default_store(cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_URL", "ckpts")
    assert cli("gc").lines[0].startswith("4 checkpoints;")


@pytest.mark.parametrize("target", ["ckpts/lstm", "ckpts/lstm@100"])
def test_gc_of_a_run_is_refused(cli: Cli, store: ckptstore.Store, target: str) -> None:
    ran = cli("gc", target)
    assert ran.status == 2
    assert ran.err == "error: gc collects a whole store, as runs share chunks. Leave out lstm.\n"


@pytest.mark.parametrize("grace", ["-1", "soon", "nan", "inf"])
def test_gc_refuses_a_grace_that_makes_no_sense(cli: Cli, store: ckptstore.Store, grace: str) -> None:
    before = files()
    assert cli("gc", "ckpts", f"--grace={grace}").status == 2
    assert files() == before


def test_gc_of_a_damaged_store_deletes_nothing_and_says_what_to_do(cli: Cli, store: ckptstore.Store) -> None:
    store.run("base").delete(0)
    [manifest] = Path("ckpts/runs/lstm").glob(f"{200:020d}.*")
    manifest.write_bytes(manifest.read_bytes()[:-1] + b"x")
    before = files()
    ran = cli("gc", "ckpts", "--json")
    assert ran.status == 1
    assert ran.document["error"]["type"] == "CorruptError"
    assert "Nothing was deleted" in ran.err
    assert "ckptstore rm STORE/lstm@200" in ran.err
    assert files() == before


def test_gc_of_no_store_is_not_found(cli: Cli) -> None:
    Path("empty").mkdir()
    assert cli("gc", "./empty").status == 3
    assert list(Path("empty").iterdir()) == []


def test_gc_on_a_network_file_system_asks_for_alone(
    cli: Cli, store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_file_system", lambda path: "nfs")
    ran = cli("gc", "ckpts")
    assert (ran.status, "ckptstore gc --alone" in ran.err) == (4, True)
    assert cli("gc", "ckpts", "--alone").status == 0
    assert cli("gc", "ckpts", "--dry-run").status == 0


# ---- prune


def test_prune_shows_what_is_kept_and_why_and_what_was_deleted(cli: Cli, store: ckptstore.Store) -> None:
    ran = cli("prune", "ckpts/lstm", "--keep-last", "1", "--keep-best", "loss:max")
    assert (ran.status, ran.err) == (0, "")
    assert [re.split(r" {2,}", line.strip()) for line in ran.lines[:4]] == [
        ["RUN", "STEP", "WHY"],
        ["lstm", "100", "kept", "best loss (max)"],
        ["lstm", "200", "deleted", "no rule keeps it"],
        ["lstm", "300", "kept", "newest, last 1"],
    ]
    assert ran.lines[4:6] == ["", "2 checkpoints kept, 1 deleted"]
    assert re.fullmatch(r"the next ckptstore gc frees up to \d+ B, less what other runs need", ran.lines[6])
    assert store.run("lstm").steps() == [100, 300]


def test_a_dry_run_of_prune_changes_nothing(cli: Cli, store: ckptstore.Store) -> None:
    before = files()
    ran = cli("prune", "ckpts/lstm", "--keep-last", "1", "--dry-run")
    assert "would go" in ran.lines[1]
    assert ran.lines[5] == "1 checkpoint kept, 2 would go"
    assert ran.lines[6].startswith("the next ckptstore gc would free up to ")
    assert files() == before
    assert store.run("lstm").steps() == [100, 200, 300]


def test_prune_that_removes_nothing_promises_no_bytes(cli: Cli, store: ckptstore.Store) -> None:
    assert cli("prune", "ckpts/lstm", "--keep-last", "9").lines[-1] == "3 checkpoints kept, 0 deleted"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--keep-last", "2"], [200, 300]),
        (["--keep-every", "250"], [100, 300]),
        (["--keep-within", "12h"], [100, 200, 300]),
        (["--keep-best", "loss", "--keep-best", "loss:max"], [100, 300]),
        (["--keep-tag", "good"], [200, 300]),
        (["--keep-tag", "good", "--keep-tag", "other"], [200, 300]),
        (["--keep-last", "1", "--keep-every", "250"], [100, 200, 300]),
    ],
)
def test_each_option_of_prune_is_its_rule(cli: Cli, store: ckptstore.Store, words: list[str], kept: list[int]) -> None:
    store.run("lstm").tag(200, "good")
    document = cli("prune", "ckpts/lstm", *words, "--json").document
    expected = sorted({*kept, 200})
    assert [row["step"] for row in document["kept"]] == expected == store.run("lstm").steps()


def test_prune_gives_one_document(cli: Cli, store: ckptstore.Store, tmp_path: Path) -> None:
    document = cli("prune", "ckpts", "--all", "--keep-last", "2", "--dry-run", "--json").document
    assert document.pop("freed_bytes") > 400
    assert document == {
        "store": str(tmp_path / "ckpts"),
        "dry_run": True,
        "kept": [
            {"run": "base", "step": 0, "reasons": ["newest", "last 2"]},
            {"run": "lstm", "step": 200, "reasons": ["last 2"]},
            {"run": "lstm", "step": 300, "reasons": ["newest", "last 2"]},
        ],
        "removed": [{"run": "lstm", "step": 100}],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpts", "--keep-last", "1"], "prune takes a run, STORE/RUN, or --all for every run of a store. "),
        (["ckpts/lstm", "--all", "--keep-last", "1"], "Leave out one of them."),
        (["ckpts/lstm@100", "--keep-last", "1"], "prune takes a store or a whole run, not one step"),
        (["ckpts/lstm"], "a prune needs at least one rule that says what to keep"),
        (["ckpts/lstm", "--keep-last", "0"], "--keep-last"),
        (["ckpts/lstm", "--keep-every", "0"], "--keep-every"),
        (["ckpts/lstm", "--keep-last", "two"], "--keep-last"),
        (["ckpts/lstm", "--keep-within", "soon"], "keep_within must be a length of time"),
        (["ckpts/lstm", "--keep-best", "loss:least"], "keep_best must be METRIC, METRIC:min or METRIC:max"),
        (["ckpts/lstm", "--keep-best", "lss"], "no checkpoint has a metric 'lss' that is a number, so nothing was"),
        (["ckpts/lstm", "--keep-best", "lss", "--keep-last", "1"], "There are: loss."),
        (["ckpts", "--all", "--keep-best", "loss"], "There are no metrics."),
        (["ckpts/lstm", "--keep-tag", "a b"], "cannot be a tag"),
    ],
)
def test_prune_refuses_what_makes_no_sense_and_deletes_nothing(
    cli: Cli, store: ckptstore.Store, words: list[str], message: str
) -> None:
    before = files()
    ran = cli("prune", *words)
    assert ran.status == 2
    assert message in ran.err
    assert (files(), store.run("lstm").steps()) == (before, [100, 200, 300])


def test_prune_of_no_such_run_is_not_found(cli: Cli, store: ckptstore.Store) -> None:
    ran = cli("prune", "ckpts/lstn", "--keep-last", "1")
    assert (ran.status, "there is no run 'lstn' with a checkpoint" in ran.err) == (3, True)


# ---- tag


def test_tag_gives_a_tag_and_shows_those_there_are(cli: Cli, store: ckptstore.Store) -> None:
    ran = cli("tag", "ckpts/lstm@200", "release")
    assert (ran.status, ran.out, ran.err) == (0, "lstm@200 has the tags release\n", "")
    assert cli("tag", "ckpts/lstm@200", "best").out == "lstm@200 has the tags best, release\n"
    assert cli("tag", "ckpts/lstm@200", "best").out == "lstm@200 has the tags best, release\n"
    assert store.run("lstm").tags() == {200: ("best", "release")}


def test_tag_takes_a_tag_away(cli: Cli, store: ckptstore.Store) -> None:
    store.run("lstm").tag(200, "release")
    assert cli("tag", "ckpts/lstm@200", "other", "--remove").out == "lstm@200 has the tags release\n"
    assert cli("tag", "ckpts/lstm@200", "release", "--remove").out == "lstm@200 has no tags\n"
    assert store.run("lstm").tags() == {}


def test_tag_gives_one_document(cli: Cli, store: ckptstore.Store, tmp_path: Path) -> None:
    expected = {"store": str(tmp_path / "ckpts"), "run": "lstm", "step": 200, "tags": ["release"]}
    assert cli("tag", "ckpts/lstm@200", "release", "--json").document == expected
    assert cli("tag", "ckpts/lstm@200", "release", "--remove", "--json").document == expected | {"tags": []}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["ckpts", "release"], 2, "is a whole store. Name a run in it"),
        (["ckpts/lstm", "release"], 2, "lstm is a whole run: name the checkpoint to tag, as in lstm@300"),
        (["ckpts/lstm@200", "two words"], 2, "'two words' cannot be a tag"),
        (["ckpts/lstm@200", "../../up"], 2, "cannot be a tag"),
        (["ckpts/lstm@200", "../../up", "--remove"], 2, "cannot be a tag"),
        (["ckpts/lstm@200"], 2, "TAG"),
        (["ckpts/lstm@201", "release"], 3, "run 'lstm' has no checkpoint at step 201; it has steps 100, 200, 300"),
        (["ckpts/lstn@200", "release"], 3, "there is no run 'lstn'"),
        (["elsewhere/lstm@200", "release"], 3, "is not a ckptstore store"),
    ],
)
def test_tag_refuses_what_makes_no_sense(
    cli: Cli, store: ckptstore.Store, words: list[str], status: int, message: str
) -> None:
    before = files()
    ran = cli("tag", *words)
    assert (ran.status, message in ran.err) == (status, True)
    assert files() == before
