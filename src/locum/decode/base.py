"""What a decoder is made of: a drafter proposes a tree of tokens, one forward scores it, a verifier walks it.

A drafter knows nothing of the verifier and the verifier nothing of the drafter: between them stands the tree, which says how its
tokens were drawn. A verifier is exact for some ways of drawing and refuses the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from locum.errors import UserError
from locum.models import LM
from locum.tokens import Sampling

Law = Float64[np.ndarray, " vocab"]
Draws = Literal["fixed", "chain", "iid", "without replacement"]

MEANING: Mapping[str, str] = {
    "fixed": "chosen, not drawn",
    "chain": "one draw per node from the draft's law",
    "iid": "independent draws from the draft's law, with replacement",
    "without replacement": "successive draws from the draft's law, each child's mass removed before the next",
}


@dataclass(frozen=True, eq=False)
class Tree:
    """Drafted tokens below the last committed one.

    Node 0 is that last token, which is not in the target's cache yet; parents come before their children, and the children of a
    node stand in the order in which they were drawn.

    Args:
        tokens: token ids, node 0 first.
        parents: index of each node's parent; -1 for node 0.
        draws: how the tokens came about.
        counts: for "iid", how many of the drawn sequences pass through each node (node 0: all of them).
        laws: for drawn trees, at each node that has children, the law `[vocab]` its first child was drawn from.
        kind: drafts of one kind share acceptance statistics (a lookup after three matching tokens, or after one).
    """

    tokens: list[int]
    parents: list[int]
    draws: Draws = "fixed"
    counts: list[int] | None = None
    laws: Mapping[int, Law] = field(default_factory=dict)
    kind: str = ""

    @classmethod
    def root(cls, token: int) -> "Tree":
        """No draft at all: verifying it is plain decoding."""
        return cls([token], [-1])

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int], **kwargs: Any) -> "Tree":
        """One sequence of tokens below the root."""
        return cls([root, *tokens], list(range(-1, len(tokens))), **kwargs)

    @classmethod
    def merge(cls, root: int, sequences: Sequence[Sequence[int]], **kwargs: Any) -> "Tree":
        """Sequences merged where they begin alike, with the number of sequences through each node."""
        tokens, parents, counts = [root], [-1], [len(sequences)]
        index: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            node = 0
            for token in sequence:
                child = index.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                    counts.append(0)
                counts[child] += 1
                node = child
        return cls(tokens, parents, counts=counts, **kwargs)

    def __len__(self) -> int:
        """Drafted tokens, the root not counted."""
        return len(self.tokens) - 1

    @cached_property
    def children(self) -> list[list[int]]:
        below: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], 1):
            below[parent].append(node)
        return below

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`."""
        return next((c for c in self.children[node] if self.tokens[c] == token), None)

    def follow(self, tokens: Sequence[int]) -> list[int]:
        """The longest path below the root that spells a beginning of `tokens`."""
        path, node = [], 0
        for token in tokens:
            step = self.child(node, token)
            if step is None:
                break
            path.append(step)
            node = step
        return path


class Rows:
    """The target's law at every node of a tree, made for a node only when it is asked for.

    Args:
        logits: `[nodes, vocab]`, node 0 first.
        sampling: what turns logits into the law.
    """

    def __init__(self, logits: Float[Tensor, "nodes vocab"], sampling: Sampling):
        self.logits, self.sampling = logits, sampling
        self._laws: dict[int, Law] = {}

    @cached_property
    def best(self) -> list[int]:
        """The most likely token at every node.

        Raises: ValueError if the logits hold NaN or a node has no finite one.
        """
        values, ids = self.logits.max(-1)  # NaN wins every comparison, so looking at the largest is enough
        if not values.isfinite().all():
            raise ValueError("logits hold NaN, +inf or no finite value; no token can be chosen from them")
        best: list[int] = ids.tolist()
        return best

    def law(self, node: int) -> Law:
        """The law of the token after `node`, float64 `[vocab]`."""
        if node not in self._laws:
            self._laws[node] = self.sampling.law(self.logits[node]).cpu().numpy()
        return self._laws[node]

    def draw(self, node: int, rng: np.random.Generator) -> int:
        """A token from the law at `node`."""
        return self.best[node] if self.sampling.greedy else draw(self.law(node), rng)


def draw(law: Law, rng: np.random.Generator) -> int:
    """A token from a law. Never one without mass, whatever the rounding."""
    cumulative = np.cumsum(law)
    token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return token if token < len(law) and law[token] > 0 else int(law.argmax())


@dataclass(frozen=True)
class Context:
    """What a drafter may look at.

    Args:
        ids: prompt and text so far; the last one is the root of the tree.
        limit: how deep a draft can be used at most, for the tokens left to generate.
        sampling: the target's sampling.
        rng: the run's random numbers.
        size: how many tokens to draft at most; None leaves it to the drafter.
    """

    ids: Sequence[int]
    limit: int
    sampling: Sampling
    rng: np.random.Generator
    size: int | None = None

    def depth(self, wanted: int) -> int:
        """How long a chain to draft where `wanted` tokens were asked for."""
        return max(0, min(wanted, self.limit, wanted if self.size is None else self.size))


@dataclass(frozen=True)
class Drafter(ABC):
    """Where drafts come from: a value that holds the method's parameters. What a run remembers is its state.

    Subclasses say in `draws` how they draw ("mixed" if that changes from step to step) and in `needs_draft` whether they need a draft
    model.
    """

    draws: ClassVar[str] = "fixed"
    needs_draft: ClassVar[bool] = False

    def start(self, target: LM, draft: LM | None = None) -> Any:
        """A new state, for one text after another; None where nothing is remembered."""
        return None

    @abstractmethod
    def propose(self, state: Any, context: Context) -> Tree:
        """The draft after `context.ids`; a tree that is only its root where there is nothing to propose."""

    def read(  # noqa: B027  a drafter need not learn
        self, state: Any, ids: Sequence[int], logits: Float[Tensor, "tokens vocab"]
    ) -> None:
        """Learn from a part of the prompt; called only if `reads_prompt`."""

    @property
    def reads_prompt(self) -> bool:
        return False

    def observe(  # noqa: B027
        self, state: Any, tree: Tree, rows: Rows, path: list[int]
    ) -> None:
        """Learn from a verified tree, of which `path` was accepted."""


@dataclass(frozen=True)
class Verifier(ABC):
    """A rule that keeps a path of the tree and adds one token, such that the text has exactly the target's law."""

    accepts: ClassVar[frozenset[str]]

    def select(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        """The accepted nodes below the root, in order, and the token that follows them.

        Raises: UserError if the rule is not exact for trees drawn this way.
        """
        if len(tree):  # no draft at all is drawn in every way
            check_pair(tree.draws, self)
        if rows.sampling.greedy or len(tree) == 0:  # the law is one token: every exact rule follows it
            return walk(tree, rows, rng)
        return self.walk(tree, rows, rng)

    @abstractmethod
    def walk(self, tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
        """The rule itself, for any law."""


def walk(tree: Tree, rows: Rows, rng: np.random.Generator) -> tuple[list[int], int]:
    """Draw the target's token at each node and go to the child that carries it, until none does."""
    path: list[int] = []
    node = 0
    while True:
        token = rows.draw(node, rng)
        step = tree.child(node, token)
        if step is None:
            return path, token
        path.append(step)
        node = step


def check_pair(draws: str, verifier: Verifier) -> None:
    """Refuse a verifier that is not exact for trees drawn in this way.

    Raises: UserError saying what the verifier is valid for.
    """
    if draws not in verifier.accepts:
        name = type(verifier).__name__
        how = "; ".join(f"{d!r} ({MEANING[d]})" for d in MEANING if d in verifier.accepts)
        raise UserError(
            f"verifier {name} is exact only for drafts that are {how}; this draft is {draws!r}"
            + (f" ({MEANING[draws]})" if draws in MEANING else "")
        )
