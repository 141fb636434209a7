"""The model: words in, scores of the next word out. Knows nothing of text, training or checkpoints."""

from typing import cast

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]
"""What an LSTM remembers between batches: hidden and cell state, each of (1, batch, hidden_size)."""


class LanguageModel(nn.Module):
    def __init__(
        self, vocab_size: int = 10_000, embed_size: int = 300, hidden_size: int = 500, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Words of (batch, time) -> logits of (batch, time, vocab_size), and the state after the last word."""
        outputs, state = self.lstm(self.dropout(self.embedding(words)), state)
        return cast(Tensor, self.linear(self.dropout(outputs))), state

    def initial_state(self, batch_size: int) -> State:
        shape = (1, batch_size, self.lstm.hidden_size)
        device = self.linear.weight.device
        return torch.zeros(shape, device=device), torch.zeros(shape, device=device)
