"""The decisions of a repair, without a backend: which copies count, what the new manifest says, when it gives way."""

from collections.abc import Callable, Generator
from typing import Any

import pytest

from ckptstore.errors import CheckpointError, ConflictError, CorruptError, FencedError, UnavailableError
from ckptstore.format import MAX_DELTA_DEPTH, ManifestKey, chunk_key, condemned_key, session_key
from ckptstore.manifest import (
    ChunkRef,
    Condemned,
    Ended,
    Manifest,
    Segment,
    Writer,
    decode_manifest,
    encode,
    format_naming,
)
from ckptstore.objects.base import ObjectInfo
from ckptstore.protocol import (
    Check,
    Close,
    Create,
    Get,
    List,
    Open,
    Operation,
    Put,
    Repaired,
    RepairRequest,
    Sync,
    delete,
    repair,
)

WRITER = Writer(host="host", pid=1, version="0")
NOW = "2026-01-02T03:04:05.000006Z"
A, B, C, D = ("".join(digit * 64) for digit in "abcd")
RAW, STORED = 100, 10
REPAIR = 9


def save_id(number: int) -> str:
    return f"{number:032x}"


def key(digest: str, save: int, *, is_delta: bool = False) -> str:
    return chunk_key(digest, save_id(save), is_delta=is_delta)


def ref(digest: str, save: int = 1, base: int | None = None, stored: int = STORED) -> ChunkRef:
    return ChunkRef(digest=digest, save=save_id(save), raw=RAW, stored=stored, base=base)


def manifest(*chunks: ChunkRef, save: int = 1, step: int = 5, heads: int | None = None, **changes: Any) -> Manifest:
    """A checkpoint of one tensor for each of the first `heads` chunks; the others are what these stand on."""
    count = len(chunks) if heads is None else heads
    given: dict[str, Any] = {
        "format": format_naming(chunk.key for chunk in chunks),
        "run": "run",
        "step": step,
        "save": save_id(save),
        "created": NOW,
        "writer": WRITER,
        "replaces": [],
        "metrics": {"loss": 0.5},
        "metadata": {"note": "first"},
        "content": "c" * 64,
        "raw_bytes": RAW * count,
        "stored_bytes": 1,
        "new_bytes": 7,
        "tree": {
            f"t{number}": {"$": "tensor", "dtype": "uint8", "shape": [RAW], "segment": number}
            for number in range(count)
        },
        "segments": [Segment(bytes=RAW, element=1, chunks=[number]) for number in range(count)],
        "chunks": list(chunks),
    }
    return Manifest(**(given | changes))


class Model:
    """A store of a dict; `good` are the chunks that are what their digests say. Time goes on with each operation."""

    def __init__(self, *values: Manifest | Ended) -> None:
        self.content: dict[str, bytes] = {}
        self.modified: dict[str, float] = {}
        self.bad: set[str] = set()
        self.done: list[str] = []
        self.checked: list[str] = []
        self.synced: list[str] = []
        self.fail: Callable[[Operation], bool] = lambda _: False
        for value in values:
            self.put(str(value.key), encode(value))

    def put(self, name: str, content: bytes) -> None:
        self.content[name] = content
        self.modified[name] = len(self.modified) + len(self.done) + 1.0

    def condemn(self, *keys: str, number: int = 77, reason: Any = "corrupt") -> None:
        listed = Condemned(
            format=format_naming(keys), collection=save_id(number), reason=reason, created=NOW, keys=list(keys)
        )
        self.put(condemned_key(save_id(number)), encode(listed))

    def copy(self, digest: str, save: int, *, size: int = STORED) -> None:
        """A full chunk that a listing shows."""
        self.put(key(digest, save), bytes(size))

    def perform(
        self, steps: Generator[Operation, Any, Any], before: Callable[[Operation], object] = lambda _: None
    ) -> Any:
        """Carry out all of `steps`; `before` each operation somebody else may do something."""
        try:
            operation = next(steps)
            while True:
                before(operation)
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
        if self.fail(operation):
            raise UnavailableError("no answer.")
        match operation:
            case List(prefixes):
                rows = sorted(name for name in self.content if name.startswith(prefixes))
                return [ObjectInfo(name, len(self.content[name]), self.modified[name]) for name in rows]
            case Get(keys):
                return [self.content.get(name) for name in keys]
            case Create(name, content):
                if name in self.content:
                    return False
                self.put(name, content)
                return True
            case Put(name, content):
                self.put(name, content)
            case Open(session):
                self.put(session_key(session.save), encode(session))
            case Close(save):
                self.content.pop(session_key(save), None)
            case Check(chunk):
                self.checked.append(chunk.key)
                return not any(link.key in self.bad for link in chunk.chain)
            case Sync(keys):
                self.synced += keys
            case _:
                raise AssertionError(operation)
        return None

    def manifests(self, step: int = 5) -> dict[int, Manifest | Ended]:
        """What stands at the manifests' keys of a step, by number of save."""
        keys = [each for name in self.content if (each := ManifestKey.parse(name)) and each.step == step]
        return {int(each.save_id, 16): decode_manifest(self.content[str(each)], each) for each in keys}

    def sessions(self) -> list[str]:
        return [name for name in self.content if name.startswith("sessions/")]


def request(*sources: Manifest, of: int = 1, save: int = REPAIR) -> RepairRequest:
    return RepairRequest(
        manifest=ManifestKey("run", 5, save_id(of)),
        sources=tuple(source.key for source in sources),
        save=save_id(save),
        created=NOW,
        writer=WRITER,
    )


def rewired(outcome: Repaired) -> list[tuple[str, int, int | None]]:
    """Digest, save and base of each chunk in the new table."""
    assert outcome.manifest is not None
    assert outcome.manifest.save == save_id(REPAIR)
    return [(chunk.digest, int(chunk.save, 16), chunk.base) for chunk in outcome.manifest.chunks]


def damaged(*chunks: ChunkRef, **changes: Any) -> Model:
    """A store of one checkpoint, whose first chunk is marked as corrupt."""
    value = manifest(*(chunks or (ref(A), ref(B))), **changes)
    model = Model(value)
    model.condemn(value.chunks[0].key)
    model.bad.add(value.chunks[0].key)
    return model


# ---- the order of things


def test_the_session_is_opened_before_the_lists_are_read_and_they_before_any_look() -> None:
    model = damaged()
    model.copy(A, 2)
    model.perform(repair(request()))
    assert model.done[:5] == ["Open", "List", "Get", "Get", "List"]
    assert model.done[5:] == ["Check", "Sync", "List", "Get", "Create", "Close", "List", "Get", "Put", "Sync"]


def test_all_that_the_new_manifest_names_is_durable_before_it_is_created() -> None:
    model = damaged()
    model.copy(A, 2)
    synced: list[list[str]] = []

    def look(operation: Operation) -> None:
        if isinstance(operation, Create):
            synced.append(list(model.synced))

    model.perform(repair(request()), look)
    assert synced == [[key(A, 2), key(B, 1)]]


# ---- what a repaired checkpoint is


def test_a_damaged_chunk_is_replaced_by_a_good_copy_and_nothing_else_is_changed() -> None:
    model = damaged()
    model.copy(A, 2, size=12)
    outcome = model.perform(repair(request()))
    assert rewired(outcome) == [(A, 2, None), (B, 1, None)]
    old = manifest(ref(A), ref(B))
    changed = {"save", "replaces", "chunks", "stored_bytes"}
    fields = {name: getattr(outcome.manifest, name) for name in Manifest.__struct_fields__}
    assert {name for name, value in fields.items() if value != getattr(old, name)} == changed
    assert fields["stored_bytes"] == 12 + STORED
    assert fields["replaces"] == [save_id(1)]


def test_the_repaired_manifest_takes_the_place_of_the_old_one() -> None:
    model = damaged()
    model.copy(A, 2)
    outcome = model.perform(repair(request()))
    found = model.manifests()
    assert found[REPAIR] == outcome.manifest
    assert isinstance(found[1], Ended)
    assert found[1].state == "deleted"
    assert model.sessions() == []


def test_a_tombstone_that_cannot_be_put_is_no_error() -> None:
    """What is replaced does not count, and a collection buries it."""
    model = damaged()
    model.copy(A, 2)
    model.fail = lambda operation: isinstance(operation, Put)
    assert rewired(model.perform(repair(request()))) == [(A, 2, None), (B, 1, None)]


def test_indices_stay_right_whichever_chunk_is_replaced() -> None:
    """Segments refer to the table by position."""
    for broken in range(3):
        model = Model(manifest(ref(A), ref(B), ref(C)))
        model.condemn(key((A, B, C)[broken], 1))
        for digest in (A, B, C):
            model.copy(digest, 2)
        saves = [2 if number == broken else 1 for number in range(3)]
        assert rewired(model.perform(repair(request()))) == [
            (A, saves[0], None),
            (B, saves[1], None),
            (C, saves[2], None),
        ]


def test_a_checkpoint_that_needs_nothing_condemned_is_left_as_it_is() -> None:
    model = Model(manifest(ref(A)))
    model.condemn(key(A, 2))
    before = dict(model.content)
    outcome = model.perform(repair(request()))
    assert outcome.manifest == manifest(ref(A))
    assert model.content == before


# ---- which copies count


def test_nothing_condemned_is_named_for_whatever_reason_it_is() -> None:
    model = damaged()
    for save in (2, 3, 4):
        model.copy(A, save)
    model.condemn(key(A, 2), number=78, reason="corrupt")
    model.condemn(key(A, 3), number=79, reason="unreferenced")
    assert rewired(model.perform(repair(request()))) == [(A, 4, None), (B, 1, None)]
    assert model.checked == [key(A, 4)]


def test_a_copy_that_is_not_good_is_passed_over_for_the_next() -> None:
    model = damaged()
    for save in (2, 3, 4):
        model.copy(A, save)
    model.bad |= {key(A, 2)}
    assert rewired(model.perform(repair(request()))) == [(A, 3, None), (B, 1, None)]
    assert model.checked == [key(A, 2), key(A, 3)]


def test_an_object_longer_than_any_chunk_of_its_length_is_not_even_read() -> None:
    model = damaged()
    model.copy(A, 2, size=RAW + 105)
    assert model.perform(repair(request())).missing == (A,)
    assert model.checked == []


def test_a_chunk_of_another_length_in_another_checkpoint_is_no_copy() -> None:
    model = damaged()
    liar = manifest(
        ChunkRef(digest=A, save=save_id(2), raw=RAW + 1, stored=STORED, base=1),
        ChunkRef(digest=C, save=save_id(2), raw=RAW + 1, stored=STORED),
        save=2,
        step=6,
        heads=0,
    )
    model.put(str(liar.key), encode(liar))
    assert model.perform(repair(request(liar))).missing == (A,)


def test_a_delta_of_another_checkpoint_is_a_copy_and_brings_along_what_it_stands_on() -> None:
    model = damaged()
    other = manifest(ref(A, 2, base=1), ref(C, 2), save=2, step=6, heads=1)
    model.put(str(other.key), encode(other))
    outcome = model.perform(repair(request(other)))
    assert rewired(outcome) == [(A, 2, 2), (B, 1, None), (C, 2, None)]
    assert outcome.manifest.format == 2
    assert outcome.manifest.stored_bytes == 3 * STORED


def test_a_full_copy_is_taken_before_a_delta() -> None:
    """It is read faster, and readers of format 1 know it."""
    model = damaged()
    other = manifest(ref(A, 2, base=1), ref(C, 2), save=2, step=6, heads=1)
    model.put(str(other.key), encode(other))
    model.copy(A, 3)
    assert rewired(model.perform(repair(request(other)))) == [(A, 3, None), (B, 1, None)]


@pytest.mark.parametrize("fault", ["condemned", "bad"])
def test_a_delta_whose_base_is_no_good_is_no_copy(fault: str) -> None:
    model = damaged()
    other = manifest(ref(A, 2, base=1), ref(C, 2), save=2, step=6, heads=1)
    model.put(str(other.key), encode(other))
    if fault == "condemned":
        model.condemn(key(C, 2), number=78)
    else:
        model.bad.add(key(C, 2))
    assert model.perform(repair(request(other))).missing == (A,)


@pytest.mark.parametrize("how", ["gone", "cut", "tombstone"])
def test_another_checkpoint_that_cannot_be_read_any_more_is_passed_over(how: str) -> None:
    model = damaged()
    model.copy(A, 3)
    other = manifest(ref(A, 2, base=1), ref(C, 2), save=2, step=6, heads=1)
    if how == "cut":
        model.put(str(other.key), encode(other)[:-1])
    if how == "tombstone":
        model.put(str(other.key), encode(Ended(state="deleted", run="run", step=6, save=save_id(2), created=NOW)))
    assert rewired(model.perform(repair(request(other)))) == [(A, 3, None), (B, 1, None)]


# ---- deltas


def on_a_base() -> Manifest:
    """A delta, a full chunk of its own, and the delta's base."""
    return manifest(ref(A, base=2), ref(B), ref(C), heads=2)


def test_a_delta_whose_base_is_damaged_gets_a_good_base() -> None:
    model = Model(on_a_base())
    model.condemn(key(C, 1))
    model.copy(C, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 1, 2), (B, 1, None), (C, 2, None)]


def test_a_delta_whose_base_has_no_good_copy_gets_a_full_copy_of_itself() -> None:
    """What was saved again after its base was marked was uploaded in full."""
    model = Model(on_a_base())
    model.condemn(key(C, 1))
    model.copy(A, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 2, None), (B, 1, None)]


def test_a_delta_without_a_good_base_and_without_a_copy_is_lost() -> None:
    model = Model(on_a_base())
    model.condemn(key(C, 1))
    assert model.perform(repair(request())) == Repaired(None, (A,))


@pytest.mark.parametrize("copied", [True, False])
def test_a_delta_that_turns_out_damaged_on_its_new_base_is_replaced_too(copied: bool) -> None:
    """Nobody could tell as long as its base was damaged, so it is in no list."""
    model = Model(on_a_base())
    model.condemn(key(C, 1))
    model.bad.add(key(A, 1, is_delta=True))
    model.copy(C, 2)
    if copied:
        model.copy(A, 2)
        assert rewired(model.perform(repair(request()))) == [(A, 2, None), (B, 1, None)]
    else:
        assert model.perform(repair(request())) == Repaired(None, (A,))


def test_a_delta_that_is_damaged_itself_gets_a_full_copy_and_its_base_is_dropped() -> None:
    model = Model(on_a_base())
    model.condemn(key(A, 1, is_delta=True))
    model.copy(A, 2)
    outcome = model.perform(repair(request()))
    assert rewired(outcome) == [(A, 2, None), (B, 1, None)]
    assert outcome.manifest.format == 1


def test_a_base_that_is_a_tensor_of_its_own_as_well_is_replaced_in_both_places() -> None:
    model = Model(manifest(ref(A, base=1), ref(B)))
    model.condemn(key(B, 1))
    model.copy(B, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 1, 1), (B, 2, None)]


def test_the_good_copy_of_a_base_may_be_a_chunk_of_the_same_table() -> None:
    model = Model(manifest(ref(A, base=2), ref(B, 2), ref(B, 1), heads=2))
    model.condemn(key(B, 1))
    model.copy(B, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 1, 1), (B, 2, None)]


def test_no_manifest_is_made_whose_chains_are_longer_than_readers_take() -> None:
    digests = [f"{number:064x}" for number in range(MAX_DELTA_DEPTH + 1)]
    deepest = manifest(
        *(ref(digest, base=number + 1) for number, digest in enumerate(digests[:-1])), ref(digests[-1]), heads=1
    )
    model = Model(deepest)
    model.condemn(key(digests[-1], 1))
    other = manifest(ref(digests[-1], 2, base=1), ref(C, 2), save=2, step=6, heads=1)
    model.put(str(other.key), encode(other))
    outcome = model.perform(repair(request(other)))
    assert outcome == Repaired(None, (digests[0],))
    assert model.manifests()[1] == deepest


# ---- where there is nothing to do


def test_where_there_is_no_good_copy_the_digests_are_named_and_nothing_is_changed() -> None:
    model = Model(manifest(ref(A), ref(B), ref(C)))
    model.condemn(key(A, 1), key(C, 1))
    model.copy(C, 2)
    before = dict(model.content)
    assert model.perform(repair(request())) == Repaired(None, (A,))
    assert model.content == before


def test_a_session_that_cannot_be_closed_does_not_hide_what_was_found() -> None:
    model = damaged()
    model.fail = lambda operation: isinstance(operation, Close)
    assert model.perform(repair(request())) == Repaired(None, (A,))


def test_a_list_that_cannot_be_read_ends_a_repair() -> None:
    """It could name any copy."""
    model = damaged()
    model.copy(A, 2)
    model.put(condemned_key(save_id(78)), b"no list")
    before = dict(model.content)
    with pytest.raises(CorruptError, match="which chunks are good is not known"):
        model.perform(repair(request()))
    assert model.content == before


@pytest.mark.parametrize("kind", [Open, List, Get, Check, Sync])
def test_a_repair_that_fails_before_its_commit_changes_nothing(kind: type[Operation]) -> None:
    model = damaged()
    model.copy(A, 2)
    before = dict(model.content)
    model.fail = lambda operation: isinstance(operation, kind)
    with pytest.raises(UnavailableError, match=r"^no answer\."):
        model.perform(repair(request()))
    assert model.content == before


# ---- what others do meanwhile


def meanwhile(model: Model, kind: type[Operation], act: Callable[[], object], nth: int = 1) -> Any:
    """The outcome of a repair, or its error, if `act` happens just before its `nth` operation of a kind."""
    left = nth

    def before(operation: Operation) -> None:
        nonlocal left
        left -= isinstance(operation, kind)
        if left == 0:
            left = -1
            act()

    try:
        return model.perform(repair(request()), before)
    except CheckpointError as error:
        return error


def delete_it(model: Model) -> None:
    model.perform(delete("run", 5, NOW))


@pytest.mark.parametrize(("kind", "nth"), [(Open, 1), (List, 1), (Get, 2), (List, 2), (Check, 1), (List, 3), (Get, 3)])
def test_a_checkpoint_that_is_deleted_meanwhile_does_not_come_back(kind: type[Operation], nth: int) -> None:
    model = damaged()
    model.copy(A, 2)
    outcome = meanwhile(model, kind, lambda: delete_it(model), nth)
    assert isinstance(outcome, ConflictError)
    assert "step 5 of run 'run' was deleted, saved again or damaged meanwhile" in str(outcome)
    assert all(isinstance(each, Ended) for each in model.manifests().values())
    assert model.sessions() == []


def test_a_checkpoint_that_is_deleted_just_after_the_commit_does_not_come_back() -> None:
    model = damaged()
    model.copy(A, 2)
    meanwhile(model, Close, lambda: delete_it(model))
    assert all(isinstance(each, Ended) for each in model.manifests().values())


def test_a_delete_between_the_last_look_and_the_commit_is_undone() -> None:
    """It cannot be told from what a collection does, and no checkpoint is to be lost to that."""
    model = damaged()
    model.copy(A, 2)
    assert rewired(meanwhile(model, Create, lambda: delete_it(model))) == [(A, 2, None), (B, 1, None)]
    assert isinstance(model.manifests()[REPAIR], Manifest)


def test_a_collection_that_buries_what_was_replaced_first_does_not_cost_the_checkpoint() -> None:
    model = damaged()
    model.copy(A, 2)
    old = ManifestKey("run", 5, save_id(1))
    tombstone = encode(Ended(state="deleted", run="run", step=5, save=save_id(1), created=NOW))
    outcome = meanwhile(model, Close, lambda: model.put(str(old), tombstone))
    assert rewired(outcome) == [(A, 2, None), (B, 1, None)]
    assert model.manifests()[REPAIR] == outcome.manifest


def another_save(**changes: Any) -> Manifest:
    return manifest(ref(D, 3), save=3, replaces=[save_id(1)], **changes)


@pytest.mark.parametrize("how", [{"content": "d" * 64}, {"metrics": {"loss": 0.25}}, {"metadata": {}}], ids=str)
@pytest.mark.parametrize(("kind", "nth"), [(Open, 1), (Check, 1), (List, 3), (Create, 1), (Close, 1)])
def test_a_save_of_another_state_that_commits_meanwhile_is_what_counts(
    how: dict[str, Any], kind: type[Operation], nth: int
) -> None:
    """Whether or not it has come to bury what it replaces."""
    model = damaged()
    model.copy(A, 2)
    saved = another_save(**how)
    outcome = meanwhile(model, kind, lambda: model.put(str(saved.key), encode(saved)), nth)
    assert isinstance(outcome, ConflictError)
    found = model.manifests()
    assert found[3] == saved
    assert isinstance(found.get(REPAIR, Ended), type | Ended)


def test_two_repairs_at_once_never_take_away_each_others_manifest() -> None:
    for turns in range(2**6):
        model = damaged()
        model.copy(A, 2)
        repairs = [repair(request(save=REPAIR)), repair(request(save=REPAIR + 1))]
        asked: list[Operation | None] = [next(steps) for steps in repairs]
        # Both up to their commits; then in every order.
        for number, steps in enumerate(repairs):
            while not isinstance(asked[number], Create):
                operation = asked[number]
                assert operation is not None
                asked[number] = steps.send(model.do(operation))
        order = [turns >> place & 1 for place in range(6)] + [0] * 6 + [1] * 6
        for number in order:
            operation = asked[number]
            if operation is None:
                continue
            try:
                asked[number] = repairs[number].send(model.do(operation))
            except (StopIteration, ConflictError):
                asked[number] = None
        assert asked == [None, None]
        standing = [each for each in model.manifests().values() if isinstance(each, Manifest)]
        assert standing
        assert all(each.chunks[0].save == save_id(2) for each in standing)


def test_a_step_with_two_manifests_is_repaired_as_the_one_that_counts() -> None:
    earlier = manifest(ref(D, 3), save=3, content="d" * 64)
    model = Model(earlier, manifest(ref(A)))
    model.condemn(key(A, 1))
    model.copy(A, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 2, None)]
    assert model.manifests()[3] == earlier


def test_a_manifest_that_does_not_count_is_not_repaired() -> None:
    later = manifest(ref(D, 3), save=3, content="d" * 64)
    model = Model(manifest(ref(A)), later)
    model.condemn(key(A, 1))
    model.copy(A, 2)
    with pytest.raises(ConflictError):
        model.perform(repair(request()))
    assert set(model.manifests()) == {1, 3}


def test_a_look_after_the_commit_that_fails_is_no_error() -> None:
    model = damaged()
    model.copy(A, 2)
    model.fail = lambda operation: isinstance(operation, List) and "Create" in model.done
    assert rewired(model.perform(repair(request()))) == [(A, 2, None), (B, 1, None)]


# ---- the commit


def test_a_fence_keeps_a_repair_from_committing() -> None:
    model = damaged()
    model.copy(A, 2)
    model.put(
        str(ManifestKey("run", 5, save_id(REPAIR))),
        encode(Ended(state="fenced", run="run", step=5, save=save_id(REPAIR), created=NOW)),
    )
    with pytest.raises(FencedError, match=r"^the repair of step 5 of run 'run' was taken for dead .* Do it again\."):
        model.perform(repair(request()))
    assert isinstance(model.manifests()[1], Manifest)
    assert model.sessions() == []


def test_a_commit_whose_outcome_is_not_known_says_so_and_leaves_the_session() -> None:
    model = damaged()
    model.copy(A, 2)
    model.fail = lambda operation: isinstance(operation, Create)
    with pytest.raises(UnavailableError, match=r"was committed is not known: no answer\. .* do it again: that is safe"):
        model.perform(repair(request()))
    assert model.sessions() == [session_key(save_id(REPAIR))]
    assert isinstance(model.manifests()[1], Manifest)


def test_a_commit_whose_answer_was_lost_is_a_success() -> None:
    class LosesAnswer(Model):
        def do(self, operation: Operation) -> Any:
            answer = super().do(operation)
            if isinstance(operation, Create):
                raise UnavailableError("the connection was cut")
            return answer

    model = LosesAnswer(manifest(ref(A)))
    model.condemn(key(A, 1))
    model.copy(A, 2)
    assert rewired(model.perform(repair(request()))) == [(A, 2, None)]
    assert isinstance(model.manifests()[1], Ended)
