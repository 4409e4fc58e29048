"""A chain drafted by a small model: speculative sampling as it was first published (arXiv 2211.17192, 2302.01318)."""

from dataclasses import dataclass
from typing import ClassVar

from locum.decode.base import Context, Drafter, Law, Tree, draw
from locum.decode.drafting import law_of, start_draft
from locum.method import require
from locum.models import LM, Session

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain(Drafter):
    """Draft `length` tokens one after the other with the draft model, from its own law under the target's sampling.

    Cost: `length` forwards of the draft model per step.

    Args:
        length: tokens to draft.
    """

    length: int = 5
    draws: ClassVar[str] = "chain"
    needs_draft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 0, ">= 0")

    def start(self, target: LM, draft: LM | None = None) -> Session:
        return start_draft(self, target, draft)

    def propose(self, state: Session, context: Context) -> Tree:
        depth = context.depth(self.length)
        tokens: list[int] = []
        laws: dict[int, Law] = {}
        if depth:
            logits = state.resume(context.ids)
        for node in range(depth):
            laws[node] = law_of(logits, context.sampling)
            tokens.append(draw(laws[node], context.rng))
            if node + 1 < depth:
                logits = state.extend(tokens[-1:], [node - 1])[0]
        return Tree.chain(context.ids[-1], tokens, draws="chain", laws=laws)
