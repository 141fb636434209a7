"""One process, or many that train one model together: torchrun starts them, each reads its own rows of the text.

Whatever their number, they see the same batches, so a run may go on with more or with fewer of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

import ckptstore
from trainer.config import ConfigError, Options
from trainer.model import LanguageModel, State

TIMEOUT = timedelta(minutes=10)
"""Longer than a save or a validation takes: so long processes wait for one that does not answer."""


class Team:
    """The processes of this training, and what each of them has of it."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.group = dist.group.WORLD if size > 1 else None
        # One of their own, as saves in the background talk while the training does.
        self._saving: Any = dist.new_group(backend="gloo") if size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """The rows of a batch that are this process's."""
        return batch.chunk(self.size)[self.rank]

    def wrapped(self, model: LanguageModel) -> nn.Module:
        """The model to train with, whose gradients are the means over all processes; draws random numbers."""
        if self.size == 1:
            return model
        replica = nn.parallel.DistributedDataParallel(model)
        # After its first pass DDP puts its buckets in the order in which gradients came. If that first pass were a step
        # of the training, one that was resumed would add gradients up in another order than one that was not.
        logits, _ = replica(torch.zeros((1, 1), dtype=torch.int64, device=self.device), model.initial_state(1))
        logits.sum().backward()
        model.zero_grad()
        return replica

    def mean(self, loss: Tensor) -> float:
        if self.size == 1:
            return loss.item()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / self.size

    def first_decides(self, is_so: bool) -> bool:
        """What the first process says, such as of its clock."""
        if self.size == 1:
            return is_so
        told = torch.tensor(int(is_so))
        dist.broadcast(told, 0)
        return bool(told)

    def seed(self, seed: int) -> None:
        """Let each process draw other numbers, from here on."""
        if self.size > 1:
            torch.manual_seed(seed * 1_000_003 + self.rank)

    def restore_hidden(self, run: ckptstore.Run, step: int) -> State:
        """What the LSTM remembers, this process's rows of it, however many processes have saved them."""
        hidden, cell = (part.chunk(self.size, 1)[self.rank] for part in run.load(step, only="hidden"))
        return hidden.contiguous().to(self.device), cell.contiguous().to(self.device)

    def restore_rng(self, run: ckptstore.Run, step: int, saved_by: int, seed: int) -> list[str]:
        """Set this process's generators; returns notes."""
        if saved_by == self.size:
            ckptstore.RngState().load_state_dict(run.load(step, only=f"rngs.{self.rank}"))
            return []
        self.seed(seed + step)
        return [f"it was saved by {saved_by} process(es), now {self.size}: the last bits will differ"]

    def save(self, run: ckptstore.Run, options: Options, state: dict[str, Any], **about: Any) -> "JointSave":
        """Begin to save, all processes together: each of them stores its own rows, and its share of what all have."""
        from ckptstore.integrations.dcp import CkptstoreWriter

        mesh = init_device_mesh(self.device.type, (self.size,))
        shared = {
            **state,
            "model": state["model"].state_dict(),
            "optimizer": state["optimizer"].state_dict(),
            "hidden": [DTensor.from_local(part, mesh, [Shard(1)]) for part in state["hidden"]],
            "rng": state["rng"].state_dict(),  # the first one's, for one process that goes on alone
            "rngs": {str(self.rank): state["rng"].state_dict()},
        }
        writer = CkptstoreWriter(options.store, run=run.name, storage_options=options.storage_options, **about)
        if options.save_async:
            return JointSave(writer, async_save(shared, storage_writer=writer, process_group=self._saving))
        save(shared, storage_writer=writer, process_group=self._saving)
        return JointSave(writer, None)


class JointSave:
    """A save of all processes, done or in the background."""

    def __init__(self, writer: Any, future: Any) -> None:
        self._writer = writer
        self._future = future

    def done(self) -> bool:
        return self._future is None or bool(self._future.done())

    def result(self) -> ckptstore.Checkpoint | None:
        """Wait for it; the checkpoint, in the process that committed it. Raises why it failed."""
        if self._future is not None:
            self._future.result()
        saved: ckptstore.Checkpoint | None = self._writer.checkpoint
        return saved


@contextmanager
def joined(options: Options, device: torch.device) -> Iterator[Team]:
    """The team that torchrun has started this process for; one alone without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team(0, 1, device)
        return
    if options.batch_size % size:
        raise ConfigError(f"--batch-size {options.batch_size} cannot be split over {size} processes: take a multiple.")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # After a restart torchrun (torch 2.13) hands out the store of the first attempt again, and in it the addresses of
    # processes that are dead: each attempt gets a corner of its own.
    store, rank, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Team(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
