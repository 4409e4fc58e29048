"""N-gram lookup (prompt lookup decoding): what followed the last few tokens the last time they stood in this text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from locum.decode.base import Context, Drafter, Tree
from locum.method import require
from locum.models import LM

__all__ = ["Lookup"]


class _Index:
    """For every n-gram of a text, the position after its latest occurrence; each new token costs one entry per n."""

    def __init__(self, longest: int):
        self.longest = longest
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def sync(self, ids: Sequence[int]) -> None:
        """Take in what was added to `ids`; n-grams that end with its last token wait for the token that follows."""
        if len(ids) < len(self.ids) or self.ids != list(ids[: len(self.ids)]):
            self.ids, self.after = [], {}
        for end in range(max(len(self.ids), 1), len(ids)):
            for n in range(1, min(self.longest, end) + 1):
                self.after[tuple(ids[end - n : end])] = end
        self.ids.extend(ids[len(self.ids) :])

    def find(self, shortest: int) -> tuple[int, int]:
        """Length of the longest suffix seen before, and the position after its latest occurrence; (0, 0) if there is none."""
        for n in range(min(self.longest, len(self.ids)), shortest - 1, -1):
            position = self.after.get(tuple(self.ids[-n:]))
            if position is not None:
                return n, position
        return 0, 0


@dataclass(frozen=True)
class Lookup(Drafter):
    """Draft the tokens that followed the longest suffix of the text when it last occurred in it.

    Costs no forward and no memory to speak of; pays where text repeats its context (editing, summaries, code).

    Args:
        length: tokens to draft.
        longest: longest suffix to look for.
        shortest: shortest suffix that counts.
    """

    length: int = 10
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 0, ">= 0")
        require(self, "shortest", self.shortest >= 1, ">= 1")
        require(self, "longest", self.longest >= self.shortest, f">= shortest ({self.shortest})")

    def start(self, target: LM, draft: LM | None = None) -> _Index:
        return _Index(self.longest)

    def propose(self, state: _Index, context: Context) -> Tree:
        state.sync(context.ids)
        n, position = state.find(self.shortest)
        # A text that repeats itself goes on repeating: where the copy reaches the end, it goes on with what it copied.
        tokens = list(islice(cycle(context.ids[position:]), context.depth(self.length))) if n else []
        return Tree.chain(context.ids[-1], tokens, kind=f"{n}-gram")
