"""verify on manifests that somebody crafted: what it costs, what it holds in memory, and what it is not fooled by."""

import tracemalloc
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore import chunk, verifying
from ckptstore.errors import MissingChunkError
from ckptstore.format import ManifestKey
from ckptstore.manifest import ChunkRef, Manifest, Marker, Segment, TensorPaths, Writer, decode_manifest, encode
from ckptstore.objects.memory import MemoryObjects
from ckptstore.skeleton import TensorNode
from ckptstore.testing import RecordingObjects
from ckptstore.verifying import Damage, verify

SAVES = [32 * digit for digit in "abc"]
TIME = "2026-11-25T01:02:03Z"


@pytest.fixture
def objects() -> Iterator[MemoryObjects]:
    place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
    place.put("ckptstore.json", encode(Marker(store=SAVES[0], created=TIME, chunk_bytes=2**20, small_bytes=0)))
    yield place
    MemoryFileSystem.store.clear()


def manifest(tree: Any, segments: list[Segment], chunks: list[ChunkRef], step: int = 1) -> Manifest:
    return Manifest(
        format=2 if any(ref.base is not None for ref in chunks) else 1,
        run="run",
        step=step,
        save=SAVES[0],
        created=TIME,
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={},
        metadata={},
        content=64 * "0",
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=tree,
        segments=segments,
        chunks=chunks,
    )


def put(objects: MemoryObjects, value: Manifest) -> Manifest:
    objects.put(str(value.key), encode(value))
    return value


def tensor(segment: int, length: int = 1) -> dict[str, Any]:
    return {"$": "tensor", "dtype": "uint8", "shape": [length], "segment": segment}


def missing(count: int) -> list[ChunkRef]:
    return [ChunkRef(digest=f"{number:064x}", save=SAVES[0], raw=1, stored=57) for number in range(count)]


def separate(count: int) -> Manifest:
    """As many tensors as chunks, none of which is there."""
    segments = [Segment(bytes=1, element=1, chunks=[number]) for number in range(count)]
    return manifest([tensor(number) for number in range(count)], segments, missing(count))


def stored_chain(objects: MemoryObjects, length: int, raw_bytes: int) -> list[ChunkRef]:
    """A full chunk, and deltas one on another, as a table in which each stands on the one before it."""
    refs: list[ChunkRef] = []
    base: chunk.Base | None = None
    for number in range(length):
        raw = np.random.default_rng(number).integers(0, 256, raw_bytes, np.uint8)
        if base is None:
            content, is_delta = chunk.encode(raw, 1).tobytes(), False
        else:
            encoded, is_delta = chunk.encode_over(raw, 1, base)
            content = encoded.tobytes()
        assert is_delta == (base is not None)
        refs.append(
            ChunkRef(
                digest=chunk.digest(raw),
                save=SAVES[0],
                raw=raw_bytes,
                stored=len(content),
                base=number - 1 if number else None,
            )
        )
        objects.put(refs[-1].key, content)
        base = chunk.Base(refs[-1].digest, raw)
    return refs


@pytest.fixture
def deltas_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "DELTA_PAYS", 100.0)


# ---- what it costs


def test_each_description_is_read_as_often_however_many_chunks_are_missing(
    objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    original = TensorNode.from_json

    def counted(node: dict[str, Any], path: str, segment_bytes: Any) -> TensorNode:
        calls[path] += 1
        return original(node, path, segment_bytes)

    monkeypatch.setattr(TensorNode, "from_json", counted)
    put(objects, separate(50))
    report = verify(objects)
    assert [damage.path for damage in report.damaged] == [f"[{number}]" for number in range(50)]
    # Once to check the tree, and once to find who needs the missing chunks.
    assert set(calls.values()) == {2}


def test_what_many_tensors_share_in_many_chunks_is_not_told_of_once_for_each_pair(objects: MemoryObjects) -> None:
    count = 200
    segments = [Segment(bytes=count, element=1, chunks=list(range(count)))]
    put(objects, manifest([tensor(0, count)] * count, segments, missing(count)))
    damaged = verify(objects).damaged
    assert len(damaged) == TensorPaths.MAX_TOLD * count + (count - TensorPaths.MAX_TOLD)
    assert len({damage.key for damage in damaged}) == count
    assert {damage.path for damage in damaged} == {f"[{number}]" for number in range(count)}


def test_a_long_key_over_many_tensors_costs_no_more_than_its_length(objects: MemoryObjects) -> None:
    value = separate(300)
    long = "k" * 100_000
    put(objects, manifest({long: value.tree}, value.segments, value.chunks))
    verify(objects)
    tracemalloc.start()
    report = verify(objects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({damage.path for damage in report.damaged}) == 300
    assert peak < 50 * len(long)


# ---- what it holds


def test_a_chain_of_many_deltas_is_decoded_in_the_memory_of_a_few_chunks(
    objects: MemoryObjects, deltas_always_pay: None
) -> None:
    raw_bytes = 2**20
    refs = stored_chain(objects, 20, raw_bytes)
    # Only the top of the chain is of a tensor; all of it is verified.
    put(objects, manifest(tensor(0, raw_bytes), [Segment(bytes=raw_bytes, element=1, chunks=[19])], refs))
    wanted = verifying._wanted_chunks([decode_whole(objects)], {}, verifying.VerifyReport())
    [top] = [each for each in wanted if each.key.digest == refs[-1].digest]
    tracemalloc.start()
    verifying._check_chunk(objects, top)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # MemoryObjects hands out a copy of each object.
    assert 2 * raw_bytes < peak < top.held_bytes + raw_bytes // 2
    assert top.held_bytes < 5 * raw_bytes


def test_what_checking_a_full_chunk_holds_is_counted_with_its_planes(objects: MemoryObjects) -> None:
    raw_bytes = 2**20
    raw = np.arange(raw_bytes // 8, dtype=np.uint64).view(np.uint8)
    content = chunk.encode(raw, 8).tobytes()
    ref = ChunkRef(digest=chunk.digest(raw), save=SAVES[0], raw=raw_bytes, stored=len(content))
    objects.put(ref.key, content)
    put(objects, manifest(tensor(0, raw_bytes), [Segment(bytes=raw_bytes, element=8, chunks=[0])], [ref]))
    [wanted] = verifying._wanted_chunks([decode_whole(objects)], {}, verifying.VerifyReport())
    tracemalloc.start()
    verifying._check_chunk(objects, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1.5 * raw_bytes < peak < wanted.held_bytes + raw_bytes // 2


def decode_whole(objects: MemoryObjects) -> Manifest:
    key = ManifestKey("run", 1, SAVES[0])
    found = decode_manifest(objects.get(str(key)) or b"", key)
    assert isinstance(found, Manifest)
    return found


# ---- what it is not fooled by


def test_a_checkpoint_that_names_another_base_for_a_delta_is_damaged_and_the_other_is_not(
    objects: MemoryObjects, deltas_always_pay: None
) -> None:
    refs = stored_chain(objects, 2, 64)
    raw = np.arange(64, dtype=np.uint8)
    content = chunk.encode(raw, 1).tobytes()
    other = ChunkRef(digest=chunk.digest(raw), save=SAVES[1], raw=64, stored=len(content))
    objects.put(other.key, content)
    segments = [Segment(bytes=64, element=1, chunks=[1])]
    put(objects, manifest({"w": tensor(0, 64)}, segments, refs, step=1))
    put(objects, manifest({"w": tensor(0, 64)}, segments, [other, refs[1]], step=2))
    report = verify(objects)
    [damage] = report.damaged
    assert (damage.step, damage.path, damage.key) == (2, "w", refs[1].key)
    assert damage.reason.startswith("its base is ")
    # The object is what the other checkpoint needs, so it is not marked as corrupt.
    assert not objects.list("condemned/")


def test_a_damaged_chunk_that_is_listed_for_no_tensor_is_told_of(objects: MemoryObjects) -> None:
    [ref] = missing(1)
    put(objects, manifest(None, [], [ref]))
    assert verify(objects).damaged == [Damage(None, None, None, ref.key, str(missing_error()))]


def missing_error() -> MissingChunkError:
    return MissingChunkError("it is not in the store (deleted by hand, by a life-cycle rule, or by a collection)")


# ---- what a quick one looks at


def stored(objects: MemoryObjects, number: int) -> ChunkRef:
    """A chunk that is in the store, as it is."""
    raw = np.full(64, number, np.uint8)
    content = chunk.encode(raw, 1).tobytes()
    ref = ChunkRef(digest=chunk.digest(raw), save=SAVES[0], raw=64, stored=len(content))
    objects.put(ref.key, content)
    return ref


def naming(*refs: ChunkRef, step: int = 1) -> Manifest:
    """A checkpoint with a tensor in each of these chunks."""
    tree = {f"t{number}": tensor(number, ref.raw) for number, ref in enumerate(refs)}
    segments = [Segment(bytes=ref.raw, element=1, chunks=[number]) for number, ref in enumerate(refs)]
    return manifest(tree, segments, list(refs), step)


def quick(objects: MemoryObjects, run: str | None = None) -> tuple[verifying.VerifyReport, list[str]]:
    """The report, and the keys of the chunks that were read for it."""
    recording = RecordingObjects(objects)
    report = verify(recording, run, quick=True)
    return report, sorted(key for key in recording.keys("get") if key.startswith(("chunks/", "deltas/")))


def test_a_quick_one_counts_every_chunk_that_a_checkpoint_needs_and_reads_none(
    objects: MemoryObjects, deltas_always_pay: None
) -> None:
    refs = [stored(objects, 1), stored(objects, 2)]
    put(objects, naming(*refs))
    put(objects, naming(refs[0], step=2))
    put(objects, naming(*stored_chain(objects, 2, 64), step=3))
    stored(objects, 3)  # which no checkpoint names
    report, read = quick(objects)
    assert (report.checkpoints, report.chunks, report.bytes) == (3, 4, 0)
    assert report.ok and not read


def test_a_quick_one_of_a_run_counts_only_what_the_run_needs(objects: MemoryObjects) -> None:
    put(objects, naming(stored(objects, 1)))
    stored(objects, 2)
    objects.put("chunks/somebodys-file", b"x")
    report, _ = quick(objects, "run")
    assert (report.chunks, report.unknown) == (1, [])
    assert quick(objects)[0].unknown == ["chunks/somebodys-file"]


def test_a_quick_one_finds_a_missing_chunk_in_each_checkpoint_that_needs_it(objects: MemoryObjects) -> None:
    refs = [stored(objects, number) for number in range(3)]
    put(objects, naming(*refs, step=1))
    put(objects, naming(refs[1], step=2))
    put(objects, naming(refs[2], step=3))
    objects.delete(refs[1].key)
    report, read = quick(objects)
    assert [(each.step, each.path, each.key) for each in report.damaged] == [
        (1, "t1", refs[1].key),
        (2, "t0", refs[1].key),
    ]
    assert report.chunks == 3
    assert read == [refs[1].key]


def test_a_quick_one_tells_a_full_chunk_from_a_delta_of_its_name(
    objects: MemoryObjects, deltas_always_pay: None
) -> None:
    base, delta = stored_chain(objects, 2, 64)
    full = ChunkRef(digest=delta.digest, save=delta.save, raw=64, stored=delta.stored)
    put(objects, naming(base, delta))
    put(objects, naming(full, step=2))  # which is not there
    report, read = quick(objects)
    assert [(each.step, each.key) for each in report.damaged] == [(2, full.key)]
    assert read == [full.key]
    assert report.chunks == 3


def test_a_quick_one_reads_a_chunk_that_is_of_another_length(objects: MemoryObjects) -> None:
    refs = [stored(objects, number) for number in range(2)]
    put(objects, naming(*refs))
    objects.put(refs[0].key, (objects.get(refs[0].key) or b"")[:-1])
    report, read = quick(objects)
    assert [(each.path, each.key) for each in report.damaged] == [("t0", refs[0].key)]
    assert read == [refs[0].key]


@pytest.mark.parametrize("first", [1, 2])
def test_a_quick_one_is_not_fooled_by_one_of_two_checkpoints_that_lies_about_a_length(
    objects: MemoryObjects, first: int
) -> None:
    ref = stored(objects, 1)
    lie = ChunkRef(digest=ref.digest, save=ref.save, raw=ref.raw, stored=ref.stored + 1)
    put(objects, naming(ref, step=first))
    put(objects, naming(lie, step=3 - first))
    report, read = quick(objects)
    assert read == [ref.key]
    assert report.chunks == 2  # as two are described
    assert [each.key for each in report.damaged] == [each.key for each in verify(objects).damaged]


def test_a_quick_one_holds_no_manifests_of_sound_checkpoints(
    objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "DOCUMENTS_AT_A_TIME", 4)
    shared = missing(1000)
    for ref in shared:
        objects.put(ref.key, bytes(ref.stored))

    def peak(checkpoints: int) -> int:
        for step in range(checkpoints):
            put(objects, manifest(None, [], shared, step))
        tracemalloc.start()
        assert verify(objects, quick=True).ok
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(8)
    # A ref takes some 300 bytes, and its number four.
    assert peak(16) - few < 8 * 1000 * 50
