"""What stores, runs, checkpoints and comparisons show in a notebook, and a run as a table of pandas."""

import html.parser
import sys
from pathlib import Path

import pytest
import torch

import ckptstore
from ckptstore.errors import InvalidInputError

HOSTILE = "</td><script>alert(1)</script>\u202e\x1b[31m\"'&"


class Tags(html.parser.HTMLParser):
    """The tags of a text, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[object] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += f"{data}|"


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    store = ckptstore.Store(tmp_path / "ckpts")
    for step in (100, 200):
        state = {"w": torch.full((300, 300), float(step)), "bias": torch.ones(3), "step": step}
        store.run("lstm").save(state, step=step, metrics={"loss": 50 / step}, metadata={"git": "abc"})
    return store


def test_a_store_shows_its_runs_and_what_they_cost(store: ckptstore.Store) -> None:
    text = Tags(store._repr_html_()).text
    assert store.url in text
    assert "|lstm|2|720 kB|" in text


def test_a_run_shows_its_checkpoints_with_their_metrics(store: ckptstore.Store) -> None:
    text = Tags(store.run("lstm")._repr_html_()).text
    assert "|step|saved (UTC)|loss|in memory|stored|new|" in text
    assert text.index("|100|") < text.index("|200|")
    assert "|0.25|" in text


def test_a_checkpoint_shows_its_tensors_the_largest_first(store: ckptstore.Store) -> None:
    text = Tags(store.run("lstm").checkpoint(200)._repr_html_()).text
    assert "|w|float32|[300, 300]|360 kB|bias|float32|[3]|12 B|" in text
    assert "|git|abc|" in text


def test_a_comparison_shows_what_moved_and_what_else_changed(store: ckptstore.Store) -> None:
    text = Tags(store.diff("lstm@100", "lstm@200")._repr_html_()).text
    assert "only w moved" in text
    assert "|w|100.00%|1|100|1|360 kB|" in text
    assert "|step|value|100|200|metrics.loss|value|0.5|0.25|" in text


def test_a_place_without_a_store_says_so(tmp_path: Path) -> None:
    assert "nothing was ever saved there" in ckptstore.Store(tmp_path / "none")._repr_html_()
    assert "0 checkpoints" in ckptstore.Store(tmp_path / "none").run("lstm")._repr_html_()


def test_damaged_checkpoints_are_counted_and_the_others_shown(store: ckptstore.Store, tmp_path: Path) -> None:
    newest = max((tmp_path / "ckpts/runs/lstm").iterdir())
    newest.chmod(0o600)
    newest.write_bytes(newest.read_bytes()[:-2] + b"x\n")
    text = Tags(store.run("lstm")._repr_html_()).text
    assert "1 of them damaged" in text
    assert "|100|" in text


def test_only_the_newest_of_very_many_are_shown(tmp_path: Path) -> None:
    run = ckptstore.Store(tmp_path / "ckpts").run("many")
    for step in range(103):
        run.save({"step": step}, step=step)
    text = Tags(run._repr_html_()).text
    assert "103 checkpoints, the newest 100 are shown" in text
    assert "|3|" in text
    assert "|2|2" not in text


def test_nothing_in_a_store_becomes_markup(tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path / HOSTILE.replace("/", "_").replace("\x1b", ""))
    run = store.run("evil")
    for step in (1, 2):
        state = {HOSTILE: torch.full((5,), float(step)), "text": f"{HOSTILE}{step}"}
        run.save(state, step=step, metrics={HOSTILE: f"{HOSTILE}{step}"}, metadata={HOSTILE: HOSTILE})
    for shown in (store, run, run.latest(), store.diff("evil@1", "evil@2")):
        assert shown is not None
        text = shown._repr_html_()
        found = Tags(text)
        assert found.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
        assert not found.attributes
        assert not set(text) & {"\u202e", "\x1b"}
    assert "\\u202e" in run._repr_html_()


def test_a_run_is_a_table_of_pandas(store: ckptstore.Store) -> None:
    store.run("lstm").save({"a": 1}, step=300, metrics={"accuracy": 0.5, "raw_bytes": 7})
    table = store.run("lstm").to_dataframe()
    assert table.index.tolist() == [100, 200, 300]
    assert table.index.name == "step"
    assert table.columns.tolist() == [
        *("created", "loss", "accuracy", "metrics.raw_bytes", "raw_bytes", "stored_bytes", "new_bytes"),
    ]
    assert table.loc[200, "loss"] == 0.25
    assert table["loss"].isna().tolist() == [False, False, True]
    assert table["raw_bytes"].tolist() == [360_012, 360_012, 0]
    assert table["created"].dt.tz is not None


def test_without_pandas_the_error_says_what_to_install(store: ckptstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InvalidInputError, match="pip install pandas"):
        store.run("lstm").to_dataframe()
