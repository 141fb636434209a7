"""A store is data from others: whatever stands in it, only documented errors come out, in bounded time and memory.

5,000 inputs in a process of their own, which follow from one seed; `make fuzz` reads more. The rest of the tests shows
that what must not be would be seen.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from ckptstore.errors import CheckpointError, CorruptError
from ckptstore.testing.wrappers import Call
from tests.fuzz import mutating, running, targets, watching
from tests.fuzz.watching import watch

INPUTS = 5000
ROOT = Path(__file__).parents[2]


def test_thousands_of_hostile_inputs_lead_to_documented_errors_and_to_nothing_else(tmp_path: Path) -> None:
    options = ["--inputs", str(INPUTS), "--seed", "1", "--json", "--saved", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["escapes"] == []
    # A few are left out: those that rightly take the memory that they ask for.
    assert INPUTS * 0.98 < report["inputs"] <= INPUTS
    # Of each kind some are taken and some refused; else all would fail at the first check, or change nothing.
    for kind in (*targets.KINDS, running.GENERATED):
        assert report["outcomes"][kind]["read"] >= 5, kind
        assert report["outcomes"][kind]["CorruptError"] >= 5, kind


# ---- the inputs


@pytest.mark.parametrize("kind", targets.KINDS)
def test_an_input_follows_from_its_seed(kind: str) -> None:
    made = [targets.KINDS[kind].make(Random(f"{kind}/{number}")) for number in (1, 1, 2, 3)]
    assert made[0] == made[1]
    assert made[1] != made[2] or made[2] != made[3]


def test_inputs_follow_from_their_seed_in_another_process_too() -> None:
    program = (
        "from random import Random; from blake3 import blake3; from tests.fuzz.targets import KINDS;"
        "made = [kind.make(Random(f'{number}')) for kind in KINDS.values() for number in range(5)];"
        "print(blake3(repr(made).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_an_input_that_was_saved_is_read_again(tmp_path: Path) -> None:
    parts = dict(targets.valid_chunks()[0])
    running.save(tmp_path / "sound.json", "chunk", parts)
    running.save(tmp_path / "cut.json", "chunk", parts | {"content": parts["content"][:-1]})
    assert running.replay(tmp_path / "sound.json").outcome == "read"
    assert running.replay(tmp_path / "cut.json").outcome == "CorruptError"


@pytest.mark.parametrize("parts", targets.valid_chunks(), ids=lambda parts: f"{len(parts['content'])}")
def test_the_checksum_that_is_made_to_fit_is_that_of_a_sound_chunk(parts: dict[str, bytes]) -> None:
    content = parts["content"]
    assert mutating.resealed_chunk(content[:24] + bytes(16) + content[40:]) == content


# ---- what would be seen


def test_documented_errors_are_outcomes_and_others_are_escapes() -> None:
    def fails(error: BaseException) -> Any:
        def act() -> None:
            raise error

        return watch(act, size=10)

    assert fails(CorruptError("x")).outcome == "CorruptError"
    assert fails(CorruptError("x")).escapes == []
    for error in (KeyError("x"), RecursionError("x"), MemoryError("x"), SystemExit(1), CheckpointError("of no kind")):
        assert fails(error).escapes
    assert fails(CorruptError("x" * 100_000)).escapes == ["an error whose text has 100000 characters"]


def test_memory_beyond_what_the_input_takes_is_an_escape() -> None:
    def act() -> None:
        np.ones(watching.FREE_BYTES + 2**20, np.uint8)

    [escape] = watch(act, size=10).escapes
    assert escape.startswith("took ") and "for 10" in escape
    assert not watch(act, size=10, claimed_bytes=2**20).escapes
    assert not watch(act, size=2**13).escapes


def test_time_beyond_the_bound_is_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.5, 0.0, 1.5, 0.0, 2.5])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    assert watch(lambda: None, size=10).escapes == ["took 2.5 s"]
    assert watch(lambda: None, size=10).escapes == []
    assert watch(lambda: None, size=10, claimed_bytes=50_000_000).escapes == []


def test_what_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "HANG_SECONDS", 0.05)

    def act() -> None:
        while True:
            pass

    assert watch(act, size=10).outcome == "Hang"


@pytest.mark.parametrize(
    "act",
    [
        lambda: exec("1"),
        lambda: compile("1", "x", "eval"),
        lambda: subprocess.run(["true"], check=True),
        lambda: Path(__file__).read_bytes(),
        lambda: Path("/nowhere").unlink(),
        lambda: __import__("this_is_no_module"),
    ],
    ids=["exec", "compile", "subprocess", "open", "remove", "import"],
)
def test_code_that_is_run_and_files_that_are_touched_are_escapes(act: Any) -> None:
    assert any(escape.startswith("did ") for escape in watch(act, size=10).escapes)


def test_files_in_the_folder_that_was_given_may_be_touched_and_no_others_beside_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert not watch(lambda: (tmp_path / "in" / "file").write_bytes(b"x"), size=9, folder=str(tmp_path / "in")).escapes
    for name in ("inside", "in/../out"):
        found = watch(lambda name=name: (tmp_path / name).write_bytes(b"x"), size=9, folder=str(tmp_path / "in"))  # type: ignore[misc]
        assert found.escapes


@pytest.mark.parametrize(
    ("operation", "key", "is_ours"),
    [
        ("get", "ckptstore.json", True),
        ("get", f"chunks/aa/{'a' * 64}.{'b' * 32}", True),
        ("get", f"chunks/ab/{'a' * 64}.{'b' * 32}", False),
        ("get", f"runs/lstm/{3:020}.{'b' * 32}.json", True),
        ("get", f"runs/../{3:020}.{'b' * 32}.json", False),
        ("get", "../other/ckptstore.json", False),
        ("get", "sessions/somebody's.txt", True),
        ("get", "sessions/another's.txt", False),
        ("put", f"condemned/{'c' * 32}.json", True),
        ("delete", "condemned/", False),
        ("list", "runs/lstm/", True),
        ("list", "", False),
        ("list", "runs/../", False),
        ("list", "tags/lstm/", True),
        ("list", "tags/../", False),
        ("delete", f"tags/lstm/{3:020}/best.json", True),
        ("delete", f"tags/lstm/{3:020}/../best.json", False),
        ("list", "chunks/aa/", True),
        ("sync", f"ckptstore.json chunks/aa/{'a' * 64}.{'b' * 32}", True),
        ("sync", "ckptstore.json /etc", False),
    ],
)
def test_keys_that_are_none_of_the_stores_are_escapes(operation: str, key: str, is_ours: bool) -> None:
    listed = frozenset({"sessions/somebody's.txt"})
    found = watch(lambda: None, size=9, calls=lambda: [Call(operation, key)], listed=listed)
    assert bool(found.escapes) != is_ours


def test_what_a_command_writes_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def saying(text: str, status: int = 0, *words: str) -> Any:
        def main(given: list[str]) -> int:
            print(text)
            return status

        monkeypatch.setattr(targets, "main", main)
        return targets._command("show", *words)(None, Path())  # type: ignore[arg-type]

    assert saying("sound, é") is None
    assert "ended with 70" in saying("{}", 70)
    assert "wrote ['\\x1b']" in saying("\x1b[2J")
    assert saying("{}", 1, "--json") is None
    with pytest.raises(ValueError, match="NaN in JSON"):
        saying("NaN", 0, "--json")
