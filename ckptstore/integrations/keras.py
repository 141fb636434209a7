"""Keras 3 models in a store: `KerasState`, a leaf of a state, and `CkptstoreBackup`, a callback for `fit`.

    model.fit(data, epochs=20, callbacks=[CkptstoreBackup(ckptstore.Store("./ckpts").run("lstm"))])

Variables are saved one by one, as arrays, so what did not change since the last save is not stored again. Tested with
the backends TensorFlow and PyTorch.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras.src.random.seed_generator import global_seed_generator  # Keras has no public name for it

from ckptstore import PendingSave, RngState, Run
from ckptstore.errors import CheckpointWarning, InvalidInputError
from ckptstore.extension_arrays import from_leaf, to_leaf

__all__ = ["CkptstoreBackup", "KerasRngState", "KerasState"]

Part = Literal["weights", "states", "seeds", "optimizer"]
PARTS: tuple[Part, ...] = ("weights", "states", "seeds", "optimizer")
"""Of a model: its weights, what its stateful RNN layers remember, its seed generators' states, its optimizer's."""
BACKENDS_THAT_SKIP = ("tensorflow", "torch")
"""Keras backends with which `fit` asks `train_function` for a batch in a way that a batch can be left out."""

_COUNTED = re.compile(r"_[0-9]+(?=[/_]|$)")
_SHOWN = 12


class KerasState:
    """A Keras model as a leaf of a state: saved and restored by its variables.

        run.save({"model": KerasState(model), "step": step}, step=step)
        run.restore({"model": KerasState(model)})

    Holds no state itself. The optimizer is the compiled one, with all its variables: slots, iterations, learning rate,
    loss scale. The model must be built (have its variables); the optimizer is built where that is still to be done.
    """

    def __init__(self, model: Any, *, optimizer: Any | None = None, only: Sequence[Part] = ()) -> None:
        """Touches nothing yet.

        Args:
            model: a `keras.Model`, or a layer.
            optimizer: the optimizer of a training loop of your own; None takes the one the model was compiled with,
                if there is one.
            only: which parts to save or restore. A checkpoint may hold more: `only=("weights",)` is a way to take the
                weights of a training alone.

        Raises:
            InvalidInputError: a part has no such name.
        """
        if unknown := [part for part in only if part not in PARTS]:
            raise InvalidInputError(f"KerasState(only=…) takes some of {', '.join(PARTS)}, not {unknown[0]!r:.80}.")
        self._model = model
        self._given_optimizer = optimizer
        self._only = tuple(only) or PARTS

    def __repr__(self) -> str:
        return f"KerasState({getattr(self._model, 'name', self._model)!r})"

    def state_dict(self) -> dict[str, Any]:
        """Each part's variables by their paths, such as `"lstm/lstm_cell/kernel"`: arrays.

        Raises:
            InvalidInputError: the model is not built yet.
        """
        return {part: _values(variables) for part, variables in self._variables().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Assign to all variables; nothing is changed unless all fit.

        Variables are found by their paths; where these differ only by the numbers that Keras counts its automatic names
        with (`dense_4` for `dense`, in a model that was made anew in the same process), by these names and their order.

        Raises:
            InvalidInputError: the model is not built yet, or the variables are others than those that were saved.
        """
        problems: list[str] = []
        pairs: list[tuple[Any, Any]] = []
        for part, variables in self._variables().items():
            if part not in state:
                problems.append(f"there is no {part!r} in it")
                continue
            found, wrong = _matched(variables, state[part], last_only=part == "optimizer")
            pairs += found
            problems += [f"{part}: {text}" for text in wrong]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise InvalidInputError(
                f"the saved state does not fit {self!r}: {'; '.join(problems[:_SHOWN])}{more}. Build and compile the "
                "model as it was when it was saved, or name the parts to take with only=(…). Nothing was changed."
            )
        for variable, value in pairs:
            variable.assign(value)

    def _variables(self) -> dict[str, list[Any]]:
        model = self._model
        if not model.built:
            raise InvalidInputError(
                f"the Keras model {model.name!r} has no variables yet: give it a keras.Input, or call it on a batch, "
                "before it is saved or restored."
            )
        weights = list(model.weights)
        known = {id(variable) for variable in (*weights, *getattr(model, "metrics_variables", ()))}
        parts = {"weights": weights}
        if states := _recurrent_states(model):
            parts["states"] = states
        parts["seeds"] = [variable for variable in model.variables if id(variable) not in known]
        optimizer = self._given_optimizer or getattr(model, "optimizer", None)
        if optimizer is not None:
            if not optimizer.built:  # else its slots come into being with the first step
                optimizer.build(model.trainable_variables)
            parts["optimizer"] = list(optimizer.variables)
        return {part: variables for part, variables in parts.items() if part in self._only}


class KerasRngState:
    """The random generators of a process that trains with Keras, as a leaf: those of `ckptstore.RngState` (Python's,
    NumPy's and torch's), and Keras's own that functions of `keras.random` draw from where no seed is given.

    Those of layers, such as Dropout's, belong to the model: `KerasState` has them. What TensorFlow's stateful
    operations draw from after `tf.random.set_seed` cannot be read; use `tf.random.Generator`.
    """

    def state_dict(self) -> dict[str, Any]:
        """The generators' states."""
        return {"process": RngState().state_dict(), "keras": _read(global_seed_generator().state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generators.

        Raises:
            InvalidInputError: the state is of another kind.
        """
        if not {"process", "keras"} <= state.keys():
            raise InvalidInputError(f"this is no state of KerasRngState: it holds {', '.join(map(str, state))}.")
        RngState().load_state_dict(state["process"])
        global_seed_generator().state.assign(from_leaf(state["keras"]))


class CkptstoreBackup(keras.callbacks.Callback):
    """Saves a training to a run while `fit` goes on, and goes on from there when `fit` is called in a new process.

        backup = CkptstoreBackup(ckptstore.Store("s3://bucket/ckpts").run("lstm"), save_freq=500, background=True)
        model.fit(data, epochs=20, callbacks=[..., backup])

    When `fit` begins, the newest checkpoint that verifies is restored and its epoch goes on; at a first start there is
    none. `epochs` is the number of all epochs, those before included. A checkpoint of the middle of an epoch is gone on
    from right there: the batches before it are fetched and not trained on, and the epoch's metrics count on. Put it
    last in the list, so that it saves what other callbacks have changed.

    A step of the run is the number of batches trained on. The metrics of a checkpoint are the logs of Keras.
    """

    def __init__(
        self,
        run: Run,
        *,
        save_freq: "Literal['epoch'] | int" = "epoch",
        background: bool = False,
        metrics: Sequence[str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Touches nothing yet.

        Args:
            run: where to; a run for each training.
            save_freq: "epoch", at the end of each epoch, after its validation; or a number of batches, and at the end
                of the last epoch.
            background: return from a save when the state has been copied to host memory, and write it in a thread. A
                failure is raised by the next save, or when `fit` ends.
            metrics: which of Keras's logs to put beside the checkpoints; None takes all. `store.prune(keep_best=…)` can
                go by them.
            extra: more to save and restore: a dict of whatever a state can hold, as objects that are filled in place.

        Raises:
            InvalidInputError: `save_freq` is neither.
        """
        super().__init__()
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise InvalidInputError(f"save_freq must be 'epoch' or a number of batches, not {save_freq!r:.80}.")
        self.run = run
        self.async_safe = save_freq == "epoch"  # Keras may then call on_train_batch_end in threads; it only counts
        self._every = None if save_freq == "epoch" else int(save_freq)
        self._background = background
        self._shown = metrics
        self._extra = dict(extra or {})
        self._pending: PendingSave | None = None
        self._resume_at: tuple[int, int, int] | None = None
        """Of a checkpoint in the middle of an epoch: its step, its epoch, and the batches of that epoch it has."""
        self._epoch = 0
        self._before = 0
        """Batches of all epochs before this one."""
        self._batch = 0
        """Batches of this epoch."""

    # ---- what Keras calls

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Restore the newest checkpoint, if there is one.

        Raises:
            InvalidInputError: the checkpoint is that of another model.
            CorruptError: no checkpoint verifies.
            UnavailableError: the store cannot be reached or read; never taken for a first start.
        """
        self._epoch = self._before = self._batch = 0
        self._resume_at = None
        found = self.run.restore(self._leaves())
        if found is None:
            return
        at = found.state["fit"]
        epoch, batch = int(at["epoch"]), int(at["batch"])
        self._before = int(at["batches"]) - batch
        self.model._initial_epoch = epoch  # where Keras's own BackupAndRestore puts it
        if batch:
            self._resume_at = found.step, epoch, batch

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Go to the middle of the epoch, if the checkpoint is from there."""
        self._epoch, self._batch = epoch, 0
        if self._resume_at is None:
            return
        (step, at_epoch, batch), self._resume_at = self._resume_at, None
        if at_epoch != epoch:
            return
        # Restored once more in a moment: by now Keras has reset the metrics, callbacks have put back what belongs to an
        # epoch, such as the states of an RNN, and to fetch the data may take random numbers.
        if keras.backend.backend() in BACKENDS_THAT_SKIP:
            self._batch = batch
            _skip(self.model, batch, lambda: self.run.restore(self._leaves(), step=step))
        else:
            self._before += batch
            self.run.restore(self._leaves(), step=step)
            warnings.warn(
                CheckpointWarning(
                    f"step {step} of run {self.run.name!r} is from the middle of epoch {epoch}, at batch {batch}. With "
                    f"the backend {keras.backend.backend()} that epoch begins anew: these batches are trained on twice."
                ),
                stacklevel=2,
            )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count, and save if it is time to."""
        if batch < self._batch:
            return  # left out; or, where Keras calls this in threads, overtaken by a later one
        earlier, self._batch = self._before + self._batch, batch + 1
        if self._every is not None and (self._before + self._batch) // self._every > earlier // self._every:
            self._save(self._epoch, self._batch, logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save, if it is time to."""
        self._before, self._batch = self._before + self._batch, 0
        is_last = epoch + 1 == self.params.get("epochs") or self.model.stop_training
        if self._every is None or is_last:
            self._save(epoch + 1, 0, logs)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Wait for the save in the background.

        Raises:
            CheckpointError: it failed.
        """
        self.model._initial_epoch = None  # the next fit looks for itself
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    # ---- how

    def _leaves(self) -> dict[str, Any]:
        model = self.model  # with JAX, asking for it puts the values into the variables
        leaves: dict[str, Any] = {"model": KerasState(model), "metrics": _Metrics(model), "rng": KerasRngState()}
        return leaves | ({"extra": self._extra} if self._extra else {})

    def _save(self, epoch: int, batch: int, logs: Mapping[str, Any] | None) -> None:
        step = self._before + self._batch
        state = self._leaves() | {"fit": {"epoch": epoch, "batch": batch, "batches": step}}
        # It was restored from this run, so what stands at the step is of this training, and damaged or older.
        arguments: dict[str, Any] = {"step": step, "metrics": self._metrics(logs), "replace": True}
        if self._background:
            self._pending = self.run.save_async(state, **arguments)
        else:
            self.run.save(state, **arguments)

    def _metrics(self, logs: Mapping[str, Any] | None) -> dict[str, float]:
        found = {name: value for name, value in (logs or {}).items() if np.ndim(value) == 0}
        return {name: float(value) for name, value in found.items() if self._shown is None or name in self._shown}


class _Metrics:
    """The metrics' variables: an epoch that was cut off goes on counting with them. Those of other metrics are left."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return _values(self._model.metrics_variables)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs, problems = _matched(self._model.metrics_variables, state)
        for variable, value in [] if problems else pairs:
            variable.assign(value)


def _skip(model: Any, batches: int, restore: Callable[[], Any]) -> None:
    """Let `fit` fetch so many batches and not train on them, as that was done before; and restore then."""
    train, left = model.train_function, batches

    def skip(data: Any) -> Any:
        nonlocal left
        try:
            batch = _fetch(data, min(left, model.steps_per_execution))
            model._symbolic_build(
                data_batch=batch
            )  # makes the variables of metrics, as a first step does; else nothing
            left -= model.steps_per_execution
            if left <= 0:
                restore()
        except BaseException:
            left = 0
            raise
        finally:
            if left <= 0:
                model.train_function = train
        return model.get_metrics_result()

    model.train_function = skip


def _fetch(data: Any, batches: int) -> Any:
    """Take batches of TensorFlow's iterator, so many; with torch, Keras has taken them. Returns the first."""
    if not hasattr(data, "get_next"):
        return data[0]
    first = data.get_next()  # at the end of the data this raises, as Keras expects
    for _ in range(1, batches):
        data.get_next_as_optional()  # which says nothing at the end: the last execution of an epoch may be a short one
    return first


def _recurrent_states(model: Any) -> list[Any]:
    """What stateful RNN layers remember from batch to batch, which Keras counts neither as weights nor as variables."""
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    return [state for layer in layers for state in keras.tree.flatten(getattr(layer, "states", None) or [])]


def _values(variables: Iterable[Any]) -> dict[str, Any]:
    return {name: to_leaf(_read(variable)) for name, variable in _named(variables).items()}


def _read(variable: Any) -> "np.ndarray[Any, Any]":
    value = variable.value
    if hasattr(value, "read_value"):
        tensor = value.read_value()
        # TensorFlow's own memory, which it leaves alone while it is looked at; numpy() would copy it.
        return np.asarray(tensor if tensor.shape.rank else tensor.numpy())
    return np.asarray(keras.ops.convert_to_numpy(value))


def _named(variables: Iterable[Any]) -> dict[str, Any]:
    """Variables by their paths, in order. Keras lets several have the same one; these are numbered."""
    named: dict[str, Any] = {}
    for variable in variables:
        name, number = variable.path, 0
        while name in named:
            number += 1
            name = f"{variable.path}#{number}"
        named[name] = variable
    return named


def _matched(
    variables: Iterable[Any], saved: Any, *, last_only: bool = False
) -> "tuple[list[tuple[Any, np.ndarray[Any, Any]]], list[str]]":
    """Each variable with the value for it; and what does not fit.

    last_only: only the last parts of their paths need be alike. Those of an optimizer's variables have the paths of the
    weights in them; what comes before depends on how the optimizer came to be built.
    """
    if not isinstance(saved, Mapping):
        return [], [f"a {type(saved).__name__} stands where variables were saved"]
    named = _named(variables)
    source = dict(zip(named, named, strict=True))
    if named.keys() != saved.keys():
        here, there = _uncounted(named, last_only), _uncounted(saved, last_only)
        if here.keys() != there.keys():
            lacking = [f"{name} was not saved" for name in named if name not in saved]
            return [], lacking + [f"{name} was saved and is not in the model" for name in saved if name not in named]
        source = {name: there[key] for key, name in here.items()}
    pairs, problems = [], []
    for name, variable in named.items():
        value = from_leaf(saved[source[name]])
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if tuple(variable.shape) != value.shape or dtype != value.dtype.name:
            problems.append(
                f"{name} is {dtype} of {tuple(variable.shape)} here, and {value.dtype.name} of {value.shape} there"
            )
        pairs.append((variable, value))
    return pairs, problems


def _uncounted(names: Iterable[str], last_only: bool) -> dict[tuple[str, int], str]:
    """Names by what is left of them without Keras's numbers, and how often that came before."""
    found: dict[tuple[str, int], str] = {}
    count: Counter[str] = Counter()
    for name in names:
        plain = _COUNTED.sub("", name.rpartition("/")[2] if last_only else name)
        found[plain, count[plain]] = name
        count[plain] += 1
    return found
