"""What the faults have in common: the state, attempts and what came of them, failing disks, and rows of the table."""

import contextlib
import errno
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import ckptstore
from benchmarks.timing import ROOT

OURS = "ckptstore"
OLD, NEW = 1, 2
"""Steps of the two states: the good checkpoint that is there, and the one being saved."""
SIDE = 512


def state(step: int) -> dict[str, Any]:
    """Two tensors of 1 MiB and a number. Random, so that nothing compresses it away, and the same every time."""
    source = torch.Generator().manual_seed(step)
    return {name: torch.rand(SIDE, SIDE, generator=source) for name in ("weight", "moment")} | {"step": step}


def empty_state() -> dict[str, Any]:
    """A place for a state to be loaded into."""
    return {"weight": torch.zeros(SIDE, SIDE), "moment": torch.zeros(SIDE, SIDE), "step": 0}


def is_state(value: Any, step: int) -> bool:
    """Whether it is the state of that step, to the last bit."""
    return all(_same(value[name], part) for name, part in state(step).items())


def which(value: Any) -> str:
    """Which state was loaded: the old one, the new one, or something that never was."""
    if is_state(value, OLD):
        return "the old state"
    if is_state(value, NEW):
        return "the new state"
    wanted = {step: state(step) for step in (OLD, NEW)}
    if all(any(_same(part, each[name]) for each in wanted.values()) for name, part in value.items()):
        return "a mix of both states, without an error"
    return "a state that never was, without an error"


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else bool(one == other)


@dataclass(frozen=True)
class Attempt:
    """What came of a call: its value or its error."""

    value: Any = None
    error: BaseException | None = None

    @property
    def error_name(self) -> str:
        """The error's type, and what it wraps where it only says that there was another one."""
        failures = getattr(self.error, "failures", None)  # of DCP's CheckpointException: an error for each rank
        if failures:
            return f"{type(self.error).__name__}: {type(next(iter(failures.values()))[0]).__name__}"
        return type(self.error).__name__ if self.error else ""

    @property
    def loaded(self) -> str:
        """For a load: which state came, or which error."""
        return f"an error ({self.error_name})" if self.error else which(self.value)


def attempt(act: Callable[[], Any]) -> Attempt:
    """Call it. Whatever it raises is what there is to see: a Ctrl-C of ours, or DCP's error, which is no Exception."""
    try:
        return Attempt(act())
    except BaseException as error:
        return Attempt(error=error)


def loads(act: Callable[[], Any]) -> str:
    """Which state a load gives, or which error."""
    return attempt(act).loaded


@dataclass(frozen=True)
class Row:
    """A line of the table: what a peer did in a scene, and what ckptstore did in the same."""

    key: str
    """For programs: the test asks for rows by it."""
    peer: str
    saw: str
    ours: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    our_facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """One kind of fault: the lines of the table that belong together."""

    title: str
    rows: Sequence[Row]

    def lines(self) -> list[str]:
        """As lines of a Markdown table. What is the same as above is said once."""
        lines = []
        title, ours_above = self.title, ""
        for row in self.rows:
            ours = "as above" if row.ours == ours_above else row.ours
            lines.append(f"| {title} | {row.peer} | {row.saw} | {ours} |")
            title, ours_above = "", row.ours
        return lines

    def to_json(self) -> list[dict[str, Any]]:
        """As rows for programs."""
        return [
            {"key": row.key, "line": line, "facts": dict(row.facts), "our_facts": dict(row.our_facts)}
            for row, line in zip(self.rows, self.lines(), strict=True)
        ]


def any_of(outcomes: Iterable[str]) -> str:
    """Several outcomes as one text, each once, in the order in which they first came: "a, or b"."""
    return ", or ".join(dict.fromkeys(outcomes))


def our_load(store: "str | Path | ckptstore.Store") -> str:
    """Which state the newest checkpoint of the run "peers" holds."""
    found = store if isinstance(store, ckptstore.Store) else ckptstore.Store(store)
    return loads(lambda: found.run("peers").load())


def dcp() -> Any:
    """torch.distributed.checkpoint: imported by those who need it, and without types, which it has only in part."""
    return importlib.import_module("torch.distributed.checkpoint")


def dcp_load(path: Path) -> str:
    """Which state the checkpoint of torch.distributed.checkpoint at `path` holds."""

    def load() -> dict[str, Any]:
        into = empty_state()
        dcp().load(into, checkpoint_id=path)
        return into

    return loads(load)


def no_space(_: int) -> None:
    """An fsync on a disk that is full: where blocks are allocated late, or on NFS, it is here that one hears of it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def disk_full_for_workers(*, meet: bool) -> Iterator[None]:
    """The disk is full for every thread but the main one.

    With `meet`, the main thread's fsync waits until a worker has failed. Workers that share a queue with the main
    thread might find it empty otherwise, and the fault would come or not, by luck.
    """
    failed = threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            no_space(descriptor)
        if meet and not failed.wait(60):
            raise RuntimeError("no worker thread came to write a file")
        real(descriptor)

    with mock.patch("os.fsync", fsync):
        yield


@contextlib.contextmanager
def thread_errors() -> Iterator[list[str]]:
    """The errors that end a thread, which Python would print on stderr."""
    errors: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda told: errors.append(told.exc_type.__name__)
    try:
        yield errors
    finally:
        threading.excepthook = before


def child(function: str, **arguments: Any) -> "subprocess.CompletedProcess[str]":
    """Call "module:function" of this package in a process of its own, which may be killed."""
    command = [sys.executable, "-m", "benchmarks.timing", f"benchmarks.faults.{function}", json.dumps(arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
