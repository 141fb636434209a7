"""Objects in a bucket of S3, whose contents go through obstore and all else through s3fs.

obstore (Rust's object_store) moves bytes with half of the processor time and without Python's lock. What decides about
commits and deletes stays with s3fs: obstore takes any answer without rows for an empty listing, and its create cannot
tell a key that exists from a conflict that has created nothing. So do gets without TLS, whose answers only s3fs checks.
See docs/decisions/0015-obstore.md.
"""

import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ckptstore.objects.obstore_options import Stores, attributes, stores_like, tries
from ckptstore.objects.remote import Connection
from ckptstore.objects.s3 import S3Objects
from ckptstore.objects.s3_errors import ELSEWHERE, Refused, RefusedAsAbsent, code_of

__all__ = ["ObstoreObjects"]

T = TypeVar("T")

LARGEST_PUT_BYTES = 5 * 2**30
"""S3's limit for one request."""
GIVE_UP_SECONDS = 300
"""Since the first of several tries; each of them may wait for a time-out."""
LONGEST_PAUSE = 5.0
STATUS = re.compile(r"(?:non-2xx status code|returned error response): (\d{3})")
CODE = re.compile(r"<Code>([^<]+)</Code>")
MESSAGE = re.compile(r"<Message>([^<]+)</Message>")
OS_MESSAGE = re.compile(r'message: "([^"]+)"')
ENDPOINT = re.compile(r"https?://[^\s/]+")
PASSING = {"SlowDown", "RequestTimeout", "InternalError"}
PASSING_STATUS = {"408", "429", "500", "502", "503", "504"}

_STORES = "_ckptstore_stores"
"""The attribute of s3fs's file system (fsspec hands it out again for the same options) with the clients by bucket."""

_process_of_obstore: int | None = None
"""Where its threads run. A forked child has none of them, and would wait for them for ever."""


class ObstoreObjects(S3Objects):
    """The objects below `s3://bucket/prefix`: puts, and gets by https, through obstore, which needs s3fs beside it."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Remember where; touches nothing."""
        super().__init__(url, storage_options)
        self._stores: Stores | None = None
        self._tries = 1
        self._attributes = attributes(self._options)

    def _file_system(self) -> tuple[Any, str]:
        fs, root = super()._file_system()
        self._stores = None if _is_forked() else _stores(fs, root.partition("/")[0])
        self._tries = tries(fs)
        return fs, root

    def _pipe(self, key: str, body: bytes | bytearray, **options: Any) -> None:
        connection = self._connected()
        stores = self._stores
        if stores is not None and not options and len(body) <= LARGEST_PUT_BYTES:
            path = f"{connection.root}/{key}".partition("/")[2]
            try:
                self._tried(lambda: _put(stores.puts, path, body, self._attributes))
                return
            except OSError as error:
                self._go_elsewhere(error)
        super()._pipe(key, body, **options)

    def get_unchecked(self, key: str) -> bytes | None:
        """Get the whole object through obstore, with TLS or without."""
        return self._get(key, self._content_unchecked)

    def _content(self, connection: Connection, path: str) -> bytes:
        stores = self._stores
        is_protected = stores is not None and stores.gets_are_protected
        return (self._content_unchecked if is_protected else super()._content)(connection, path)

    def _content_unchecked(self, connection: Connection, path: str) -> bytes:
        stores = self._stores
        if stores is not None:
            try:
                return self._tried(lambda: _get(stores.gets, path.partition("/")[2]))
            except OSError as error:
                self._go_elsewhere(error)
        return super()._content(connection, path)

    def _go_elsewhere(self, error: OSError) -> None:
        """Leave all to s3fs from now on if the bucket is in another region: it follows. Raise any other error."""
        if code_of(error) not in ELSEWHERE:
            raise error
        self._stores = None

    def _tried(self, request: Callable[[], T]) -> T:
        """Ask until there is an answer: obstore itself gives up where it cannot know that a repetition does no harm."""
        from obstore.exceptions import BaseError

        began = time.monotonic()
        for attempt in range(self._tries):
            try:
                return request()
            except (BaseError, OSError) as error:
                told, passes = _told_by(error)
                is_last = attempt == self._tries - 1 or time.monotonic() - began > GIVE_UP_SECONDS
                if is_last or not passes:
                    raise told from error
            time.sleep(random.uniform(0.5, 1) * min(0.05 * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("unreachable")


def _stores(fs: Any, bucket: str) -> Stores | None:
    """What goes with a file system: made once, as each of the two reads the authorities of TLS, which takes 4 ms.

    Kept in it: one that is made anew, say with other credentials in the environment, is equal to it, and not the same.
    """
    made: dict[str, Stores] = fs.__dict__.setdefault(_STORES, {})
    if bucket not in made:
        if (new := stores_like(fs, bucket)) is None:
            return None  # asked again next time, as it depends on the environment, too
        made[bucket] = new
    return made[bucket]


def _is_forked() -> bool:
    """Whether obstore's threads are in the process that this one was forked from; if not, they may be in this one."""
    global _process_of_obstore
    if _process_of_obstore is None:
        _process_of_obstore = os.getpid()
    return _process_of_obstore != os.getpid()


def _put(store: Any, path: str, body: bytes | bytearray, attributes: dict[str, str]) -> None:
    import obstore

    obstore.put(store, path, body, use_multipart=False, attributes=attributes or None)


def _get(store: Any, path: str) -> bytes:
    import obstore

    answer = obstore.get(store, path)
    told = answer.meta
    content = answer.bytes().to_bytes()
    if not told["e_tag"] or len(content) != told["size"]:
        raise OSError("the answer is not S3's: the server, or something on the way to it, is faulty")
    return content


def _told_by(error: Exception) -> tuple[OSError, bool]:
    """The same in our words, as obstore's hold a dump of Rust's structures; and whether it may go better next time."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error, True
    told, _, dump = str(error).partition("\n\nDebug source:")
    status, code, message = (pattern.search(told) for pattern in (STATUS, CODE, MESSAGE))
    if "BareRedirect" in dump:
        return Refused("PermanentRedirect", "the bucket is not where it was asked for"), False
    if status is None:
        if type(error).__name__ == "UnauthenticatedError":
            return Refused("InvalidToken", told), False  # there are none to sign with
        place = ENDPOINT.search(told)
        return OSError(f"{_reason(told, dump)}, asking {place[0] if place else 'S3'}"), True
    kind = RefusedAsAbsent if status[1] == "404" else Refused
    refusal = kind(code[1] if code else status[1], message[1] if message else f"the server answered {status[1]}")
    return refusal, status[1] in PASSING_STATUS or code_of(refusal) in PASSING


def _reason(told: str, dump: str) -> str:
    """What the operating system has said, or the HTTP client."""
    if "TimedOut" in dump:
        return "timeout: there was no answer in time"
    deepest = OS_MESSAGE.findall(dump)
    return str(deepest[-1]) if deepest else told.rpartition(" - ")[2]
