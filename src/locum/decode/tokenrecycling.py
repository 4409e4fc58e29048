"""Token Recycling: Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling

Expensive: one forward of the model for every token it writes.
Stands in: a tree read off a table of what the model ranked highest after each token the last time, checked in one forward.
Check: the greedy text is identical token by token; tokens per forward against what the larger forward costs.

State: M, integers [vocab, k]. Row t holds the k ids that the model ranked highest the last time token t was fed, best first; -1 where t
was not fed yet. A static template is a list of paths of ranks: node (r1, r2, ..) carries the r1-th successor of the root, then the
r2-th successor of that, and so on:

    token[node] = M[token[parent[node]], rank[node]]

One step: fill the template level by level, feed root and tree in one forward, walk from the root to the child that carries the
target's token, and write the new top-k of every fed token back, accepted or not: the forward's trash is the next draft's source.
If a token was fed several times the accepted one wins, else the last in node order.

Units: ids; the table of 49,152 tokens and k = 8 takes 3.1 MB. Cost per step: one gather per level, one top-k over [nodes, vocab].
On a CPU a tree is not free: the gain is (tokens per forward) / (cost of a forward of 1 + nodes tokens over that of one token), which
the `Auto` drafter measures. The sampled law at temperature > 0 is exact with the Match verifier, as for any tree.

Example:
    >>> from locum import decode, models
    >>> lm = models.tiny(vocab_size=32)
    >>> plain, fast = (decode.generate(lm, [[1, 2, 3]], drafter=d, max_new_tokens=40)[0] for d in (decode.Plain(), decode.TokenRecycling()))
    >>> plain.ids == fast.ids, fast.forwards < plain.forwards
    (True, True)

Authors: Luo, Wang, Zhu, Zhang, Zhang, Yang, Xu, Che
Year: 2024
Venue: ACL 2025
arXiv: 2408.08696
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from safetensors.numpy import load_file, save_file
from torch import Tensor

from locum.decode.base import Context, Drafter, Rows, Tree
from locum.errors import UserError
from locum.method import require
from locum.models import LM

__all__ = ["TokenRecycling", "TokenTable", "template"]

# The paper's tree, one entry per inner node: its path of ranks, and how many of its successors are drafted.
_WIDTHS = {
    "": 8,
    "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1,
    "00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1,
    "000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1,
    "0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1,
    "00000": 2, "00010": 1,
}  # fmt: skip


@cache
def template(nodes: int = 80) -> tuple[tuple[int, ...], ...]:
    """The `nodes` most promising paths of the paper's 80-node tree, most promising first; closed under parents.

    A path's weight is the product over its ranks r of 0.6 / (1 + r)^1.3, an estimate of the chance that it is accepted.
    """
    paths = [(*map(int, inner), rank) for inner, width in _WIDTHS.items() for rank in range(width)]
    weight = {path: np.prod([0.6 / (1 + rank) ** 1.3 for rank in path]) for path in paths}
    paths.sort(key=lambda path: (-weight[path], len(path), path))
    return tuple(paths[:nodes])


@dataclass(eq=False)
class TokenTable:
    """What followed each token last time. Keep it between texts ("hot"), save it, load it."""

    successors: Int64[np.ndarray, "vocab k"]

    @classmethod
    def empty(cls, vocab_size: int, k: int) -> "TokenTable":
        return cls(np.full((vocab_size, k), -1, np.int64))

    def learn(
        self, tokens: Sequence[int], logits: Float[Tensor, "tokens vocab"], order: Sequence[int] | None = None
    ) -> None:
        """Write the top-k of each row into its token's row; of equal tokens the last in `order` wins."""
        top = logits.topk(self.successors.shape[1], -1).indices.cpu().numpy()
        rows = np.arange(len(tokens)) if order is None else np.asarray(order)
        ids = np.asarray(tokens)[rows]
        _, last = np.unique(ids[::-1], return_index=True)  # first in reverse order = last write
        keep = len(ids) - 1 - last
        self.successors[ids[keep]] = top[rows[keep]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as safetensors, atomically."""
        scratch = Path(f"{path}.part")
        save_file({"successors": self.successors}, scratch)
        scratch.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenTable":
        """Raises: UserError if there is no such table."""
        try:
            return cls(load_file(path)["successors"].copy())
        except Exception as error:
            raise UserError(
                f"{os.fspath(path)!r} holds no token table ({error}); write one with TokenTable.save"
            ) from error


@dataclass(frozen=True)
class TokenRecycling(Drafter):
    """Draft the tree that the table of last successors spells.

    Args:
        nodes: size of the tree, the most promising nodes of the paper's template; in [0, 80]. Paper 80, for a GPU; on a CPU 8 to 24.
        top_k: successors kept per token; in [1, 8]. Paper 8.
        learn_from_prompt: fill the table from the prompt's logits too; the paper's code does not.
        table: a saved table to begin with ("hot"); None begins empty ("cold"). A state that is passed on is hot as well.
    """

    nodes: int = 80
    top_k: int = 8
    learn_from_prompt: bool = True
    table: str | None = None

    def __post_init__(self) -> None:
        require(self, "nodes", 0 <= self.nodes <= 80, "in [0, 80]")
        require(self, "top_k", 1 <= self.top_k <= 8, "in [1, 8]")

    def start(self, target: LM, draft: LM | None = None) -> TokenTable:
        shape = target.vocab_size, min(self.top_k, target.vocab_size)
        if self.table is None:
            return TokenTable.empty(*shape)
        state = TokenTable.load(self.table)
        if state.successors.shape != shape:
            raise UserError(
                f"token table {self.table!r} is {list(state.successors.shape)}, but model {target.name!r} and top_k need "
                f"{list(shape)}"
            )
        return state

    def propose(self, state: TokenTable, context: Context) -> Tree:
        size = self.nodes if context.size is None else min(self.nodes, context.size)
        parents, ranks, levels = _layout(size, state.successors.shape[1], min(context.limit, 6))
        tokens = np.full(len(parents), -1)
        tokens[0] = context.ids[-1]
        for level in levels:
            above = tokens[parents[level]]
            tokens[level] = np.where(above >= 0, state.successors[above, ranks[level]], -1)
        known = tokens >= 0  # an empty row ends its branch
        number = known.cumsum() - 1
        return Tree(tokens[known].tolist(), [-1, *number[parents[known][1:]].tolist()], kind="recycled")

    def read(self, state: TokenTable, ids: Sequence[int], logits: Float[Tensor, "tokens vocab"]) -> None:
        state.learn(ids, logits)

    @property
    def reads_prompt(self) -> bool:
        return self.learn_from_prompt

    def observe(self, state: TokenTable, tree: Tree, rows: Rows, path: list[int]) -> None:
        accepted = {0, *path}
        state.learn(tree.tokens, rows.logits, sorted(range(len(tree.tokens)), key=accepted.__contains__))


@cache
def _layout(nodes: int, top_k: int, depth: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Parent and rank of each node, the root first, and the nodes of each level."""
    paths: list[tuple[int, ...]] = [()]
    paths += [path for path in template(nodes) if len(path) <= depth and max(path) < top_k]
    number = {path: node for node, path in enumerate(paths)}
    parents = np.array([number.get(path[:-1], -1) if path else -1 for path in paths])
    ranks = np.array([path[-1] if path else 0 for path in paths])
    lengths = np.array([len(path) for path in paths])
    return parents, ranks, [np.flatnonzero(lengths == d) for d in range(1, lengths.max() + 1)]
