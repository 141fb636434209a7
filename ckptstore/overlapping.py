"""Copies of what optimizers hold, made while the training goes on, until one of them is about to change it.

Between two steps of its optimizer nothing changes a parameter or a moment: forward and backward passes only read them.
So a copy may be made beside them, if the next step waits for its end. CheckFreq (Mohan, Phanishayee and Chidambaram,
FAST 2021) pipelines its snapshots with the training in this way.
"""

import bisect
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ckptstore.errors import CheckpointError, InvalidInputError
from ckptstore.segments import Move, Source, fills_its_span, move, span_bytes

__all__ = ["Overlap"]


class Overlap:
    """One copy of a state beside the training: what of it may be made later, and who waits for it."""

    def __init__(self, optimizers: "Optimizer | Sequence[Optimizer]") -> None:
        """Look at what they hold now.

        Raises InvalidInputError for what is no optimizer whose steps can be waited before.
        """
        self._optimizers = _checked(optimizers)
        held = [tensor for each in self._optimizers for tensor in _host_tensors(each)]
        # In one list, which a thread may put another in the place of while a step looks at it.
        self._held = [(tensor, tensor._version) for tensor in held]
        self._spans = _joined(held)
        self._process = os.getpid()
        self._is_copying = self._was_changed = False
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def covers(self, source: Source) -> bool:
        """Whether all of its bytes belong to the optimizers."""
        if source.private or not isinstance(source.flat, np.ndarray):
            return False
        start = source.flat.ctypes.data
        number = bisect.bisect_right(self._spans, (start, 2**64)) - 1
        return number >= 0 and start + source.bytes <= self._spans[number][1]

    def begin(self) -> None:
        """From now on steps of the optimizers wait for `end`."""
        for optimizer in self._optimizers:
            _gate_of(optimizer).wait_for(self)

    def copy(self, moves: Sequence[Move], *, threads: int) -> None:
        """Copy what was left for later, see whether it is still what it was, and let the optimizers go on.

        Raises InvalidInputError if something has written to what they hold, as far as PyTorch counts it, and
        CheckpointError if it was given up before; `end` is for the caller to call, whatever comes.
        """
        with self._lock:
            if self._ended.is_set():
                raise CheckpointError("save_async was interrupted before this had copied the state: save again.")
            self._is_copying = True
        move(moves, threads=threads)
        self.require_unchanged()
        self._ended.set()

    def give_up(self) -> None:
        """Let them go on, unless a thread that was started all the same is copying: it will.

        An interrupt may come when the thread runs and its caller has not heard of it yet. Were the optimizers let go on
        then, they would write beside the copy, and nobody would look whether they have.
        """
        with self._lock:
            if not self._is_copying:
                self.end()

    def end(self) -> None:
        """Let them go on. May be called again."""
        self._optimizers, self._held = [], []  # not to keep them alive
        self._ended.set()

    def wait(self) -> None:
        """Return when it has ended; at once in a process that was forked meanwhile, where nobody copies."""
        if os.getpid() == self._process:
            self._ended.wait()

    def has_ended(self) -> bool:
        """Whether nobody need wait for it any more."""
        return self._ended.is_set()

    def let_pass(self) -> None:
        """Wait, and look a last time: from now on the optimizers may change what they hold."""
        if os.getpid() != self._process:
            return  # forked meanwhile: nobody copies here, and nobody may be there to release the lock
        self.wait()
        with self._lock:
            self._was_changed = self._was_changed or self._is_changed()
            self.end()

    def require_unchanged(self) -> None:
        """Raise InvalidInputError if something has written to what the optimizers hold before they did.

        PyTorch counts a write when it has been done, so one that was under way when the copy ended shows only later:
        to be asked again before the commit.
        """
        with self._lock:
            was_changed = self._was_changed or self._is_changed()
        if was_changed:
            raise InvalidInputError(
                "the state changed while it was copied, so nothing was committed: something else than step() of the "
                "optimizers given as `overlap` writes to their parameters or state. Leave `overlap` out; then all is "
                "copied before run.save_async(…) returns."
            )

    def _is_changed(self) -> bool:
        return any(tensor._version != version for tensor, version in self._held)


class _Gate:
    """Run before each step of one optimizer; stays with it, as PyTorch may be going through its hooks at any time."""

    def __init__(self) -> None:
        # Changed by single calls alone, as threads and signal handlers may save in the midst of one another.
        self._overlaps: set[Overlap] = set()

    def wait_for(self, overlap: Overlap) -> None:
        self._overlaps.difference_update([each for each in tuple(self._overlaps) if each.has_ended()])
        self._overlaps.add(overlap)

    def __call__(self, *_: Any) -> None:
        for overlap in tuple(self._overlaps):
            overlap.let_pass()
            self._overlaps.discard(overlap)


def _gate_of(optimizer: Optimizer) -> _Gate:
    # Looked for where it has to be: an optimizer that was initialized once more has lost it.
    hooks: Mapping[int, Any] = optimizer._optimizer_step_pre_hooks
    for hook in tuple(hooks.values()):
        if isinstance(hook, _Gate):
            return hook
    gate = _Gate()
    optimizer.register_step_pre_hook(gate)
    return gate


def _checked(given: Any) -> list[Optimizer]:
    optimizers = list(given) if isinstance(given, list | tuple) else [given]
    for each in optimizers:
        # Wrappers such as Accelerate's pass for an optimizer, but nobody runs hooks of theirs.
        if not isinstance(each, Optimizer) or not hasattr(each, "_optimizer_step_pre_hooks"):
            raise InvalidInputError(
                f"overlap must be the optimizer that changes the state, or a list of them, not {type(each).__name__}; "
                "of one that is wrapped, what is inside."
            )
    return optimizers


def _host_tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters and the state of an optimizer that lie in host memory, without gaps."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [
        value
        for value in [*parameters, *_state_of(optimizer)]
        if isinstance(value, torch.Tensor)
        and not is_lazy(value)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.numel()
        and not value.is_inference()
        and fills_its_span(value)
    ]


def _state_of(optimizer: Optimizer) -> Iterator[Any]:
    for values in optimizer.state.values():
        # By parameter; but nothing keeps an optimizer from having a value for all of them, as MADGRAD has a count.
        yield from values.values() if isinstance(values, Mapping) else [values]


def _joined(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where in memory they lie, in order: from, to. Those that touch are taken together."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(_address(tensor) for tensor in tensors):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + span_bytes(tensor)
