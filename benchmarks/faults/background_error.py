"""A save in the background fails, and the training does not ask."""

import concurrent.futures
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ckptstore
from benchmarks.faults.scenes import Fault, Row, attempt, child, dcp, no_space, state

TITLE = "A save in the background fails, nobody asks for its result"
CAUSE = "No space left on device"


def run(folder: Path) -> Fault:
    theirs = _facts(child("background_error:dcp_training", folder=str(folder / "dcp")))
    ours = _facts(child("background_error:our_training", folder=str(folder / "store")))
    return Fault(
        TITLE,
        [
            Row("background-next", "DCP, `async_save`; another save follows", _next(theirs), _next(ours), theirs, ours),
            Row("background-last", "the same; it was the last save", _last(theirs), _last(ours), theirs, ours),
        ],
    )


def _facts(ended: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert ended.returncode == 0, f"the training ended with exit status {ended.returncode}: {ended.stderr}"
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told | {"printed": CAUSE in ended.stderr}


def _next(facts: dict[str, Any]) -> str:
    return "the next save raised the error" if facts["next_raised"] else "silence"


def _last(facts: dict[str, Any]) -> str:
    return "the error was printed when the interpreter ended" if facts["printed"] else "silence"


def dcp_training(folder: str) -> dict[str, Any]:
    """Three saves in the background, the first and the last of which fail; nobody keeps what `async_save` returns."""

    def save(step: int) -> None:
        future: Any = dcp().async_save(state(step), checkpoint_id=f"{folder}/{step}")
        concurrent.futures.wait([future])  # training goes on until it has ended; that does not ask for its result

    return _train(save)


def our_training(folder: str) -> dict[str, Any]:
    """The same."""
    run = ckptstore.Store(folder).run("peers")

    def save(step: int) -> None:
        pending = run.save_async(state(step), step=step)
        while not pending.done():
            time.sleep(0.01)

    return _train(save)


def _train(save: Callable[[int], None]) -> dict[str, Any]:
    with mock.patch("os.fsync", no_space):
        save(1)
    following = attempt(lambda: save(2))
    with mock.patch("os.fsync", no_space):
        save(3)
    return {"next_raised": following.error_name}
