"""The tree of errors that users meet.

Every error that leaves the package is one of these (or a programming error such as TypeError).
Each text says what happened, where (run, step, tensor path, key) and what to do next; the cause is chained.
"""

from typing import TypeVar

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "ConflictError",
    "CorruptError",
    "FencedError",
    "InvalidInputError",
    "MissingChunkError",
    "NotFoundError",
    "UnavailableError",
    "UnsupportedFormatError",
]


class CheckpointError(Exception):
    """The base of every error that ckptstore raises on purpose."""


class InvalidInputError(CheckpointError, ValueError):
    """What the caller passed cannot be saved, restored or named; nothing was changed, unless the text says so."""


class NotFoundError(CheckpointError, LookupError):
    """There is no such store, run, step or part of a checkpoint."""


class ConflictError(CheckpointError):
    """The step already holds other content; nothing was changed."""


class CorruptError(CheckpointError):
    """Stored bytes are not the bytes that were saved (or were cut, or are not ours).

    Attributes:
        key: the key of the damaged object, where it is a chunk; else None.
        is_foreign: whether it is a sound manifest, but that of another run or step.
    """

    key: str | None = None
    is_foreign: bool = False


class MissingChunkError(CorruptError):
    """A chunk that a checkpoint refers to is not in the store."""


class UnsupportedFormatError(CheckpointError):
    """An object was written by a newer version of ckptstore than this one can read."""


class FencedError(CheckpointError):
    """A collector took this save for dead and kept it from committing; save again."""


class UnavailableError(CheckpointError):
    """The backend refused or failed a request, after its own retries; the cause is attached."""


class CheckpointWarning(UserWarning):
    """Something is wrong with the store that did not keep the call from doing its work."""


E = TypeVar("E", bound=CheckpointError)


def retold(error: E, text: str) -> E:
    """The same error with another text; internal. It keeps what programs look at: its type, and the damaged key."""
    again = type(error)(text)
    if isinstance(error, CorruptError) and isinstance(again, CorruptError):
        again.key = error.key
    return again
