"""What is to be restored against what was saved: which tensor goes where, and everything that does not fit.

Pure looking: nothing of the destination is changed here, so that an error found here has changed nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ckptstore.errors import CorruptError, InvalidInputError
from ckptstore.manifest import Manifest
from ckptstore.skeleton import MAPPING_TAGS, TAG, TensorNode, children, join, registered_names, shown, tensor_places
from ckptstore.skeleton import tensors as tensors_below
from ckptstore.tree import (
    TORCH_DTYPES,
    decode_items,
    is_plain_tensor,
    is_stateful,
    registration_named,
    registration_of,
    unflatten,
)

_SHOWN = 12
_OF_SCHEDULERS = {"initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum", "swa_lr"}
"""What torch's schedulers add to an optimizer's parameter groups; they may be made after the restore."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A saved tensor and the live one that takes its values (for a Stateful's own, through its state dict)."""

    path: str
    node: TensorNode
    live: "torch.Tensor | np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class StatefulMatch:
    """An object restored through its own methods, and the saved node for it."""

    path: str
    leaf: Any
    node: Any
    slots: dict[str, Slot]
    """Its own live tensors that are filled in place, by path."""


@dataclass(slots=True)
class Match:
    """The outcome: what goes where, and what does not fit."""

    slots: list[Slot] = field(default_factory=list)
    statefuls: list[StatefulMatch] = field(default_factory=list)
    others: list[TensorNode] = field(default_factory=list)
    """Saved tensors within statefuls that have no live counterpart, such as the moments of a fresh optimizer."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wrapped: str = ""

    def check(self, manifest: Manifest, *, strict: bool) -> None:
        """Raise one InvalidInputError that lists everything that does not fit."""
        lines = list(self.problems)
        if not strict and self.missing and not self._fills_anything():
            lacking = ", ".join(self.missing[:_SHOWN])
            lines.append(f"nothing of the destination is in the checkpoint (it lacks {lacking})")
        if strict:
            lines += [f"{path} is not in the checkpoint" for path in self.missing]
            lines += [f"{path} is in the checkpoint and not in the destination" for path in self.unexpected]
        if not lines:
            return
        shown = "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
        if any(not set(path) & set(".[") for path in self.missing):
            stand = [path for path, _ in children(manifest.tree, "")]
            shown += f". At its root stand: {', '.join(stand[:_SHOWN])}{', …' if len(stand) > _SHOWN else ''}"
        advice = self.wrapped or (
            "Restore into what was saved, or pass strict=False to leave out keys that differ."
            if not self.problems
            else "Build the model and optimizer as they were when they were saved."
        )
        raise InvalidInputError(
            f"step {manifest.step} of run {manifest.run!r} does not fit the destination: {shown}. {advice} "
            "Nothing was changed."
        )

    def _fills_anything(self) -> bool:
        """With strict=False a misspelt name must not pass for a restore."""
        others = [stateful for stateful in self.statefuls if not isinstance(stateful.leaf, torch.nn.Module)]
        return bool(self.slots or others)


def match(destination: Any, manifest: Manifest) -> Match:
    """Walk the destination and the saved tree side by side. Raises CorruptError if the saved tree makes no sense."""
    matcher = _Matcher(manifest)
    matcher.walk(destination, manifest.tree, "")
    return matcher.found


class _Matcher:
    def __init__(self, manifest: Manifest) -> None:
        self.found = Match()
        self._segment_bytes = manifest.segment_bytes

    def walk(self, live: Any, node: Any, path: str) -> None:
        if registration_of(live) is not None:
            # It was saved as a value, not through its methods.
            if _holds_tensors(node):
                self.found.problems.append(
                    f"{path} is of a registered type, which load() gives and restore() cannot fill"
                )
        elif is_stateful(live):
            self._stateful(live, node, path)
        elif isinstance(live, torch.Tensor | np.ndarray):
            self._tensor(live, node, path)
        elif isinstance(live, Mapping):
            self._mapping(live, node, path)
        elif isinstance(live, list | tuple):
            self._sequence(live, node, path)
        elif path and _holds_tensors(node):
            self.found.unexpected.append(path)
        # Numbers, texts and the like cannot be filled in place: the caller takes them from Checkpoint.state.

    def _mapping(self, live: Mapping[Any, Any], node: Any, path: str) -> None:
        saved = _mapping_members(node, path)
        if saved is None:
            self._differs(path, "a dict", node)
            return
        for key, value in live.items():
            below = join(path, key)
            if key in saved:
                self.walk(value, saved[key], below)
            elif _can_be_filled(value):
                self.found.missing.append(below)
        if path:  # of the whole state a part may be restored; what lies within is to be as it was saved
            unexpected = [key for key in saved if key not in live and _holds_tensors(saved[key])]
            self.found.unexpected += [join(path, key) for key in unexpected]

    def _sequence(self, live: "list[Any] | tuple[Any, ...]", node: Any, path: str) -> None:
        saved = node if isinstance(node, list) else node.get("items") if _tag(node) in ("tuple", "deque") else None
        if saved is None:
            self._differs(path, f"a {type(live).__name__}", node)
        elif not isinstance(saved, list):
            raise CorruptError(f"{path}: the {_tag(node)} there has no members")
        elif len(saved) != len(live):
            self.found.problems.append(f"{path} has {len(live)} members and {len(saved)} in the checkpoint")
        else:
            for index, (value, below) in enumerate(zip(live, saved, strict=True)):
                self.walk(value, below, join(path, index))

    def _tensor(self, live: "torch.Tensor | np.ndarray[Any, Any]", node: Any, path: str) -> None:
        wanted = "tensor" if isinstance(live, torch.Tensor) else "ndarray"
        if _tag(node) != wanted:
            self._differs(path, f"a {wanted}", node)
            return
        described = TensorNode.from_json(node, path, self._segment_bytes)
        if problem := _misfit(live, described):
            self.found.problems.append(f"{path} {problem}")
        elif isinstance(live, np.ndarray) and not live.flags.writeable:
            self.found.problems.append(f"{path} is an array that cannot be written to")
        else:
            self.found.slots.append(Slot(path, described, live))

    def _stateful(self, live: Any, node: Any, path: str) -> None:
        if isinstance(live, torch.nn.Module):
            own = self._module(live, node, path)
        elif isinstance(live, torch.optim.Optimizer):
            self._check_groups(live, node, path)
            own = dict(_unique(_tensors_below(live.state_dict(), path)))
        else:
            own = {}  # whether its state dict is the state or a copy of it is not known
        saved = Counter(name for name, _ in tensor_places(node, path))
        slots: dict[str, Slot] = {}
        for name, described in tensors_below(node, self._segment_bytes, path):
            tensor = own.get(name) if saved[name] == 1 else None
            if tensor is None:
                self.found.others.append(described)
            elif problem := _misfit(tensor, described):
                if isinstance(live, torch.optim.Optimizer) and tensor.shape == described.shape:
                    self.found.others.append(described)  # its load_state_dict converts to the parameter's dtype
                else:
                    self.found.problems.append(f"{name} {problem}")
            else:
                slots[name] = Slot(name, described, tensor)
        self.found.slots += slots.values()
        self._check_registered(node, path)
        self.found.statefuls.append(StatefulMatch(path, live, node, slots))

    def _module(self, module: torch.nn.Module, node: Any, path: str) -> dict[str, torch.Tensor]:
        state = module_state(module)
        saved = _mapping_members(node, path)
        if saved is None:
            self._differs(path, f"a module ({type(module).__name__})", node)
            return {}
        if not any(below._load_state_dict_pre_hooks for below in module.modules()):
            # Hooks may rename keys of older versions; where there are none, torch would find what is found here.
            missing, unexpected = [key for key in state if key not in saved], [key for key in saved if key not in state]
            self.found.missing += [join(path, key) for key in missing]
            self.found.unexpected += [join(path, key) for key in unexpected]
            if (missing or unexpected) and _unwrapped(state) == _unwrapped(saved):
                self.found.wrapped = (
                    f"The keys of {path or 'the module'} differ only by the prefix that DistributedDataParallel "
                    "(module.) or torch.compile (_orig_mod.) put there: save and restore the module that is wrapped "
                    "(model.module, model._orig_mod), which works with and without them."
                )
        # What a module gives and takes by code of its own may have any shape; its load_state_dict is to say.
        own = tuple(
            f"{name}." if name else ""
            for name, below in module.named_modules()
            if type(below)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
            and not type(below).__module__.startswith("torch.")
        )
        return dict(
            _unique(
                (join(path, key), value)
                for key, value in state.items()
                if is_plain_tensor(value) and not key.endswith("_extra_state") and not (own and key.startswith(own))
            )
        )

    def _check_registered(self, node: Any, path: str) -> None:
        """Find what `unflatten` would refuse later, when bytes have been written."""
        for name in registered_names(node):
            if registration_named(name) is None:
                self.found.problems.append(
                    f"{path} holds a value saved under the name {shown(name)}, which is not registered here "
                    "(ckptstore.register)"
                )
        unflatten(node, lambda *_: None, self._segment_bytes, path, describe=True)

    def _check_groups(self, optimizer: torch.optim.Optimizer, node: Any, path: str) -> None:
        """What torch's load_state_dict would refuse, found before anything is changed."""
        groups = (_mapping_members(node, path) or {}).get("param_groups")
        if not isinstance(groups, list):
            self._differs(path, f"an optimizer ({type(optimizer).__name__})", node)
            return
        members = [_mapping_members(group, path) or {} for group in groups]
        params = [group.get("params") for group in members]
        saved = [len(each) if isinstance(each, list) else 0 for each in params]
        live = [len(group["params"]) for group in optimizer.param_groups]
        if saved != live:
            self.found.problems.append(f"{path} has parameter groups of {live} tensors and {saved} in the checkpoint")
            return
        state = _mapping_members((_mapping_members(node, path) or {}).get("state"), path) or {}
        numbers = {str(number) for each in params for number in each or () if type(number) is int}
        if texts := [key for key in state if isinstance(key, str) and key in numbers]:
            # torch would keep it as that of something else, and begin with none for the parameter: in silence.
            self.found.problems.append(
                f"{path} has the state of its parameters under texts ({shown(texts[0])}) in the checkpoint, not "
                "under numbers: load() it, and make the keys of `state` numbers again"
            )
            return
        for group, own in zip(members, optimizer.param_groups, strict=True):
            # A newer version of an optimizer has settings more. One that has settings less besides is another: torch
            # would take over its settings, and fail in the first step, or train with what they happen to be.
            lacking = sorted(key for key in optimizer.defaults if key not in group)
            foreign = sorted(join("", key) for key in group if key not in own and key not in _OF_SCHEDULERS)
            if lacking and foreign:
                self.found.problems.append(
                    f"{path} is a {type(optimizer).__name__} here, and its settings in the checkpoint are those of "
                    f"another optimizer ({', '.join(foreign)} in place of {', '.join(lacking)})"
                )
                return

    def _differs(self, path: str, here: str, node: Any) -> None:
        self.found.problems.append(f"{path or 'the state'} is {here} here and {_kind(node)} in the checkpoint")


def module_state(module: torch.nn.Module) -> dict[str, Any]:
    """The live state dict of a module: the parameters themselves, which `load_state_dict` then need not copy again."""
    try:
        state: dict[str, Any] = module.state_dict(keep_vars=True)
    except TypeError:  # a module that overrides state_dict() without that argument
        state = module.state_dict()
    return state


def _misfit(live: "torch.Tensor | np.ndarray[Any, Any]", saved: TensorNode) -> str:
    """Why the saved values do not fit, or nothing."""
    if isinstance(live, torch.Tensor):
        if why := _cannot_be_written(live):
            return why
        dtype_fits = live.dtype == TORCH_DTYPES.get(saved.dtype)
        here = str(live.dtype).removeprefix("torch.")
    else:
        dtype_fits, here = live.dtype.str == saved.dtype, live.dtype.str
    if tuple(live.shape) != saved.shape:
        return f"has shape {tuple(live.shape)} and {saved.shape} in the checkpoint"
    return "" if dtype_fits else f"is {here} and {saved.dtype} in the checkpoint"


def _cannot_be_written(live: torch.Tensor) -> str:
    if not is_plain_tensor(live):
        return f"is a {type(live).__name__} here, which restore() cannot fill"
    if live.is_meta:
        return "is a meta tensor here, which has no memory: call to_empty(device=…) on the module first"
    if live.layout is not torch.strided:
        return f"is a {live.layout} tensor here, which restore() cannot fill"
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "is an inference tensor here, which cannot be written to: clone() it"
    if any(size > 1 and step == 0 for size, step in zip(live.shape, live.stride(), strict=True)):
        return "is expanded here, so that its elements share memory: clone() it"
    return ""


def _holds_tensors(node: Any) -> bool:
    return next(tensor_places(node), None) is not None


def _can_be_filled(value: Any) -> bool:
    """Whether there is anything in it that a restore would write to."""
    if is_stateful(value) or isinstance(value, torch.Tensor | np.ndarray):
        return True
    if isinstance(value, Mapping):
        return any(_can_be_filled(below) for below in value.values())
    return isinstance(value, list | tuple) and any(_can_be_filled(below) for below in value)


def _tensors_below(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        if is_plain_tensor(tree):
            yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors_below(value, join(path, key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _tensors_below(value, join(path, index))


def _unique(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Leave out paths that two tensors share (keys with dots in them): which is meant could not be told."""
    found = list(pairs)
    count = Counter(path for path, _ in found)
    return ((path, tensor) for path, tensor in found if count[path] == 1)


def _mapping_members(node: Any, path: str) -> dict[Any, Any] | None:
    """The members of a saved dict by their keys; None if it is no dict. Raises CorruptError."""
    if not isinstance(node, dict):
        return None
    if TAG not in node:
        return node
    if _tag(node) not in MAPPING_TAGS:
        return None
    return {key: below for key, (_, below) in decode_items(node, path).items()}


def _unwrapped(keys: Iterable[str]) -> set[str]:
    return {join("", key).replace("_orig_mod.", "").removeprefix("module.") for key in keys}


def _tag(node: Any) -> str | None:
    tag = node.get(TAG) if isinstance(node, dict) else None
    return tag if isinstance(tag, str) else None


def _kind(node: Any) -> str:
    if isinstance(node, dict):
        return f"a {_tag(node) or 'dict'}"
    return f"a {type(node).__name__}" if node is not None else "None"
