"""Restores and loads carried out: find a checkpoint, verify each byte on its way into memory, put it in place."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptstore import catalog
from ckptstore.assembly import Assembly
from ckptstore.condemning import condemn_corrupt
from ckptstore.errors import (
    CheckpointError,
    CheckpointWarning,
    CorruptError,
    InvalidInputError,
    MissingChunkError,
    retold,
)
from ckptstore.manifest import Manifest
from ckptstore.matching import match
from ckptstore.objects.base import Objects
from ckptstore.peers import Peers
from ckptstore.pipeline import Progress
from ckptstore.placement import Placement
from ckptstore.skeleton import find, tensors
from ckptstore.tree import unflatten

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint that was restored, and with strict=False the keys that were left out."""

    manifest: Manifest
    missing: list[str]
    unexpected: list[str]


def load(
    objects: Objects,
    manifest: Manifest,
    *,
    only: str | None,
    device: "torch.device | str",
    threads: int,
    progress: Progress | None,
) -> Any:
    """The tree of a checkpoint, or the part of it at the path `only`. Raises CorruptError, NotFoundError."""
    node = manifest.tree if only is None else find(manifest.tree, only)
    path = only or ""
    lengths = manifest.segment_bytes
    assembly = Assembly(manifest, device)
    for _, tensor in tensors(node, lengths, path):
        assembly.want(tensor)
    try:
        assembly.fill(objects, threads, _counted(assembly, progress))
    except CorruptError as error:
        if (again := rewritten(objects, manifest, error)) is not None:
            return load(objects, again, only=only, device=device, threads=threads, progress=progress)
        condemn_corrupt(objects, error)
        raise retold(
            error,
            f"{error}. Load another step, or let run.restore() go back to one that verifies; `ckptstore verify` lists "
            "all damage.",
        ) from error
    return unflatten(node, lambda described, _: assembly.value(described), lengths, path)


def restore(
    objects: Objects,
    run: str,
    destination: Any,
    *,
    step: int | None,
    expect: str | None,
    strict: bool,
    threads: int,
    progress: Progress | None,
    peers: Peers,
) -> Restored | None:
    """Restore the newest checkpoint that verifies (or the one of `step`) into `destination`; None if there is none.

    expect: the digest that the newest checkpoint, or that of `step`, has to have; no other one is tried then.
    peers: the processes that do this together. All of them restore the same checkpoint, or all raise.

    Raises:
        InvalidInputError: the checkpoint does not fit the destination.
        NotFoundError, CorruptError: `step` is not there, or is damaged; or every checkpoint of the run is damaged;
            or what is expected is not there, or something else is.
    """
    damage: list[CorruptError] = []
    told = 0
    target = _Target()
    with target.telling():
        candidates = _candidates(objects, run, step, expect)
        again: Manifest | None = None
        while (found := again or peers.first_decides(lambda: next(candidates, None))) is not None:
            again = None
            if isinstance(found, CorruptError):
                damage.append(found)
                continue
            _warn(damage[told:], found)
            told = len(damage)
            placement, error = _prepared(found, destination, target, strict=strict)
            error = peers.agree(error)
            if error is None and placement is not None:
                error = peers.agree(_filled(placement.assembly, objects, threads, progress, peers))
            if isinstance(error, CorruptError):
                again = _rewritten_for_all(objects, found, error, peers)
                if again is None:
                    condemn_corrupt(objects, error)
                    damage.append(error)
                continue
            if error is not None or placement is None:
                raise error or AssertionError("unreachable")
            target.is_touched = True
            _put_in_place(placement, peers, strict=strict)
            return Restored(found, placement.matched.missing, placement.matched.unexpected)
        if damage:
            raise retold(
                damage[-1],
                f"no checkpoint of run {run!r} can be restored: {damage[-1]}."
                f"{f' ({len(damage)} checkpoints were tried.)' if len(damage) > 1 else ''}"
                f"{'' if target.was_written else ' The destination was not changed.'}"
                " `ckptstore verify` lists all damage; run.load(step=…, only='model') may still give a part that is "
                "whole; a copy of the store may hold the object that is named.",
            ) from damage[-1]
    return None


def _prepared(
    manifest: Manifest, destination: Any, target: "_Target", *, strict: bool
) -> tuple[Placement | None, CheckpointError | None]:
    """Where everything of a checkpoint goes, or why it does not fit. Nothing is written yet."""
    try:
        placement = Placement(manifest, match(destination, manifest))
        placement.matched.check(manifest, strict=strict)
        target.require_all_overwritten(placement)
    except CheckpointError as error:
        return None, error
    target.begin(placement)
    return placement, None


def _filled(
    assembly: Assembly, objects: Objects, threads: int, progress: Progress | None, peers: Peers
) -> CheckpointError | None:
    """Read all that is wanted; return what went wrong. Peers that want other parts read for themselves."""
    together = peers if peers.all_same(assembly.wanted()) else None
    try:
        assembly.fill(objects, threads, _counted(assembly, progress), together)
    except CheckpointError as error:
        return error
    return None


def _put_in_place(placement: Placement, peers: Peers, *, strict: bool) -> None:
    """Hand everything over; if that fails in one of the peers, it fails in all."""
    try:
        placement.put_in_place(strict=strict)
    except Exception as error:  # of a load_state_dict, which is the user's: the peers are told before it goes on
        peers.agree(
            error if isinstance(error, CheckpointError) else InvalidInputError(f"{type(error).__name__}: {error}")
        )
        raise
    if (of_another := peers.agree(None)) is not None:
        raise of_another


def _rewritten_for_all(objects: Objects, manifest: Manifest, error: CorruptError, peers: Peers) -> Manifest | None:
    return peers.first_decides(lambda: rewritten(objects, manifest, error))


def rewritten(objects: Objects, manifest: Manifest, error: CorruptError) -> Manifest | None:
    """The same checkpoint in another form, if a compaction or a repair has put it in that while it was read.

    A collection may then have taken the chunks of the old one.
    """
    if not isinstance(error, MissingChunkError):
        return None
    try:
        standing = catalog.manifest_of(objects, manifest.run, manifest.step)
    except CheckpointError:
        return None  # that the chunk is missing tells more
    same = standing.content == manifest.content and standing.save != manifest.save
    return standing if same else None


class _Target:
    """What has been written to the destination so far, over all checkpoints that were tried."""

    def __init__(self) -> None:
        self.is_touched = False
        self._tried: list[Placement] = []

    @property
    def was_written(self) -> bool:
        return self.is_touched or any(placement.has_written for placement in self._tried)

    def begin(self, placement: Placement) -> None:
        self._tried.append(placement)

    def require_all_overwritten(self, placement: Placement) -> None:
        """Raise if parts of a damaged checkpoint would stay: tensors that this one does not have."""
        left = {
            path
            for tried in self._tried
            if tried.has_written
            for place, path in tried.direct.items()
            if place not in placement.live_places()
        }
        if left:
            raise InvalidInputError(
                f"step {placement.manifest.step} of run {placement.manifest.run!r} does not hold "
                f"{', '.join(sorted(left)[:8])}, which a damaged newer checkpoint has been written to already."
            )

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Let every error that passes say so if the destination was changed."""
        try:
            yield
        except CheckpointError as error:
            if not self.was_written:
                raise
            raise retold(error, f"{str(error).removesuffix(' Nothing was changed.')} {_MIXED}") from error
        except BaseException as error:
            if self.was_written:
                error.add_note(_MIXED)
            raise


_MIXED = (
    "The destination holds parts of a checkpoint now and must not be used: make model and optimizer anew before you "
    "train or restore another step."
)


def _candidates(objects: Objects, run: str, step: int | None, expect: str | None) -> Iterator[Manifest | CorruptError]:
    if step is not None or expect is not None:
        yield catalog.require_digest(catalog.pick(objects, run, step), expect)
        return
    if catalog.exists(objects):
        yield from catalog.newest_first(objects, run)


def _warn(damage: Sequence[CorruptError], going_back_to: Manifest) -> None:
    """Say what was damaged, once it is known where the restore goes on."""
    for error in damage:
        warnings.warn(CheckpointWarning(f"damaged: {error}. Going back to step {going_back_to.step}."), stacklevel=4)


def _counted(assembly: Assembly, progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total, read = assembly.stored_bytes(), 0

    def count(stored_bytes: int) -> None:
        nonlocal read
        read += stored_bytes
        progress(read, total)

    return count
