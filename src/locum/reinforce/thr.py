"""Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning

Expensive: One gradient step per token, to see how much it raises the likelihood of the right answers.
Stands in: An inner product of hidden states and prediction errors from one forward pass.
Check: It equals, to first order, the effect of a step on the output layer alone (finite differences).

Within the group of a prompt, P are the rows with a right answer. Token k of row i has the hidden state h[i,k] that its logits
are made of, the old policy's law pi[i,k] there, and the error g[i,k] = onehot(y[i,k]) - pi[i,k]. Its influence on the right
answers is

    s[i,k] = sum over j in P and k' of <g[j,k'], g[i,k]> <h[j,k'], h[i,k]>
           = g[i,k]' M h[i,k],   M = the sum of g h' over the right rows' tokens  (V x d)

and THR[i,k] = A_i s[i,k]. Why: after a small step eta on the output layer along the gradient of sum A log pi, the right answers'
log-likelihood has grown by eta sum THR (what the step does to the features is left out). A token counts

    w[i,k] = 1 + p sign(THR[i,k])    p > 0: more of what raises the right answers; p < 0: room for others
    kept if |s[i,k]| > tau           tau = beta max(0, min over j in P of the mean over k of s[j,k])

with one tau per prompt, and the host's clipped loss does the rest, divided by all tokens, not by the kept ones. Variant "nthr"
(arXiv 2505.18830) leaves the right rows alone: wrong rows' tokens with s > tau get eta = 2 |q - 1/2| instead of 1, q the share of
right rows.

s is computed in one of two forms, whichever is cheaper, both in float32 at least and over a slice of the vocabulary at a time:
`by_slices` of M (V n d operations for n tokens), or `by_pairs` of tokens (V n n_P operations). With vocab "answers" only the
columns of tokens that occur in the group's answers are summed over, probabilities as they are: an approximation, and fast.

Shapes: hidden states [n, d], scores per token [rows, tokens], unit nats per step size; columns "thr_influence" (s) and
"thr_correct" (1 on the tokens of right rows). Plan.advantages times the first is THR, to look at. Cost: no forward beside the
old policy's; one pass over the output layer for the norm, about three for s. Buffers stay below 256 MB.

Traps. Groups with right answers only, or none, have weight 1 and keep everything. One wrong row that resembles the right ones
has THR < 0. |s| > tau is strict: a group whose right rows are all alike can keep nothing. The theory is of rewards 0 and 1.
h is what the output layer is given (after the last norm), at the temperature that is trained at. A large negative p with a large
learning rate and many updates per batch collapses (-0.5, 1e-3 and 4 on the digit chain): wrong rows' weights then dominate.

Example:
    >>> import torch
    >>> from locum.reinforce.thr import by_pairs
    >>> from locum.tokens.tiles import Scores
    >>> same_state = Scores(hidden=torch.tensor([[1.0, 0.0], [1.0, 0.0]]), head=torch.zeros(3, 2))  # all tokens as likely
    >>> s = by_pairs(same_state, ids=torch.tensor([0, 1]), right=torch.tensor([True, False]))
    >>> s.numpy().round(4), (torch.tensor([1.0, -1.0]) * s).numpy().round(4)  # influence, and THR = advantage x influence
    (array([ 0.6667, -0.3333], dtype=float32), array([0.6667, 0.3333], dtype=float32))

Authors: Deng, Ren, Li, Gong, Sutherland, Li, Thrampoulidis
Year: 2025
Venue: ICLR 2026
arXiv: 2510.03669
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.base import Choice, Mask, PerToken, Run, Stage, Weigh
from locum.reinforce.losses import Clip, TokenMean
from locum.tokens.groups import group_stats, index, members
from locum.tokens.logprobs import masked_mean
from locum.tokens.rollouts import Rollouts
from locum.tokens.tiles import Scores, Tile, over_tiles, wide

__all__ = ["THR", "by_pairs", "by_slices", "influence"]

BUFFER = 1 << 23  # most numbers of one buffer: 32 MiB in float32, and there are never more than seven

PerRow = Float[Tensor, " rows"]
Influence = Float[Tensor, " n"]
Right = Bool[Tensor, " n"]
Ids = Int[Tensor, " n"]


@dataclass(frozen=True)
class THR(Weigh):
    """Weights by the sign of a token's effect on the right answers; only tokens with a large effect are kept.

    Args:
        p: in (-1, 1): above 0 exploits, below 0 explores, 0 leaves weights alone. Ours 0.1; the best depends on the model.
        beta: tokens are kept beyond beta times what the least of the right rows has on average; -inf keeps all, inf none.
        mask: leave the other tokens out; False only weighs.
        positives: "correct" rows have a reward above the threshold; with "advantage" above their group's mean.
        threshold: of the reward.
        vocab: sum over "all" of the vocabulary, or over the tokens of the group's "answers".
        variant: "thr", or "nthr", which weighs wrong rows only (p and mask are not used then).
    """

    host: ClassVar[str] = "dapo"
    p: float = 0.1
    beta: float = 1.0
    mask: bool = True
    positives: str = "correct"
    threshold: float = 0.5
    vocab: str = "all"
    variant: str = "thr"

    def __post_init__(self) -> None:
        require(self, "p", -1 < self.p < 1, "in (-1, 1)")
        require(self, "beta", self.beta >= 0 or self.beta == -torch.inf, ">= 0, or -inf")
        require(self, "positives", self.positives in ("correct", "advantage"), '"correct" or "advantage"')
        require(self, "threshold", -torch.inf < self.threshold < torch.inf, "finite")
        require(self, "vocab", self.vocab in ("all", "answers"), '"all" or "answers"')
        require(self, "variant", self.variant in ("thr", "nthr"), '"thr" or "nthr"')

    @property
    def setting(self) -> tuple[Stage, ...]:
        return (Clip(0.2, 0.2), TokenMean(denominator="all"))

    @property
    def idle(self) -> bool:
        """Whether it leaves everything as it is."""
        return self.variant == "thr" and self.p == 0 and not self.mask

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.idle else frozenset({"scores"})

    @torch.no_grad()
    def observe(self, scores: Scores, rollouts: Rollouts) -> dict[str, PerToken]:
        if scores.head is None:
            raise UserError(
                "THR reads the hidden states that logits are made of, and this policy tells its logits only: "
                "it must return Scores(hidden, head)"
            )
        row, ids = rollouts.mask.nonzero()[:, 0], rollouts.targets
        right = self.right(rollouts)[row]
        s = wide(scores.hidden[:0]).new_zeros(len(ids))
        for at in members(rollouts.group[row]):
            if right[at].any() and not right[at].all():
                s[at] = influence(Scores(scores.hidden[at], scores.head, scores.bias), ids[at], right[at], self.vocab)
        return {"thr_influence": rollouts.spread(s), "thr_correct": rollouts.spread(right.to(s.dtype))}

    def right(self, rollouts: Rollouts) -> Bool[Tensor, " rows"]:
        """The rows whose likelihood is to grow; never one without a reward."""
        if self.positives == "correct":
            return rollouts.reward > self.threshold
        stats = group_stats(rollouts.reward, rollouts.group)
        return (rollouts.reward > stats.mean) & ~stats.level

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        if self.idle:
            return Choice()
        s, mask = rollouts.columns["thr_influence"], rollouts.mask
        right = (rollouts.columns["thr_correct"] * mask).any(-1)
        share = group_stats(torch.where(rollouts.reward.isnan(), torch.nan, right.to(s.dtype)), rollouts.group)
        both = ~share.level[:, None]  # the group has right and wrong rows
        tau = self.tau(s, mask, right, rollouts.group)[:, None]
        logs = {"thr/one_sign_groups": _groups(rollouts.group, ~both[:, 0])}
        if self.variant == "nthr":
            pushed = mask & both & ~right[:, None] & (s > tau)
            weight = torch.where(pushed, 2 * (share.mean[:, None] - 0.5).abs(), 1.0)
            return Choice(weight.to(advantages.dtype), logs=logs | {"thr/weakened_tokens": _share(pushed, mask)})
        thr, large = advantages * s, s.abs() > tau
        weight = torch.where(both, 1 + self.p * thr.sign(), 1.0)
        keep = mask & (large | ~both) if self.mask else None
        logs["thr/raising_tokens"], logs["thr/dominant_tokens"] = (
            _share(x & both & mask, both & mask) for x in (thr > 0, large)
        )
        if keep is not None:
            logs["thr/empty_groups"] = empty = _groups(rollouts.group, ~_any(keep.any(-1), rollouts.group))
            if empty:
                warnings.warn(f"THR.beta = {self.beta} keeps no token of some groups", stacklevel=2)
        return Choice(weight.to(advantages.dtype), keep, logs)

    def tau(self, s: PerToken, mask: Mask, right: Bool[Tensor, " rows"], group: Int[Tensor, " rows"]) -> PerRow:
        """How large |s| must be, per row (the same within a group)."""
        inverse, n = index(group)
        mean = torch.where(right, masked_mean(s, mask), torch.inf)
        least = mean.new_full((n,), torch.inf).scatter_reduce_(0, inverse, mean, "amin").clamp(min=0)[inverse]
        return torch.full_like(least, self.beta) if isinf(self.beta) else self.beta * least


# The influence of each token of one prompt's rows.


@torch.no_grad()
def influence(scores: Scores, ids: Ids, right: Right, vocab: str = "all") -> Influence:
    """s of each token, in the form that takes less.

    Args:
        scores: of all the group's tokens, with their hidden states.
        ids: the tokens.
        right: whether a token belongs to a row whose likelihood is to grow.
        vocab: "all", or the tokens of the "answers".
    """
    n, d = scores.hidden.shape
    few = int(right.sum())
    pairs = n * few < 2 * d * (n + few) and n * (2 * few + d) <= 3 * BUFFER
    columns = ids.unique() if vocab == "answers" else None
    return (by_pairs if pairs else by_slices)(scores, ids, right, columns)


@torch.no_grad()
def by_slices(scores: Scores, ids: Ids, right: Right, columns: Int[Tensor, " v"] | None = None) -> Influence:
    """g' M h, with a few rows of M at a time; hidden states are made wide a few at a time as well."""
    h, (n, d) = scores.hidden, scores.hidden.shape
    all_tokens, of_right = torch.arange(n, device=h.device), right.nonzero()[:, 0]
    s, many = wide(h[:0]).new_zeros(n), max(1, BUFFER // (4 * d))
    for g in _errors(scores, ids, columns):
        with torch.autocast(h.device.type, enabled=False):  # a sum over thousands of tokens needs all its digits
            m = g.new_zeros(g.shape[1], d)
            for at in of_right.split(many):
                m.addmm_(g[at].T, wide(h[at]))
            for at in all_tokens.split(many):
                s[at] += (g[at] * (wide(h[at]) @ m.T)).sum(-1)
    return s


@torch.no_grad()
def by_pairs(scores: Scores, ids: Ids, right: Right, columns: Int[Tensor, " v"] | None = None) -> Influence:
    """sum over the right rows' tokens of <g, g'> <h, h'>."""
    h = wide(scores.hidden)
    alike = h.new_zeros(len(h), int(right.sum()))
    for g in _errors(scores, ids, columns):
        with torch.autocast(h.device.type, enabled=False):
            alike.addmm_(g, g[right].T)
    with torch.autocast(h.device.type, enabled=False):
        return (alike * (h @ h[right].T)).sum(-1)


def _errors(scores: Scores, ids: Ids, columns: Int[Tensor, " v"] | None) -> Iterator[Tile]:
    """onehot(ids) - softmax(logits), some columns (in order) at a time; the norm is always that of the whole vocabulary."""
    assert scores.head is not None
    h, head, bias = scores.hidden, scores.head, scores.bias
    norm = over_tiles(lambda z: z.logsumexp(-1), [scores])[0]
    if columns is None:
        columns = torch.arange(scores.vocab_size, device=h.device)
    for at in columns.split(max(1, BUFFER // sum(h.shape))):
        g = Scores(h, head[at], None if bias is None else bias[at]).logits(h).sub_(norm[:, None]).exp_().neg_()
        column = torch.searchsorted(at, ids).clamp(max=len(at) - 1)
        said = (at[column] == ids).nonzero()[:, 0]
        g[said, column[said]] += 1
        yield g


def _any(rows: Bool[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """Whether it is true of any row of the group, per row."""
    inverse, n = index(group)
    return inverse.new_zeros(n).index_add_(0, inverse, rows.long())[inverse] > 0


def _groups(group: Int[Tensor, " rows"], rows: Bool[Tensor, " rows"]) -> float:
    """How many groups these rows are of."""
    return float(len(group[rows].unique()))


def _share(of: Mask, among: Mask) -> float:
    return float(of.sum()) / max(1, int(among.sum()))
