"""torch.distributed.checkpoint on a store: four ranks on gloo, sharded and replicated, saved, resharded and loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptstore
from tests import dcp_scenarios as scenarios
from tests.ranks import Ranks

RUN = scenarios.RUN


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(4)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything, saved by four ranks as step 4, by two as step 2, by a grid of 2 x 2 as step 22."""
    root = tmp_path_factory.mktemp("saved") / "store"
    for step, shape in ((4, (4,)), (2, (2,)), (22, (2, 2)), (1, (1,))):
        ranks.run(scenarios.save_all, str(root), step, *shape)
    return root


def everything() -> dict[str, Any]:
    return {"sharded": scenarios.tensors(), "replicated": scenarios.tensors(), **scenarios.values()}


@pytest.mark.parametrize("step", [4, 2, 22, 1])
def test_without_torch_distributed_it_is_an_ordinary_checkpoint(saved: Path, step: int) -> None:
    store = ckptstore.Store(saved)
    state = store.run(RUN).load(step)
    expected = everything()
    held, nested = state.pop("held"), state.pop("nested")
    assert torch.equal(held[0], expected.pop("held")[0])
    assert torch.equal(nested["a"]["b"][1]["d"], expected.pop("nested")["a"]["b"][1]["d"])
    scenarios.assert_holds(state, expected)
    assert list(state) == list(expected)


def test_everything_verifies_and_no_session_is_left(saved: Path) -> None:
    assert ckptstore.Store(saved).verify().ok
    assert list((saved / "sessions").iterdir()) == []


@pytest.mark.parametrize("step", [4, 2, 22, 1])
@pytest.mark.parametrize("shape", [(4,), (2,), (1,), (2, 2)], ids=str)
def test_what_any_number_of_ranks_has_saved_any_other_loads(
    ranks: Ranks, saved: Path, step: int, shape: tuple[int, ...]
) -> None:
    ranks.run(scenarios.load_all, str(saved), step, *shape)
