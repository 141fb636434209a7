"""What a prune says that it frees, and what it takes from manifests without holding them."""

import tracemalloc
import uuid
from collections.abc import Callable, Iterator

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckptstore import Store, catalog
from ckptstore.cli import listing
from ckptstore.cli.target import Target
from ckptstore.condemning import condemn_keys
from ckptstore.manifest import ChunkRef, Manifest, Marker, Writer, encode
from ckptstore.objects.memory import MemoryObjects

TIME = "2026-11-25T01:02:03Z"


@pytest.fixture
def objects() -> Iterator[MemoryObjects]:
    place = MemoryObjects(f"memory://{uuid.uuid4().hex}")
    place.put("ckptstore.json", encode(Marker(store=32 * "0", created=TIME, chunk_bytes=2**20, small_bytes=0)))
    yield place
    MemoryFileSystem.store.clear()


def ref(number: int, stored: int, base: int | None = None) -> ChunkRef:
    return ChunkRef(digest=f"{number:08x}" * 8, save=32 * "a", raw=100, stored=stored, base=base)


def put(objects: MemoryObjects, step: int, *refs: ChunkRef, run: str = "run", loss: float = 1.0) -> None:
    value = Manifest(
        format=2 if any(each.base is not None for each in refs) else 1,
        run=run,
        step=step,
        save=f"{step:032x}",
        created=TIME,
        writer=Writer(host="h", pid=1, version="0"),
        replaces=[],
        metrics={"loss": loss},
        metadata={},
        content=64 * "0",
        raw_bytes=0,
        stored_bytes=0,
        new_bytes=0,
        tree=None,
        segments=[],
        chunks=list(refs),
    )
    objects.put(str(value.key), encode(value))


def test_what_only_removed_checkpoints_name_is_freed_and_counts_once(objects: MemoryObjects) -> None:
    put(objects, 1, ref(1, 1), ref(2, 10), ref(3, 100))
    put(objects, 2, ref(2, 10), ref(3, 100), ref(4, 1000))
    put(objects, 3, ref(3, 100), ref(5, 10_000))
    report = Store(objects).prune(keep_last=1, dry_run=True)
    assert [each.step for each in report.removed] == [1, 2]
    assert report.freed_bytes == 1 + 10 + 1000


def test_what_another_run_keeps_is_not_freed(objects: MemoryObjects) -> None:
    put(objects, 1, ref(1, 1), ref(2, 10))
    put(objects, 2)
    put(objects, 7, ref(2, 10), run="other")
    assert Store(objects).prune(keep_last=1, dry_run=True).freed_bytes == 1


def test_a_delta_is_freed_though_the_full_chunk_of_its_name_stays(objects: MemoryObjects) -> None:
    put(objects, 1, ref(1, 10), ref(2, 1, base=0))
    put(objects, 2, ref(1, 10), ref(2, 100))
    assert Store(objects).prune(keep_last=1, dry_run=True).freed_bytes == 1


def test_a_checkpoint_that_needs_a_marked_chunk_stays_and_counts_for_no_rule(objects: MemoryObjects) -> None:
    put(objects, 1, ref(1, 1), loss=2.0)
    put(objects, 2, ref(2, 1), loss=1.0)
    put(objects, 3, ref(3, 1), loss=3.0)
    condemn_keys(objects, [ref(2, 1).key])
    report = Store(objects).prune(keep_best="loss", dry_run=True)
    assert [(each.step, each.reasons) for each in report.kept] == [
        (1, ("best loss (min)",)),
        (2, ("damaged",)),
        (3, ("newest",)),
    ]


@pytest.mark.parametrize(
    "look",
    [
        lambda objects: Store(objects).prune(keep_last=1, dry_run=True),
        lambda objects: Store(objects).usage(),
        lambda objects: listing._read(Target(objects)),
    ],
    ids=["prune", "du", "ls"],
)
def test_who_reads_all_manifests_holds_those_of_a_few_steps_at_a_time(
    objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch, look: Callable[[MemoryObjects], object]
) -> None:
    monkeypatch.setattr(catalog, "STEPS_AT_A_TIME", 4)
    shared = [ref(number, 1) for number in range(1000)]

    def peak(checkpoints: int) -> int:
        for step in range(checkpoints):
            put(objects, step, *shared)
        tracemalloc.start()
        look(objects)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(8)
    # A ref takes some 300 bytes, and its number four.
    assert peak(16) - few < 8 * 1000 * 50
