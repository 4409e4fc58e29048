"""From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature

Expensive: Knowing which tokens of a long answer are decisions and which are routine.
Stands in: The token's own entropy as a signal that sets temperature, advantage and clip range.
Check: A signal of zero is DAPO, advantages of a group still sum to zero, and each part is ablated.

The signal. Of the entropies H[i,t] (nats, of the whole next-token law) of a batch's tokens, u = log max(H, 1e-8), Q is the
rho-quantile (the nearest rank: number round(rho (n-1)) of the sorted n) and sigma^2 the mean of (u - Q)^2:

    h = (u - Q) / sigma,     s = h / max h  where h > 0,     s = h / |min h|  elsewhere

So s lies in [-1, 1], grows with H, is 0 at the quantile's token, and with rho = 0.8 a fifth of the tokens is above it. Four
parts are made of it, each a stage that can be taken alone:

    A  hapo.temperature     T = base (1 + tau z), z = (log H - Q)/sigma or s, with the statistics of the step before
    B  hapo.advantage       A[i,t] = (R_i - mu)/(sd + eps), mu and sd of a group's rewards with every token counted once
    C  hapo.redistribute    A (1 + beta s) where s > 0 and r is outside [1 - low/2, 1 + high/2], or s <= 0 and r is inside
    D  hapo.clip            low (1 - alpha s) where s <= 0, high (1 + alpha s) where s > 0

A explores at decisions and is careful elsewhere. After B the advantages of all tokens of a group sum to 0, so that long wrong
answers pull nothing by their length. C strengthens decisions that are on the move and quietens routine that has settled. D
lets routine tokens fall faster and decisions rise further. The factor of C is never negative, so it is a weight on the loss.

Shapes: entropy, mask, signal, weight and bounds [rows, tokens]; H in nats, s and the bounds without unit. No gradient passes
through any of them. Cost: one selection (no sort) of the entropies per batch, A an entropy per sampled token, the rest
elementwise.

Traps. Statistics of a "minibatch" are those of the rows that go through one forward: results then depend on how many these
are. The paper's code gives routine tokens positive signals (it divides by min h, not by its absolute value), so they are
widened, strengthened and heated like decisions; `reference_sign` does the same, to compare. In the first minibatch r = 1: no
decision is strengthened, and the surest token gets an advantage of 0. After C advantages no longer sum to 0. The soft
punishment of long answers works against B: leave it out if answers shrink. Training is sensitive to tau: lower it first.
The paper's settings are mode "zscore" and tau 0.1, its code's mode "minmax" and tau 0.05.

On the digit chain (`locum show hapo`) HAPO is ahead of DAPO at the same learning rate, by C and a little by A, while B and D
alone change nothing that can be told from chance. Its entropy ends lower than DAPO's, not higher as in the paper. The gain in
pass@1 after 60 steps shrinks as the rate of both grows: 0.063, 0.026 and 0.003 at 1e-3, 2e-3 and 4e-3, and DAPO at 2e-3 is far
ahead of HAPO at 1e-3. Tune the rate first.

Example:
    >>> import torch
    >>> from locum.reinforce.hapo import HAPOClip, signal
    >>> entropy = torch.tensor([[-4, -3, -2, -1, 0, 1]], dtype=torch.float64).exp()
    >>> s = signal(entropy, torch.ones_like(entropy, dtype=torch.bool), rho=0.8)
    >>> s.round(decimals=4).tolist()
    [[-1.0, -0.75, -0.5, -0.25, 0.0, 1.0]]
    >>> low, high = HAPOClip().widened(s, 0.2, 0.28)
    >>> low.round(decimals=4).tolist(), high.round(decimals=4).tolist()
    ([[0.4, 0.35, 0.3, 0.25, 0.2, 0.2]], [[0.28, 0.28, 0.28, 0.28, 0.28, 0.56]])

Authors: Liu, Liu, Wen, Cai, Cui, He, Zhang
Year: 2025
Venue: arXiv 2025
arXiv: 2509.16591
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.advantages import GroupNormalised
from locum.reinforce.base import (
    Adapt,
    Bound,
    Composed,
    GroupAdvantage,
    Heat,
    Mask,
    Memory,
    PerToken,
    Piece,
    Run,
    Stage,
    Temperature,
)
from locum.tokens.groups import Groups
from locum.tokens.rollouts import Rollouts
from locum.tokens.tiles import tile_entropy, wide

__all__ = [
    "HAPO",
    "HAPOAdvantage",
    "HAPOClip",
    "HAPORedistribute",
    "HAPOTemperature",
    "Scale",
    "signal",
]

INF = float("inf")
LEAST = 1e-8  # an entropy below it counts as it, and nothing is divided by less
COLDEST, HOTTEST = 0.25, 4.0  # bounds of a temperature, in units of its base
MODES, STATS = ("zscore", "minmax"), ("batch", "minibatch")
Number = float | Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class Scale:
    """What an entropy is measured by.

    Args:
        pivot: Q, the quantile of the log-entropies; the signal is 0 there.
        spread: sigma, the root of their mean square around Q, > 0.
        top, bottom: the largest and the smallest (log H - Q)/sigma, > 0 and < 0.
    """

    pivot: Number
    spread: Number
    top: Number
    bottom: Number

    @staticmethod
    def of(entropy: PerToken, mask: Mask, rho: float) -> "Scale":
        """Of the entropies under a mask.

        Raises: UserError for a mask without tokens, a rho outside [0, 1], or an entropy that is not finite.
        """
        if not 0 <= rho <= 1:
            raise UserError(f"rho must be in [0, 1], got {rho!r}")
        h = entropy[mask].detach()
        if len(h) == 0:
            raise UserError("HAPO's signal is of the tokens under a mask, and there is none")
        if not torch.isfinite(h).all():
            row, column = (mask & ~torch.isfinite(entropy)).nonzero()[0].tolist()
            raise UserError(f"HAPO: the entropy of token {column} of row {row} is {entropy[row, column].item()}")
        u = _log(h)
        pivot = _quantile(u, rho)
        spread = (u - pivot).square().mean().sqrt().clamp(min=LEAST)
        z = (u - pivot) / spread
        return Scale(pivot, spread, z.max().clamp(min=LEAST), z.min().clamp(max=-LEAST))

    def zscore(self, entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """(log H - Q) / sigma."""
        return (_log(entropy) - self.pivot) / self.spread

    def signal(self, entropy: Float[Tensor, "*n"], reference_sign: bool = False) -> Float[Tensor, "*n"]:
        """In [-1, 1] for the entropies that the scale is of; with `reference_sign` positive below the quantile too."""
        z = self.zscore(entropy)
        below = z / self.bottom  # in [0, 1]: what the paper's code takes
        return torch.where(z > 0, z / self.top, below if reference_sign else -below)


def signal(entropy: PerToken, mask: Mask, rho: float = 0.8, reference_sign: bool = False) -> PerToken:
    """How much of a decision each token is, from -1 to 1; 0 outside the mask, and without gradient."""
    s = Scale.of(entropy, mask, rho).signal(entropy.detach(), reference_sign)
    return torch.where(mask, s, 0.0)


@dataclass(frozen=True)
class HAPOTemperature(Temperature):
    """A: hotter where the law to be sampled has more entropy than the last step's quantile, colder where it has less.

    The first step has nothing to go by and is sampled as its host samples. Temperatures stay in [1/4, 4] times the base.

    Args:
        tau: strength, >= 0; 0 samples as the host does. Paper 0.1 with "zscore", its code 0.05 with "minmax".
        mode: z = (log H - Q)/sigma ("zscore", the paper's), or the signal, cut to [-1, 1] ("minmax", its code's).
        rho: the quantile, in [0, 1]. Paper 0.8.
        base: the temperature that tokens are scored at (`Autoregressive.temperature`), > 0: entropies are compared there. What
            is sampled at is the sampling's own temperature times 1 + tau z.
        reference_sign: the sign of the paper's code below the quantile, in mode "minmax".
    """

    tau: float = 0.1
    mode: str = "zscore"
    rho: float = 0.8
    base: float = 1.0
    reference_sign: bool = False

    def __post_init__(self) -> None:
        require(self, "tau", 0 <= self.tau < INF, "finite and >= 0")
        require(self, "mode", self.mode in MODES, '"zscore" or "minmax"')
        require(self, "rho", 0 <= self.rho <= 1, "in [0, 1]")
        require(self, "base", 0 < self.base < INF, "finite and > 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy", "heat"}) if self.tau else frozenset()

    def refuses(self, recipe: Composed) -> str:
        scored = getattr(recipe.likelihood, "temperature", self.base)
        if self.tau and scored != self.base:
            return f"has base {self.base}, and tokens are scored at temperature {scored}: make them equal"
        return ""

    def heat(self, memory: Memory) -> Heat | None:
        if not self.tau or not memory:
            return None
        scale = Scale(**memory)
        return lambda logits: self.factor(tile_entropy(wide(logits) / self.base), scale)

    def factor(self, entropy: Float[Tensor, "*n"], scale: Scale) -> Float[Tensor, "*n"]:
        """T / T_base, by the statistics of an earlier step."""
        if self.mode == "zscore":
            z = scale.zscore(entropy)
        else:
            z = scale.signal(entropy, self.reference_sign).clamp(-1, 1)
        return (1 + self.tau * z).clamp(COLDEST, HOTTEST)

    def figures(self, rollouts: Rollouts, run: Run) -> dict[str, float]:
        """What the batch was sampled at, in units of the base."""
        memory = run.memory.get(self.slot, {})
        if not self.tau or not memory:
            return {}
        factor = self.factor(rollouts.columns["entropy"][rollouts.mask], Scale(**memory))
        named = {"coldest": factor.min(), "temperature": factor.mean(), "hottest": factor.max()}
        return {f"hapo/{name}": float(x) for name, x in named.items()}

    def remember(self, rollouts: Rollouts, memory: Memory) -> Memory:
        if not self.tau:
            return memory
        return {k: float(x) for k, x in asdict(Scale.of(rollouts.columns["entropy"], rollouts.mask, self.rho)).items()}


@dataclass(frozen=True)
class HAPOAdvantage(GroupAdvantage):
    """B: a reward among those of its group, every token counted once, so that the advantages of all its tokens sum to 0.

    Args:
        eps: added to the deviation, >= 0.
        fallback: a group in which this is reached gets GRPO's advantages (few tokens against very many have huge ones); > 0,
            None for never. The paper's code has 5.
    """

    eps: float = 1e-6
    fallback: float | None = 5.0

    def __post_init__(self) -> None:
        require(self, "eps", 0 <= self.eps < INF, "finite and >= 0")
        require(self, "fallback", self.fallback is None or self.fallback > 0, "> 0 or None")

    def value(self, reward: Float[Tensor, " rows"], stats: Groups) -> Float[Tensor, " rows"]:
        return (reward - stats.mean) / (stats.sd + self.eps)

    def __call__(self, rollouts: Rollouts) -> PerToken:
        reward, group, lengths = rollouts.reward, rollouts.group, rollouts.lengths
        rows = self.of_rows(reward, group, lengths.to(reward.dtype))
        if self.fallback is not None:
            huge = (rows.abs() >= self.fallback) & (lengths > 0)
            grpo = GroupNormalised(eps=self.eps).of_rows(reward, group)
            rows = torch.where(torch.isin(group, group[huge]), grpo, rows)
        return rows[:, None] * rollouts.mask


@dataclass(frozen=True)
class _Signalled(Adapt):
    """What C and D share.

    Args:
        rho: the quantile that counts as 0, in [0, 1]. Paper 0.8.
        stats: whose entropies: the old policy's over the whole "batch", or the current policy's over each "minibatch" (what
            goes through one forward; the paper's code).
        reference_sign: the sign of the paper's code below the quantile.
    """

    rho: float = 0.8
    stats: str = "batch"
    reference_sign: bool = False
    strength: ClassVar[str]  # the field that is 0 where the stage does nothing

    def __post_init__(self) -> None:
        require(self, "rho", 0 <= self.rho <= 1, "in [0, 1]")
        require(self, "stats", self.stats in STATS, '"batch" or "minibatch"')

    @property
    def on(self) -> bool:
        """Whether it does anything."""
        return getattr(self, self.strength) > 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"}) if self.on and self.stats == "batch" else frozenset()

    @property
    def live(self) -> frozenset[str]:
        return frozenset({"entropy"}) if self.on and self.stats == "minibatch" else frozenset()

    @property
    def column(self) -> str:
        """Where the signal stands: the same for stages that read the same one."""
        return f"hapo/{self.rho}" + ("/reference" if self.reference_sign else "")

    def refuses(self, recipe: Composed) -> str:
        twice = sum(isinstance(stage, type(self)) for stage in recipe.stages) > 1
        return "is in this recipe twice: leave one of them out" if twice else ""

    def signals(self, rollouts: Rollouts) -> dict[str, PerToken]:
        if not self.on or self.column in rollouts.columns:  # another stage that reads the same one was here
            return {}
        return {self.column: signal(rollouts.columns["entropy"], rollouts.mask, self.rho, self.reference_sign)}

    def figures(self, rollouts: Rollouts, run: Run) -> dict[str, float]:
        """Quantiles of the signal, where it is of the whole batch."""
        if self.column not in rollouts.columns:
            return {}
        s = rollouts.columns[self.column][rollouts.mask]
        return {f"hapo/signal_p{100 * q:.0f}": float(_quantile(s, q)) for q in (0.1, 0.5, 0.9)}


@dataclass(frozen=True)
class HAPORedistribute(_Signalled):
    """C: more advantage for decisions whose ratio has left the neutral zone, less for routine that is inside it.

    The zone is [1 - low/2, 1 + high/2], of the clip's own bounds.

    Args:
        adv_beta: strength, in [0, 1]; 0 leaves advantages as they are. Paper 1.
    """

    adv_beta: float = 1.0
    strength: ClassVar[str] = "adv_beta"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "adv_beta", 0 <= self.adv_beta <= 1, "in [0, 1]")

    def weight(self, ratio: PerToken, rollouts: Rollouts, low: float, high: float) -> PerToken | None:
        if not self.on:
            return None
        return self.factor(rollouts.columns[self.column], ratio, low, high)

    def factor(self, s: PerToken, ratio: PerToken, low: float, high: float) -> PerToken:
        """1 + beta s where it applies, 1 elsewhere."""
        neutral = (ratio >= 1 - low / 2) & (ratio <= 1 + high / 2)
        return torch.where((s > 0) ^ neutral, 1 + self.adv_beta * s, 1.0)

    def sums(
        self, rollouts: Rollouts, keep: Mask, factor: PerToken | None, below: Mask, above: Mask
    ) -> dict[str, Tensor]:
        if factor is None:
            return {}
        return {"hapo/strengthened": (keep & (factor > 1)).sum(), "hapo/quietened": (keep & (factor < 1)).sum()}


@dataclass(frozen=True)
class HAPOClip(_Signalled):
    """D: routine tokens may fall further, decisions may rise further. The lower bound stays above a ratio of 0.

    Args:
        alpha: strength, >= 0; 0 leaves the bounds as they are. Paper 1: bounds are doubled at most.
    """

    alpha: float = 1.0
    strength: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 <= self.alpha < INF, "finite and >= 0")

    def bounds(self, rollouts: Rollouts, low: Bound, high: Bound) -> tuple[Bound, Bound]:
        return self.widened(rollouts.columns[self.column], low, high) if self.on else (low, high)

    def sums(
        self, rollouts: Rollouts, keep: Mask, factor: PerToken | None, below: Mask, above: Mask
    ) -> dict[str, Tensor]:
        if not self.on:
            return {}
        decision = rollouts.columns[self.column] > 0
        return {
            f"hapo/clipped_{side}_{kind}": (cut & chosen).sum()
            for side, cut in (("low", below), ("high", above))
            for kind, chosen in (("decision", decision), ("routine", ~decision))
        }

    def widened(self, s: PerToken, low: Bound, high: Bound) -> tuple[PerToken, PerToken]:
        """low' = min(low (1 + alpha max(-s, 0)), 0.999) and high' = high (1 + alpha max(s, 0))."""
        down = low * (1 + self.alpha * (-s).clamp(min=0))
        most = torch.as_tensor(low, dtype=s.dtype, device=s.device).clamp(min=0.999)  # a bound set wider stays as it is
        return torch.minimum(down, most), high * (1 + self.alpha * s.clamp(min=0))


@dataclass(frozen=True)
class HAPO(Piece):
    """All four parts, with one quantile and one signal.

    Args:
        rho: the quantile of the log-entropies where the signal is 0, in [0, 1]. Paper 0.8.
        tau: strength of the temperature, >= 0. Paper 0.1, its code 0.05 with mode "minmax".
        mode: what sets the temperature, "zscore" (the paper's) or "minmax" (its code's).
        base: the temperature that tokens are scored at, > 0. Paper 1.
        fallback: an advantage that sends its group back to GRPO's, > 0; None for never. The paper's code has 5.
        adv_beta: strength of the redistribution, in [0, 1]. Paper 1.
        alpha: strength of the clip range, >= 0. Paper 1.
        stats: entropies of the old policy over the whole "batch", or of the current one over each "minibatch" (its code's).
        reference_sign: the sign of the paper's code below the quantile.
    """

    host: ClassVar[str] = "dapo"
    rho: float = 0.8
    tau: float = 0.1
    mode: str = "zscore"
    base: float = 1.0
    fallback: float | None = 5.0
    adv_beta: float = 1.0
    alpha: float = 1.0
    stats: str = "batch"
    reference_sign: bool = False

    def __post_init__(self) -> None:
        self.stages()  # each checks its own fields

    def stages(self) -> tuple[Stage, ...]:
        rho, stats, sign = self.rho, self.stats, self.reference_sign
        return (
            HAPOTemperature(self.tau, self.mode, rho, self.base, sign),
            HAPOAdvantage(fallback=self.fallback),
            HAPORedistribute(rho, stats, sign, self.adv_beta),
            HAPOClip(rho, stats, sign, self.alpha),
        )


def _quantile(x: Float[Tensor, " n"], q: float) -> Float[Tensor, ""]:
    """Of the nearest rank."""
    return x.kthvalue(round(q * (len(x) - 1)) + 1).values


def _log(entropy: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return wide(entropy).clamp(min=LEAST).log()
