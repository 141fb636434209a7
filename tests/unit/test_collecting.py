"""The decisions of a collection, without a backend: what goes, what stays, what ends it. See protocol.md.

The interleavings with saves and other collections are walked in tests/explorer; here one collection has the store to
itself, but for what a test lets happen in between.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import msgspec
import pytest

from ckptstore import format, protocol
from ckptstore.errors import CheckpointError, CorruptError, UnavailableError, UnsupportedFormatError
from ckptstore.format import ManifestKey, chunk_key, condemned_key, manifest_key, session_key
from ckptstore.manifest import (
    ChunkRef,
    Condemned,
    Ended,
    Manifest,
    Session,
    Writer,
    decode_condemned,
    decode_manifest,
    encode,
    format_naming,
)
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol import (
    Clock,
    Collected,
    CollectRequest,
    Create,
    Delete,
    Get,
    List,
    Operation,
    Pause,
    Put,
    Sync,
    collects,
    roots,
)
from ckptstore.sealed import seal, unseal

WRITER = Writer(host="host", pid=1, version="0")
CREATED = "2026-01-02T03:04:05.000006Z"
NOW = 50_000_000.0
GRACE = 600.0
WEEK = 7 * 86_400.0
COLLECTION = 0xC0
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def save_id(number: int) -> str:
    return f"{number:032x}"


class Place:
    """A store of a dict with times, that carries operations out one at a time and keeps what was done, in order."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.modified: dict[str, float] = {}
        self.now = NOW
        self.done: list[Operation] = []
        self.before: Callable[[Operation], None] = lambda operation: None
        """What else happens, just before an operation."""

    def put(self, key: str, content: bytes, age: float = 0.0) -> str:
        self.content[key] = content
        self.modified[key] = self.now - age
        return key

    def chunk(self, digest: str, save: int, size: int = 100, *, is_delta: bool = False) -> str:
        return self.put(chunk_key(digest, save_id(save), is_delta=is_delta), b"x" * size)

    def checkpoint(self, save: int, step: int, *chunks: str, replaces: Sequence[int] = (), run: str = "run") -> str:
        """A manifest that names these chunk keys; one that is a delta stands on the chunk named before it."""
        found = [format.ChunkKey.parse(key) for key in chunks]
        value = Manifest(
            format=format_naming(chunks),
            run=run,
            step=step,
            save=save_id(save),
            created=CREATED,
            writer=WRITER,
            replaces=[save_id(each) for each in replaces],
            metrics={},
            metadata={},
            content="c" * 64,
            raw_bytes=100,
            stored_bytes=10,
            new_bytes=10,
            tree=None,
            segments=[],
            chunks=[
                ChunkRef(digest=key.digest, save=key.save_id, raw=7, stored=9, base=at - 1 if key.is_delta else None)
                for at, key in enumerate(found)
                if key
            ],
        )
        return self.put(str(value.key), encode(value))

    def ended(self, state: Any, save: int, step: int, age: float = 0.0) -> str:
        value = Ended(state=state, run="run", step=step, save=save_id(save), created=CREATED)
        return self.put(str(value.key), encode(value), age)

    def session(self, save: int, step: int = 9, age: float = 0.0) -> str:
        value = Session(save=save_id(save), run="run", step=step, writer=WRITER, opened=CREATED, beat=0)
        return self.put(session_key(save_id(save)), encode(value), age)

    def condemn(self, name: int, *keys: str, reason: Any = "unreferenced") -> str:
        value = Condemned(
            format=format_naming(keys), collection=save_id(name), reason=reason, created=CREATED, keys=list(keys)
        )
        return self.put(condemned_key(save_id(name)), encode(value))

    def collect(self, **given: Any) -> Collected:
        request = CollectRequest(collection=save_id(COLLECTION), created=CREATED, grace=GRACE)
        found: Collected = self.perform(protocol.collect(msgspec.structs.replace(request, **given)))
        return found

    def perform(self, steps: Generator[Operation, Any, Any]) -> Any:
        answer: Any = None
        try:
            while True:
                operation = steps.send(answer)
                self.before(operation)
                self.done.append(operation)
                answer = self.do(operation)
        except StopIteration as end:
            return end.value

    def do(self, operation: Operation) -> Any:
        match operation:
            case List(prefixes):
                return [
                    ObjectInfo(key, len(self.content[key]), self.modified[key])
                    for prefix in prefixes
                    for key in sorted(self.content)
                    if key.startswith(prefix)
                ]
            case Get(keys):
                return [self.content.get(key) for key in keys]
            case Create(key, content):
                if key in self.content:
                    return False
                self.put(key, content)
                return True
            case Put(key, content):
                self.put(key, content)
            case Delete(keys):
                for key in keys:
                    self.content.pop(key, None)
            case Clock():
                return self.now
            case Pause(seconds):
                self.now += seconds
            case Sync():
                pass
            case _:
                raise AssertionError(operation)
        return None

    def happens(self, at: Callable[[Operation], bool], what: Callable[[], object]) -> None:
        """Let something happen once, just before the first operation like this."""
        waiting = [what]

        def before(operation: Operation) -> None:
            if waiting and at(operation):
                waiting.pop()()

        self.before = before

    def deleted(self) -> list[list[str]]:
        return [list(operation.keys) for operation in self.done if isinstance(operation, Delete) if operation.keys]

    def below(self, prefix: str) -> list[str]:
        return sorted(key for key in self.content if key.startswith(prefix))


@pytest.fixture
def place() -> Place:
    return Place()


def creates_a_list(operation: Operation) -> bool:
    return isinstance(operation, Create) and operation.key.startswith("condemned/")


# ---- what goes and what stays


def test_just_the_chunks_that_no_checkpoint_names_go(place: Place) -> None:
    kept = [place.chunk(A, 1), place.chunk(B, 2, 50)]
    manifest = place.checkpoint(1, 5, *kept)
    garbage = {place.chunk(A, 3, 30): 30, place.chunk(C, 1, 7): 7}
    found = place.collect()
    assert sorted(place.content) == sorted([*kept, manifest])
    assert found == Collected(checkpoints=1, chunks=4, chunk_bytes=187, unreferenced=garbage, swept=2, swept_bytes=37)


def test_where_there_is_no_garbage_nothing_is_written_or_deleted(place: Place) -> None:
    place.checkpoint(1, 5, place.chunk(A, 1))
    assert place.collect().swept == 0
    assert not [operation for operation in place.done if isinstance(operation, Create | Put)]
    assert place.deleted() == []


def test_an_empty_store_is_collected(place: Place) -> None:
    assert place.collect() == Collected()


def test_all_that_goes_is_condemned_first_and_the_list_goes_last(place: Place) -> None:
    garbage = sorted([place.chunk(B, 1), place.chunk(A, 1)])
    place.collect()
    [created] = [operation for operation in place.done if isinstance(operation, Create)]
    listed = decode_condemned(created.content, created.key)
    assert (listed.keys, listed.reason) == (garbage, "unreferenced")
    assert place.deleted() == [garbage, [created.key]]


def test_tombstones_are_durable_before_a_chunk_goes(place: Place) -> None:
    place.chunk(A, 1)
    buried = place.ended("deleted", 1, 5)
    place.collect()
    synced = place.done.index(Sync((buried,)))
    deletes = [number for number, operation in enumerate(place.done) if isinstance(operation, Delete)]
    assert synced < min(deletes)


def test_what_a_delta_stands_on_stays_with_it(place: Place) -> None:
    base, delta = place.chunk(A, 1), place.chunk(B, 2, is_delta=True)
    place.checkpoint(2, 6, base, delta)
    garbage = [place.chunk(C, 1), place.chunk(D, 2, is_delta=True)]
    found = place.collect()
    assert place.below("chunks/") + place.below("deltas/") == [base, delta]
    assert sorted(found.unreferenced) == sorted(garbage)


def test_a_list_that_names_a_delta_says_so_in_its_version(place: Place) -> None:
    place.chunk(D, 2, is_delta=True)
    place.collect()
    [created] = [operation for operation in place.done if isinstance(operation, Create)]
    assert decode_condemned(created.content, created.key).format == 2


def test_a_chunk_and_a_delta_of_one_digest_and_save_are_two(place: Place) -> None:
    full, delta = place.chunk(A, 1), place.chunk(A, 1, is_delta=True)
    place.checkpoint(1, 5, full)
    place.collect()
    assert (full in place.content, delta in place.content) == (True, False)


def test_chunks_that_a_checkpoint_names_and_that_are_not_there_end_nothing(place: Place) -> None:
    place.checkpoint(1, 5, chunk_key(A, save_id(1)))
    garbage = place.chunk(B, 1)
    place.collect()
    assert garbage not in place.content


def test_keys_that_are_none_of_ours_stay_and_are_named(place: Place) -> None:
    unknown = ["chunks/README", f"chunks/00/{A}.{save_id(1)}", "deltas/x/y", "runs/run/notes.txt", "runs/.DS_Store"]
    for key in [*unknown, "sessions/notes.txt", "other/file", "tags/run/x"]:
        place.put(key, b"x")
    found = place.collect()
    assert sorted(found.unknown) == sorted(unknown)
    assert len(place.content) == 8
    assert (found.chunks, found.waiting, found.fenced) == (0, [], [])


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_store_of_many_chunks_is_listed_by_their_first_byte_with_the_same_outcome(
    place: Place, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    other = Place()
    for each in (place, other):
        kept = [each.chunk(A, 1), each.chunk(B, 1, is_delta=True), each.chunk(C, 1), each.chunk(D, 1, is_delta=True)]
        each.checkpoint(1, 5, *kept)
        garbage = [each.chunk(f"{first:02x}" * 32, 2, first + 1, is_delta=first % 2 == 0) for first in range(256)]
        each.condemn(7, *garbage[::3])
        each.put("chunks/aa/strange", b"x")
    found = place.collect(dry_run=dry_run)
    monkeypatch.setattr(format, "MANY_CHUNKS", 1)
    assert other.collect(dry_run=dry_run) == found
    assert other.content == place.content
    prefixes = [prefix for operation in other.done if isinstance(operation, List) for prefix in operation.prefixes]
    assert [f"{folder}{first:02x}/" for folder in ("chunks/", "deltas/") for first in range(256)] == [
        prefix for prefix in prefixes if prefix.startswith(("chunks/", "deltas/"))
    ]


def test_a_chunk_that_comes_to_be_named_after_it_was_marked_stays_and_so_does_its_list(place: Place) -> None:
    wanted, garbage = place.chunk(A, 1), place.chunk(B, 1)
    place.happens(creates_a_list, lambda: place.checkpoint(2, 6, wanted))
    found = place.collect()
    assert place.below("chunks/") == [wanted]
    assert place.below("condemned/") == [condemned_key(save_id(COLLECTION))]
    assert (len(found.unreferenced), found.swept, garbage in place.content) == (2, 1, False)


def test_a_chunk_that_comes_to_be_named_while_chunks_are_marked_is_not_marked(place: Place) -> None:
    wanted, again = place.chunk(A, 1), place.chunk(B, 1)
    listed = place.condemn(1, again)
    place.happens(lambda operation: isinstance(operation, Clock), lambda: place.checkpoint(2, 6, wanted, again))
    found = place.collect()
    assert (found.unreferenced, found.condemned, found.swept) == ({}, {}, 0)
    assert place.below("condemned/") == [listed]


def test_a_checkpoint_deleted_while_a_collection_runs_keeps_its_chunks_until_the_next_one(place: Place) -> None:
    wanted = place.chunk(A, 1)
    place.checkpoint(1, 5, wanted)
    place.happens(lambda operation: isinstance(operation, Clock), lambda: place.ended("deleted", 1, 5))
    place.collect()
    assert place.below("chunks/") == [wanted]
    place.collect()
    assert place.below("chunks/") == []


def test_a_collection_is_done_with_what_it_can_do_the_second_time(place: Place) -> None:
    place.checkpoint(1, 5, place.chunk(A, 1))
    place.chunk(B, 2)
    place.collect()
    before = dict(place.content)
    again = place.collect()
    assert (again.swept, again.unreferenced, place.content) == (0, {}, before)


def full_of_everything(place: Place) -> None:
    kept = place.chunk(A, 1)
    place.checkpoint(1, 5, kept)
    place.checkpoint(2, 6, place.chunk(B, 2))
    place.checkpoint(3, 6, place.chunk(B, 3), replaces=[2])
    place.ended("deleted", 4, 7, age=2 * WEEK)
    place.ended("fenced", 5, 7, age=2 * WEEK)
    place.chunk(C, 4)
    place.condemn(1, place.chunk(D, 4))
    place.condemn(2, kept, reason="corrupt")
    place.put(condemned_key(save_id(3)), b"unreadable")
    place.session(6, age=GRACE + 1)
    place.chunk(D, 6)
    place.put("chunks/notes", b"x")


def test_a_dry_run_says_what_is_then_done_and_does_nothing(place: Place) -> None:
    full_of_everything(place)
    before = dict(place.content)
    planned = place.collect(dry_run=True)
    assert place.content == before
    assert {type(operation) for operation in place.done} <= {List, Get, Clock}
    done = place.collect()
    gone = set(before) - set(place.content)
    assert planned == msgspec.structs.replace(done, swept=0, swept_bytes=0)
    assert len(planned.unreferenced) == 3
    assert gone == {
        *planned.unreferenced,
        *planned.condemned,
        *planned.expired,
        condemned_key(save_id(1)),
        session_key(save_id(6)),
    }
    assert done.swept == len(planned.unreferenced | planned.condemned) == 4
    assert done.swept_bytes == sum((planned.unreferenced | planned.condemned).values())


def test_a_dry_run_is_content_with_the_time_of_this_machine_and_a_collection_is_not(place: Place) -> None:
    place.collect(dry_run=True)
    assert [each for each in place.done if isinstance(each, Clock)] == [Clock(about=True)]
    place.done.clear()
    place.collect()
    assert {each for each in place.done if isinstance(each, Clock)} == {Clock(about=False)}


# ---- manifests that are none any more


def test_replaced_manifests_are_buried_and_their_chunks_go_at_once(place: Place) -> None:
    old, new = place.chunk(A, 1), place.chunk(B, 2)
    replaced = place.checkpoint(1, 5, old)
    manifest = place.checkpoint(2, 5, new, replaces=[1])
    found = place.collect()
    assert place.below("chunks/") == [new]
    assert (found.replaced, found.checkpoints) == ([replaced], 1)
    ended = decode_manifest(place.content[replaced], ManifestKey("run", 5, save_id(1)))
    assert isinstance(ended, Ended)
    assert ended.state == "deleted"
    assert isinstance(decode_manifest(place.content[manifest], ManifestKey("run", 5, save_id(2))), Manifest)


def test_a_manifest_replaces_none_of_another_step_or_run(place: Place) -> None:
    kept = [place.chunk(A, 1), place.chunk(A, 2), place.chunk(A, 3)]
    place.checkpoint(1, 4, kept[0])
    place.checkpoint(2, 5, kept[1], run="other")
    place.checkpoint(3, 5, kept[2], replaces=[1, 2])
    assert place.collect().replaced == []
    assert place.below("chunks/") == kept


def test_the_manifests_of_a_step_are_looked_at_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roots, "MANIFESTS_AT_A_TIME", 1)
    place.checkpoint(1, 4, place.chunk(D, 1))
    replaced = place.checkpoint(1, 5, place.chunk(A, 1))
    place.checkpoint(2, 5, place.chunk(B, 2), replaces=[1])
    assert place.collect().replaced == [replaced]
    gets = [len(each.keys) for each in place.done if isinstance(each, Get) and each.keys[0].startswith("runs/")]
    assert gets == [1, 2]


def test_each_manifest_is_read_once(place: Place) -> None:
    for step in range(200):
        place.checkpoint(1, step, place.chunk(A, 1))
    place.collect()
    read = [key for each in place.done if isinstance(each, Get) for key in each.keys if key.startswith("runs/")]
    assert sorted(read) == place.below("runs/")


def test_tombstones_older_than_a_week_go_and_younger_ones_stay(place: Place) -> None:
    old = [place.ended("deleted", 1, 1, age=WEEK + 1), place.ended("deleted", 2, 1, age=10 * WEEK)]
    young = [place.ended("deleted", 3, 1, age=WEEK), place.ended("deleted", 4, 1), place.ended("deleted", 5, 1, -WEEK)]
    found = place.collect()
    assert found.expired == old
    assert place.below("runs/") == young


def test_tombstones_of_a_backend_that_tells_no_times_stay(place: Place) -> None:
    buried = place.ended("deleted", 1, 1)
    place.modified[buried] = 0.0
    assert place.collect().expired == []
    assert buried in place.content


def test_fences_stay_for_ever(place: Place) -> None:
    fence = place.ended("fenced", 1, 1, age=100 * WEEK)
    place.collect()
    assert fence in place.content


# ---- saves under way


def test_while_a_save_is_under_way_what_is_garbage_is_marked_and_nothing_deleted(place: Place) -> None:
    garbage = place.chunk(A, 1)
    own = place.chunk(B, 2)
    place.session(2, step=7, age=GRACE)
    found = place.collect()
    assert [(each.run, each.step, each.save) for each in found.waiting] == [("run", 7, save_id(2))]
    assert (found.swept, found.fenced) == (0, [])
    assert place.below("chunks/") == [garbage, own]
    [listed] = place.below("condemned/")
    assert decode_condemned(place.content[listed], listed).keys == [garbage]


def test_the_collection_after_the_save_has_ended_finishes_what_was_begun(place: Place) -> None:
    garbage, own = place.chunk(A, 1, 30), place.chunk(B, 2)
    session = place.session(2)
    place.collect()
    place.checkpoint(2, 9, own)
    del place.content[session]
    found = place.collect(collection=save_id(COLLECTION + 1))
    assert (found.condemned, found.unreferenced) == ({garbage: 30}, {})
    assert (found.swept, found.swept_bytes) == (1, 30)
    assert (place.below("chunks/"), place.below("condemned/")) == ([own], [])


def test_tombstones_go_also_while_a_save_is_under_way(place: Place) -> None:
    old = place.ended("deleted", 1, 1, age=2 * WEEK)
    place.session(2)
    place.collect()
    assert old not in place.content


def test_a_dead_save_is_fenced_and_its_chunks_go(place: Place) -> None:
    own, session = place.chunk(B, 2), place.session(2, step=7, age=GRACE + 1)
    found = place.collect()
    assert [(each.run, each.step) for each in found.fenced] == [("run", 7)]
    assert found.waiting == []
    assert own not in place.content
    fence = decode_manifest(place.content[manifest_key("run", 7, save_id(2))], ManifestKey("run", 7, save_id(2)))
    assert isinstance(fence, Ended)
    assert fence.state == "fenced"
    assert session not in place.content


def test_the_fence_stands_before_the_session_goes(place: Place) -> None:
    session = place.session(2, step=7, age=GRACE + 1)
    place.collect()
    fenced = [getattr(operation, "key", None) for operation in place.done].index(manifest_key("run", 7, save_id(2)))
    assert fenced < place.done.index(Delete((session,)))


def test_a_dead_save_that_had_committed_keeps_its_checkpoint(place: Place) -> None:
    own = place.chunk(B, 2)
    manifest, session = place.checkpoint(2, 7, own), place.session(2, step=7, age=GRACE + 1)
    place.collect()
    assert sorted(place.content) == sorted([own, manifest])
    assert session not in place.content


def test_waiting_goes_on_until_the_save_has_ended(place: Place) -> None:
    garbage, own, session = place.chunk(A, 1), place.chunk(B, 2), place.session(2)
    pauses = []

    def beat_twice_then_end(operation: Operation) -> None:
        if isinstance(operation, Pause):
            pauses.append(operation.seconds)
            place.session(2)
            if len(pauses) == 3:
                place.checkpoint(2, 9, own)
                del place.content[session]

    place.before = beat_twice_then_end
    found = place.collect(wait=True)
    assert len(pauses) == 3
    assert (found.waiting, found.fenced, found.swept) == ([], [], 1)
    assert garbage not in place.content
    assert place.below("chunks/") == [own]


def test_a_save_that_dies_while_it_is_waited_for_is_fenced(place: Place) -> None:
    place.chunk(B, 2)
    place.session(2, age=GRACE - 3 * collects.POLL_SECONDS)
    found = place.collect(wait=True)
    assert len([each for each in place.done if isinstance(each, Pause)]) == 4
    assert ([each.save for each in found.fenced], found.waiting) == ([save_id(2)], [])
    assert manifest_key("run", 9, save_id(2)) in place.content


def test_saves_that_open_after_the_lists_were_made_are_not_waited_for(place: Place) -> None:
    garbage, old = place.chunk(A, 1), place.session(2)

    def next_save(operation: Operation) -> None:
        if isinstance(operation, Pause):
            place.content.pop(old, None)
            place.session(3)

    place.before = next_save
    found = place.collect(wait=True)
    assert len([each for each in place.done if isinstance(each, Pause)]) == 1
    assert garbage not in place.content
    assert (found.waiting, found.fenced) == ([], [])


def test_a_save_that_ends_while_its_session_is_read_is_none(place: Place) -> None:
    session = place.session(2)
    place.happens(
        lambda operation: isinstance(operation, Get) and operation.keys == (session,),
        lambda: place.content.pop(session),
    )
    found = place.collect()
    assert (found.waiting, found.fenced) == ([], [])


def test_the_chunks_of_a_save_under_way_are_not_condemned_however_old_they_are(place: Place) -> None:
    own = place.chunk(B, 2)
    place.modified[own] = NOW - 10 * WEEK
    place.session(2)
    found = place.collect(dry_run=True)
    assert (found.unreferenced, len(found.waiting)) == ({}, 1)


# ---- lists


def test_a_corrupt_chunk_that_is_needed_stays_and_its_list_stays(place: Place) -> None:
    needed = place.chunk(A, 1)
    place.checkpoint(1, 5, needed)
    listed = place.condemn(1, needed, reason="corrupt")
    found = place.collect()
    assert {needed, listed} <= set(place.content)
    assert (found.condemned, found.swept) == ({}, 0)


def test_a_corrupt_chunk_that_nobody_needs_goes_and_its_list_goes(place: Place) -> None:
    bad = place.chunk(A, 1, 30)
    place.condemn(1, bad, reason="corrupt")
    found = place.collect()
    assert place.content == {}
    assert (found.condemned, found.unreferenced, found.swept_bytes) == ({bad: 30}, {}, 30)


def test_a_list_of_which_one_key_is_needed_stays_and_the_others_go(place: Place) -> None:
    needed, dead = place.chunk(A, 1), place.chunk(B, 1)
    place.checkpoint(1, 5, needed)
    listed = place.condemn(1, needed, dead)
    place.collect()
    assert listed in place.content
    assert place.below("chunks/") == [needed]


def test_a_list_whose_keys_are_all_gone_is_dropped_and_no_key_is_deleted_again(place: Place) -> None:
    listed = place.condemn(1, chunk_key(A, save_id(1)), chunk_key(B, save_id(1)), reason="corrupt")
    found = place.collect()
    assert place.deleted() == [[listed]]
    assert found.swept == 0


def test_a_missing_chunk_that_a_checkpoint_needs_keeps_its_list(place: Place) -> None:
    missing = chunk_key(A, save_id(1))
    place.checkpoint(1, 5, missing)
    listed = place.condemn(1, missing, reason="corrupt")
    place.collect()
    assert listed in place.content


def test_lists_that_cannot_be_read_stay_and_are_counted(place: Place) -> None:
    garbage = place.chunk(A, 1)
    bad = place.put(condemned_key(save_id(1)), b"x" * 500)
    moved = place.put(condemned_key(save_id(2)), place.content[place.condemn(3, garbage)])
    found = place.collect()
    assert found.unreadable == 2
    assert sorted(place.content) == sorted([bad, moved])


def test_more_garbage_than_a_list_holds_makes_several(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collects, "KEYS_IN_A_LIST", 2)
    garbage = [*sorted(place.chunk(digest, save) for digest in (A, B) for save in (1, 2)), place.chunk(C, 1)]
    last_number = 2**128 - 1
    found = place.collect(collection=save_id(last_number))
    created = [each for each in place.done if isinstance(each, Create)]
    assert [each.key for each in created] == [condemned_key(save_id(number)) for number in (last_number, 0, 1)]
    assert [decode_condemned(each.content, each.key).keys for each in created] == [
        garbage[:2],
        garbage[2:4],
        garbage[4:],
    ]
    assert found.swept == 5
    assert place.content == {}


def test_deletes_come_in_requests_of_bounded_size(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collects, "KEYS_AT_A_TIME", 2)
    for save in range(5):
        place.chunk(A, save)
    place.collect()
    assert [len(keys) for keys in place.deleted()] == [2, 2, 1, 1]


def test_a_list_whose_answer_was_lost_is_told_from_one_of_somebody_else(place: Place) -> None:
    garbage = place.chunk(A, 1)
    do = place.do

    def lose_the_answer(operation: Operation) -> Any:
        answer = do(operation)
        return False if creates_a_list(operation) else answer

    place.do = lose_the_answer  # type: ignore[method-assign]
    assert place.collect().swept == 1
    assert garbage not in place.content


@pytest.mark.parametrize("stays", [True, False], ids=["another list", "gone again"])
def test_a_list_in_whose_place_something_else_stands_ends_it(place: Place, stays: bool) -> None:
    garbage = place.chunk(A, 1)
    other = place.chunk(B, 1)

    def before(operation: Operation) -> None:
        if creates_a_list(operation):
            place.condemn(COLLECTION, other)
        elif not stays and operation == Get((condemned_key(save_id(COLLECTION)),)):
            place.content.pop(condemned_key(save_id(COLLECTION)))

    place.before = before
    with pytest.raises(UnavailableError, match=r"was made by somebody else\. Nothing was deleted; collect again"):
        place.collect()
    assert place.below("chunks/") == [garbage, other]


# ---- what ends a collection


def cut_off(place: Place, key: str) -> None:
    place.put(key, place.content[key][: len(place.content[key]) // 2])


def flipped(place: Place, key: str) -> None:
    content = bytearray(place.content[key])
    content[50] ^= 1
    place.put(key, bytes(content))


def emptied(place: Place, key: str) -> None:
    place.put(key, b"")


def newer(place: Place, key: str) -> None:
    text = msgspec.json.decode(unseal(place.content[key], key))
    place.put(key, seal(msgspec.json.encode(text | {"format": 99})))


DAMAGE = [
    pytest.param(flipped, CorruptError, id="flipped bit"),
    pytest.param(cut_off, CorruptError, id="cut off"),
    pytest.param(emptied, CorruptError, id="empty"),
    pytest.param(newer, UnsupportedFormatError, id="of a newer version"),
]


def ends(place: Place, error: type[CheckpointError], message: str, **given: Any) -> None:
    """Collecting fails, and no chunk, manifest or session was deleted."""
    before = {key for key in place.content if not key.startswith("condemned/")}
    with pytest.raises(error, match=message):
        place.collect(**given)
    assert before <= set(place.content)
    assert place.deleted() == []


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("damage", "error"), DAMAGE)
def test_a_manifest_that_cannot_be_read_ends_it(
    place: Place, damage: Callable[[Place, str], None], error: type[CheckpointError], dry_run: bool
) -> None:
    place.chunk(C, 9)
    place.checkpoint(1, 4, place.chunk(A, 1))
    damage(place, place.checkpoint(2, 5, place.chunk(B, 2)))
    said = "of step 5 of run 'run' is damaged" if error is CorruptError else "has format version 99"
    ends(place, error, said, dry_run=dry_run)


def test_a_damaged_manifest_is_told_of_with_what_to_do(place: Place) -> None:
    key = place.checkpoint(2, 5, place.chunk(B, 2))
    flipped(place, key)
    with pytest.raises(CorruptError) as caught:
        place.collect()
    assert str(caught.value).endswith(
        f"so which chunks it needs is not known. Nothing was deleted. Put {key} back from a copy, save the step again "
        "with replace=True, or delete it: ckptstore rm STORE/run@5."
    )


def test_a_damaged_fence_or_tombstone_ends_it_too(place: Place) -> None:
    place.chunk(C, 9)
    flipped(place, place.ended("fenced", 2, 5))
    ends(place, CorruptError, "of step 5 of run 'run' is damaged")


def test_a_manifest_damaged_after_the_first_reading_does_not_matter(place: Place) -> None:
    kept, garbage = place.chunk(A, 1), place.chunk(B, 1)
    key = place.checkpoint(1, 5, kept)
    place.happens(creates_a_list, lambda: flipped(place, key))
    place.collect()
    assert place.below("chunks/") == [kept]
    assert garbage not in place.content


def test_a_manifest_that_comes_later_and_cannot_be_read_ends_it(place: Place) -> None:
    place.chunk(A, 1)
    place.happens(creates_a_list, lambda: cut_off(place, place.checkpoint(2, 6)))
    ends(place, CorruptError, "of step 6 of run 'run' is damaged")


@pytest.mark.parametrize(("damage", "error"), DAMAGE)
def test_a_session_that_cannot_be_read_ends_it(
    place: Place, damage: Callable[[Place, str], None], error: type[CheckpointError]
) -> None:
    place.chunk(A, 1)
    key = place.session(2, age=10 * GRACE)
    damage(place, key)
    place.modified[key] = NOW - 10 * GRACE
    said = "cannot be fenced. No chunk was deleted. Delete it when no job" if error is CorruptError else "version 99"
    ends(place, error, said)


def test_a_list_of_a_newer_version_ends_it(place: Place) -> None:
    place.chunk(A, 1)
    newer(place, place.condemn(1, place.chunk(B, 1)))
    ends(place, UnsupportedFormatError, "has format version 99")


def test_a_manifest_that_is_listed_and_not_there_ends_it(place: Place) -> None:
    place.chunk(A, 1)
    key = place.checkpoint(2, 5, place.chunk(B, 2))
    do = place.do

    def stale(operation: Operation) -> Any:
        return [None] if operation == Get((key,)) else do(operation)

    place.do = stale  # type: ignore[method-assign]
    ends(place, UnavailableError, "is listed, and cannot be read. Nothing was deleted. Collect again")


def test_a_tombstone_that_another_collection_removes_meanwhile_ends_nothing(place: Place) -> None:
    garbage, old = place.chunk(A, 1), place.ended("deleted", 1, 5, age=2 * WEEK)
    place.happens(lambda operation: operation == Get((old,)), lambda: place.content.pop(old))
    place.collect()
    assert garbage not in place.content
