"""Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models

Expensive: A learned critic that values every token.
Stands in: Monte-Carlo values at a few segment boundaries, from fresh or from shared rollouts.
Check: The values are unbiased, and advantages follow the exact ones of small chains better than GRPO's.

An answer y_1 .. y_L is cut into segments. s_t is the state before token t, V(s_t) the expected reward from there, R the
answer's own; all tokens of a segment, from t_k up to the next boundary, share

    A_k = V(s_{t_{k+1}}) - V(s_{t_k}),    R in the place of the V after the end

SPO-chain (`SPOChain`), for short answers. p_t is the probability with which y_t was said, at the temperature of the sampling:

    U = {t : p_t < rho},   t_k = U[0], U[interval], U[2 interval], ...
    V(s_{t_k}) = mean reward of n_mc texts that go on from s_{t_k}

Equal counts of candidates make the sum of their squares least, which is how the paper chooses among cuts. Tokens before U[0] belong
to no segment: A = 0. States that several answers of a prompt reach (the prompt itself, nearly always) are valued once.

SPO-tree (`SPOTree`), for long answers. A prompt gets b_0 segments of at most M tokens, each that has not ended b_1 more, and so
on; the last ones run to the end. V of a leaf is its reward, of an inner node the mean of its children's. An edge is a row: its
prefix all of its parent's text, its group the parent, its reward V(child), and

    norm "none"  A = V(child) - V(parent)                    (b-1)/b of the true difference on average
    norm "std"   that over the siblings' deviation           ddof 0, eps 1e-8
    norm "loo"   A = V(child) - mean of the other siblings'  ours: the true difference on average

"none" is short of it because the child is in its parent's mean. Edges with A = 0 are left out, after the statistics are made. One
depth without mask is GRPO with centred rewards.

Both then train on the tokens with p_t < rho alone (`SPOMask`), with advantages whitened over those of an optimiser's batch
(`SPOWhiten`: (A - mean)/sqrt(variance + 1e-8), as they are if the variance is below 1e-6), by the clipped loss per token.

Shapes: columns "cut" and "cut_value" [rows, tokens] in units of the reward, of which `SPOChainAdvantage` is a function. Cost: two
calls of the sampler for a chain, `depth` for a tree. Of the tokens sampled a chain has n_mc times the remaining length per
boundary; a full tree has M (b_0 + b_0 b_1 + b_0 b_1 b_2), 258 M for 258 edges, some 13 times fewer per advantage.

Traps. At equal sampled tokens GRPO on more answers has the better gradient of a batch: credit per segment pays where the update is
the dear part (`locum show spo` has figures). Texts go on from token ids: decoded and encoded again a prefix can be another one. As
the policy grows sure there are fewer candidates and segments: "spo/unsure_tokens" tells. The penalty KL is averaged like the
loss; the paper's is summed over tokens and averaged over rows: add kl(beta=1e-4) for the paper's weight. Its code keeps edges in a
buffer for later steps; here an edge is trained on in the step that it comes from.

Example:
    >>> import torch
    >>> from locum.reinforce.spo import segment_advantages
    >>> cut = torch.tensor([[True, False, False, False, True, False]])  # p = .5 .95 .6 .99 .7 .8, rho .9, every second candidate
    >>> value = torch.tensor([[0.25, 0.0, 0.0, 0.0, 0.75, 0.0]])  # V(s_1), V(s_5)
    >>> segment_advantages(cut, value, reward=torch.zeros(1), mask=torch.ones_like(cut)).tolist()
    [[0.5, 0.5, 0.5, 0.5, -0.75, -0.75]]

Authors: Guo, Xu, Liu, Ye, Qiu
Year: 2025
Venue: NeurIPS 2025
arXiv: 2505.23564
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locum.method import require
from locum.reinforce.advantages import GroupCentred, GroupNormalised, LeaveOneOut
from locum.reinforce.base import (
    Advantage,
    Choice,
    Composed,
    GroupAdvantage,
    Mask,
    Normalise,
    PerToken,
    Piece,
    Run,
    Stage,
    Weigh,
)
from locum.reinforce.losses import Clip, TokenMean, TokenRatio
from locum.reinforce.segments import SPOChainSample, SPOTreeSample, check, unsure
from locum.tokens.rollouts import Rollouts

__all__ = [
    "SPOChain",
    "SPOChainAdvantage",
    "SPODrop",
    "SPOMask",
    "SPOTree",
    "SPOTreeAdvantage",
    "SPOWhiten",
    "segment_advantages",
]

PerRow = Float[Tensor, " rows"]
NORMS: dict[str, GroupAdvantage] = {
    "none": GroupCentred(),
    "std": GroupNormalised(ddof=0, eps=1e-8),
    "loo": LeaveOneOut(),
}


@dataclass(frozen=True)
class _Segments(Piece):
    """What both variants set of their host."""

    @property
    def setting(self) -> tuple[Stage, ...]:
        return TokenMean(), Clip(0.2, 0.2, patience=10.0), TokenRatio(limit=10.0)


@dataclass(frozen=True)
class SPOChain(_Segments):
    """Answers cut where the policy was unsure, each boundary valued by continuations of its own.

    Args:
        rho: tokens of lower probability are candidates for a cut, and what is trained on; in (0, 1].
        interval: every so many candidates a segment begins, >= 1. Paper 5; 2 is finer and dearer, 100 bad.
        n_mc: continuations of a boundary, >= 1. Paper 9, with larger models 4.
        group_size: answers of a prompt, >= 1. Paper 8.
        prob_mask: train on tokens below rho alone; without it on all tokens of answers that have one.
        whiten: whiten the advantages of each optimiser's batch. The paper's runs do, its objective does not.
        unfinished_reward: of a text that ran into its limit; finite.
    """

    rho: float = 0.9
    interval: int = 5
    n_mc: int = 9
    group_size: int = 8
    prob_mask: bool = True
    whiten: bool = True
    unfinished_reward: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    def stages(self) -> tuple[Stage, ...]:
        sample = SPOChainSample(self.group_size, self.rho, self.interval, self.n_mc, self.unfinished_reward)
        mask = SPOMask(self.rho, "token" if self.prob_mask else "row")
        return sample, SPOChainAdvantage(), mask, *([SPOWhiten()] if self.whiten else [])


@dataclass(frozen=True)
class SPOTree(_Segments):
    """A tree of segments for each prompt: every edge is trained on, against its siblings.

    Args:
        branching: children of a node by depth, >= 2 each; the last may be 1 behind others, but for norm "loo". Paper (6, 6, 6),
            also (4, 5, 6), (4, 4, 4) and (8, 8, 8).
        segment_tokens: M, most tokens of a segment but the last, >= 1. Paper 600 for long answers, 30 to 100 for short ones.
        norm: what siblings' values are compared by: "none" (the paper's code), "std" (its text), or "loo" (ours).
        rho: tokens of lower probability are trained on; in (0, 1].
        prob_mask: whether those alone are.
        whiten: whiten the advantages of each optimiser's batch. The paper's runs do, its objective does not.
        unfinished_reward: of a text that ran into its limit; finite.
    """

    branching: tuple[int, ...] = (6, 6, 6)
    segment_tokens: int = 600
    norm: str = "none"
    rho: float = 0.9
    prob_mask: bool = True
    whiten: bool = True
    unfinished_reward: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        ok = self.norm != "loo" or self.branching[-1] > 1
        require(self, "branching", ok, ">= 2 at every depth for norm 'loo'")

    def stages(self) -> tuple[Stage, ...]:
        sample = SPOTreeSample(self.branching, self.segment_tokens, self.unfinished_reward)
        mask = [SPOMask(self.rho)] if self.prob_mask else []
        return sample, SPOTreeAdvantage(self.norm), SPODrop(), *mask, *([SPOWhiten()] if self.whiten else [])


@dataclass(frozen=True)
class SPOChainAdvantage(Advantage):
    """The value behind a token's segment less the value before it, from the columns of `SPOChainSample`.

    0 before an answer's first cut, and where a value or the reward that it takes is not known.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cut", "cut_value"})

    def __call__(self, rollouts: Rollouts) -> PerToken:
        columns = rollouts.columns
        return segment_advantages(columns["cut"] > 0, columns["cut_value"], rollouts.reward, rollouts.mask)


@dataclass(frozen=True)
class SPOTreeAdvantage(Advantage):
    """A row's reward beside those of its group: with `SPOTreeSample` a child's value beside its siblings'.

    Args:
        norm: "none" for the difference to their mean, "std" for that over their deviation, "loo" for the difference to the mean
            of the others.
    """

    norm: str = "none"

    def __post_init__(self) -> None:
        check(self)

    def refuses(self, recipe: Composed) -> str:
        alone = isinstance(recipe.sample, SPOTreeSample) and recipe.sample.branching[-1] == 1
        return (
            "with norm 'loo' compares a child with others, and the last branching is 1"
            if alone and self.norm == "loo"
            else ""
        )

    def __call__(self, rollouts: Rollouts) -> PerToken:
        return NORMS[self.norm](rollouts)


@dataclass(frozen=True)
class SPODrop(Weigh):
    """Leaves out rows whose advantage is 0 in all tokens, to rounding: edges beside siblings that are worth as much."""

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        size = torch.where(rollouts.mask, advantages.abs(), 0.0)
        least = 4 * torch.finfo(size.dtype).eps * rollouts.reward.nan_to_num(0.0).abs().max()
        live = (size > least).any(-1)
        return Choice(keep=rollouts.mask & live[:, None], logs={"spo/dropped_rows": 1 - live.double().mean().item()})


@dataclass(frozen=True)
class SPOMask(Weigh):
    """Keeps the tokens that the old policy said with a probability below rho.

    Args:
        rho: in (0, 1]; a token of exactly that probability is left out.
        per: keep such a "token" alone, or all of a "row" that has one.
    """

    rho: float = 0.9
    per: str = "token"

    def __post_init__(self) -> None:
        check(self)
        require(self, "per", self.per in ("token", "row"), '"token" or "row"')

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logp"})

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        found = unsure(rollouts.columns["old_logp"], rollouts.mask, self.rho)
        share = found.sum().item() / max(1, int(rollouts.mask.sum()))
        keep = found if self.per == "token" else rollouts.mask & found.any(-1, keepdim=True)
        return Choice(keep=keep, logs={"spo/unsure_tokens": share})


@dataclass(frozen=True)
class SPOWhiten(Normalise):
    """Mean 0 and variance 1 over the kept tokens of an optimiser's batch; where they hardly differ they stay as they are.

    Late in training most answers are right: noise divided by nearly nothing would lead the policy astray.
    """

    def __call__(self, advantages: PerToken, keep: Mask) -> PerToken:
        kept = advantages[keep].double()
        if len(kept) < 2 or not (variance := kept.var()) >= 1e-6:
            return advantages
        return torch.where(keep, (advantages - kept.mean()) / (variance + 1e-8).sqrt(), 0.0).to(advantages.dtype)


def segment_advantages(cut: Mask, value: PerToken, reward: PerRow, mask: Mask) -> PerToken:
    """A[i,t] of the segment that a token belongs to.

    Args:
        cut: true on the first token of each segment.
        value: of the state before that token; elsewhere anything.
        reward: of the whole answers.
    """
    width = cut.shape[1]
    here = torch.arange(width, device=cut.device).expand_as(cut)
    first = torch.where(cut, here, -1).cummax(-1).values  # of the token's segment; -1 before the first cut
    behind = (
        torch.where(cut, here, width).flip(-1).cummin(-1).values.flip(-1)
    )  # the next cut, this token's own included
    behind = torch.cat([behind[:, 1:], torch.full_like(behind[:, :1], width)], 1)
    values = torch.cat(
        [torch.where(cut, value, 0.0), reward[:, None].to(value.dtype)], 1
    )  # the reward stands behind the end
    gain = values.gather(1, behind) - values.gather(1, first.clamp(min=0))
    return torch.where(mask & (first >= 0) & ~gain.isnan(), gain, 0.0)
