"""A character GRU trained in a loop with Accelerate, with its checkpoints in a store. Kill it, and start it again.

python examples/accelerate_gru.py --store ./ckpts
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import ckptstore
from ckptstore.integrations.accelerate import load_state, save_state

WINDOW = 32


class CharacterModel(torch.nn.Module):
    """Embedding, GRU, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 16)
        self.gru = torch.nn.GRU(16, 48, batch_first=True)
        self.linear = torch.nn.Linear(48, 128)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits over the next character."""
        hidden, _ = self.gru(self.embedding(inputs))
        logits: torch.Tensor = self.linear(hidden)
        return logits


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="./ckpts")
    parser.add_argument("--run", default="accelerate-gru")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    set_seed(1, device_specific=True)
    text = torch.tensor([ord(letter) % 128 for letter in options.text.read_text(encoding="utf-8")])
    model = CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    run = ckptstore.Store(options.store).run(options.run)
    checkpoint = load_state(accelerator, run)
    first = checkpoint.step if checkpoint else 0
    accelerator.print(f"beginning at step {first}")
    for step in range(first + 1, options.steps + 1):
        # Where the windows begin is drawn from torch's generator, which Accelerate saves with the rest.
        begins = torch.randint(len(text) - WINDOW - 1, (8,))
        rows = torch.stack([text[begin : begin + WINDOW + 1] for begin in begins])
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            save_state(accelerator, run, step=step, metrics={"loss": loss.item()})
    accelerator.print(f"finished at step {options.steps}, loss {loss.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
