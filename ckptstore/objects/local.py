"""Objects as files below one folder of a POSIX file system: temporary file, fsync, then link (create) or rename (put).

Built on `os` calls rather than fsspec, so that each fsync and each errno is ours to handle. A process that is killed
at any moment leaves whole objects and files named `.tmp-…`, which no listing shows.
"""

# Descriptors, exclusive opens and fsync are what this room is about, and pathlib has none of them.
# ruff: noqa: PTH100, PTH102, PTH105, PTH108, PTH112, PTH114, PTH115, PTH116, PTH118, PTH120

import builtins
import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ckptstore.errors import UnavailableError
from ckptstore.format import CHUNKS, CONDEMNED, DELTAS, RUNS, SCRATCH, SESSIONS, TAGS
from ckptstore.objects.base import Bytes, ObjectInfo, Objects

__all__ = ["LocalObjects"]

T = TypeVar("T")

FOLDERS = (RUNS, CHUNKS, DELTAS, SESSIONS, CONDEMNED, TAGS, SCRATCH)
TEMPORARY = ".tmp-"
"""How the names of unfinished files begin."""
OUR_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")
"""Such a name in full. Other programs may keep files in a store's folder too, and theirs are not ours to delete."""
NAMING_TRIES = 3
FILE_MODE = 0o600
FOLDER_MODE = 0o700

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
"""What `link` answers on file systems without hard links (FAT, exFAT, some FUSE and network mounts)."""

NO_FOLDER_FSYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
"""What `fsync` answers for a folder where a file system has nothing to sync there; PostgreSQL passes over them too."""

STALE_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "fuse.rclone", "fuse.s3fs"}
"""Where a machine may see an old listing of a folder for some time."""

ADVICE = {
    errno.ENOSPC: "The disk is full: free some space, then try again.",
    errno.EDQUOT: "Your quota on this disk is used up: free some space or have it raised, then try again.",
    errno.EFBIG: "Files may not be that large here: raise `ulimit -f`, or use another file system.",
    errno.EACCES: "Check who owns this folder and its permissions.",
    errno.EPERM: "Check who owns this folder, its permissions and its attributes.",
    errno.EROFS: "The file system is mounted read-only: mount it writable, or save somewhere else.",
    errno.EIO: "The disk or its connection fails: look at the kernel's log (dmesg) before you trust it again.",
    errno.EMFILE: "This process has too many files open: raise `ulimit -n`.",
    errno.ENFILE: "This machine has too many files open.",
    errno.ESTALE: "The network file system lost this folder: mount it again.",
    errno.ENAMETOOLONG: "Use a shorter path for the store or a shorter name for the run.",
}


class LocalObjects(Objects):
    """The objects below the folder `root`, which the first create or put makes."""

    request_threads = 4
    gets_wait = False
    delete_batch = 64

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Remember where; touches nothing."""
        self._root = os.path.abspath(os.fspath(root))
        self.url = self._root
        # How often this object made the root or a folder above it; and that number when their names were last fsynced.
        self._made_above = 0
        self._anchored_above = -1
        # Keys that this object has created, and not come to make durable; `sync` writes them anew.
        self._doubtful: set[str] = set()
        # Folders whose own names, up to the root, were fsynced by this object; `create` need not do it again.
        self._anchored: set[str] = set()

    def __repr__(self) -> str:
        """Show the folder."""
        return f"LocalObjects({self._root!r})"

    def create(self, key: str, content: Bytes) -> bool:
        """Write a temporary file and link it to its name, which fails if there is one; then fsync the folders."""
        path = self._path(key)
        folder = os.path.dirname(path)
        with self._explained("create", path):
            ours = self._named(folder, content, lambda temporary: self._link(temporary, path))
            if ours:
                # Others may have seen it by now, so it is never taken back. Until this is done it is doubtful whether
                # it survives a power loss, and asking the disk for the same again may hide that it does not.
                self._doubtful.add(key)
                self._anchor(folder)
                _fsync_folder(folder)
                self._doubtful.discard(key)
        return ours

    def put(self, key: str, content: Bytes) -> None:
        """Write a temporary file and rename it; `sync` makes the new name durable."""
        path = self._path(key)
        with self._explained("write", path):
            self._named(os.path.dirname(path), content, lambda temporary: os.replace(temporary, path))

    def get(self, key: str) -> bytes | None:
        """Read the whole file with one open, one fstat and, as a rule, one read."""
        path = self._path(key)
        with self._explained("read", path):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                self._check_root()
                return None
            try:
                return _read_whole(descriptor)
            finally:
                os.close(descriptor)

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Walk the folder of `prefix` and what lies below; names that vanish meanwhile are left out."""
        folder, name_prefix = _split_prefix(prefix)
        with self._explained("list", os.path.join(self._root, folder)):
            rows = list(self._rows(folder, name_prefix))
        rows.sort(key=lambda row: row.key)
        return rows

    def children(self, prefix: str) -> builtins.list[str]:
        """Name the folders directly below `prefix` that hold a file at any depth."""
        folder, name_prefix = _split_prefix(prefix)
        if name_prefix:
            raise ValueError(f"the prefix {prefix!r} must be empty or end in '/'")
        with self._explained("list", os.path.join(self._root, folder)):
            return sorted(
                entry.name
                for entry in self._entries(folder)
                if entry.is_dir() and self._holds_file(folder + entry.name)
            )

    def delete(self, key: str) -> None:
        """Unlink the file; its folder stays, as another writer may be about to use it."""
        path = self._path(key)
        with self._explained("delete", path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except NotADirectoryError:
                self._check_root()

    def delete_many(self, keys: Sequence[str]) -> None:
        """Unlink the files; then fsync their folders, so that none comes back."""
        super().delete_many(keys)
        for folder in sorted({os.path.dirname(self._path(key)) for key in keys}):
            with self._explained("sync", folder), contextlib.suppress(FileNotFoundError):
                _fsync_folder(folder)

    def leftovers(self, older_than: float, *, remove: bool) -> builtins.list[str]:
        """Find temporary files of writers that died; one that lives after all cannot give its file a name any more."""
        with self._explained("tidy up", self._root):
            now = self._file_time() if remove else time.time()
            found = [each for folder in ("", *FOLDERS) for each in self._temporary_files(folder)]
            old = [path for path, modified in found if now - modified > older_than]
            for path in old if remove else ():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return sorted(os.path.relpath(path, self._root) for path in old)

    def stale_listings(self) -> str:
        """Tell network file systems by the table of mounts."""
        kind = _file_system(os.path.realpath(self._root))
        if kind not in STALE_FILE_SYSTEMS:
            return ""
        return f"{self._root} lies on a file system of type {kind}, which may keep a listing of a folder for a minute"

    def sync(self, keys: Iterable[str]) -> None:
        """Fsync the folder of each key and every folder above it up to the root, each once; then the root's name."""
        asked = list(keys)
        doubtful = self._doubtful.intersection(asked)
        for key in doubtful:
            content = self.get(key)
            if content is not None:
                self.put(key, content)  # the same again, so that the fsync below has something to do
        wanted = {os.path.dirname(self._path(key)) for key in asked}
        if not wanted:
            return
        folders = {self._root}
        for folder in wanted:
            while folder not in folders:
                folders.add(folder)
                folder = os.path.dirname(folder)
        # The deepest first: a name never becomes durable before the folder it leads to.
        for folder in sorted(folders, key=lambda path: path.count(os.sep), reverse=True):
            with self._explained("sync", folder):
                _fsync_folder(folder)
        with self._explained("sync", self._root):
            self._anchor_root()
        self._doubtful -= doubtful

    def _path(self, key: str) -> str:
        """Turn a key into a path; keys are made by our own code, so a bad one is a programming error."""
        names = key.split("/")
        if any(name in ("", ".", "..") for name in names) or names[-1].startswith(TEMPORARY):
            raise ValueError(f"{key!r} is not a key: empty, '.' and '..' components and '{TEMPORARY}…' are refused")
        return f"{self._root}/{key}"

    def _named(self, folder: str, content: Bytes, give_name: Callable[[str], T]) -> T:
        """Write a temporary file and give it its name; again, if a collection has taken it for a dead writer's."""
        for _ in range(NAMING_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):
                return self._name_once(folder, content, give_name)
        return self._name_once(folder, content, give_name)

    def _name_once(self, folder: str, content: Bytes, give_name: Callable[[str], T]) -> T:
        temporary = self._write_temporary(folder, content)
        try:
            return give_name(temporary)
        except BaseException:
            _unlink_quietly(temporary)
            raise

    def _write_temporary(self, folder: str, content: Bytes) -> str:
        """Write and fsync `content` under a new name in `folder`; nothing is left if that fails."""
        temporary = f"{folder}/{TEMPORARY}{uuid.uuid4().hex}"
        descriptor = self._open_new(folder, temporary)
        try:
            try:
                _write_whole(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            _unlink_quietly(temporary)
            raise
        return temporary

    def _open_new(self, folder: str, path: str) -> int:
        """Open a file that is not there yet; its folder is made only when the open shows that it is missing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, FILE_MODE)
        except FileNotFoundError:
            self._make_folder(folder)
            return os.open(path, flags, FILE_MODE)

    def _make_folder(self, folder: str) -> None:
        """Make `folder` and those above it with our mode (`os.makedirs` gives it only to the last one)."""
        try:
            os.mkdir(folder, FOLDER_MODE)
        except FileExistsError:
            return  # another thread or process was quicker; if it is a file, the open that follows says so
        except FileNotFoundError:
            above = os.path.dirname(folder)
            if not os.path.isdir(above):  # else another thread has just made it, or none can be made, as in /proc
                self._make_folder(above)
            try:
                os.mkdir(folder, FOLDER_MODE)
            except FileExistsError:
                return
        self._anchored.discard(folder)
        if len(folder) <= len(self._root):
            self._made_above += 1

    def _link(self, temporary: str, path: str) -> bool:
        """Give `temporary` its name in place of the one it has; True if it is ours, False if the name was taken."""
        try:
            os.link(temporary, path)
        except OSError as error:
            # The reply of an NFS server may be lost and its retry refused: that both are one file tells what happened.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(temporary), os.stat(path)):
                    return True
            if isinstance(error, FileExistsError):
                return False
            if error.errno in NO_HARD_LINKS:
                raise UnavailableError(
                    f"cannot create {path}: {error.strerror}. This file system lacks hard links, which an exclusive "
                    f"create needs: without it two jobs could overwrite each other's checkpoints. Keep the store on "
                    f"another file system (ext4, XFS, Btrfs, ZFS, NFS) or in a bucket."
                ) from error
            raise
        finally:
            _unlink_quietly(temporary)
        return True

    def _anchor(self, folder: str) -> None:
        """Fsync the names of `folder` and those above it, once: whoever made them may not have come to it."""
        if folder not in self._anchored:
            for parent in self._folders_above(folder):
                _fsync_folder(parent)
            self._anchored.add(folder)
        self._anchor_root()

    def _anchor_root(self) -> None:
        """Fsync the names of the root and of the folders above it, once.

        They may be new, whoever made them: a process that was killed in the first save of a store leaves its folder
        there, with a name that nobody has fsynced.
        """
        made = self._made_above
        if made == self._anchored_above:
            return
        device = os.stat(self._root).st_dev
        for parent in _parents(self._root):
            if os.stat(parent).st_dev != device:
                break  # nobody made the place where a file system is mounted by saving to it
            # Folders that we may pass and not read were there before: we could read those that we made.
            with contextlib.suppress(PermissionError):
                _fsync_folder(parent)
        self._anchored_above = made

    def _folders_above(self, folder: str) -> Iterator[str]:
        while folder != self._root:
            folder = os.path.dirname(folder)
            yield folder

    def _rows(self, folder: str, name_prefix: str) -> Iterator[ObjectInfo]:
        """Walk `folder` (empty, or ending in `/`): rows of its names that start with `name_prefix`, and below."""
        for entry in self._entries(folder):
            if not entry.name.startswith(name_prefix):
                continue
            if entry.is_dir():
                yield from self._rows(f"{folder}{entry.name}/", "")
            elif not entry.name.startswith(TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        yield ObjectInfo(folder + entry.name, status.st_size, status.st_mtime)

    def _temporary_files(self, folder: str) -> Iterator[tuple[str, float]]:
        """Walk a folder, of the root only itself: each unfinished file, and when it was last written to."""
        for entry in self._entries(folder):
            if entry.is_dir(follow_symlinks=False):
                if not folder:
                    continue  # others may keep theirs beside ours
                yield from self._temporary_files(f"{folder}{entry.name}/")
            elif OUR_TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat(follow_symlinks=False).st_mtime

    def _file_time(self) -> float:
        """Tell the time by the clock that stamps files here, which may be a server's."""
        temporary = f"{self._root}/{TEMPORARY}{uuid.uuid4().hex}"
        descriptor = self._open_new(self._root, temporary)
        try:
            # By the descriptor: another process that tidies up may have taken the name away.
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            _unlink_quietly(temporary)

    def _entries(self, folder: str) -> builtins.list[os.DirEntry[str]]:
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []

    def _holds_file(self, folder: str) -> bool:
        entries = self._entries(folder)
        if any(not entry.is_dir() and not entry.name.startswith(TEMPORARY) for entry in entries):
            return True
        return any(entry.is_dir() and self._holds_file(f"{folder}/{entry.name}") for entry in entries)

    def _check_root(self) -> None:
        """Raise if the root cannot be a folder: that every key seems absent must not look like an empty store."""
        for path in (self._root, *_parents(self._root)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if not stat.S_ISDIR(os.stat(path).st_mode):
                    raise UnavailableError(
                        f"{path} is a file, but a store is a folder. Give the path of a folder, or move the file away."
                    )
                return
            if os.path.islink(path):
                raise UnavailableError(
                    f"{path} is a link to {os.readlink(path)}, which is not there. Mount that disk, or make the folder."
                )

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        """Turn an OSError into an UnavailableError that says what was done, where, why it failed and what to do."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.EEXIST):
                self._check_root()
            advice = ADVICE.get(error.errno or 0, "Look at this path and its file system, then try again.")
            raise UnavailableError(f"cannot {action} {path}: {error.strerror or error}. {advice}") from error


def _file_system(path: str) -> str:
    """Give the type of the file system that a path lies on; empty where the kernel does not say."""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:  # noqa: PTH123
            lines = [line.split(" ") for line in mounts]
    except OSError:
        return ""
    best, kind = "", ""
    for _, escaped, type_, *_ in lines:
        folder = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), escaped)
        above = path == folder or path.startswith(folder.rstrip("/") + "/")
        if above and len(folder) >= len(best):  # of several mounts in one place the last one is seen
            best, kind = folder, type_
    return kind


def _split_prefix(prefix: str) -> tuple[str, str]:
    """Split into the folder, empty or with its `/`, and the beginning of a name in it."""
    folder, slash, name_prefix = prefix.rpartition("/")
    if slash and any(name in ("", ".", "..") for name in folder.split("/")):
        raise ValueError(f"{prefix!r} is not a prefix of keys")
    return folder + slash, name_prefix


def _parents(path: str) -> Iterator[str]:
    while (above := os.path.dirname(path)) != path:
        yield above
        path = above


def _flat(content: Bytes) -> memoryview:
    """See the content as plain bytes without a copy; a view of another item type would be cut in the wrong places."""
    view = memoryview(content)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _write_whole(descriptor: int, content: Bytes) -> None:
    """Write all of it: one write may be short, on a full disk or beyond 2 GiB."""
    rest = _flat(content)
    while rest:
        written = os.write(descriptor, rest)
        if not written:
            raise OSError(errno.EIO, "the file system accepts no more bytes, and gives no reason")
        rest = rest[written:]


def _read_whole(descriptor: int) -> bytes | None:
    """Read to the size that the file has (files never change in place); None if it is a folder."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        return None
    content = os.read(descriptor, status.st_size)
    if len(content) == status.st_size:
        return content
    parts = [content]
    missing = status.st_size - len(content)
    while missing and (part := os.read(descriptor, missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _unlink_quietly(path: str) -> None:
    """Remove a temporary file; where that fails it stays behind, unseen, and the error under way matters more."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _fsync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)
