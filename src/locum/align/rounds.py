"""Rounds: methods that make their own data sample, label and train, again and again.

A `Round` is what a method may use to make its next examples: the policy as it is now, its frozen models, a sampler and a
labeller. It is the same for a language model (`locum.align.driver.run_rounds`) and for a table policy (`table_round`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.align.base import Example, PairBatch, Signal
from locum.align.statistics import Scorer, token_log_probs, token_signals

__all__ = ["Online", "Round"]

Sampler = Callable[[Sequence[Example], float, torch.Generator], list[Example]]
Labeller = Callable[[Sequence[Example]], list[float]]


@dataclass(frozen=True, eq=False)
class Round:
    """What a method may use in one round.

    Args:
        index: the round's number, from 0.
        scorers: "policy", and the method's frozen models by name.
        sampler: (examples, temperature, generator) -> the examples with "response_ids", one response of the current
            policy each (temperature 0: greedy), and "truncated": true where it did not end by itself.
        labeller: a score per example for its "response_ids"; higher is better. None where there is none.
        generator: the round's randomness.
        signal: the method's signal, if it has one.
        pad_id: fills up batches.
        batch_size: rows scored at a time.
        move: puts a batch on the models' device.
        logs: what the method measured while it made its examples; it writes here.
    """

    index: int
    scorers: Mapping[str, Scorer]
    sampler: Sampler
    labeller: Labeller | None
    generator: torch.Generator
    signal: Signal | None = None
    pad_id: int = 0
    batch_size: int = 16
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch
    logs: dict[str, float] = field(default_factory=dict)

    def sample(self, prompts: Sequence[Example], temperature: float = 1.0) -> list[Example]:
        """The prompts with one response of the current policy each, in "response_ids"."""
        return self.sampler(prompts, temperature, self.generator)

    def log_probs(self, model: str, examples: Sequence[Example], block: str = "response") -> list[Float[Tensor, " _"]]:
        """log p of each response token under one of the models, one tensor per example."""
        return token_log_probs(self.scorers[model], examples, block, self.pad_id, self.batch_size, self.move)

    def signals(self, examples: Sequence[Example], block: str = "response") -> list[dict[str, Float[Tensor, " _"]]]:
        """The signal's columns of each response, one dict per example, and "logp_ref"; empty without a signal."""
        if self.signal is None:
            return [{} for _ in examples]
        ref = self.scorers["ref"]
        return token_signals(self.signal, ref, examples, block, self.pad_id, self.batch_size, self.move)


class Online(ABC):
    """A method that makes its own data: in rounds, from the policy as it is then.

    `renews_reference`: the policy at a round's start is that round's reference.
    """

    renews_reference: ClassVar[bool] = False

    @property
    def needs_labeller(self) -> bool:
        """Whether responses must be scored by somebody."""
        return False

    @abstractmethod
    def collect(self, round: Round, prompts: Sequence[Example]) -> list[Example]:
        """The examples to train on in this round, one or more for each prompt that can be used."""
