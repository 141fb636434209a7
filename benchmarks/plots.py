"""Plots of what was measured, as SVG, drawn by Matplotlib from the reports: `python -m benchmarks … --svg FOLDER`.

One plot a question, of those that have one. Text stays text, and its colours follow the reader's: each plot brings its
own background, light or dark, so that it can be read on any page.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MISSING = (
    "--svg needs Matplotlib, which is not installed here: pip install 'ckptstore[bench]', or pip install matplotlib"
)
TITLES = {
    "save": "A durable save of an LSTM with Adam, 115 MB, to a local disk",
    "restore": "A restore of the same in a fresh process, files in the page cache",
    "series": "Ten checkpoints, 50 steps apart",
    "series-close": "Ten checkpoints, 10 steps apart",
    "bucket-save": "A save of the same to a bucket on this machine (SeaweedFS)",
    "bucket-restore": "A restore of the same from there, in a fresh process",
}
# Colours that no plot has otherwise: put in place of them, in the file, are those of the reader's scheme.
INK, FAINT, PAPER = "#010203", "#040506", "#070809"
LIGHT = {INK: "#1f2328", FAINT: "#afb8c1", PAPER: "#ffffff"}
DARK = {INK: "#e6edf3", FAINT: "#484f58", PAPER: "#0d1117"}
OURS, THEIRS = "#2f81f7", "#8b949e"
"""Both are told apart from either paper."""
FONTS = ["DejaVu Sans", "Arial", "sans-serif"]


def available() -> bool:
    """Whether there is anything to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write(reports: Mapping[str, Mapping[str, Any]], folder: Path, caption: str) -> list[Path]:
    """Draw those of the reports (by name, as `--json` writes them) that have a plot; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, title in TITLES.items():
        if name in reports:
            draw = _series if name.startswith("series") else _times
            content = draw(title, reports[name]["rows"], caption)
            written.append(folder / f"{name}.svg")
            written[-1].write_text(content)
    return written


def _times(title: str, rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """Median seconds of each variant, with all rounds as dots, the fastest on top."""
    timed = sorted((row for row in rows if "median" in row), key=lambda row: -row["median"])

    def draw(axes: Any) -> None:
        places = range(len(timed))
        axes.barh(places, [row["median"] for row in timed], height=0.62, color=[_colour(row["name"]) for row in timed])
        for place, row in zip(places, timed, strict=True):
            axes.plot(row["seconds"], [place] * len(row["seconds"]), "o", ms=3, mfc="none", mec=INK, mew=0.7)
            label = f"{row['median']:.3f} s" + (f", {row['speed']:.2f} x" if row.get("speed", 1.0) != 1.0 else "")
            axes.annotate(
                label, (max(row["seconds"]), place), (6, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(list(places), [row["name"] for row in timed])
        axes.set_xlim(0, 1.28 * max(max(row["seconds"]) for row in timed))
        axes.set_xlabel("seconds, median; each circle is a round; x: speed beside the base, in the same rounds")

    return _svg(title, caption, draw, height=1.5 + 0.36 * len(timed))


def _series(title: str, rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """What part of the raw bytes each way stores."""
    stored = sorted((row for row in rows if "stored" in row), key=lambda row: -row["stored"])

    def draw(axes: Any) -> None:
        places = range(len(stored))
        axes.barh(
            places, [row["stored"] for row in stored], height=0.62, color=[_colour(row["name"]) for row in stored]
        )
        for place, row in zip(places, stored, strict=True):
            label = f"{row['stored']:.3f}" + (f", saves in {row['save']:.2f} s" if "save" in row else "")
            axes.annotate(label, (row["stored"], place), (6, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(list(places), [row["name"] for row in stored])
        axes.set_xlim(0, 1.35)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("bytes stored / bytes in memory; median seconds of a save, from the second on")

    return _svg(title, caption, draw, height=1.5 + 0.36 * len(stored))


def _colour(name: str) -> str:
    ours = name.startswith(("ckptstore", "none", "fast", "small"))
    return OURS if ours else THEIRS


def _svg(title: str, caption: str, draw: Any, height: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {  # matplotlib's names are literals to mypy
        "svg.fonttype": "none",  # text that can be searched, and small files
        "svg.hashsalt": "ckptstore",  # the same file for the same figures
        "font.family": "sans-serif",
        "font.sans-serif": FONTS,
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style), io.StringIO() as content:
        figure = Figure(figsize=(8.6, height), layout="constrained", facecolor=PAPER)
        axes = figure.add_subplot(facecolor=PAPER)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(caption, fontsize=7)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": "python -m benchmarks --svg"})
        return _in_the_readers_colours(content.getvalue())


def _in_the_readers_colours(svg: str) -> str:
    """Put classes in place of the three colours that depend on the reader's scheme."""
    names = {INK: "ink", FAINT: "faint", PAPER: "paper"}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name},{LIGHT[colour]})")

    def rules(scheme: Mapping[str, str]) -> str:
        return ":root{" + "".join(f"--{names[colour]}:{value};" for colour, value in scheme.items()) + "}"

    style = f"<style>{rules(LIGHT)}@media(prefers-color-scheme:dark){{{rules(DARK)}}}</style>"
    before, head, after = svg.partition("<defs>")
    return f"{before}{style}\n {head}{after}"
