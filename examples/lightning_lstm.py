"""A character LSTM trained by PyTorch Lightning, with its checkpoints in a store. Kill it, and start it again.

python examples/lightning_lstm.py --store ./ckpts
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import ckptstore
from ckptstore.integrations.lightning import CkptstoreIO

WINDOW = 32


def windows(text: str) -> TensorDataset:
    """Inputs and targets: each window of the text, and the same one a character later."""
    numbers = torch.tensor([ord(letter) % 128 for letter in text])
    rows = numbers[: (len(numbers) - 1) // WINDOW * WINDOW + 1]
    return TensorDataset(rows[:-1].view(-1, WINDOW), rows[1:].view(-1, WINDOW))


class CharacterModel(LightningModule):
    """Embedding, LSTM, linear layer."""

    def __init__(self, hidden_size: int = 48, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.embedding = torch.nn.Embedding(128, 16)
        self.lstm = torch.nn.LSTM(16, hidden_size, batch_first=True)
        self.dropout = torch.nn.Dropout(0.1)
        self.linear = torch.nn.Linear(hidden_size, 128)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits over the next character."""
        hidden, _ = self.lstm(self.embedding(inputs))
        logits: torch.Tensor = self.linear(self.dropout(hidden))
        return logits

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross entropy of a batch."""
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        """One step of the training."""
        return self.loss(batch)

    def validation_step(self, batch: list[torch.Tensor], batch_index: int) -> None:
        """Log the loss that ModelCheckpoint looks at."""
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> dict[str, object]:
        """Adam, with a learning rate that falls every epoch."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Generators(Callback):
    """Lightning saves no generators of random numbers; with them, a resumed training draws what it would have drawn."""

    def state_dict(self) -> dict[str, Any]:
        """Python's, NumPy's and torch's."""
        return ckptstore.RngState().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        ckptstore.RngState().load_state_dict(state_dict)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="./ckpts")
    parser.add_argument("--run", default="lightning-lstm")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--background", action="store_true", help="save in the background")
    options = parser.parse_args()

    seed_everything(1)
    data = windows(options.text.read_text(encoding="utf-8"))
    io = CkptstoreIO(options.store, options.run, background=options.background)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        plugins=[io],
        callbacks=[
            Generators(),
            ModelCheckpoint(dirpath="checkpoints", monitor="val_loss", save_top_k=2, save_last=True),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        CharacterModel(),
        DataLoader(data, batch_size=8, shuffle=True),
        DataLoader(data, batch_size=32),
        ckpt_path=io.latest(),
    )
    print(f"finished at step {trainer.global_step}, val_loss {float(trainer.callback_metrics['val_loss']):.4f}")
    print("\n".join(io.paths()))


if __name__ == "__main__":
    main()
