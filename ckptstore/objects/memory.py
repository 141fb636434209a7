"""Objects in this process's memory, for tests and examples: `memory://name`.

They live in fsspec's global MemoryFileSystem, so that two stores of one URL share them and `fsspec` shows them; create
and put go past its methods, because those are not atomic.
"""

import builtins
import threading
from collections.abc import Iterator

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ckptstore.objects.base import Bytes, ObjectInfo, Objects

__all__ = ["MemoryObjects"]

_lock = threading.Lock()
"""Guards fsspec's dict, which all stores in this process share."""


class MemoryObjects(Objects):
    """The objects below `memory://…`."""

    request_threads = 2
    gets_wait = False

    def __init__(self, url: str) -> None:
        """Remember where; touches nothing."""
        path = url.removeprefix("memory://").strip("/")
        self.url = f"memory://{path}"
        self._root = f"/{path}/" if path else "/"
        self._fs = MemoryFileSystem()

    def __repr__(self) -> str:
        """Show the URL."""
        return f"MemoryObjects({self.url!r})"

    def create(self, key: str, content: Bytes) -> bool:
        """Look and put under one lock."""
        entry = self._entry(key, content)
        with _lock:
            return self._fs.store.setdefault(entry.path, entry) is entry

    def put(self, key: str, content: Bytes) -> None:
        """Replace the whole entry, so that a reader keeps the old content or sees the new."""
        entry = self._entry(key, content)
        with _lock:
            self._fs.store[entry.path] = entry

    def get(self, key: str) -> bytes | None:
        """Return the stored bytes; no copy, as nobody changes them in place."""
        entry = self._fs.store.get(self._root + key)
        return None if entry is None else bytes(entry.getvalue())

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Look at every key in this process."""
        rows = [
            # Not entry.size: it asks for a buffer, which makes BytesIO copy its content.
            ObjectInfo(path[len(self._root) :], len(entry.getvalue()), entry.modified.timestamp())
            for path, entry in self._found(prefix)
        ]
        return sorted(rows, key=lambda row: row.key)

    def children(self, prefix: str) -> builtins.list[str]:
        """Look at every key in this process."""
        start = len(self._root) + len(prefix)
        below = (path[start:].partition("/") for path, _ in self._found(prefix))
        return sorted({name for name, slash, _ in below if slash})

    def delete(self, key: str) -> None:
        """Drop the entry if there is one."""
        with _lock:
            self._fs.store.pop(self._root + key, None)

    def _entry(self, key: str, content: Bytes) -> MemoryFile:
        return MemoryFile(self._fs, self._root + key, bytes(content))

    def _found(self, prefix: str) -> Iterator[tuple[str, MemoryFile]]:
        with _lock:
            entries = tuple(self._fs.store.items())
        start = self._root + prefix
        return ((path, entry) for path, entry in entries if path.startswith(start))
