"""Plain decoding: one forward per token, nothing drafted. The yardstick of every other drafter."""

from dataclasses import dataclass
from typing import Any

from locum.decode.base import Context, Drafter, Tree

__all__ = ["Plain"]


@dataclass(frozen=True)
class Plain(Drafter):
    """Draft nothing: the empty tree."""

    def propose(self, state: Any, context: Context) -> Tree:
        return Tree.root(context.ids[-1])
