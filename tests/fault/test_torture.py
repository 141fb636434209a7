"""Processes killed at random moments, and many at once of which some are stopped; `make torture` does it for long."""

from pathlib import Path

import pytest

from tests.servers import S3Server
from tests.torture.jobs import Place
from tests.torture.runs import kill_again_and_again, stress


def test_nothing_is_lost_when_a_process_is_killed_again_and_again(tmp_path: Path) -> None:
    outcome = kill_again_and_again(Place(str(tmp_path / "store")), tmp_path, kills=25)
    assert outcome.wrong == []
    assert outcome.figures["saves"] > 10


def test_nothing_is_lost_when_a_process_that_saves_to_s3_is_killed_again_and_again(
    tmp_path: Path, seaweed_s3: S3Server
) -> None:
    place = Place(f"s3://{seaweed_s3.new_bucket()}/store", seaweed_s3.storage_options)
    outcome = kill_again_and_again(place, tmp_path, kills=6)
    assert outcome.wrong == []
    assert outcome.figures["saves"] > 3


def test_nothing_is_lost_when_many_save_prune_and_collect_at_once_and_some_are_stopped(tmp_path: Path) -> None:
    outcome = stress(Place(str(tmp_path / "store")), tmp_path, seconds=12)
    assert outcome.wrong == []
    assert outcome.figures["stops"] > 0
    assert outcome.figures["prunes"] > 0


@pytest.mark.parametrize("broken", ["verify sees damage", "a save is gone", "garbage is left"])
def test_a_torture_would_see_a_loss(tmp_path: Path, broken: str) -> None:
    place = Place(str(tmp_path / "store"))
    calm = kill_again_and_again(place, tmp_path, kills=3)
    assert calm.wrong == []
    chunks = sorted((tmp_path / "store" / "chunks").rglob("*.*"))
    if broken == "verify sees damage":
        chunks[0].write_bytes(b"")
    elif broken == "a save is gone":
        for manifest in (tmp_path / "store" / "runs").rglob("*.json"):
            manifest.unlink()
    else:
        # Of a save whose session beats, so that no collection may take it.
        (tmp_path / "store" / "sessions").mkdir(exist_ok=True)
        (tmp_path / "store" / "sessions" / "something").write_bytes(b"")
    assert kill_again_and_again(place, tmp_path, kills=1).wrong != []
