"""How a save and a restore grow with the cores: measured on those that are here, and a model of the rest.

The model knows what one core takes for each stage, which `profile` measures on one thread. What releases the
interpreter's lock (hashing, splitting, zstd, merging, reading) is divided by the cores; what does not is left as it is;
the disk takes as long as `limits` says, beside the encoding; and nothing moves through memory faster than copies do.
It knows nothing of caches, of clocks that slow down, or of a second socket.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ckptstore
from benchmarks import profile
from benchmarks.limits import STATE_BYTES, STORED_BYTES, disk_rate, memory_rate
from benchmarks.restore import our_restore, torch_restore
from benchmarks.save import timed_save, timed_torch_save
from benchmarks.states import STEPS, Training, real_batches, state_file, work_folder
from benchmarks.timing import Report, Row, Took, fresh, in_turn, use_kernels

QUESTION = "cores: seconds of a save and of a restore, LSTM and Adam, local disk, each in a fresh process"
MODELLED = (1, 2, 4, 8, 16)
SAVE, RESTORE = "ckptstore, save", "ckptstore, restore"
TORCH_SAVE, TORCH_LOAD = "torch.save + fsync", "torch.load"

HASHED_FIRST = ("hash (find what is new)",)
"""Of a save: done for all of the state before anything is encoded."""
ENCODING = (
    *("hash again (did it change?)", "checksum of compressed planes", "encode: take samples", "encode: split"),
    *("encode: zstd of samples", "encode: zstd", "encode: the rest", "hash"),
)
DISK = ("put: write", "put: fsync", "put: fsync of folders", "put: rename, link", "put: open, close, uuid")
DECODING = ("fetch: read", "hash", "decode: zstd", "decode: merge", "decode: the rest", "checksum of compressed planes")
MOVED_BY_SAVE, MOVED_BY_RESTORE = 3, 2
"""How often a save reads or writes each byte of the state at least (hash, split, hash again), and a restore."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one core for a whole state, and what does not depend on the cores."""

    first: float
    """Parallel, before all else."""
    middle: float
    """Parallel, beside the disk."""
    serial: float
    disk: float
    memory: float

    def on(self, cores: int) -> float:
        """Seconds on so many cores. One after the other: what is serial; the first; the slowest of the rest."""
        parallel = self.first / cores + max(self.middle / cores, self.disk)
        return self.serial + max(parallel, self.memory)


def ask(folder: Path, rounds: int) -> Report:
    """How a save and a restore grow with the cores: measured on those that are here, and a model of the rest."""
    here = len(os.sched_getaffinity(0))
    file = state_file(folder)
    real_batches(folder)
    measured: dict[int, Mapping[str, list[Took]]] = {}
    with work_folder(folder) as work:
        ckptstore.Store(work / "store").run("lstm").save(Training.resumed(file).state(), step=STEPS)
        place = {"file": str(file), "work": str(work)}
        variants = {
            f"{name} {cores}": partial(_pinned, name, cores, place)
            for cores in range(1, here + 1)
            for name in (SAVE, TORCH_SAVE, RESTORE, TORCH_LOAD)
        }
        found = in_turn(rounds, variants)
        for cores in range(1, here + 1):
            measured[cores] = {name: found[f"{name} {cores}"] for name in (SAVE, TORCH_SAVE, RESTORE, TORCH_LOAD)}
    saving, restoring = profile.ask(folder, rounds)
    disk, memory = STORED_BYTES / disk_rate(folder, rounds), STATE_BYTES / memory_rate(rounds)
    models = {
        SAVE: costs_of(saving.rows, HASHED_FIRST, ENCODING, disk=disk, memory=MOVED_BY_SAVE * memory),
        RESTORE: costs_of(restoring.rows, (), DECODING, disk=0.0, memory=MOVED_BY_RESTORE * memory),
    }
    return Report(QUESTION, [*_measured_rows(measured), *_model_rows(models, measured)], "; ".join(_said(models)))


def _pinned(name: str, cores: int, place: dict[str, str], number: int) -> Took:
    took: Took = fresh("benchmarks.cores:measure", name=name, cores=cores, number=number, **place)
    return took


def measure(name: str, cores: int, number: int, file: str, work: str) -> Took:
    """Once, in this process, on the first so many cores of those that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    use_kernels("numpy")
    if name == RESTORE:
        return our_restore(store=str(Path(work) / "store"), kernels="numpy")
    if name == TORCH_LOAD:
        return torch_restore(file)
    if name == TORCH_SAVE:
        return timed_torch_save(Path(work) / f"{number}.pt", Training.resumed(file))
    import ckptstore.saving

    # A store for each, as the state is the same.
    run = ckptstore.Store(Path(work) / f"new-{cores}-{number}").run("lstm")
    run.save({"step": 0}, step=0)
    return timed_save(run, Training.resumed(file))


def costs_of(rows: Sequence[Row], first: Sequence[str], middle: Sequence[str], *, disk: float, memory: float) -> Costs:
    """The stages of a profile put in the groups that the model knows; what is in none is serial."""
    seconds = {row.name: float(row.figures["seconds"]) for row in rows}
    grouped = {*first, *middle, *DISK}
    return Costs(
        first=sum(seconds.get(name, 0.0) for name in first),
        middle=sum(seconds.get(name, 0.0) for name in middle),
        serial=sum(took for name, took in seconds.items() if name not in grouped),
        disk=disk,
        memory=memory,
    )


def _measured_rows(measured: Mapping[int, Mapping[str, list[Took]]]) -> list[Row]:
    rows = []
    for name in (SAVE, TORCH_SAVE, RESTORE, TORCH_LOAD):
        medians = {cores: statistics.median(seconds for seconds, _ in found[name]) for cores, found in measured.items()}
        text = "  ".join(f"{cores} core{'s' if cores > 1 else ''} {middle:.3f} s" for cores, middle in medians.items())
        gained = medians[1] / medians[max(medians)]
        figures = {"seconds": {str(cores): middle for cores, middle in medians.items()}, "gained": gained}
        rows.append(Row(f"measured: {name}", f"{text}  {gained:.2f} times as fast", figures))
    return rows


def _model_rows(models: Mapping[str, Costs], measured: Mapping[int, Mapping[str, list[Took]]]) -> list[Row]:
    rows = [Row("a model, not measured: cores", "".join(f"{cores:>9}" for cores in MODELLED))]
    for name, base in ((SAVE, TORCH_SAVE), (RESTORE, TORCH_LOAD)):
        seconds = {cores: models[name].on(cores) for cores in MODELLED}
        theirs = statistics.median(took for took, _ in measured[max(measured)][base])
        text = "".join(f"{each:>7.3f} s" for each in seconds.values())
        rows.append(Row(f"model: {name}", text, {"seconds": {str(cores): each for cores, each in seconds.items()}}))
        text = "".join(f"{theirs / each:>9.2f}" for each in seconds.values())
        figures = {"speed": {str(cores): theirs / each for cores, each in seconds.items()}}
        rows.append(Row(f"model: times the speed of {base}, which has one thread", text, figures))
    return rows


def _said(models: Mapping[str, Costs]) -> list[str]:
    return [
        f"{name}: {costs.first + costs.middle:.3f} s of one core in parallel, {costs.serial:.3f} s serial, "
        f"disk {costs.disk:.3f} s, memory at least {costs.memory:.3f} s"
        for name, costs in models.items()
    ]
