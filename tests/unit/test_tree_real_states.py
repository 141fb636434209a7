"""What people really save goes through the tree and comes back the same: every optimizer, scheduler, … of torch."""

import copy
import inspect
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.strategies import assert_same, through_json

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ChainedScheduler": {},
    "ConstantLR": {},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "LinearLR": {},
    "MultiStepLR": {"milestones": [2, 2, 5]},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9, "cycle_momentum": False},
    "PolynomialLR": {},
    "ReduceLROnPlateau": {},
    "SequentialLR": {"milestones": [2]},
    "StepLR": {"step_size": 2},
}


def stepped(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    def loss() -> float:
        optimizer.zero_grad()
        value = model(torch.ones(3, 4)).square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)


def assert_comes_back(stateful: Any) -> None:
    state = stateful.state_dict()
    expected = copy.deepcopy(state)
    found = through_json({"it": stateful})["it"]
    assert_same(found, expected)
    stateful.load_state_dict(found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_back_before_and_after_its_first_steps(name: str) -> None:
    if name == "SparseAdam":
        model: torch.nn.Module = torch.nn.Embedding(4, 4, sparse=True)
    else:
        model = torch.nn.Linear(4, 4, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    assert_comes_back(optimizer)
    for _ in range(2):
        if name == "SparseAdam":
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
        else:
            stepped(optimizer, model)
    assert_comes_back(optimizer)


def test_every_scheduler_of_torch_is_tried() -> None:
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_comes_back(name: str) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = dict(SCHEDULERS[name])
    if name in ("ChainedScheduler", "SequentialLR"):
        options["schedulers"] = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [1, 3])]
    scheduler = (
        getattr(lr_scheduler, name)(**options)
        if name == "ChainedScheduler"
        else getattr(lr_scheduler, name)(optimizer, **options)
    )
    assert_comes_back(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls a deprecated form of step
        for _ in range(3):
            stepped(optimizer, model)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert_comes_back(scheduler)


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 3, "names": ("a", "b")}

    def set_extra_state(self, state: Any) -> None:
        assert state == self.get_extra_state()


def modules() -> Iterator[torch.nn.Module]:
    yield torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LSTM(2, 3, 2))
    yield WithExtraState(2, 2)
    yield torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2), use_buffers=True)
    yield torch.nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False)
    yield torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
    yield torch.nn.MultiheadAttention(4, 2)
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    yield tied


@pytest.mark.parametrize("module", list(modules()), ids=lambda module: type(module).__name__)
def test_a_module_comes_back(module: torch.nn.Module) -> None:
    assert_comes_back(module)


def test_a_grad_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert_comes_back(scaler)
    assert_comes_back(torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torch's own DataLoader calls it
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_comes_back_in_the_middle_of_an_epoch(workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True, num_workers=workers)

    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = through_json(first.state_dict())
    assert_same(state, first.state_dict())
    rest = [batch.tolist() for batch in batches]
    second = loader()
    second.load_state_dict(state)
    assert [batch.tolist() for batch in second] == rest


def test_generators_states_come_back() -> None:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "numpy generator": np.random.default_rng(1).bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    found = through_json(state)
    assert_same(found, state)
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    np.random.default_rng().bit_generator.state = found["numpy generator"]
    torch.set_rng_state(found["torch"])
