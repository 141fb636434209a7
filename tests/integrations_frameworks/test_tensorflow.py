"""TensorFlow's own objects, saved to a store and restored from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ckptstore
from ckptstore.integrations.tensorflow import TrackableState

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptstore.CheckpointWarning"),
]


class Net(tf.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.random.normal((3, size)))
        self.layers = [tf.Variable(tf.random.normal((size,))), {"scale": tf.Variable(tf.ones((), tf.bfloat16))}]
        self.tied = self.kernel

    def values(self) -> list[bytes]:
        return [variable.numpy().tobytes() for variable in self.variables]


@pytest.fixture
def run(tmp_path: Path) -> ckptstore.Run:
    return ckptstore.Store(tmp_path / "store").run("tiny")


def shuffled() -> Any:
    return tf.data.Dataset.range(100).shuffle(30, seed=4).repeat().batch(3).prefetch(2)


def test_variables_come_back_in_place(run: ckptstore.Run) -> None:
    saved = Net()
    run.save({"tf": TrackableState(net=saved)}, step=1)
    restored = Net()
    kernel = restored.kernel
    run.restore({"tf": TrackableState(net=restored)})
    assert restored.values() == saved.values()
    assert restored.kernel is kernel


def test_variables_are_arrays_by_their_paths(run: ckptstore.Run) -> None:
    net = Net()
    run.save({"tf": TrackableState(net=net)}, step=1)
    variables = run.load(only="tf.variables")
    assert list(variables) == ["net/kernel", "net/layers/0", "net/layers/1/scale"]
    assert isinstance(variables["net/kernel"], np.ndarray)
    assert variables["net/kernel"].tobytes() == net.kernel.numpy().tobytes()


def test_what_did_not_change_is_not_stored_again(run: ckptstore.Run) -> None:
    net = Net(size=30_000)
    first = run.save({"tf": TrackableState(net=net)}, step=1)
    net.layers[0].assign_add(tf.ones(30_000))
    second = run.save({"tf": TrackableState(net=net)}, step=2)
    assert 0 < second.new_bytes < first.new_bytes / 2


def test_a_variable_is_found_by_another_of_its_names(run: ckptstore.Run) -> None:
    class Other(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_first_name = self.kernel = tf.Variable(tf.zeros((2,)))

    saved = tf.Module()
    saved.kernel = tf.Variable([1.0, 2.0])
    run.save({"tf": TrackableState(net=saved)}, step=1)
    restored = Other()
    run.restore({"tf": TrackableState(net=restored)})
    assert restored.kernel.numpy().tolist() == [1.0, 2.0]


def test_a_variable_of_keras_and_the_one_within_are_saved_once(run: ckptstore.Run) -> None:
    import keras

    saved, restored = keras.Variable([1.0, 2.0]), keras.Variable([0.0, 0.0])
    run.save({"tf": TrackableState(outer=saved, inner=saved.value)}, step=1)
    assert list(run.load(only="tf.variables")) == ["outer"]
    run.restore({"tf": TrackableState(outer=restored, inner=restored.value)})
    assert restored.numpy().tolist() == [1.0, 2.0]


def test_a_generator_draws_what_it_would_have_drawn(run: ckptstore.Run) -> None:
    generator = tf.random.Generator.from_seed(1)
    generator.normal((3,))
    run.save({"tf": TrackableState(generator=generator)}, step=1)
    wanted = generator.normal((5,)).numpy()
    again = tf.random.Generator.from_seed(2)
    run.restore({"tf": TrackableState(generator=again)})
    assert again.normal((5,)).numpy().tobytes() == wanted.tobytes()


def test_an_iterator_goes_on_where_it_was(run: ckptstore.Run) -> None:
    iterator = iter(shuffled())
    for _ in range(40):
        next(iterator)
    run.save({"tf": TrackableState(data=iterator)}, step=1)
    wanted = [next(iterator).numpy().tolist() for _ in range(40)]
    again = iter(shuffled())
    run.restore({"tf": TrackableState(data=again)})
    assert [next(again).numpy().tolist() for _ in range(40)] == wanted


def test_saving_does_not_move_an_iterator(run: ckptstore.Run) -> None:
    saved, other = iter(shuffled()), iter(shuffled())
    run.save({"tf": TrackableState(data=saved)}, step=1)
    assert next(saved).numpy().tolist() == next(other).numpy().tolist()


def test_tables_and_texts_come_back(run: ckptstore.Run) -> None:
    def table() -> Any:
        return tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)

    words, names = table(), tf.Variable(["a", "bc"])
    words.insert(["x", "y"], [1, 2])
    run.save({"tf": TrackableState(words=words, names=names)}, step=1)
    other, others = table(), tf.Variable(["", ""])
    run.restore({"tf": TrackableState(words=other, names=others)})
    assert other.lookup(tf.constant(["x", "y", "z"])).numpy().tolist() == [1, 2, -1]
    assert others.numpy().tolist() == [b"a", b"bc"]


def test_all_that_differs_is_one_error_and_nothing_is_changed(run: ckptstore.Run) -> None:
    saved = TrackableState(net=Net(), gone=tf.Variable(1.0), other=tf.Variable(1.0))
    net = Net(size=5)
    before = net.values()
    destination = TrackableState(net=net, fresh=tf.Variable(1.0), other=tf.Variable(1))
    with pytest.raises(ckptstore.InvalidInputError) as error:
        destination.load_state_dict(saved.state_dict())
    for text in (
        "net/kernel is float32 of (3, 5) here, and float32 of (3, 4) there",
        "gone was saved and is not here",
        "fresh was not saved",
        "other is int32 of () here, and float32 of () there",
        "Nothing was changed",
    ):
        assert text in str(error.value)
    assert net.values() == before


def test_an_iterator_over_python_code_is_refused_by_name(run: ckptstore.Run) -> None:
    data = tf.data.Dataset.from_generator(lambda: iter(range(5)), output_signature=tf.TensorSpec((), tf.int32))
    with pytest.raises(ckptstore.InvalidInputError, match=r"data \(OwnedIterator\) cannot be saved"):
        run.save({"tf": TrackableState(data=iter(data))}, step=1)
    assert run.steps() == []


def test_an_iterator_of_another_pipeline_refuses_the_position(run: ckptstore.Run) -> None:
    run.save({"tf": TrackableState(data=iter(shuffled()))}, step=1)
    with pytest.raises(ckptstore.InvalidInputError, match=r"data \(OwnedIterator\) refuses what was saved"):
        run.restore({"tf": TrackableState(data=iter(tf.data.Dataset.range(100).batch(3)))})


def test_a_save_in_the_background_holds_what_was_there_when_it_began(run: ckptstore.Run) -> None:
    net = Net(size=3000)
    wanted = net.kernel.numpy().tobytes()
    pending = run.save_async({"tf": TrackableState(net=net)}, step=1)
    for _ in range(20):
        net.kernel.assign_add(tf.ones_like(net.kernel))
    pending.result()
    assert run.load(only="tf.variables")["net/kernel"].tobytes() == wanted


def test_what_tensorflow_does_not_track_is_refused() -> None:
    with pytest.raises(ValueError, match="trackable"):
        TrackableState(net=object())


def test_values_that_are_read_are_not_changed_by_later_steps() -> None:
    # They are TensorFlow's own memory; a save relies on that it is left alone.
    variable = tf.Variable(tf.zeros(1000))
    state = TrackableState(variable=variable).state_dict()

    @tf.function
    def step() -> None:
        variable.assign_add(tf.ones(1000))

    for _ in range(3):
        step()
    assert not state["variables"]["variable"].any()
    assert variable.numpy().all()
