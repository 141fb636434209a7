"""`python -m tests.fuzz`: read hostile inputs, and tell what led to what must not be. `make fuzz` calls it."""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.fuzz.running import Report

MEMORY_BYTES = 4 * 2**30
"""What the process may take beyond what it has when it begins."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Read hostile stores, and what is in them."
    )
    parser.add_argument("--inputs", type=int, default=5000, help="how many (default 5000)")
    parser.add_argument("--seed", type=int, default=1, help="what they follow from (default 1)")
    parser.add_argument(
        "--kind", help="of this kind only: chunk, manifest, marker, session, condemned, store, generated"
    )
    parser.add_argument("--saved", type=Path, default=Path("fuzz-escapes"), help="folder for what reproduces an escape")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one input that was saved")
    parser.add_argument("--guided", type=int, metavar="N", help="N inputs that atheris makes, guided by coverage")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.guided:
        from tests.fuzz.guided import fuzz

        return fuzz(given.guided, given.seed)
    from tests.fuzz import running
    from tests.fuzz.targets import scratch_in

    with tempfile.TemporaryDirectory() as folder, scratch_in(Path(folder)):
        wrong = running.warm_up()
        if wrong:
            print("sound stores are not read as they should be:", *wrong, sep="\n", file=sys.stderr)
            return 2
        with _limited_memory():
            if given.replay:
                watched = running.replay(given.replay)
                print(watched.outcome, *watched.escapes, sep="\n")
                return 1 if watched.escapes else 0
            tell = _say_nothing if given.json else _tell
            report = running.read_all(given.inputs, given.seed, given.saved, given.kind, tell)
    if given.json:
        print(json.dumps(report.to_json()))
    else:
        _print(report)
    return 1 if report.escapes else 0


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) if sys.platform == "linux" else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _tell(kind: str, outcomes: Counter[str]) -> None:
    counts = "  ".join(f"{name} {count}" for name, count in outcomes.most_common())
    print(f"{kind:10} {outcomes.total():8} {counts}", flush=True)


def _say_nothing(kind: str, outcomes: Counter[str]) -> None:
    pass


def _print(report: "Report") -> None:
    print(
        f"{report.inputs()} inputs in {report.seconds:.0f} s; the slowest took {report.slowest:.2f} s of CPU, "
        f"the largest {report.largest / 2**20:.1f} MiB"
    )
    for escape in report.escapes:
        told = "; ".join(escape["escapes"])
        print(f"ESCAPE {escape['kind']} seed {escape['seed']} number {escape['number']}: {told}")
    print(f"{len(report.escapes)} escapes")


if __name__ == "__main__":
    sys.exit(main())
