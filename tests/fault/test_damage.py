"""Any byte flipped, cut off or missing, in any object: verify names it, and restore goes back to what is sound."""

import uuid
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore.errors import CheckpointWarning
from ckptstore.format import BLOCK_FORMAT_VERSION, condemned_key, new_save_id
from ckptstore.manifest import Condemned, encode
from ckptstore.objects.memory import MemoryObjects
from ckptstore.sealed import seal
from ckptstore.testing import FailingObjects
from ckptstore.writer import now_text


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(8, 4, generator=generator),
        "zeros": torch.full((64,), step, dtype=torch.int64),
        "bytes": torch.randint(0, 255, (16,), dtype=torch.uint8, generator=generator),
        "step": step,
    }


class SmallStore:
    """Two checkpoints without a chunk in common, and a way to put everything back as it was."""

    def __init__(self) -> None:
        self.place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
        self.run = ckptstore.Store(self.place).run("run")
        for step in (1, 2):
            self.run.save(state(step), step=step)
        self.content = {row.key: self.place.get(row.key) or b"" for row in self.place.list("")}

    def reset(self) -> None:
        for row in self.place.list(""):
            if row.key not in self.content:
                self.place.delete(row.key)
        for key, content in self.content.items():
            if self.place.get(key) != content:
                self.place.put(key, content)

    def belongs_to(self, key: str) -> int:
        """Which of the steps an object is of; 0 for the marker."""
        if key.startswith("runs/"):
            return int(key.split("/")[2][:20])
        return next((step for step in (1, 2) if any(key == ref.key for ref in self.refs(step))), 0)

    def refs(self, step: int) -> list[Any]:
        return self.run.checkpoint(step)._manifest.chunks


@pytest.fixture(scope="module")
def small() -> Iterator[SmallStore]:
    store = SmallStore()
    yield store
    MemoryFileSystem.store.clear()


def check(small: SmallStore, key: str, of: int) -> None:
    """Verify must name the object; a restore must come from the other step, or be right."""
    report = ckptstore.Store(small.place).verify()
    assert not report.ok
    assert {found.key for found in report.damaged} == {key}
    if key.startswith("chunks/"):
        assert all(found.step == of and found.path for found in report.damaged)
    destination = {name: torch.zeros_like(value) for name, value in state(0).items() if name != "step"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = small.run.restore(destination)
    assert found is not None
    expected = 1 if of == 2 else 2
    assert found.step == found.state["step"] == expected
    assert all(torch.equal(value, state(expected)[name]) for name, value in destination.items())
    told = [str(each.message) for each in caught if each.category is CheckpointWarning]
    assert len(told) == (1 if of != 1 else 0)  # the older checkpoint was not looked at
    if of == 2:
        assert key in told[0]
        assert "Going back to step 1" in told[0]


def test_every_flipped_byte_of_every_object(small: SmallStore) -> None:
    for key, content in small.content.items():
        of = small.belongs_to(key)
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            small.place.put(key, bytes(damaged))
            check(small, key, of)
            small.reset()


def test_every_object_cut_off_anywhere(small: SmallStore) -> None:
    for key, content in small.content.items():
        of = small.belongs_to(key)
        for length in {*range(0, len(content), 7), len(content) - 1}:
            small.place.put(key, content[:length])
            check(small, key, of)
            small.reset()


def test_every_object_with_bytes_added(small: SmallStore) -> None:
    for key, content in small.content.items():
        small.place.put(key, content + b"\0")
        check(small, key, small.belongs_to(key))
        small.reset()


def test_every_missing_chunk(small: SmallStore) -> None:
    for key in [key for key in small.content if key.startswith("chunks/")]:
        small.place.delete(key)
        check(small, key, small.belongs_to(key))
        small.reset()


def test_a_missing_marker(small: SmallStore) -> None:
    small.place.delete("ckptstore.json")
    check(small, "ckptstore.json", 0)
    small.reset()


def test_two_chunks_that_changed_places(small: SmallStore) -> None:
    one, other = (ref.key for ref in small.refs(2)[:2])
    small.place.put(one, small.content[other])
    small.place.put(other, small.content[one])
    assert {found.key for found in ckptstore.Store(small.place).verify().damaged} == {one, other}
    small.reset()


def test_a_manifest_in_the_place_of_another(small: SmallStore) -> None:
    one, other = (key for key in small.content if key.startswith("runs/"))
    small.place.put(other, small.content[one])
    check(small, other, small.belongs_to(other))
    small.reset()


@pytest.fixture
def damaged() -> tuple[SmallStore, str]:
    """A store whose newest checkpoint has a damaged chunk."""
    small = SmallStore()
    key = next(found.key for found in small.refs(2))
    small.place.put(key, b"nonsense")
    return small, key


def restored(small: SmallStore) -> ckptstore.Checkpoint | None:
    with pytest.warns(CheckpointWarning, match="damaged: step 2 of run 'run'"):
        return small.run.restore({"weight": torch.zeros(8, 4), "zeros": torch.zeros(64, dtype=torch.int64),
                                  "bytes": torch.zeros(16, dtype=torch.uint8)})  # fmt: skip


def verified(small: SmallStore) -> object:
    return ckptstore.Store(small.place).verify()


def loaded(small: SmallStore) -> object:
    with pytest.raises(ckptstore.CorruptError) as caught:
        small.run.load(step=2)
    return caught


@pytest.mark.parametrize("find", [restored, verified, loaded])
@pytest.mark.parametrize("same_state", [True, False])
def test_a_training_that_went_back_saves_a_good_copy(
    damaged: tuple[SmallStore, str], find: Callable[[SmallStore], object], same_state: bool
) -> None:
    small, key = damaged
    find(small)
    new = state(2) if same_state else state(3)
    saved = small.run.save(new, step=2)  # no ConflictError, and no chunk taken from the damaged checkpoint
    assert key not in {ref.key for ref in saved._manifest.chunks}
    assert torch.equal(small.run.load(step=2)["weight"], new["weight"])
    other = small.run.save(state(2), step=4)
    assert torch.equal(small.run.load(step=4)["weight"], state(2)["weight"])
    assert key not in {ref.key for ref in other._manifest.chunks}


def restore_quietly(small: SmallStore, destination: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.run.restore(destination)


def test_where_nothing_verifies_the_error_says_that_the_destination_is_mixed() -> None:
    small = SmallStore()
    for key, content in small.content.items():
        if key.startswith("runs/"):
            small.place.put(key, content[:-1])
    destination = {"weight": torch.zeros(8, 4)}
    with pytest.raises(ckptstore.CorruptError, match=r"no checkpoint of run 'run' can be restored.*was not changed"):
        restore_quietly(small, destination)
    large = torch.randn(300, 300)
    small.run.save({"weight": large}, step=3)
    [ref] = small.refs(3)
    small.place.put(ref.key, b"nonsense")
    for key in small.content:
        if key.startswith("runs/"):
            small.place.delete(key)
    with pytest.raises(ckptstore.CorruptError, match="holds parts of a checkpoint now and must not be used"):
        restore_quietly(small, {"weight": torch.zeros(300, 300)})


def test_a_damaged_manifest_beside_an_older_one_of_the_same_step_is_told() -> None:
    small = SmallStore()
    key = next(key for key in small.content if key.startswith("runs/") and small.belongs_to(key) == 2)
    raced = key.replace(key.split(".")[-2], "f" * 32)  # what two saves of one step leave, of which one is cut off
    small.place.put(raced, small.content[key][:900])
    with pytest.warns(CheckpointWarning, match="f{32}.json is damaged or cut off.*Going back to step 2"):
        assert small.run.restore({"weight": torch.zeros(8, 4)}) is not None


def test_what_a_damaged_checkpoint_has_written_must_be_overwritten_by_the_one_before() -> None:
    """With strict=False the older step may lack a tensor; then the damaged one's bytes would stay."""
    small = SmallStore()
    first, second, third = (torch.randn(300, 300) for _ in range(3))
    small.run.save({"m": torch.nn.ParameterDict({"a": first})}, step=3)
    small.run.save({"m": torch.nn.ParameterDict({"a": second, "b": third})}, step=4)
    manifest = small.run.checkpoint(4)._manifest
    key = manifest.chunks[manifest.segments[1].chunks[0]].key
    content = bytearray(small.place.get(key) or b"")
    content[-1] ^= 1
    small.place.put(key, bytes(content))
    module = torch.nn.ParameterDict({"a": torch.zeros(300, 300), "b": torch.zeros(300, 300)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ckptstore.InvalidInputError, match=r"does not hold m.b.*must not be used"):
            small.run.restore({"m": module}, strict=False)
        # Where the older one holds it all, it simply takes its place.
        assert small.run.restore({"m": torch.nn.ParameterDict({"a": torch.zeros(300, 300)})}, strict=False) is not None


def test_a_tree_that_makes_no_sense_is_gone_back_from_as_well() -> None:
    small = SmallStore()
    small.run.save({"x": torch.ones(2)}, step=3)
    manifest = small.run.checkpoint(3)._manifest
    tree = {"x": {"$": "tensor", "dtype": "float32", "shape": [99], "segment": 0}}
    crafted = msgspec.structs.replace(manifest, tree=tree)
    small.place.put(str(manifest.key), encode(crafted))
    small.run.save({"x": torch.ones(2)}, step=2, replace=True)
    with pytest.warns(CheckpointWarning, match="step 2"):
        assert small.run.restore({"x": torch.zeros(2)}) is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ckptstore.UnavailableError])
def test_a_restore_that_is_cut_off_says_that_the_destination_is_mixed(error: type[BaseException]) -> None:
    small = SmallStore()
    small.run.save({str(number): torch.randn(300, 300) for number in range(20)}, step=3)
    broken = FailingObjects(small.place, fail_at=14, error=lambda: error("cut off"))
    destination = {str(number): torch.zeros(300, 300) for number in range(20)}
    with pytest.raises(error) as caught:
        ckptstore.Store(broken).run("run").restore(destination)
    told = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "must not be used" in told


def test_a_damaged_manifest_is_an_error_of_load_and_no_other_step_is_given(damaged: tuple[SmallStore, str]) -> None:
    small, _ = damaged
    key = next(key for key in small.content if key.startswith("runs/") and small.belongs_to(key) == 2)
    small.place.put(key, small.content[key][:-1])
    with pytest.raises(ckptstore.CorruptError, match=r"the manifest of step 2 of run 'run' is damaged.*steps 1"):
        small.run.load(2)
    with pytest.raises(ckptstore.CorruptError, match="Name an older step, or let restore"):
        small.run.load()
    with pytest.raises(ckptstore.CorruptError):
        ckptstore.Store(small.place).usage()


def test_a_store_that_cannot_be_written_to_is_gone_back_in_all_the_same(damaged: tuple[SmallStore, str]) -> None:
    class ReadOnly(MemoryObjects):
        def create(self, key: str, content: Any) -> bool:
            raise ckptstore.UnavailableError("read-only")

    small, _ = damaged
    store = ckptstore.Store(ReadOnly(small.place.url))
    with pytest.warns(CheckpointWarning, match="Going back to step 1"):
        assert store.run("run").restore({"zeros": torch.zeros(64, dtype=torch.int64), "weight": torch.zeros(8, 4)})
    report = store.verify()
    assert not report.ok
    assert not report.marked


def test_a_damaged_chunk_that_no_checkpoint_needs_is_found_too() -> None:
    small = SmallStore()
    [key, *_] = {ref.key for ref in small.refs(2)}
    small.run.delete(2)
    small.place.put(key, small.content[key][:-1])
    report = ckptstore.Store(small.place).verify()
    assert not report.ok
    assert [(found.key, found.run) for found in report.damaged] == [(key, None)]
    assert small.run.save(state(2), step=2).step == 2
    assert torch.equal(small.run.load(2)["weight"], state(2)["weight"])


@pytest.mark.parametrize("find", [verified, loaded, restored])
def test_a_store_is_sound_again_when_no_checkpoint_needs_the_damaged_chunk(
    damaged: tuple[SmallStore, str], find: Callable[[SmallStore], object]
) -> None:
    small, key = damaged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        find(small)  # which marks it
    small.run.save(state(2), step=2)
    for _ in range(2):
        report = ckptstore.Store(small.place).verify()
        assert report.ok
        assert [found.key for found in report.harmless] == [key]


def test_a_damaged_chunk_that_is_marked_is_damage_as_long_as_a_checkpoint_needs_it(
    damaged: tuple[SmallStore, str],
) -> None:
    small, key = damaged
    for _ in range(2):
        report = ckptstore.Store(small.place).verify()
        assert not report.ok
        assert {found.key for found in report.damaged} == {key}
        assert not report.harmless


def test_a_chunk_condemned_as_garbage_is_marked_as_corrupt_all_the_same(damaged: tuple[SmallStore, str]) -> None:
    small, key = damaged
    other = new_save_id()
    garbage = Condemned(collection=other, reason="unreferenced", created=now_text(), keys=[key])
    small.place.create(condemned_key(other), encode(garbage))
    verified(small)
    # Only that mark lets a save take the damaged checkpoint's place unasked.
    assert small.run.save(state(3), step=2).step == 2


def test_a_chunk_that_nobody_needs_and_that_vanishes_meanwhile_is_no_damage() -> None:
    small = SmallStore()
    keys = {ref.key for ref in small.refs(2)} - {ref.key for ref in small.refs(1)}
    small.run.delete(2)

    class Vanishing(MemoryObjects):
        def get(self, key: str) -> bytes | None:
            return None if key in keys else super().get(key)

    report = ckptstore.Store(Vanishing(small.place.url)).verify()
    assert report.ok
    assert not report.harmless


def test_an_object_of_a_newer_version_is_no_damage_but_an_error() -> None:
    small = SmallStore()
    key = next(key for key in small.content if key.startswith("runs/"))
    small.place.put(key, seal(b'{"format":%d,"state":"committed"}' % (BLOCK_FORMAT_VERSION + 1), min_bytes=1024))
    with pytest.raises(ckptstore.UnsupportedFormatError):
        ckptstore.Store(small.place).verify()


def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_damaged() -> None:
    small = SmallStore()

    class Deleting(MemoryObjects):
        def get(self, key: str) -> bytes | None:
            if key.startswith("chunks/") and 2 in small.run.steps():
                doomed = {ref.key for ref in small.refs(2)}
                small.run.delete(2)
                for each in doomed:
                    small.place.delete(each)
            return super().get(key)

    assert ckptstore.Store(Deleting(small.place.url)).verify().ok


def test_an_error_names_the_damaged_key_to_programs_too() -> None:
    small = SmallStore()
    small.run.delete(1)
    key = small.refs(2)[0].key
    damages: list[Callable[[], None]] = [partial(small.place.put, key, b"nonsense"), partial(small.place.delete, key)]
    for damage in damages:
        damage()
        kind = ckptstore.CorruptError if small.place.get(key) else ckptstore.MissingChunkError
        destination = {name: torch.zeros_like(value) for name, value in state(0).items() if name != "step"}
        for call in (small.run.load, partial(small.run.restore, destination)):
            with pytest.raises(kind) as caught:
                call()
            assert caught.value.key == key


def test_damage_found_again_is_marked_once() -> None:
    small = SmallStore()
    small.place.put(small.refs(2)[0].key, b"nonsense")
    for _ in range(3):
        loaded(small)
        verified(small)
    assert len(small.place.list("condemned/")) == 1


def test_a_manifest_that_was_cut_off_can_be_deleted() -> None:
    small = SmallStore()
    key = next(key for key in small.content if key.startswith("runs/") and small.belongs_to(key) == 2)
    small.place.put(key, small.content[key][:100])
    assert not ckptstore.Store(small.place).verify().ok
    small.run.delete(2)
    assert ckptstore.Store(small.place).verify().ok
    assert small.run.steps() == [1]


def test_damage_of_the_way_is_mended_by_reading_again() -> None:
    small = SmallStore()

    class Flaky(MemoryObjects):
        seen: set[str] = set()  # noqa: RUF012

        def get(self, key: str) -> bytes | None:
            content = super().get(key)
            if content is None or not key.startswith("chunks/") or key in self.seen:
                return content
            self.seen.add(key)
            return content[:-1] + bytes([content[-1] ^ 1])

    run = ckptstore.Store(Flaky(small.place.url)).run("run")
    assert torch.equal(run.load(step=2)["weight"], state(2)["weight"])
    assert small.place.list("condemned/") == []
