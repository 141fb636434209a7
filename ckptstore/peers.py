"""Processes that restore the same checkpoint together: what one of them decides or reads, all of them know.

Knows torch.distributed and nothing of chunks. `Alone` is one process, and does nothing; `Group` is many. Each method of
a group is called by every process of it, in the same order: one that leaves the others alone, because it was
interrupted, makes them fail after the group's own time-out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ckptstore import errors
from ckptstore.errors import CheckpointError, CorruptError, InvalidInputError, UnavailableError
from ckptstore.kernels import ByteArray

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Alone", "Group", "Peers", "peers_of"]

T = TypeVar("T")


class Alone:
    """One process that restores by itself."""

    rank = 0
    size = 1

    def first_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returns or raises in the first process, in all of them."""
        return decide()

    def agree(self, error: CheckpointError | None) -> CheckpointError | None:
        """None if all are well; else this process's own error, or one of the same kind that tells of another's."""
        return error

    def all_same(self, text: str) -> bool:
        """Whether every process gives the same text."""
        return True


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What a call in one process came to, for the others."""

    result: T | None = None
    error: tuple[str, str] | None = None
    """The name of its class, and its text."""


class Group(Alone):
    """The processes of a torch.distributed group; tensors go over it, and small values in torch's own way."""

    def __init__(self, group: "ProcessGroup") -> None:
        """Raises InvalidInputError if this process is not in the group."""
        import torch.distributed as dist

        self._dist: Any = dist
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidInputError("this process is not in the group that it is to restore with.")
        self._ranks = dist.get_process_group_ranks(group)
        self._device = _device(dist.get_backend_config(group))

    def first_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returns or raises in the first process, in all of them."""
        outcome: _Outcome[T] = _Outcome()
        if self.rank == 0:
            outcome, failure = _tried(decide)
        heard = [outcome]
        self._sent(lambda: self._dist.broadcast_object_list(heard, self._ranks[0], self._group, self._device))
        if self.rank == 0 and failure is not None:
            raise failure
        if heard[0].error is not None:
            raise _told(heard[0].error, 0)
        return heard[0].result  # type: ignore[return-value]  # T may be None

    def agree(self, error: CheckpointError | None) -> CheckpointError | None:
        """None if all are well; else this process's own error, or one of the same kind that tells of another's."""
        found: list[Any] = [None] * self.size
        self._sent(lambda: self._dist.all_gather_object(found, None if error is None else _summary(error), self._group))
        others = [_told(summary, rank) for rank, summary in enumerate(found) if summary is not None]
        # What is damaged for one counts as damaged for all, whatever else has failed: all have to do the same next.
        damaged = [other for other in others if isinstance(other, CorruptError)]
        if damaged:
            return error if isinstance(error, CorruptError) else damaged[0]
        return error or next(iter(others), None)

    def all_same(self, text: str) -> bool:
        """Whether every process gives the same text."""
        found: list[Any] = [None] * self.size
        self._sent(lambda: self._dist.all_gather_object(found, text, self._group))
        return len(set(found)) == 1

    def give(self, memory: ByteArray, owner: int) -> None:
        """Send what is in `memory` of the process `owner` to all the others, into theirs, which is as long."""
        tensor = torch.from_numpy(memory)
        there = tensor.to(self._device)
        self._sent(lambda: self._dist.broadcast(there, self._ranks[owner], self._group))
        if there is not tensor and owner != self.rank:
            tensor.copy_(there)

    def _sent(self, send: Callable[[], object]) -> None:
        try:
            send()
        except RuntimeError as error:  # DistError among them
            raise UnavailableError(
                f"the processes that restore together have lost each other: {error}. Start the job again."
            ) from error


Peers = Alone | Group


def peers_of(group: "ProcessGroup | None") -> Peers:
    """The peers that a caller means: none, or the processes of a group."""
    if group is None:
        return Alone()
    found = Group(group)
    return found if found.size > 1 else Alone()


def _device(backends: str) -> torch.device:
    """Where tensors have to be to go over a group: on the CPU wherever that is possible."""
    if "cpu:" in backends or backends in ("gloo", "mpi"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise InvalidInputError(
            f"a group of {backends} cannot send what is in memory: add gloo, as in cpu:gloo,{backends}."
        )
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _tried(decide: Callable[[], T]) -> tuple[_Outcome[T], CheckpointError | None]:
    try:
        return _Outcome(result=decide()), None
    except CheckpointError as error:
        return _Outcome(error=_summary(error)), error


def _summary(error: CheckpointError) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _told(summary: tuple[str, str], rank: int) -> CheckpointError:
    """The error of another process. It names no key: who has found the damage marks it."""
    name, text = summary
    kind = getattr(errors, name, CheckpointError)
    found: CheckpointError = kind(f"process {rank}: {text}")
    return found
