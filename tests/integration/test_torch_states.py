"""Real states of torch, through a real store: a restored training goes on as the one that was saved would have."""

import copy
import inspect
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch.optim import lr_scheduler
from torchdata.stateful_dataloader import StatefulDataLoader

import ckptstore
from tests.strategies import assert_same

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ConstantLR": {},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "LinearLR": {},
    "MultiStepLR": {"milestones": [2, 4]},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20, "cycle_momentum": False},
    "PolynomialLR": {},
    "ReduceLROnPlateau": {},
    "StepLR": {"step_size": 2},
}


@pytest.fixture
def run() -> ckptstore.Run:
    return ckptstore.Store(f"memory://{uuid.uuid4().hex}").run("run")


def new_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "SparseAdam":
        return torch.nn.Embedding(20, 16, sparse=True)
    bias = name not in ("Muon",)  # Muon takes matrices only
    return torch.nn.Sequential(torch.nn.Linear(16, 130, bias=bias), torch.nn.Linear(130, 16, bias=bias))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        if isinstance(model, torch.nn.Embedding):
            batch = torch.randint(0, 20, (8,), generator=generator)
        else:
            batch = torch.randn(8, 16, generator=generator)

        def closure(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(batch).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_the_same_with_every_optimizer(run: ckptstore.Run, name: str) -> None:
    kind: Any = getattr(torch.optim, name)
    model = new_model(name)
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    run.save({"model": model, "optimizer": optimizer}, step=3)
    train(model, optimizer, range(3, 6))

    restored = new_model(name)
    fresh = kind(restored.parameters(), lr=0.5)
    run.restore({"model": restored, "optimizer": fresh})
    train(restored, fresh, range(3, 6))
    assert_same(restored.state_dict(), model.state_dict())
    assert_same(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_learning_rates_go_on_the_same_with_every_scheduler(run: ckptstore.Run, name: str) -> None:
    def begin() -> tuple[torch.optim.SGD, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        return optimizer, getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])

    def go_on(optimizer: torch.optim.SGD, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return rates

    optimizer, scheduler = begin()
    go_on(optimizer, scheduler, 3)
    run.save({"optimizer": optimizer, "scheduler": scheduler}, step=3)
    rates = go_on(optimizer, scheduler, 5)
    other, fresh = begin()
    run.restore({"optimizer": other, "scheduler": fresh})
    assert go_on(other, fresh, 5) == rates


def test_grad_scaler_ema_and_batch_norm(run: ckptstore.Run) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    averaging = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaging)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model(torch.randn(6, 4))
    ema.update_parameters(model)
    run.save({"model": model, "ema": ema, "scaler": scaler}, step=1)
    expected = copy.deepcopy((model.state_dict(), ema.state_dict(), scaler.state_dict()))

    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    fresh_ema = torch.optim.swa_utils.AveragedModel(fresh)
    fresh_scaler = torch.amp.GradScaler("cpu")
    run.restore({"model": fresh, "ema": fresh_ema, "scaler": fresh_scaler})
    assert_same((fresh.state_dict(), fresh_ema.state_dict(), fresh_scaler.state_dict()), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:torchdata")  # of torchdata, about torch.set_vital
def test_a_data_loader_goes_on_where_it_was(run: ckptstore.Run) -> None:
    def begin() -> Any:
        torch.manual_seed(5)
        return StatefulDataLoader(range(40), batch_size=4, shuffle=True)

    loader = begin()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    run.save({"loader": loader}, step=3)
    rest = [batch.tolist() for batch in batches]
    fresh = begin()
    run.restore({"loader": fresh})
    assert [batch.tolist() for batch in fresh] == rest


def test_generators_go_on_the_same(run: ckptstore.Run) -> None:
    import random

    import numpy as np

    own, numpys = torch.Generator().manual_seed(3), np.random.default_rng(4)

    def draw() -> list[float]:
        gauss = [random.gauss(0, 1), float(np.random.standard_normal())]
        return [
            random.random(),
            *gauss,
            float(np.random.rand()),
            float(torch.rand(1)),
            float(torch.rand(1, generator=own)),
            float(numpys.random()),
        ]

    draw()
    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    run.save({"rng": ckptstore.RngState(own=own, numpys=numpys)}, step=1)
    drawn = draw()
    own.manual_seed(99)
    draw()
    run.restore({"rng": ckptstore.RngState(own=own, numpys=numpys)})
    assert draw() == drawn


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_is_saved_through_its_module_or_as_it_is(run: ckptstore.Run, process_group: None) -> None:
    model = torch.nn.Linear(4, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    run.save({"model": wrapped, "bare": wrapped.module}, step=1)
    fresh = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    run.restore({"model": fresh})
    assert_same(fresh.state_dict(), wrapped.state_dict())
    bare = torch.nn.Linear(4, 4)
    run.restore({"bare": bare})
    assert_same(bare.state_dict(), model.state_dict())
    with pytest.raises(ckptstore.InvalidInputError, match="DistributedDataParallel"):
        run.restore({"model": torch.nn.Linear(4, 4)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, at its own import
def test_compiled_modules(run: ckptstore.Run) -> None:
    compiled: Any = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    run.save({"model": compiled}, step=1)
    fresh: Any = torch.compile(torch.nn.Linear(4, 4), backend="eager")
    run.restore({"model": fresh})
    assert_same(fresh.state_dict(), compiled.state_dict())


def test_extra_state_hooks_and_lazy_modules(run: ckptstore.Run) -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.calls = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": self.calls}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    saved, fresh = Counting(), Counting()
    saved.calls = 7
    lazy = torch.nn.LazyLinear(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that lazy modules are under development
        filled = torch.nn.LazyLinear(3)
        filled(torch.ones(1, 5))
    run.save({"model": saved, "lazy": filled}, step=1)
    run.restore({"model": fresh, "lazy": lazy})
    assert fresh.calls == 7
    assert_same(lazy.state_dict(), filled.state_dict())


def test_a_module_that_renames_old_keys_by_a_hook_is_left_to_its_hook(run: ckptstore.Run) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new = torch.nn.Linear(2, 2)
            self.register_load_state_dict_pre_hook(self._rename)  # type: ignore[no-untyped-call]

        @staticmethod
        def _rename(module: Any, state_dict: dict[str, Any], *rest: Any) -> None:
            for key in [key for key in state_dict if key.startswith("old.")]:
                state_dict["new." + key.removeprefix("old.")] = state_dict.pop(key)

    old = torch.nn.Module()
    old.old = torch.nn.Linear(2, 2)
    run.save({"model": old}, step=1)
    fresh = Renamed()
    run.restore({"model": fresh})
    assert_same(fresh.new.state_dict()["weight"], old.old.state_dict()["weight"])


def test_half_precision_and_channels_last(run: ckptstore.Run) -> None:
    model = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last).bfloat16()  # type: ignore[call-overload]
    run.save({"model": model}, step=1)
    fresh = torch.nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last).bfloat16()  # type: ignore[call-overload]
    run.restore({"model": fresh})
    assert_same(fresh.state_dict(), model.state_dict())
    assert fresh.weight.is_contiguous(memory_format=torch.channels_last)
    loaded = run.load(only="model.weight")
    assert loaded.is_contiguous(memory_format=torch.channels_last)
    plain = torch.nn.Conv2d(8, 16, 3).bfloat16()
    run.restore({"model": plain})
    assert torch.equal(plain.weight, model.weight)
