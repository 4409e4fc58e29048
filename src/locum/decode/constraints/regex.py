"""Regular expressions as byte automata: interegular builds the character automaton, UTF-8 is laid over it here."""

import re
from bisect import bisect_left, bisect_right

from interegular import FSM, parse_pattern
from interegular.fsm import anything_else
from interegular.patterns import InvalidSyntax, Unsupported

from locum.decode.constraints.base import Constraint, State
from locum.errors import UserError

#: Lead byte -> (length in bytes, bits of the code point in it, smallest code point of that length).
_LEADS = (
    (range(0x80), 1, 0x7F, 0x00),
    (range(0xC2, 0xE0), 2, 0x1F, 0x80),
    (range(0xE0, 0xF0), 3, 0x0F, 0x800),
    (range(0xF0, 0xF5), 4, 0x07, 0x10000),
)


def code_points(prefix: bytes) -> tuple[int, int, bool]:
    """First and last code point whose UTF-8 begins with `prefix` (first > last: none), and whether it is complete."""
    kind = next((kind for kind in _LEADS if prefix[0] in kind[0]), None)
    if kind is None:
        return 1, 0, False
    _, length, bits, smallest = kind
    value = prefix[0] & bits
    for byte in prefix[1:]:
        if byte & 0xC0 != 0x80:
            return 1, 0, False
        value = value << 6 | byte & 0x3F
    missing = 6 * (length - len(prefix))
    first, last = max(value << missing, smallest), min((value + 1 << missing) - 1, 0x10FFFF)
    if first >= 0xD800 and last <= 0xDFFF:  # halves of surrogate pairs are no characters
        return 1, 0, False
    return first, last, missing == 0


class ByteAutomaton(Constraint):
    """A finite automaton over characters, read byte by byte.

    A state is the number of the character state, or inside a character the pair (number, bytes of the character so
    far). A byte is refused exactly if no character that begins with these bytes leads to a state from which the end is
    reachable. Transitions are worked out when first asked for, and kept.
    """

    def __init__(self, machine: FSM, name: str) -> None:
        self.name = name
        symbols = dict(machine.alphabet.items())
        self._other: int | None = symbols.pop(anything_else, None)
        self._symbol: dict[int, int] = {ord(c): k for c, k in symbols.items()}
        self._named = sorted(self._symbol)
        self._finals = frozenset(machine.finals)
        before: dict[int, set[int]] = {}
        for source, arrows in machine.map.items():
            for target in arrows.values():
                before.setdefault(target, set()).add(source)
        live, todo = set(machine.finals), list(machine.finals)
        while todo:
            new = before.get(todo.pop(), set()) - live
            live |= new
            todo.extend(new)
        self._map = {s: {k: t for k, t in machine.map.get(s, {}).items() if t in live} for s in live}
        self._initial: int | None = machine.initial if machine.initial in live else None
        self._next: dict[tuple[State, int], State | None] = {}
        self._follow: dict[State, frozenset[int]] = {}

    def __repr__(self) -> str:
        return self.name

    def start(self) -> State | None:
        return self._initial

    def complete(self, state: State) -> bool:
        return state in self._finals

    def advance(self, state: State, byte: int) -> State | None:
        key = (state, byte)
        if key not in self._next:
            self._next[key] = self._work_out(state, byte)
        return self._next[key]

    def following(self, state: State) -> frozenset[int]:
        if state not in self._follow:
            self._follow[state] = super().following(state)
        return self._follow[state]

    def _work_out(self, state: State, byte: int) -> State | None:
        number, pending = state if isinstance(state, tuple) else (state, b"")
        assert isinstance(number, int)
        pending += bytes([byte])
        first, last, whole = code_points(pending)
        if first > last:
            return None
        arrows = self._map[number]
        if whole:
            symbol = self._symbol.get(first, self._other)
            return None if symbol is None else arrows.get(symbol)
        named = self._named[bisect_left(self._named, first) : bisect_right(self._named, last)]
        surrogates = max(0, min(last, 0xDFFF) - max(first, 0xD800) + 1)
        others = self._other in arrows and last - first + 1 - surrogates > len(named)
        return (number, pending) if others or any(self._symbol[c] in arrows for c in named) else None


def machine(pattern: str, what: str = "regular expression") -> FSM:
    """The character automaton of a pattern that must match a whole text.

    Raises: UserError with the position where the pattern does not parse, or the name of what an automaton cannot hold.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{what} {pattern!r} does not parse: {error}") from error
    # interegular takes look-ahead, but a(?!b)c? does not match "a" there: better none than a wrong one.
    if re.search(r"(?<!\\)(?:\\\\)*\(\?[=!]", pattern):
        raise UserError(f"{what} {pattern!r} cannot become an automaton: look-ahead is not supported")
    # Anchors at the two ends say what already holds here; \uXXXX is known to Python's re but not to interegular.
    body = re.sub(r"^\^|(?<!\\)((?:\\\\)*)\$$", r"\1", pattern)
    body = re.sub(r"(?<!\\)((?:\\\\)*)\\u([0-9a-fA-F]{4})", lambda m: m[1] + _character(m[2]), body)
    try:
        return parse_pattern(body).to_fsm()
    except InvalidSyntax as error:
        raise UserError(f"{what} {pattern!r} does not parse as an automaton: {error or 'unknown syntax'}") from error
    except Unsupported as error:
        raise UserError(f"{what} {pattern!r} cannot become an automaton: {error}") from error


def _character(digits: str) -> str:
    return re.escape(chr(int(digits, 16)))


def from_machine(machine: FSM, name: str) -> ByteAutomaton:
    """A byte automaton that is known to hold some text, or UserError."""
    automaton = ByteAutomaton(machine, name)
    if automaton.start() is None:
        raise UserError(f"{name} has no valid text: nothing can match it")
    return automaton


class Regex(ByteAutomaton):
    """Texts that a regular expression matches from beginning to end.

    Python's syntax as far as it is regular; `.` is any character but a newline, and `\\d`, `\\w`, `\\s` are the ASCII
    ones. Back references, look-around and word boundaries are refused.

    Raises: UserError for a pattern that does not parse (with the position), is not regular, or matches nothing.
    """

    def __init__(self, pattern: str) -> None:
        super().__init__(machine(pattern), f"Regex({pattern!r})")
        if self.start() is None:
            raise UserError(f"regular expression {pattern!r} has no valid text: nothing can match it")
