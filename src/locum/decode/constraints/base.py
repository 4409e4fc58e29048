"""What a constraint is: an automaton over bytes that knows when no valid text is left.

Bytes, not characters and not tokens: a token of a byte-level vocabulary may end inside a UTF-8 character, and the same
constraint must serve every tokenizer. A constraint has three methods; everything else is derived from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import final

State = Hashable


class Constraint(ABC):
    """A set of valid texts, read one byte at a time.

    The contract, on which the exactness of weighted sampling rests: a state stands for the bytes read so far, and it
    exists (is not None) exactly if some valid text begins with them. A stricter answer biases the samples; a looser one
    costs particles that die later, no more. States are hashable and never change, so branches share them.
    """

    @abstractmethod
    def start(self) -> State | None:
        """The state before any byte; None if no text at all is valid."""

    @abstractmethod
    def advance(self, state: State, byte: int) -> State | None:
        """The state after one more byte (0-255), or None if no valid text goes on that way."""

    @abstractmethod
    def complete(self, state: State) -> bool:
        """Whether the bytes read so far are a valid text as they stand."""

    def run(self, state: State, text: bytes) -> State | None:
        """The state after several bytes: the prefix test of a token."""
        here: State | None = state
        for byte in text:
            if here is None:
                return None
            here = self.advance(here, byte)
        return here

    def following(self, state: State) -> frozenset[int]:
        """The bytes that may come next; empty if the text can only end here."""
        return frozenset(byte for byte in range(256) if self.advance(state, byte) is not None)

    @final
    def accepts(self, text: str | bytes) -> bool:
        """Whether a whole text is valid."""
        state = self.start()
        if state is not None:
            state = self.run(state, text.encode() if isinstance(text, str) else text)
        return state is not None and self.complete(state)


@dataclass(frozen=True)
class Literal(Constraint):
    """Exactly one text. The state is the number of bytes read."""

    text: bytes

    def start(self) -> State | None:
        return 0

    def advance(self, state: State, byte: int) -> State | None:
        assert isinstance(state, int)
        return state + 1 if state < len(self.text) and self.text[state] == byte else None

    def complete(self, state: State) -> bool:
        return state == len(self.text)


@dataclass(frozen=True)
class Repeat(Constraint):
    """Between `low` and `high` units (None: no limit) in a row, written by an automaton no unit of which begins
    another.

    A counted repeat as a table has as many states as units; here the count is a part of the state, so that a bound of a
    thousand characters costs nothing. The state is (whole units read, state inside the next unit).
    """

    unit: Constraint
    low: int = 0
    high: int | None = None

    def start(self) -> State | None:
        return (0, self.unit.start())

    def advance(self, state: State, byte: int) -> State | None:
        assert isinstance(state, tuple)
        count, inside = state
        if self.high is not None and count >= self.high:
            return None
        inside = self.unit.advance(inside, byte)
        if inside is None:
            return None
        if not self.unit.complete(inside):
            return (count, inside)
        # Without an upper limit, counts beyond the lower one are all alike: one state for them.
        return (count + 1 if self.high is not None else min(count + 1, self.low), self.unit.start())

    def complete(self, state: State) -> bool:
        assert isinstance(state, tuple)
        return state[0] >= self.low and state[1] == self.unit.start()
