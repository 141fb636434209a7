"""What people touch first: `Store`, the place where runs are."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from ckptstore import catalog
from ckptstore import usage as usages
from ckptstore.checkpoint import Checkpoint
from ckptstore.errors import InvalidInputError, NotFoundError
from ckptstore.format import Codec, check_run_name, split_run
from ckptstore.manifest import Manifest
from ckptstore.objects.base import Objects
from ckptstore.objects.open import open_objects
from ckptstore.pipeline import Progress
from ckptstore.run import Run, Shared
from ckptstore.usage import Usage

if TYPE_CHECKING:
    from datetime import timedelta

    from ckptstore.collecting import CollectReport
    from ckptstore.diffing import Diff, Read
    from ckptstore.doctor import Finding
    from ckptstore.pruning import PruneReport
    from ckptstore.repairing import RepairReport
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

    def _repr_html_(self) -> str:
        """For notebooks: the runs, and what they cost. Reads every manifest."""
        from ckptstore import notebook

        return notebook.store_html(self._objects)

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

    def verify(
        self, run: str | None = None, *, quick: bool = False, progress: Progress | None = None
    ) -> "VerifyReport":
        """Read every byte of the store (or of one run) again and compare it with what was saved.

        Chunks found damaged are marked, so that no save takes them up again: the next save of the same content
        uploads a good copy. On a read-only store that is left out, and the report says so.

        Args:
            run: verify only this run.
            quick: read the manifests, and of the chunks only see by listing that each is there and as long as it
                should be; read in full only those that seem not to be.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Raises:
            NotFoundError: there is no store, or no such run.
            UnavailableError: the backend failed, so nothing is known.
            UnsupportedFormatError: an object was written by a newer ckptstore.
        """
        from ckptstore import verifying

        self._require(run)
        return verifying.verify(self._objects, run, progress, quick=quick)

    def prune(
        self,
        runs: str | Sequence[str] | None = None,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_within: "float | timedelta | str | None" = None,
        keep_best: str | Sequence[str] | None = None,
        keep_tags: str | Sequence[str] | None = None,
        dry_run: bool = False,
    ) -> "PruneReport":
        """Delete the checkpoints that no rule keeps. Their bytes go with the next collection.

        The rules add up: what any of them wants stays. The newest checkpoint of a run that is not known to be damaged,
        those with a tag, and those known to be damaged (which count for no rule) always stay.

        Args:
            runs: the name of a run, or several; None is every run, each by itself.
            keep_last: so many of the newest.
            keep_every: the first one in every so many steps: with 1000, the first from step 0 on, from 1000 on, and so
                on.
            keep_within: those saved within this time, by the store's clock: "12h", "7d", "2w", a timedelta, seconds.
            keep_best: that with the best value of a metric, such as "loss" (the least) or "accuracy:max"; or several.
            keep_tags: keep nothing but what has a tag, if no other rule is given; what has any tag stays in any case.
            dry_run: change nothing; the report is the same.

        Returns:
            What was kept and why, and what was deleted.

        Raises:
            InvalidInputError: no rule is given, or one makes no sense, or asks for a metric that no checkpoint of a run
                has. Nothing was deleted.
            NotFoundError: there is no store, or no such run.
            CorruptError: a list of damaged chunks cannot be read, so what is sound is not known. Nothing was deleted.
            UnavailableError: the backend failed; what was deleted until then is, and the rest is not.
        """
        from ckptstore import pruning, retention

        rules = retention.rules(
            keep_last=keep_last,
            keep_every=keep_every,
            keep_within=keep_within,
            keep_best=keep_best,
            keep_tags=keep_tags,
        )
        catalog.require_store(self._objects)
        names = [runs] if isinstance(runs, str) else runs
        known = self.runs()
        for name in names or ():
            if check_run_name(name) not in known:
                raise NotFoundError(f"there is no run {name!r} with a checkpoint in {self.url}.")
        return pruning.prune(self._objects, known if names is None else names, rules, dry_run=dry_run)

    def collect(
        self, *, dry_run: bool = False, wait: bool = False, grace: float = 600.0, alone: bool = False
    ) -> "CollectReport":
        """Delete the chunks that no checkpoint needs any more, while other jobs go on saving.

        No checkpoint ever loses a chunk to it, whatever else runs, and whoever is killed or stalls for however long:
        docs/explanation/protocol.md says why. Chunks are marked first, and deleted when every save that was under way
        then has ended.

        Args:
            dry_run: change nothing; say what would be deleted.
            wait: wait for the saves under way. Else, if there are some, nothing is deleted now: a later collection
                goes on with what this one has marked.
            grace: seconds without a sign of life after which a save is taken for dead. It can never commit then; a
                process that was only stalled, and goes on, saves again. Saves show themselves every 20 s.
            alone: say that nobody else uses the store meanwhile. Asked for on network file systems (NFS and the like),
                whose listings may be old.

        Returns:
            What was found and done.

        Raises:
            NotFoundError: there is no store.
            CorruptError: a manifest, a session or the marker is damaged, so what is needed is not known. Nothing was
                deleted.
            UnsupportedFormatError: likewise, as a newer ckptstore wrote it.
            UnavailableError: the backend failed, or lacks what a collection needs (`ckptstore doctor` tells what).
            InvalidInputError: `grace` makes no sense.
        """
        from ckptstore import collecting

        if type(grace) not in (int, float) or not 0 <= grace < math.inf:
            raise InvalidInputError(f"grace must be a number of seconds, not {grace!r}.")
        return collecting.collect(self._objects, dry_run=dry_run, wait=wait, grace=grace, alone=alone)

    def repair(self, run: str | None = None) -> "RepairReport":
        """Make checkpoints whole again that need chunks marked as damaged, from good copies in the store.

        `verify`, and every restore that finds damage, marks damaged chunks; the next save of the same content uploads
        a good copy. This rewires the manifests of the checkpoints concerned to such copies, each of which is read to
        the last byte before.

        Args:
            run: repair only this run; copies are looked for in all.

        Returns:
            What was repaired, and what cannot be.

        Raises:
            NotFoundError: there is no store, or no such run.
            CorruptError: a list of marks cannot be read, so which copies are good is not known. Nothing was changed.
            FencedError: collections took the repair for dead three times; what was repaired until then is.
            UnavailableError: the backend failed. What was repaired until then is.
            UnsupportedFormatError: an object was written by a newer ckptstore.
        """
        from ckptstore import repairing

        self._require(run)
        return repairing.repair(self._objects, run)

    def examine(self, *, grace: float = 600.0) -> "list[Finding]":
        """Examine the store, or the place where it is to be: whether it does what saves and collections need of it.

        Writes and deletes a few small objects below `scratch/`. What fails is a finding, and not an error.

        Args:
            grace: seconds without a sign of life after which a save counts as dead.

        Returns:
            What was found: versions, promises that the place keeps or breaks, clocks, dead saves, garbage, damage that
            is marked.
        """
        from ckptstore import doctor

        return doctor.examine(self._objects, grace)

    def diff(
        self,
        before: "str | Checkpoint",
        after: "str | Checkpoint",
        *,
        other: "Store | None" = None,
        tensors: str | None = None,
        read: "Read" = "changed",
        progress: Progress | None = None,
    ) -> "Diff":
        """What has changed from one checkpoint to another: `print(store.diff("lstm@100", "lstm@200"))`.

        Chunks with equal digests hold equal bytes and need not be read. The others are fetched, verified, compared and
        forgotten, so that memory stays below 256 MiB whatever the size of the checkpoints (but for tensors that are
        not contiguous, or views of others: each of those is put together as a whole).

        Args:
            before: "RUN@STEP", "RUN" for its newest, or a `Checkpoint`.
            after: likewise.
            other: the store that `after` is in, if it is another.
            tensors: compare only tensors whose path matches this pattern, such as "model.*" (`fnmatch`'s).
            read: "changed": the chunks that differ, so that all figures but those of lengths are exact. "all": the
                equal ones as well, once, so that the relative L2 distance and the cosine are those of whole tensors.
                "nothing": manifests alone, which tell which chunks of which tensors have changed.
            progress: called with the bytes read so far and those to be read in all, from any thread, one at a time.

        Returns:
            What was found; its `summary` is one sentence.

        Raises:
            NotFoundError: there is no such store, run or step.
            CorruptError: a checkpoint is damaged; the text names what cannot be compared.
            UnavailableError: a backend failed.
            InvalidInputError: an argument makes no sense.
        """
        from ckptstore import diffing

        theirs = other if other is not None else self
        return diffing.compare(
            diffing.Side(self._objects, self._manifest(before)),
            diffing.Side(theirs._objects, theirs._manifest(after)),
            tensors=tensors,
            read=read,
            threads=self._threads,
            progress=progress,
        )

    def _manifest(self, wanted: "str | Checkpoint") -> Manifest:
        """The manifest of "RUN@STEP", or of the newest of "RUN", or of a checkpoint."""
        if isinstance(wanted, Checkpoint):
            return catalog.manifest_of(self._objects, wanted.run, wanted.step)
        run, step = split_run(wanted)
        return catalog.pick(self._objects, run, step)

    def _require(self, run: str | None) -> None:
        """Raise NotFoundError if there is no store, or no such run."""
        if run is None:
            catalog.require_store(self._objects, warn=False)
        elif not catalog.list_run(self._objects, check_run_name(run)).by_step:
            catalog.manifest_of(self._objects, run, 0)  # raises what fits: no store, or no such run

    def usage(self) -> Usage:
        """What the store costs: logical, stored and shared bytes, run by run.

        Raises:
            NotFoundError: there is no store.
            CorruptError: a manifest is damaged, so the sums would be wrong.
        """
        return usages.usage(self._objects)
