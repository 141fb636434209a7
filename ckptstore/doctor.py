"""An examination of a store: whether its place keeps the promises that the protocol needs, and what lies about in it.

Each check is a function that yields findings; one that cannot be carried out is a finding too. Needs no torch.
"""

import importlib.metadata
import platform
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ckptstore import protocol
from ckptstore.catalog import exists, read_marker
from ckptstore.condemning import marked_corrupt
from ckptstore.errors import CheckpointError, CorruptError, UnavailableError
from ckptstore.format import SCRATCH, new_save_id
from ckptstore.objects.base import Objects
from ckptstore.objects.open import self_test, store_time
from ckptstore.performing import Performer
from ckptstore.usage import manifests
from ckptstore.writer import now_text

__all__ = ["Finding", "examine"]

PACKAGES = (
    "ckptstore",
    "torch",
    "numpy",
    "blake3",
    "zstandard",
    "msgspec",
    "fsspec",
    "s3fs",
    "botocore",
    "obstore",
    "numba",
)
RACERS = 8
SKEW_SECONDS = 5.0

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an examination has found.

    Attributes:
        level: "ok"; "note", for what is worth knowing or tidying up; "problem", for what stands in the way of saves,
            restores or collections.
        what: what was found.
        advice: what to do about it; empty where nothing need be done.
    """

    level: Level
    what: str
    advice: str = ""


def examine(objects: Objects, grace: float) -> list[Finding]:
    """Examine a store, or a place where one is to be. Writes nothing but below `scratch/`, and deletes that again.

    Args:
        objects: the place.
        grace: seconds without a sign of life after which a save counts as dead.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        lambda: _marker(objects),
        lambda: _promises(objects),
        lambda: _contents(objects, grace),
        lambda: _marks(objects),
    )
    findings = [finding for check in checks for finding in _carried_out(check)]
    return list(dict.fromkeys(findings))  # what keeps several checks from being carried out is told once


def _carried_out(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except CorruptError as error:
        yield Finding("problem", str(error), "ckptstore verify names all that is damaged, and what to do about it.")
    except CheckpointError as error:
        yield Finding("problem", str(error))


def _versions() -> Iterator[Finding]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("ok", f"installed: {', '.join(found)}")


def _marker(objects: Objects) -> Iterator[Finding]:
    marker = read_marker(objects)
    if marker is None:
        yield Finding("note", f"{objects.url} holds no store yet", "The first save makes one.")
        return
    yield Finding(
        "ok",
        f"{objects.url} holds the store {marker.store}, made {marker.created}, format version {marker.format}, chunks "
        f"of up to {marker.chunk_bytes:,} bytes",
    )


def _promises(objects: Objects) -> Iterator[Finding]:
    try:
        self_test(objects)
    except UnavailableError as error:
        yield Finding(
            "problem",
            f"the place does not do what saves need of it: {error}",
            "Checkpoints that are there can be restored. For saves, permission to write, list and read is needed, and "
            "to delete below sessions/ and scratch/.",
        )
        return
    yield Finding("ok", "create is exclusive; a get and a list show what was just put; delete works")
    winners = _race(objects)
    if winners == 1:
        yield Finding("ok", f"of {RACERS} creates of one key at the same time, one won")
    else:
        yield Finding(
            "problem",
            f"of {RACERS} creates of one key at the same time, {winners} won",
            "Two jobs could overwrite each other's checkpoints here. Use another place, or one job at a time.",
        )
    if stale := objects.stale_listings():
        yield Finding("note", stale, "Saves are safe. Collect only when no other machine uses the store: gc --alone.")
    yield from _clock(objects)


def _race(objects: Objects) -> int:
    key = f"{SCRATCH}{uuid.uuid4().hex}"
    start = threading.Barrier(RACERS)

    def create(number: int) -> bool:
        start.wait()
        return objects.create(key, bytes([number]) * 1000)

    try:
        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(create, range(RACERS)))
    finally:
        objects.delete(key)
    return won.count(True)


def _clock(objects: Objects) -> Iterator[Finding]:
    begun = time.time()
    there = store_time(objects)
    skew = there - (begun + time.time()) / 2
    if abs(skew) <= SKEW_SECONDS:
        yield Finding("ok", "the clock of the place and that of this machine agree")
    else:
        yield Finding(
            "note",
            f"the clock of the place is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of this machine",
            "Nothing depends on it: whether a save lives is judged by the clock of the place alone. Times that are "
            "shown are those of the machines that saved.",
        )


def _contents(objects: Objects, grace: float) -> Iterator[Finding]:
    """What a collection would find; it reads every manifest, and changes nothing."""
    if not exists(objects, warn=False):
        return
    request = protocol.CollectRequest(collection=new_save_id(), created=now_text(), grace=grace, dry_run=True)
    found = Performer(objects).perform(protocol.collect(request))
    yield Finding(
        "ok",
        f"{_counted(found.checkpoints, 'checkpoint')}, {_counted(found.chunks, 'chunk')}; every manifest can be read",
    )
    for session in found.waiting:
        writer = session.writer
        yield Finding("ok", f"a save is under way: {session.run}@{session.step}, process {writer.pid} on {writer.host}")
    for session in found.fenced:
        writer = session.writer
        yield Finding(
            "note",
            f"the save of {session.run}@{session.step} by process {writer.pid} on {writer.host}, begun "
            f"{session.opened}, shows no sign of life",
            "If that job was killed, all is well: the next ckptstore gc tidies it up. If it still runs, it is stalled "
            "or cut off from the store; it saves again by itself after a gc.",
        )
    garbage = found.unreferenced | found.condemned
    if garbage:
        yield Finding(
            "note",
            f"{_counted(len(garbage), 'chunk')} ({sum(garbage.values()):,} bytes) that no checkpoint needs",
            "ckptstore gc deletes what is garbage.",
        )
    if found.replaced:
        yield Finding(
            "note",
            f"{_counted(len(found.replaced), 'manifest')} of checkpoints that were saved again",
            "They do not count any more; ckptstore gc removes them.",
        )
    if found.expired:
        yield Finding(
            "note", f"{_counted(len(found.expired), 'tombstone')} older than a week", "ckptstore gc removes them."
        )
    if leftovers := objects.leftovers(grace, remove=False):
        what = f"{_counted(len(leftovers), 'unfinished file')} of writers that died"
        yield Finding("note", what, "ckptstore gc removes them.")
    if found.unreadable:
        yield Finding(
            "problem",
            f"{_counted(found.unreadable, 'list')} of condemned chunks cannot be read, so every save uploads all of "
            "its chunks, and repair refuses to work",
            "ckptstore verify names each. Delete them when no job saves, and verify again, which makes the marks anew.",
        )
    for key in found.unknown:
        yield Finding("note", f"{key} is none of the store's objects", "It is left alone.")


def _marks(objects: Objects) -> Iterator[Finding]:
    if marked := marked_corrupt(objects):
        yield from _damaged_runs(objects, marked)
        yield Finding(
            "note",
            f"{_counted(len(marked), 'chunk')} marked as damaged",
            "ckptstore repair makes checkpoints that need them whole, where there are good copies. Those that none "
            "needs go with the next ckptstore gc.",
        )


def _damaged_runs(objects: Objects, marked: set[str]) -> Iterator[Finding]:
    """Which runs have checkpoints that need what is damaged; a problem where no other is left."""
    whole: Counter[str] = Counter()
    damaged: Counter[str] = Counter()
    newest_whole: dict[str, int] = {}
    for manifest in manifests(objects):
        if any(ref.key in marked for ref in manifest.chunks):
            damaged[manifest.run] += 1
        else:
            whole[manifest.run] += 1
            newest_whole[manifest.run] = manifest.step
    for run, count in damaged.items():
        of = f"run {run}: {count} of {_counted(count + whole[run], 'checkpoint')} damaged"
        if run in newest_whole:
            yield Finding("note", f"{of}; the newest whole one is step {newest_whole[run]}", "See ckptstore repair.")
        else:
            yield Finding("problem", f"{of}; none can be restored as a whole", "ckptstore repair says what is lost.")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
