"""Two drafts in one tree: what the second proposes is merged into the first, equal beginnings shared."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from locum.decode.base import Context, Drafter, Rows, Tree
from locum.decode.lookup import Lookup
from locum.decode.tokenrecycling import TokenRecycling
from locum.models import LM

__all__ = ["Graft"]


@dataclass(frozen=True)
class Graft(Drafter):
    """The union of two drafters' trees.

    Whatever the two drew, the union is verified as a fixed tree: the Match verifier is exact for it.

    Args:
        first: its tree comes first.
        second: its tree is grafted onto the first.
    """

    first: Drafter = field(default_factory=TokenRecycling)
    second: Drafter = field(default_factory=Lookup)

    @property
    def needs_draft(self) -> bool:  # type: ignore[override]
        return self.first.needs_draft or self.second.needs_draft

    @property
    def reads_prompt(self) -> bool:
        return self.first.reads_prompt or self.second.reads_prompt

    def start(self, target: LM, draft: LM | None = None) -> tuple[Any, Any]:
        return self.first.start(target, draft), self.second.start(target, draft)

    def propose(self, state: tuple[Any, Any], context: Context) -> Tree:
        return union(self.first.propose(state[0], context), self.second.propose(state[1], context))

    def read(self, state: tuple[Any, Any], ids: Any, logits: Any) -> None:
        for drafter, own in zip((self.first, self.second), state, strict=True):
            if drafter.reads_prompt:
                drafter.read(own, ids, logits)

    def observe(self, state: tuple[Any, Any], tree: Tree, rows: Rows, path: list[int]) -> None:
        for drafter, own in zip((self.first, self.second), state, strict=True):
            drafter.observe(own, tree, rows, path)


def union(first: Tree, second: Tree) -> Tree:
    """The nodes of the first tree, then those of the second whose paths the first does not hold."""
    tokens, parents = list(first.tokens), list(first.parents)
    index = {(p, t): i for i, (p, t) in enumerate(zip(parents, tokens, strict=True))}
    place = np.zeros(len(second.tokens), int)
    for node in range(1, len(second.tokens)):
        key = int(place[second.parents[node]]), second.tokens[node]
        place[node] = index.setdefault(key, len(tokens))
        if place[node] == len(tokens):
            tokens.append(key[1])
            parents.append(key[0])
    return Tree(tokens, parents, kind=f"{first.kind}+{second.kind}")
