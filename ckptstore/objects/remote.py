"""Objects behind any other fsspec URL; S3 and its look-alikes first of all, through s3fs.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.objects.base import Bytes, ObjectInfo, Objects
from ckptstore.objects.timestamps import session_with_fast_timestamps

__all__ = ["FsspecObjects", "S3Objects", "is_s3", "scrub"]

S3_POOL_CONNECTIONS = 64
SINGLE_PUT_BYTES = 2**31
"""Below twice this, s3fs makes a create one request: look-alikes may ignore If-None-Match on multipart uploads."""
CONFLICT_TRIES = 8
BODY_TRIES = 5
DELETE_TRIES = 6
LOST_RACE = {"PreconditionFailed", "412"}
CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
NO_KEY = {"NoSuchKey"}
"""Not a bare 404, which may be of anything on the way: a manifest would pass for deleted, and a store for a new one."""
NO_BULK_DELETE = {"NotImplemented", "MethodNotAllowed", "501", "405"}
"""What look-alikes without DeleteObjects say to it."""
BUSY = {"SlowDown", "InternalError", "ServiceUnavailable", "503", "500"}
"""Of a single key within a bulk delete: what botocore would try again, were it the answer to a request."""
REFUSED = {"AccessDenied", "AllAccessDisabled", "403"}
BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity"}
S3_PERMISSIONS = {"create": "s3:PutObject", "write": "s3:PutObject", "read": "s3:GetObject", "list": "s3:ListBucket",
                  "delete": "s3:DeleteObject"}  # fmt: skip
FOREIGN_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("fsspec.exceptions", "FSTimeoutError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("paramiko", "SSHException"),
)
"""What backends raise beside OSError; looked up among the modules that are loaded, so none is imported for it."""
SECRET_OPTION = re.compile(r"secret|token|password|passwd|credential|^key$|access_key|account_key|sas", re.IGNORECASE)
TIMES = ("LastModified", "mtime", "modified", "last_modified", "updated", "timeModified", "created")


@dataclass(frozen=True, slots=True)
class _Connection:
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
    """The objects below any URL that fsspec knows; for S3 use `S3Objects`, which tells more errors apart."""

    request_threads = 16

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Remember where; touches nothing. `storage_options` go to the fsspec file system as they are."""
        self._url = url.rstrip("/") if not url.endswith("://") else url
        self._options = dict(storage_options or {})
        self._secrets = sorted(_secrets(self._options), key=len, reverse=True)
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
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
                    code = _code(error)
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
        with self._explained("read", key):
            connection = self._connected()
            try:
                return self._content(connection, f"{connection.root}/{key}")
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

    def _content(self, connection: _Connection, path: str) -> bytes:
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

    def _connected(self) -> _Connection:
        """Make the file system at the first request, once for all threads, and again in a forked child."""
        connection = self._connection
        if connection is not None and connection.process == os.getpid():
            return connection
        with self._lock:
            if self._connection is None or self._connection.process != os.getpid():
                self._connection = _Connection(*self._built(), os.getpid())
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

    def _walk(self, connection: _Connection, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        """Rows below `folder` whose key starts with `prefix`, entering only folders that can hold such keys."""
        for key, entry in self._entries(connection, folder):
            if entry["type"] == "directory":
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(connection, key, prefix)
            elif key.startswith(prefix):
                yield ObjectInfo(key, int(entry["size"] or 0), _modified(entry))

    def _entries(self, connection: _Connection, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
        except _foreign_errors() as error:
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


class S3Objects(FsspecObjects):
    """The objects below `s3://bucket/prefix`, on AWS or a look-alike, through s3fs.

    Listings ask S3 itself (`list_objects_v2`, page by page): s3fs's `find` and `ls` answer an empty folder with more
    requests, take a key of the folder's name for one below it, and lose the code that tells why something is absent.
    """

    delete_batch = 1000

    def get(self, key: str) -> bytes | None:
        """Get the whole object. Whether one that may not be read is there at all, a listing tells.

        Who may not list all of a bucket is refused a key that is not there: by AWS if the right to list does not cover
        the key, by some look-alikes if it has any condition.
        """
        try:
            return super().get(key)
        except UnavailableError as error:
            if _code(error) not in REFUSED:
                raise
            # Where it is there, this raises the same again; unless it was made only now, by another job.
            return super().get(key) if self._may_be_there(key) else None

    def _may_be_there(self, key: str) -> bool:
        try:
            return any(row.key == key for row in self.list(key))
        except UnavailableError:
            return True

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Read the flat listing, every page of it."""
        with self._explained("list", prefix):
            rows = [
                ObjectInfo(key, int(row["Size"]), row["LastModified"].timestamp())
                for start, page in self._pages(prefix)
                for row in page.get("Contents", ())
                # Keys that end in / (or are our root with its /) are what consoles make in place of folders.
                if (key := row["Key"][start:]) and not key.endswith("/")
            ]
        return sorted(rows, key=lambda row: row.key)

    def children(self, prefix: str) -> builtins.list[str]:
        """Read the listing with a delimiter."""
        with self._explained("list", prefix):
            return sorted(
                name
                for start, page in self._pages(prefix, Delimiter="/")
                for row in page.get("CommonPrefixes", ())
                if (name := row["Prefix"][start + len(prefix) : -1])
                and (_never_shows_empty_folders(page) or self._holds_key(f"{prefix}{name}/"))
            )

    def delete_many(self, keys: Sequence[str]) -> None:
        """Send one DeleteObjects; where the server has none, or there is one key, delete one by one."""
        if len(keys) == 1:
            self.delete(keys[0])
            return
        failed = self._delete_at_once(keys)
        for attempt in range(DELETE_TRIES - 1):
            if any(code not in BUSY for code, _ in failed.values()):
                break
            if not failed:
                return
            time.sleep(random.uniform(0.1, 0.2) * 2**attempt)
            failed = self._delete_at_once(list(failed))
        if failed:
            # One that does not get better by itself, if there is such a one among them.
            first, (code, message) = min(failed.items(), key=lambda item: item[1][0] in BUSY)
            with self._explained("delete", first):
                raise _KeysRefused(
                    code, f"{len(failed)} of {len(keys)} keys were refused, this one as {code}: {message}"
                )

    def _delete_at_once(self, keys: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Ask for all of `keys` in one request; return those that were not deleted, each with S3's code and message."""
        if not keys:
            return {}  # S3 refuses a request that names none
        with self._explained("delete", keys[0]):
            connection = self._connected()
            bucket, root, _ = connection.fs.split_path(connection.root)
            start = f"{root}/" if root else ""
            wanted = {"Objects": [{"Key": start + key} for key in keys], "Quiet": True}
            try:
                answer = connection.fs.call_s3("delete_objects", Bucket=bucket, Delete=wanted)
            except _foreign_errors() as error:
                if _code(error) not in NO_BULK_DELETE:
                    raise
                super().delete_many(keys)
                return {}
            if answer["ResponseMetadata"].get("HTTPHeaders", {}).get("content-length") == "0":
                # That all were deleted is an answer with a body, too.
                raise OSError("the answer is not S3's: the server, or something on the way to it, is faulty")
        return {
            error["Key"][len(start) :]: (error["Code"], error.get("Message", ""))
            for error in answer.get("Errors", ())
            if error["Code"] not in NO_KEY
        }

    def _holds_key(self, prefix: str) -> bool:
        return any(page.get("Contents") for _, page in self._pages(prefix, MaxKeys=1))

    def _check_url(self, separator: str, path: str) -> None:
        super()._check_url(separator, path)
        if path.startswith("/"):
            raise InvalidInputError(f"{self.url} names no bucket: it has a slash too many. Give s3://bucket/prefix.")
        if "@" in path.partition("/")[0]:
            raise InvalidInputError(
                f"{self.url}: credentials do not belong in the URL of a bucket. Give them as "
                f"storage_options={{'key': …, 'secret': …}}, AWS_PROFILE or AWS_ACCESS_KEY_ID."
            )

    def _create_options(self) -> dict[str, Any]:
        return {"mode": "create", "chunksize": SINGLE_PUT_BYTES}

    def _content(self, connection: _Connection, path: str) -> bytes:
        # One GET, and not s3fs's cat_file. That asks for the size first: a request more, a 404 that does not tell a
        # missing bucket from a missing key, and parts that could come from two versions of the object. Or else it
        # tries again what has been tried again already: 125 requests to a server that does not answer, half an hour.
        from fsspec.asyn import sync

        return bytes(sync(connection.fs.loop, _read_object, connection.fs, *connection.fs.split_path(path)[:2]))

    def _is_missing_key(self, error: FileNotFoundError) -> bool:
        return _code(error) in NO_KEY

    def _file_system(self) -> tuple[Any, str]:
        import fsspec

        config = {"max_pool_connections": S3_POOL_CONNECTIONS, **self._options.get("config_kwargs", {})}
        options = {**self._options, "config_kwargs": config, "use_listings_cache": False}
        fs = fsspec.filesystem(self._protocol, **options)
        if fs.session is None:
            fs.session = session_with_fast_timestamps(fs.kwargs)
        fs.connect()  # here, so that a wrong option is told as such
        bucket, prefix, _ = fs.split_path(self._url)
        return fs, f"{bucket}/{prefix}".rstrip("/")

    def _pages(self, prefix: str, **request: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Every page of the listing of `prefix`, each with the length of what precedes our keys in S3's."""
        connection = self._connected()
        bucket, root, _ = connection.fs.split_path(connection.root)
        start = f"{root}/" if root else ""
        while True:
            page = connection.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=start + prefix, **request)
            yield len(start), page
            if "IsTruncated" not in page:
                # Such as an answer without its body, which must not pass for an empty listing.
                raise OSError("the answer is no listing: the server, or something on the way to it, is faulty")
            if not page["IsTruncated"]:
                return
            if not page.get("NextContinuationToken"):
                raise OSError("the listing is cut off: the server says that there is more, and not where")
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _advice(self, action: str, error: BaseException) -> str:
        code = _code(error)
        bucket = self.url.partition("://")[2].partition("/")[0]
        if code == "NoSuchBucket":
            return f"The bucket {bucket!r} does not exist there: create it, or correct the URL or the endpoint_url."
        if code in BAD_CREDENTIALS:
            return (
                "The credentials are wrong or expired: look at key and secret (storage_options), AWS_PROFILE or token."
            )
        if code in REFUSED:
            hint = " (without s3:ListBucket, S3 says this of a missing key too)" if action == "read" else ""
            return (
                f"These credentials lack the permission {S3_PERMISSIONS[action]} for it{hint}: grant it, or use others."
            )
        if type(error).__name__ == "ProfileNotFound":
            return "Give another as AWS_PROFILE or storage_options={'profile': …}, or add it to ~/.aws/config."
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return (
                "Give them as storage_options={'key': …, 'secret': …}, in AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY; for a public bucket, storage_options={'anon': True}."
            )
        if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            return "The bucket is in another region: give it as storage_options={'client_kwargs': {'region_name': …}}."
        return "Check the network, the endpoint_url and the storage_options, then try again."


class _KeysRefused(OSError):
    """Some keys of a bulk delete, which itself succeeded, were not deleted. Its code is found as botocore's are."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.response = {"Error": {"Code": code}}


async def _read_object(fs: Any, bucket: str, key: str) -> bytes:
    """One GET. Its request is tried again by s3fs and botocore, what goes wrong in the middle of the body here."""
    for attempt in range(BODY_TRIES):
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        try:
            if "ETag" not in answer:
                raise OSError("the answer is not S3's: the server, or something on the way to it, is faulty")
            return bytes(await answer["Body"].read())
        except _foreign_errors():  # also cut off, stalled, or not of the checksum that came along
            if attempt == BODY_TRIES - 1:
                raise
        finally:
            answer["Body"].close()
        await asyncio.sleep(random.uniform(0.1, 0.2) * 2**attempt)
    raise AssertionError("unreachable")


def _never_shows_empty_folders(page: Mapping[str, Any]) -> bool:
    """On AWS a common prefix has keys. SeaweedFS shows real folders, also after their last key was deleted."""
    headers: Mapping[str, str] = page.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers.get("server") == "AmazonS3"


def _foreign_errors() -> tuple[type[BaseException], ...]:
    """Every class that a backend in use can raise; asked only when something was raised."""
    found: builtins.list[type[BaseException]] = [OSError, TimeoutError, asyncio.TimeoutError, NotImplementedError]
    for module_name, class_name in FOREIGN_ERRORS:
        module = sys.modules.get(module_name)
        if module is not None:
            found.append(getattr(module, class_name))
    return tuple(found)


def _code(error: BaseException) -> str | None:
    """S3's own code for an error, from botocore's ClientError somewhere in the chain of causes."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        response = getattr(link, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return str(response["Error"].get("Code") or status)
        link = link.__cause__ or link.__context__
    return None


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
