"""The hand-written pages of the reference leave out no command, option, error, variable or extra."""

import re
import tomllib
from pathlib import Path

import pytest
import typer.main

from ckptstore import cli, errors

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
CLASSES = [name for name in errors.__all__ if issubclass(getattr(errors, name), errors.CheckpointError)]


def page(name: str) -> str:
    return (REFERENCE / name).read_text("utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_section_of_its_command(name: str) -> None:
    section = re.split(rf"^## {name}$", page("cli.md"), flags=re.MULTILINE)[1].split("\n## ")[0]
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")}
    assert not {option for option in options - {"--help"} if not re.search(rf"{option}(?![\w-])", section)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_stands_with_its_exit_status(name: str) -> None:
    row = re.search(rf"^\| `{name}` \|.*\| (\d+) \|$", page("errors.md"), re.MULTILINE)
    assert row
    assert int(row[1]) == cli._status(getattr(errors, name)("text"))


def test_the_statuses_are_those_that_the_program_names() -> None:
    table = page("errors.md").split("## Exit status")[1].split("\n## ")[0]
    statuses = {
        cli.OK,
        cli.DAMAGED,
        cli.USAGE,
        cli.NOT_FOUND,
        cli.UNAVAILABLE,
        cli.BUG,
        cli.INTERRUPTED,
        cli.PIPE_CLOSED,
    }
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == statuses


def test_every_variable_is_described() -> None:
    sources = " ".join(path.read_text("utf-8") for path in (ROOT / "ckptstore").rglob("*.py"))
    variables = set(re.findall(r'"(CKPTSTORE_[A-Z_0-9]+)"', sources))
    assert "CKPTSTORE_URL" in variables
    assert not {name for name in variables if f"| `{name}` |" not in page("configuration.md")}


def test_every_extra_is_described() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    table = page("configuration.md").split("## Extras")[1]
    assert not {name for name in project["optional-dependencies"] if f"`{name}`" not in table}
