"""What the processes do: jobs on one store, each with a journal of what it was told, which outlives its process.

What a state holds follows from its run and its step, so that whoever looks at a checkpoint knows what must be in it.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ckptstore
from ckptstore.format import CHUNKS, CONDEMNED, DELTAS, SESSIONS
from ckptstore.manifest import decode_condemned
from ckptstore.usage import manifests

FLOATS = 20_000
"""Of each tensor: enough for a chunk of its own."""
SHARED = 5
"""So many different contents of the tensor that all runs share."""
KEEP_LAST = 3


@dataclass(frozen=True)
class Place:
    """A store that processes open for themselves."""

    url: str
    options: dict[str, Any] | None = None

    def store(self, codec: Any = "fast") -> ckptstore.Store:
        return ckptstore.Store(self.url, self.options, codec=codec)


@dataclass
class Journal:
    """Lines that a process appends; what was written is there whatever happens to it."""

    path: Path

    def note(self, event: str, **what: Any) -> None:
        line = json.dumps({"event": event, **what}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def state(run: str, step: int) -> dict[str, Any]:
    """One tensor of its own, one that changes slowly, one that other runs hold too, one that is everybody's."""
    return {
        "own": _noise(f"{run} {step}"),
        "slow": _noise(f"{run} {step // 4}"),
        "shared": _noise(str(step % SHARED)),
        "frozen": torch.arange(FLOATS, dtype=torch.float32),
        "run": run,
        "step": step,
    }


def _noise(seed: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(60))
    return torch.randn(FLOATS, generator=generator)


def same(found: Any, run: str, step: int) -> bool:
    expected = state(run, step)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        for name, value in expected.items()
    )


def save_on(place: Place, run: str, journal: Journal, until: float, *, tidy: float = 0.0, seed: int = 0) -> None:
    """Restore what the last process has left, check it, and save one step after the other; sometimes tidy up too."""
    draw = random.Random(seed)
    store = place.store(draw.choice(["fast", "none", "small"]))
    its = store.run(run)
    told = max((line["step"] for line in journal.read() if line["event"] == "saved"), default=None)
    newest = its.latest()
    if told is not None and (newest is None or newest.step < told):
        journal.note("LOST", step=told, found=newest and newest.step)
        raise AssertionError(f"{run}@{told} was saved, and the newest is {newest}")
    if newest is not None and not same(its.load(newest.step), run, newest.step):
        journal.note("WRONG", step=newest.step)
        raise AssertionError(f"{run}@{newest.step} is not what was saved")
    step = 0 if newest is None else newest.step + 1
    journal.note("resumed", step=step)
    while time.time() < until:
        with _failures(journal, "save", step=step):
            if draw.random() < 0.5:
                its.save(state(run, step), step=step)
            else:
                its.save_async(state(run, step), step=step).result()
            journal.note("saved", step=step)
            step += 1
        if draw.random() < tidy:
            prune_once(store, run, journal)
        if draw.random() < tidy:
            collect_once(store, journal, grace=0.5, wait=False)


def collect_on(place: Place, journal: Journal, until: float, *, grace: float, seed: int) -> None:
    draw = random.Random(seed)
    store = place.store()
    while time.time() < until:
        collect_once(store, journal, grace=grace, wait=draw.random() < 0.3)
        time.sleep(draw.uniform(0, 1))


def prune_on(place: Place, runs: list[str], journal: Journal, until: float, *, seed: int) -> None:
    draw = random.Random(seed)
    store = place.store()
    while time.time() < until:
        prune_once(store, draw.choice(runs), journal)
        time.sleep(draw.uniform(0, 0.5))


def collect_once(store: ckptstore.Store, journal: Journal, *, grace: float, wait: bool) -> None:
    with _failures(journal, "collect"):
        report = store.collect(grace=grace, wait=wait)
        journal.note("collected", deleted=report.deleted, fenced=len(report.fenced), waiting=len(report.waiting))


def prune_once(store: ckptstore.Store, run: str, journal: Journal) -> None:
    with _failures(journal, "prune"):
        report = store.prune(run, keep_last=KEEP_LAST)
        journal.note("pruned", run=run, steps=[row.step for row in report.removed])


@contextlib.contextmanager
def _failures(journal: Journal, doing: str, **what: Any) -> Iterator[None]:
    """An error that a user would be told is allowed, and noted; it must say that nothing was done."""
    try:
        yield
    except (ckptstore.FencedError, ckptstore.UnavailableError, ckptstore.NotFoundError) as error:
        journal.note("failed", doing=doing, error=f"{type(error).__name__}: {error}", **what)


@dataclass
class Outcome:
    """What a torture has shown."""

    name: str
    figures: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = ", ".join(f"{count:,} {what}" for what, count in self.figures.items())
        return f"{self.name}: {told}; " + ("nothing lost" if not self.wrong else "\n  ".join(["WRONG:", *self.wrong]))


def check(place: Place, journals: list[Journal], outcome: Outcome) -> None:
    """After all: every save that returned and was not pruned is there, whole and right; no garbage is left."""
    store = place.store()
    for journal in journals:
        outcome.wrong += [f"{journal.path.name}: {line}" for line in journal.read() if line["event"].isupper()]
    saved: dict[str, set[int]] = {}
    pruned: dict[str, set[int]] = {}
    for journal in journals:
        for line in journal.read():
            if line["event"] == "saved":
                saved.setdefault(journal.path.stem, set()).add(line["step"])
            elif line["event"] == "pruned":
                pruned.setdefault(line["run"], set()).update(line["steps"])
    report = store.verify()
    outcome.wrong += [f"damaged: {damage}" for damage in report.damaged]
    for run, steps in saved.items():
        there = set(store.run(run).steps())
        may_go = pruned.get(run, set()) | set(sorted(steps | there)[:-KEEP_LAST])
        outcome.wrong += [f"{run}@{step} was saved, and is gone" for step in sorted(steps - there - may_go)]
        unsaid = len(steps - there - pruned.get(run, set()))
        outcome.figures["deleted by a prune that did not come to say so"] = (
            outcome.figures.get("deleted by a prune that did not come to say so", 0) + unsaid
        )
        for step in sorted(there):
            try:
                if not same(store.run(run).load(step), run, step):
                    outcome.wrong.append(f"{run}@{step} is not what was saved")
            except ckptstore.CheckpointError as error:
                outcome.wrong.append(f"{run}@{step} cannot be loaded: {error}")
    for _ in range(2):  # a process that was killed in the first may have left a save that was alive just now
        store.collect(grace=0)
    outcome.wrong += [f"garbage: {key}" for key in _garbage(store)]
    if not store.verify().ok:
        outcome.wrong.append("the last collection took what was needed")
    outcome.figures["saves"] = sum(map(len, saved.values()))
    outcome.figures["checkpoints left"] = sum(len(store.run(run).steps()) for run in saved)


def _garbage(store: ckptstore.Store) -> list[str]:
    objects = store._objects
    needed = {ref.key for manifest in manifests(objects) for ref in manifest.chunks}
    left = [row.key for prefix in (CHUNKS, DELTAS, SESSIONS) for row in objects.list(prefix) if row.key not in needed]
    for row in objects.list(CONDEMNED):
        content = objects.get(row.key)
        if content is not None and needed.isdisjoint(decode_condemned(content, row.key).keys):
            left.append(row.key)
    return left + objects.leftovers(0, remove=False)


def forked(work: Callable[[], None], log: Path) -> int:
    """Do it in a child; return its process id. What it prints goes to the log."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        status = 0
    except BaseException:  # the child must never return into the test that forked it
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)
