"""Objects in a bucket of S3 or a look-alike, through s3fs: what every other backend of S3 falls back on.

Nothing is left to s3fs's guesses: a listing is read page by page, a get is one request, and each error keeps its code.
"""

import asyncio
import builtins
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptstore.errors import InvalidInputError, UnavailableError
from ckptstore.objects.base import ObjectInfo
from ckptstore.objects.remote import Connection, FsspecObjects, foreign_errors
from ckptstore.objects.s3_errors import NO_KEY, REFUSED, Refused, advice, code_of
from ckptstore.objects.timestamps import session_with_fast_timestamps

__all__ = ["S3Objects"]

S3_POOL_CONNECTIONS = 64
SINGLE_PUT_BYTES = 2**31
"""Below twice this, s3fs makes a create one request: look-alikes may ignore If-None-Match on multipart uploads."""
BODY_TRIES = 5
DELETE_TRIES = 6
NO_BULK_DELETE = {"NotImplemented", "MethodNotAllowed", "501", "405"}
"""What look-alikes without DeleteObjects say to it."""
BUSY = {"SlowDown", "InternalError", "ServiceUnavailable", "503", "500"}
"""Of a single key within a bulk delete: what botocore would try again, were it the answer to a request."""


class S3Objects(FsspecObjects):
    """The objects below `s3://bucket/prefix`, on AWS or a look-alike, through s3fs.

    Listings ask S3 itself (`list_objects_v2`, page by page): s3fs's `find` and `ls` answer an empty folder with more
    requests, take a key of the folder's name for one below it, and lose the code that tells why something is absent.
    """

    delete_batch = 1000

    def _get(self, key: str, content: Callable[[Connection, str], bytes]) -> bytes | None:
        """Get the whole object. Whether one that may not be read is there at all, a listing tells.

        Who may not list all of a bucket is refused a key that is not there: by AWS if the right to list does not cover
        the key, by some look-alikes if it has any condition.
        """
        try:
            return super()._get(key, content)
        except UnavailableError as error:
            if code_of(error) not in REFUSED:
                raise
            # Where it is there, this raises the same again; unless it was made only now, by another job.
            return super()._get(key, content) if self._may_be_there(key) else None

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
                raise Refused(code, f"{len(failed)} of {len(keys)} keys were refused, this one as {code}: {message}")

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
            except foreign_errors() as error:
                if code_of(error) not in NO_BULK_DELETE:
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

    def _content(self, connection: Connection, path: str) -> bytes:
        # One GET, and not s3fs's cat_file. That asks for the size first: a request more, a 404 that does not tell a
        # missing bucket from a missing key, and parts that could come from two versions of the object. Or else it
        # tries again what has been tried again already: 125 requests to a server that does not answer, half an hour.
        from fsspec.asyn import sync

        return bytes(sync(connection.fs.loop, _read_object, connection.fs, *connection.fs.split_path(path)[:2]))

    def _is_missing_key(self, error: FileNotFoundError) -> bool:
        return code_of(error) in NO_KEY

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
        return advice(action, error, self.url.partition("://")[2].partition("/")[0])


async def _read_object(fs: Any, bucket: str, key: str) -> bytes:
    """One GET. Its request is tried again by s3fs and botocore, what goes wrong in the middle of the body here."""
    for attempt in range(BODY_TRIES):
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        try:
            if "ETag" not in answer:
                raise OSError("the answer is not S3's: the server, or something on the way to it, is faulty")
            return bytes(await answer["Body"].read())
        except foreign_errors():  # also cut off, stalled, or not of the checksum that came along
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
