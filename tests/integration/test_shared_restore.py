"""Processes that restore together: each byte is read from the store once, and all of them have the same in the end."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import ckptstore
from ckptstore import peers
from ckptstore.errors import CheckpointError, UnavailableError
from ckptstore.objects.open import open_objects
from ckptstore.testing import RecordingObjects
from tests.ranks import Ranks

SIZE = 3


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    started = Ranks(SIZE)
    yield started
    started.stop()


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300), torch.nn.Linear(300, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def saved(folder: Path) -> list[str]:
    """A run with checkpoints at steps 1 and 2, with other weights; the keys of the chunks that 2 alone has."""
    model, optimizer = trained()
    run = ckptstore.Store(folder).run("run")
    run.save({"model": model, "optimizer": optimizer, "step": 1}, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    new = run.save({"model": model, "optimizer": optimizer, "step": 2}, step=2)
    old = {ref.key for ref in run.checkpoint(1)._manifest.chunks}
    return [ref.key for ref in new._manifest.chunks if ref.key not in old]


def restored(rank: int, folder: str, group: Any = None, step: int | None = None) -> dict[str, Any]:
    """What a process finds: the step, its weights in a number, the chunks that it read, and what it was told."""
    objects = RecordingObjects(open_objects(folder))
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300), torch.nn.Linear(300, 3))
    optimizer = torch.optim.Adam(model.parameters())
    found: dict[str, Any] = {"error": None, "step": None}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            checkpoint = (
                ckptstore.Store(objects)
                .run("run")
                .restore({"model": model, "optimizer": optimizer}, group=group or dist.group.WORLD, step=step)
            )
        except CheckpointError as error:
            found["error"] = [type(error).__name__, str(error)]
        else:
            found["step"] = None if checkpoint is None else checkpoint.step
    moments = [state["exp_avg"].double().sum() for state in optimizer.state.values()]
    found["sum"] = float(sum([parameter.double().sum() for parameter in model.parameters()] + moments))
    found["read"] = [call.key for call in objects.calls if call.operation == "get" and call.key.startswith("chunks/")]
    found["told"] = [str(warning.message) for warning in told]
    return found


def expected_sum(folder: Path, step: int) -> float:
    tree = ckptstore.Store(folder).run("run").load(step)
    moments = [state["exp_avg"].double().sum() for state in tree["optimizer"]["state"].values()]
    return float(sum([tensor.double().sum() for tensor in tree["model"].values()] + moments))


def chunks(folder: Path, step: int) -> list[str]:
    return sorted(ref.key for ref in ckptstore.Store(folder).run("run").checkpoint(step)._manifest.chunks)


def same_everywhere(found: list[dict[str, Any]], folder: Path, step: int) -> None:
    assert [each["error"] for each in found] == [None] * SIZE
    assert [each["step"] for each in found] == [step] * SIZE
    assert [each["sum"] for each in found] == [expected_sum(folder, step)] * SIZE


def test_each_chunk_is_read_by_one_of_the_processes_and_all_have_the_newest_checkpoint(
    group: Ranks, tmp_path: Path
) -> None:
    saved(tmp_path)
    found = group.run(restored, str(tmp_path))
    same_everywhere(found, tmp_path, 2)
    assert sorted(key for each in found for key in each["read"]) == chunks(tmp_path, 2)
    assert all(each["read"] for each in found)


def test_a_damaged_chunk_makes_all_of_them_go_back_to_the_same_older_checkpoint(group: Ranks, tmp_path: Path) -> None:
    damaged, *_ = saved(tmp_path)
    (tmp_path / damaged).write_bytes(b"damaged")
    found = group.run(restored, str(tmp_path))
    same_everywhere(found, tmp_path, 1)
    assert all("Going back to step 1" in each["told"][0] for each in found)
    assert not ckptstore.Store(tmp_path).verify().ok
    assert len(list((tmp_path / "condemned").iterdir())) >= 1


def test_a_first_start_is_one_for_all(group: Ranks, tmp_path: Path) -> None:
    found = group.run(restored, str(tmp_path / "none"))
    assert [(each["step"], each["error"]) for each in found] == [(None, None)] * SIZE


def test_a_step_that_is_not_there_is_an_error_in_all_of_them(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored, str(tmp_path), None, 7)
    assert [each["error"][0] for each in found] == ["NotFoundError"] * SIZE
    assert "it has steps 1, 2" in found[2]["error"][1]


def test_what_does_not_fit_one_of_them_is_an_error_in_all_that_names_it(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored_where_the_last_is_another_model, str(tmp_path))
    assert [each[0] for each in found] == ["InvalidInputError"] * SIZE
    assert found[0][1].startswith("process 2: ")
    assert not found[2][1].startswith("process")


def restored_where_the_last_is_another_model(rank: int, folder: str) -> list[str]:
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300 if index < 2 else 3) for index in range(3)))
    if rank == SIZE - 1:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        ckptstore.Store(folder).run("run").restore({"model": model}, group=dist.group.WORLD)
    except CheckpointError as error:
        assert all(map(torch.equal, before, model.parameters()))
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def test_processes_that_want_different_parts_read_them_for_themselves(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored_in_part, str(tmp_path))
    tree = ckptstore.Store(tmp_path).run("run").load(2)
    assert found == [float(sum(tensor.double().sum() for tensor in tree["model"].values()))] * SIZE


def restored_in_part(rank: int, folder: str) -> float:
    model, optimizer = trained()
    destination = {"model": model} if rank else {"model": model, "optimizer": optimizer}
    ckptstore.Store(folder).run("run").restore(destination, group=dist.group.WORLD)
    return float(sum(parameter.double().sum() for parameter in model.parameters()))


def test_bytes_that_change_on_their_way_are_read_again_from_the_store(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored_over_a_bad_line, str(tmp_path))
    same_everywhere(found, tmp_path, 2)
    assert sorted(found[1]["read"]) == chunks(tmp_path, 2)  # the last bit of each that came was another
    assert len(found[0]["read"]) + len(found[2]["read"]) < len(chunks(tmp_path, 2))


def restored_over_a_bad_line(rank: int, folder: str) -> dict[str, Any]:
    give: Callable[..., None] = peers.Group.give

    def spoil(self: peers.Group, memory: Any, owner: int) -> None:
        give(self, memory, owner)
        if self.rank == 1 != owner:
            memory[-1] ^= 1

    with mock.patch.object(peers.Group, "give", spoil):
        return restored(rank, folder)


def test_a_process_that_cannot_read_the_store_fails_the_restore_of_all_and_says_which_it_is(
    group: Ranks, tmp_path: Path
) -> None:
    saved(tmp_path)
    found = group.run(restored_where_one_is_cut_off, str(tmp_path))
    assert [each["error"][0] for each in found] == ["UnavailableError"] * SIZE
    assert "process 1: " in found[0]["error"][1]
    assert "cut off" in found[0]["error"][1]
    assert all("must not be used" in each["error"][1] for each in found)


def restored_where_one_is_cut_off(rank: int, folder: str) -> dict[str, Any]:
    def get(self: RecordingObjects, key: str) -> bytes | None:
        raise UnavailableError(f"cut off from {key}")

    with mock.patch.object(RecordingObjects, "get", get) if rank == 1 else contextlib.nullcontext():
        return restored(rank, folder)


def test_what_a_load_state_dict_refuses_in_one_of_them_is_an_error_in_all(group: Ranks, tmp_path: Path) -> None:
    ckptstore.Store(tmp_path).run("run").save({"counter": Counter()}, step=1)
    found = group.run(restored_where_one_refuses, str(tmp_path))
    assert [each[0] for each in found] == ["InvalidInputError"] * SIZE
    assert all("not here" in each[1] for each in found)
    assert found[0][1].startswith("process 1: ")


class Counter:
    """Something with a state."""

    refuses = False

    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise ValueError("not here")


def restored_where_one_refuses(rank: int, folder: str) -> list[str]:
    counter = Counter()
    counter.refuses = rank == 1
    try:
        ckptstore.Store(folder).run("run").restore({"counter": counter}, group=dist.group.WORLD)
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def test_one_process_in_a_group_of_its_own_restores_as_it_does_without_one(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored_by_each, str(tmp_path))
    same_everywhere(found, tmp_path, 2)
    assert all(sorted(each["read"]) == chunks(tmp_path, 2) for each in found)


def restored_by_each(rank: int, folder: str) -> dict[str, Any]:
    groups = [dist.new_group([rank]) for rank in range(SIZE)]
    return restored(rank, folder, groups[rank])


def test_a_part_of_the_processes_restores_in_a_group_of_its_own(group: Ranks, tmp_path: Path) -> None:
    saved(tmp_path)
    found = group.run(restored_by_some, str(tmp_path))
    assert [each and each["step"] for each in found] == [None, 2, 2]
    assert sorted(key for each in found if each for key in each["read"]) == chunks(tmp_path, 2)


def restored_by_some(rank: int, folder: str) -> dict[str, Any] | None:
    group = dist.new_group(list(range(1, SIZE)))
    if rank == 0:
        with pytest.raises(ckptstore.InvalidInputError, match="not in the group"):
            ckptstore.Store(folder).run("run").restore({}, group=group)
        return None
    objects = RecordingObjects(open_objects(folder))
    model, _ = trained()
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint = ckptstore.Store(objects).run("run").restore({"model": model, "optimizer": optimizer}, group=group)
    read = [call.key for call in objects.calls if call.operation == "get" and call.key.startswith("chunks/")]
    return {"step": checkpoint and checkpoint.step, "read": read}
