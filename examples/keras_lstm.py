"""The language model of trainer/ in Keras: an LSTM on the King James Bible, its training saved in a store.

python examples/keras_lstm.py --store ./ckpts

Kill it at any moment and start it again: it ends with the same weights, optimizer and losses as if it had not been
killed. What a batch leaves in the LSTM is where the next one begins, so that is saved as well.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import ckptstore
from ckptstore.integrations.keras import CkptstoreBackup
from trainer.data import Vocabulary, read_text, tokenize


def batches(numbers: "np.ndarray[Any, Any]", batch_size: int, bptt: int) -> tuple[Any, Any]:
    """Words and the words that follow them, in rows: row i of one batch goes on in row i of the next."""
    steps = (len(numbers) - 1) // (batch_size * bptt)
    columns = [numbers[start:][: batch_size * steps * bptt].reshape(batch_size, steps, bptt) for start in (0, 1)]
    inputs, targets = (column.swapaxes(0, 1).reshape(-1, bptt) for column in columns)
    return inputs, targets


def language_model(options: argparse.Namespace) -> keras.Model:
    """Embedding, LSTM, linear layer; Adam."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(options.batch_size, options.bptt), dtype="int32"),
            keras.layers.Embedding(options.vocab_size, options.embed_size),
            keras.layers.Dropout(0.1),
            keras.layers.LSTM(options.hidden_size, return_sequences=True, stateful=True, name="lstm"),
            keras.layers.Dense(options.vocab_size),
        ]
    )
    model.compile(
        keras.optimizers.Adam(1e-2, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # so small a training is over before it would pay
    )
    return model


class FromTheBeginning(keras.callbacks.Callback):
    """An epoch begins with the text, and with nothing remembered."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Forget."""
        self.model.get_layer("lstm").reset_states()


class Losses(keras.callbacks.Callback):
    """Writes the loss after each batch, as Keras counts it: the mean since the epoch began."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note of the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": self.epoch, "batch": batch, "loss": logs["loss"]}) + "\n")


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="./ckpts")
    parser.add_argument("--run", default="keras-lstm")
    parser.add_argument("--text", type=Path, nargs="+", default=(), help="text files in place of the Bible")
    parser.add_argument("--words", type=int, default=20_000, help="so many of the text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=40, metavar="BATCHES")
    parser.add_argument("--background", action="store_true", help="save in the background")
    parser.add_argument("--losses", type=Path, help="append each batch's loss to this file")
    for name, size in {"vocab-size": 1000, "embed-size": 24, "hidden-size": 32, "batch-size": 10, "bptt": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()

    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()  # the same numbers through the same kernels, in the same order
    words = tokenize(read_text(options.text))[: options.words]
    numbers = np.array(Vocabulary(words, options.vocab_size).encode(words), np.int32)
    inputs, targets = batches(numbers, options.batch_size, options.bptt)
    model = language_model(options)
    run = ckptstore.Store(options.store).run(options.run)
    # The backup comes last: it saves, and puts back, what the others have changed.
    backup = CkptstoreBackup(run, save_freq=options.save_every, background=options.background)
    losses = [Losses(options.losses)] if options.losses else []
    model.fit(
        inputs,
        targets,
        batch_size=options.batch_size,
        shuffle=False,
        epochs=options.epochs,
        verbose=0,
        callbacks=[FromTheBeginning(), *losses, backup],
    )
    print(run.latest())


if __name__ == "__main__":
    main()
