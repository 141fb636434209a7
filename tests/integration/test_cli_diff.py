"""`ckptstore diff`: which two checkpoints are meant, and what is printed of them."""

import re
from pathlib import Path

import pytest
import torch

import ckptstore
from tests.integration.test_cli import Cli, cli

__all__ = ["cli"]


@pytest.fixture
def ckpts(cli: Cli) -> str:
    """A store in the current folder: a run of three steps, and another."""
    store = ckptstore.Store("ckpts")
    model, head = torch.ones(1000, 10), torch.zeros(10)
    for step in (1, 2, 3):
        store.run("lstm").save({"model": model, "head": head, "step": step}, step=step, metrics={"loss": 1 / step})
        model = model.clone()
        model[step] += 0.5
    head = torch.full((10,), float("nan"))
    store.run("tuned").save({"model": model, "head": head, "step": 3}, step=3)
    return "./ckpts"


def test_one_target_is_compared_with_the_checkpoint_before_it(cli: Cli, ckpts: str) -> None:
    assert cli("diff", f"{ckpts}/lstm").out.startswith("lstm@2 → lstm@3: only model moved; 1 value changed; ")
    assert cli("diff", f"{ckpts}/lstm@2").out.startswith("lstm@1 → lstm@2: ")


def test_the_first_checkpoint_has_none_before_it(cli: Cli, ckpts: str) -> None:
    done = cli("diff", f"{ckpts}/lstm@1")
    assert (done.status, done.out) == (3, "")
    assert "no checkpoint before lstm@1" in done.err


def test_a_step_alone_is_one_of_the_same_run(cli: Cli, ckpts: str) -> None:
    assert cli("diff", f"{ckpts}/lstm@1", "@3").out.startswith("lstm@1 → lstm@3: ")


def test_the_other_may_be_of_another_run_or_store(cli: Cli, ckpts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("diff", f"{ckpts}/lstm", f"{ckpts}/tuned").out.startswith("lstm@3 → tuned@3: ")
    monkeypatch.setenv("CKPTSTORE_URL", "ckpts")
    ckptstore.Store("others").run("copy").save({"model": torch.ones(1000, 10)}, step=7)
    assert cli("diff", "lstm@1", "./others/copy").out.startswith("lstm@1 → copy@7: no tensor moved, of 1; 2 removed; ")


def test_figures_stand_in_a_table_and_changes_below(cli: Cli, ckpts: str) -> None:
    lines = cli("diff", f"{ckpts}/lstm@1", f"{ckpts}/tuned").out.splitlines()
    assert "NaN or infinity is new in head" in lines[0]
    assert re.fullmatch(r"TENSOR +TYPE +BYTES +CHANGED +REL L2 +MAX +COSINE", lines[2])
    assert re.fullmatch(r"head +float32 \[10\], 10 new NaN +40 B +100.0 % +0 +0 +1.0000", lines[3])
    assert re.fullmatch(r"model +float32 \[1000, 10\] +40.0 kB +0.3 % +0.0274 +0.5 +0.\d+", lines[4])
    assert lines[6:] == [
        "* step  1 → 3",
        "",
        "- metrics.loss  1",
        "",
        "0 tensors did not move. 0 B of 40.0 kB are shared; " + lines[-1].partition("shared; ")[2],
    ]


def test_only_the_farthest_are_shown_on_demand(cli: Cli, ckpts: str) -> None:
    out = cli("diff", f"{ckpts}/lstm@1", f"{ckpts}/tuned", "--top", "1").out
    assert "and 1 tensor more that moved" in out
    assert not re.search("^model ", out, re.MULTILINE)


def test_digests_alone_give_bounds(cli: Cli, ckpts: str) -> None:
    out = cli("diff", f"{ckpts}/lstm", "--read", "nothing").out
    assert "all 2 tensors may have moved" in out
    assert "≤ 100.0 %" in out
    assert "0 B were read" in out


def test_json_has_the_figures_in_full(cli: Cli, ckpts: str) -> None:
    found = cli("diff", f"{ckpts}/lstm@1", "@3", "--json", "--tensors", "mod*").document
    assert found["before"] == {"run": "lstm", "step": 1}
    (tensor,) = found["tensors"]
    assert (tensor["path"], tensor["changed"], tensor["largest"], tensor["is_whole"]) == ("model", 0.002, 0.5, True)
    assert found["changes"] == [{"path": "step", "kind": "value", "before": 1, "after": 3}]


def test_a_word_that_means_nothing_is_a_usage_error(cli: Cli, ckpts: str) -> None:
    done = cli("diff", f"{ckpts}/lstm", "--read", "some")
    assert done.status == 2
    assert "nothing, changed, all" in done.err


def test_damage_is_status_one_and_named(cli: Cli, ckpts: str) -> None:
    for chunk in Path("ckpts/chunks").rglob("*"):
        if chunk.is_file():
            chunk.chmod(0o600)
            chunk.write_bytes(b"x")
    done = cli("diff", f"{ckpts}/lstm")
    assert done.status == 1
    assert "step 2 of run 'lstm': model, head: the chunk chunks/" in done.err


def test_a_run_alone_is_looked_for_in_the_store_that_was_named_before(cli: Cli, ckpts: str) -> None:
    assert cli("diff", f"{ckpts}/lstm", "tuned@3").out.startswith("lstm@3 → tuned@3: ")
    assert cli("diff", f"{ckpts}/lstm", "none@3").status == 3
