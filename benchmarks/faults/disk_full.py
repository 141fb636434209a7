"""A file cannot be written: in the thread that called, or in one of its workers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ckptstore
from benchmarks.faults.scenes import (
    NEW,
    Fault,
    Row,
    attempt,
    dcp,
    dcp_load,
    disk_full_for_workers,
    no_space,
    our_load,
    state,
    thread_errors,
)

TITLE = "The disk is full"


def run(folder: Path) -> Fault:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    for_all = partial(mock.patch, "os.fsync", no_space)
    for_workers = partial(disk_full_for_workers, meet=True)
    our_facts = {
        "all": _ours(folder / "store-all", for_all()),
        "workers": _ours(folder / "store-workers", disk_full_for_workers(meet=False)),
    }
    rows = []
    for key, peer, writer, fails in (
        ("disk-full-dcp", "DCP, its defaults (one thread)", dcp().FileSystemWriter, for_all),
        ("disk-full-dcp-worker", "DCP, `thread_count=2`, for the worker thread", dcp().FileSystemWriter, for_workers),
        ("disk-full-fsspec-worker", "the same with `FsspecWriter`", FsspecWriter, for_workers),
    ):
        path, threads = folder / key, 1 if fails is for_all else 2
        facts = _dcp(path, partial(writer, str(path), thread_count=threads), fails())
        ours = our_facts["all" if fails is for_all else "workers"]
        rows.append(Row(key, peer, _text(facts), _our_text(ours), facts, ours))
    return Fault(TITLE, rows)


def _dcp(path: Path, make_writer: Callable[[], Any], disk_full: AbstractContextManager[Any]) -> dict[str, Any]:
    with thread_errors() as printed, disk_full:
        saved = attempt(lambda: dcp().save(state(NEW), storage_writer=make_writer()))
    return {
        "raised": saved.error_name,
        "printed": printed,
        "looks_committed": (path / ".metadata").exists(),
        "load": dcp_load(path),
    }


def _text(facts: dict[str, Any]) -> str:
    looks = "`.metadata` is there" if facts["looks_committed"] else "there is no `.metadata`"
    if facts["raised"]:
        return f"`dcp.save` raised; {looks}"
    printed = f"the thread's {facts['printed'][0]} was printed on stderr" if facts["printed"] else "nothing was printed"
    return f"`dcp.save` returned as if all were well; {printed}; {looks}; loading gives {facts['load']}"


def _ours(place: Path, disk_full: AbstractContextManager[Any]) -> dict[str, Any]:
    store = ckptstore.Store(place)
    with disk_full:
        saved = attempt(lambda: store.run("peers").save(state(NEW), step=NEW))
    steps = store.run("peers").steps()
    return {
        "raised": saved.error_name,
        "says_why": "The disk is full" in str(saved.error),
        "steps": steps,
        "load": our_load(store) if steps else "",
    }


def _our_text(facts: dict[str, Any]) -> str:
    if not facts["raised"]:
        return f"`run.save` returned; loading gives {facts['load']}"
    says = ", which says why" if facts["says_why"] else ""
    return f"`run.save` raised{says}; there is {'a' if facts['steps'] else 'no'} checkpoint"
