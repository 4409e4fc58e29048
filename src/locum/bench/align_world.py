"""What all methods have in common on the tables, for one seed, and what one of them is trained with beyond it.

A world is one seed's MDP (`TableMDP.scored`), its pairs and the budget: every method has the same pairs, steps, batches,
optimizer and start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from locum.align.base import Example, Method, PairBatch, Signal
from locum.align.signals import TokenSignal
from locum.align.statistics import Scorer
from locum.align.table import Curve, TableScorer, fit, response_batch, train
from locum.method import names
from locum.tasks.token_mdp import Pairs, TableMDP

__all__ = ["PAIRS", "POINTS", "Setup", "World"]

PAIRS, HELD_OUT = 3000, 1000
POINTS = 40  # exact measurements along a training

Table = Float64[Tensor, "P H V V"]
BatchOf = Callable[[int, Tensor], PairBatch]


@dataclass(frozen=True, eq=False)
class World:
    """What all methods have in common for one seed."""

    mdp: TableMDP
    pairs: Pairs
    held_out: Pairs
    seed: int
    steps: int
    batch_size: int
    lr: float
    beta: float

    @classmethod
    def of(cls, seed: int, steps: int, batch_size: int, lr: float, beta: float) -> "World":
        mdp, g = TableMDP.scored(seed), torch.Generator().manual_seed(10_000 + seed)
        return cls(mdp, mdp.pairs(PAIRS, g), mdp.pairs(HELD_OUT, g), seed, steps, batch_size, lr, beta)

    def make(self, name: str, **settings: Any) -> Method:
        """The method of a name, with the common beta where it has one."""
        cls = names("align")[name]
        common = {"beta": self.beta} if "beta" in {f.name for f in fields(cls)} else {}
        made: Method = cls(**common, **settings)
        return made

    def fit(self, method: Method, pairs: Pairs | None = None, **settings: Any) -> Curve:
        """A training with the common budget."""
        every = max(1, self.steps // POINTS)
        common: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "seed": self.seed}
        return fit(method, self.mdp, self.pairs if pairs is None else pairs, measure_every=every, **common, **settings)

    def train(self, method: Method, batch_of: BatchOf, **settings: Any) -> Curve:
        """A training with the common budget on other batches than pairs."""
        every = max(1, self.steps // POINTS)
        return train(method, self.mdp, batch_of, steps=self.steps, lr=self.lr, measure_every=every, **settings)

    def responses(self, y: Tensor) -> BatchOf:
        """Batches of one response each, in a random order."""
        g = torch.Generator().manual_seed(self.seed)

        def batch_of(step: int, logits: Tensor) -> PairBatch:
            rows = torch.randint(len(y), (self.batch_size,), generator=g)
            return response_batch(self.pairs.prompt[rows], y[rows])

        return batch_of

    def scorer(self, method: Method, **settings: Any) -> TableScorer:
        """The policy that a training ends with, as a frozen model."""
        return TableScorer(self.fit(method, **settings).logits)

    @property
    def reference(self) -> TableScorer:
        return TableScorer(self.mdp.ref_logits)

    @cached_property
    def examples(self) -> list[Example]:
        """The pairs as examples."""
        table = zip(self.pairs.prompt.tolist(), self.pairs.chosen.tolist(), self.pairs.rejected.tolist(), strict=True)
        return [{"prompt_ids": [x], "chosen_ids": w, "rejected_ids": other} for x, w, other in table]

    def rewards(self, y: Tensor, prompt: Tensor) -> Tensor:
        """The total reward of responses."""
        return self.mdp.along(self.mdp.reward, prompt, y).sum(-1)

    def label(self, examples: Sequence[Example]) -> list[float]:
        """The total reward of each example's response."""
        prompt, y = (torch.tensor([e[name] for e in examples]) for name in ("prompt_ids", "response_ids"))
        found: list[float] = self.rewards(y, prompt[:, 0]).tolist()
        return found

    def column(self, signal: TokenSignal) -> dict[str, Tensor]:
        """A signal's values as the column that `fit` takes."""
        blocks = (torch.stack(signal.values(self.examples, block)) for block in ("chosen", "rejected"))
        return {signal.column: torch.cat(list(blocks))}


@dataclass(frozen=True, eq=False)
class Setup:
    """What a method is trained with on a table.

    Args:
        method: with its parameters.
        note: what a reader must know of it, beyond its parameters.
        columns, frozen, signal, features: as `locum.align.table.fit` takes them.
        batch_of: makes the batches, for methods that are not trained on the pairs as they are.
    """

    method: Method
    note: str = ""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, Scorer] = field(default_factory=dict)
    signal: Signal | None = None
    features: tuple[Tensor, ...] = ()
    batch_of: BatchOf | None = None
