"""Measuring fairly on a machine that others use too: variants in turn, fresh processes, medians and ratios.

Of checkpoints it knows only which kernels to use. A measurement in a fresh process is a function named
"module:function" that takes and returns what JSON can hold; it does its own timing, so that imports do not count.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


Took = tuple[float, float]
"""Seconds by the clock, and seconds of processor time (of all threads, and of the system on their behalf)."""


class Stopwatch:
    """Times the block under `with`; `took` says how long it took."""

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.took: Took = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


@dataclass(frozen=True)
class Row:
    """One line of a report: what people read, and the same for programs."""

    name: str
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The answer to one question."""

    question: str
    rows: Sequence[Row]
    verdict: str = ""

    def print(self) -> None:
        print(f"\n{self.question}")
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            print(f"  {row.name:<{width}}  {row.text}")
        if self.verdict:
            print(f"  => {self.verdict}", flush=True)

    def to_json(self) -> dict[str, Any]:
        rows = [{"name": row.name, "text": row.text, **row.figures} for row in self.rows]
        return {"question": self.question, "rows": rows, "verdict": self.verdict}


def in_turn(rounds: int, variants: Mapping[str, Callable[[int], Took]]) -> dict[str, list[Took]]:
    """Call each variant once a round, in one order and then in the other; return what they returned.

    One round before the first, whose number is -1, is not counted; a single round has none before it.
    """
    measured: dict[str, list[Took]] = {name: [] for name in variants}
    for number in range(-1 if rounds > 1 else 0, rounds):
        names = list(variants) if number % 2 else list(variants)[::-1]
        for name in names:
            took = variants[name](number)
            if number >= 0:
                measured[name].append(took)
    return measured


def fresh(function: str, **arguments: Any) -> Any:
    """Call "module:function" in a new interpreter and return what it returned."""
    command = [sys.executable, "-m", "benchmarks.timing", function, json.dumps(arguments)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{function} failed in its process (exit status {result.returncode})")
    return json.loads(result.stdout.splitlines()[-1])


def use_kernels(name: str) -> None:
    """Load them now: imports do not count. Numba's take most of a second; by themselves they come when that pays."""
    from ckptstore.kernels import compiled

    os.environ[compiled.VARIABLE] = name
    compiled.expect(0)


def compared(measured: Mapping[str, Sequence[Took]], base: str, payload_bytes: int) -> list[Row]:
    """A row for each variant: seconds, bytes per second, and its speed as a multiple of that of `base`."""
    rows = []
    base_seconds = [seconds for seconds, _ in measured[base]]
    for name, rounds in measured.items():
        times = [seconds for seconds, _ in rounds]
        middle, processor = statistics.median(times), statistics.median(used for _, used in rounds)
        ratio, low, high = speed(times, base_seconds)
        text = f"{middle:6.3f} s ({min(times):.3f}-{max(times):.3f}; processor {processor:.3f} s)"
        text += f"  {payload_bytes / middle / 1e9:5.2f} GB/s"
        if name != base:
            text += f"  {ratio:.2f} x {base} (middle half of the rounds: {low:.2f}-{high:.2f})"
        figures = {"median": middle, "processor": processor, "speed": ratio, "quartiles": [low, high]}
        rows.append(Row(name, text, {**figures, "seconds": times}))
    return rows


def speed(times: Sequence[float], base_times: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast as the base: median and quartiles of the ratio of each round."""
    ratios = [base / time for time, base in zip(times, base_times, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def target(text: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """Say whether a figure is where it should be."""
    if at_least is not None:
        return f"{text} {value:.2f}, target at least {at_least:.2f}: {'met' if value >= at_least else 'MISSED'}"
    assert at_most is not None
    return f"{text} {value:.3f}, target at most {at_most:.2f}: {'met' if value <= at_most else 'MISSED'}"


def _answer(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**json.loads(arguments))))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
