"""Where the bytes of a checkpoint go: straight into the live tensors' memory where that is possible, else copied.

The only room that changes a destination. What goes where was decided in matching.py.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from ckptstore.assembly import Assembly
from ckptstore.errors import CheckpointError, InvalidInputError
from ckptstore.kernels import ByteArray
from ckptstore.manifest import Manifest
from ckptstore.matching import Match, Slot, StatefulMatch
from ckptstore.skeleton import TensorNode, contiguous_stride
from ckptstore.tree import unflatten


class Placement:
    """Which memory each wanted segment of a checkpoint is written to."""

    def __init__(self, manifest: Manifest, matched: Match) -> None:
        self.manifest = manifest
        self.matched = matched
        self.assembly = Assembly(manifest)
        self.copies: list[Slot] = []
        """The slots that cannot be written straight into their live tensors."""
        self.direct: dict[int, str] = {}
        """Address and path of the live tensors that are."""
        self._plan()

    @property
    def has_written(self) -> bool:
        """Whether any live tensor may have been written to."""
        return bool(self.direct) and self.assembly.has_written

    def live_places(self) -> set[int]:
        """The addresses of all live tensors that this checkpoint will have filled in the end."""
        return {_address(slot.live) for slot in self.matched.slots}

    def _plan(self) -> None:
        users: dict[int, int] = {}
        for node in (*(slot.node for slot in self.matched.slots), *self.matched.others):
            users[node.segment] = users.get(node.segment, 0) + 1
        overlapped = _overlapped(self.matched.slots)
        for number, slot in enumerate(self.matched.slots):
            memory = None
            if users[slot.node.segment] == 1 and number not in overlapped:
                memory = _memory_of(slot, self.manifest.segments[slot.node.segment].bytes)
            if memory is None:
                self.assembly.want(slot.node)
                self.copies.append(slot)
            else:
                self.assembly.want_into(slot.node, memory)
                self.direct[_address(slot.live)] = slot.path
        for node in self.matched.others:
            self.assembly.want(node)

    def put_in_place(self, *, strict: bool) -> None:
        """Copy what could not be written straight, and hand the statefuls their states. Only once all is verified.

        Raises:
            InvalidInputError: a load_state_dict() refused what was saved.
        """
        with torch.no_grad():
            for slot in self.copies:
                _copy(self.assembly.value(slot.node), slot.live)
            for slot in self.matched.slots:
                if isinstance(slot.live, torch.Tensor) and not slot.live.is_inference():
                    # The bytes were written past autograd, which is to know that older graphs no longer hold.
                    torch.autograd.graph.increment_version(slot.live)
        lengths = self.manifest.segment_bytes
        for stateful in self.matched.statefuls:

            def supply(node: TensorNode, path: str, slots: dict[str, Slot] = stateful.slots) -> Any:
                return slots[path].live if path in slots else self.assembly.value(node)

            state = unflatten(stateful.node, supply, lengths, stateful.path)
            self._load(stateful, state, strict=strict)

    def _load(self, stateful: StatefulMatch, state: Any, *, strict: bool) -> None:
        keywords = {} if strict or not _takes_strict(stateful.leaf) else {"strict": False}
        try:
            stateful.leaf.load_state_dict(state, **keywords)
        except CheckpointError:
            raise
        except Exception as error:  # the user's code, or torch's, handed on with the place where it failed
            raise InvalidInputError(
                f"load_state_dict() of {stateful.path or 'the state'} ({type(stateful.leaf).__name__}) refused the "
                f"state of step {self.manifest.step} of run {self.manifest.run!r}: {error}"
            ) from error


def _takes_strict(leaf: Any) -> bool:
    """Whether load_state_dict has the argument `strict`, as that of modules, if it was not overridden without it."""
    return isinstance(leaf, torch.nn.Module) and "strict" in inspect.signature(leaf.load_state_dict).parameters


def _copy(saved: Any, live: "torch.Tensor | np.ndarray[Any, Any]") -> None:
    if isinstance(live, np.ndarray):
        np.copyto(live, saved)
    elif saved.element_size() == 1:
        # As bytes where a number is one: torch cannot copy every small float.
        live.view(torch.uint8).copy_(saved.view(torch.uint8))
    else:
        live.copy_(saved)


def _address(live: "torch.Tensor | np.ndarray[Any, Any]") -> int:
    return live.data_ptr() if isinstance(live, torch.Tensor) else live.ctypes.data


def _memory_of(slot: Slot, segment_bytes: int) -> ByteArray | None:
    """The live tensor's own bytes, if they are laid out just as the segment; None where a copy has to be made."""
    live, node = slot.live, slot.node
    if not isinstance(live, torch.Tensor) or live.device.type != "cpu" or not segment_bytes:
        return None
    stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
    same_layout = live.is_contiguous() if node.stride is None else tuple(live.stride()) == stride
    if not same_layout or node.offset or node.span_bytes != segment_bytes or live.is_conj() or live.is_neg():
        return None
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")  # whatever the default device is
    flat.set_(live.untyped_storage(), int(live.storage_offset()) * live.element_size(), (segment_bytes,), (1,))
    return cast(ByteArray, flat.numpy())


def _overlapped(slots: Sequence[Slot]) -> set[int]:
    """The numbers of slots whose live tensors share memory with another's: writing both at a time would race."""
    spans = sorted(
        (slot.live.data_ptr(), slot.live.data_ptr() + _live_span_bytes(slot.live), number)
        for number, slot in enumerate(slots)
        if isinstance(slot.live, torch.Tensor) and slot.live.device.type == "cpu" and slot.live.numel()
    )
    overlapped: set[int] = set()
    reach, reaching = 0, -1
    for start, stop, number in spans:
        if start < reach:
            overlapped |= {number, reaching}
        if stop > reach:
            reach, reaching = stop, number
    return overlapped


def _live_span_bytes(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()
