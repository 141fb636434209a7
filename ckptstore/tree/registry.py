"""Which types can be leaves: the native ones, those that users register, and those with methods of their own."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptstore.errors import InvalidInputError
from ckptstore.tree.values import VALUE_TYPES

NATIVE_TYPES: frozenset[type] = VALUE_TYPES | {
    *(list, tuple, dict, set, frozenset, OrderedDict, defaultdict, Counter, deque),
    *(np.ndarray, torch.Tensor, torch.nn.Parameter),
}
"""Types that need no registration and take none (and NumPy's scalars)."""


@dataclass(frozen=True, slots=True)
class Registration:
    """How values of one type are saved, under which name."""

    cls: type
    name: str
    to_tree: Callable[[Any], Any]
    from_tree: Callable[[Any], Any]


_by_type: dict[type, Registration] = {}
_by_name: dict[str, Registration] = {}


def register(cls: type, name: str, to_tree: Callable[[Any], Any], from_tree: Callable[[Any], Any]) -> None:
    """Let values of exactly the type `cls` be leaves of a checkpoint.

    Args:
        cls: the type; subclasses are not included.
        name: what stands for it in the store, for ever; the reader must register the same name.
        to_tree: from a value to a tree of what can be saved (dict, list, tensors, numbers, …).
        from_tree: the way back.

    Raises:
        InvalidInputError: `cls` is a type that ckptstore saves by itself, or `name` is taken by another type.
    """
    given: Any = cls  # whatever the annotations say
    if not isinstance(given, type):
        raise InvalidInputError(f"register() takes a type, not {given!r:.80}: pass the class itself.")
    if cls in NATIVE_TYPES or (issubclass(cls, np.generic) and cls.__module__ == "numpy"):
        raise InvalidInputError(f"{cls.__name__} is saved as it is and needs no registration.")
    if not name or not name.isprintable():
        raise InvalidInputError(f"{name!r} cannot stand for {cls.__qualname__} in a store: use a name such as 'point'.")
    taken = _by_name.get(name)
    if taken is not None and not _is_same_class(taken.cls, cls):
        raise InvalidInputError(
            f"the name {name!r} is registered for {taken.cls.__qualname__} already; choose another."
        )
    _by_type[cls] = _by_name[name] = Registration(cls, name, to_tree, from_tree)


def _is_same_class(old: type, new: type) -> bool:
    """True also for a class that was defined anew, as happens when a notebook's cell runs again."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def registration_of(value: object) -> Registration | None:
    """The registration of exactly the type of `value`."""
    return _by_type.get(type(value))


def registration_named(name: object) -> Registration | None:
    """The registration that a checkpoint means by `name`."""
    return _by_name.get(name) if isinstance(name, str) else None


def is_stateful(value: object) -> bool:
    """True for what is saved and restored through its own methods (module, optimizer, DCP's Stateful, …)."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def is_plain_tensor(value: object) -> bool:
    """True for a Tensor or a Parameter, no other subclass. `torch.nn.Buffer(…)` makes a Tensor with a mark on it."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)
