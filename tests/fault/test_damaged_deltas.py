"""Deltas and what they stand on, damaged: every checkpoint that needs the damaged object is named, and no other."""

import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ckptstore
from ckptstore import chunk
from ckptstore.errors import CheckpointWarning
from ckptstore.objects.memory import MemoryObjects


def state(step: int) -> dict[str, Any]:
    """Steps 1 and 2 have nothing in common; each one after 2 is a small change of step 2."""
    generator = torch.Generator().manual_seed(min(step, 2))
    weight = torch.randn(16, 8, generator=generator)
    moment = torch.randn(40, generator=generator).double()
    return {"weight": weight * (1 + step / 2**16), "moment": moment * (1 + step / 2**40), "step": step}


class DeltaStore:
    """Three checkpoints; each chunk of the third is the difference to one of the second."""

    def __init__(self) -> None:
        self.place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
        self.run = ckptstore.Store(self.place, codec="small").run("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunk, "DELTA_PAYS", 0.0)
            self.run.save(state(1), step=1)
            self.run.save(state(2), step=2)
            patch.setattr(chunk, "DELTA_PAYS", 100.0)  # chunks this small do not pay otherwise
            self.run.save(state(3), step=3)
        self.content = {row.key: self.place.get(row.key) or b"" for row in self.place.list("")}

    def keys(self, step: int, prefix: str) -> list[str]:
        refs = self.run.checkpoint(step)._manifest.chunks
        return [ref.key for ref in refs if ref.key.startswith(prefix)]

    def reset(self) -> None:
        for row in self.place.list(""):
            self.place.delete(row.key)
        for key, content in self.content.items():
            self.place.put(key, content)


@pytest.fixture(scope="module")
def whole() -> Iterator[DeltaStore]:
    store = DeltaStore()
    yield store
    MemoryFileSystem.store.clear()


@pytest.fixture
def store(whole: DeltaStore) -> DeltaStore:
    whole.reset()
    return whole


def restored(run: ckptstore.Run) -> int | None:
    """The step that `restore` takes, after a look at what it put in place; None if it raises."""
    destination = {"weight": torch.zeros(16, 8), "moment": torch.zeros(40).double()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            found = run.restore(destination)
        except ckptstore.CorruptError:
            return None
    assert found is not None
    assert torch.equal(destination["weight"], state(found.step)["weight"])
    assert torch.equal(destination["moment"], state(found.step)["moment"])
    return found.step


def test_the_third_checkpoint_stands_on_the_second(store: DeltaStore) -> None:
    assert len(store.keys(3, "deltas/")) == 2
    assert store.keys(3, "chunks/") == store.keys(2, "chunks/")
    assert ckptstore.Store(store.place).verify().ok
    assert restored(store.run) == 3


def damage(content: bytes) -> Iterator[bytes | None]:
    yield None
    for length in range(0, len(content), 7):
        yield content[:length]
    yield content + b"\0"
    for position in range(len(content)):
        yield content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("step", "prefix", "damaged_steps", "goes_back_to"),
    [(3, "deltas/", {3}, 2), (2, "chunks/", {2, 3}, 1), (1, "chunks/", {1}, 3)],
    ids=["delta", "base", "neither"],
)
def test_damage_of_any_byte_is_seen_in_every_checkpoint_that_needs_it(
    store: DeltaStore, step: int, prefix: str, damaged_steps: set[int], goes_back_to: int
) -> None:
    key = store.keys(step, prefix)[0]
    for content in damage(store.content[key]):
        store.reset()
        if content is None:
            store.place.delete(key)
        else:
            store.place.put(key, content)
        report = ckptstore.Store(store.place).verify()
        assert {found.key for found in report.damaged} == {key}
        assert {found.step for found in report.damaged} == damaged_steps
        assert all(found.path for found in report.damaged)
        assert restored(store.run) == goes_back_to
        with pytest.raises(ckptstore.CorruptError) as caught:
            store.run.load(max(damaged_steps))
        assert caught.value.key == key


@pytest.mark.parametrize("position", [90, -1], ids=["in-a-raw-plane", "at-the-end"])
def test_a_save_that_finds_its_base_damaged_stores_in_full_and_says_so(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)
    key = store.keys(2, "chunks/")[0]
    content = bytearray(store.content[key])
    assert (content[11], content[40]) == (3, 0)  # three planes, the first of them raw: only the digest covers that
    content[position] ^= 1
    store.place.put(key, bytes(content))
    with pytest.warns(CheckpointWarning, match=rf"earlier checkpoints .* are damaged: {key}"):
        saved = store.run.save(state(4), step=4)
    refs = saved._manifest.chunks
    assert sorted(ref.base is None for ref in refs) == [False, True, True]  # one in full, one delta and its base
    assert key not in {ref.key for ref in refs}
    assert torch.equal(store.run.load(4)["weight"], state(4)["weight"])
    # It is marked, so nothing stands on it again, and no save takes it up.
    again = store.run.save(state(2), step=5)
    assert key not in {ref.key for ref in again._manifest.chunks}


def test_a_delta_whose_base_is_marked_is_not_taken_up(store: DeltaStore) -> None:
    key = store.keys(2, "chunks/")[0]
    store.place.put(key, b"nonsense")
    ckptstore.Store(store.place).verify()
    saved = store.run.save(state(3), step=3)  # in the place of what is damaged, unasked
    assert key not in {ref.key for ref in saved._manifest.chunks}
    assert restored(store.run) == 3


def test_a_delta_that_no_checkpoint_needs_is_checked_as_far_as_it_can_be(store: DeltaStore) -> None:
    store.run.delete(3)
    assert ckptstore.Store(store.place).verify().ok
    key = next(key for key in store.content if key.startswith("deltas/"))
    content = bytearray(store.content[key])
    content[30] ^= 1  # its checksum
    store.place.put(key, bytes(content))
    assert [found.key for found in ckptstore.Store(store.place).verify().damaged] == [key]


@pytest.mark.parametrize("prefix", ["chunks/", "deltas/"])
def test_a_full_chunk_and_a_delta_in_the_place_of_each_other_are_damage(store: DeltaStore, prefix: str) -> None:
    store.run.delete(3)
    other = {"chunks/": "deltas/", "deltas/": "chunks/"}[prefix]
    content = next(content for key, content in store.content.items() if key.startswith(other))
    digest = "ab" * 32
    key = f"{prefix}ab/{digest}.{'c' * 32}"
    store.place.put(key, content)
    assert [found.key for found in ckptstore.Store(store.place).verify().damaged] == [key]


def test_a_save_that_finds_a_chunk_damaged_does_not_take_it_up_for_another_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy and its frozen copy are one chunk until the policy trains: then it is base and chunk in one."""
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)
    place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
    run = ckptstore.Store(place, codec="small").run("run")
    weight = torch.randn(200, 200)
    [ref] = run.save({"policy": weight, "frozen": weight.clone()}, step=0)._manifest.chunks
    content = bytearray(place.get(ref.key) or b"")
    content[90] ^= 1
    place.put(ref.key, bytes(content))
    with pytest.warns(CheckpointWarning, match="This save does not need them"):
        saved = run.save({"policy": weight * 1.0001, "frozen": weight}, step=1)
    assert ref.key not in {each.key for each in saved._manifest.chunks}
    loaded = run.load(1)
    assert torch.equal(loaded["frozen"], weight)
    assert torch.equal(loaded["policy"], weight * 1.0001)
    assert saved.new_bytes == saved.stored_bytes


def test_a_base_that_cannot_be_read_is_no_reason_for_a_save_to_fail(
    store: DeltaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BadSector(MemoryObjects):
        def get(self, key: str) -> bytes | None:
            if key.startswith("chunks/"):
                raise ckptstore.UnavailableError("input/output error")
            return super().get(key)

    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)
    run = ckptstore.Store(BadSector(store.place.url), codec="small").run("run")
    assert all(ref.base is None for ref in run.save(state(4), step=4)._manifest.chunks)
    assert store.place.list("condemned/") == []
    assert torch.equal(store.run.load(4)["weight"], state(4)["weight"])
