"""What benchmarks make of what they have measured: rounds, the model of more cores, plots. Nothing is timed here."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import cores, half, plots
from benchmarks.timing import Report, Row, in_turn

CAPTION = "2 cores of a processor, 8 GiB, ext4, Linux 6, Python 3.11, torch 2.13"
MACHINE = {
    "cores": "2",
    "processor": "a processor",
    "memory": "8 GiB",
    "disk": "ext4",
    "system": "Linux 6",
    "python": "3.11",
    "torch": "2.13",
}


def timed(name: str, median: float, speed: float) -> dict[str, Any]:
    return {"name": name, "median": median, "seconds": [median, 2 * median], "speed": speed}


REPORTS: dict[str, Any] = {
    "save": {"rows": [timed("ckptstore", 0.25, 1.4), timed("torch.save + fsync", 0.36, 1.0)]},
    "series": {"rows": [{"name": "none", "stored": 1.0, "save": 0.3}, {"name": "small, compacted", "stored": 0.66}]},
    "resave": {"rows": [{"name": "has no plot"}]},
}


def test_every_report_that_has_a_plot_is_drawn_as_a_small_svg_that_names_its_machine(tmp_path: Path) -> None:
    written = plots.write(REPORTS, tmp_path / "plots", CAPTION)
    assert [file.name for file in written] == ["save.svg", "series.svg"]
    for file in written:
        texts = [element.text or "" for element in ElementTree.parse(file).iter() if element.tag.endswith("}text")]
        assert CAPTION in texts
        assert file.stat().st_size < 60_000
    assert "torch.save + fsync" in written[0].read_text()
    assert "0.660" in written[1].read_text()


def test_a_plot_takes_its_colours_from_the_readers_scheme(tmp_path: Path) -> None:
    content = plots.write(REPORTS, tmp_path, CAPTION)[0].read_text()
    assert "prefers-color-scheme:dark" in content
    for placeholder in (plots.INK, plots.FAINT, plots.PAPER):
        assert placeholder not in content
    for scheme in (plots.LIGHT, plots.DARK):
        assert all(colour in content for colour in scheme.values())


def test_the_same_figures_are_drawn_as_the_same_file(tmp_path: Path) -> None:
    first, second = (plots.write(REPORTS, tmp_path / name, CAPTION)[0].read_bytes() for name in "ab")
    assert first == second


def test_what_json_holds_is_drawn_later_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "figures.json").write_text(json.dumps({"machine": MACHINE, "reports": REPORTS}))
    arguments = ["--draw", str(tmp_path / "figures.json"), "--svg", str(tmp_path / "plots")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    monkeypatch.setattr(command, "measured", lambda options: pytest.fail("it measured"))
    assert command.main() == 0
    assert CAPTION in (tmp_path / "plots" / "save.svg").read_text()


def test_without_matplotlib_plots_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "stored", "--svg", "plots"])
    with pytest.raises(SystemExit):
        command.main()
    assert "pip install matplotlib" in capsys.readouterr().err


def test_one_round_alone_has_no_round_before_it_that_does_not_count() -> None:
    calls: list[int] = []

    def variant(number: int) -> tuple[float, float]:
        calls.append(number)
        return float(number), 0.0

    assert in_turn(1, {"any": variant}) == {"any": [(0.0, 0.0)]}
    assert in_turn(2, {"any": variant}) == {"any": [(0.0, 0.0), (1.0, 0.0)]}
    assert calls == [0, -1, 0, 1]


def test_the_model_divides_what_runs_side_by_side_and_stops_at_the_disk_and_at_memory() -> None:
    costs = cores.Costs(first=0.4, middle=0.8, serial=0.1, disk=0.2, memory=0.05)
    assert costs.on(1) == pytest.approx(0.1 + 0.4 + 0.8)
    assert costs.on(2) == pytest.approx(0.1 + 0.2 + 0.4)
    assert costs.on(16) == pytest.approx(0.1 + 0.025 + 0.2)
    assert cores.Costs(first=0.4, middle=0.8, serial=0.1, disk=0.0, memory=0.5).on(16) == pytest.approx(0.6)


def test_a_stage_that_the_model_does_not_know_counts_as_serial_and_that_of_the_disk_as_none() -> None:
    rows = [
        Row(name, "", {"seconds": seconds})
        for name, seconds in {
            "hash (find what is new)": 1.0,
            "encode: zstd": 2.0,
            "put: fsync": 4.0,
            "new": 8.0,
        }.items()
    ]
    costs = cores.costs_of(rows, cores.HASHED_FIRST, cores.ENCODING, disk=0.5, memory=0.0)
    assert (costs.first, costs.middle, costs.serial, costs.disk) == (1.0, 2.0, 8.0, 0.5)


def test_zipnn_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zipnn", None)
    assert half._zipnn(np.zeros(8, np.uint8)) is None
    assert "pip install zipnn" in half.HOW_TO_INSTALL


def test_every_question_that_is_asked_quickly_is_one_that_is_asked() -> None:
    assert set(command.QUICK) <= set(command.QUESTIONS)
    assert set(plots.TITLES) <= set(command.QUESTIONS)


def test_a_report_is_written_with_the_text_that_people_read() -> None:
    document = Report("what?", [Row("it", "1 s", {"median": 1.0})], "met").to_json()
    assert document == {"question": "what?", "rows": [{"name": "it", "text": "1 s", "median": 1.0}], "verdict": "met"}
