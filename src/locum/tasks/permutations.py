"""Permutations: a text of six symbols, each once, for models that fill in texts from masks.

A small transformer that sees in both directions is trained by masked diffusion on permutations of which a share of the symbols
was replaced by random ones. It then fills in a permutation about every other time. What it has to learn is joint: every
symbol is as likely at every place, so the places one by one say nothing of which texts are right.

    right   2 0 5 1 4 3      wrong   2 0 5 1 4 0
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from locum.method import require
from locum.models.diffusion import MaskedDiffusion
from locum.tokens.logprobs import positions
from locum.tokens.rollouts import uniforms

__all__ = ["Bidirectional", "Permutations", "pretrained", "untrained", "valid_share"]

BATCH, RATE = 128, 2e-3  # of the warm start


@dataclass(frozen=True)
class Permutations:
    """The task, and how noisy the texts are that models are warmed up on.

    Ids are the symbols 0..symbols-1, then the one token of the prompt, then the mask.

    Args:
        symbols: how many, and how long a text is; >= 2.
        noise: share of a text's symbols that are replaced by uniform ones, in [0, 1].
        warm_steps: steps of the warm start, >= 0.
    """

    symbols: int = 6
    noise: float = 0.3
    warm_steps: int = 1200

    def __post_init__(self) -> None:
        require(self, "symbols", self.symbols >= 2, ">= 2")
        require(self, "noise", 0 <= self.noise <= 1, "in [0, 1]")
        require(self, "warm_steps", self.warm_steps >= 0, ">= 0")

    @property
    def prompt(self) -> list[int]:
        """The same for every text."""
        return [self.symbols]

    @property
    def mask_id(self) -> int:
        return self.symbols + 1

    def right(self, ids: Int[Tensor, "n symbols"]) -> Bool[Tensor, " n"]:
        """Whether each symbol comes once."""
        return (ids.sort(-1).values == torch.arange(self.symbols, device=ids.device)).all(-1)

    def score(self, completion: Sequence[int]) -> float:
        """1 for a permutation, else 0."""
        return float(sorted(completion) == list(range(self.symbols)))

    def texts(self, n: int, generator: torch.Generator) -> Int[Tensor, "n symbols"]:
        """Permutations with noise."""
        ids = torch.rand(n, self.symbols, generator=generator).argsort(-1)
        replaced = torch.rand(ids.shape, generator=generator) < self.noise
        return torch.where(replaced, torch.randint(self.symbols, ids.shape, generator=generator), ids)


class Bidirectional(nn.Module):
    """A small transformer that sees the whole text; positions count from the first real token.

    Args:
        vocab: ids it reads; it says those below `says`.
        says: width of the logits.
        length: most tokens of a text.
        width, heads, layers: its size.
    """

    def __init__(self, vocab: int, says: int, length: int, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.token, self.place = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "between": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, says)

    def forward(
        self, ids: Int[Tensor, "rows length"], attention_mask: Shaped[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length says"]:
        """Logits of every place."""
        seen = attention_mask.bool()[:, None, None]
        x = self.token(ids) + self.place(positions(attention_mask))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = block["qkv"](block["before"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["between"](x))))
        return self.head(self.norm(x))


def untrained(seed: int, task: Permutations) -> MaskedDiffusion:
    """A fresh model."""
    return MaskedDiffusion(_fresh(seed, task), task.mask_id)


def pretrained(seed: int, task: Permutations) -> MaskedDiffusion:
    """A model warmed up on noisy permutations by masked diffusion. Each call gives a copy of its own."""
    return MaskedDiffusion(copy.deepcopy(_pretrained(seed, task)), task.mask_id)


def _fresh(seed: int, task: Permutations) -> Bidirectional:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bidirectional(task.symbols + 2, task.symbols, task.symbols + 1)


@functools.cache
def _pretrained(seed: int, task: Permutations) -> Bidirectional:
    n, g, model = task.symbols, torch.Generator().manual_seed(seed), _fresh(seed, task)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / task.warm_steps)
    prompt = torch.tensor(task.prompt).expand(BATCH, -1)
    real = torch.ones(BATCH, n + 1, dtype=torch.bool)
    for _ in range(task.warm_steps):
        ids = task.texts(BATCH, g)
        # k of n places hidden, k uniform: the bound's own law of masks, each hidden token with weight n/k.
        k = torch.randint(1, n + 1, (BATCH, 1), generator=g)
        hidden = torch.rand(ids.shape, generator=g).argsort(-1).argsort(-1) < k
        logits = model(torch.cat([prompt, ids.masked_fill(hidden, task.mask_id)], 1), real)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        optimizer.zero_grad()
        (loss * hidden / k).sum(-1).mean().backward()
        optimizer.step()
        falling.step()
    return model


def valid_share(policy: MaskedDiffusion, task: Permutations, n: int = 2048, seed: int = 0) -> float:
    """The share of permutations among n texts filled in one token per step at temperature 1."""
    made = policy.generate([task.prompt], n, [task.symbols], uniforms(seed, torch.arange(n), 2))
    return task.right(made.ids).double().mean().item()
