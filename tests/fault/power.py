"""Power losses: what a disk was asked to do, call by call, and all that it may be found to hold after a power loss.

`RecordingOs` takes the place of `os` in ckptstore/objects/local.py, does what it is asked, and remembers each call
that changes a file or a folder. `Disk` is told these calls one by one and says, after each, which trees of files could
be found if the power went now.

The file system that is assumed. It promises what POSIX does and what ext4 and XFS keep, with delayed allocation, and
nothing beyond; it is worse than any of them is:

- A file's bytes are safe once the file was fsynced. Until then each of these may be found: none of them, half of them,
  all of them, or zeros in their place. A fsync of the file says nothing about its name.
- A name (made by open, link, rename or mkdir, or taken away by unlink or rename) is safe once the folder that holds it
  was fsynced. Until then each change of a name has happened or has not, by itself and in any order: the rename before
  the bytes of what is renamed, a later change without an earlier one. A rename is one change: the old name does not go
  without the new one's coming. A fsync of the folder says nothing about the bytes of the files in it.
- A folder whose own name is lost is lost with all that is in it, however well that was fsynced.
- What was fsynced stays as it was: no torn sectors and no flipped bits. Such damage is for test_damage.py.
"""

# It stands in for os, so it calls os; pathlib has none of the descriptors.
# ruff: noqa: PTH102, PTH105, PTH108, PTH116, PTH119, PTH120

import itertools
import math
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Disk", "Event", "Named", "RecordingOs", "SyncedFile", "SyncedFolder", "Tree", "Wrote", "seen", "write_tree"]

SMALL = 256
"""Up to so many possible losses are tried one and all; of more, the extremes and a sample."""

TEMPORARY = ".tmp-"

Tree = Mapping[str, tuple[int, bytes] | None]
"""Path below the disk's root -> the number of the file and its bytes; None for a folder. Parents come first."""


@dataclass(frozen=True)
class Named:
    """Names in one folder changed, all of them or none: name -> the number of the file, "folder", or None: gone."""

    folder: str
    names: tuple[tuple[str, int | str | None], ...]
    text: str


@dataclass(frozen=True)
class Wrote:
    """Bytes were added to the end of a file."""

    file: int
    content: bytes


@dataclass(frozen=True)
class SyncedFile:
    """A file was fsynced."""

    file: int


@dataclass(frozen=True)
class SyncedFolder:
    """A folder was fsynced."""

    folder: str


Event = Named | Wrote | SyncedFile | SyncedFolder

READS = {"fspath", "fstat", "path", "read", "readlink", "scandir", "sep", "stat", "strerror"}
"""What local.py may use beside the calls below and the constants: it changes nothing."""


class RecordingOs:
    """Stands in for the module `os`, below the folder `root`; what was there before is taken to be safe.

    Really fsyncs nothing, as what matters is what was asked for. `before`, if it is set, is called before each call
    that would be recorded, with the number of those so far; it may make such calls itself, for which it is not called.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.events: list[Event] = []
        self.before: Callable[[int], None] | None = None
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self.opened: dict[int, int | str] = {}
        self.files: dict[str, int] = {}
        self.start = self._look()

    def __getattr__(self, name: str) -> Any:
        if name in READS or name.isupper() or name.startswith("O_"):
            return getattr(os, name)
        raise AssertionError(
            f"local.py uses os.{name}, which tests/fault/power.py does not know: teach it what it does"
        )

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if not flags & os.O_CREAT:
            descriptor = os.open(path, flags, mode)
            if flags & os.O_DIRECTORY:
                self.opened[descriptor] = self._inside(path)
            return descriptor
        with self._recording():
            descriptor = os.open(path, flags, mode)
            self.files[path] = self.opened[descriptor] = next(self._numbers)
            self._name("create", path, self.files[path])
            return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        with self._recording():
            length = os.write(descriptor, content)
            file = self.opened[descriptor]
            assert isinstance(file, int)
            self.events.append(Wrote(file, bytes(content[:length])))
            return length

    def fsync(self, descriptor: int) -> None:
        with self._recording():
            what = self.opened[descriptor]
            self.events.append(SyncedFile(what) if isinstance(what, int) else SyncedFolder(what))

    def close(self, descriptor: int) -> None:
        self.opened.pop(descriptor, None)
        os.close(descriptor)

    def link(self, source: str, target: str) -> None:
        with self._recording():
            os.link(source, target)
            self.files[target] = self.files[source]
            self._name("link", target, self.files[source])

    def replace(self, source: str, target: str) -> None:
        assert os.path.dirname(source) == os.path.dirname(target), "the model knows renames within a folder only"
        with self._recording():
            os.replace(source, target)
            self.files[target] = self.files.pop(source)
            folder, old = self._inside(source).rsplit("/", 1)
            new = os.path.basename(target)
            names = ((old, None), (new, self.files[target]))
            self.events.append(Named(folder, names, f"rename {folder}/{old} to {new}"))

    def unlink(self, path: str) -> None:
        with self._recording():
            os.unlink(path)
            del self.files[path]
            self._name("unlink", path, None)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        with self._recording():
            os.mkdir(path, mode)
            self._name("mkdir", path, "folder")

    def _recording(self) -> threading.RLock:
        hook, self.before = self.before, None
        if hook is not None:
            try:
                hook(len(self.events))
            finally:
                self.before = hook
        return self._lock

    def _name(self, what: str, path: str, value: int | str | None) -> None:
        folder, name = self._inside(path).rsplit("/", 1)
        self.events.append(Named(folder, ((name, value),), f"{what} {folder}/{name}"))

    def _inside(self, path: str) -> str:
        """The path below the root, with a slash in front; of what is above the root, which is safe, only dots."""
        if path == self.root or not path.startswith(f"{self.root}/"):
            return "" if path == self.root else f"../{path}"
        return path[len(self.root) :]

    def _look(self) -> "Disk":
        disk = Disk()
        files: list[tuple[float, str]] = []
        for above, folders, names in os.walk(self.root):
            inside = self._inside(above)
            disk.safe[inside] = dict.fromkeys(folders, "folder")
            files += [(os.stat(f"{above}/{name}").st_mtime, f"{above}/{name}") for name in names]
        for _, path in sorted(files):  # the numbers tell what is newer
            number = self.files[path] = next(self._numbers)
            folder, name = self._inside(path).rsplit("/", 1)
            disk.safe[folder][name] = number
            disk.written[number] = disk.synced[number] = Path(path).read_bytes()
        return disk


FATES: tuple[Callable[[bytes, bytes], bytes], ...] = (
    lambda safe, rest: safe,
    lambda safe, rest: safe + rest,
    lambda safe, rest: safe + bytes(len(rest)),
    lambda safe, rest: safe + rest[: len(rest) // 2],
)
"""What becomes of bytes that were written and not fsynced: the first two are all lost and all kept."""


@dataclass
class Disk:
    """What is safe, and what is under way, after a number of calls."""

    safe: dict[str, dict[str, int | str]] = field(default_factory=dict)
    pending: list[Named] = field(default_factory=list)
    synced: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)

    def apply(self, event: Event) -> None:
        """Go on by one call."""
        match event:
            case Named():
                self.pending.append(event)
            case Wrote(file, content):
                self.written[file] = self.written.get(file, b"") + content
            case SyncedFile(file):
                self.written.setdefault(file, b"")
                self.synced[file] = self.written[file]
            case SyncedFolder(folder):
                for change in self.pending:
                    if change.folder == folder:
                        _rename(self.safe.setdefault(folder, {}), change)
                self.pending = [change for change in self.pending if change.folder != folder]

    def losses(self, chance: random.Random, samples: int) -> Iterator[tuple[str, Tree]]:
        """What may be found after a power loss at this moment, each with a text that says what was lost.

        All that may be, where there is little under way. Else: everything lost, everything kept, each change alone lost
        and alone kept, and `samples` that `chance` chooses.
        """
        open_files = [number for number, content in self.written.items() if self.synced.get(number) != content]
        if math.prod([2] * len(self.pending) + [len(FATES)] * len(open_files)) <= SMALL:
            for kept in itertools.product([True, False], repeat=len(self.pending)):
                for fates in itertools.product(FATES, repeat=len(open_files)):
                    yield self._loss(kept, dict(zip(open_files, fates, strict=True)))
            return
        for fate in FATES:
            same_for_all = dict.fromkeys(open_files, fate)
            for kept_by_most in (True, False):
                yield self._loss([kept_by_most] * len(self.pending), same_for_all)
        for index in range(len(self.pending)):
            for kept_by_most in (True, False):
                alone = [kept_by_most] * len(self.pending)
                alone[index] = not kept_by_most
                yield self._loss(alone, {number: chance.choice(FATES) for number in open_files})
        for _ in range(samples):
            likely = chance.random()
            some = [chance.random() < likely for _ in self.pending]
            yield self._loss(some, {number: chance.choice(FATES) for number in open_files})

    def _loss(
        self, kept: "tuple[bool, ...] | list[bool]", fates: Mapping[int, Callable[[bytes, bytes], bytes]]
    ) -> tuple[str, Tree]:
        folders = {folder: dict(names) for folder, names in self.safe.items()}
        for change, is_kept in zip(self.pending, kept, strict=True):
            if is_kept:
                _rename(folders.setdefault(change.folder, {}), change)
        tree: dict[str, tuple[int, bytes] | None] = {}
        self._walk(folders, "", fates, tree)
        lost = [change.text for change, is_kept in zip(self.pending, kept, strict=True) if not is_kept]
        return f"lost: {', '.join(lost) or 'no name'}", tree

    def _walk(
        self,
        folders: dict[str, dict[str, int | str]],
        folder: str,
        fates: Mapping[int, Callable[[bytes, bytes], bytes]],
        tree: dict[str, tuple[int, bytes] | None],
    ) -> None:
        for name, value in folders.get(folder, {}).items():
            path = f"{folder}/{name}"
            if isinstance(value, int):
                safe, written = self.synced.get(value, b""), self.written.get(value, b"")
                content = fates[value](safe, written[len(safe) :]) if value in fates else safe
                tree[path] = value, content
            else:
                tree[path] = None
                self._walk(folders, path, fates, tree)


def _rename(names: dict[str, int | str], change: Named) -> None:
    for name, value in change.names:
        if value is None:
            names.pop(name, None)
        else:
            names[name] = value


def seen(tree: Tree) -> frozenset[tuple[str, bytes | None]]:
    """What tells two trees apart: not unfinished files, which no listing shows, nor folders without a file."""
    return frozenset(
        (path, found[1])
        for path, found in tree.items()
        if found is not None and not os.path.basename(path).startswith(TEMPORARY)
    )


def write_tree(tree: Tree, root: Path) -> None:
    """Make the files and folders of `tree` below `root`; those made later are newer, by their times."""
    root.mkdir()
    for path, found in tree.items():
        place = f"{root}{path}"
        if found is None:
            os.mkdir(place, 0o700)
        else:
            number, content = found
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, content)
            os.close(descriptor)
            os.utime(place, (10**9 + number, 10**9 + number))
