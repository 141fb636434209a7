"""The scene that is explored: one checkpoint, two saves of the same tensor, two deletes, two collections.

Each guard of the protocol can be taken out, to see that the explorer finds the loss that it is there to prevent.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import msgspec

from ckptstore import protocol
from ckptstore.deltas import Held
from ckptstore.format import CHUNKS, CONDEMNED, DELTAS, RUNS, SESSIONS, ManifestKey, chunk_key, condemned_key, part_id
from ckptstore.manifest import ChunkRef, Condemned, Manifest, Segment, Writer, decode_condemned, encode
from ckptstore.protocol import Create, Get, List, Open, Operation, Put, Upload, collects, saves
from ckptstore.protocol.roots import read_roots
from tests.explorer.engine import CHUNK, Content, Explorer, Steps, lost_chunk, manifests

DIGEST = "ab" * 32
ZERO, A, B = (f"{number:032x}" for number in (0, 10, 11))
C, D, R, T = (f"{number:032x}" for number in (12, 13, 20, 21))
G, H, LAST, MARK = (f"{number:032x}" for number in (0x1000, 0x2000, 0x3000, 0x4000))
J = f"{30:032x}"
TOLD, DONE = "mail/told", "mail/done"
"""What the processes of a joint save tell each other; in the model it lies beside the store's keys."""
NOW = "2026-01-02T03:04:05.000006Z"
WRITER = Writer(host="host", pid=1, version="0")

GUARDS = {
    "condemned lists read after opening": "saves take up what a collection is about to delete",
    "session opened before they are read": "a collection does not wait for a save that knows nothing of it",
    "old saves waited out": "chunks go that a save under way will name",
    "nothing remembered from before": "a save names what was collected since",
    "no key used twice": "a collector that stalled deletes a chunk that was put again",
    "commit by create": "a save that was taken for dead commits after all",
    "manifests read again": "chunks go that a save has named since they were marked",
    "lists stand as long as their keys": "a save takes up what another collector deletes",
}
"""The eight guards of docs/explanation/protocol.md, and what happens without."""


def request(save: str, run: str, step: int, digest: str = DIGEST, *, replace: bool = False) -> protocol.SaveRequest:
    return protocol.SaveRequest(
        run=run,
        step=step,
        save=save,
        created=NOW,
        writer=WRITER,
        metrics={},
        metadata={},
        content=digest,
        tree=None,
        segments=[],
        chunks={digest: len(CHUNK)},
        raw_bytes=len(CHUNK),
        replace=replace,
    )


def first_content() -> Content:
    """A store with one checkpoint, step 1 of the run r."""
    manifest = Manifest(
        run="r",
        step=1,
        save=ZERO,
        created=NOW,
        writer=WRITER,
        replaces=[],
        metrics={},
        metadata={},
        content="d" * 64,
        raw_bytes=len(CHUNK),
        stored_bytes=len(CHUNK),
        new_bytes=len(CHUNK),
        tree=None,
        segments=[],
        chunks=[ChunkRef(digest=DIGEST, save=ZERO, raw=len(CHUNK), stored=len(CHUNK))],
    )
    return frozenset({(str(manifest.key), encode(manifest)), (chunk_key(DIGEST, ZERO), CHUNK)})


def saver(name: str, without: str | None = None) -> Callable[[], Steps]:
    """A finds the chunk through the newest manifest of its run, B, in a run of its own, by listing.

    C saves the step of A again, with another tensor; D the next step of that run, with the tensor of all.
    """
    asked = {
        "A": request(A, "r", 2),
        "B": request(B, "s", 2),
        "C": request(C, "r", 2, "cd" * 32, replace=True),
        "D": request(D, "r", 3),
    }[name]
    change = _SAVER_MUTANTS.get(without or "")
    return lambda: change(protocol.save(asked)) if change else protocol.save(asked)


def deleter(name: str) -> Callable[[], Steps]:
    """P deletes the first checkpoint, Q what A saves."""
    return lambda: protocol.delete("r", 1 if name == "P" else 2, NOW)


def collector(name: str, *, wait: bool = False) -> Callable[[], Steps]:
    collection = {"G": G, "H": H, "last": LAST}[name]
    return lambda: protocol.collect(protocol.CollectRequest(collection=collection, created=NOW, grace=600.0, wait=wait))


def damaged_content() -> Content:
    """The same, with the chunk marked as corrupt, and a good copy that another run has saved."""
    copy = ChunkRef(digest=DIGEST, save=B, raw=len(CHUNK), stored=len(CHUNK))
    [first] = manifests(first_content())
    other = msgspec.structs.replace(first, run="s", step=2, save=B, chunks=[copy])
    first = msgspec.structs.replace(first, segments=[Segment(bytes=len(CHUNK), element=1, chunks=[0])])
    marked = Condemned(collection=MARK, reason="corrupt", created=NOW, keys=[chunk_key(DIGEST, ZERO)])
    return frozenset(
        {
            (str(first.key), encode(first)),
            (str(other.key), encode(other)),
            (chunk_key(DIGEST, ZERO), CHUNK),
            (chunk_key(DIGEST, B), CHUNK),
            (condemned_key(MARK), encode(marked)),
        }
    )


def repairer(name: str) -> Callable[[], Steps]:
    """R and T repair the first checkpoint, both with the good copy that the other run holds."""
    asked = protocol.RepairRequest(
        manifest=ManifestKey("r", 1, ZERO),
        sources=(ManifestKey("s", 2, B),),
        save={"R": R, "T": T}[name],
        created=NOW,
        writer=WRITER,
    )
    return lambda: protocol.repair(asked)


def lost_step(content: Content) -> str | None:
    """What must never be where nobody deletes: a step that no manifest stands for any more."""
    if not any((manifest.run, manifest.step) == ("r", 1) for manifest in manifests(content)):
        return "LOST: nothing stands for step 1 of run r"
    return lost_chunk(content)


def repair_explorer(names: str) -> Explorer:
    """Two repairs (R, T) of one checkpoint, and collections (G, H)."""
    made = [repairer(name) if name in "RT" else collector(name) for name in names]
    return Explorer(damaged_content(), made, lost_step)


def coordinator() -> Steps:
    """J: opens the session of a joint save, holds its own part, waits for the rank's, and commits."""
    asked = request(J, "r", 2)
    begun = protocol.JointRequest(run=asked.run, step=asked.step, save=J, created=NOW, writer=WRITER)
    newest = yield from protocol.begin(begun)
    yield Put(TOLD, str(newest).encode())
    held = yield from protocol.hold(protocol.PartRequest(part_id(J, 0), asked.chunks, newest))
    while True:
        [theirs] = yield Get((DONE,))
        if theirs is not None:
            break
    # Of two that hold the same, either may be named. That the rank's is, lets its guards count.
    held |= msgspec.json.decode(theirs, type=dict[str, Held])
    return (yield from protocol.conclude(asked, held))


def rank(without: str | None = None) -> Callable[[], Steps]:
    """K: waits until it is told that the session stands, holds its part, which is the same, and tells of it."""

    def steps() -> Steps:
        newest: ManifestKey | None = None
        while without != "told after the session was opened":
            [told] = yield Get((TOLD,))
            if told is not None:
                newest = ManifestKey.parse(told.decode())
                break
        part = protocol.PartRequest(part_id(J, 1), {DIGEST: len(CHUNK)}, newest)
        if without == "told after the session was opened":
            held = yield from protocol.hold(part)
        elif without in _SAVER_MUTANTS:
            held = yield from _SAVER_MUTANTS[without](protocol.hold_part(part, J))
        else:
            held = yield from protocol.hold_part(part, J)
        yield Put(DONE, msgspec.json.encode(held))

    return steps


def joint_explorer(names: str, without: str | None = None) -> Explorer:
    """A joint save, of the coordinator J and the rank K, beside saves (A, B), deletes (P) and collections (G, H)."""
    made: list[Callable[[], Steps]] = []
    for name in names:
        if name in "JK":
            made.append(coordinator if name == "J" else rank(without))
        elif name in "AB":
            made.append(saver(name))
        else:
            made.append(deleter(name) if name in "PQ" else collector(name))
    return Explorer(first_content(), made, lost_chunk)


JOINT_GUARDS = (
    "told after the session was opened",
    "condemned lists read after opening",
    "nothing remembered from before",
    "no key used twice",
)
"""What each rank of a joint save has to keep to."""


def explorer(names: str, without: str | None = None, *, wait: bool = False) -> Explorer:
    """The explorer of the actors A, B, C, D, P, Q, G, H that `names` holds, with one of the guards taken out.

    With J and K it is that of a joint save.
    """
    if "J" in names:
        return joint_explorer(names, without)
    made: dict[str, Callable[[], Steps]] = {}
    for name in names:
        if name in "ABCD":
            made[name] = saver(name, without)
        else:
            made[name] = deleter(name) if name in "PQ" else collector(name, wait=wait)
    return Explorer(first_content(), list(made.values()), lost_chunk)


@contextlib.contextmanager
def guard_taken_out(name: str) -> Iterator[None]:
    """For those guards that stand in functions of the library, and not in the order of operations."""
    replaced = _PATCHES.get(name)
    if replaced is None:
        assert name in _SAVER_MUTANTS, name
        yield
        return
    module, function, instead = replaced
    with mock.patch.object(module, function, instead):
        yield


def _no_lists_read(steps: Steps) -> Steps:
    """Every listing of what is condemned shows nothing."""
    answer: Any = None
    try:
        while True:
            operation = steps.send(answer)
            answer = [] if operation == List((CONDEMNED,)) else (yield operation)
    except StopIteration as end:
        return end.value


def _session_late(steps: Steps) -> Steps:
    """The session is opened when the condemned lists were read."""
    answer: Any = None
    held: Open | None = None
    try:
        while True:
            operation = steps.send(answer)
            if isinstance(operation, Open):
                held, answer = operation, None
                continue
            reads_lists = operation == List((CONDEMNED,)) or (
                isinstance(operation, Get) and operation.keys[0].startswith(CONDEMNED)
            )
            if held is not None and not reads_lists:
                yield held
                held = None
            answer = yield operation
    except StopIteration as end:
        return end.value


def _remembered(steps: Steps) -> Steps:
    """What can be reused was looked up before anything else, and is not looked at again."""
    remembered = yield List((f"chunks/{DIGEST[:2]}/{DIGEST}",))
    answer: Any = None
    try:
        while True:
            operation = steps.send(answer)
            answer = remembered if operation == List((f"chunks/{DIGEST[:2]}/{DIGEST}",)) else (yield operation)
    except StopIteration as end:
        return end.value


def _plain_put(steps: Steps) -> Steps:
    """The manifest is put, whatever stands there."""
    answer: Any = None
    try:
        while True:
            operation = steps.send(answer)
            if isinstance(operation, Create) and operation.key.startswith(RUNS):
                yield Put(operation.key, operation.content)
                answer = True
            else:
                answer = yield operation
    except StopIteration as end:
        return end.value


def _same_key(steps: Steps) -> Steps:
    """Chunks go where the first save has put them."""
    answer: Any = None
    try:
        while True:
            operation = steps.send(answer)
            if isinstance(operation, Upload):
                operation = Upload(ZERO, operation.digests, operation.bases)
            answer = yield operation
    except StopIteration as end:
        return end.value


_SAVER_MUTANTS: dict[str, Callable[[Steps], Steps]] = {
    "condemned lists read after opening": _no_lists_read,
    "session opened before they are read": _session_late,
    "nothing remembered from before": _remembered,
    "no key used twice": _same_key,
    "commit by create": _plain_put,
}


def _held_by_first(digest: str, save: str, *rest: Any) -> Held:
    return Held(digest, ZERO if save in (A, B) else save, *rest)


def _nobody_waited_for(*_: Any) -> Generator[Operation, Any, None]:
    yield from ()


def _roots_read_once(roots: Any) -> Generator[Operation, Any, None]:
    if not roots.seen:
        yield from read_roots(roots)


def _lists_dropped(lists: Any, roots: Any) -> Generator[Operation, Any, None]:
    yield from collects._delete([condemned_key(each.collection) for each in lists])


_PATCHES: dict[str, tuple[Any, str, Any]] = {
    "no key used twice": (saves, "Held", _held_by_first),
    "old saves waited out": (collects, "_wait_out", _nobody_waited_for),
    "manifests read again": (collects, "read_roots", _roots_read_once),
    "lists stand as long as their keys": (collects, "_drop", _lists_dropped),
}


def leftovers(content: Content) -> list[str]:
    """What no checkpoint needs, and a collection with nobody else there should not have left."""
    needed = {ref.key for manifest in manifests(content) for ref in manifest.chunks}
    return [
        key
        for key, _ in content
        if key.startswith((SESSIONS, CONDEMNED)) or (key.startswith((CHUNKS, DELTAS)) and key not in needed)
        if not _is_needed_list(key, dict(content)[key], needed)
    ]


def _is_needed_list(key: str, value: bytes, needed: set[str]) -> bool:
    """A list one of whose keys has come to be needed stays."""
    return key.startswith(CONDEMNED) and not needed.isdisjoint(decode_condemned(value, key).keys)
