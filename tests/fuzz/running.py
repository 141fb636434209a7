"""Many inputs of all kinds, read under watch, and what came of it."""

import base64
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ckptstore.cli.printing import printable
from tests.fuzz.generating import each_generated
from tests.fuzz.targets import KINDS, OPERATIONS, Parts, read_document, valid_stores
from tests.fuzz.watching import Watched

GENERATED = "generated"
GENERATED_SHARE = 6
MAX_SAVED = 50


@dataclass
class Report:
    """What came of a run.

    Attributes:
        outcomes: how often each outcome came, by kind.
        escapes: kind, seed and number of each input that led to what must not be, and what that was.
        slowest, largest: CPU seconds and bytes of memory of the worst input.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    escapes: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0
    seconds: float = 0.0

    def inputs(self) -> int:
        return sum(each.total() for each in self.outcomes.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs(),
            "seconds": round(self.seconds, 1),
            "slowest_seconds": round(self.slowest, 2),
            "largest_bytes": self.largest,
            "outcomes": {kind: dict(sorted(each.items())) for kind, each in self.outcomes.items()},
            "escapes": self.escapes,
        }


def read_all(
    inputs: int,
    seed: int,
    saved: Path | None = None,
    only: str | None = None,
    done: Callable[[str, Counter[str]], None] = lambda kind, outcomes: None,
) -> Report:
    """Read about so many inputs, which follow from the seed.

    Args:
        inputs: how many, of all kinds together.
        seed: what they follow from.
        saved: where to save those that led to what must not be.
        only: of this kind alone.
        done: told the outcomes of each kind when all of it was read.
    """
    report = Report()
    begun = time.monotonic()

    def take(kind: str, number: int, parts: Parts, watched: Watched) -> None:
        report.outcomes.setdefault(kind, Counter())[watched.outcome] += 1
        report.slowest = max(report.slowest, watched.seconds)
        report.largest = max(report.largest, watched.peak_bytes)
        if watched.escapes:
            report.escapes.append({"kind": kind, "seed": seed, "number": number, "escapes": watched.escapes})
            if saved is not None and len(report.escapes) <= MAX_SAVED:
                save(saved / f"{kind}-{seed}-{number}.json", kind, parts)

    for name, kind in KINDS.items():
        if only in (None, name):
            for number in range(inputs * kind.share // 100):
                parts = kind.make(Random(f"{seed}/{name}/{number}"))
                if parts is not None:
                    take(name, number, parts, kind.read(parts))
            done(name, report.outcomes[name])
    if only in (None, GENERATED):
        numbers = iter(range(inputs))
        each_generated(
            inputs * GENERATED_SHARE // 100,
            seed,
            lambda parts: take(GENERATED, next(numbers), parts, read_document(parts)),
        )
        done(GENERATED, report.outcomes[GENERATED])
    report.seconds = time.monotonic() - begun
    return report


def warm_up() -> list[str]:
    """Do everything once with sound stores, so that what is imported later is by then. Returns what went wrong."""
    printable("\x1b")
    wrong = []
    for objects in valid_stores():
        for operation in OPERATIONS:
            parts = objects | {"operation": operation.encode()}
            KINDS["store"].read(parts)
            watched = KINDS["store"].read(parts)
            if watched.escapes or watched.outcome != "read":
                wrong.append(f"{operation}: {watched.outcome} {watched.escapes}")
    return wrong


def save(file: Path, kind: str, parts: Parts) -> None:
    """Write an input to a file that `replay` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = {key: base64.b64encode(content).decode() for key, content in parts.items()}
    file.write_text(json.dumps({"kind": kind, "parts": encoded}, indent=1), encoding="utf-8")


def replay(file: Path) -> Watched:
    """Read an input that was saved."""
    document = json.loads(file.read_text(encoding="utf-8"))
    parts = {key: base64.b64decode(content) for key, content in document["parts"].items()}
    return KINDS[document["kind"]].read(parts) if document["kind"] in KINDS else read_document(parts)
