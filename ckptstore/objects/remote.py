"""Objects behind any other fsspec URL; what S3 has of its own is in s3.py.

What backends raise is sorted out here: lost races, absent keys, missing buckets, refusals. Only whole-object calls are
used; a file object of fsspec's `open(…, "wb")` would commit a truncated object when an exception passes through it.
"""

import asyncio
import builtins
import contextlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.objects.base import Bytes, ObjectInfo, Objects
from ckptstore.objects.s3_errors import CONFLICT, LOST_RACE, code_of

__all__ = ["Connection", "FsspecObjects", "foreign_errors", "is_s3", "scrub"]

CONFLICT_TRIES = 8
FOREIGN_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("fsspec.exceptions", "FSTimeoutError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko", "SSHException"),
    ("obstore.exceptions", "BaseError"),
)
"""What backends raise beside OSError; looked up among the modules that are loaded, so none is imported for it."""
SECRET_OPTION = re.compile(r"secret|token|password|passwd|credential|^key$|access_key|account_key|sas", re.IGNORECASE)
TIMES = ("LastModified", "mtime", "modified", "last_modified", "updated", "timeModified", "created")


@dataclass(frozen=True, slots=True)
class Connection:
    """A file system of fsspec, where our root lies in it, and the process that made it (none survives a fork)."""

    fs: Any
    root: str
    process: int


def is_s3(url: str) -> bool:
    """Tell whether s3fs serves this URL."""
    return url.partition("://")[0] in ("s3", "s3a")


def scrub(url: str) -> str:
    """Take `user:password@` out of a URL or of a text with URLs in it."""
    return re.sub(r"://[^/\s]*@", "://", url)


class FsspecObjects(Objects):
    """The objects below any URL that fsspec knows; for S3 there is `S3Objects`, which tells more errors apart."""

    request_threads = 16

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Remember where; touches nothing. `storage_options` go to the fsspec file system as they are."""
        self._url = url.rstrip("/") if not url.endswith("://") else url
        self._options = dict(storage_options or {})
        self._secrets = sorted(_secrets(self._options), key=len, reverse=True)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self.url = scrub(self._url)
        self._protocol, separator, path = url.partition("://")
        self._check_url(separator, path)

    def __repr__(self) -> str:
        """Show the URL without credentials."""
        return f"{type(self).__name__}({self.url!r})"

    def create(self, key: str, content: Bytes) -> bool:
        """Ask for an exclusive put; a conflict with a put that is under way is tried again."""
        with self._explained("create", key):
            body = _body(content)
            for attempt in range(CONFLICT_TRIES):
                try:
                    self._pipe(key, body, **self._create_options())
                    return True
                except OSError as error:
                    code = code_of(error)
                    if isinstance(error, FileExistsError) or code in LOST_RACE:
                        return False
                    if code not in CONFLICT or attempt == CONFLICT_TRIES - 1:
                        raise
                time.sleep(random.uniform(0.02, 0.05) * 2**attempt)
        raise AssertionError("unreachable")

    def put(self, key: str, content: Bytes) -> None:
        """Put the whole object."""
        with self._explained("write", key):
            self._pipe(key, _body(content))

    def get(self, key: str) -> bytes | None:
        """Get the whole object."""
        return self._get(key, self._content)

    def _get(self, key: str, content: Callable[[Connection, str], bytes]) -> bytes | None:
        with self._explained("read", key):
            connection = self._connected()
            try:
                return content(connection, f"{connection.root}/{key}")
            except FileNotFoundError as error:
                if self._is_missing_key(error):
                    return None
                raise
            except IsADirectoryError:
                return None  # a folder of keys, on backends with real folders

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """List folder by folder with `ls`: fsspec's `find` and `walk` pass over a folder that fails in silence."""
        with self._explained("list", prefix):
            connection = self._connected()
            connection.fs.invalidate_cache()
            rows = list(self._walk(connection, prefix.rpartition("/")[0], prefix))
        return sorted(rows, key=lambda row: row.key)

    def children(self, prefix: str) -> builtins.list[str]:
        """List one folder, and look into each folder in it until a file is found."""
        with self._explained("list", prefix):
            connection = self._connected()
            connection.fs.invalidate_cache()
            return sorted(
                key.rpartition("/")[2]
                for key, entry in self._entries(connection, prefix.rstrip("/"))
                if entry["type"] == "directory" and any(self._walk(connection, key, f"{key}/"))
            )

    def delete(self, key: str) -> None:
        """Delete one object."""
        with self._explained("delete", key):
            connection = self._connected()
            try:
                connection.fs.rm_file(f"{connection.root}/{key}")
            except FileNotFoundError as error:
                if not self._is_missing_key(error):
                    raise

    def _check_url(self, separator: str, path: str) -> None:
        """Refuse what can never work, without a request and without importing the backend."""
        from fsspec.registry import known_implementations, registry

        if "::" in self._url:
            raise InvalidInputError(f"{self.url} chains file systems, whose caches could hide newer data. Use one URL.")
        if not separator or self._protocol not in {*known_implementations, *registry}:
            known = "a path, memory://name, s3://bucket/prefix, or another URL that fsspec knows"
            raise InvalidInputError(f"{self.url}: unknown protocol {self._protocol!r}. Give {known}.")
        if not path.strip("/"):
            raise InvalidInputError(
                f"{self.url} names no bucket or folder. Give it as {self._protocol}://bucket/prefix."
            )

    def _create_options(self) -> dict[str, Any]:
        return {"mode": "create"}

    def _content(self, connection: Connection, path: str) -> bytes:
        return bytes(connection.fs.cat_file(path))

    def _is_missing_key(self, error: FileNotFoundError) -> bool:
        """Tell an absent key from an absent bucket; in general only the backend knows."""
        return True

    def _file_system(self) -> tuple[Any, str]:
        """Build the fsspec file system and say where our root lies in it."""
        import fsspec

        backend = fsspec.get_filesystem_class(self._protocol)
        options = {**backend._get_kwargs_from_urls(self._url), **self._options, "use_listings_cache": False}
        return backend(**options), str(backend._strip_protocol(self._url)).rstrip("/")

    def _connected(self) -> Connection:
        """Make the file system at the first request, once for all threads, and again in a forked child."""
        connection = self._connection
        if connection is not None and connection.process == os.getpid():
            return connection
        with self._lock:
            if self._connection is None or self._connection.process != os.getpid():
                self._connection = Connection(*self._built(), os.getpid())
            return self._connection

    def _built(self) -> tuple[Any, str]:
        try:
            return self._file_system()
        except ImportError as error:
            install = 'pip install "ckptstore[s3]"' if is_s3(self._url) else "install the package that it names"
            raise UnavailableError(f"cannot use {self.url}: {error}. To add it: {install}.") from error
        except (TypeError, ValueError, KeyError) as error:
            text = self._told(error)
            raise UnavailableError(f"cannot use {self.url}: storage_options are not accepted: {text}") from error

    def connect(self) -> None:
        """Make the file system, whose event loop has a thread of its own."""
        with self._explained("use", ""):
            self._connected()

    def _pipe(self, key: str, body: bytes | bytearray, **options: Any) -> None:
        connection = self._connected()
        path = f"{connection.root}/{key}"
        try:
            connection.fs.pipe_file(path, body, **options)
        except FileNotFoundError as error:
            if not self._is_missing_key(error):
                raise
            # Backends with real folders (SFTP, SMB, HDFS) want them made first.
            connection.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            connection.fs.pipe_file(path, body, **options)

    def _walk(self, connection: Connection, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """Rows below `folder` whose key starts with `prefix`, entering only folders that can hold such keys."""
        for key, entry in self._entries(connection, folder):
            if entry["type"] == "directory":
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(connection, key, prefix)
            elif key.startswith(prefix):
                yield ObjectInfo(key, int(entry["size"] or 0), _modified(entry))

    def _entries(self, connection: Connection, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """List one folder: keys relative to our root. A folder that is absent has none."""
        path = f"{connection.root}/{folder}" if folder else connection.root
        try:
            entries = connection.fs.ls(path, detail=True)
        except FileNotFoundError as error:
            if not self._is_missing_key(error):
                raise
            return
        root = connection.root.strip("/")
        for entry in entries:
            name = str(entry["name"]).strip("/")
            if name.startswith(f"{root}/") and name != path.strip("/"):
                yield name[len(root) + 1 :], entry

    @contextlib.contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Turn what the backend raises into an UnavailableError: what, where, why, and what to do."""
        try:
            yield
        except foreign_errors() as error:
            place = f"{self.url}/{key}" if key else self.url
            advice = self._advice(action, error)
            raise UnavailableError(f"cannot {action} {place}: {self._told(error)}. {advice}") from error

    def _told(self, error: BaseException) -> str:
        """Give the error's own text on one line, without anything secret that we were given."""
        text = scrub(" ".join(str(error).split())) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.rstrip(".")

    def _advice(self, action: str, error: BaseException) -> str:
        if isinstance(error, PermissionError):
            return f"These credentials may not {action} there: grant it, or use others (storage_options)."
        if isinstance(error, NotImplementedError):
            return "This backend lacks an operation that a store needs: use another one."
        return "Check the network and the storage_options, then try again."


def foreign_errors() -> tuple[type[BaseException], ...]:
    """Every class that a backend in use can raise; asked only when something was raised."""
    found: builtins.list[type[BaseException]] = [OSError, TimeoutError, asyncio.TimeoutError, NotImplementedError]
    for module_name, class_name in FOREIGN_ERRORS:
        module = sys.modules.get(module_name)
        if module is not None:
            found.append(getattr(module, class_name))
    return tuple(found)


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    """Every option's text, at any depth, that must not be printed."""
    for name, option in options.items():
        if isinstance(option, Mapping):
            yield from _secrets(option)
        elif isinstance(option, str) and len(option) >= 4 and SECRET_OPTION.search(str(name)):
            yield option


def _body(content: Bytes) -> bytes:
    """Make it bytes: botocore takes no memoryview, and a retry must not see a buffer that changed meanwhile."""
    return bytes(content)


def _modified(entry: Mapping[str, Any]) -> float:
    """Find the last-modified time, which each backend names and types its own way; 0.0 where it tells none."""
    for name in TIMES:
        told = entry.get(name)
        if isinstance(told, datetime):
            return told.timestamp()
        if isinstance(told, int | float):
            return float(told)
        if isinstance(told, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(told.replace("Z", "+00:00")).timestamp()
    return 0.0
