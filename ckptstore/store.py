"""What people touch first: `Store`, the place where runs are."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from ckptstore import catalog
from ckptstore import usage as usages
from ckptstore.errors import InvalidInputError
from ckptstore.format import Codec, check_run_name
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.pipeline import Progress
from ckptstore.run import Run, Shared
from ckptstore.usage import Usage

if TYPE_CHECKING:
    from ckptstore.verifying import VerifyReport

__all__ = ["Store"]


class Store:
    """A place where checkpoints are kept: a folder, a bucket, or memory; many jobs may use one at the same time.

    Making a `Store` touches nothing: the first save makes the store at its place.

    Args:
        url: a path, `s3://bucket/prefix`, `memory://name`, or any other URL that fsspec knows and whose backend has an
            exclusive create. Or a backend of your own, a `ckptstore.objects.base.Objects`.
        storage_options: what fsspec's file system for the URL takes, such as `{"profile": "team"}` or
            `{"endpoint_url": "http://localhost:9000"}` for S3. Never written anywhere.
        codec: how saves write chunks; every reader reads all of them, and equal chunks are found whatever they were
            written with. "fast": compressed where that pays. "none": as they are, for a disk that is faster than the
            processor. "small": as "fast", and where that is clearly smaller as the difference to the run's newest
            checkpoint, which a save then reads, and a restore too.
        threads: how many threads hash, encode and decode. None: one a core that the process may use, 16 at most, and
            a quarter of them, at a lower priority, for saves in the background.

    Raises:
        InvalidInputError: the URL is not one that a store can be at, or an argument makes no sense.
    """

    def __init__(
        self,
        url: "str | os.PathLike[str] | Objects",
        storage_options: Mapping[str, Any] | None = None,
        *,
        codec: Codec = "fast",
        threads: int | None = None,
    ) -> None:
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InvalidInputError(f"threads must be a whole number from 1 on, or None; not {threads!r}.")
        if codec not in get_args(Codec):
            raise InvalidInputError(f"codec must be one of {', '.join(map(repr, get_args(Codec)))}, not {codec!r}.")
        self._codec: Codec = codec
        self._threads = threads
        self._objects = url if isinstance(url, Objects) else open_objects(url, storage_options)
        self._shared: dict[str, Shared] = {}

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        return self._objects.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def run(self, name: str) -> Run:
        """The run of that name, which need not exist yet.

        Args:
            name: 1 to 128 letters, digits and `. _ + = , -`, a letter, digit or `_` first.

        Raises:
            InvalidInputError: it cannot be a name.
        """
        shared = self._shared.setdefault(check_run_name(name), Shared())
        return Run(self._objects, name, shared, codec=self._codec, threads=self._threads)

    def runs(self) -> list[str]:
        """The names of the runs that have a checkpoint, sorted; empty where there is no store.

        Raises:
            UnavailableError: the place cannot be reached or read.
        """
        found = catalog.list_runs(self._objects)
        return [name for name, rows in found.items() if rows.committed_steps()]

    def verify(self, run: str | None = None, *, progress: Progress | None = None) -> "VerifyReport":
        """Read every byte of the store (or of one run) again and compare it with what was saved.

        Chunks found damaged are marked, so that no save takes them up again: the next save of the same content
        uploads a good copy. On a read-only store that is left out, and the report says so.

        Args:
            run: verify only this run.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Raises:
            NotFoundError: there is no store, or no such run.
            UnavailableError: the backend failed, so nothing is known.
            UnsupportedFormatError: an object was written by a newer ckptstore.
        """
        from ckptstore import verifying

        if run is None:
            catalog.require_store(self._objects, warn=False)  # the report says it
        elif not catalog.list_run(self._objects, check_run_name(run)).by_step:
            catalog.manifest_of(self._objects, run, 0)  # raises what fits: no store, or no such run
        return verifying.verify(self._objects, run, progress)

    def usage(self) -> Usage:
        """What the store costs: logical, stored and shared bytes, run by run.

        Raises:
            NotFoundError: there is no store.
            CorruptError: a manifest is damaged, so the sums would be wrong.
        """
        return usages.usage(self._objects)
