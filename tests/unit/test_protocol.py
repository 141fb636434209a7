"""The decisions of a save, without a backend: what is reused, what is uploaded, when it counts. See protocol.md."""

from collections.abc import Generator
from typing import Any

import msgspec
import pytest

from ckptstore.deltas import Held
from ckptstore.errors import ConflictError, FencedError, UnavailableError
from ckptstore.format import ManifestKey, chunk_key, condemned_key, manifest_key, session_key
from ckptstore.manifest import ChunkRef, Condemned, Ended, Manifest, Segment, Session, Writer, decode_manifest, encode
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol import (
    Candidate,
    Close,
    Create,
    Get,
    List,
    Open,
    Operation,
    Put,
    SaveRequest,
    Sync,
    Upload,
    Uploaded,
    current,
    delete,
    save,
)

WRITER = Writer(host="host", pid=1, version="0")
NOW = "2026-01-02T03:04:05.000006Z"
A, B = "a" * 64, "b" * 64


def save_id(number: int) -> str:
    return f"{number:032x}"


def request(**changes: Any) -> SaveRequest:
    given: dict[str, Any] = {
        "run": "run",
        "step": 5,
        "save": save_id(9),
        "created": NOW,
        "writer": WRITER,
        "metrics": {},
        "metadata": {},
        "content": "c" * 64,
        "tree": None,
        "segments": [],
        "chunks": {A: 100, B: 200},
        "raw_bytes": 300,
    }
    return SaveRequest(**(given | changes))


def manifest(save: int, step: int = 4, **changes: Any) -> Manifest:
    given: dict[str, Any] = {
        "run": "run",
        "step": step,
        "save": save_id(save),
        "created": NOW,
        "writer": WRITER,
        "replaces": [],
        "metrics": {},
        "metadata": {},
        "content": "c" * 64,
        "raw_bytes": 100,
        "stored_bytes": 10,
        "new_bytes": 10,
        "tree": None,
        "segments": [],
        "chunks": [ChunkRef(digest=A, save=save_id(save), raw=100, stored=10)],
    }
    return Manifest(**(given | changes))


class Model:
    """A store of a dict, that carries operations out one at a time and keeps what was done, in order."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.done: list[str] = []
        self.uploaded: list[str] = []
        self.bases: dict[str, Held] = {}
        self.fail: type[Operation] | None = None

    def hold(self, *values: Manifest | Ended) -> None:
        for value in values:
            self.content[str(value.key)] = encode(value)

    def condemn(self, *keys: str, reason: Any = "unreferenced") -> None:
        listed = Condemned(collection=save_id(77), reason=reason, created=NOW, keys=list(keys))
        self.content[condemned_key(save_id(77))] = encode(listed)

    def perform(self, steps: Generator[Operation, Any, Any]) -> Any:
        try:
            operation = next(steps)
            while True:
                try:
                    answer = self.do(operation)
                except UnavailableError as error:
                    operation = steps.throw(error)
                else:
                    operation = steps.send(answer)
        except StopIteration as end:
            return end.value

    def do(self, operation: Operation) -> Any:
        self.done.append(type(operation).__name__)
        if isinstance(operation, self.fail or ()):
            raise UnavailableError("no answer")
        match operation:
            case List(prefixes):
                rows = sorted(key for key in self.content if key.startswith(prefixes))
                return [ObjectInfo(key, len(self.content[key]), 1.0) for key in rows]
            case Get(keys):
                return [self.content.get(key) for key in keys]
            case Create(key, content):
                return self.content.setdefault(key, content) is content
            case Put(key, content):
                self.content[key] = content
            case Open(session):
                self.content[session_key(session.save)] = encode(session)
            case Close(name):
                self.content.pop(session_key(name), None)
            case Upload(name, digests, bases):
                self.uploaded += digests
                self.bases |= bases
                self.content |= {chunk_key(digest, name, is_delta=digest in bases): b"7 bytes" for digest in digests}
                return {digest: Uploaded(7, is_delta=digest in bases) for digest in digests}
            case Sync(_):
                pass
        return None


def test_the_session_is_opened_before_the_condemned_lists_are_read_and_they_before_any_look() -> None:
    model = Model()
    model.hold(manifest(1))
    opened = model.perform(save(request()))
    assert isinstance(opened, Manifest)
    assert model.done == ["List", "Open", "List", "Get", "List", "Upload", "Sync", "Create", "Close"]


def test_what_the_newest_manifest_names_is_reused() -> None:
    model = Model()
    model.hold(manifest(1))
    saved = model.perform(save(request()))
    assert model.uploaded == [B]
    assert [(ref.digest, ref.save) for ref in saved.chunks] == [(A, save_id(1)), (B, save_id(9))]
    assert (saved.stored_bytes, saved.new_bytes) == (17, 7)


def test_what_a_listing_shows_is_reused() -> None:
    model = Model()
    model.content[chunk_key(B, save_id(3))] = b"12345"
    saved = model.perform(save(request()))
    assert model.uploaded == [A]
    assert [(ref.save, ref.stored) for ref in saved.chunks] == [(save_id(9), 7), (save_id(3), 5)]


def test_what_was_found_in_a_listing_is_made_durable_too() -> None:
    model = Model()
    model.hold(manifest(1))
    model.content[chunk_key(B, save_id(3))] = b"12345"
    synced: list[str] = []
    steps = save(request(chunks={A: 100, B: 200, "d" * 64: 5}))
    operation = next(steps)
    while not isinstance(operation, Create):
        if isinstance(operation, Sync):
            synced += operation.keys
        operation = steps.send(model.do(operation))
    # Not A: it stands in a manifest, so it was durable before.
    assert synced == [chunk_key(B, save_id(3)), chunk_key("d" * 64, save_id(9))]


def test_an_object_longer_than_any_chunk_of_its_length_is_not_reused() -> None:
    model = Model()
    model.content[chunk_key(B, save_id(3))] = bytes(200 + 105)
    model.perform(save(request()))
    assert model.uploaded == [A, B]


def test_a_commit_counts_even_if_cleaning_up_fails() -> None:
    model = Model()
    model.fail = Close
    assert model.perform(save(request())).save == save_id(9)


def test_an_interrupt_before_the_commit_closes_the_session() -> None:
    model = Model()
    steps = save(request())
    operation = next(steps)
    while not isinstance(operation, Upload):
        operation = steps.send(model.do(operation))
    assert isinstance(steps.throw(KeyboardInterrupt()), Close)
    with pytest.raises(KeyboardInterrupt):
        steps.send(None)


def test_a_condemned_chunk_is_not_reused_wherever_it_is_seen() -> None:
    model = Model()
    model.hold(manifest(1))
    model.content[chunk_key(B, save_id(3))] = b"12345"
    model.content[chunk_key(B, save_id(4))] = b"123"
    model.condemn(chunk_key(A, save_id(1)), chunk_key(B, save_id(3)))
    saved = model.perform(save(request()))
    assert model.uploaded == [A]
    assert [ref.save for ref in saved.chunks] == [save_id(9), save_id(4)]


def test_where_a_condemned_list_cannot_be_read_nothing_is_reused() -> None:
    model = Model()
    model.hold(manifest(1))
    model.condemn(chunk_key(B, save_id(3)))
    model.content[condemned_key(save_id(77))] += b"x"
    model.perform(save(request()))
    assert model.uploaded == [A, B]


def test_a_chunk_of_another_length_is_not_reused() -> None:
    model = Model()
    model.hold(manifest(1))
    model.perform(save(request(chunks={A: 101})))
    assert model.uploaded == [A]


@pytest.mark.parametrize("ended", ["fenced", "deleted"])
def test_a_manifest_that_was_deleted_since_the_listing_is_not_reused(ended: Any) -> None:
    model = Model()
    model.hold(manifest(1))
    steps = save(request())
    rows = model.do(next(steps))
    operation = steps.send(rows)
    model.hold(Ended(state=ended, run="run", step=4, save=save_id(1), created=NOW))
    for _ in range(20):
        try:
            operation = steps.send(model.do(operation))
        except StopIteration:
            break
    assert model.uploaded == [A, B]


def test_a_fence_keeps_a_save_from_committing() -> None:
    model = Model()
    model.hold(Ended(state="fenced", run="run", step=5, save=save_id(9), created=NOW))
    with pytest.raises(FencedError, match=r"step 5 of run 'run' was taken for dead"):
        model.perform(save(request()))
    assert session_key(save_id(9)) not in model.content


def test_our_own_manifest_is_a_success_whose_answer_was_lost() -> None:
    class LosesAnswer(Model):
        def do(self, operation: Operation) -> Any:
            answer = super().do(operation)
            return False if isinstance(operation, Create) else answer

    model = LosesAnswer()
    assert model.perform(save(request())).save == save_id(9)


def test_a_commit_without_an_answer_that_did_arrive_is_a_success() -> None:
    class LosesConnection(Model):
        def do(self, operation: Operation) -> Any:
            answer = super().do(operation)
            if isinstance(operation, Create):
                raise UnavailableError("the connection was cut")
            return answer

    model = LosesConnection()
    assert model.perform(save(request())).save == save_id(9)
    assert not any(key.startswith("sessions/") for key in model.content)


def test_a_commit_whose_outcome_is_unknown_leaves_the_session() -> None:
    model = Model()
    model.fail = Create
    with pytest.raises(UnavailableError, match="was not saved, as far as can be seen now: no answer"):
        model.perform(save(request()))
    assert session_key(save_id(9)) in model.content


def test_where_nobody_answers_any_more_the_outcome_is_said_to_be_unknown() -> None:
    class GoesAway(Model):
        def do(self, operation: Operation) -> Any:
            answer = super().do(operation)
            if isinstance(operation, Create):
                self.fail = Get
                raise UnavailableError("the connection was cut")
            return answer

    with pytest.raises(UnavailableError, match="whether step 5 of run 'run' was saved is not known"):
        GoesAway().perform(save(request()))


@pytest.mark.parametrize("fails", [Upload, Sync])
def test_a_save_that_fails_before_its_commit_closes_its_session(fails: type[Operation]) -> None:
    model = Model()
    model.fail = fails
    with pytest.raises(UnavailableError):
        model.perform(save(request()))
    assert not any(key.startswith(("sessions/", "runs/")) for key in model.content)


def test_the_same_content_at_the_same_step_is_returned_as_it_is() -> None:
    model = Model()
    model.hold(manifest(1, step=5))
    assert model.perform(save(request())).save == save_id(1)
    assert model.done == ["List", "Get", "List", "Sync"]


def test_other_content_at_the_same_step_is_a_conflict() -> None:
    model = Model()
    model.hold(manifest(1, step=5, content="d" * 64))
    with pytest.raises(ConflictError):
        model.perform(save(request()))
    assert model.done == ["List", "Get", "List"]


def test_a_replaced_manifest_is_named_and_buried_after_the_commit() -> None:
    model = Model()
    model.hold(manifest(1, step=5, content="d" * 64))
    saved = model.perform(save(request(replace=True)))
    assert saved.replaces == [save_id(1)]
    assert model.done[-4:] == ["Create", "Put", "Sync", "Close"]
    key = ManifestKey("run", 5, save_id(1))
    assert isinstance(decode_manifest(model.content[str(key)], key), Ended)


def test_a_sound_checkpoint_is_not_taken_for_damaged_because_a_chunk_of_it_was_condemned_as_garbage() -> None:
    model = Model()
    model.hold(manifest(1, step=5, content="d" * 64))
    model.condemn(chunk_key(A, save_id(1)), reason="unreferenced")
    with pytest.raises(ConflictError):
        model.perform(save(request()))


def test_a_damaged_checkpoint_gives_way() -> None:
    model = Model()
    model.hold(manifest(1, step=5, content="d" * 64))
    model.condemn(chunk_key(A, save_id(1)), reason="corrupt")
    assert model.perform(save(request())).replaces == [save_id(1)]
    assert model.uploaded == [A, B]


def test_few_chunks_are_looked_for_by_name_and_many_by_prefix() -> None:
    many = {f"{number:064x}"[::-1]: 10 for number in range(300)}
    for chunks, expected in (({A: 1, B: 1}, 2), (many, len({name[:2] for name in many}))):
        steps = save(request(chunks=chunks))
        operation = next(steps)
        model = Model()
        listed: list[tuple[str, ...]] = []
        while not isinstance(operation, Upload):
            if isinstance(operation, List):
                listed.append(operation.prefixes)
            operation = steps.send(model.do(operation))
        assert len(listed[-1]) == expected


def candidate(save: int, modified: float, replaces: tuple[int, ...] = ()) -> Candidate:
    value = manifest(save, replaces=[save_id(number) for number in replaces])
    return Candidate(value.key, modified, value)


def test_the_current_manifest_is_the_latest_that_no_other_replaces() -> None:
    first, second, third = candidate(1, 10.0), candidate(2, 20.0), candidate(3, 5.0, replaces=(2,))
    assert current([]) is None
    assert current([first, second]) is second
    assert current([first, third]) is first
    assert current([second, third]) is third
    assert current([candidate(1, 7.0), candidate(2, 7.0)]) == candidate(2, 7.0)


def cut_off(value: Manifest, length: int) -> bytes:
    return encode(value)[:length]


def test_a_sound_checkpoint_beside_a_damaged_manifest_of_its_step_is_a_conflict_all_the_same() -> None:
    model = Model()
    sound, later = manifest(1, step=5, content="d" * 64), manifest(8, step=5)
    model.hold(sound)
    model.content[str(later.key)] = cut_off(later, -1)
    with pytest.raises(ConflictError):
        model.perform(save(request()))
    assert current([Candidate(sound.key, 1.0, sound), Candidate(later.key, 2.0, None)]) == Candidate(
        sound.key, 1.0, sound
    )


@pytest.mark.parametrize("length", [100, -1])
def test_a_damaged_manifest_is_taken_away_by_saving_its_step_again(length: int) -> None:
    model = Model()
    damaged = manifest(1, step=5)
    model.content[str(damaged.key)] = cut_off(damaged, length)
    assert model.perform(save(request())).replaces == [save_id(1)]
    assert isinstance(decode_manifest(model.content[str(damaged.key)], damaged.key), Ended)


def test_an_open_whose_answer_was_lost_leaves_no_session() -> None:
    class LosesAnswer(Model):
        def do(self, operation: Operation) -> Any:
            answer = super().do(operation)
            if isinstance(operation, Open):
                raise UnavailableError("the answer was lost")
            return answer

    model = LosesAnswer()
    with pytest.raises(UnavailableError, match="the answer was lost"):
        model.perform(save(request()))
    assert model.content == {}


def test_a_session_that_cannot_be_closed_hides_no_other_error() -> None:
    model = Model()
    model.hold(Ended(state="fenced", run="run", step=5, save=save_id(9), created=NOW))
    model.fail = Close
    with pytest.raises(FencedError):
        model.perform(save(request()))


def test_delete_buries_the_current_manifest_last() -> None:
    model = Model()
    model.hold(manifest(3, step=5, replaces=[save_id(4)]), manifest(4, step=5))
    model.hold(manifest(2, step=6))
    buried = []
    steps = delete("run", 5, NOW)
    operation = next(steps)
    while True:
        if isinstance(operation, Put):
            buried.append(operation.key)
        try:
            operation = steps.send(model.do(operation))
        except StopIteration:
            break
    assert buried == [manifest_key("run", 5, save_id(4)), manifest_key("run", 5, save_id(3))]


def test_a_session_says_who_saves_what() -> None:
    steps = save(request(chunks={}))
    model = Model()
    operation = next(steps)
    while not isinstance(operation, Open):
        operation = steps.send(model.do(operation))
    session: Session = operation.session
    assert (session.run, session.step, session.save, session.writer, session.beat) == ("run", 5, save_id(9), WRITER, 0)


# ---- deltas

BASE = "e" * 64


def tensor(segment: int) -> dict[str, Any]:
    return {"$": "tensor", "dtype": "uint8", "shape": [100], "segment": segment}


def with_deltas(**changes: Any) -> SaveRequest:
    """The same two tensors as in `newest`, with other content."""
    given: dict[str, Any] = {
        "tree": {"a": tensor(0), "b": tensor(1)},
        "segments": [Segment(bytes=100, element=1, chunks=[0]), Segment(bytes=100, element=1, chunks=[1])],
        "chunks": {A: 100, B: 100},
        "deltas": True,
    }
    return request(**(given | changes))


def newest(*chunks: ChunkRef) -> Manifest:
    given = with_deltas()
    return manifest(1, format=2, tree=given.tree, segments=given.segments, chunks=list(chunks))


def ref(digest: str, base: int | None = None) -> ChunkRef:
    return ChunkRef(digest=digest, save=save_id(1), raw=100, stored=10, base=base)


C, D = "c" * 64, "d" * 64


def test_new_chunks_may_stand_on_those_of_the_newest_checkpoint() -> None:
    model = Model()
    model.hold(newest(ref(C), ref(D)))
    saved = model.perform(save(with_deltas()))
    assert {name: base.digest for name, base in model.bases.items()} == {A: C, B: D}
    assert [(each.digest, each.base) for each in saved.chunks] == [(A, 2), (B, 3), (C, None), (D, None)]
    assert saved.format == 2
    assert (saved.new_bytes, saved.stored_bytes) == (14, 34)
    assert decode_manifest(model.content[str(saved.key)], saved.key) == saved


def test_without_deltas_no_chunk_stands_on_another_and_old_readers_can_read_it() -> None:
    model = Model()
    model.hold(newest(ref(C), ref(D)))
    saved = model.perform(save(with_deltas(deltas=False)))
    assert model.bases == {}
    assert saved.format == 1


def test_a_condemned_chunk_is_no_base() -> None:
    model = Model()
    model.hold(newest(ref(C), ref(D)))
    model.condemn(chunk_key(C, save_id(1)))
    model.perform(save(with_deltas()))
    assert list(model.bases) == [B]


def test_where_a_condemned_list_cannot_be_read_there_are_no_bases() -> None:
    model = Model()
    model.hold(newest(ref(C), ref(D)))
    model.condemn(chunk_key(C, save_id(1)))
    model.content[condemned_key(save_id(77))] += b"x"
    model.perform(save(with_deltas()))
    assert model.bases == {}


def test_a_delta_is_taken_up_with_what_it_stands_on() -> None:
    model = Model()
    model.hold(newest(ref(A, base=2), ref(D), ref(BASE)))
    saved = model.perform(save(with_deltas(deltas=False)))
    assert model.uploaded == [B]
    assert [(each.digest, each.save, each.base) for each in saved.chunks] == [
        (A, save_id(1), 2),
        (B, save_id(9), None),
        (BASE, save_id(1), None),
    ]
    assert saved.format == 2


@pytest.mark.parametrize("condemned", [chunk_key(BASE, save_id(1)), chunk_key(A, save_id(1), is_delta=True)])
def test_a_delta_is_not_taken_up_if_it_or_what_it_stands_on_is_condemned(condemned: str) -> None:
    model = Model()
    model.hold(newest(ref(A, base=2), ref(D), ref(BASE)))
    model.content[condemned_key(save_id(77))] = encode(
        Condemned(format=2, collection=save_id(77), reason="unreferenced", created=NOW, keys=[condemned])
    )
    model.perform(save(with_deltas(deltas=False)))
    assert model.uploaded == [A, B]


def test_a_delta_in_a_listing_is_not_taken_up() -> None:
    """Only a manifest says what it stands on."""
    model = Model()
    model.content[chunk_key(A, save_id(3), is_delta=True)] = b"12345"
    model.perform(save(with_deltas()))
    assert model.uploaded == [A, B]


def test_a_newest_checkpoint_whose_tree_makes_no_sense_is_no_reason_for_a_save_to_fail() -> None:
    model = Model()
    broken = newest(ref(C), ref(D))
    model.hold(msgspec.structs.replace(broken, tree={"a": {"$": "tensor", "dtype": "float99"}}))
    model.perform(save(with_deltas()))
    assert model.uploaded == [A, B]
    assert model.bases == {}
