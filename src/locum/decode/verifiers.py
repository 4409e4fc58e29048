"""The two verifiers that are no paper's own here: following the target's tokens, and rejection along one chain."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from locum.decode.base import MEANING, Law, Rows, Tree, Verifier, draw, walk


@dataclass(frozen=True)
class Match(Verifier):
    """Draw the target's token at each node and follow the child that carries it.

    Exact for every tree, however it was made, as long as the tree did not look at these draws: each token that is emitted is a sample
    of the target's law at its node. Acceptance at a node is the target's mass on its children.
    """

    accepts: ClassVar[frozenset[str]] = frozenset(MEANING) | {"mixed"}

    def walk(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        return walk(tree, rows, rng)


@dataclass(frozen=True)
class ChainRejection(Verifier):
    """Speculative sampling (arXiv 2211.17192, 2302.01318) along one chain of drafted tokens.

    With p the law a token x was drawn from and q the target's: accept x with probability min(1, q(x)/p(x)); otherwise emit a token
    from norm(max(q - p, 0)) and stop. After the last accepted token, one more from q. Acceptance is sum_x min(p(x), q(x)).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"chain"})

    def walk(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        path: list[int] = []
        node = 0
        while tree.children[node]:
            (step,) = tree.children[node]
            p, q, token = tree.laws[node], rows.law(node), tree.tokens[step]
            if rng.random() * p[token] >= q[token]:
                return path, draw(residual(q, p), rng)
            path.append(step)
            node = step
        return path, draw(rows.law(node), rng)


def residual(q: Law, p: Law) -> Law:
    """norm(max(q - p, 0)); q itself where nothing is left, which only rounding can reach."""
    rest = np.maximum(q - p, 0.0)
    mass = rest.sum()
    return rest / mass if mass > 0 else q
