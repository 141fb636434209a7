"""What ranks do in tests of `ckptstore.integrations.dcp`. Every function is run by all ranks at the same time."""

import contextlib
import gc
import os
import signal
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckptstore
from ckptstore.errors import UnavailableError
from ckptstore.format import MARKER_KEY
from ckptstore.integrations.dcp import CkptstoreReader, CkptstoreWriter
from ckptstore.manifest import Marker, encode
from ckptstore.objects.local import LocalObjects
from ckptstore.writer import now_text

State = dict[str, Any]
RUN = "lstm"
_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of the first ranks; made once, by all ranks together."""
    if shape not in _meshes:
        _meshes[shape] = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).reshape(shape))
    return _meshes[shape]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def tensors() -> dict[str, torch.Tensor]:
    """Whole tensors: large and small, of several dtypes, sizes that no number of ranks divides."""
    return {
        "rows": numbers(130, 257),
        "columns": numbers(64, 1001),
        "grid": numbers(301, 203),
        "cube": numbers(30, 41, 37),
        "halves": numbers(517, 203, dtype=torch.bfloat16),
        "small": numbers(10, 3),
        "uneven": numbers(5, 7000),
        "few": numbers(3, 9000),
        "complex": torch.complex(numbers(90, 101), numbers(90, 101, seed=1)),
        "bytes": torch.arange(100_000, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(100, 1000),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }


def values() -> State:
    """What is no tensor."""
    return {
        "step": 300,
        "name": "lstm",
        "rate": 1e-3,
        "none": None,
        "flag": True,
        "betas": (0.9, 0.999),
        "history": [1, 2.5, "three"],
        "blob": bytes(range(256)) * 300,
        "large": 2**70,
        "nested": {"a": {"b": [{"c": 1}, {"d": torch.arange(4)}]}},
        "held": (torch.ones(2, 2), "kept in a tuple"),
    }


def placements(name: str, mesh: DeviceMesh) -> list[Placement]:
    found: dict[str, list[Placement]]
    if mesh.ndim == 2:
        found = {"grid": [Shard(0), Shard(1)], "cube": [Shard(2), Shard(1)]}
        return found.get(name, [Shard(0), Replicate()])
    found = {"columns": [Shard(1)], "grid": [Shard(1)], "cube": [Shard(1)], "scalar": [Replicate()]}
    return found.get(name, [Shard(0)])


def sharded(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    return {
        name: distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim if whole.dim() == 0 else placements(name, mesh))
        for name, whole in tensors().items()
    }


def emptied(state: State) -> State:
    """The same, with nothing in it."""
    return {
        key: emptied(value) if isinstance(value, dict) else torch.zeros_like(value)
        for key, value in state.items()
        if isinstance(value, dict | torch.Tensor)
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_holds(state: State, expected: State) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_holds(state[key], value)
        elif isinstance(value, torch.Tensor):
            found = whole(state[key])
            assert found.dtype == value.dtype, key
            assert torch.equal(found, value), key
        else:
            assert state[key] == value, key


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    return None if mesh.ndim > 1 else mesh.get_group()


Place = str | tuple[str, dict[str, Any]]
"""A store's URL, with storage options where it needs some."""


def writer(store: Place, step: int) -> CkptstoreWriter:
    url, options = store if isinstance(store, tuple) else (store, None)
    return CkptstoreWriter(url, run=RUN, step=step, storage_options=options)


def reader(store: Place, step: int | None = None) -> CkptstoreReader:
    url, options = store if isinstance(store, tuple) else (store, None)
    return CkptstoreReader(url, run=RUN, step=step, storage_options=options)


def small_chunks(root: Path) -> str:
    """A store whose chunks are shorter than shards; returns its URL."""
    objects = LocalObjects(root)
    marker = Marker(store=uuid.uuid4().hex, created=now_text(), chunk_bytes=4096, small_bytes=1024)
    objects.create(MARKER_KEY, encode(marker))
    return str(root)


# ---- scenarios


def save_all(rank: int, store: Place, step: int, *shape: int) -> tuple[int, int] | None:
    """Save every kind of thing from a mesh of ranks; the committing rank returns raw and new bytes."""
    mesh = mesh_of(*shape)
    if rank >= mesh.size():
        return None
    state = {"sharded": sharded(mesh), "replicated": tensors(), **values()}
    made = writer(store, step)
    save(state, storage_writer=made, process_group=group_of(mesh))
    done = made.checkpoint
    return None if done is None else (done.raw_bytes, done.new_bytes)


def load_all(rank: int, store: Place, step: int, *shape: int) -> None:
    """Load it into a mesh of ranks, whatever it was saved from."""
    mesh = mesh_of(*shape)
    if rank >= mesh.size():
        return
    state: State = {"sharded": emptied(sharded(mesh)), "replicated": emptied(tensors())}
    state |= dict.fromkeys(values())
    # Of containers with tensors DCP has to know the tensors; what is a value is put in their place.
    state["nested"] = {"a": {"b": [{"c": 0}, {"d": torch.zeros(4, dtype=torch.int64)}]}}
    load(state, storage_reader=reader(store, step), process_group=group_of(mesh))
    expected = values()
    held, text = state.pop("held")
    assert torch.equal(held, expected.pop("held")[0])
    assert text == "kept in a tuple"
    nested, wanted = state.pop("nested")["a"]["b"], expected.pop("nested")["a"]["b"]
    assert nested[0] == wanted[0]
    assert torch.equal(nested[1]["d"], wanted[1]["d"])
    assert_holds(state, {"sharded": tensors(), "replicated": tensors(), **expected})


def save_small(rank: int, store: Place, step: int, count: int) -> None:
    """Small tensors alone, some of them sharded."""
    mesh = mesh_of(count)
    if rank < count:
        state = {name: numbers(7, 5, seed=number) for number, name in enumerate("abc")}
        state["b"] = distribute_tensor(state["b"], mesh, [Shard(1)])
        save(state, storage_writer=writer(store, step), process_group=mesh.get_group())


def model_and_optimizer(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(129, 257), torch.nn.ReLU(), torch.nn.Linear(257, 11))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def wrapped(kind: str, mesh: DeviceMesh, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, _ = model_and_optimizer(seed)
    if kind == "fsdp":
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        optimizer.zero_grad()
        model(numbers(16, 129, seed=step)).square().mean().backward()
        optimizer.step()


def train_and_save(rank: int, store: str, kind: str, count: int, step: int) -> Any:
    mesh = mesh_of(count)
    if rank >= count:
        return None
    model, optimizer = wrapped(kind, mesh, seed=1)
    train(model, optimizer)
    state = train_state(model, optimizer)
    save(state, storage_writer=writer(store, step), process_group=mesh.get_group())
    return full_state(state)


def load_and_train(rank: int, store: str, kind: str, count: int, step: int) -> Any:
    mesh = mesh_of(count)
    if rank >= count:
        return None
    model, optimizer = wrapped(kind, mesh, seed=2)
    train(model, optimizer)  # other numbers, which the load replaces
    state = train_state(model, optimizer)
    load(state, storage_reader=reader(store, step), process_group=mesh.get_group())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = full_state(train_state(model, optimizer))
    train(model, optimizer)
    return found


def train_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def full_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    return whole(state).clone() if isinstance(state, torch.Tensor) else state


def save_with_planner(rank: int, store: str, step: int, flatten: bool) -> None:
    state = {"model": {"weight": numbers(40, 50), "bias": numbers(7)}, "step": 7, "order": [1, 2]}
    save(state, storage_writer=writer(store, step), planner=DefaultSavePlanner(flatten_state_dict=flatten))


def load_with_planner(rank: int, store: str, step: int, flatten: bool) -> None:
    state: State = {"model": {"weight": torch.zeros(40, 50), "bias": torch.zeros(7)}, "step": 0, "order": []}
    planner = DefaultLoadPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=flatten)
    load(state, storage_reader=reader(store, step), planner=planner)
    assert_holds(state, {"model": {"weight": numbers(40, 50), "bias": numbers(7)}, "step": 7, "order": [1, 2]})


def load_a_part(rank: int, store: str, step: int) -> None:
    state: State = {"sharded": {"grid": emptied(sharded(mesh_of(4)))["grid"]}}
    load(state, storage_reader=reader(store, step))
    assert torch.equal(whole(state["sharded"]["grid"]), tensors()["grid"])


def load_what_is_not_there(rank: int, store: str, step: int, allowed: bool) -> None:
    state: State = {"replicated": {"small": torch.zeros(10, 3)}, "unheard of": torch.ones(2)}
    load(state, storage_reader=reader(store, step), planner=DefaultLoadPlanner(allow_partial_load=allowed))
    assert torch.equal(state["replicated"]["small"], tensors()["small"])
    assert torch.equal(state["unheard of"], torch.ones(2))


def save_in_the_background(rank: int, store: str, step: int, in_process: bool, count: int) -> None:
    mesh = mesh_of(count)
    if rank >= count:
        return
    state: State = {"rows": sharded(mesh)["rows"], "weight": numbers(100, 200), "step": step}
    kind = AsyncCheckpointerType.PROCESS if in_process else AsyncCheckpointerType.THREAD
    saved = async_save(
        state,
        storage_writer=writer(store, step),
        async_checkpointer_type=kind,
        process_group=mesh.get_group(),
    )
    state["weight"].zero_()
    state["rows"].to_local().zero_()
    saved.result()  # type: ignore[union-attr]


def load_from_the_background(rank: int, store: str, step: int) -> None:
    state: State = {"rows": emptied(sharded(mesh_of(4)))["rows"], "weight": torch.zeros(100, 200), "step": 0}
    load(state, storage_reader=reader(store, step))
    assert_holds(state, {"rows": tensors()["rows"], "weight": numbers(100, 200), "step": step})


@contextlib.contextmanager
def failing_puts(prefix: str) -> Iterator[None]:
    put = LocalObjects.put

    def refuse(self: LocalObjects, key: str, content: Any) -> None:
        if key.startswith(prefix):
            raise UnavailableError(f"no room for {key}")
        put(self, key, content)

    with mock.patch.object(LocalObjects, "put", refuse):
        yield


def save_while_one_fails(rank: int, store: str, step: int, failing: int) -> None:
    with failing_puts("chunks/" if rank == failing else "nothing"):
        save(
            {"sharded": {name: -each for name, each in sharded(mesh_of(4)).items()}}, storage_writer=writer(store, step)
        )


def save_while_one_is_killed(rank: int, store: str, step: int) -> None:
    put = LocalObjects.put

    def put_and_die(self: LocalObjects, key: str, content: Any) -> None:
        put(self, key, content)
        if rank == 1 and key.startswith("chunks/"):
            os.kill(os.getpid(), signal.SIGKILL)

    mesh = mesh_of(2)
    with mock.patch.object(LocalObjects, "put", put_and_die):
        save({"rows": distribute_tensor(numbers(400, 300), mesh, [Shard(0)])}, storage_writer=writer(store, step))


def sessions_after_the_failure(rank: int, store: str) -> int:
    """How many sessions stand when all that the failed save has left in memory is gone."""
    gc.collect()
    for _ in range(200):
        names = list((Path(store) / "sessions").glob("*.json"))
        if not names:
            break
        time.sleep(0.05)
    return len(names)


def save_and_count(rank: int, store: str, step: int, *shape: int) -> list[str]:
    """The keys that this rank has put, in order."""
    done: list[str] = []
    put, create = LocalObjects.put, LocalObjects.create

    def counted(self: LocalObjects, key: str, content: Any) -> None:
        done.append(key)
        put(self, key, content)

    def counted_create(self: LocalObjects, key: str, content: Any) -> bool:
        done.append(key)
        return create(self, key, content)

    with mock.patch.object(LocalObjects, "put", counted), mock.patch.object(LocalObjects, "create", counted_create):
        save_all(rank, store, step, *shape)
    return done


def load_and_count(rank: int, store: str, step: int) -> list[str]:
    """The chunks that this rank reads to load its rows of a tensor."""
    read: list[str] = []
    get = LocalObjects.get

    def counted(self: LocalObjects, key: str) -> bytes | None:
        read.append(key)
        return get(self, key)

    state = {"sharded": {"rows": emptied(sharded(mesh_of(4)))["rows"]}}
    with mock.patch.object(LocalObjects, "get", counted):
        load(state, storage_reader=reader(store, step))
    assert torch.equal(whole(state["sharded"]["rows"]), tensors()["rows"])
    return [key for key in read if key.startswith("chunks/")]


def save_during_a_collection(rank: int, store: str, step: int, grace: float) -> list[int]:
    """Rank 1 collects when the chunks of all ranks are there and nothing is committed yet."""
    waiting: list[int] = []
    collecting: list[bool] = []
    sync = LocalObjects.sync

    def collect_and_sync(self: LocalObjects, keys: Any) -> None:
        sync(self, keys)
        if rank == 1 and not collecting:
            collecting.append(True)
            report = ckptstore.Store(store).collect(grace=grace)
            waiting.append(len(report.waiting))

    with mock.patch.object(LocalObjects, "sync", collect_and_sync):
        save_all(rank, store, step, 4)
    return waiting


def save_values(rank: int, store: str, step: int, odd: Any) -> None:
    save({"weight": numbers(30, 40), "odd": {"one": odd}}, storage_writer=writer(store, step))


def load_the_newest_that_only_some_see(rank: int, store: str, steps: list[int]) -> None:
    """Rank by rank another newest checkpoint."""
    made = CkptstoreReader(store, run=RUN)
    made._place.step = steps[rank]
    load({"odd": {"one": 0}}, storage_reader=made)


def save_plans_cached(rank: int, store: str, step: int, changed: bool) -> None:
    """With a planner that sends no plan where it is that of the save before."""
    state: State = {"rows": sharded(mesh_of(4))["rows"], "weight": numbers(30, 40) + step, "step": step}
    if changed:
        state["more"] = sharded(mesh_of(4))["columns"]
    save(state, storage_writer=writer(store, step), planner=DefaultSavePlanner(enable_plan_caching=True))


def load_plain(rank: int, store: str, step: int) -> None:
    """What one process has saved by `Run.save`, into shards."""
    mesh = mesh_of(4)
    model, optimizer = wrapped("fsdp", mesh, seed=2)
    weights, _ = get_state_dict(model, optimizer)
    state: State = {"model": weights, "step": 0, "noise": torch.zeros(30, 20).t()}
    load(state, storage_reader=reader(store, step))
    plain, _ = model_and_optimizer(seed=1)
    assert_holds(state, {"model": plain.state_dict(), "step": 12, "noise": numbers(20, 30)})


def save_old_shards(rank: int, store: str, step: int) -> None:
    """ShardedTensor, of pieces that make up no grid."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.shard import Shard as OldShard

    boxes = [((0, 0), (100, 150)), ((0, 150), (60, 50)), ((60, 150), (140, 50)), ((100, 0), (100, 150))]
    (row, column), (height, width) = boxes[rank]
    data = numbers(200, 200)[row : row + height, column : column + width].contiguous()
    shard = OldShard(data, ShardMetadata([row, column], [height, width], f"rank:{rank}/cpu"))
    tensor = sharded_tensor.init_from_local_shards([shard], 200, 200)
    save({"odd": tensor}, storage_writer=writer(store, step))


def load_the_newest(rank: int, store: str) -> int:
    made = reader(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ckptstore.CheckpointWarning)
        load({"sharded": {"rows": emptied(sharded(mesh_of(4)))["rows"]}}, storage_reader=made)
    return made.checkpoint.step


def save_in_two_dimensions(rank: int, store: str, step: int) -> Any:
    """FSDP2 over tensor parallelism: rows of rows, and rows of columns."""
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(126, 258), torch.nn.Linear(258, 110))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step_ in range(2):
        optimizer.zero_grad()
        model(numbers(8, 126, seed=step_)).square().mean().backward()
        optimizer.step()
    state = train_state(model, optimizer)
    save(state, storage_writer=writer(store, step))
    expected = full_state(state)
    fresh = emptied(state)
    load(fresh, storage_reader=reader(store, step))
    assert_holds(full_state(fresh), only_tensors(expected))
    return expected


def only_tensors(state: State) -> State:
    return {
        key: only_tensors(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if isinstance(value, dict | torch.Tensor)
    }


def save_to_places_of_their_own(rank: int, store: str, step: int) -> None:
    """As if a path lay on a disk of each rank's own machine."""
    save({"rows": sharded(mesh_of(4))["rows"]}, storage_writer=writer(f"{store}/{rank}", step))


def save_without_the_others(rank: int, store: str) -> str:
    """What each rank is told that saves by itself."""
    try:
        save({"x": torch.full((3,), float(rank))}, storage_writer=writer(store, 1), no_dist=True)
    except CheckpointException as error:
        return str(error.failures[0][0])
    return "saved"


def save_folder(rank: int, folder: str) -> None:
    """Let torch write a folder of its own, with tensors in shards, as before there was a store."""
    mesh = mesh_of(4)
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])
        for name, tensor in tensors().items()
    }
    save({"model": state, "step": 4}, checkpoint_id=folder)
