"""Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization

Expensive: The likelihood of a sequence under a masked diffusion model: hundreds of forward passes.
Stands in: Its evidence bound by a quadrature of two or three mask ratios, in a sequence-level GRPO ratio.
Check: On short sequences every mask can be enumerated: mean, variance and gradient against the exact bound.

A masked diffusion model gives log p(y_i | the tokens of y that are not hidden, q) for every hidden token. The bound on the
log-likelihood of a completion y of L tokens to a prompt q averages that over mask ratios t and masks S (each token hidden with
probability t); it is also a sum over all non-empty subsets, and the mean over all orders of the chain rule:

    L(y|q) = integral_0^1 E_S [ 1/t sum_{i in S} log p(y_i | y without S, q) ] dt
           = sum_S 1/(|S| C(L,|S|)) sum_{i in S} log p(y_i | y without S, q)   <=  log p(y|q)

Most of an estimate's variance comes from a random t, while what is averaged is a smooth function of t: so the ratios are fixed
points t_n with weights w_n, and each takes K random masks:

    Lhat = sum_n w_n 1/K sum_k c_nk sum_{i in S_nk} log p(y_i | y without S_nk, q)
    "gauss-N"      Gauss-Legendre on [0, 1]; exact over the ratios where L <= 2N
    "midpoint-N"   t_n = (n - 1/2)/N           "simpson"   t = .1, .5, 1 with weights 1/6, 4/6, 1/6
    "double-mc-N"  t_n uniform, drawn anew for every completion: what the others are compared with
    mask "count"      |S| = floor(tL) + 1, c = L/|S|: the double Monte Carlo estimate is unbiased
         "bernoulli"  each token with probability t, c = 1/t: the formula above; empty, 0
         "floor"      |S| = max(1, floor(tL)), c = 1/t: what public code does; too low, as |S| < tL

The objective has one ratio per completion, r = exp(Lhat - Lhat_old), not normalised by length; A = R - mean of the group:

    E_q 1/G sum_g 1/L_g min(r_g A_g, clip(r_g, 1 - eps, 1 + eps) A_g)

So a completion's log-probability stands on its last token, that token alone is kept, and its weight is 1/L_g. Each of the mu
epochs draws masks of its own, and old, reference and current policy are asked with the same ones. `DiffuGRPO` is the baseline
(arXiv 2504.12216): one forward with the whole completion hidden, each token its own ratio. Its marginals cannot tell right from
wrong where tokens are right or wrong together: there its gradient is 0 in the mean, until chance makes one text likelier than
the others. At a large learning rate it then ends at that one, right but always the same: `locum show gdpo` has figures.

Shapes: log-probabilities [rows, tokens] in nats; masks [N K, rows, tokens]. Cost: N K forwards per completion and epoch for the
old policy, and as many with gradient, in one batch: a forward of r completions has r N K rows, so divide rows_per_forward by
N K where memory is short. `ELBO.forwards` is N K.

Traps. With other masks for the old policy the ratio is noise; so is it with dropout. The sum over points comes before the
exponential. "floor" is no estimate of the bound for short texts. Larger learning rates diverge: the paper takes 5e-7 to 1e-6.
Dividing by the group's deviation makes another method. Another method called GDPO (arXiv 2601.05242) has nothing to do with it.

Example:
    >>> from locum.reinforce.gdpo import ELBO, elbo, exact_elbo
    >>> from locum.tasks.permutations import Permutations, untrained
    >>> policy, prompt, text = untrained(0, Permutations()), [[6]], [[2, 0, 5, 1, 4, 3]]
    >>> [round(elbo(policy, prompt, text, ELBO(rule)).item(), 1) for rule in ("gauss-1", "gauss-2", "gauss-3")]
    [-12.6, -14.3, -12.7]
    >>> round(exact_elbo(policy, prompt, text).item(), 1)  # all 63 masks
    -13.0

Authors: Rojas, Lin, Rasul, Schneider, Nevmyvaka, Tao, Deng
Year: 2025
Venue: ICLR 2026
arXiv: 2510.08554
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import comb, nan
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.base import Choice, Composed, Heat, Likelihood, Mask, Penalty, PerToken, Piece, Run, Stage, Weigh
from locum.reinforce.losses import KL, Clip, SequenceSum, TokenMean
from locum.tokens.ppo import at_last, is_last
from locum.tokens.rollouts import Generated, Rollouts, seeds, uniforms
from locum.tokens.sampling import Sampling

__all__ = [  # noqa: RUF022 - the first is the paper's
    "GDPO",
    "DiffuGRPO",
    "ELBO",
    "FullMask",
    "PerSequence",
    "SequenceKL",
    "elbo",
    "exact_elbo",
]

PerRow = Float[Tensor, " rows"]
RULES = ("gauss-N", "midpoint-N", "double-mc-N", "simpson")
_RULE = re.compile(r"(gauss|midpoint|double-mc)-[1-9]\d?|simpson")
MASKS = ("count", "bernoulli", "floor")
LONGEST = 12  # tokens of a completion whose masks are enumerated: 4095 forwards


@dataclass(frozen=True)
class _Infilling(Likelihood):
    """What is asked of a `locum.models.diffusion.MaskedDiffusion`: it fills in completions, and tells what is hidden.

    Its masks depend on a row's fact "number" and the "epoch" alone: not on the rows beside it, nor on who asks.
    """

    redraws: ClassVar[bool] = True

    def generate(
        self,
        policy: Any,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows T"],
        heat: Heat | None,
        sampling: Sampling,
    ) -> Generated:
        return policy.generate(prefixes, copies, room, draws, sampling=sampling)


@dataclass(frozen=True)
class ELBO(_Infilling):
    """The evidence bound of a whole completion, on its last token; 0 on the others.

    Args:
        rule: where the mask ratios lie: "gauss-N", "midpoint-N", "double-mc-N", N >= 1, or "simpson". The paper's is gauss-3,
            gauss-2 is also good.
        masks: K, random masks at each ratio, >= 1. The paper's 1.
        mask: how a mask is drawn at a ratio: "count", "bernoulli" (the paper's formula) or "floor" (public code).
    """

    rule: str = "gauss-3"
    masks: int = 1
    mask: str = "count"

    def __post_init__(self) -> None:
        require(self, "rule", _RULE.fullmatch(self.rule) is not None, f"one of {', '.join(RULES)} with N in 1..99")
        require(self, "masks", self.masks >= 1, ">= 1")
        require(self, "mask", self.mask in MASKS, f"one of {', '.join(MASKS)}")

    @property
    def forwards(self) -> int:
        """Forwards for the bound of one completion."""
        return len(self.points[0]) * self.masks

    @property
    def points(self) -> tuple[list[float], list[float]]:
        """The mask ratios and their weights; ratios that are drawn stand as nan."""
        if self.rule == "simpson":
            return [0.1, 0.5, 1.0], [1 / 6, 4 / 6, 1 / 6]
        kind, _, many = self.rule.rpartition("-")
        n = int(many)
        if kind == "gauss":
            x, w = np.polynomial.legendre.leggauss(n)
            return ((x + 1) / 2).tolist(), (w / 2).tolist()
        return [(i + 0.5) / n if kind == "midpoint" else nan for i in range(n)], [1 / n] * n

    def refuses(self, recipe: Composed) -> str:
        if any(isinstance(stage, KL) and stage.beta for stage in recipe.stages):
            return "tells the bound of whole completions, and KL compares tokens: take sequencekl in its place"
        return ""

    def drawn(self, rollouts: Rollouts) -> tuple[Bool[Tensor, "n rows tokens"], Float64[Tensor, "n rows"]]:
        """Every row's masks, and the weight of what each of them hides."""
        own, mask, length = _own(rollouts), rollouts.mask, rollouts.lengths.double()
        t, w = (torch.tensor(x, dtype=torch.float64, device=own.device)[:, None] for x in self.points)
        if bool(t.isnan().any()):
            t = uniforms(-1, own, len(t)).double().T
            t = t if self.mask == "count" else t.maximum(1 / length)
        t, w = (x.expand(-1, len(own)).repeat_interleave(self.masks, 0) for x in (t, w / self.masks))
        u = torch.stack([uniforms(n, own, mask.shape[1]) for n in range(len(t))])
        if self.mask == "bernoulli":
            return mask & (u < t[..., None]), w / t
        k = (t * length).floor()
        k = (k + 1).minimum(length) if self.mask == "count" else k.clamp(min=1)
        rank = u.masked_fill(~mask, 2.0).argsort(dim=-1, stable=True).argsort(-1)
        return mask & (rank < k[..., None]), w * (length / k if self.mask == "count" else 1 / t)

    def bound(self, policy: Any, rollouts: Rollouts) -> PerRow:
        """Lhat of every row, with gradient."""
        hidden, weight = self.drawn(rollouts)
        n, rows = weight.shape
        owner = torch.arange(rows, device=weight.device).repeat(n)
        return _summed(policy, rollouts, owner, hidden.flatten(0, 1), weight.flatten())

    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        return {"logp": at_last(self.bound(policy, rollouts), rollouts.mask)}


@dataclass(frozen=True)
class FullMask(_Infilling):
    """Every token's log-probability from one forward that hides the whole completion, and tokens of the prompt at random.

    Args:
        prompt: probability that a token of the prompt is hidden, in [0, 1]. Paper 0.15.
    """

    prompt: float = 0.15

    def __post_init__(self) -> None:
        require(self, "prompt", 0 <= self.prompt <= 1, "in [0, 1]")

    def columns(self, policy: Any, rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
        # Counted from the completion backwards, so that padding changes nothing.
        u = uniforms(0, _own(rollouts), rollouts.prefix.shape[1]).flip(-1)
        return {"logp": policy.log_probs(rollouts, rollouts.mask, u < self.prompt)}


@dataclass(frozen=True)
class PerSequence(Weigh):
    """One token of a completion, the last, stands for all of it and weighs 1/L."""

    def refuses(self, recipe: Composed) -> str:
        if not isinstance(recipe.likelihood, ELBO):
            return "lets the last token stand for a completion, and only ELBO puts the whole log-probability there"
        return ""

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        weight = 1 / rollouts.lengths.clamp(min=1).to(advantages.dtype)
        return Choice(weight[:, None].expand_as(advantages), is_last(rollouts.mask))


@dataclass(frozen=True)
class SequenceKL(Penalty):
    """beta k3 of a whole completion, d = (Lhat_ref - Lhat)/L: exp(d) - d - 1. An estimator of our own choice.

    Args:
        beta: weight, >= 0; 0 asks for no reference.
    """

    beta: float = 0.04

    def __post_init__(self) -> None:
        require(self, "beta", 0 <= self.beta < float("inf"), "finite and >= 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"}) if self.beta else frozenset()

    def __call__(self, logp: PerToken, ratio: PerToken, rollouts: Rollouts) -> PerToken:
        if not self.beta:
            return torch.zeros_like(logp)
        gap = (rollouts.columns["ref_logp"] - logp) / rollouts.lengths.clamp(min=1)[:, None]
        gap = gap.clamp(-20, 20)
        return self.beta * (gap.exp() - gap - 1)


@dataclass(frozen=True)
class GDPO(Piece):
    """Groups of completions of a masked diffusion model, each with one ratio of evidence bounds.

    Args:
        rule: where the mask ratios lie, as `ELBO` has it.
        masks: random masks at each ratio, >= 1. The paper's 1.
        mask: how a mask is drawn at a ratio, as `ELBO` has it.
    """

    host: ClassVar[str] = "dr_grpo"
    rule: str = "gauss-3"
    masks: int = 1
    mask: str = "count"

    def __post_init__(self) -> None:
        self.stages()  # which check what they are given

    @property
    def setting(self) -> tuple[Stage, ...]:
        return (Clip(0.2, 0.2), SequenceSum())

    def stages(self) -> tuple[Stage, ...]:
        return (ELBO(self.rule, self.masks, self.mask), PerSequence())


@dataclass(frozen=True)
class DiffuGRPO(Piece):
    """The baseline for masked diffusion models: tokens one by one, the whole completion hidden (arXiv 2504.12216).

    Args:
        prompt: probability that a token of the prompt is hidden, in [0, 1]. Paper 0.15.
    """

    host: ClassVar[str] = "dr_grpo"
    prompt: float = 0.15

    def __post_init__(self) -> None:
        self.stages()

    @property
    def setting(self) -> tuple[Stage, ...]:
        return (Clip(0.5, 0.5), TokenMean(), KL(0.04))

    def stages(self) -> tuple[Stage, ...]:
        return (FullMask(self.prompt),)


def elbo(
    policy: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    by: ELBO = ELBO(),
    seed: int = 0,
) -> PerRow:
    """An estimate of every completion's bound, with gradient, in `by.forwards` forwards each.

    Args:
        policy: a `locum.models.diffusion.MaskedDiffusion`.
        prompts, completions: token ids, one of each per row; a completion has at least one.
        seed: of the masks; with the same seed a row gets the same ones, whatever the policy.
    """
    rollouts = _rollouts(policy, prompts, completions)
    own = seeds(uniforms(seed, torch.arange(len(rollouts), device=rollouts.device), 2))
    return by.bound(policy, rollouts.with_facts(number=own))


def exact_elbo(policy: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> PerRow:
    """Every completion's bound, exactly: all its 2^L - 1 masks.

    Raises: UserError for a completion of more than 12 tokens.
    """
    rollouts = _rollouts(policy, prompts, completions)
    width = rollouts.mask.shape[1]
    if width > LONGEST:
        raise UserError(f"the masks of a completion of {width} tokens are too many; at most {LONGEST} tokens")
    every = torch.tensor(list(product((False, True), repeat=width))[1:], device=rollouts.device)
    inside = ~(every[:, None] & ~rollouts.mask).any(-1)  # masks that a row can have
    which, owner = inside.nonzero().unbind(-1)
    size = every.sum(-1).tolist()
    share = torch.tensor(
        [[1 / (k * comb(n, k)) if k <= n else 0.0 for n in rollouts.lengths.tolist()] for k in size],
        dtype=torch.float64,
        device=rollouts.device,
    )
    return _summed(policy, rollouts, owner, every[which], share[inside])


def _summed(
    policy: Any,
    rollouts: Rollouts,
    owner: Int[Tensor, " many"],
    hidden: Bool[Tensor, "many tokens"],
    weight: Float64[Tensor, " many"],
) -> PerRow:
    """The weighted sum over masks of what each of them hides, per row; `owner` is the row of a mask."""
    told = policy.log_probs(rollouts[owner], hidden).sum(-1)
    return told.new_zeros(len(rollouts)).index_add(0, owner, told * weight.to(told.dtype))


def _own(rollouts: Rollouts) -> Int[Tensor, " rows"]:
    """What the masks of each row depend on."""
    if "number" not in rollouts.facts:
        raise UserError("the rollouts have no fact \"number\", which tells one row's masks from another's")
    return rollouts.facts["number"] + rollouts.facts.get("epoch", torch.zeros_like(rollouts.group))


def _rollouts(policy: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rollouts:
    if len(prompts) != len(completions):
        raise UserError(f"there are {len(prompts)} prompts and {len(completions)} completions")
    if not all(completions):
        raise UserError(f"completion {[len(c) for c in completions].index(0)} is empty")
    width = max(map(len, completions), default=0)
    ids = torch.tensor([[*c, *[0] * (width - len(c))] for c in completions], dtype=torch.long, device=policy.device)
    length = torch.tensor([len(c) for c in completions], device=policy.device)
    mask: Mask = torch.arange(width, device=policy.device) < length[:, None]
    made = Generated(ids.view(len(length), width), mask, torch.ones_like(length, dtype=torch.bool))
    return Rollouts.of(prompts, made, torch.arange(len(length), device=policy.device))
