"""`python -m benchmarks [names…]`, or `make bench BENCH_ARGS=…`: ask all questions, or those named."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--quick" in sys.argv:
    os.environ["CKPTSTORE_BENCHMARK_STEPS"] = "3"  # read by the imports that follow, here and in child processes

from benchmarks import (
    background,
    bucket,
    finetune,
    memory,
    profile,
    requests,
    resave,
    restore,
    save,
    series,
    states,
    stored,
)
from benchmarks.timing import Report

Ask = Callable[[Path, int], Report]

QUESTIONS: dict[str, tuple[Ask, int]] = {
    # name -> who answers it, and in how many rounds if not told
    "stored": (stored.ask, 1),
    "restore": (restore.ask, 7),
    "save": (save.ask, 9),
    "save-fresh": (save.ask_fresh, 7),
    "resave": (resave.ask, 5),
    "fine-tune": (finetune.ask, 9),
    "async": (background.ask, 7),
    "memory": (memory.ask, 1),
    "series": (series.ask, 3),
    "series-close": (series.ask_close, 3),
    "bucket-save": (bucket.ask_save, 5),
    "bucket-restore": (bucket.ask_restore, 5),
    "bucket-requests": (requests.ask, 3),
}

QUICK = ("stored", "restore", "save", "resave", "fine-tune", "async")


def main() -> int:
    options = parse()
    if options.list:
        for name, (ask, _) in QUESTIONS.items():
            print(f"{name:<16}{(ask.__doc__ or sys.modules[ask.__module__].__doc__ or '').splitlines()[0]}")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    for name in options.names or ([] if options.profile else QUICK if options.quick else QUESTIONS):
        ask, rounds = QUESTIONS[name]
        began = time.monotonic()
        report = ask(options.folder, options.rounds or (1 if options.quick else rounds))
        report.print()
        print(f"     ({time.monotonic() - began:.0f} s)", flush=True)
        reports.append(report)
    if options.profile:
        for report in profile.ask(options.folder, options.rounds or 3):
            report.print()
            reports.append(report)
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=1) + "\n")
    return 0


def parse() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(QUESTIONS)}; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what each one asks, and end")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each, in place of its own number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one round each of {', '.join(QUICK)}, of a state of three steps: whether it works, not figures to quote",
    )
    parser.add_argument("--profile", action="store_true", help="where the time of save and restore goes")
    parser.add_argument(
        "--folder",
        type=Path,
        default=states.DEFAULT_FOLDER,
        help=f"where states are kept and written ({tempfile.gettempdir()}/…)",
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in QUESTIONS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]}; there are {', '.join(QUESTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
