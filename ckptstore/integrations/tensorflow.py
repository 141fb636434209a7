"""TensorFlow objects in a store: `TrackableState`, a leaf of a state for whatever `tf.train.Checkpoint` takes.

    state = TrackableState(net=net, generator=generator, batches=iterator)
    run.restore({"training": state})
    run.save({"training": state}, step=step)

Variables are saved one by one, as arrays, so what did not change since the last save is not stored again. Objects with
data of another kind (positions of tf.data iterators, lookup tables) are saved by the tensors that they give to
TensorFlow's own checkpoints. Models of Keras 3 have `ckptstore.integrations.keras`.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from ckptstore.errors import InvalidInputError
from ckptstore.extension_arrays import from_leaf, to_leaf

__all__ = ["TrackableState"]

_DTYPE, _PROTO = "dtype", "tensor_proto"
_SHOWN = 12


class TrackableState:
    """TensorFlow objects as a leaf of a state: saved and restored by the graph of their attributes.

    Holds no state itself. Takes what `tf.train.Checkpoint` takes: modules, variables, `tf.random.Generator`, iterators
    of tf.data, lookup tables, and lists and dicts of them. A variable's name is its path, such as
    `"net/layers/0/kernel"`; what can be reached in two ways is saved once, and found again by either. All variables
    must have been made when this is restored.

    Raises:
        TypeError, ValueError: one of `objects` is nothing that TensorFlow tracks.
    """

    def __init__(self, **objects: Any) -> None:
        self._names = tuple(objects)
        self._root = tf.train.Checkpoint(**objects)

    def __repr__(self) -> str:
        return f"TrackableState({', '.join(f'{name}=…' for name in self._names)})"

    def state_dict(self) -> dict[str, Any]:
        """Variables by path, as arrays; and of other objects that hold data, their tensors by path and name.

        Raises:
            InvalidInputError: an object's data cannot be saved; the text names it.
        """
        variables: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for path, held in _Graph(self._root, self._names).holders.items():
            if isinstance(held, tf.Variable):
                variables[path] = _leaf(held.read_value())
            else:
                others[path] = {name: _leaf(tensor) for name, tensor in _tensors_of(held, path).items()}
        return {"variables": variables, "objects": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Assign to all variables, and set the other objects.

        Raises:
            InvalidInputError: the objects are not those that were saved: one text lists all that differs, and nothing
                was changed. Or one of them refused its data, as an iterator of another pipeline does.
        """
        graph = _Graph(self._root, self._names)
        saved: dict[str, Any] = {**state["variables"], **state["objects"]}
        found = {path: graph.at(path) for path in saved}
        problems = [f"{path} was saved and is not here" for path, held in found.items() if held is None]
        reached = {id(held) for held in found.values()}
        problems += [f"{path} was not saved" for path, held in graph.holders.items() if id(held) not in reached]
        values = {path: _tensor(leaf) for path, leaf in state["variables"].items()}
        problems += [text for path, value in values.items() if (text := _misfit(path, found[path], value))]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise InvalidInputError(
                f"the saved state does not fit {self!r}: {'; '.join(problems[:_SHOWN])}{more}. Make the objects, with "
                "all their variables, as they were when they were saved. Nothing was changed."
            )
        for path, leaves in state["objects"].items():
            _set_tensors(found[path], path, {name: _tensor(leaf) for name, leaf in leaves.items()})
        for path, value in values.items():
            found[path].assign(value)


class _Graph:
    """What can be reached from the objects, by the names under which TensorFlow tracks it."""

    def __init__(self, root: Any, names: tuple[str, ...]) -> None:
        self._root = root
        self._children: dict[int, dict[str, Any]] = {}
        self._alive: list[Any] = []
        """Wrappers of lists and dicts may be made anew at each look; an id means something while its object lives."""
        self.holders: dict[str, Any] = {}
        """What holds data, each by the first path to it: the objects in their order, the nearest first."""
        seen: set[int] = set()
        held_already: set[int] = set()
        for name in names:
            for path, tracked in self._below(name, seen):
                held = _holder(tracked, path)
                if held is not None and id(held) not in held_already:
                    held_already.add(id(held))
                    self.holders[path] = held

    def at(self, path: str) -> Any:
        """What holds data at a path, the first one or another; None if there is nothing."""
        tracked = self._root
        for name in path.split("/"):
            tracked = self._children_of(tracked).get(name)
            if tracked is None:
                return None
        return _holder(tracked, path)

    def _below(self, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
        waiting = deque([(name, self._children_of(self._root)[name])])
        while waiting:
            path, tracked = waiting.popleft()
            yield path, tracked
            for below, child in self._children_of(tracked).items():
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append((f"{path}/{below}", child))

    def _children_of(self, tracked: Any) -> dict[str, Any]:
        if id(tracked) not in self._children:
            children = tf.train.TrackableView.children(tracked)
            self._children[id(tracked)] = {name.replace("/", "|"): child for name, child in children.items()}
            self._alive += [tracked, *children.values()]
        return self._children[id(tracked)]


def _holder(tracked: Any, path: str) -> Any:
    """What holds the data of a tracked object: a variable (a Keras variable's own), or itself; None if it has none."""
    if isinstance(tracked, tf.Variable):
        return tracked
    inner = getattr(tracked, "value", None)
    if isinstance(inner, tf.Variable):
        return inner
    if _serialized(tracked, path) is not None:
        return tracked
    if tracked._gather_saveables_for_checkpoint():
        raise InvalidInputError(
            f"{path} is a {type(tracked).__name__}, whose data only TensorFlow's own checkpoints hold. Leave it out."
        )
    return None


def _tensors_of(tracked: Any, path: str) -> dict[str, Any]:
    tensors = _serialized(tracked, path) or {}
    return {name: value() if callable(value) else value for name, value in tensors.items()}


def _serialized(tracked: Any, path: str) -> dict[str, Any] | None:
    """What an object gives to TensorFlow's checkpoints; None if it holds nothing."""
    try:
        tensors: dict[str, Any] = tracked._serialize_to_tensors()
    except NotImplementedError:
        return None
    except tf.errors.OpError as error:
        raise InvalidInputError(
            f"{path} ({type(tracked).__name__}) cannot be saved, says TensorFlow: {error.message} Leave it out."
        ) from error
    return tensors


def _set_tensors(tracked: Any, path: str, tensors: dict[str, Any]) -> None:
    try:
        tracked._restore_from_tensors(tensors)
    except (tf.errors.OpError, KeyError) as error:
        raise InvalidInputError(
            f"{path} ({type(tracked).__name__}) refuses what was saved of it: {error} Make it as it was when it was "
            "saved. Its state, and that of other objects that are no variables, may have been changed."
        ) from error


def _leaf(tensor: Any) -> Any:
    if tensor.dtype in (tf.string, tf.variant):
        # Of no fixed size; and what stands in a variant, only TensorFlow can read.
        return {_DTYPE: tensor.dtype.name, _PROTO: tf.io.serialize_tensor(tensor).numpy()}
    # TensorFlow's own memory, which it leaves alone while it is looked at; numpy() would copy it, as it does a scalar.
    return to_leaf(np.asarray(tensor if tensor.shape.rank else tensor.numpy()))


def _tensor(leaf: Any) -> Any:
    if isinstance(leaf, Mapping) and _PROTO in leaf:
        return tf.io.parse_tensor(leaf[_PROTO], tf.dtypes.as_dtype(leaf[_DTYPE]))
    return tf.constant(from_leaf(leaf))


def _misfit(path: str, held: Any, value: Any) -> str:
    if held is None:
        return ""  # told already
    if not isinstance(held, tf.Variable):
        return f"{path} was a variable and is a {type(held).__name__}"
    if held.dtype != value.dtype or not held.shape.is_compatible_with(value.shape):
        return f"{path} is {held.dtype.name} of {held.shape} here, and {value.dtype.name} of {value.shape} there"
    return ""
