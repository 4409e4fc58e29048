"""Where rows come from and which are worth training on: flat groups, informative and finished ones, a price on length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locum.method import require
from locum.reinforce.base import Asked, Choice, Filter, PerToken, Run, Sample, Shape, Weigh
from locum.tokens.groups import group_stats
from locum.tokens.rollouts import Rollouts

__all__ = ["Finished", "Flat", "Informative", "Overlong"]


@dataclass(frozen=True)
class Flat(Sample):
    """Independent completions of each prompt: a prompt is a group.

    Args:
        group_size: completions of a prompt, >= 1. GRPO's paper 64; 8 to 16 is usual.
    """

    group_size: int = 8

    def __post_init__(self) -> None:
        require(self, "group_size", self.group_size >= 1, ">= 1")

    def __call__(self, ask: Asked, prompts: Sequence[Sequence[int]]) -> tuple[Rollouts, dict[str, float]]:
        rows, texts = self.answers(ask, prompts)
        rows = rows.with_reward(ask.reward(rows.group.tolist(), texts))
        return rows, {"sampled_tokens": float(rows.mask.sum())}

    def answers(self, ask: Asked, prompts: Sequence[Sequence[int]]) -> tuple[Rollouts, list[list[int]]]:
        """Completions that have no rewards yet, as rows and as token ids."""
        g = self.group_size
        numbers = (ask.numbers[:, None] * g + torch.arange(g)).flatten()
        made = ask.generate(prompts, g, [ask.room] * len(prompts), numbers)
        owner = torch.arange(len(prompts)).repeat_interleave(g)
        rows = Rollouts.of([prompts[i] for i in owner.tolist()], made, owner.to(made.ids.device))
        return rows.with_facts(prompt=rows.group), made.lists()


@dataclass(frozen=True)
class Informative(Filter):
    """Groups whose rewards differ (arXiv 2503.14476, eq. 11)."""

    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " rows"]:
        return ~group_stats(rollouts.reward, rollouts.group).level


@dataclass(frozen=True)
class Overlong(Shape):
    """A soft punishment of long completions (arXiv 2503.14476, eq. 13): 0 up to max_length - cache, -1 beyond max_length.

    Args:
        max_length: tokens, >= 1. Paper 20480.
        cache: over how many tokens the punishment grows, in 1..max_length. Paper 4096.
    """

    max_length: int = 20480
    cache: int = 4096

    def __post_init__(self) -> None:
        require(self, "max_length", self.max_length >= 1, ">= 1")
        require(self, "cache", 1 <= self.cache <= self.max_length, f"in 1..{self.max_length}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, " rows"]:
        over = (self.max_length - self.cache - rollouts.lengths.to(rollouts.reward.dtype)) / self.cache
        return torch.where(rollouts.lengths > self.max_length, -1.0, over.clamp(max=0.0))


@dataclass(frozen=True)
class Finished(Weigh):
    """Completions that ran into the limit are not trained on. They still count among their group's rewards.

    Without it a cut completion is trained on like any other: it has the reward of an answer that is not there.
    """

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        ended = rollouts.facts["ended"].bool()
        return Choice(keep=rollouts.mask & ended[:, None], logs={"finished_rows": ended.float().mean().item()})
