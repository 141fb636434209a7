"""A save of many processes: its session, its ids, what its parts may reuse, and how it ends."""

import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ckptstore
from ckptstore import performing, protocol
from ckptstore.condemning import condemn_keys
from ckptstore.errors import ConflictError, FencedError, InvalidInputError, UnavailableError
from ckptstore.format import SESSIONS, ChunkKey, family, new_joint_save_id, part_id
from ckptstore.objects.base import Bytes, ObjectInfo, Objects
from ckptstore.objects.open import open_objects
from ckptstore.performing import Performer
from ckptstore.protocol.saves import close_quietly
from ckptstore.shards import Tree
from ckptstore.testing import RecordingObjects
from ckptstore.writer import now_text, this_writer
from tests import joint

HALF = torch.arange(50_000.0)
PARTS: list[list[joint.Given]] = [
    [(("w",), HALF, (0,), (100_000,))],
    [(("w",), -HALF, (50_000,), (100_000,))],
]


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


def begun(performer: Performer, save: str, step: int = 1) -> None:
    request = protocol.JointRequest(run="run", step=step, save=save, created=now_text(), writer=this_writer())
    performer.perform(protocol.begin(request))


def comes_true(condition: Callable[[], bool]) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_the_ids_of_a_joint_save_differ_and_are_of_one_family() -> None:
    save, other = new_joint_save_id(), new_joint_save_id()
    ids = [save, *(part_id(save, number) for number in (0, 1, 1000))]
    assert len(set(ids)) == 4
    assert {family(each) for each in ids} == {family(save)} != {family(other)}
    assert all(ChunkKey.parse(f"chunks/ab/{'ab' * 32}.{each}") for each in ids)


def test_the_session_beats_from_the_beginning_to_the_end(place: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performing, "BEAT_SECONDS", 0.002)
    performer, save = Performer(place), new_joint_save_id()
    begun(performer, save)
    beats: set[bytes | None] = set()

    def has_beaten() -> bool:
        beats.add(place.get(f"{SESSIONS}{save}.json"))
        return len(beats) > 3

    assert comes_true(has_beaten)
    performer.perform(close_quietly(save))
    assert place.list(SESSIONS) == []


def test_a_save_that_is_abandoned_closes_its_session_by_itself(place: Objects) -> None:
    performer = Performer(place)
    begun(performer, new_joint_save_id())
    assert len(place.list(SESSIONS)) == 1
    performer.abandon()
    performer.abandon()
    assert comes_true(lambda: place.list(SESSIONS) == [])


def test_if_the_beginning_fails_no_session_is_left(place: Objects) -> None:
    class Broken(RecordingObjects):
        def list(self, prefix: str) -> list[ObjectInfo]:
            raise UnavailableError("no listing")

    with pytest.raises(UnavailableError):
        begun(Performer(Broken(place)), new_joint_save_id())
    assert place.list(SESSIONS) == []


def test_parts_are_one_checkpoint_whose_new_bytes_are_those_of_all(place: Objects) -> None:
    saved = joint.save(place, "run", 1, PARTS, {"note": "x"})
    assert saved.new_bytes == saved.stored_bytes == sum(chunk.stored for chunk in saved.chunks)
    assert {family(chunk.save) for chunk in saved.chunks} == {family(saved.save)}
    assert len({chunk.save for chunk in saved.chunks}) == 2
    state = ckptstore.Store(place).run("run").load()
    assert torch.equal(state["w"], torch.cat([HALF, -HALF]))
    assert joint.save(place, "run", 2, PARTS, {"note": "x"}).new_bytes == 0
    assert place.list(SESSIONS) == []


def test_two_parts_that_hold_equal_bytes_never_put_one_key(place: Objects) -> None:
    puts: list[str] = []

    class Blind(RecordingObjects):
        """Listings show no chunks, as if both parts had looked before either had put its own."""

        def put(self, key: str, content: Bytes) -> None:
            puts.append(key)
            super().put(key, content)

        def list(self, prefix: str) -> list[ObjectInfo]:
            return [] if prefix.startswith("chunks/") else super().list(prefix)

    equal: list[list[joint.Given]] = [
        [(("w",), HALF, (0,), (100_000,))],
        [(("w",), HALF, (50_000,), (100_000,))],
    ]
    saved = joint.save(Blind(place), "run", 1, equal, {})
    keys = [key for key in puts if key.startswith("chunks/")]
    assert len(keys) == len(set(keys)) == 2
    assert len(saved.chunks) == 1
    store = ckptstore.Store(place)
    assert torch.equal(store.run("run").load()["w"], torch.cat([HALF, HALF]))
    assert store.collect().deleted == 1


def test_a_process_that_sees_another_store_than_the_coordinator_says_so_and_puts_nothing(place: Objects) -> None:
    elsewhere = RecordingObjects(open_objects(f"memory://{uuid.uuid4().hex}"))
    part = protocol.PartRequest(part_id("0" * 32, 1), {"ab" * 32: 10})
    with pytest.raises(UnavailableError, match="does not see the store that the coordinator sees"):
        Performer(elsewhere).perform(protocol.hold_part(part, "0" * 32))
    assert [call.operation for call in elsewhere.calls] == ["get"]


def test_what_is_condemned_is_uploaded_again_by_the_part_that_holds_it(place: Objects) -> None:
    saved = joint.save(place, "run", 1, PARTS, {})
    condemn_keys(place, [saved.chunks[1].key])
    again = joint.save(place, "run", 2, PARTS, {})
    assert again.chunks[0] == saved.chunks[0]
    assert again.chunks[1].digest == saved.chunks[1].digest
    assert again.chunks[1].save == part_id(again.save, 1)


def test_a_collection_does_not_even_mark_chunks_of_a_joint_save_that_beats(place: Objects) -> None:
    store = ckptstore.Store(place)
    store.run("run").save({"x": 1}, step=1)
    performer, save = Performer(place), new_joint_save_id()
    begun(performer, save, step=2)
    place.put(f"chunks/ab/{'ab' * 32}.{part_id(save, 3)}", b"chunk")
    assert store.collect().garbage == 0
    performer.abandon()
    assert comes_true(lambda: place.list(SESSIONS) == [])
    assert store.collect().deleted == 1


def test_the_same_state_of_a_step_is_what_is_there_and_another_is_a_conflict(place: Objects) -> None:
    saved = joint.save(place, "run", 1, PARTS, {})
    assert joint.save(place, "run", 1, PARTS, {}) == saved
    other: list[list[joint.Given]] = [[(("w",), HALF + 1, (0,), (50_000,))]]
    with pytest.raises(ConflictError, match="step 1 of run 'run' is saved already"):
        joint.save(place, "run", 1, other, {})
    assert joint.save(place, "run", 1, other, {}, replace=True).replaces == [saved.save]
    assert place.list(SESSIONS) == []


def test_a_joint_save_that_was_fenced_never_commits(place: Objects) -> None:
    class Collecting(RecordingObjects):
        def create(self, key: str, content: Bytes) -> bool:
            if key.startswith("runs/"):
                ckptstore.Store(place).collect(grace=0)
            return super().create(key, content)

    with pytest.raises(FencedError):
        joint.save(Collecting(place), "run", 1, PARTS, {})
    store = ckptstore.Store(place)
    assert store.run("run").steps() == []
    assert place.list(SESSIONS) == []
    assert joint.save(place, "run", 1, PARTS, {}).step == 1
    assert store.verify().ok


OUTSIDE: list[joint.Given] = [(("w",), -HALF, (50_001,), (100_000,))]


@pytest.mark.parametrize(
    "parts",
    [[PARTS[0]], [PARTS[0], PARTS[0]], [PARTS[0], PARTS[1], PARTS[1]], [PARTS[0], OUTSIDE]],
    ids=["gap", "twice the same", "overlap", "outside"],
)
def test_shards_that_do_not_make_up_their_tensor_are_refused_by_name(
    place: Objects, parts: list[list[joint.Given]]
) -> None:
    with pytest.raises(InvalidInputError, match=r"w, of shape \(100000,\), is not what the processes' shards make up"):
        joint.save(place, "run", 1, parts, {})
    assert ckptstore.Store(place).run("run").steps() == []


def test_shards_of_two_dtypes_are_refused_by_name(place: Objects) -> None:
    parts: list[list[joint.Given]] = [PARTS[0], [(("w",), HALF.double(), (50_000,), (100_000,))]]
    with pytest.raises(InvalidInputError, match="w has shards of the dtypes float32, float64"):
        joint.save(place, "run", 1, parts, {})


def test_small_tensors_travel_and_are_bundled_as_one_process_would(place: Objects) -> None:
    whole = {"a": torch.arange(100.0), "b": torch.ones(3, 4)}
    parts: list[list[joint.Given]] = [
        [(("a",), whole["a"][:60], (0,), (100,)), (("b",), whole["b"][:, :1], (0, 0), (3, 4))],
        [(("a",), whole["a"][60:], (60,), (100,)), (("b",), whole["b"][:, 1:], (0, 1), (3, 4))],
    ]
    saved = joint.save(place, "run", 1, parts, {}, carried_bytes=1000)
    assert saved.format == 1
    assert len(saved.chunks) == 1
    assert ckptstore.Store(place).run("run").save(whole, step=2).new_bytes == 0
    assert joint.save(place, "run", 3, parts, {}).format == 3  # where each part bundles its own


def test_what_is_small_and_does_not_all_travel_comes_together_even_so(place: Objects) -> None:
    whole = torch.arange(1000.0)
    parts: list[list[joint.Given]] = [
        [(("a",), whole[:100], (0,), (1000,))],
        [(("a",), whole[100:], (100,), (1000,))],
    ]
    saved = joint.save(place, "run", 1, parts, {}, carried_bytes=400)
    [segment] = saved.segments
    assert {saved.chunks[index].save for index in segment.chunks} == {saved.save, part_id(saved.save, 1)}
    assert torch.equal(ckptstore.Store(place).run("run").load()["a"], whole)


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_empty_in_one_process_gives_way_to_what_it_holds_in_another(order: int) -> None:
    leaves: list[tuple[tuple[str | int, ...], Any]] = [(("buffers",), []), (("buffers", 0), 7), (("other",), {})]
    tree = Tree()
    for path, node in leaves[::order]:
        tree.put(path, node)
    assert tree.skeleton() == {"buffers": [7], "other": {}}


@pytest.mark.parametrize("order", [1, -1])
def test_a_value_in_one_process_that_holds_something_in_another_is_refused(order: int) -> None:
    leaves: list[tuple[tuple[str | int, ...], Any]] = [(("a",), 7), (("a", "b"), 8)]
    tree = Tree()
    with pytest.raises(InvalidInputError, match="Rename one"):
        for path, node in leaves[::order]:
            tree.put(path, node)
