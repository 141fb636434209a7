"""Charts of a report as Vega-Lite specifications (https://vega.github.io/vega-lite/docs/): values alone, no code.

What comes from a store stands in the data, never in a field's name, a title or an expression.
"""

import math
from typing import Any

from ckptstore.report.facts import CheckpointFacts, Heat, RunFacts, StoreFacts

__all__ = ["Chart", "of_run", "of_store"]

MAX_METRICS = 48
Chart = dict[str, Any]
"""`title`, `spec`, and, of a heat map, `cells`, which the page makes rows of: rows would be most of its bytes."""
_ACCENT, _SECOND, _THIRD = "#3b7dd8", "#e0913a", "#4aa87a"
_FEW = 8
"""So many checkpoints are named one by one below an axis: its own marks would lie between them."""
_PARTS: dict[str, Any] = {"scheme": "blues", "domain": [0, 1]}
_BYTES = {"format": "~s", "titleAnchor": "end"}


def of_store(facts: StoreFacts) -> dict[str, Chart]:
    """The charts of a whole store, by name."""
    if not facts.runs:
        return {}
    charts = {"runs": _runs(facts)}
    if len(facts.runs) > 1:
        charts["sharing"] = _sharing(facts)
    return charts


def of_run(run: RunFacts) -> dict[str, Chart]:
    """The charts of a run, by name."""
    sound = run.sound
    charts: dict[str, Chart] = {}
    if not sound:
        return charts
    names = list(dict.fromkeys(name for each in sound for name in each.numbers))
    if names:
        charts["metrics"] = _metrics(sound, names)
    charts["bytes"] = _bytes(sound)
    if len(sound) > 1:
        charts["pace"] = _pace(sound)
    if run.heat is not None:
        charts["heat"] = _heat(run.heat)
    return charts


def _runs(facts: StoreFacts) -> Chart:
    rows: list[dict[str, Any]] = []
    for run in facts.runs:
        rows.append({"run": _group(run.name), "what": "its own", "bytes": run.stored_bytes - run.shared_bytes})
        rows.append({"run": _group(run.name), "what": "shared with other runs", "bytes": run.shared_bytes})
    return {
        "title": "Stored bytes of each run",
        "spec": _spec(
            rows,
            mark={"type": "bar", "cornerRadius": 2, "tooltip": True},
            height=24 * len(facts.runs),
            encoding={
                "y": {"field": "run", "type": "nominal", "title": None, "sort": "-x", "axis": {"labelLimit": 220}},
                "x": {"field": "bytes", "type": "quantitative", "title": "bytes", "axis": _BYTES},
                "color": _colors("what", ["its own", "shared with other runs"], [_ACCENT, _SECOND]),
                "tooltip": [_tip("run", "run"), _tip("what", "what"), _tip("bytes", "bytes", ",")],
            },
        ),
    }


def _sharing(facts: StoreFacts) -> Chart:
    names = [_group(run.name) for run in facts.runs]
    cells = {
        "columns": names,
        "rows": names,
        "values": [
            [round(facts.shared[i][j] / max(1, facts.runs[i].stored_bytes), 3) for j in range(len(names))]
            for i in range(len(names))
        ],
    }
    return {
        "title": "Part of a run's stored bytes that the other run has as well",
        "cells": cells,
        "spec": _matrix(
            names, names, "run", "also in", scale={"scheme": "blues", "domain": [0, 1]}, title="part", format_=".0%"
        ),
    }


def _metrics(sound: list[CheckpointFacts], names: list[str]) -> Chart:
    left_out, names = max(0, len(names) - MAX_METRICS), names[:MAX_METRICS]
    rows = [
        {"step": each.step, "metric": _group(name), "value": each.numbers[name]}
        for each in sound
        for name in names
        if name in each.numbers and math.isfinite(each.numbers[name])
    ]
    return {
        "title": f"Metrics; {left_out} more are in the table alone" if left_out else "Metrics",
        "spec": {
            **_spec(
                rows,
                mark={"type": "line", "point": len(sound) < 60, "interpolate": "monotone", "tooltip": True},
                encoding={
                    "x": _steps(sound),
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": None,
                        "scale": {"zero": False},
                        "axis": {"format": ".4~g"},
                    },
                    "tooltip": [_tip("metric", "metric"), _tip("step", "step", ","), _tip("value", "value", ".6~g")],
                },
                height=150,
                width=300,
            ),
            "facet": {
                "field": "metric",
                "type": "nominal",
                "title": None,
                "sort": list(map(_group, names)),
                "header": {"labelLimit": 280},
            },
            "columns": 2,
            "resolve": {"scale": {"y": "independent"}, "axis": {"x": "independent"}},
        },
    }


def _bytes(sound: list[CheckpointFacts]) -> Chart:
    kinds = [("in memory", "raw_bytes"), ("stored", "stored_bytes"), ("new", "new_bytes")]
    rows = [
        {"step": each.step, "what": what, "bytes": getattr(each, attribute)}
        for each in sound
        for what, attribute in kinds
    ]
    return {
        "title": "Bytes of each checkpoint: in memory, stored, and what its save had to upload",
        "spec": _spec(
            rows,
            mark={"type": "line", "point": len(sound) < 60, "tooltip": True},
            encoding={
                "x": _steps(sound),
                "y": {"field": "bytes", "type": "quantitative", "title": "bytes", "axis": _BYTES},
                "color": _colors("what", [what for what, _ in kinds], [_THIRD, _ACCENT, _SECOND]),
                "tooltip": [_tip("step", "step", ","), _tip("what", "what"), _tip("bytes", "bytes", ",")],
            },
        ),
    }


def _pace(sound: list[CheckpointFacts]) -> Chart:
    rows = [{"step": each.step, "seconds": each.seconds_since} for each in sound if each.seconds_since is not None]
    return {
        "title": "Seconds from the save before: gaps are stops",
        "spec": _spec(
            rows,
            mark={"type": "bar", "tooltip": True, "color": _ACCENT},
            encoding={
                "x": _steps(sound),
                "y": {"field": "seconds", "type": "quantitative", "title": "seconds", "axis": {"format": ",.3~g"}},
                "tooltip": [_tip("step", "step", ","), _tip("seconds", "seconds", ",.1f")],
            },
            height=120,
        ),
    }


def _heat(heat: Heat) -> Chart:
    known = [value for row in heat.values for value in row if value and math.isfinite(value)]
    if heat.is_drift:
        low = min(known, default=1e-6)
        scale: dict[str, Any] = {
            "scheme": "viridis",
            "type": "log",
            "domain": [low, max([*known, low * 10])],
            "clamp": True,
        }
        title, text = "relative L2", "How far each tensor moved from the checkpoint before (relative L2)"
    else:
        scale = _PARTS
        title, text = "part", "Part of each tensor in chunks that changed since the checkpoint before"
    if heat.left_out:
        text += f"; {heat.left_out} smaller tensors are left out"
    steps, names = list(map(str, heat.steps)), list(map(_group, heat.tensors))
    values = [[None if value is None else float(f"{value:.3g}") for value in row] for row in heat.values]
    if heat.is_drift:  # a logarithm has no place for what did not move
        values = [[value or None for value in row] for row in values]
    return {
        "title": text,
        "cells": {"columns": steps, "rows": names, "values": values},
        "spec": _matrix(
            names, steps, "tensor", "step", scale=scale, title=title, format_=".3~g" if heat.is_drift else ".0%"
        ),
    }


def _matrix(
    rows: list[str], columns: list[str], row: str, column: str, *, scale: dict[str, Any], title: str, format_: str
) -> dict[str, Any]:
    """Cells of rows and columns, whose values the page fills in as `row`, `column` and `value`."""
    return _spec(
        [],
        mark={"type": "rect", "tooltip": True},
        encoding={
            "y": {"field": "row", "type": "nominal", "title": None, "sort": rows, "axis": {"labelLimit": 260}},
            "x": {
                "field": "column",
                "type": "nominal",
                "title": column,
                "sort": columns,
                "axis": {"labelOverlap": True, "labelAngle": 0 if len(columns) > 12 else -30, "labelLimit": 120},
            },
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "legend": {"format": format_},
            },
            "tooltip": [_tip("row", row), _tip("column", column), _tip("value", title, format_)],
        },
        height=max(40, 16 * len(rows)),
    )


def _group(name: str) -> str:
    """A name by which Vega tells groups apart. It keeps them in an object, in which "constructor" is something else."""
    return f"{name} "


def _steps(sound: list[CheckpointFacts]) -> dict[str, Any]:
    """The axis of the steps."""
    axis: dict[str, Any] = {"format": ",d", "grid": False, "tickMinStep": 1}
    if len(sound) <= _FEW:
        axis |= {"values": [each.step for each in sound]}
    return {"field": "step", "type": "quantitative", "title": "step", "axis": axis}


def _spec(
    rows: list[dict[str, Any]],
    *,
    mark: dict[str, Any],
    encoding: dict[str, Any],
    height: int = 220,
    width: "int | str" = "container",
) -> dict[str, Any]:
    return {
        "data": {"name": "rows", "values": rows},
        "mark": mark,
        "encoding": encoding,
        "height": height,
        "width": width,
    }


def _colors(field: str, domain: list[str], range_: list[str]) -> dict[str, Any]:
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "scale": {"domain": domain, "range": range_},
        "legend": {"orient": "top"},
    }


def _tip(field: str, title: str, format_: str | None = None) -> dict[str, Any]:
    kind = "nominal" if format_ is None else "quantitative"
    return {"field": field, "title": title, "type": kind} | ({"format": format_} if format_ else {})
