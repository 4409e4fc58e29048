"""TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization

Expensive: PPO with a reward model that scores every token.
Stands in: DPO whose strength varies by token, following the implicit reward of a frozen earlier model.
Check: Zero guidance gives DPO exactly, the gradient has its closed form, and shuffled guidance loses the gain.

A frozen guide g (an earlier DPO run, or any model of the same vocabulary) says what each token is worth, and a token with
a high worth counts more where it was preferred and less where it was rejected. With d_t = log pi/ref (y_t|s_t), w the
chosen and l the rejected response:

    r_t = beta_g [ log g(y_t|s_t) - log ref(y_t|s_t) ]                 no gradient
    L   = -log sigmoid( beta [ sum_t (1 + alpha r_t) d_t (w) - sum_t (1 - alpha r_t) d_t (l) ] )

and with c = beta sigmoid(-z) the gradient is -c [ sum_t (1 + alpha r_t) dlog pi (w) - sum_t (1 - alpha r_t) dlog pi (l) ].

Where it comes from: PPO's objective is bounded by a sum over tokens of E[ r/beta - log pi/ref ]. With beta f(r_t) in the
place of beta a token's optimum is ref exp(r / (beta f)) / Z, so that its reward is beta f (log pi/ref + log Z). The log Z
do not cancel when the f differ; leaving them out is part of the method.

Two ways to the same loss. `GuideReward.annotate` writes r once into the data, column "r_hat", and training needs neither
guide nor, with the column "logp_ref", reference: one forward and one backward. `OnlineTGDPO` scores the guide with every
batch: one forward more than DPO. Any other reward per token can be the column as well, that of `locum.align.treg` too.

Shapes: d, r and mask [2B, L-1], chosen rows first; d and r in nats (r times beta_g). Sums over tokens, never means. From a
guide only alpha beta_g matters.

Traps. Rejected responses have 1 - alpha r: with 1 + alpha r on both sides it is another, worse method. The whole ratio
is weighted, the reference's part too. A weight may be 0 or negative where alpha |r| >= 1: that is the authors' loss; it
warns and is logged ("weights/not_positive"). A guide made from the same few pairs helps per step, not per nat of KL.

Example:
    >>> import torch
    >>> from locum.align import DPO, TGDPO, TokenStats
    >>> d = torch.tensor([[0.4, -0.2], [0.1, 0.3]])  # chosen, rejected
    >>> r_hat = torch.tensor([[0.5, -0.5], [1.0, -1.0]])
    >>> s = TokenStats(d, torch.ones(2, 2, dtype=torch.bool), columns={"r_hat": r_hat})
    >>> [round(loss(s)[0].item(), 4) for loss in (DPO(beta=0.5), TGDPO(beta=0.5))]
    [0.7444, 0.7314]

Authors: Zhu, Chen, Wang, Yu, Zhao, Jia
Year: 2025
Venue: ICML 2025
arXiv: 2506.14574
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locum.align.base import AlignLoss, Example, Logs, PairBatch, PerToken, TokenStats
from locum.align.signals import R_HAT, TokenSignal
from locum.align.statistics import ModelScorer, Scorer, token_values
from locum.method import require
from locum.models import LM, require_same_vocabulary
from locum.tokens.tiles import Tile, log_prob

__all__ = ["TGDPO", "GuideReward", "OnlineTGDPO", "guide_reward"]


@dataclass(frozen=True)
class TGDPO(AlignLoss):
    """DPO with token weights 1 + alpha r on the chosen and 1 - alpha r on the rejected response. Reads the column "r_hat".

    Another pair of weights is a subclass with its own `weights`.

    Args:
        beta: pull towards the reference, > 0. Paper 0.1.
        alpha: how much the guidance counts, >= 0; 0 is DPO. Paper 0.5; 1 and 2 converge faster.
        min_weight: weights below it are raised to it; None leaves all as they are, negative ones too. Paper None.
    """

    alpha: float = 0.5
    min_weight: float | None = None
    columns: ClassVar[tuple[str, ...]] = (R_HAT,)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 <= self.alpha < inf, "finite and >= 0")
        low = self.min_weight
        require(self, "min_weight", low is None or 0 <= low <= 1, "None or in [0, 1]")

    def rewards(self, s: TokenStats) -> PerToken:
        """r, the guidance."""
        return s.columns[R_HAT]

    def weights(self, s: TokenStats) -> PerToken:
        """What each token of the batch counts: 1 + alpha r, 1 - alpha r in rejected responses."""
        r = self.rewards(s).detach()
        w = 1 + self.alpha * torch.where(s.is_chosen, r, -r)
        return w if self.min_weight is None else w.clamp(min=self.min_weight)

    def score(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        return self.weights(s).to(s.d.dtype) * s.d

    def logs(self, s: TokenStats) -> Logs:
        assert s.d is not None
        w = self.weights(s)[s.mask]
        share = (w <= 0).to(w.dtype).mean()
        if share > 0:
            warnings.warn(
                f"{type(self).__name__}: some tokens weigh 0 or less, 'weights/not_positive' logs how many; "
                "a smaller alpha or min_weight prevents it",
                stacklevel=2,
            )
        plain = dict(
            zip(
                ("rewards/plain_chosen", "rewards/plain_rejected"),
                (self.beta * x.mean() for x in s.sums(s.d)),
                strict=False,
            )
        )
        return plain | {
            "weights/min": w.min(),
            "weights/mean": w.mean(),
            "weights/max": w.max(),
            "weights/not_positive": share,
        }


@dataclass(frozen=True)
class OnlineTGDPO(TGDPO):
    """TGDPO with the guide scored beside every batch, as the frozen model "guide".

    Args:
        beta: pull towards the reference, > 0. Paper 0.1.
        alpha: how much the guidance counts, >= 0; 0 is DPO. Paper 0.5.
        min_weight: weights below it are raised to it; None leaves all as they are. Paper None.
        beta_g: scale of the guide's reward, > 0; None is beta, as in the authors' code. Paper: the guide's own beta.
    """

    beta_g: float | None = None
    columns: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "beta_g", self.beta_g is None or 0 < self.beta_g < inf, "None, or finite and > 0")

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("ref", "guide")

    def per_token(self, z: Mapping[str, Tile], ids: Int[Tensor, " r"]) -> Logs:
        return super().per_token(z, ids) | {"logp_guide": log_prob(z["guide"], ids)}

    def rewards(self, s: TokenStats) -> PerToken:
        assert s.d is not None
        assert s.logp is not None
        logp_ref = s.logp - s.d
        return (self.beta if self.beta_g is None else self.beta_g) * (s.columns["logp_guide"] - logp_ref)


def guide_reward(guide: Tile, ref: Tile, ids: Int[Tensor, " r"], beta: float) -> Float[Tensor, " r"]:
    """beta log g/ref of each token, from logits [r, V]."""
    return beta * (log_prob(guide, ids) - log_prob(ref, ids))


@dataclass(frozen=True, eq=False)
class GuideReward(TokenSignal):
    """r of response tokens from a guide and the reference: the column "r_hat" of `TGDPO`.

    Args:
        guide, ref: the frozen models, of one vocabulary.
        beta: scale, beta_g in the paper, > 0: the guide's own beta, or the loss's. Paper 0.01 (the better guide) and 0.1.
        pad_id, batch_size, move: how responses are batched (`token_values`).
    """

    guide: Scorer
    ref: Scorer
    beta: float = 0.1
    pad_id: int = 0
    batch_size: int = 16
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch
    column: ClassVar[str] = R_HAT

    def __post_init__(self) -> None:
        require(self, "beta", 0 < self.beta < inf, "finite and > 0")

    @classmethod
    def of(cls, guide: LM, ref: LM, beta: float = 0.1, batch_size: int = 16) -> "GuideReward":
        """From two language models.

        Raises: UserError if their tokens are not the same.
        """
        require_same_vocabulary(ref, guide, "guide")
        return cls(
            ModelScorer(guide.model), ModelScorer(ref.model), beta, 0, batch_size, lambda batch: batch.to(ref.device)
        )

    def values(self, examples: Sequence[Example], block: str) -> list[Float[Tensor, " _"]]:
        reward = partial(guide_reward, beta=self.beta)
        return token_values(reward, [self.guide, self.ref], examples, block, self.pad_id, self.batch_size, self.move)
