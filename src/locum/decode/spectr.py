"""SpecTr: Fast Speculative Decoding via Optimal Transport

Expensive: sampling from a large model, one large forward per token.
Stands in: K independent sequences of a small model, scored in one large forward, of which a selection rule keeps a beginning.
Check: the text's law is the large model's, exactly; tokens per large forward; acceptance between 1 - (1 - 1/K)^K of the optimum
    and the optimum.

With p the small model's law at a node, q the large one's, and k drafts X_1..X_k drawn from p (duplicates count), a selection rule is a
coupling of p^k and q; its best acceptance is an optimal transport problem with membership cost, whose value is

    alpha_k(p, q) = min over H of 1 - q(H) + 1 - (1 - p(H))^k        H runs through the prefixes of the vocabulary by descending q/p

K-SEQ, the practical rule, for a division factor rho:

    beta(rho)  = sum_x min(p(x), q(x)/rho)                    chance that one draft is accepted
    p_acc(rho) = 1 - (1 - beta)^k
    for each draft in turn: accept X_i with probability min(1, q(X_i) / (rho p(X_i)))
    none accepted: a token from  r = (q - min(p, q/rho) p_acc/beta) / (1 - p_acc)

r is a law iff p_acc <= rho beta; rho* is the root of p_acc(rho) = rho beta(rho) on [1, k], where acceptance is largest, and then
p_acc >= (1 - (1 - 1/k)^k) alpha_k. One draft gives rho* = 1: ordinary speculative sampling.

Along the sequences: at each node the survivors are those that carry the accepted token, with their number as the next k; a rejection
ends the step, and after L accepted levels one more token comes from q. So a step yields 1 to L + 1 tokens.

Shapes and units: laws float64 [vocab]; sequences merge into a trie of at most 1 + K L nodes for the large forward. Cost: L small
forwards and one large per step, O(vocab log vocab) per visited node. Gains exist at temperature > 0 only: at 0 all drafts are the same.

Example:
    >>> from locum import decode, models
    >>> from locum.tokens import Sampling
    >>> lm, small = models.tiny(vocab_size=16, seed=0), models.tiny(vocab_size=16, seed=0)
    >>> [out] = decode.generate(lm, [[1, 2]], drafter=decode.SpecTr(K=2, L=3), draft=small, sampling=Sampling(1.0), max_new_tokens=12)
    >>> out.forwards, len(out.ids)  # a draft that equals its target is accepted whole
    (4, 12)

Authors: Sun, Suresh, Ro, Beirami, Jain, Yu
Year: 2023
Venue: NeurIPS 2023
arXiv: 2310.15141
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from locum.decode.base import Context, Drafter, Law, Rows, Tree, Verifier, draw
from locum.decode.drafting import law_of, start_draft
from locum.method import require
from locum.models import LM, Session

__all__ = ["SpecTr", "KSEQ", "Selection", "kseq", "otm_acceptance"]  # noqa: RUF022  the method is the first


@dataclass(frozen=True)
class SpecTr(Drafter):
    """Draft K independent sequences of length L from the small model, merged where they begin alike.

    Args:
        K: sequences; >= 1. Paper 8.
        L: tokens per sequence; >= 0. Paper 8.
    """

    K: int = 8
    L: int = 8
    draws: ClassVar[str] = "iid"
    needs_draft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, "K", self.K >= 1, ">= 1")
        require(self, "L", self.L >= 0, ">= 0")

    def start(self, target: LM, draft: LM | None = None) -> Session:
        return start_draft(self, target, draft)

    def propose(self, state: Session, context: Context) -> Tree:
        depth = context.depth(self.L)
        tokens, parents, counts = [context.ids[-1]], [-1], [self.K]
        laws: dict[int, Law] = {}
        level = [0]
        logits = state.resume(context.ids)[None] if depth else None
        for step in range(depth):
            below: list[int] = []
            for node, row in zip(level, logits, strict=True):  # type: ignore[arg-type]
                laws[node] = law_of(row, context.sampling)
                drawn = context.rng.choice(len(laws[node]), counts[node], p=laws[node])
                for token, count in zip(*np.unique(drawn, return_counts=True), strict=True):
                    below.append(len(tokens))
                    tokens.append(int(token))
                    parents.append(node)
                    counts.append(int(count))
            if step + 1 < depth:
                logits = state.extend([tokens[n] for n in below], [parents[n] - 1 for n in below])
            level = below
        return Tree(tokens, parents, draws="iid", counts=counts, laws=laws)


@dataclass(frozen=True)
class Selection:
    """K-SEQ at one node: the division factor, the chance that one draft is accepted, that any is, and the law if none is."""

    rho: float
    beta: float
    p_acc: float
    residual: Law


def kseq(p: Law, q: Law, k: int) -> Selection:
    """The K-SEQ rule for k drafts from p towards q, with the factor rho* that accepts most.

    Shapes: p, q and residual float64 [vocab].
    Raises: ValueError if k < 1, p or q is no law, or they differ in length; ArithmeticError if the residual were negative beyond rounding.
    """
    _require_laws(p, q, k)
    rho = _division_factor(p, q, k)
    accepted = np.minimum(p, q / rho)
    beta = min(float(accepted.sum()), 1.0)
    p_acc = _any_of(beta, k)
    if beta == 0 or p_acc >= 1:  # nothing can be accepted, or nothing rejected: then the residual is never used
        return Selection(rho, beta, p_acc, q)
    residual = (q - accepted * (p_acc / beta)) / (1 - p_acc)
    if residual.min() * (1 - p_acc) < -1e-9:
        raise ArithmeticError(f"K-SEQ residual is negative ({residual.min():.3g}): rho {rho:.6g} is too small")
    residual = np.maximum(residual, 0.0)
    mass = residual.sum()
    return Selection(rho, beta, p_acc, residual / mass if mass > 0 else q)


def _require_laws(p: Law, q: Law, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if p.shape != q.shape:
        raise ValueError(f"p and q must have one vocabulary, got {len(p)} and {len(q)} tokens")
    for name, law in (("p", p), ("q", q)):
        if not (law.min() >= 0 and abs(law.sum() - 1) < 1e-6):
            raise ValueError(
                f"{name} must be a law: no entry below 0 and a sum of 1, got {law.min():.6g} and {law.sum():.6g}"
            )


def _any_of(beta: float, k: int) -> float:
    return 1.0 if beta >= 1 else float(-np.expm1(k * np.log1p(-beta)))


def _division_factor(p: Law, q: Law, k: int) -> float:
    """rho*: upper end of the bracket of the root of 1 - (1 - beta(rho))^k = rho beta(rho) on [1, k]."""
    if k == 1:
        return 1.0
    mine = p > 0  # tokens that no draft can carry do not count
    with np.errstate(over="ignore"):
        ratio = q[mine] / p[mine]
    order = ratio.argsort()
    ratio = ratio[order]
    q_below = np.concatenate([[0.0], q[mine][order].cumsum()])
    p_above = np.concatenate([p[mine][order][::-1].cumsum()[::-1], [0.0]])

    def excess(rho: float) -> float:
        split = int(ratio.searchsorted(rho))
        beta = min(p_above[split] + q_below[split] / rho, 1.0)
        return _any_of(beta, k) - rho * beta

    low, high = 1.0, float(k)
    if excess(low) <= 0:
        return low
    while high - low > 1e-9 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def otm_acceptance(p: Law, q: Law, k: int) -> float:
    """The best acceptance that any exact rule for k drafts from p can reach: alpha_k, by the prefixes of descending q/p.

    Raises: ValueError if k < 1, p or q is no law, or they differ in length.
    """
    _require_laws(p, q, k)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(p > 0, q / p, np.inf)
    order = np.argsort(-ratio, kind="stable")
    mass_p = np.concatenate([[0.0], p[order].cumsum()]).clip(0, 1)
    mass_q = np.concatenate([[0.0], q[order].cumsum()])
    return float((2 - mass_q - (1 - mass_p) ** k).min())


@dataclass(frozen=True)
class KSEQ(Verifier):
    """K-SEQ down the trie of the drafted sequences."""

    accepts: ClassVar[frozenset[str]] = frozenset({"iid", "chain"})

    def walk(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        path: list[int] = []
        node = 0
        while children := tree.children[node]:
            counts = [1 if tree.counts is None else tree.counts[c] for c in children]
            p, q = tree.laws[node], rows.law(node)
            rule = kseq(p, q, sum(counts))
            # The drafts are exchangeable, so the order in which equal ones are tried does not matter.
            step = next(
                (c for c in rng.permutation(np.repeat(children, counts)) if _accept(rule, p, q, tree.tokens[c], rng)),
                None,
            )
            if step is None:
                return path, draw(rule.residual, rng)
            node = int(step)
            path.append(node)
        return path, draw(rows.law(node), rng)


def _accept(rule: Selection, p: Law, q: Law, token: int, rng: np.random.Generator) -> bool:
    return bool(rng.random() * rule.rho * p[token] < q[token])
