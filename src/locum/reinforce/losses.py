"""From log-probabilities to one number: ratio, clip, aggregate, and the KL penalty.

    token ratio      r[i,t] = pi/old of the token                                                             (arXiv 1707.06347)
    sequence ratio   s[i,t] = sg(s_i) pi/sg(pi) of the token,  s_i = exp(mean_t log pi/old)                   (arXiv 2507.18071)
    clip             l = -min(r A, clip(r, 1-low, 1+high) A);  with a dual bound c, where A < 0, at most -c A (arXiv 1912.09729)
    KL               k3 = exp(ref - logp) - (ref - logp) - 1

The sequence ratio has the value s_i in every token and the gradient s_i grad log pi(y_t), so that advantages may differ
between tokens; where they do not it is GSPO's. With k kept tokens, w weights, m all tokens of a completion:

    SequenceMean   mean over rows with a kept token of (sum_t k w l / sum_t k)       GRPO, GSPO
    TokenMean      sum k w l / sum k over the optimiser's whole batch                DAPO
    Constant       sum k w l / (rows x length), the length fixed for a run           Dr.GRPO
    SequenceSum    mean over rows of sum_t k w l

Weights stay out of the denominators. Denominators are those of the optimiser's whole batch, whatever it is split into.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.method import require
from locum.reinforce.base import Aggregate, Bound, Mask, Penalty, PerToken, Ratio, Run, Stage
from locum.tokens.logprobs import masked_mean
from locum.tokens.rollouts import Rollouts

__all__ = ["KL", "Clip", "Constant", "SequenceMean", "SequenceRatio", "SequenceSum", "TokenMean", "TokenRatio"]

PerRow = Float[Tensor, " rows"]
INF = float("inf")


@dataclass(frozen=True)
class TokenRatio(Ratio):
    """pi/old of each token.

    Args:
        limit: a log-ratio beyond it, in nats, is cut; > 0.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        require(self, "limit", self.limit > 0, "> 0")

    def __call__(self, logp: PerToken, old_logp: PerToken, mask: Mask) -> PerToken:
        return (logp - old_logp).clamp(-self.limit, self.limit).exp()


@dataclass(frozen=True)
class SequenceRatio(Ratio):
    """GSPO's: exp of the mean log-ratio over all tokens of a completion, selected or not.

    Args:
        limit: a mean log-ratio beyond it, in nats, is cut; > 0.
    """

    limit: float = 20.0

    def __post_init__(self) -> None:
        require(self, "limit", self.limit > 0, "> 0")

    def __call__(self, logp: PerToken, old_logp: PerToken, mask: Mask) -> PerToken:
        s = masked_mean(logp.detach() - old_logp, mask).clamp(-self.limit, self.limit).exp()
        return s[:, None] * (logp - logp.detach()).exp()


@dataclass(frozen=True)
class Clip(Stage):
    """No gain beyond the bounds, and so no gradient there.

    Args:
        low: how far a ratio may go below 1; >= 0, inf for no bound.
        high: how far it may go above 1; likewise.
        dual: the most that a ratio may cost where the advantage is negative, > 1; None for no bound.
        patience: a batch whose mean ratio exceeds it is passed over; None never.
    """

    slot: ClassVar[str] = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    patience: float | None = None

    def __post_init__(self) -> None:
        require(self, "low", self.low >= 0, ">= 0")
        require(self, "high", self.high >= 0, ">= 0")
        require(self, "dual", self.dual is None or self.dual > 1, "> 1 or None")
        require(self, "patience", self.patience is None or self.patience > 1, "> 1 or None")

    def __call__(self, ratio: PerToken, advantages: PerToken, low: Bound, high: Bound) -> PerToken:
        """The loss of each token; bounds are numbers or one per token."""
        least, most = (torch.as_tensor(x, dtype=ratio.dtype, device=ratio.device) for x in (1 - low, 1 + high))
        loss = -torch.minimum(ratio * advantages, ratio.clamp(least, most) * advantages)
        if self.dual is not None:
            loss = torch.where(advantages < 0, loss.minimum(-self.dual * advantages), loss)
        return loss


@dataclass(frozen=True)
class SequenceMean(Aggregate):
    """Every row counts the same."""

    def rows(self, loss: PerToken, counted: PerToken) -> PerRow:
        return loss.sum(-1) / _or_one(counted.sum(-1))

    def count(self, counted: PerToken, run: Run) -> PerRow:
        return counted.any(-1).to(counted.dtype)


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """Every token counts the same."""

    def rows(self, loss: PerToken, counted: PerToken) -> PerRow:
        return loss.sum(-1)

    def count(self, counted: PerToken, run: Run) -> PerRow:
        return counted.sum(-1)


@dataclass(frozen=True)
class Constant(Aggregate):
    """Every token counts the same, whatever the lengths are.

    Args:
        length: what each row counts, >= 1; None for the most tokens that a completion of the run may have.
    """

    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "length", self.length is None or self.length >= 1, ">= 1 or None")

    def rows(self, loss: PerToken, counted: PerToken) -> PerRow:
        return loss.sum(-1)

    def count(self, counted: PerToken, run: Run) -> PerRow:
        return counted.any(-1) * float(run.room if self.length is None else self.length)


@dataclass(frozen=True)
class SequenceSum(Aggregate):
    """The mean over rows of what their tokens sum to."""

    def rows(self, loss: PerToken, counted: PerToken) -> PerRow:
        return loss.sum(-1)

    def count(self, counted: PerToken, run: Run) -> PerRow:
        return counted.any(-1).to(counted.dtype)


@dataclass(frozen=True)
class KL(Penalty):
    """beta k3 of each token: towards the reference, an unbiased and never negative estimate of KL(pi || ref).

    Args:
        beta: weight, >= 0; 0 asks for no reference.
        corrected: multiply by the ratio, so that the gradient too is that of KL(pi || ref) (TRL's default).
    """

    beta: float = 0.04
    corrected: bool = False

    def __post_init__(self) -> None:
        require(self, "beta", 0 <= self.beta < INF, "finite and >= 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"}) if self.beta else frozenset()

    def __call__(self, logp: PerToken, ratio: PerToken, rollouts: Rollouts) -> PerToken:
        if not self.beta:
            return torch.zeros_like(logp)
        gap = (rollouts.columns["ref_logp"] - logp).clamp(-20, 20)
        return self.beta * (gap.exp() - gap - 1) * (ratio if self.corrected else 1.0)


def _or_one(x: PerRow) -> PerRow:
    return torch.where(x == 0, 1.0, x)
