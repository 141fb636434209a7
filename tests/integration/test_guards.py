"""What saves, deletes, prunes and collections refuse to do where they cannot know that it is safe."""

import uuid

import pytest
import torch

import ckptstore
from ckptstore.format import ManifestKey
from ckptstore.objects.base import ObjectInfo, Objects
from ckptstore.objects.open import open_objects
from ckptstore.protocol.collects import _beats
from ckptstore.testing import FailingObjects


@pytest.fixture
def place() -> Objects:
    return open_objects(f"memory://{uuid.uuid4().hex}")


def test_a_prune_deletes_nothing_while_a_list_of_marks_cannot_be_read(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    for step in (1, 2, 3):
        run.save({"step": step}, step=step)
    place.put(f"condemned/{32 * 'a'}.json", b"no list")
    with pytest.raises(ckptstore.CorruptError, match="which chunks are good is not known"):
        ckptstore.Store(place).prune(keep_last=1)
    assert run.steps() == [1, 2, 3]


@pytest.mark.parametrize("action", ["save", "replace", "delete"])
def test_the_manifest_of_another_run_is_never_overwritten(place: Objects, action: str) -> None:
    """As on a disk that does not tell capitals from small letters, where both runs lie in one folder."""
    ckptstore.Store(place).run("Run").save({"w": torch.ones(3)}, step=5)
    [row] = place.list("runs/Run/")
    key = ManifestKey.parse(row.key)
    content = place.get(row.key)
    assert key is not None and content is not None
    there = str(ManifestKey("run", key.step, key.save_id))
    place.put(there, content)
    run = ckptstore.Store(place).run("run")
    with pytest.raises(ckptstore.ConflictError, match="another run or step"):
        if action == "delete":
            run.delete(5)
        else:
            run.save({"w": torch.zeros(3)}, step=5, replace=action == "replace")
    assert place.get(there) == content


def test_a_session_of_the_future_is_not_taken_for_one_that_lives() -> None:
    year = 365 * 86400.0
    assert not _beats(ObjectInfo("sessions/x", 1, 1000.0 + year), now=1000.0, grace=600.0)
    assert _beats(ObjectInfo("sessions/x", 1, 1000.0 + 60), now=1000.0, grace=600.0)
    assert not _beats(ObjectInfo("sessions/x", 1, 1000.0 - 601), now=1000.0, grace=600.0)


def test_a_step_that_is_saved_again_while_it_is_looked_for_is_found(place: Objects) -> None:
    run = ckptstore.Store(place).run("run")
    for step in (1, 2):
        run.save({"w": torch.full((3,), step)}, step=step)

    class Beneath(FailingObjects):
        """The newest step is replaced after it was listed, and before it is read."""

        done = False

        def get(self, key: str) -> bytes | None:
            if key.startswith("runs/") and not self.done:
                self.done = True
                ckptstore.Store(place).run("run").save({"w": torch.full((3,), 7)}, step=2, replace=True)
            return super().get(key)

    destination = {"w": torch.zeros(3, dtype=torch.int64)}
    found = ckptstore.Store(Beneath(place, fail_at=10**9)).run("run").restore(destination)
    assert found is not None and found.step == 2
    assert destination["w"].tolist() == [7, 7, 7]
