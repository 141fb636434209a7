"""A disk that fails under a save, a delete or a restore, at every call there is: full, read-only, broken, out of reach.

Two kinds of tests. In the first, any call that objects/local.py makes fails, one after the other: the first, the
second, ... In the second nothing is pretended: a process of its own meets a file system that is really full, or really
read-only, or a real limit of its own.

After each failure: the action has returned and what it did holds, or it has raised an UnavailableError that says what
to do; the earlier checkpoints are sound; nothing half done is left; and once the failure is over the same action works.
"""

# The calls of os that objects/local.py makes are what this is about.
# ruff: noqa: PTH102, PTH105, PTH108, PTH116

import contextlib
import errno
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore.objects import local
from ckptstore.objects.local import LocalObjects

MEMORY = Path("/dev/shm")
REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534

READING = {"open", "fstat", "read", "close", "scandir", "stat"}
WRITING = {"create", "write", "fsync", "link", "replace", "mkdir"}


def state(seed: int) -> dict[str, Any]:
    """A chunk that every state has, and one that only this one has."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.arange(50, dtype=torch.float64),
        "weight": torch.randn(40, generator=generator),
        "step": seed,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


@dataclass(frozen=True)
class Fault:
    """What fails, with which errno, and what the user is told to do about it."""

    number: int
    calls: Collection[str]
    advice: str
    lasting: bool = True
    """Whether every later call of these fails as well, or only the one."""


FAULTS = {
    "full": Fault(errno.ENOSPC, WRITING, "free some space"),
    "quota-for-a-moment": Fault(errno.EDQUOT, WRITING, "free some space or have it raised", lasting=False),
    "read-only": Fault(errno.EROFS, WRITING - {"write", "fsync"} | {"unlink"}, "mount it writable"),
    "failing": Fault(errno.EIO, READING | WRITING | {"unlink"}, "kernel's log"),
    "failing-once": Fault(errno.EIO, READING | WRITING | {"unlink"}, "kernel's log", lasting=False),
    "too-many-files": Fault(errno.EMFILE, {"create", "open", "scandir"}, "ulimit -n"),
    "no-permission": Fault(errno.EACCES, READING - {"read", "close"} | WRITING | {"unlink"}, "who owns this folder"),
}


class WatchedOs:
    """`os` as objects/local.py sees it: each call is counted, told by its kind and its path."""

    def __init__(self) -> None:
        self.count = 0
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def call(self, kind: str, path: str) -> None:
        """Before each call."""
        with self._lock:
            self.count += 1

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        self.call("create" if flags & os.O_CREAT else "open", path)
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = path
        return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        try:
            self.call("write", self._paths[descriptor])
        except OSError:
            os.write(descriptor, content[: len(content) // 2])  # a disk takes what fits
            raise
        return os.write(descriptor, content)

    def fsync(self, descriptor: int) -> None:
        self.call("fsync", self._paths[descriptor])  # nothing here has to survive anything

    def close(self, descriptor: int) -> None:
        os.close(descriptor)  # it is closed, whatever the answer
        self.call("close", self._paths[descriptor])

    def fstat(self, descriptor: int) -> os.stat_result:
        self.call("fstat", self._paths[descriptor])
        return os.fstat(descriptor)

    def read(self, descriptor: int, size: int) -> bytes:
        self.call("read", self._paths[descriptor])
        return os.read(descriptor, size)

    def scandir(self, path: str) -> Any:
        self.call("scandir", path)
        return os.scandir(path)

    def stat(self, path: str) -> os.stat_result:
        self.call("stat", path)
        return os.stat(path)

    def link(self, source: str, target: str) -> None:
        self.call("link", target)
        os.link(source, target)

    def replace(self, source: str, target: str) -> None:
        self.call("replace", target)
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        self.call("unlink", path)
        os.unlink(path)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self.call("mkdir", path)
        os.mkdir(path, mode)


class FaultyOs(WatchedOs):
    """The `fail_at`-th call that the fault is about fails, counted from 1; and the later ones, if it lasts."""

    def __init__(self, fault: Fault, fail_at: int) -> None:
        super().__init__()
        self.failed: list[str] = []
        """What failed: the kind and the path, below the store where it is there."""
        self.is_committing = False
        """Whether it had come to the manifest before anything failed."""
        self._fault = fault
        self._fail_at = fail_at

    def call(self, kind: str, path: str) -> None:
        if kind == "create" and "/runs/" in path and not self.failed:
            self.is_committing = True
        if kind in self._fault.calls:
            super().call(kind, path)
            if self.count == self._fail_at or (self._fault.lasting and self.count > self._fail_at):
                self.failed.append(f"{kind} {path}")
                raise OSError(self._fault.number, os.strerror(self._fault.number), path)


def told(error: ckptstore.UnavailableError, advice: str, number: int | None = None) -> None:
    """It says what to do, and what the system had said is chained."""
    assert advice in str(error), error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    assert cause is not None
    assert number is None or cause.errno == number


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory, where there is such a place. And one call at a time, so that they come in the same order each time."""
    monkeypatch.setattr("ckptstore.verifying.worker_threads", lambda: 1)
    monkeypatch.setattr(LocalObjects, "request_threads", 1)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        yield Path(name)


@contextlib.contextmanager
def using(os_module: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptstore.objects.local.os", os_module)
        yield


class Place:
    """A store with the checkpoints `steps`, none of which shares all with another; copied for each try."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.steps = steps
        self._folder = folder
        self._template = folder / "template"
        self._template.mkdir()
        with using(WatchedOs()):
            for step in steps:
                ckptstore.Store(self._template / "above" / "store", threads=1).run("run").save(state(step), step=step)

    def each(self, fault: Fault) -> Iterator[tuple[FaultyOs, ckptstore.Store]]:
        """A fresh copy of the store with the first call to fail, with the second, ... until none has failed."""
        for fail_at in itertools.count(1):
            root = self._folder / "copy"
            shutil.copytree(self._template, root)
            faulty = FaultyOs(fault, fail_at)
            yield faulty, ckptstore.Store(root / "above" / "store", threads=1)
            shutil.rmtree(root)
            if not faulty.failed:
                return


def nothing_half_done(store: ckptstore.Store, failed: Collection[str] = (), *, is_committing: bool = False) -> None:
    """No session, trial or temporary file is left, but where it could not be removed; and what is there verifies."""
    root = Path(store.url)
    kept = {call.removeprefix("unlink ") for call in failed if call.startswith("unlink ")}
    for path in root.rglob("*"):
        unfinished = path.name.startswith(local.TEMPORARY) or path.parent.name in ("scratch", "sessions")
        if path.is_file() and unfinished and str(path) not in kept:
            # How a commit has ended that failed is not for the save to judge: then its session stays.
            assert is_committing and path.parent.name == "sessions", f"{path} is left"
    if (root / "ckptstore.json").exists():
        report = store.verify()
        assert report.ok, report.damaged


def holds(store: ckptstore.Store, *steps: int, run: str = "run") -> None:
    for step in steps:
        assert same(store.run(run).load(step), state(step)), step


# ---- each call fails


SAVES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "new-step": ((1, 2), {"step": 3}),
    "replace": ((1, 2), {"step": 2, "replace": True}),
    "first": ((), {"step": 3}),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_holds_or_says_why_not_whichever_call_fails(folder: Path, fault: str, save: str) -> None:
    steps, where = SAVES[save]
    errors = 0
    for faulty, store in Place(folder, *steps).each(FAULTS[fault]):
        returned = True
        with using(faulty):
            try:
                store.run("run").save(state(3), **where)
            except ckptstore.UnavailableError as error:
                returned = False
                errors += 1
                told(error, FAULTS[fault].advice, FAULTS[fault].number)
        with using(WatchedOs()):
            nothing_half_done(store, faulty.failed, is_committing=faulty.is_committing and not returned)
            holds(store, *(step for step in steps if step != where["step"]))
            there = store.run("run").steps()
            if returned:
                assert same(store.run("run").load(where["step"]), state(3))
            elif where["step"] in steps:  # the old one, or the new one if that is not known
                assert any(same(store.run("run").load(where["step"]), state(seed)) for seed in (where["step"], 3))
            elif where["step"] in there:
                holds(store, 3)
            store.run("run").save(state(3), **where)
            assert same(store.run("run").load(where["step"]), state(3))
            assert store.run("run").steps() == sorted({*steps, where["step"]})
            assert store.verify().ok
    assert errors > 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_delete_is_done_or_says_why_not_whichever_call_fails(folder: Path, fault: str) -> None:
    errors = 0
    for faulty, store in Place(folder, 1, 2).each(FAULTS[fault]):
        with using(faulty):
            try:
                store.run("run").delete(1)
            except ckptstore.UnavailableError as error:
                errors += 1
                told(error, FAULTS[fault].advice, FAULTS[fault].number)
                returned = False
            else:
                returned = True
        with using(WatchedOs()):
            nothing_half_done(store, faulty.failed)
            holds(store, *store.run("run").steps())
            if not returned and 1 in store.run("run").steps():
                store.run("run").delete(1)
            assert store.run("run").steps() == [2]
            store.run("run").save(state(1), step=1)
            holds(store, 1, 2)
    assert errors > 1


@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if not READING.isdisjoint(fault.calls)])
def test_a_restore_is_right_or_says_why_not_whichever_call_fails(folder: Path, fault: str) -> None:
    errors = 0
    for faulty, store in Place(folder, 1, 2).each(FAULTS[fault]):
        with using(faulty):
            destination = {"weight": torch.zeros(40), "frozen": torch.zeros(50, dtype=torch.float64)}
            try:
                found = store.run("run").restore(destination)
            except ckptstore.UnavailableError as error:
                errors += 1
                told(error, FAULTS[fault].advice, FAULTS[fault].number)
            else:
                assert found is not None and found.step == 2
                assert all(torch.equal(destination[name], state(2)[name]) for name in destination)
        with using(WatchedOs()):
            nothing_half_done(store)
            again = {"weight": torch.zeros(40), "frozen": torch.zeros(50, dtype=torch.float64)}
            found = store.run("run").restore(again)
            assert found is not None and found.step == 2
            assert all(torch.equal(again[name], state(2)[name]) for name in again)
            holds(store, 1, 2)
    assert errors > 3


# ---- nothing pretended: a process of its own meets a real limit


def in_a_process(work: Callable[..., None], *arguments: object, before: str = "") -> None:
    """Run a function of this file in a new process, after a line of shell; what fails there fails here."""
    script = f"from tests.fault import test_disk_faults as tests; tests.{work.__name__}(*{arguments!r})"
    command = [sys.executable, "-c", script]
    if before:
        command = ["unshare", "--mount", "--map-root-user", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error:::ckptstore"}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("walked\n")


def has_own_file_systems() -> bool:
    """Whether a process may mount file systems that only it sees."""
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True).returncode == 0


OWN_FILE_SYSTEM = pytest.mark.skipif(
    not has_own_file_systems(), reason="a file system of one's own takes root or user namespaces"
)
SMALL_DISK = "mount -t tmpfs -o size=512k,nr_inodes=160 none {}"


@dataclass
class Tried:
    """What became of one action under a limit."""

    errors: int = 0
    successes: int = 0

    def save(self, store: ckptstore.Store, advice: str) -> None:
        """Save step 3."""
        try:
            store.run("run").save(state(3), step=3)
        except ckptstore.UnavailableError as error:
            self.errors += 1
            told(error, advice)
        else:
            self.successes += 1

    def afterwards(self, store: ckptstore.Store) -> None:
        """The limit is gone: all is well, and the same save works."""
        assert store.verify().ok
        assert not list(Path(store.url).rglob(f"{local.TEMPORARY}*"))
        store.run("run").save(state(3), step=3)
        assert store.run("run").steps() == [1, 2, 3]
        holds(store, 1, 2, 3)


@contextlib.contextmanager
def a_copy(folder: Path) -> Iterator[ckptstore.Store]:
    """Of a store with two checkpoints."""
    template = folder / "template"
    if not template.exists():
        for step in (1, 2):
            ckptstore.Store(template).run("run").save(state(step), step=step)
    copy = shutil.copytree(template, folder / "copy")
    try:
        yield ckptstore.Store(copy)
    finally:
        shutil.rmtree(copy)


def import_all(folder: Path) -> None:
    """Do everything once, as rooms are imported when they are first needed."""
    with a_copy(folder) as store:
        Tried().afterwards(store)
        store.run("run").restore({"weight": torch.zeros(40)})
        store.run("run").delete(1)


def fill(folder: Path, free_pages: int) -> None:
    """Leave so many pages of the file system free."""
    room = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, room.f_bavail - free_pages) * room.f_bsize))


def use_up(folder: Path, free_inodes: int) -> None:
    """Leave room for so many files and names."""
    (folder / "filler").mkdir()
    for number in range(os.statvfs(folder).f_favail - free_inodes):
        (folder / "filler" / str(number)).touch()


def free_again(folder: Path) -> None:
    filler = folder / "filler"
    if filler.is_dir():
        shutil.rmtree(filler)
    else:
        filler.unlink()


def saves_on_a_disk_with_little_room(folder: str) -> None:
    for use in (fill, use_up):
        tried = Tried()
        for free in itertools.count(0):
            with a_copy(Path(folder)) as store:
                use(Path(folder), free)
                tried.save(store, "The disk is full: free some space")
                free_again(Path(folder))
                tried.afterwards(store)
            if tried.successes:
                break
        assert tried.errors >= 3, tried
    print("walked")


@OWN_FILE_SYSTEM
def test_a_small_disk_that_has_room_for_nothing_for_one_page_or_file_more_for_two_more(tmp_path: Path) -> None:
    in_a_process(saves_on_a_disk_with_little_room, str(tmp_path), before=SMALL_DISK.format(tmp_path))


class LosingOs(WatchedOs):
    """Before the call `at`, the disk changes in earnest."""

    def __init__(self, at: int, change: Callable[[], object]) -> None:
        super().__init__()
        self._at = at
        self._change = change

    def call(self, kind: str, path: str) -> None:
        super().call(kind, path)
        if self.count == self._at:
            self._change()


def remounted(folder: str, how: str) -> None:
    """Busy, as long as a file is open for writing: then it is not done, and the save is none the worse."""
    subprocess.run(["mount", "-o", f"remount,{how}", folder], capture_output=True, check=False)


def saves_and_deletes_on_a_disk_that_becomes_read_only(folder: str) -> None:
    tried = Tried()
    for at in itertools.count(1):
        with a_copy(Path(folder)) as store:
            losing = LosingOs(at, lambda: remounted(folder, "ro"))
            with using(losing):
                tried.save(store, "mounted read-only")
                errors = 0
                try:
                    store.run("run").delete(1)
                except ckptstore.UnavailableError as error:
                    told(error, "mounted read-only", errno.EROFS)
                    errors += 1
                restored = store.run("run").restore({"weight": torch.zeros(40)}, step=2)  # reading needs no more
                assert restored is not None
            remounted(folder, "rw")
            if errors:
                holds(store, 1)
                for path in Path(store.url).rglob(f"{local.TEMPORARY}*"):
                    path.unlink()  # what could not be unlinked then
                tried.afterwards(store)
            holds(store, 2)
            if losing.count < at:
                break
    assert tried.errors > 10, tried
    assert tried.successes > 3, tried
    print("walked")


@OWN_FILE_SYSTEM
def test_a_disk_that_becomes_read_only_before_any_call(tmp_path: Path) -> None:
    in_a_process(saves_and_deletes_on_a_disk_that_becomes_read_only, str(tmp_path), before=SMALL_DISK.format(tmp_path))


def saves_with_a_limit_of_the_size_of_files(folder: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    tried = Tried()
    for limit in range(0, 8192, 128):
        with a_copy(Path(folder)) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            tried.save(store, "ulimit -f")
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            tried.afterwards(store)
        if tried.successes:
            break
    assert tried.errors > 3 and tried.successes, tried
    print("walked")


def test_saves_under_a_limit_of_the_size_of_files(folder: Path) -> None:
    in_a_process(saves_with_a_limit_of_the_size_of_files, str(folder))


def everything_with_few_descriptors(folder: str) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    import_all(Path(folder))  # an import needs descriptors too
    tried = Tried()
    for free in itertools.count(0):
        with a_copy(Path(folder)) as store:
            used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())  # of the listing itself as well
            spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(used)]  # no gaps are left below the limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1 + free, most))
            tried.save(store, "raise `ulimit -n`")
            for action in (lambda: store.run("run").restore({"weight": torch.zeros(40)}), store.run("run").steps):
                try:
                    assert action()
                except ckptstore.UnavailableError as error:
                    told(error, "raise `ulimit -n`", errno.EMFILE)
                    assert free < 8
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
            for descriptor in spare:
                os.close(descriptor)
            tried.afterwards(store)
        if tried.successes:
            break
    assert tried.errors, tried
    print("walked")


def test_with_too_few_descriptors(folder: Path) -> None:
    in_a_process(everything_with_few_descriptors, str(folder))


def saves_that_lose_their_permission(folder: str) -> None:
    if os.geteuid() == 0:  # whom no mode keeps out
        os.chown(folder, NOBODY, NOBODY)
        import_all(Path(folder))
        shutil.rmtree(Path(folder) / "template")
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    for mode in (0o500, 0o000):  # the right to write, the right to read as well
        tried = Tried()
        for at in itertools.count(1):
            with a_copy(Path(folder)) as store:
                folders = [Path(store.url), *(path for path in Path(store.url).rglob("*") if path.is_dir())]
                losing = LosingOs(at, partial(change_modes, folders[::-1], mode))
                with using(losing):
                    tried.save(store, "Check who owns this folder and its permissions")
                change_modes(folders, 0o700)
                for path in Path(store.url).rglob(f"{local.TEMPORARY}*"):
                    path.unlink()  # what could not be unlinked then
                tried.afterwards(store)
                if losing.count < at:
                    break
        assert tried.errors > 10, tried
    print("walked")


def change_modes(folders: Sequence[Path], mode: int) -> None:
    for folder in folders:
        folder.chmod(mode)


def test_a_permission_that_is_lost_before_any_call(folder: Path) -> None:
    in_a_process(saves_that_lose_their_permission, str(folder))
