"""`python -m benchmarks [names…]`, or `make bench BENCH_ARGS=…`: ask all questions, or those named."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if "--quick" in sys.argv:
    os.environ["CKPTSTORE_BENCHMARK_STEPS"] = "3"  # read by the imports that follow, here and in child processes

from benchmarks import (
    background,
    bookkeeping,
    bucket,
    cores,
    diff,
    finetune,
    half,
    limits,
    machine,
    memory,
    plots,
    profile,
    report,
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
    "limits": (limits.ask, 7),
    "stored": (stored.ask, 1),
    "restore": (restore.ask, 7),
    "save": (save.ask, 9),
    "save-fresh": (save.ask_fresh, 7),
    "resave": (resave.ask, 5),
    "fine-tune": (finetune.ask, 9),
    "async": (background.ask, 7),
    "cores": (cores.ask, 5),
    "bookkeeping": (bookkeeping.ask, 3),
    "memory": (memory.ask, 1),
    "bf16": (half.ask, 9),
    "diff": (diff.ask, 3),
    "report": (report.ask, 3),
    "series": (series.ask, 3),
    "series-close": (series.ask_close, 3),
    "bucket-save": (bucket.ask_save, 5),
    "bucket-restore": (bucket.ask_restore, 5),
    "bucket-requests": (requests.ask, 3),
}

QUICK: dict[str, Ask] = {
    # name -> who answers it at its smallest: whether it works. Of what needs a server `limits` starts one; `cores` and
    # `series` ask what `save` and `restore` ask, and take long.
    "limits": limits.ask,
    "stored": stored.ask,
    "restore": restore.ask,
    "save": save.ask,
    "resave": resave.ask,
    "fine-tune": finetune.ask,
    "async": background.ask,
    "bookkeeping": partial(bookkeeping.ask, counts=(100, 1_000)),
    "memory": partial(memory.ask, gigabytes=(0.02,)),
    "bf16": half.ask,
    "diff": partial(diff.ask, layers=10),
    "report": partial(report.ask, runs=2, checkpoints=5),
}


def main() -> int:
    options = parse()
    if options.list:
        for name, (ask, _) in QUESTIONS.items():
            print(f"{name:<16}{(ask.__doc__ or sys.modules[ask.__module__].__doc__ or '').splitlines()[0]}")
        return 0
    document = json.loads(options.draw.read_text()) if options.draw else measured(options)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.svg:
        for file in plots.write(document["reports"], options.svg, machine.sentence(document["machine"])):
            print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def measured(options: Any) -> dict[str, Any]:
    """Ask, print the answers, and return them as `--json` writes them."""
    options.folder.mkdir(parents=True, exist_ok=True)
    facts = machine.facts(options.folder)
    print(machine.sentence(facts), flush=True)
    reports: dict[str, Report] = {}
    for name in options.names or ([] if options.profile else QUICK if options.quick else QUESTIONS):
        ask, rounds = QUESTIONS[name]
        if options.quick:
            ask, rounds = QUICK.get(name, ask), 1
        elif name == "memory" and options.gigabytes:
            ask = partial(memory.ask, gigabytes=options.gigabytes)
        began = time.monotonic()
        reports[name] = ask(options.folder, options.rounds or rounds)
        reports[name].print()
        print(f"     ({time.monotonic() - began:.0f} s)", flush=True)
    if options.profile:
        for report in profile.ask(options.folder, options.rounds or 3):
            report.print()
            reports[report.question.partition(":")[0]] = report
    return {"machine": facts, "reports": {name: report.to_json() for name, report in reports.items()}}


def parse() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(QUESTIONS)}; all if none is named")
    parser.add_argument("--list", action="store_true", help="say what each one asks, and end")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each, in place of its own number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as well")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help=f"draw {', '.join(plots.TITLES)} into FOLDER")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FILE",
        help="with --svg: draw what --json has written to FILE, and measure nothing",
    )
    parser.add_argument(
        "--gigabytes",
        type=float,
        nargs="+",
        metavar="GB",
        help=f"states that memory is measured of ({' '.join(f'{size:g}' for size in memory.GIGABYTES)})",
    )
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
    if options.svg and not plots.available():
        parser.error(plots.MISSING)  # now, and not when all has been measured
    return options


if __name__ == "__main__":
    sys.exit(main())
