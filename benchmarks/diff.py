"""What it takes to compare two checkpoints of 1 GB that share nine tenths of their chunks: bytes read, memory, seconds.

Random weights, so that chunks do not compress, in layers of which every tenth is trained. `ckptstore diff` runs in a
process of its own, whose whole resident memory counts, Python's included.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import ckptstore
from benchmarks.states import work_folder
from benchmarks.timing import Report, Row, fresh

LAYER_BYTES = 8 * 2**20
LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A small process between: what a process is told to have held is at least what the one that started it held."""
READ_LIMIT, MEMORY_LIMIT = 0.25, 256 * 2**20


def ask(folder: Path, rounds: int, layers: int = 120) -> Report:
    """What it takes to compare two checkpoints of 1 GB that share nine tenths of their chunks."""
    with work_folder(folder) as work:
        raw_bytes = _make(work, layers)
        ways = {
            "ckptstore diff": partial(_command, work),
            "ckptstore diff --read all": partial(_command, work, "--read", "all"),
            "ckptstore diff --read nothing": partial(_command, work, "--read", "nothing"),
            "torch.load of both, and compare": partial(fresh, "benchmarks.diff:with_torch", work=str(work)),
        }
        measured: dict[str, list[tuple[float, int, int]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                seconds, memory, read = way()
                measured[name].append((seconds, memory, read))
    rows = []
    for name, found in measured.items():
        seconds = statistics.median(each[0] for each in found)
        memory, read = max(each[1] for each in found), found[0][2]
        text = f"{seconds:6.2f} s  {memory / 2**20:6,.0f} MiB  reads {read / 1e6:6,.0f} MB"
        rows.append(Row(name, text, {"seconds": seconds, "memory_bytes": memory, "read_bytes": read}))
    _, memory, read = max(measured["ckptstore diff"])
    share, mebibytes = read / (2 * raw_bytes), memory / 2**20
    met = share <= READ_LIMIT and memory <= MEMORY_LIMIT
    return Report(
        f"diff: two checkpoints of {raw_bytes / 1e9:.2f} GB that share nine tenths of their chunks, local disk",
        rows,
        f"reads {share:.3f} of the bytes of both, target at most {READ_LIMIT}; holds {mebibytes:.0f} MiB in all, "
        f"target at most {MEMORY_LIMIT / 2**20:.0f} MiB: {'met' if met else 'MISSED'}",
    )


def with_torch(work: str) -> tuple[float, int, int]:
    """The same figures with both states in memory."""
    began = time.perf_counter()
    files = [Path(work, f"{step}.pt") for step in (1, 2)]
    before, after = (torch.load(file) for file in files)
    for name, old in before.items():
        new = after[name]
        delta = new.double() - old.double()
        _ = (new != old).sum(), delta.norm() / old.double().norm(), delta.abs().max(), (new * old).sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return time.perf_counter() - began, peak, sum(file.stat().st_size for file in files)


def _make(work: Path, layers: int) -> int:
    generator = torch.Generator().manual_seed(0)
    state = {f"layer{number}": torch.randn(LAYER_BYTES // 4, generator=generator) for number in range(layers)}
    run = ckptstore.Store(work / "store").run("model")
    for step in (1, 2):
        run.save(state, step=step)
        torch.save(state, work / f"{step}.pt")
        for number in range(0, layers, 10):
            state[f"layer{number}"] += 1e-3
    return layers * LAYER_BYTES


def _command(work: Path, *options: str) -> tuple[float, int, int]:
    """Seconds, peak of resident memory, and bytes read, of the command as a user runs it."""
    command = [sys.executable, "-m", "ckptstore", "diff", str(work / "store" / "model"), "--json", *options]
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    document, _, told = done.stdout.rpartition("}")
    seconds, peak = told.split()
    return float(seconds), int(peak) * 1024, json.loads(f"{document}}}")["read_bytes"]
