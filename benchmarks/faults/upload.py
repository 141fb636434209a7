"""An upload through a file object that breaks off, over the last good object."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import ckptstore
from benchmarks.faults.scenes import NEW, OLD, Fault, Row, any_of, attempt, dcp, empty_state, loads, our_load, state
from ckptstore.objects.open import open_objects
from ckptstore.testing import FailingObjects

TITLE = "An upload to S3 over the last good object breaks off"
ENOUGH = 1_000_000


def run(_: Path) -> Fault:
    from tests.servers import running_moto

    with running_moto() as server:
        place = Bucket(f"s3://{server.new_bucket()}", server.storage_options)
        unsavable, interrupted = _ours_unsavable(place), _ours_interrupted(place)
        rows = []
        for key, peer, save, ours in (
            (
                "upload-unpicklable",
                "`with fsspec.open(…) as f: torch.save(…, f)`; a lambda in the state",
                _lambda,
                unsavable,
            ),
            ("upload-interrupted", "the same; Ctrl-C midway", _interrupted, interrupted),
            ("upload-transaction", "the same within `with fs.transaction:`", _transaction, interrupted),
        ):
            facts = _torch(place, save)
            rows.append(Row(key, peer, _text(facts), _our_text(ours), facts, ours))
        facts = _dcp(place)
        peer = "DCP, `FsspecWriter`, the same prefix; Ctrl-C midway"
        rows.append(Row("upload-dcp", peer, _text(facts), _our_text(interrupted), facts, interrupted))
    return Fault(TITLE, rows)


class Bucket:
    """An empty bucket, and how to reach it."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url, self.options = url, options

    def file_system(self) -> Any:
        import fsspec

        return fsspec.filesystem("s3", **self.options)


def _text(facts: dict[str, Any]) -> str:
    return f"{'the save raised' if facts['raised'] else 'the save returned'}; loading gives {facts['load']}"


def _our_text(facts: dict[str, Any]) -> str:
    if isinstance(facts["load"], str):
        return _text(facts)
    return f"Ctrl-C at each request in turn: loading gives {any_of(facts['load'])}"


@contextlib.contextmanager
def ctrl_c_midway() -> Iterator[None]:
    """Ctrl-C comes while the second tensor is written to a file object."""
    from fsspec.spec import AbstractBufferedFile

    real, written = AbstractBufferedFile.write, []

    def write(self: Any, content: Any) -> Any:
        written.append(len(content))
        if sum(written) > ENOUGH:
            raise KeyboardInterrupt
        return real(self, content)

    with mock.patch.object(AbstractBufferedFile, "write", write):
        yield


def _torch(place: Bucket, save: Callable[[Bucket, str], None]) -> dict[str, Any]:
    import fsspec

    url = f"{place.url}/latest.pt"
    _save(place, url, state(OLD))
    saved = attempt(lambda: save(place, url))

    def load() -> Any:
        with fsspec.open(url, "rb", **place.options) as file:
            return torch.load(file)

    return {"raised": saved.error_name, "load": loads(load)}


def _save(place: Bucket, url: str, what: dict[str, Any]) -> None:
    import fsspec

    with fsspec.open(url, "wb", **place.options) as file:
        torch.save(what, file)


def _lambda(place: Bucket, url: str) -> None:
    _save(place, url, state(NEW) | {"schedule": lambda step: 0.1})


def _interrupted(place: Bucket, url: str) -> None:
    with ctrl_c_midway():
        _save(place, url, state(NEW))


def _transaction(place: Bucket, url: str) -> None:
    fs = place.file_system()
    with ctrl_c_midway(), fs.transaction, fs.open(url, "wb") as file:
        torch.save(state(NEW), file)


def _dcp(place: Bucket) -> dict[str, Any]:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    url = f"{place.url}/dcp"

    def save(step: int) -> None:
        dcp().save(state(step), storage_writer=FsspecWriter(url, **place.options))

    def load() -> Any:
        into = empty_state()
        dcp().load(into, storage_reader=FsspecReader(url, **place.options))
        return into

    save(OLD)
    with ctrl_c_midway():
        saved = attempt(lambda: save(NEW))
    files = sorted(Path(name).name for name in place.file_system().ls(url, detail=False, refresh=True))
    return {"raised": saved.error_name, "load": loads(load), "files": files}


def _ours_unsavable(place: Bucket) -> dict[str, Any]:
    store = ckptstore.Store(f"{place.url}/ours-lambda", place.options)
    store.run("peers").save(state(OLD), step=OLD)
    what = state(NEW) | {"schedule": lambda step: 0.1}
    saved = attempt(lambda: store.run("peers").save(what, step=OLD, replace=True))
    return {"raised": saved.error_name, "load": our_load(store)}


def _ours_interrupted(place: Bucket) -> dict[str, Any]:
    """There is no file object to break: each request in turn is the one that Ctrl-C comes in."""
    loaded = []
    for number in range(1, 1000):
        url = f"{place.url}/ours-{number}"
        ckptstore.Store(url, place.options).run("peers").save(state(OLD), step=OLD)
        failing = FailingObjects(open_objects(url, place.options), fail_at=number, error=KeyboardInterrupt)
        saved = attempt(lambda broken=failing: _our_save(broken))  # type: ignore[misc]
        if not failing.failed:
            break
        assert isinstance(saved.error, KeyboardInterrupt), saved
        loaded.append(our_load(ckptstore.Store(url, place.options)))
    return {"raised": "KeyboardInterrupt", "load": loaded}


def _our_save(objects: FailingObjects) -> None:
    ckptstore.Store(objects).run("peers").save(state(NEW), step=OLD, replace=True)
