"""DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure

Expensive: sampling from a large model token by token.
Stands in: a token tree drawn from a small model, grown where the small model itself thinks a check is most likely,
    verified in one large forward.
Check: the law of the text is the target's (at temperature 0, the very tokens); accepted tokens per forward against chains and
    fixed trees of equal size.

D is the draft's law at a node, R what is left of it after the children drawn so far (their mass zeroed, renormalised). The chance that a
drawn token y will be accepted is estimated by R[y], so the chance that the *next* draw at a node will be needed at all is

    v(node) = product over ancestors a of R_a[a]  *  product over earlier siblings s of (1 - R_s[s])

It depends only on tokens already drawn, never on the one about to be drawn; that keeps the output unbiased. Two ways to grow:

    budget m      draw where v is largest, m times (a heap); maximises the sum of v over all trees of m nodes
    threshold t   layer by layer, draw at a node while its v >= t; one draft forward per layer instead of one per inner node

Verification (recursive rejection without replacement), at a node with children y_1, y_2, .. in order of drawing, R = target's law:

    accept y_i with probability min(1, R[y_i] / D[y_i]) and go on there;   else  R <- norm(max(R - D, 0)),  D[y_i] <- 0,  D <- norm(D)
    no child accepted: a token from R

Shapes and units: laws float64 [vocab]; v without unit. Cost per step: one target forward of m + 1 tokens, one draft forward per
inner node (budget) or per layer (threshold), one pass over the vocabulary per inner node.

The estimate pays where acceptance follows the draft's own confidence: at low temperature. Where the target is the draft plus noise,
sampled at temperature 1, acceptance hardly depends on R[y] and a plain chain accepts several times more per forward.

Example:
    >>> from locum import decode, models
    >>> lm, small = models.tiny(vocab_size=16, seed=0), models.tiny(vocab_size=16, seed=0)
    >>> [out] = decode.generate(lm, [[1, 2]], drafter=decode.DySpec(budget=8), draft=small, max_new_tokens=20)
    >>> out.ids == decode.generate(lm, [[1, 2]], max_new_tokens=20)[0].ids, out.forwards < 20
    (True, True)

Authors: Xiong, Zhang, Li, Zou
Year: 2024
Venue: World Wide Web 28(3), 2025
arXiv: 2410.11744
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64

from locum.decode.base import Context, Drafter, Law, Rows, Tree, Verifier, draw
from locum.decode.drafting import law_of, start_draft
from locum.method import require
from locum.models import LM, Session
from locum.tokens import Sampling

__all__ = ["DySpec", "Growth", "RecursiveRejection", "grow", "succession"]

_EMPTY = 1e-12  # mass below which what is left of a law is rounding


@dataclass(frozen=True)
class DySpec(Drafter):
    """Draft a tree where the draft model expects it to be checked.

    Args:
        budget: nodes of the tree; >= 0. Paper 64 on a GPU; on a CPU 8 to 24. With a threshold it is the cap.
        threshold: grow layer by layer down to this v instead; in (0, 1), about 1/size; None grows by the heap.
        draft_temperature: of the draft's law, whatever the target's; > 0. Paper 0.6.
    """

    budget: int = 64
    threshold: float | None = None
    draft_temperature: float = 0.6
    draws: ClassVar[str] = "without replacement"
    needs_draft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, "budget", self.budget >= 0, ">= 0")
        require(self, "threshold", self.threshold is None or 0 < self.threshold < 1, "in (0, 1) or None")
        require(self, "draft_temperature", 0 < self.draft_temperature < float("inf"), "finite and > 0")

    def start(self, target: LM, draft: LM | None = None) -> Session:
        return start_draft(self, target, draft)

    def propose(self, state: Session, context: Context) -> Tree:
        sampling = Sampling(self.draft_temperature)
        fed = {0: -1}  # tree node -> node of the draft's session

        def laws(nodes: Sequence[int]) -> list[Law]:
            if nodes[0] == 0:
                return [law_of(state.resume(context.ids), sampling)]
            logits = state.extend([growth.tokens[n] for n in nodes], [fed[growth.parents[n]] for n in nodes])
            fed.update(zip(nodes, range(state.size - len(nodes), state.size), strict=True))
            return [law_of(row, sampling) for row in logits]

        growth = Growth(context.ids[-1])
        budget = self.budget if context.size is None else min(self.budget, context.size)
        grow(
            growth,
            laws,
            lambda node, law, most: succession(law, context.rng, most),
            budget,
            context.limit,
            self.threshold,
        )
        return Tree(growth.tokens, growth.parents, draws="without replacement", laws=growth.laws)


@dataclass
class Growth:
    """A tree as it grows: per node the token, parent, depth and the v at which it was drawn; per inner node the draft's law."""

    root: int
    tokens: list[int] = field(init=False)
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    values: list[float] = field(default_factory=lambda: [1.0])
    laws: dict[int, Law] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = [self.root]

    def add(self, token: int, parent: int, value: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.values.append(value)
        return len(self.tokens) - 1


# The order in which a node's children come, and the residual chance R[y] with which each was drawn.
Order = Callable[[int, Law, int], tuple[Int64[np.ndarray, " drawn"], Float64[np.ndarray, " drawn"]]]


def succession(
    law: Law, rng: np.random.Generator, most: int
) -> tuple[Int64[np.ndarray, " drawn"], Float64[np.ndarray, " drawn"]]:
    """The first `most` draws without replacement from a law, and for each its chance under what was left of the law.

    One race of exponential clocks with rates law[x] gives the whole order: the clocks' order is that of successive renormalised draws.
    """
    support = np.flatnonzero(law)
    times = rng.standard_exponential(len(support)) / law[support]
    most = min(most, len(support))
    first = np.argpartition(times, most - 1)[:most]
    tokens = support[first[np.argsort(times[first])]]
    mass = law[tokens]
    left = law.sum() - np.concatenate([[0.0], mass.cumsum()[:-1]])
    drawn = left > _EMPTY
    return tokens[drawn], np.minimum(mass[drawn] / left[drawn], 1.0)


def grow(
    growth: Growth,
    laws: Callable[[Sequence[int]], list[Law]],
    order: Order,
    budget: int,
    depth: int,
    threshold: float | None = None,
) -> None:
    """Grow a tree in place by Algorithm 1 (heap) or, with a threshold, Algorithm 2 (layers).

    Args:
        growth: begins with its root alone.
        laws: the draft's laws at the given nodes; called once per inner node, parents before children, by Algorithm 2 for a
            whole layer at once.
        order: the order in which the children of a node come.
        budget: nodes to draw at most; both stop before a draw, never drop one.
        depth: no node lies deeper.
        threshold: t of Algorithm 2.
    """
    if budget > 0 and depth > 0:
        _grow_layers(growth, laws, order, budget, depth, threshold) if threshold else _grow_heap(
            growth, laws, order, budget, depth
        )


def _grow_heap(growth: Growth, laws: Callable, order: Order, budget: int, depth: int) -> None:
    heap = [(-1.0, 0, 0, 0)]  # -v, insertion order, node, how many children it has
    orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    pushed = 1
    while heap and len(growth.tokens) <= budget:
        negative, _, node, drawn = heapq.heappop(heap)
        if node not in orders:  # the draft model runs only where a draw is really made
            (growth.laws[node],) = laws([node])
            orders[node] = order(node, growth.laws[node], budget)
        tokens, chances = orders[node]
        value, chance = -negative, float(chances[drawn])
        child = growth.add(int(tokens[drawn]), node, value)
        if drawn + 1 < len(tokens):
            heapq.heappush(heap, (-value * (1 - chance), pushed, node, drawn + 1))
        if growth.depths[child] < depth:
            heapq.heappush(heap, (-value * chance, pushed + 1, child, 0))
        pushed += 2


def _grow_layers(
    growth: Growth, laws: Callable, order: Order, budget: int, depth: int, threshold: float | None
) -> None:
    assert threshold is not None
    layer = [(0, 1.0)]
    while layer:
        nodes = [node for node, _ in layer]
        growth.laws.update(zip(nodes, laws(nodes), strict=True))
        below = []
        for node, value in layer:
            for token, chance in zip(*order(node, growth.laws[node], budget), strict=True):
                if value < threshold or len(growth.tokens) > budget:
                    break
                child = growth.add(int(token), node, value)
                if value * chance >= threshold and growth.depths[child] < depth:
                    below.append((child, value * float(chance)))
                value *= 1 - float(chance)
        layer = below if len(growth.tokens) <= budget else []


@dataclass(frozen=True)
class RecursiveRejection(Verifier):
    """Algorithm 3: children are tried in the order they were drawn, each rejection takes the draft's mass out of the target's law."""

    accepts: ClassVar[frozenset[str]] = frozenset({"without replacement", "chain"})

    def walk(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        path: list[int] = []
        node = 0
        while True:
            left = rows.law(node)
            step = None
            if tree.children[node]:
                step, left = self._try_children(tree, node, left, rng)
            if step is None:
                return path, draw(left, rng)
            path.append(step)
            node = step

    @staticmethod
    def _try_children(tree: Tree, node: int, left: Law, rng: np.random.Generator) -> tuple[int | None, Law]:
        law = tree.laws[node]
        for child in tree.children[node]:
            token = tree.tokens[child]
            if rng.random() * law[token] < left[token]:
                return child, left
            rest = np.maximum(left - law, 0.0)
            if rest.sum() <= 0:  # the laws agree to rounding: the rejection itself was rounding
                return None, left
            left = rest / rest.sum()
            law = law.copy()
            law[token] = 0.0
            if law.sum() < _EMPTY:
                return None, left
            law /= law.sum()
        return None, left
