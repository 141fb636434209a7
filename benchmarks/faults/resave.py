"""A process is killed while it saves over its last good checkpoint."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import ckptstore
from benchmarks.faults.scenes import NEW, OLD, Fault, Row, any_of, child, dcp, dcp_load, loads, our_load, state

TITLE = "Killed while it saves over the last good checkpoint"
HALF_A_TENSOR = 500_000


def run(folder: Path) -> Fault:
    rows = []
    ours = _midway("ckptstore", folder)
    for key, peer in (("torch", "`torch.save` to the same file"), ("dcp", "DCP, its defaults, the same folder")):
        theirs = _midway(key, folder)
        rows.append(Row(f"resave-{key}", f"{peer}; killed midway in a file", _text(theirs), _text(ours), theirs, ours))
    ours = _at_each_fsync("ckptstore", folder)
    for key, peer in (
        ("dcp", "DCP, its defaults, the same folder"),
        ("dcp-files", "DCP, `single_file_per_rank=False`, the same folder"),
    ):
        theirs = _at_each_fsync(key, folder)
        key, peer = f"resave-{key}-fsync", f"{peer}; killed at each `fsync` in turn"
        rows.append(Row(key, peer, _text(theirs), _text(ours), theirs, ours))
    return Fault(TITLE, rows)


def _text(facts: dict[str, Any]) -> str:
    return f"loading gives {any_of(facts['load'])}"


def _midway(name: str, folder: Path) -> dict[str, Any]:
    place = folder / f"midway-{name}"
    SAVES[name](place, OLD)
    died = child("resave:save_until_the_limit", name=name, place=str(place))
    assert died.returncode == -signal.SIGXFSZ, died.stderr
    return {"load": [LOADS[name](place)]}


def save_until_the_limit(name: str, place: str) -> None:
    """Save the new state; the kernel kills this process at the first byte of a file beyond the limit.

    As sudden as SIGKILL, and always at the same byte.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF_A_TENSOR, HALF_A_TENSOR))
    SAVES[name](Path(place), NEW)


def _at_each_fsync(name: str, folder: Path) -> dict[str, Any]:
    outcomes = []
    for count in range(1, 1000):
        place = folder / f"fsync-{name}-{count}"
        SAVES[name](place, OLD)
        died = _fork(lambda place=place, count=count: _save_until_fsync(name, place, count))  # type: ignore[misc]
        outcomes.append(LOADS[name](place))
        if died == 0:
            break
        assert died == -signal.SIGKILL, f"{name}: exit status {died}"
    return {"load": outcomes[:-1], "whole": outcomes[-1]}


def _save_until_fsync(name: str, place: Path, count: int) -> None:
    """Save the new state; SIGKILL right after the fsync of that number."""
    real, left = os.fsync, [None] * count

    def fsync(descriptor: int) -> None:
        real(descriptor)
        left.pop()
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch("os.fsync", fsync):
        SAVES[name](place, NEW)


def _fork(act: Callable[[], None]) -> int:
    """Do it in a fork, which has the imports already; its exit status, or the signal below 0."""
    process = os.fork()
    if process == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _torch_save(place: Path, step: int) -> None:
    place.mkdir(exist_ok=True)
    torch.save(state(step), place / "latest.pt")


def _dcp_save(place: Path, step: int) -> None:
    dcp().save(state(step), checkpoint_id=place)


def _dcp_save_files(place: Path, step: int) -> None:
    writer = dcp().FileSystemWriter(place, single_file_per_rank=False)
    dcp().save(state(step), storage_writer=writer)


def _our_save(place: Path, step: int) -> None:
    ckptstore.Store(place).run("peers").save(state(step), step=OLD, replace=True)


SAVES: dict[str, Callable[[Path, int], None]] = {
    "torch": _torch_save,
    "dcp": _dcp_save,
    "dcp-files": _dcp_save_files,
    "ckptstore": _our_save,
}
LOADS: dict[str, Callable[[Path], str]] = {
    "torch": lambda place: loads(lambda: torch.load(place / "latest.pt")),
    "dcp": dcp_load,
    "dcp-files": dcp_load,
    "ckptstore": our_load,
}
