"""Bad input and bad places: one clear error each, with what to do, and nothing changed."""

import enum
import errno
import os
import socket
import subprocess
import sys
import uuid
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptstore
from ckptstore.format import BLOCK_FORMAT_VERSION, MARKER_KEY, new_save_id
from ckptstore.objects.base import Objects
from ckptstore.objects.local import LocalObjects
from ckptstore.objects.memory import MemoryObjects
from ckptstore.objects.open import open_objects
from ckptstore.sealed import seal


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


Pair = namedtuple("Pair", "a b")


@dataclass
class Config:
    rate: float = 0.1


class Color(enum.IntEnum):
    RED = 1


def generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("leaf", "way_out"),
    [
        (lambda: 1, "give it state_dict"),
        (torch.nn.ReLU, "give it state_dict"),
        (Pair(1, 2), r"ckptstore\.register\(Pair"),
        (Config(), r"ckptstore\.register\(Config"),
        (Color.RED, r"save its \.name or its \.value"),
        (generator(), r"save list\(…\)"),
        (torch.eye(3).to_sparse(), r"\.to_dense\(\)"),
        (torch.empty(3, device="meta"), "materialise"),
        (torch.Generator(), r"get_state\(\).*RngState"),
        (np.random.default_rng(), r"bit_generator\.state"),
        (object(), r"ckptstore\.register"),
        (Path("x"), r"ckptstore\.register|str"),
    ],
    ids=lambda value: getattr(type(value), "__name__", "") if not isinstance(value, str) else "",
)
def test_an_unsupported_leaf_is_named_with_a_way_out_before_a_byte_is_written(
    place: Objects, leaf: Any, way_out: str
) -> None:
    run = ckptstore.Store(place).run("run")
    with pytest.raises(ckptstore.InvalidInputError, match=way_out) as caught:
        run.save({"optimizer": {"param_groups": [{"foo": leaf}]}}, step=1)
    assert "optimizer.param_groups[0].foo" in str(caught.value)
    assert place.list("") == []


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/a", "", "a b", ".hidden", "-x", "a" * 129, "é", "a\n", 7, None])
def test_a_run_name_that_could_leave_its_place(place: Objects, name: Any) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="cannot be the name of a run: use 1 to 128 letters"):
        ckptstore.Store(place).run(name)


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, "1", None, True, torch.ones(2)])
def test_a_step_that_is_none(place: Objects, step: Any) -> None:
    run = ckptstore.Store(place).run("run")
    for call in (lambda: run.save({}, step=step), lambda: run.save_async({}, step=step), lambda: run.delete(step)):
        with pytest.raises(ckptstore.InvalidInputError, match="step must"):
            call()
    assert place.list("") == []


def test_a_tensor_or_numpy_integer_is_a_step(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    assert run.save({"x": 1}, step=torch.tensor(3)).step == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("metrics", [{"loss": torch.ones(2)}, {1: 2.0}, [1.0], {"f": print}])
def test_metrics_that_are_not_small_values(place: Objects, metrics: Any) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="metrics"):
        ckptstore.Store(place).run("run").save({}, step=1, metrics=metrics)
    assert place.list("") == []


@pytest.mark.parametrize("url", ["", "nosuch://x", "s3:/bucket/x", "s3://", "file://", "http://user:pw@host"])
def test_a_place_that_is_none(url: str) -> None:
    with pytest.raises(ckptstore.CheckpointError):
        ckptstore.Store(url).run("run").save({"x": 1}, step=1)


def reads(store: ckptstore.Store) -> list[Callable[[], object]]:
    run = store.run("run")
    return [run.load, lambda: run.load(3), run.checkpoint, store.verify, store.usage, lambda: run.delete(1)]


def test_a_place_without_a_store_is_not_found_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    for folder in ("photos", "absent"):
        store = ckptstore.Store(tmp_path / folder)
        for call in reads(store):
            with pytest.raises(ckptstore.NotFoundError, match="is not a ckptstore store, or nothing was ever saved"):
                call()
        assert store.run("run").restore({"x": torch.zeros(1)}) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.jpg"]


@pytest.mark.parametrize("folder", ["ckpts", "ckpts/below"])
def test_a_link_to_a_disk_that_is_not_mounted_is_never_a_first_start(tmp_path: Path, folder: str) -> None:
    (tmp_path / "ckpts").symlink_to(tmp_path / "not-mounted" / "ckpts")
    run = ckptstore.Store(tmp_path / folder).run("run")
    for call in (lambda: run.restore({}), run.latest, run.steps, lambda: run.save({"x": 1}, step=1)):
        with pytest.raises(ckptstore.UnavailableError, match=r"is a link to .*not-mounted.* Mount that disk"):
            call()


def test_a_place_where_no_folder_can_be_made() -> None:
    with pytest.raises(ckptstore.UnavailableError, match="cannot create /proc/ckptstore"):
        ckptstore.Store("/proc/ckptstore/x").run("run").save({"x": 1}, step=1)


def test_a_run_that_is_not_there(place: Objects) -> None:
    store = ckptstore.Store(place)
    store.run("other").save({"x": 1}, step=1)
    for call in (store.run("run").load, store.run("run").checkpoint, lambda: store.verify("run")):
        with pytest.raises(ckptstore.NotFoundError, match="there is no run 'run'"):
            call()
    assert store.run("run").restore({}) is None


def test_a_store_of_a_newer_version_is_left_alone(place: Objects) -> None:
    newer = seal(b'{"format":2,"kind":"ckptstore","what":"nobody knows"}')
    place.put(MARKER_KEY, newer)
    store = ckptstore.Store(place)
    run = store.run("run")
    calls = [*reads(store), lambda: run.save({"x": 1}, step=1), lambda: run.restore({}), run.latest]
    for call in calls:
        with pytest.raises(ckptstore.UnsupportedFormatError, match=r"format version 2.*newer ckptstore"):
            call()
    assert [row.key for row in place.list("")] == [MARKER_KEY]


def test_a_checkpoint_of_a_newer_version_is_an_error_and_no_reason_to_go_back(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.ones(2)}, step=1)
    key = f"runs/run/{2:020d}.{new_save_id()}.json"
    put_newer = seal(b'{"format":%d,"state":"committed"}' % (BLOCK_FORMAT_VERSION + 1), min_bytes=1024)
    place.put(key, put_newer)
    for call in (run.load, run.latest, lambda: run.restore({"x": torch.zeros(2)})):
        with pytest.raises(ckptstore.UnsupportedFormatError, match="newer ckptstore"):
            call()


def test_a_damaged_marker_keeps_saves_away_and_restores_going(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.ones(2)}, step=1)
    marker = place.get(MARKER_KEY) or b""
    place.put(MARKER_KEY, marker[:-10])
    with pytest.raises(ckptstore.CorruptError, match=MARKER_KEY):
        run.save({"x": torch.zeros(2)}, step=2)
    with pytest.warns(ckptstore.CheckpointWarning, match=MARKER_KEY):
        assert run.restore({"x": torch.zeros(2)}) is not None


def test_a_lost_marker_is_made_again_by_the_next_save(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.ones(2)}, step=1)
    place.delete(MARKER_KEY)
    with pytest.warns(ckptstore.CheckpointWarning, match=r"no ckptstore.json"):
        assert run.restore({"x": torch.zeros(2)}) is not None
    run.save({"x": torch.zeros(2)}, step=2)
    assert ckptstore.Store(place).verify().ok
    assert run.steps() == [1, 2]


def test_a_backend_without_exclusive_create_is_refused_before_the_store_is_made() -> None:
    class Careless(MemoryObjects):
        def create(self, key: str, content: Any) -> bool:
            self.put(key, content)
            return True

    place = Careless(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(ckptstore.UnavailableError, match="a second create of one key succeeds"):
        ckptstore.Store(place).run("run").save({"x": 1}, step=1)
    assert place.list("") == []


def test_an_unreachable_bucket_is_never_a_first_start() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        options = {
            "key": "k",
            "secret": "hush-hush",
            "endpoint_url": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "config_kwargs": {"connect_timeout": 1, "retries": {"max_attempts": 0}},
        }
        store = ckptstore.Store("s3://bucket/prefix", options)
        run = store.run("run")
        calls = [lambda: run.restore({}), run.latest, run.steps, run.load, lambda: run.save({"x": 1}, step=1)]
        for call in calls:
            with pytest.raises(ckptstore.UnavailableError, match=r"s3://bucket/prefix.* Check the network") as caught:
                call()  # type: ignore[no-untyped-call]
            assert "hush" not in str(caught.value)


AS_NOBODY = """
import os, sys, torch, ckptstore
first = ckptstore.Store("memory://first").run("run")  # imports everything that may not be readable afterwards
first.save({"x": torch.zeros(2)}, step=1); first.restore({"x": torch.zeros(2)})
os.setgid(65534); os.setuid(65534)
run = ckptstore.Store(sys.argv[1]).run("run")
for call in (lambda: run.save({"x": torch.zeros(2)}, step=2), lambda: run.restore({"x": torch.zeros(2)})):
    try:
        print("done", call())
    except ckptstore.UnavailableError as error:
        print("unavailable", error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user; without it see the test below")
@pytest.mark.parametrize(("mode", "readable"), [(0o755, True), (0o700, False)])
def test_a_folder_of_another_user(tmp_path: Path, mode: int, readable: bool) -> None:
    root = Path("/tmp") / f"ckptstore-{uuid.uuid4().hex}"  # below tmp_path nobody else may look
    try:
        ckptstore.Store(root).run("run").save({"x": torch.ones(2)}, step=1)
        for path in (root, *root.rglob("*")):
            path.chmod(mode if path.is_dir() else 0o644)
        before = sorted(root.rglob("*"))
        child = [sys.executable, "-c", AS_NOBODY, str(root)]
        lines = subprocess.run(child, capture_output=True, text=True, check=True).stdout.splitlines()
        assert lines[0].startswith("unavailable cannot")
        assert "Check who owns this folder and its permissions" in lines[0]
        assert lines[1].startswith("done <Checkpoint run@1" if readable else "unavailable cannot")
        assert sorted(root.rglob("*")) == before
    finally:
        subprocess.run(["rm", "-rf", str(root)], check=True)


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EACCES, "permissions"), (errno.ENOSPC, "full"), (errno.EROFS, "read-only")]
)
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str) -> None:
    place = LocalObjects(tmp_path / "store")
    run = ckptstore.Store(place).run("run")
    run.save({"x": torch.ones(2)}, step=1)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(ckptstore.UnavailableError, match=advice) as caught:
            run.save({"x": torch.zeros(2)}, step=2)
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files
    assert run.save({"x": torch.zeros(2)}, step=2).step == 2


def test_the_tree_of_errors_is_the_documented_one() -> None:
    bases = {
        name: [base.__name__ for base in kind.__bases__]
        for name, kind in vars(ckptstore).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert bases == {
        "CheckpointError": ["Exception"],
        "InvalidInputError": ["CheckpointError", "ValueError"],
        "NotFoundError": ["CheckpointError", "LookupError"],
        "ConflictError": ["CheckpointError"],
        "CorruptError": ["CheckpointError"],
        "MissingChunkError": ["CorruptError"],
        "UnsupportedFormatError": ["CheckpointError"],
        "FencedError": ["CheckpointError"],
        "UnavailableError": ["CheckpointError"],
        "CheckpointWarning": ["UserWarning"],
    }
