"""No interleaving of saves, deletes and collections loses a chunk; without any one of the guards, one does.

The whole scene has many million states, `make explore` walks it; here are parts of it that take seconds.
"""

from typing import Any
from unittest import mock

import pytest

from ckptstore.format import ManifestKey
from ckptstore.manifest import Manifest, decode_manifest
from ckptstore.protocol import Get, rewrites
from ckptstore.protocol.deletes import bury
from tests.explorer import scene
from tests.explorer.engine import ALIVE, Steps, run_alone

PARTS = {
    "ABPQG": "two saves, two deletes, one collection",
    "APGH": "one save, one delete, two collections",
    "BPGH": "one save of another run, one delete, two collections",
    "ABGH": "two saves, two collections",
}


@pytest.mark.parametrize("actors", PARTS, ids=PARTS.values())
def test_no_interleaving_loses_a_chunk_and_after_any_crash_one_collection_leaves_just_what_is_needed(
    actors: str,
) -> None:
    explored = scene.explorer(actors)
    found = explored.explore(5_000_000)
    assert found.lost is None
    assert found.complete
    assert found.states > 10_000
    for content in explored.contents:
        assert scene.leftovers(run_alone(scene.collector("last")(), content)) == []


@pytest.mark.parametrize("actors", ["ABPG", "PQGH"])
def test_a_collection_that_waits_loses_nothing_either(actors: str) -> None:
    found = scene.explorer(actors, wait=True).explore(5_000_000)
    assert found.lost is None
    assert found.complete


@pytest.mark.parametrize("guard", scene.GUARDS)
def test_without_any_one_guard_a_chunk_is_lost(guard: str) -> None:
    with scene.guard_taken_out(guard):
        lost = [scene.explorer(actors, guard).explore(1_000_000).lost for actors in ("ABPQG", "APGH")]
    assert any(lost)


def test_a_collection_takes_nothing_while_a_save_beats() -> None:
    explored = scene.explorer("AP")
    explored.explore(1_000_000)
    beating = [content for content in explored.contents if any(key.startswith("sessions/") for key, _ in content)]
    assert beating
    for content in beating:
        after = run_alone(scene.collector("last")(), content, clock=ALIVE)
        assert {key for key, _ in content} <= {key for key, _ in after}


@pytest.mark.parametrize("actors", ["RG", "RTG"])
def test_no_interleaving_of_repairs_and_collections_loses_a_checkpoint(actors: str) -> None:
    explored = scene.repair_explorer(actors)
    found = explored.explore(5_000_000)
    assert found.lost is None
    assert found.complete


def test_a_repair_that_gave_way_to_the_burial_of_what_it_replaces_would_lose_the_checkpoint() -> None:
    """A collection buries what was replaced, too; so that the old manifest is gone must not be taken for a delete."""

    def gives_way(key: ManifestKey, manifest: Manifest, *_: Any) -> Steps:
        [content] = yield Get((str(key),))
        stands = isinstance(decode_manifest(content, key), Manifest)
        yield from bury(key if stands else manifest.key, manifest.created)

    with mock.patch.object(rewrites, "_settle", gives_way):
        assert scene.repair_explorer("RG").explore(1_000_000).lost


@pytest.mark.parametrize(
    "actors",
    ["JKPG", "JKBPG"],
    ids=[
        "a joint save, a delete, a collection",
        "a joint save, another save, a delete, a collection",
    ],
)
def test_no_interleaving_of_the_processes_of_a_joint_save_with_collections_loses_a_chunk(actors: str) -> None:
    explored = scene.joint_explorer(actors)
    found = explored.explore(5_000_000)
    assert found.lost is None
    assert found.complete
    assert any(key.startswith("runs/r/00000000000000000002.") for content in explored.contents for key, _ in content)
    for content in explored.contents:
        assert scene.leftovers(run_alone(scene.collector("last")(), content)) == []


@pytest.mark.parametrize("guard", scene.JOINT_GUARDS)
def test_without_any_one_guard_of_a_rank_a_chunk_is_lost(guard: str) -> None:
    assert any(scene.joint_explorer(actors, guard).explore(2_000_000).lost for actors in ("JKPG", "JKPGH"))
