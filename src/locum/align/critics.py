"""Critics: what a policy may still expect from a state on, learned beside it. They give the column "value" to a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locum.align.base import PairBatch, Signal
from locum.tokens.tiles import Scores

__all__ = ["Critic", "TableCritic"]


def _same(x: Tensor) -> Tensor:
    return x


class Critic(Signal):
    """A small head on the reference's last hidden state: one hidden layer as wide as that; says 0 before it is trained.

    Args:
        hidden_size: of the reference.
        lr: the head's own learning rate.
    """

    taps: Mapping[str, Any] = {"last": _same}

    def __init__(self, hidden_size: int, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        end = nn.Linear(hidden_size, 1)
        nn.init.zeros_(end.weight)
        nn.init.zeros_(end.bias)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU(), end)

    def forward(self, ref: Scores, batch: PairBatch) -> dict[str, Float[Tensor, " n"]]:
        hidden = ref.taps["last"][-1]
        return {"value": self.head(hidden.to(next(self.parameters()).dtype))[:, 0]}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return super().groups(self.lr)


class TableCritic(Signal):
    """One value per prompt, position and previous token: the critic of a table policy (`locum.align.table`).

    Args:
        prompts, length, vocab: of the MDP.
        lr: its own learning rate.
    """

    def __init__(self, prompts: int, length: int, vocab: int, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.values = nn.Parameter(torch.zeros(prompts, length, vocab, dtype=torch.float64))

    def forward(self, ref: Scores, batch: PairBatch) -> dict[str, Float[Tensor, " n"]]:
        prompt, y = batch.ids[:, :1], batch.ids[:, 1:]
        previous = torch.cat([torch.zeros_like(prompt), y[:, :-1]], 1)
        return {"value": self.values[prompt, torch.arange(y.shape[1]), previous][batch.mask]}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return super().groups(self.lr)
