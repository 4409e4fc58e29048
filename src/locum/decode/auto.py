"""A controller over drafters: picks drafter and size at every step, and plain decoding when drafting does not pay.

Drafting pays when   (1 + expected accepted tokens) / (cost of the larger forward + cost of the draft)   is above that of one plain
token. The costs are measured once per model and machine. The acceptance is learned on the way, and mostly for nothing: a draft need
not be verified to know how it would have done, the text itself tells a few tokens later. So drafters that cost no forward are watched
at every step, and those with a draft model as often as a small share of the time allows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from locum.decode.base import Context, Drafter, Rows, Tree
from locum.decode.chain import Chain
from locum.decode.cost import ForwardCost, forward_cost
from locum.decode.lookup import Lookup
from locum.decode.tokenrecycling import TokenRecycling
from locum.method import require
from locum.models import LM

__all__ = ["Auto"]

_MOST = 32  # nodes of a tree whose acceptance is tracked


@dataclass(frozen=True)
class Auto(Drafter):
    """Draft with whichever drafter pays here and now, as much as pays, or not at all.

    Any drafter whose trees may be cut to their first nodes can be a candidate: lookups, recycled trees, chains, DySpec's heap.

    Args:
        drafters: the candidates; those that need a draft model are left out where there is none.
        margin: drafting must promise this many times plain decoding's speed; >= 1.
        memory: observations that an estimate of acceptance looks back on; > 1.
        explore: share of the time that may go into drafts of a draft model that are only watched; in [0, 1].
    """

    drafters: tuple[Drafter, ...] = (Lookup(), TokenRecycling(nodes=24, learn_from_prompt=False), Chain(length=6))
    margin: float = 1.02
    memory: float = 24.0
    explore: float = 0.02
    draws: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        require(
            self,
            "drafters",
            all(d.draws in {"fixed", "chain", "without replacement"} for d in self.drafters),
            "cuttable",
        )
        require(self, "margin", self.margin >= 1, ">= 1")
        require(self, "memory", self.memory > 1, "> 1")
        require(self, "explore", 0 <= self.explore <= 1, "in [0, 1]")

    @property
    def reads_prompt(self) -> bool:
        return any(d.reads_prompt for d in self.drafters)

    def start(self, target: LM, draft: LM | None = None) -> "_State":
        arms = [_Arm(d, d.start(target, draft), self.memory) for d in self.drafters if draft or not d.needs_draft]
        return _State(arms, forward_cost(target))

    def propose(self, state: "_State", context: Context) -> Tree:
        state.settle(context.ids)
        best, gain = Tree.root(context.ids[-1]), self.margin
        for arm in state.arms:
            if arm.drafter.needs_draft:
                tree = self._watch_or_draft(arm, state, context, gain)
            else:
                tree = arm.draft(context)
            if tree is None or not len(tree):
                continue
            arm.pending.append((len(context.ids), tree))
            size, promise = arm.best_size(tree.kind, len(tree), state.cost)
            if promise > gain:
                best, gain = _first(tree, size), promise
        return best

    def _watch_or_draft(self, arm: "_Arm", state: "_State", context: Context, gain: float) -> Tree | None:
        """A draft model's draft if it promises most, or if it is due to be watched; else none is made."""
        size, promise = arm.best_size("", min(_MOST, context.limit), state.cost)
        if promise > gain:
            return arm.draft(replace(context, size=size))
        if arm.seconds > self.explore * (time.perf_counter() - state.began):
            return None
        return arm.draft(context)

    def read(self, state: "_State", ids: Sequence[int], logits: Tensor) -> None:
        for arm in state.arms:
            if arm.drafter.reads_prompt:
                arm.drafter.read(arm.state, ids, logits)

    def observe(self, state: "_State", tree: Tree, rows: Rows, path: list[int]) -> None:
        for arm in state.arms:
            arm.drafter.observe(arm.state, tree, rows, path)


@dataclass
class _Arm:
    """A candidate: its state, what its drafts cost, and per kind of draft how often each node of its trees was right."""

    drafter: Drafter
    state: Any
    memory: float
    seconds: float = 0.0  # spent on drafts so far
    per_token: float = 0.0  # seconds per drafted token
    pending: list[tuple[int, Tree]] = field(default_factory=list)
    right: dict[str, np.ndarray] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def draft(self, context: Context) -> Tree:
        began = time.perf_counter()
        tree = self.drafter.propose(self.state, context)
        spent = time.perf_counter() - began
        self.seconds += spent
        if len(tree):
            each = spent / len(tree)
            self.per_token = each if not self.per_token else 0.9 * self.per_token + 0.1 * each
        return tree

    def settle(self, ids: Sequence[int]) -> None:
        """Score the drafts of earlier steps whose fate the text now tells."""
        waiting = []
        for at, tree in self.pending:
            path = tree.follow(ids[at:])
            if len(path) == len(ids) - at and tree.children[path[-1] if path else 0]:
                waiting.append((at, tree))  # right so far, and deeper than the text
                continue
            self._count(tree, path)
        self.pending = waiting

    def _count(self, tree: Tree, path: list[int]) -> None:
        tried = min(len(tree), _MOST)
        hits = np.zeros(tried)
        hits[[node - 1 for node in path if node <= tried]] = 1
        right = self.right.setdefault(tree.kind, np.zeros(_MOST))
        seen = self.seen.setdefault(tree.kind, np.ones(_MOST))  # one doubt to begin with
        seen[:tried] = np.minimum(seen[:tried] + 1, self.memory)
        right[:tried] += (hits - right[:tried]) / seen[:tried]

    def best_size(self, kind: str, most: int, cost: ForwardCost) -> tuple[int, float]:
        """How many nodes promise most, and how many times plain decoding's speed they promise."""
        most = min(most, _MOST)
        if most < 1 or kind not in self.right:
            return 0, 0.0
        sizes = np.arange(1, most + 1)
        tokens = 1 + self.right[kind][:most].cumsum()
        draft = sizes * self.per_token / cost.seconds[0] if self.drafter.needs_draft else 0.0
        gains = tokens / (cost.ratio(sizes + 1) + draft)
        best = int(gains.argmax())
        return best + 1, float(gains[best])


@dataclass
class _State:
    arms: list[_Arm]
    cost: ForwardCost
    began: float = field(default_factory=time.perf_counter)
    length: int = 0

    def settle(self, ids: Sequence[int]) -> None:
        if len(ids) < self.length:  # another text
            for arm in self.arms:
                arm.pending.clear()
        self.length = len(ids)
        for arm in self.arms:
            arm.settle(ids)


def _first(tree: Tree, size: int) -> Tree:
    """The tree cut to its first nodes; what a drafter would have made with that many."""
    if size >= len(tree):
        return tree
    kept = size + 1
    laws = {node: law for node, law in tree.laws.items() if node < kept}
    return replace(tree, tokens=tree.tokens[:kept], parents=tree.parents[:kept], laws=laws)
