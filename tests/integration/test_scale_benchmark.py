"""The requests of what looks at a whole store are those that docs/explanation/scale.md says, to the last one."""

import math
from pathlib import Path

import pytest

from benchmarks.scale import OPERATIONS, SimulatedObjects, Size, _row, measure
from benchmarks.scale import make as make_store
from ckptstore.format import MANY_CHUNKS

SIZE = Size(chunks=2000, checkpoints=20)
LARGER = Size(chunks=20_000, checkpoints=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale")
    make_store(path, SIZE)
    return path


def requests_of(folder: Path, size: Size, operation: str) -> dict[str, int]:
    return {kind: count for kind, count in measure(folder, size, operation, 0.0).requests.items() if count}


def pages(keys: int) -> int:
    return max(1, math.ceil(keys / 1000))


RUN_PAGES = pages(SIZE.checkpoints)
CHUNK_PAGES = pages(SIZE.chunks)


def test_a_dry_run_of_a_collection_reads_each_manifest_once_and_each_page_of_chunks_once(folder: Path) -> None:
    # Lists: condemned/, the runs twice, the chunks, deltas/, one for the clock, sessions/. Gets: the marker, manifests.
    assert requests_of(folder, SIZE, "collect(dry_run=True)") == {
        "list": 1 + 2 * RUN_PAGES + CHUNK_PAGES + 1 + 1 + 1,
        "get": 1 + SIZE.checkpoints,
        "put": 1,
        "delete": 1,
    }


def test_a_collection_adds_a_handful_of_requests_and_a_delete_for_each_thousand_keys(folder: Path) -> None:
    dry = requests_of(folder, SIZE, "collect(dry_run=True)")
    lists_of_garbage = math.ceil(SIZE.garbage / 50_000)
    found = measure(folder, SIZE, "collect()", 0.0)
    assert found.requests == {
        # The trial of the backend; condemned/ and sessions/ once more; the runs a third time.
        "list": dry["list"] + 1 + 2 + RUN_PAGES,
        "get": dry["get"] + 2 + lists_of_garbage,
        "put": 1,
        "create": 2 + lists_of_garbage,
        # Of the trial, of the clock; the garbage; the lists that name it.
        "delete": 1 + 1 + math.ceil(SIZE.garbage / 1000) + math.ceil(lists_of_garbage / 1000),
    }
    assert found.deleted_keys == 1 + 1 + SIZE.garbage + lists_of_garbage


def test_a_quick_verify_reads_each_document_once_and_lists_the_chunks_once(folder: Path) -> None:
    # Lists: the runs, tags/, sessions/, condemned/, the chunks, deltas/. Gets: the marker twice, manifests.
    assert requests_of(folder, SIZE, "verify(quick=True)") == {
        "list": RUN_PAGES + 3 + CHUNK_PAGES + 1,
        "get": 2 + SIZE.checkpoints,
    }


def test_a_prune_reads_each_manifest_once_and_no_chunk(folder: Path) -> None:
    # Lists: the runs; condemned/; and of each run its manifests and its tags.
    assert requests_of(folder, SIZE, "prune(dry_run=True)") == {
        "list": RUN_PAGES + 1 + RUN_PAGES + 1,
        "get": 1 + SIZE.checkpoints,
    }


def test_ls_reads_each_manifest_once(folder: Path) -> None:
    # Lists: the runs, and condemned/ for what is marked as damaged; of a run its tags as well.
    assert requests_of(folder, SIZE, "ls STORE") == {"list": RUN_PAGES + 1, "get": 1 + SIZE.checkpoints}
    assert requests_of(folder, SIZE, "ls STORE/RUN") == {"list": RUN_PAGES + 2, "get": 1 + SIZE.checkpoints}


def test_the_newest_checkpoint_and_the_steps_of_a_run_take_the_same_in_a_store_of_any_size(folder: Path) -> None:
    assert requests_of(folder, SIZE, "run.latest()") == {"list": RUN_PAGES, "get": 2}
    assert requests_of(folder, SIZE, "run.steps()") == {"list": RUN_PAGES}


def test_many_chunks_are_listed_by_the_first_byte_of_their_digests(tmp_path: Path) -> None:
    make_store(tmp_path, LARGER)
    named = LARGER.chunks - LARGER.garbage
    assert named > MANY_CHUNKS
    # No prefix has more than a page.
    assert requests_of(tmp_path, LARGER, "verify(quick=True)")["list"] == 1 + 3 + 256 + 1
    assert requests_of(tmp_path, LARGER, "collect(dry_run=True)")["list"] == 1 + 2 + 256 + 1 + 1 + 1


def test_the_simulated_store_is_one_that_every_operation_of_the_table_is_measured_on(folder: Path) -> None:
    for operation in OPERATIONS:
        found = measure(folder, SIZE, operation, 0.0)
        assert found.billed == sum(found.requests.values()) > 0
        assert f"`{operation}`" in _row(SIZE, found)


def test_the_simulated_store_lists_what_stands_and_forgets_what_is_deleted(folder: Path) -> None:
    objects = SimulatedObjects(folder, 0.0)
    keys = [row.key for row in objects.list("chunks/")]
    assert len(set(keys)) == SIZE.chunks and keys == sorted(keys)
    assert [row.key for row in objects.list(keys[7][:20])] == [keys[7]]
    assert [row.key for row in objects.list("chunks/a")] == [key for key in keys if key.startswith("chunks/a")]
    objects.delete_many(keys[:1000])
    assert [row.key for row in objects.list("chunks/")] == keys[1000:]
    assert objects.requests["delete"] == 1
    assert objects.deleted_keys == 1000
