"""The tortures: processes killed at random moments; and many at once, some of them stopped for longer than allowed."""

import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.torture.jobs import (
    Journal,
    Outcome,
    Place,
    check,
    collect_on,
    forked,
    prune_on,
    save_on,
)

GRACE = 2.0
"""Seconds; shorter than the beat of a session, so that saves that are stopped, and slow ones, are taken for dead."""


def kill_again_and_again(place: Place, folder: Path, *, kills: int, seed: int = 0, name: str = "kill") -> Outcome:
    """A process that saves, prunes and collects is killed at a random moment, and started again, so many times."""
    torch.set_num_threads(1)  # a child must not inherit a pool of threads that it does not have
    draw = random.Random(seed)
    outcome = Outcome(name)
    journal = Journal(folder / "victim.journal")
    log = folder / "victim.log"
    for number in range(kills):
        lines = len(journal.read())
        work = partial(save_on, place, "victim", journal, time.time() + 60, tidy=0.2, seed=number)
        pid = forked(work, log)
        deadline = time.time() + 60
        # Sometimes within its first save, sometimes later.
        wanted = lines + draw.choice([1, 2, 4])
        status = None
        while len(journal.read()) < wanted and time.time() < deadline and status is None:
            status = _ended(pid)
            time.sleep(0.002)
        if status is None:
            time.sleep(draw.uniform(0, draw.choice([0.05, 0.4])))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            outcome.wrong.append(f"the process ended by itself after {number} kills: {log.read_text()[-2000:]}")
            break
    outcome.figures["kills"] = kills
    check(place, [journal], outcome)
    outcome.figures |= _counted([journal])
    return outcome


def stress(
    place: Place, folder: Path, *, seconds: float, savers: int = 8, seed: int = 0, name: str = "stress"
) -> Outcome:
    """Savers that share content, two collectors and two pruners at once, some of them stopped for too long."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    until = time.time() + seconds
    runs = [f"run{number}" for number in range(savers)]
    journals = {run: Journal(folder / f"{run}.journal") for run in runs}
    tidiers = [Journal(folder / f"tidier{number}.journal") for number in range(4)]
    log = folder / "stress.log"
    pids = {
        run: forked(partial(save_on, place, run, journals[run], until, seed=seed), log) for seed, run in enumerate(runs)
    }
    for number in (0, 1):
        collecting = partial(collect_on, place, tidiers[number], until, grace=GRACE, seed=number)
        pids[f"collector{number}"] = forked(collecting, log)
        pids[f"pruner{number}"] = forked(partial(prune_on, place, runs, tidiers[2 + number], until, seed=number), log)
    outcome = Outcome(name)
    outcome.figures["processes"] = len(pids)
    outcome.figures["stops"] = _stop_some(list(pids.values()), draw, until)
    for role, pid in pids.items():
        _, status = os.waitpid(pid, 0)
        if status:
            outcome.wrong.append(f"{role} ended with {status}: {log.read_text()[-3000:]}")
    check(place, [*journals.values(), *tidiers], outcome)
    outcome.figures |= _counted([*journals.values(), *tidiers])
    return outcome


def _ended(pid: int) -> int | None:
    """The status of a child that has ended; None while it lives."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return status if ended else None


def _stop_some(pids: list[int], draw: random.Random, until: float) -> int:
    """Stop processes now and then, for longer than a collection gives them, and let them go on."""
    stops = 0
    while time.time() < until:
        stopped = draw.sample(pids, 2)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(draw.uniform(0.5, 2.5) * GRACE)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        stops += len(stopped)
        time.sleep(draw.uniform(0, 1))
    return stops


def _counted(journals: list[Journal]) -> dict[str, int]:
    lines = [line for journal in journals for line in journal.read()]
    failed = [line for line in lines if line["event"] == "failed"]
    count = Counter(f"{line['doing']}s failed with {line['error'].partition(':')[0]}" for line in failed)
    collections = [line for line in lines if line["event"] == "collected"]
    count["collections"] = len(collections)
    count["chunks collected"] = sum(line["deleted"] for line in collections)
    count["saves fenced"] = sum(line["fenced"] for line in collections)
    count["prunes"] = sum(line["event"] == "pruned" for line in lines)
    return dict(count)
