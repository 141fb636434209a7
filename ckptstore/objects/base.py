"""What the store asks of a backend: a flat space of keys with exclusive create. No protocol, no formats here.

A backend must be strongly consistent: a get or a list after a put sees it. docs/explanation/protocol.md says why
each of these is needed, and `ckptstore.testing` holds the suite of tests that every backend has to pass.
"""

import abc
import builtins
from collections.abc import Iterable, Sequence

from msgspec import Struct

Bytes = bytes | bytearray | memoryview
"""What a backend accepts as an object's content; what it returns is `bytes`."""


class ObjectInfo(Struct, frozen=True):
    """One row of a listing: the key, its size in bytes, and the store's own last-modified time (seconds, epoch)."""

    key: str
    size: int
    modified: float


class Objects(abc.ABC):
    """A flat space of objects under one URL. Keys use `/` and are relative to that URL.

    Every method may be called from many threads at a time. Every method raises
    `ckptstore.UnavailableError`, and nothing else, when the backend refuses or fails (the cause chained).
    """

    url: str
    """Where it is, for messages; holds no credentials."""
    request_threads: int
    """How many requests are worth having under way at a time."""
    gets_wait: bool = True
    """Whether a get mostly waits (for a network), so that it pays to send the next ones on threads of their own."""
    delete_batch: int = 1
    """How many keys one call of `delete_many` takes."""

    @abc.abstractmethod
    def create(self, key: str, content: Bytes) -> bool:
        """Put `content` at `key` if nothing is there, durably. True: it is ours. False: the key existed, untouched.

        Exactly one of many concurrent creates of one key returns True, and a reader never sees a part of it.
        """

    @abc.abstractmethod
    def put(self, key: str, content: Bytes) -> None:
        """Put `content` at `key`, replacing what is there as a whole. Its name is durable only after `sync`."""

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The whole content at `key`, or None if there is no such object (never for a missing bucket: an error)."""

    def get_unchecked(self, key: str) -> bytes | None:
        """The same for a caller that compares the content with a digest, and asks `get` before it calls it damaged.

        So that what only `get` compares, such as a checksum that comes along, need not be computed beside the digest.
        """
        return self.get(key)

    @abc.abstractmethod
    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        """Every object whose key starts with `prefix` (any string, also half a name), at any depth, sorted by key."""

    @abc.abstractmethod
    def children(self, prefix: str) -> builtins.list[str]:
        """The names directly below `prefix` (which ends in `/` or is empty) that have keys below them, sorted."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; that it is not there is fine. After a power loss it may be there again."""

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove `keys`, at most `delete_batch` of them; when this returns, they are gone and stay so."""
        for key in keys:
            self.delete(key)

    def leftovers(self, older_than: float, *, remove: bool) -> builtins.list[str]:
        """What writers that died have left, and that no listing shows, if it is older than so many seconds.

        Returns names for people. A writer that comes back later must fail, and not commit a part.
        """
        return []

    def stale_listings(self) -> str:
        """Why a listing here may not show what others have just put, which makes collections unsafe; empty: it does."""
        return ""

    def connect(self) -> None:  # noqa: B027  most backends need nothing here
        """Make what connections and threads it keeps, if there are none yet; asks for nothing."""

    def sync(self, keys: Iterable[str]) -> None:  # noqa: B027  most backends need nothing here
        """Return when the objects at `keys`, put before or by others, survive a power loss; at once, by default."""
