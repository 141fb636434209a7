"""`python -m benchmarks.faults [names…]`: what users of other tools see when something goes wrong, and ours.

Each fault is made to happen, to the peer and to ckptstore alike, in a folder for temporary files; the table is what
came of it. docs/explanation/faults.md holds the same table, and explains it.
"""

import argparse
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import background_error, bit_flips, disk_full, hostile_pickle, prune, resave, upload
from benchmarks.faults.scenes import Fault

FAULTS: dict[str, Callable[[Path], Fault]] = {
    "disk-full": disk_full.run,
    "resave": resave.run,
    "flips": bit_flips.run,
    "upload": upload.run,
    "background": background_error.run,
    "pickle": hostile_pickle.run,
    "prune": prune.run,
}
HEAD = ("| what goes wrong | to whom | what happened | ckptstore |", "| --- | --- | --- | --- |")


def main() -> int:
    options = parse()
    warnings.simplefilter("ignore")  # DCP's, that this is one process and that it overwrites
    logging.disable()  # and its tracebacks of errors that it raises as well
    torch.set_num_threads(1)  # a fork must not inherit OpenMP's threads
    rows: list[dict[str, Any]] = []
    print(*HEAD, sep="\n", flush=True)
    for name in options.names or FAULTS:
        if name == "prune" and not prune.can_run():
            print("prune: left out, restic is not installed", file=sys.stderr)
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"ckptstore-fault-{name}-") as folder:
            fault = FAULTS[name](Path(folder))
        print(*fault.lines(), sep="\n", flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        rows.extend(fault.to_json())
    print(f"\n{', '.join(versions())}")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
    return 0


def versions() -> list[str]:
    names = ("ckptstore", "torch", "fsspec", "s3fs", "safetensors")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    if shutil.which("restic"):
        said = subprocess.run(["restic", "version"], capture_output=True, text=True, check=True).stdout
        found.append(" ".join(said.split()[:2]))
    return found


def parse() -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FAULTS)}; all if none is named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen to FILE as well")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in FAULTS]
    if unknown:
        parser.error(f"no fault is called {unknown[0]}; there are {', '.join(FAULTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
