"""Restores and loads carried out: find a checkpoint, verify each byte on its way into memory, put it in place."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ckptstore import catalog
from ckptstore.assembly import Assembly
from ckptstore.condemning import condemn_corrupt
from ckptstore.errors import CheckpointError, CheckpointWarning, CorruptError, InvalidInputError
from ckptstore.kernels import ByteArray
from ckptstore.manifest import Manifest
from ckptstore.matching import Match, Slot, match
from ckptstore.objects.base import Objects
from ckptstore.skeleton import TensorNode, contiguous_stride, find, tensors
from ckptstore.tree import unflatten

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and those to be read in all."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint that was restored, and with strict=False the keys that were left out."""

    manifest: Manifest
    missing: list[str]
    unexpected: list[str]


def load(
    objects: Objects, manifest: Manifest, *, only: str | None, device: "torch.device | str", progress: Progress | None
) -> Any:
    """The tree of a checkpoint, or the part of it at the path `only`. Raises CorruptError, NotFoundError."""
    node = manifest.tree if only is None else find(manifest.tree, only)
    path = only or ""
    lengths = [segment.bytes for segment in manifest.segments]
    assembly = Assembly(manifest, device)
    for _, tensor in tensors(node, lengths, path):
        assembly.want(tensor)
    try:
        assembly.fill(objects, _counted(assembly, progress))
    except CorruptError as error:
        condemn_corrupt(objects, error)
        raise type(error)(
            f"{error}. Load another step, or let run.restore() go back to one that verifies; `ckptstore verify` lists "
            "all damage."
        ) from error
    return unflatten(node, lambda described, _: assembly.value(described), lengths, path)


def restore(
    objects: Objects,
    run: str,
    destination: Any,
    *,
    step: int | None,
    strict: bool,
    progress: Progress | None,
) -> Restored | None:
    """Restore the newest checkpoint that verifies (or the one of `step`) into `destination`; None if there is none.

    Raises:
        InvalidInputError: the checkpoint does not fit the destination.
        NotFoundError, CorruptError: `step` is not there, or is damaged; or every checkpoint of the run is damaged.
    """
    damage: list[CorruptError] = []
    touched, told = False, 0
    for found in _candidates(objects, run, step):
        if isinstance(found, CorruptError):
            damage.append(found)
            continue
        _warn(damage[told:], found)
        told = len(damage)
        plan = _Plan(found, match(destination, found))
        try:
            plan.matched.check(found, strict=strict)
        except InvalidInputError as error:
            if touched:
                raise InvalidInputError(f"{error} {_MIXED}") from error
            raise
        try:
            plan.assembly.fill(objects, _counted(plan.assembly, progress))
        except CorruptError as error:
            condemn_corrupt(objects, error)
            touched = touched or (plan.writes_in_place and plan.assembly.has_written)
            damage.append(error)
            continue
        _put_in_place(plan, strict=strict)
        return Restored(found, plan.matched.missing, plan.matched.unexpected)
    if damage:
        raise CorruptError(
            f"no checkpoint of run {run!r} can be restored: {damage[-1]}."
            f"{' ' + _MIXED if touched else ' The destination was not changed.'}"
            f"{f' ({len(damage)} checkpoints were tried.)' if len(damage) > 1 else ''}"
        ) from damage[-1]
    return None


_MIXED = (
    "The destination holds parts of a damaged checkpoint now and must not be used: make model and optimizer anew "
    "before you train or restore another step."
)


def _candidates(objects: Objects, run: str, step: int | None) -> Iterator[Manifest | CorruptError]:
    if step is not None:
        yield catalog.manifest_of(objects, run, step)
        return
    if catalog.exists(objects):
        yield from catalog.newest_first(objects, run)


def _warn(damage: Sequence[CorruptError], going_back_to: Manifest) -> None:
    """Say what was damaged, once it is known where the restore goes on."""
    for error in damage:
        warnings.warn(CheckpointWarning(f"damaged: {error}. Going back to step {going_back_to.step}."), stacklevel=4)


class _Plan:
    """Which memory each wanted segment of a checkpoint is written to."""

    def __init__(self, manifest: Manifest, matched: Match) -> None:
        self.manifest = manifest
        self.matched = matched
        self.assembly = Assembly(manifest)
        self.copies: list[Slot] = []
        """The slots that cannot be written straight into their live tensors."""
        self._plan()

    @property
    def writes_in_place(self) -> bool:
        return len(self.copies) < len(self.matched.slots)

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
        for node in self.matched.others:
            self.assembly.want(node)


def _memory_of(slot: Slot, segment_bytes: int) -> ByteArray | None:
    """The live tensor's own bytes, if they are laid out just as the segment; None where a copy has to be made."""
    live, node = slot.live, slot.node
    if not isinstance(live, torch.Tensor) or live.device.type != "cpu" or not segment_bytes:
        return None
    stride = node.stride if node.stride is not None else contiguous_stride(node.shape)
    same_layout = live.is_contiguous() if node.stride is None else tuple(live.stride()) == stride
    if not same_layout or node.offset or node.span_bytes != segment_bytes or live.is_conj() or live.is_neg():
        return None
    flat = torch.empty(0, dtype=torch.uint8)
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


def _put_in_place(plan: _Plan, *, strict: bool) -> None:
    """Every byte is verified by now: copy what could not be written straight, and hand the statefuls their states."""
    with torch.no_grad():
        for slot in plan.copies:
            saved = plan.assembly.value(slot.node)
            if isinstance(slot.live, torch.Tensor):
                # As bytes where a number is one: torch cannot copy every small float.
                as_bytes = saved.element_size() == 1
                (slot.live.view(torch.uint8) if as_bytes else slot.live).copy_(
                    saved.view(torch.uint8) if as_bytes else saved
                )
            else:
                np.copyto(slot.live, saved)
    lengths = [segment.bytes for segment in plan.manifest.segments]
    for stateful in plan.matched.statefuls:

        def supply(node: TensorNode, path: str, slots: dict[str, Slot] = stateful.slots) -> Any:
            return slots[path].live if path in slots else plan.assembly.value(node)

        state = unflatten(stateful.node, supply, lengths, stateful.path)
        keywords = {"strict": strict} if isinstance(stateful.leaf, torch.nn.Module) else {}
        try:
            stateful.leaf.load_state_dict(state, **keywords)
        except CheckpointError:
            raise
        except Exception as error:  # the user's code, or torch's, handed on with the place where it failed
            raise InvalidInputError(
                f"load_state_dict() of {stateful.path or 'the state'} ({type(stateful.leaf).__name__}) refused the "
                f"state of step {plan.manifest.step} of run {plan.manifest.run!r}: {error} {_MIXED}"
            ) from error


def _counted(assembly: Assembly, progress: Progress | None) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total, read = assembly.stored_bytes(), 0

    def count(stored_bytes: int) -> None:
        nonlocal read
        read += stored_bytes
        progress(read, total)

    return count
