"""What the protocol asks of a store: operations that it yields, each atomic, or made of independent ones.

Structs and not dataclasses: `import ckptstore` makes all of them, and a dataclass takes a millisecond to make.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct, field

from ckptstore.deltas import Held
from ckptstore.manifest import Session

T = TypeVar("T")


class List(Struct, frozen=True):
    """-> list[ObjectInfo] of all keys that begin with one of `prefixes`."""

    prefixes: tuple[str, ...]


class Get(Struct, frozen=True):
    """-> list[bytes | None], one for each key."""

    keys: tuple[str, ...]


class Create(Struct, frozen=True):
    """-> bool: True if it is ours, False if the key existed."""

    key: str
    content: bytes


class Put(Struct, frozen=True):
    """-> None; replaces what is there."""

    key: str
    content: bytes


class Open(Struct, frozen=True):
    """-> None. Puts the session and keeps it beating until `Close`."""

    session: Session


class Close(Struct, frozen=True):
    """-> None. Ends the beat and deletes the session."""

    save: str


class Upload(Struct, frozen=True):
    """-> dict digest -> Uploaded. Encodes and puts the chunks of these digests under the save's own keys.

    Those that do not come out short enough are not put, and are left out of the answer.
    """

    save: str
    digests: tuple[str, ...]
    bases: Mapping[str, Held] = field(default_factory=dict)
    """Digest -> a chunk that it may be stored as the difference to, where that is clearly smaller."""
    below: Mapping[str, int] = field(default_factory=dict)
    """Digest -> how many bytes its object must not exceed."""


class Uploaded(Struct, frozen=True):
    """What became of a chunk: the length of its object, and whether it is the difference to its base."""

    stored: int
    is_delta: bool = False
    damaged: str | None = None
    """The key of its base, if that turned out to be damaged."""


class Check(Struct, frozen=True):
    """-> bool: whether a chunk is there and, read to the last byte, what its digest says."""

    chunk: Held


class Sync(Struct, frozen=True):
    """-> None, when all of `keys` are durable, whoever put them."""

    keys: tuple[str, ...]


class Delete(Struct, frozen=True):
    """-> None, when none of `keys` stands any more, for good; that some did not stand before is fine."""

    keys: tuple[str, ...]


class Clock(Struct, frozen=True):
    """-> float: what the store's own clock says now, in seconds, which last-modified times are compared with."""

    about: bool = False
    """Whether the time of this machine will do where the store cannot be written to."""


class Pause(Struct, frozen=True):
    """-> None, after so many seconds."""

    seconds: float


PREFIXES_AT_A_TIME = 16
"""Of the 256 by which many chunks are listed: what they hold has to fit in memory."""


def in_batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


Operation = List | Get | Create | Put | Open | Close | Upload | Check | Sync | Delete | Clock | Pause
