"""Every public name, and every public method of what users touch, stands in the reference."""

from pathlib import Path

import pytest

import ckptstore

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
VARIABLES = {
    "store": ckptstore.Store,
    "run": ckptstore.Run,
    "checkpoint": ckptstore.Checkpoint,
    "pending": ckptstore.PendingSave,
}
MEMBERS = [(variable, name) for variable, cls in VARIABLES.items() for name in vars(cls) if not name.startswith("_")]


@pytest.mark.parametrize("name", ckptstore.__all__)
def test_every_public_name_is_described(name: str) -> None:
    assert name in REFERENCE


@pytest.mark.parametrize(("variable", "name"), MEMBERS)
def test_every_public_member_is_described(variable: str, name: str) -> None:
    assert f"`{variable}.{name}" in REFERENCE or f"`{name}`" in REFERENCE
