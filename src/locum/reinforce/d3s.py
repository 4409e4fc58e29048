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
    scope "group+batch"  N_s of each group, then the batch's share among those

N_s and K go from their first to their second value linearly with the run's progress p: few at first, more at the end.
Why: GRPO's gradient has a bound that does not depend on how the rewards vary, because advantages have unit variance within
a group; after the selection the bound grows like Var(A)^(1/3) (Propositions 1 and 2).

Shapes: advantages, entropy and mask [rows, tokens], entropy in nats; the result is a mask of tokens, and rows without any
are dropped before the training forward: that is where time is saved. Tokens left out save no forward. Cost: a sort of the
rows and one selection (no sort) of the tokens.

Traps. Advantages normalised again after the selection undo it. Rows that are all of advantage 0 are never chosen, whatever N
is. At an equal number of steps (not of trained tokens) less is learnt where every token counts: `locum show d3s` has figures.
Padding has no entropy; bfloat16 entropies tie.

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

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.base import Choice, Mask, PerToken, Run, Weigh
from locum.tokens.groups import index
from locum.tokens.logprobs import masked_mean
from locum.tokens.rollouts import Rollouts

__all__ = ["D3S", "densest", "widest"]

PerRow = Float[Tensor, " n"]
SCOPES = ("batch", "group", "group+batch")


@dataclass(frozen=True)
class D3S(Weigh):
    """The rows whose advantages vary most, and of their tokens those of large |advantage| x entropy.

    Args:
        rows: N_s, rows per group, at the beginning and at the end of a run; >= 2, or a share of the group's rows in (0, 1].
            Ours: a quarter, then a half.
        tokens: K, the share of their tokens, at the beginning and at the end; in (0, 1]. Ours 0.2, then 0.5.
        scope: "batch" (the paper's), "group", or "group+batch".
        key: select rows by "advantage" (the paper's) or by "reward" (PODS, another method, to compare with).
        per: the share of tokens is of the "batch" (the paper's) or of each "row".
        row_stat: the value of a row whose tokens differ in advantage: their "mean", or the mean of their absolute values with
            its sign ("size").
        shares: N for scope "group+batch": rows of the batch per group at the beginning and at the end; as `rows` if None.
    """

    rows: tuple[float, float] = (0.25, 0.5)
    tokens: tuple[float, float] = (0.2, 0.5)
    scope: str = "batch"
    key: str = "advantage"
    per: str = "batch"
    row_stat: str = "mean"
    shares: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "shares") if self.shares is not None else ("rows",):
            require(
                self, name, all(_many(n) for n in getattr(self, name)), "two numbers >= 2, or shares like 0.5 or 1.0"
            )
        require(self, "tokens", all(0 < k <= 1 for k in self.tokens), "two shares in (0, 1]")
        require(self, "scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        require(self, "key", self.key in ("advantage", "reward"), '"advantage" or "reward"')
        require(self, "per", self.per in ("batch", "row"), '"batch" or "row"')
        require(self, "row_stat", self.row_stat in ("mean", "size"), '"mean" or "size"')
        require(
            self, "shares", self.shares is None or self.scope == "group+batch", 'None unless scope is "group+batch"'
        )
        if self.rows[0] > self.rows[1] or self.tokens[0] > self.tokens[1]:
            warnings.warn("D3S begins with more than it ends with: the paper's schedule is the other way", stacklevel=2)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"}) if min(self.tokens) < 1 else frozenset()

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        p, mask = run.progress, rollouts.mask
        _finite(advantages, mask, "advantage")
        value = self.of_rows(rollouts, advantages)
        live = (advantages != 0).logical_and(mask).any(-1)  # a row of nothing but zeros teaches nothing
        inverse, groups = index(rollouts.group)
        sizes = torch.bincount(inverse, minlength=groups).tolist()
        chosen = torch.ones_like(live)
        if self.scope.startswith("group"):
            chosen = torch.zeros_like(live)
            for g, size in enumerate(sizes):
                at = (inverse == g).nonzero()[:, 0]
                chosen[at] = widest(value[at], self._many(self.rows, p, size))
        if self.scope.endswith("batch"):
            share = self.rows if self.shares is None else self.shares
            at = chosen.nonzero()[:, 0]
            wanted = sum(self._many(share, p, size) for size in sizes)
            chosen = torch.zeros_like(live)
            chosen[at] = widest(value[at], wanted)
        if not live.any():
            chosen = torch.zeros_like(live)
        keep = mask & chosen[:, None]
        k = (1 - p) * self.tokens[0] + p * self.tokens[1]
        if k < 1 and chosen.any():
            _finite(rollouts.columns["entropy"], mask, "entropy")
            key = advantages.abs() * rollouts.columns["entropy"]
            keep = densest(key, keep, k, self.per)
        return Choice(keep=keep, logs=self._logs(value, chosen, live))

    def of_rows(self, rollouts: Rollouts, advantages: PerToken) -> PerRow:
        """What each row is selected by."""
        if self.key == "reward":
            return rollouts.reward.nan_to_num(0.0)
        mean = masked_mean(advantages, rollouts.mask)
        return mean if self.row_stat == "mean" else masked_mean(advantages.abs(), rollouts.mask) * mean.sign()

    def _many(self, rows: tuple[float, float], p: float, size: int) -> int:
        """Rows per group at progress p."""
        first, last = (n * size if n <= 1 else n for n in rows)
        wanted = max(2, round((1 - p) * first + p * last))
        if wanted > size > 1:
            warnings.warn(f"D3S.rows asks for {wanted} rows of groups of {size}: all are taken", stacklevel=3)
        return min(wanted, size)

    @staticmethod
    def _logs(value: PerRow, chosen: Bool[Tensor, " n"], live: Bool[Tensor, " n"]) -> dict[str, float]:
        kept = value[chosen].double()
        return {
            "d3s/variance_before": value.double().var(correction=0).item(),
            "d3s/variance": kept.var(correction=0).item() if len(kept) else 0.0,
            "d3s/useful_rows": live[chosen].double().mean().item() if len(kept) else 0.0,
            "d3s/selected_rows": float(chosen.sum()),
        }


def widest(value: PerRow, n: int) -> Bool[Tensor, " n"]:
    """The n values of largest variance: the optimum over all subsets of that size."""
    size = len(value)
    if n >= size:
        return torch.ones_like(value, dtype=torch.bool)
    ordered, order = value.double().sort(stable=True)
    zero = ordered.new_zeros(1)
    sums, squares = (torch.cat([zero, x.cumsum(0)]) for x in (ordered, ordered.square()))
    a = torch.arange(n + 1, device=value.device)  # so many from below, n - a from above
    s = sums[a] + sums[-1] - sums[size - n + a]
    q = squares[a] + squares[-1] - squares[size - n + a]
    variance = q / n - (s / n).square()
    best = (variance >= variance.max() - 1e-12 * ordered.abs().max().square().clamp(min=1e-300)).nonzero()[:, 0]
    # The most balanced split, then the one with more from above. Ties inside the values go by row number on both ends.
    unbalanced = (2 * best - n).abs() * 2 + (best > n - best).long()
    split = int(best[unbalanced.argmin()])
    chosen = torch.zeros_like(value, dtype=torch.bool)
    chosen[order[:split]] = True
    if n > split:
        edge = value[order[size - n + split]]
        sure = (value > edge) & ~chosen
        ties = ((value == edge) & ~chosen).nonzero()[:, 0]
        chosen |= sure
        chosen[ties[: n - split - int(sure.sum())]] = True
    return chosen


def densest(key: PerToken, valid: Mask, k: float, per: str = "batch") -> Mask:
    """The share k of valid tokens with the largest keys; at least one. Among equals the first; a key of 0 never."""
    key = torch.where(valid, key, -torch.inf)
    if per == "row":
        most = (valid.sum(-1) * k - 1e-9).ceil().clamp(min=1)
        rank = key.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return valid & (rank < most[:, None]) & (key > 0)
    flat = key.flatten()
    wanted = max(1, ceil(k * int(valid.sum()) - 1e-9))
    edge = flat.topk(min(wanted, len(flat))).values[-1]
    above = flat > edge
    ties = (flat == edge).nonzero()[:, 0][: wanted - int(above.sum())]
    above[ties] = True
    return above.view_as(valid) & valid & (key > 0)


def _many(n: float) -> bool:
    """Whether n is a number of rows, or a share of them; one row has no variance."""
    return n >= 2 or (isinstance(n, float) and 0 < n <= 1)


def _finite(x: PerToken, mask: Mask, what: str) -> None:
    bad = (~torch.isfinite(x) & mask).any(-1)
    if bad.any():
        raise UserError(f"D3S: the {what} of row {int(bad.nonzero()[0])} is not finite")
