"""Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization

Expensive: An update over every rollout and every token.
Stands in: An update over the rollouts whose advantages vary most and the tokens of largest advantage times entropy.
Check: The subset is the optimum that brute force finds on small cases, and each trained token teaches more.

Advantages come from all rollouts and stay as they are. Then, of n advantages A_i, the subset of size N whose variance is
largest is kept. It always consists of the a smallest and the N - a largest for some a, so with the sorted values and the
prefix sums of A and A^2 all N + 1 candidates are evaluated at once:

    Var(a) = Q_a/N - (S_a/N)^2,   S_a, Q_a the sums of A, A^2 over the a smallest and the N - a largest

Among equal variances the most balanced split is taken, then the one with more positives; equal advantages go by row number.
Of the tokens of those rows the K n with the largest |A[i,t]| H[i,t] are kept, H the old policy's entropy in nats.

    scope "group"        N_s rows of each group
    scope "batch"        N_s x (number of groups) rows of the batch: across groups, the paper's main variant
    scope "group+batch"  N_s of each group, then `shares` x (number of groups) among those

N_s and K go from their first to their second value linearly with the run's progress p: few at first, more at the end.
Why: GRPO's gradient has a bound that does not depend on how the rewards vary, because advantages have unit variance within
a group; after the selection the bound grows like Var(A)^(1/3) (Propositions 1 and 2).

Shapes: advantages, entropy and mask [rows, tokens], entropy in nats; the result is a mask of tokens, and rows without any
are dropped before the training forward: that is where time is saved. Tokens left out save no forward. Cost: a sort of the
rows and one selection (no sort) of the tokens.

Traps. Advantages normalised again after the selection undo it. Rows of advantage 0 lie in the middle: across groups they are
chosen only where N exceeds the number of others, within a group that has nothing else always; where nothing else is in the
whole batch, no row is. At an equal number of steps (not of trained tokens) less is learnt where every token counts: `locum show
d3s` has figures. Padding has no entropy; bfloat16 entropies tie.

Example:
    >>> import torch
    >>> from locum.reinforce.d3s import widest
    >>> a = torch.tensor([1.5, -0.5, -0.5, -0.5, 0.0, 0.0])
    >>> widest(a, 2).tolist(), widest(a, 4).tolist()
    ([True, True, False, False, False, False], [True, True, True, True, False, False])

Authors: Wang, Yang, Tian, Shi, Ma, Liu, Yao, Ding
Year: 2025
Venue: ICLR 2026
arXiv: 2509.22115
"""

import warnings
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.base import Choice, Mask, PerToken, Run, Weigh
from locum.tokens.groups import members
from locum.tokens.logprobs import masked_mean
from locum.tokens.rollouts import Rollouts

__all__ = ["D3S", "densest", "widest"]

PerRow = Float[Tensor, " n"]
Rows = Bool[Tensor, " n"]
SCOPES = ("batch", "group", "group+batch")
ENOUGH = "two numbers >= 2, or shares like 0.5 or 1.0"
SLACK = 1e-9  # a product like 0.2 x 5 that is above a whole number by rounding alone is that number


@dataclass(frozen=True)
class D3S(Weigh):
    """The rows whose advantages vary most, and of their tokens those of large |advantage| x entropy.

    Args:
        rows: N_s, rows per group, at the beginning and at the end of a run; >= 2, or a share of the group's rows as a decimal
            in (0, 1]. Ours: a quarter, then a half.
        tokens: K, the share of their tokens, at the beginning and at the end; in (0, 1]. Ours 0.2, then 0.5.
        scope: "batch" (the paper's), "group", or "group+batch".
        key: select rows by "advantage" (the paper's) or by "reward" (PODS, another method, to compare with).
        per: the share of tokens is of the "batch" (the paper's) or of each "row".
        row_stat: the value of a row whose tokens differ in advantage: their "mean", or the mean of their absolute values with
            its sign ("size").
        shares: of scope "group+batch": rows per group that the batch keeps in the end, as `rows`; None for the same as `rows`.
    """

    rows: tuple[float, float] = (0.25, 0.5)
    tokens: tuple[float, float] = (0.2, 0.5)
    scope: str = "batch"
    key: str = "advantage"
    per: str = "batch"
    row_stat: str = "mean"
    shares: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self, "rows", _two(self.rows) and all(map(_enough, self.rows)), ENOUGH)
        require(self, "tokens", _two(self.tokens) and all(0 < k <= 1 for k in self.tokens), "two shares in (0, 1]")
        require(self, "scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        require(self, "key", self.key in ("advantage", "reward"), '"advantage" or "reward"')
        require(self, "per", self.per in ("batch", "row"), '"batch" or "row"')
        require(self, "row_stat", self.row_stat in ("mean", "size"), '"mean" or "size"')
        if self.shares is not None:
            require(self, "shares", _two(self.shares) and all(map(_enough, self.shares)), ENOUGH)
            require(self, "shares", self.scope == "group+batch", 'None unless scope is "group+batch"')
        if any(first > last for first, last in (self.rows, self.tokens, self.shares or self.rows)):
            warnings.warn("D3S begins with more than it ends with: the paper's schedule is the other way", stacklevel=3)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"}) if min(self.tokens) < 1 else frozenset()

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        p, mask = run.progress, rollouts.mask
        _finite(advantages, mask, "advantage")
        value, live = self.of_rows(rollouts, advantages), ((advantages != 0) & mask).any(-1)
        groups = members(rollouts.group)
        offered = self.offered(value, groups, p)
        chosen = self.chosen(value, groups, p) & live.any()  # of nothing but zeros none is better
        keep, k = mask & chosen[:, None], _between(self.tokens, p)
        if k < 1:
            entropy = rollouts.columns["entropy"]
            _finite(entropy, mask, "entropy")
            keep = densest(advantages.abs() * entropy, keep, k, self.per)
        return Choice(keep=keep, logs=_logs(value, chosen, live) | {"d3s/offered_rows": float((offered & live).sum())})

    def of_rows(self, rollouts: Rollouts, advantages: PerToken) -> PerRow:
        """What each row is selected by. A row without a reward is in the middle."""
        if self.key == "reward":
            return torch.where(rollouts.reward.isnan(), rollouts.reward.nanmean(), rollouts.reward).nan_to_num(0.0)
        mean = _mean(advantages, rollouts.mask)
        return mean if self.row_stat == "mean" else _mean(advantages.abs(), rollouts.mask) * mean.sign()

    def chosen(self, value: PerRow, groups: tuple[Tensor, ...], p: float) -> Rows:
        """The rows that are selected at progress p.

        Args:
            groups: the numbers of each group's rows.
        """
        chosen = self.offered(value, groups, p)
        if self.scope != "group":
            wanted = _count(self.shares or self.rows, p, len(value), len(groups), "batch")
            at = chosen.nonzero()[:, 0]
            chosen[at] = widest(value[at], wanted)
        return chosen

    def offered(self, value: PerRow, groups: tuple[Tensor, ...], p: float) -> Rows:
        """What is left of each group: the rows that a selection across the batch chooses from."""
        offered = torch.ones_like(value, dtype=torch.bool)
        if self.scope != "batch":
            for at in groups:
                offered[at] = widest(value[at], _count(self.rows, p, len(at), 1, "group"))
        return offered


def widest(value: PerRow, n: int) -> Rows:
    """The n values of largest variance: the optimum over all subsets of that size. All of them if there are not more."""
    size = len(value)
    chosen = torch.ones_like(value, dtype=torch.bool)
    if n >= size:
        return chosen
    ordered, up = value.double().sort(stable=True)
    ordered = ordered - ordered.mean()  # so that nothing cancels
    sums, squares = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (ordered, ordered.square()))
    a = torch.arange(n + 1, device=value.device)  # so many from below, n - a from above
    s, q = (x[a] + x[-1] - x[size - n + a] for x in (sums, squares))
    variance = q / n - (s / n).square()
    best = (variance >= variance.max() - 1e-12 * ordered.abs().max().square()).nonzero()[:, 0]
    # The most balanced split, then the one with more from above.
    split = int(best[((2 * best - n).abs() * 2 + (2 * best > n)).argmin()])
    chosen[:] = False
    chosen[up[:split]] = True
    down = value.argsort(descending=True, stable=True)
    chosen[down[~chosen[down]][: n - split]] = True  # among equals the first rows, from above too
    return chosen


def densest(key: PerToken, valid: Mask, k: float, per: str = "batch") -> Mask:
    """The share k of valid tokens with the largest keys; at least one. Among equals the first; a key of 0 never."""
    key = torch.where(valid, key, -torch.inf)
    if per == "row":
        most = (valid.sum(-1).double() * k - SLACK).ceil().clamp(min=1)
        rank = key.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return valid & (rank < most[:, None]) & (key > 0)
    found = key[valid]
    if len(found) == 0:
        return valid
    wanted = max(1, ceil(k * len(found) - SLACK))
    edge = found.kthvalue(len(found) + 1 - wanted).values
    kept = found > edge
    kept[(found == edge).nonzero()[:, 0][: wanted - int(kept.sum())]] = True
    return torch.zeros_like(valid).masked_scatter(valid, kept & (found > 0))


def _two(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _enough(n: float) -> bool:
    """Whether n is a number of rows, or a share of them; one row has no variance."""
    return 2 <= n < torch.inf or (isinstance(n, float) and 0 < n <= 1)


def _between(ends: tuple[float, float], p: float) -> float:
    return (1 - p) * ends[0] + p * ends[1]


def _count(rows: tuple[float, float], p: float, size: int, groups: int, where: str) -> int:
    """How many of `size` rows, which are so many groups, are taken at progress p."""
    first, last = (n * size if n <= 1 else n * groups for n in rows)
    wanted = max(2, round(_between((first, last), p)))
    if wanted > size > 1:
        warnings.warn(f"D3S is to choose more rows than a {where} has: all are taken", stacklevel=2)
    return min(wanted, size)


def _mean(x: PerToken, mask: Mask) -> PerRow:
    """Of each row; to the last bit that of its tokens where they are all the same, so that rows tie."""
    first = torch.where(mask, x, 0.0)[:, :1]
    return first[:, 0] + masked_mean(x - first, mask)


def _finite(x: PerToken, mask: Mask, what: str) -> None:
    bad = (~torch.isfinite(x) & mask).any(-1)
    if bad.any():
        raise UserError(f"D3S: the {what} of row {int(bad.nonzero()[0])} is not finite")


def _logs(value: PerRow, chosen: Rows, live: Rows) -> dict[str, float]:
    kept = value[chosen].double()
    return {
        "d3s/variance_before": value.double().var(correction=0).item(),
        "d3s/variance": kept.var(correction=0).item() if len(kept) else 0.0,
        "d3s/useful_rows": live[chosen].double().mean().item() if len(kept) else 0.0,
        "d3s/selected_rows": float(chosen.sum()),
    }
