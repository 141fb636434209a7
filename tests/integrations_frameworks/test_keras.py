"""Keras models, trained with Keras's own `fit`, with their training in a store.

Runs with the backend that KERAS_BACKEND names; `make test-integrations` has it run with TensorFlow and with PyTorch.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import ckptstore
from ckptstore.integrations.keras import CkptstoreBackup, KerasRngState, KerasState
from tests.integrations_frameworks.training import chunks, damage_newest, kill_example, run_example
from tests.strategies import assert_same

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning"),
]

BACKEND = keras.backend.backend()
STATEFUL = BACKEND == "tensorflow"
"""A stateful RNN of Keras cannot be trained with PyTorch: the gradient finds its states changed."""
BATCHES = 12
"""Of an epoch."""


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    return ckptstore.Store(tmp_path / "store")


@pytest.fixture
def run(store: ckptstore.Store) -> ckptstore.Run:
    return store.run("tiny")


def language_model(optimizer: Any = None, **compiled: Any) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(2, 5)),
            keras.layers.Embedding(20, 4),
            keras.layers.LSTM(6, return_sequences=True, stateful=STATEFUL),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(20),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], jit_compile=False, **compiled)
    return model


def dense_model(size: int = 4, **compiled: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(size), keras.layers.Dense(1)])
    model.compile(**({"optimizer": "adam", "loss": "mse", "jit_compile": False} | compiled))
    return model


def fit_dense(model: keras.Model, *callbacks: Any, epochs: int = 2, **settings: Any) -> dict[str, list[float]]:
    inputs = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
    history = model.fit(
        inputs,
        inputs.sum(1, keepdims=True),
        batch_size=2,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **settings,
    )
    found: dict[str, list[float]] = history.history
    return found


class ResetStates(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if STATEFUL:
            self.model.layers[1].reset_states()


class Losses(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.found: dict[tuple[int, int], tuple[float, float]] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.found[self.epoch, batch] = (logs["loss"], logs["accuracy"])


class Interruption(keras.callbacks.Callback):
    """Stands for a kill, within one process."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def train(run: ckptstore.Run, *callbacks: Any, seed: int = 1, epochs: int = 3, **settings: Any) -> tuple[Any, Any]:
    """Returns the model, and the running loss and accuracy after each batch."""
    compiled = settings.pop("compiled", {})
    keras.utils.set_random_seed(seed)
    model = language_model(**compiled)
    rng = np.random.default_rng(0)
    losses = Losses()
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(
            rng.integers(0, 20, (2 * BATCHES, 5)),
            rng.integers(0, 20, (2 * BATCHES, 5)),
            batch_size=2,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[ResetStates(), losses, *callbacks, CkptstoreBackup(run, **settings)],
        )
    return model, losses.found


def values(variables: Sequence[Any]) -> list[bytes]:
    return [np.asarray(keras.ops.convert_to_numpy(variable)).tobytes() for variable in variables]


# ---- a training that is killed


EXAMPLE = ("keras_lstm.py", "--losses", "losses.jsonl", "--save-every", 15, "--words", 10_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    run_example(*EXAMPLE, cwd=folder)
    return folder


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the example is one of Keras on TensorFlow")
@pytest.mark.parametrize("mode", [[], ["--background"]], ids=["foreground", "background"])
def test_a_killed_training_resumes_as_if_it_had_not_been_killed(whole: Path, tmp_path: Path, mode: list[str]) -> None:
    killed = tmp_path
    run = ckptstore.Store(killed / "ckpts").run("keras-lstm")

    kill_example(*EXAMPLE, *mode, cwd=killed, when=lambda: len(run.steps()) >= 3)
    newest = run.steps()[-1]
    assert 45 <= newest < 98
    (killed / "losses.jsonl").unlink()
    run_example(*EXAMPLE, *mode, cwd=killed)

    wanted = ckptstore.Store(whole / "ckpts").run("keras-lstm")
    assert run.steps() == wanted.steps()
    for step in run.steps():
        found, expected = run.load(step), wanted.load(step)
        for state in (found, expected):
            # Of a generator of torch that nothing was drawn from, there are bytes that mean nothing.
            state["rng"]["process"].pop("torch")
        assert_same(found, expected)
        assert run.checkpoint(step).metrics == wanted.checkpoint(step).metrics
    losses = [json.loads(line) for line in (whole / "losses.jsonl").read_text("utf-8").splitlines()]
    again = [json.loads(line) for line in (killed / "losses.jsonl").read_text("utf-8").splitlines()]
    assert again[-1] == losses[-1]
    assert again[newest % 49 :] == losses[newest:]  # what comes before are the batches of that epoch that were left out


@pytest.mark.parametrize("interrupted_after", [18, 12, 25])
def test_an_epoch_that_was_cut_off_goes_on_at_its_batch(store: ckptstore.Store, interrupted_after: int) -> None:
    whole, wanted = train(store.run("whole"), save_freq=4)
    train(store.run("cut"), Interruption(interrupted_after), save_freq=4)
    newest = store.run("cut").steps()[-1]
    assert newest == interrupted_after // 4 * 4 - (4 if interrupted_after == 12 else 0)  # saved after the interruption

    resumed, found = train(store.run("cut"), seed=2, save_freq=4)
    epoch, batch = divmod(newest, BATCHES)
    after = {place: loss for place, loss in found.items() if place >= (epoch, batch)}
    assert after == {place: loss for place, loss in wanted.items() if place >= (epoch, batch)}
    assert values(resumed.weights + resumed.optimizer.variables) == values(whole.weights + whole.optimizer.variables)


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_a_training_goes_on_with_the_next_epoch(store: ckptstore.Store, background: bool) -> None:
    whole, wanted = train(store.run("whole"), background=background)
    train(store.run("cut"), Interruption(BATCHES + 3), background=background)
    store.run("cut").load(only="fit")  # waits for what is under way
    assert store.run("cut").steps() == [BATCHES]
    resumed, found = train(store.run("cut"), seed=2, background=background)
    assert found == {place: loss for place, loss in wanted.items() if place >= (1, 0)}
    assert values(resumed.weights + resumed.optimizer.variables) == values(whole.weights + whole.optimizer.variables)
    assert store.run("cut").steps() == [BATCHES, 2 * BATCHES, 3 * BATCHES]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras does not execute steps together with PyTorch")
@pytest.mark.parametrize("steps_per_execution", [5, 7])
def test_batches_that_are_executed_together_are_left_out_together(
    store: ckptstore.Store, steps_per_execution: int
) -> None:
    settings: dict[str, Any] = {"compiled": {"steps_per_execution": steps_per_execution}, "save_freq": 5}
    whole, _ = train(store.run("whole"), **settings)
    train(store.run("cut"), Interruption(4), **settings)
    assert store.run("cut").steps()[-1] % BATCHES > 0
    resumed, _ = train(store.run("cut"), seed=2, **settings)
    assert values(resumed.weights + resumed.optimizer.variables) == values(whole.weights + whole.optimizer.variables)


def test_a_training_that_is_done_is_not_trained_again(run: ckptstore.Run) -> None:
    done = dense_model()
    fit_dense(done, CkptstoreBackup(run))
    again = dense_model()
    assert fit_dense(again, CkptstoreBackup(run)) == {}
    assert values(again.weights) == values(done.weights)


def test_more_epochs_go_on_from_the_last(run: ckptstore.Run) -> None:
    model = dense_model()
    fit_dense(model, CkptstoreBackup(run), epochs=2)
    fit_dense(model, CkptstoreBackup(run), epochs=5)
    assert run.steps() == [4, 8, 12, 16, 20]
    assert len(fit_dense(model, epochs=2)["loss"]) == 2  # without the callback it is Keras's own again


def test_a_damaged_newest_checkpoint_is_passed_over(run: ckptstore.Run, tmp_path: Path) -> None:
    whole = dense_model()
    keras.utils.set_random_seed(1)
    fit_dense(whole, CkptstoreBackup(run), epochs=2)
    before = chunks(tmp_path / "store")
    fit_dense(whole, CkptstoreBackup(run), epochs=3)
    damage_newest(tmp_path / "store", before | set(sorted(chunks(tmp_path / "store") - before)[1:]))
    resumed = dense_model()
    with pytest.warns(ckptstore.CheckpointWarning, match="Going back to step 8"):
        fit_dense(resumed, CkptstoreBackup(run), epochs=3)
    assert values(resumed.weights) == values(whole.weights)
    run.load(12)  # saved again, and sound


# ---- what is saved


def test_logs_become_the_metrics_of_a_checkpoint(run: ckptstore.Run) -> None:
    inputs = np.ones((2, 3), "float32")
    history = fit_dense(dense_model(), CkptstoreBackup(run), validation_data=(inputs, inputs[:, :1]))
    for number, checkpoint in enumerate(run.checkpoints()):
        assert checkpoint.metrics == {name: column[number] for name, column in history.items()}
        assert "val_loss" in checkpoint.metrics


def test_only_the_logs_that_are_named_become_metrics(run: ckptstore.Run) -> None:
    fit_dense(dense_model(metrics=["mae"]), CkptstoreBackup(run, metrics=["mae"]))
    assert list(run.checkpoint().metrics) == ["mae"]


def test_extra_objects_are_saved_and_restored(run: ckptstore.Run) -> None:
    counts = np.zeros(3)

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            counts[0] += 1

    fit_dense(dense_model(), Count(), CkptstoreBackup(run, extra={"counts": counts}))
    again = np.zeros(3)
    fit_dense(dense_model(), CkptstoreBackup(run, extra={"counts": again}))
    assert again.tolist() == [8, 0, 0]


def test_frozen_weights_are_stored_once(store: ckptstore.Store) -> None:
    model = dense_model(size=20_000)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    run = store.run("frozen")
    first = run.save({"model": KerasState(model)}, step=1)
    fit_dense(model)
    second = run.save({"model": KerasState(model)}, step=2)
    assert 0 < second.new_bytes < first.new_bytes / 2


OPTIMIZERS = {
    "sgd with momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw with averages": lambda: keras.optimizers.AdamW(0.1, use_ema=True),
    "accumulating": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=3),
    "scheduled": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1), dynamic_growth_steps=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_it_would_have_taken(run: ckptstore.Run, name: str) -> None:
    def model() -> keras.Model:
        return dense_model(optimizer=OPTIMIZERS[name]())

    saved = model()
    fit_dense(saved, epochs=1)
    run.save({"model": KerasState(saved)}, step=1)
    restored = model()
    run.restore({"model": KerasState(restored)})
    for trained in (saved, restored):
        fit_dense(trained, epochs=1)
    assert values(restored.weights + restored.optimizer.variables) == values(saved.weights + saved.optimizer.variables)


def test_a_changed_learning_rate_comes_back(run: ckptstore.Run) -> None:
    saved, restored = dense_model(), dense_model()
    saved.optimizer.learning_rate = 0.5
    run.save({"model": KerasState(saved)}, step=1)
    run.restore({"model": KerasState(restored)})
    assert float(keras.ops.convert_to_numpy(restored.optimizer.learning_rate)) == 0.5


def test_a_loop_of_ones_own_gives_its_optimizer(run: ckptstore.Run) -> None:
    model, optimizer = dense_model(), keras.optimizers.SGD(0.1, momentum=0.9)
    run.save({"model": KerasState(model, optimizer=optimizer)}, step=1)
    assert any("momentum" in name for name in run.load(only="model.optimizer"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
def test_weights_of_small_floats_come_back(run: ckptstore.Run, dtype: str) -> None:
    def model() -> keras.Model:
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype=dtype)])

    saved, restored = model(), model()
    run.save({"model": KerasState(saved)}, step=1)
    run.restore({"model": KerasState(restored)})
    kernels = [keras.ops.convert_to_numpy(keras.ops.cast(each.weights[0], "float32")) for each in (saved, restored)]
    assert kernels[0].tobytes() == kernels[1].tobytes()
    found = run.load(only="model.weights")
    assert str(next(iter(found.values())).dtype).endswith("float32" if dtype == "mixed_bfloat16" else dtype)


def test_functions_of_keras_random_draw_what_they_would_have_drawn(run: ckptstore.Run) -> None:
    def drawn() -> bytes:
        return bytes(np.asarray(keras.ops.convert_to_numpy(keras.random.normal((4,)))).tobytes())

    drawn()
    run.save({"rng": KerasRngState()}, step=1)
    wanted = drawn(), np.random.rand(), drawn()
    run.restore({"rng": KerasRngState()})
    assert (drawn(), np.random.rand(), drawn()) == wanted


# ---- what fits


def test_a_model_made_anew_in_the_same_process_is_filled(run: ckptstore.Run) -> None:
    saved = dense_model()
    run.save({"model": KerasState(saved)}, step=1)
    restored = dense_model()
    assert [each.path for each in restored.weights] != [each.path for each in saved.weights]
    run.restore({"model": KerasState(restored)})
    assert values(restored.weights) == values(saved.weights)


def test_weights_alone_are_taken_from_a_training(run: ckptstore.Run) -> None:
    saved = dense_model()
    fit_dense(saved, CkptstoreBackup(run))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    run.restore({"model": KerasState(model, only=["weights"])})
    assert values(model.weights) == values(saved.weights)


def test_variables_of_one_name_are_told_apart(run: ckptstore.Run) -> None:
    class Twins(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.first = self.add_weight(shape=(2,), name="twin", initializer="ones")
            self.second = self.add_weight(shape=(2,), name="twin", initializer="zeros")

        def call(self, inputs: Any) -> Any:
            return inputs + self.first - self.second

    def model() -> keras.Model:
        return keras.Sequential([keras.Input((2,)), Twins(name="twins")], name="net")

    saved, restored = model(), model()
    saved.weights[1].assign([5.0, 6.0])
    run.save({"model": KerasState(saved)}, step=1)
    assert list(run.load(only="model.weights")) == ["net/twins/twin", "net/twins/twin#1"]
    run.restore({"model": KerasState(restored)})
    assert values(restored.weights) == values(saved.weights)


def test_all_that_differs_is_one_error_and_nothing_is_changed() -> None:
    def model(size: int, last: str) -> keras.Model:
        layers = [keras.layers.Dense(size, name="first"), keras.layers.Dense(1, name=last)]
        return keras.Sequential([keras.Input((3,)), *layers], name="net")

    saved = KerasState(model(4, "last")).state_dict()
    other = model(5, "last")
    before = values(other.weights)
    with pytest.raises(ckptstore.InvalidInputError) as error:
        KerasState(other).load_state_dict(saved)
    assert "net/first/kernel is float32 of (3, 5) here, and float32 of (3, 4) there" in str(error.value)
    assert "net/last/kernel is float32 of (5, 1) here" in str(error.value)
    assert values(other.weights) == before
    with pytest.raises(
        ckptstore.InvalidInputError, match=r"net/end/bias was not saved.*net/last/kernel was saved and is"
    ):
        KerasState(model(4, "end")).load_state_dict(saved)


def test_a_model_without_variables_is_refused(run: ckptstore.Run) -> None:
    model = keras.Sequential([keras.layers.Dense(2)], name="empty")
    with pytest.raises(ckptstore.InvalidInputError, match=r"'empty' has no variables yet.*keras\.Input"):
        run.save({"model": KerasState(model)}, step=1)


def test_the_state_of_a_model_that_was_not_compiled_lacks_the_optimizer() -> None:
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    with pytest.raises(ckptstore.InvalidInputError, match="no 'optimizer' in it"):
        KerasState(dense_model()).load_state_dict(KerasState(plain).state_dict())


def test_wrong_arguments_are_named(run: ckptstore.Run) -> None:
    with pytest.raises(ckptstore.InvalidInputError, match="not 'weight'"):
        KerasState(dense_model(), only=["weight"])  # type: ignore[list-item]
    for wrong in ("batch", 0, True):
        with pytest.raises(ckptstore.InvalidInputError, match="'epoch' or a number of batches"):
            CkptstoreBackup(run, save_freq=wrong)  # type: ignore[arg-type]


def test_a_failed_save_in_the_background_ends_fit_with_its_error(run: ckptstore.Run, tmp_path: Path) -> None:
    class Obstacle(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            (tmp_path / "store").write_bytes(b"a file in the store's place")

    with pytest.raises(ckptstore.UnavailableError):
        fit_dense(dense_model(), Obstacle(), CkptstoreBackup(run, background=True), epochs=1)


# ---- other backends, other orders


@pytest.mark.skipif(BACKEND != "tensorflow", reason="this is what runs them with PyTorch")
def test_these_tests_pass_with_pytorch_below_keras() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(Path(__file__))]
    result = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="once is enough")
@pytest.mark.parametrize("modules", [("torch", "tensorflow"), ("tensorflow", "torch")])
def test_torch_and_tensorflow_work_in_one_process(modules: tuple[str, str]) -> None:
    first, second = modules
    program = f"""
import {first}, {second}
import ckptstore.integrations.keras, ckptstore.integrations.tensorflow
assert float(torch.nn.LSTM(4, 4)(torch.ones(2, 3, 4))[0].shape[0]) == 2
assert float(tensorflow.reduce_sum(tensorflow.matmul(tensorflow.ones((9, 9)), tensorflow.ones((9, 9))))) == 729
"""
    subprocess.run([sys.executable, "-c", program], check=True)
