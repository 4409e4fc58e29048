"""Where tokens meet a constraint: the question "may this token come next", asked token by token and remembered."""

import numpy as np
from jaxtyping import Float64

from locum.decode.constraints.base import Constraint, State
from locum.errors import UserError
from locum.models.vocabulary import Vocabulary

#: Answers kept at most; beyond that all are forgotten at once.
KEPT = 1 << 18


class Gate:
    """A constraint over the tokens of one vocabulary. End-of-sequence tokens are allowed where the text is complete.

    Attributes:
        asked: questions so far; answered: those that ran the constraint, the others were remembered.

    Raises: UserError if no text at all is valid.
    """

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary, eos_ids: frozenset[int]) -> None:
        start = constraint.start()
        if start is None:
            raise UserError(f"constraint {constraint!r} has no valid text: not even the empty beginning has hope")
        if not eos_ids:
            raise UserError("a constrained text needs a token that ends it, but the model has no end-of-sequence token")
        self.start: State = start
        self.constraint, self.vocabulary, self.eos_ids = constraint, vocabulary, eos_ids
        self.asked = self.answered = 0
        self._after: dict[tuple[State, int], State | None] = {}
        self._spells = vocabulary.first >= 0
        self._spells[list(eos_ids)] = True

    def accept(self, state: State, token: int) -> bool:
        """Whether a valid text may go on (or end) with this token."""
        self.asked += 1
        if token in self.eos_ids:
            return self.constraint.complete(state)
        return self.after(state, token) is not None

    def after(self, state: State, token: int) -> State | None:
        """The state after a token that spells text; None if no valid text goes on that way."""
        key = (state, token)
        if key not in self._after:
            if len(self._after) >= KEPT:
                self._after.clear()
            self.answered += 1
            spelt = self.vocabulary.tokens[token]
            self._after[key] = None if spelt is None else self.constraint.run(state, spelt)
        return self._after[key]

    def prune(
        self, state: State, logp: Float64[np.ndarray, " vocab"], lookahead: bool
    ) -> Float64[np.ndarray, " vocab"]:
        """Log-probabilities without the tokens that are out of the question before any is asked for.

        Those are tokens that spell nothing; with `lookahead` also tokens whose first byte cannot come next, and the end
        of the text where it is not complete. Their mass is lost to the sum, which the caller must account for.
        """
        open_ = self._spells
        if lookahead:
            bytes_ = np.zeros(257, bool)  # the last is for -1
            bytes_[list(self.constraint.following(state))] = True
            open_ = bytes_[self.vocabulary.first]
            open_[list(self.eos_ids)] = self.constraint.complete(state)
        return np.where(open_, logp, -np.inf)
