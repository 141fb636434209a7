"""Every document stands on its own: its Python blocks run in order, and the commands it shows exist.

A block that cannot run here (it needs a bucket, say) is left out by `<!--- skip: next -->` before it.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.exists() and "generated" not in path.relative_to(ROOT).parts  # what make docs has made of these
]
SHELL_BLOCK = re.compile(r"^```(console|bash|sh|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {
    ("ckptstore",): [sys.executable, "-m", "ckptstore"],
    ("python", "-m", "ckptstore"): [sys.executable, "-m", "ckptstore"],
    ("python", "-m", "trainer"): [sys.executable, "-m", "trainer"],
}

NEEDS = {f"save-from-{library}.md": library for library in ("accelerate", "lightning", "transformers")}
NEEDS["keras-and-tensorflow.md"] = "tensorflow"
"""Pages whose code needs a library that .venv does not have; `make test-integrations` runs it."""
CAN_RUN = [
    pytest.param(path, marks=[pytest.mark.filterwarnings("default")] if path.name in NEEDS else [])
    for path in DOCUMENTS
    if path.name not in NEEDS or importlib.util.find_spec(NEEDS[path.name])
]

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", CAN_RUN, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CKPTSTORE_URL", raising=False)
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(path)
    for example in document.examples():
        example.evaluate()


@documents
def test_commands_exist(path: Path) -> None:
    problems = [
        f"line {line}: {problem}"
        for line, command in shell_commands(path.read_text(encoding="utf-8"))
        for problem in command_problems(command)
    ]
    assert not problems, f"{path.relative_to(ROOT)}: {'; '.join(problems)}"


def shell_commands(text: str) -> list[tuple[int, list[str]]]:
    """Return (line, words) of each simple command in the shell blocks: after `$ ` where a block shows output too."""
    commands: list[tuple[int, list[str]]] = []
    for block in SHELL_BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start(2)) + 1
        lines = block[2].split("\n")
        shows_output = any(line.startswith("$ ") for line in lines)
        pending, pending_line = "", 0
        for number, line in enumerate(lines, first_line):
            if not pending and shows_output and not line.startswith("$ "):
                continue
            pending_line = pending_line if pending else number
            pending += line if pending else line.removeprefix("$ ")
            if pending.endswith("\\"):
                pending = pending[:-1] + " "
                continue
            commands += [(pending_line, words) for words in simple_commands(pending)]
            pending = ""
    return commands


def simple_commands(line: str) -> list[list[str]]:
    """Split a line at pipes, `&&`, `||`, `;` and `&`; leave out comments and settings of variables before a command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch(r"[|&;()]+", word):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r"\w+=.*", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def command_problems(words: list[str]) -> list[str]:
    if words[0] == "make":
        return [
            f"make has no target {word}"
            for word in words[1:]
            if "=" not in word and not word.startswith("-") and word not in make_targets()
        ]
    for start, program in PROGRAMS.items():
        if tuple(words[: len(start)]) != start:
            continue
        arguments = words[len(start) :]
        subcommands = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        known = help_text(*program, *subcommands)
        if known is None:
            return [f"{' '.join(start)} has no command {arguments[0]}"]
        options = [word.split("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
        return [
            f"{' '.join([*start, *subcommands])} has no option {option}"
            for option in options
            if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known)
        ]
    return []


@cache
def help_text(*command: str) -> str | None:
    """Return what `command --help` prints, or None if it fails."""
    plain = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, env=plain, cwd=ROOT, check=False)
    return result.stdout if result.returncode == 0 else None


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


SAMPLE = """
```console
$ ckptstore ls ./ckpts --json
step  bytes
$ CKPTSTORE_URL=./ckpts python -m trainer train --steps 5 \\
    --save-every 2 | tail -n 1; make demo
```
```bash
make demos  # no such target
python -m trainer train --no-such-option && python -m trainer sing
```
"""


def test_this_test_can_see() -> None:
    commands = shell_commands(SAMPLE)
    assert [(line, " ".join(words)) for line, words in commands] == [
        (3, "ckptstore ls ./ckpts --json"),
        (5, "python -m trainer train --steps 5 --save-every 2"),
        (5, "tail -n 1"),
        (5, "make demo"),
        (9, "make demos"),
        (10, "python -m trainer train --no-such-option"),
        (10, "python -m trainer sing"),
    ]
    assert [command_problems(words) for _, words in commands[1:]] == [
        [],
        [],
        [],
        ["make has no target demos"],
        ["python -m trainer train has no option --no-such-option"],
        ["python -m trainer has no command sing"],
    ]
