"""Context-free languages over bytes: an Earley recogniser whose states are shared.

Terminals are automata over bytes themselves, so there is no lexer between text and grammar and no longest-match rule: a
text is valid if it can be cut into terminals in some way. Rules that can never produce a text are dropped first; after
that an Earley column that is not empty always has a completion, which is exactly the promise of a constraint.

Columns are interned by what they hold (items and the columns where these began). Two prefixes after which the same
texts may follow for the same reasons, such as one digit more or one list element more, thus lead to the same state, and
what was worked out for one serves the other. J. Earley, CACM 1970; nullable rules as in Aycock and Horspool, 2002.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

from locum.decode.constraints.base import Constraint, State
from locum.errors import UserError

Rules = Mapping[str, Sequence[tuple[str, ...]]]
#: Transitions kept at most; beyond that they are worked out anew.
KEPT = 1 << 17


class Column:
    """What is known after some bytes: the rules in progress. Compared by identity; interned by `ContextFree`."""

    __slots__ = ("__weakref__", "accepting", "scanning", "waiting")

    def __init__(self) -> None:
        self.accepting = False
        #: nonterminal -> items (rule, dot, column where the rule began) that wait for it
        self.waiting: dict[int, list[tuple[int, int, Column]]] = {}
        #: terminals in progress: (rule, dot, origin, state of the terminal's automaton)
        self.scanning: list[tuple[int, int, Column, State]] = []


#: An item that begins a column: (rule, dot, origin, state inside the terminal at the dot or None).
Kernel = frozenset[tuple[int, int, Column, State | None]]


class ContextFree(Constraint):
    """The language of a context-free grammar.

    Args:
        rules: nonterminal -> its alternatives, each a tuple of names; the empty tuple is the empty text.
        terminals: name -> automaton. None may accept the empty text.
        start: the nonterminal to derive.

    Raises: UserError for an unknown name, a terminal that may be empty, or a grammar without any text.
    """

    def __init__(self, rules: Rules, terminals: Mapping[str, Constraint], start: str) -> None:
        for name, terminal in terminals.items():
            first = terminal.start()
            if first is not None and terminal.complete(first):
                raise UserError(f"terminal {name} may be empty: write the option in a rule instead")
        productive = _closure(rules, {name for name, t in terminals.items() if t.start() is not None})
        nullable = _closure(rules, set())
        for name in {n for options in rules.values() for option in options for n in option} | {start}:
            if name not in rules and name not in terminals:
                raise UserError(f"grammar has no rule or terminal called {name!r}")
        if start not in productive:
            raise UserError("grammar has no valid text: its start can never be completed")
        names = [n for n in rules if n in productive]
        number = {n: i for i, n in enumerate(names)} | {n: -1 - i for i, n in enumerate(terminals)}
        self._terminals = list(terminals.values())
        self._heads: list[int] = []  # rule -> the nonterminal it makes
        self._bodies: list[tuple[int, ...]] = []  # rule -> what it is made of: >= 0 nonterminals, < 0 terminals
        self._of: list[list[int]] = [[] for _ in names]  # nonterminal -> its rules
        for head in names:
            for option in dict.fromkeys(rules[head]):
                if all(n in productive for n in option):
                    self._of[number[head]].append(len(self._heads))
                    self._heads.append(number[head])
                    self._bodies.append(tuple(number[n] for n in option))
        self._nullable = {number[n] for n in nullable if n in number and n in rules}
        self._goal = number[start]
        self._columns: WeakValueDictionary[Kernel, Column] = WeakValueDictionary()
        self._next: dict[tuple[Column, int], Column | None] = {}
        self._follow: dict[Column, frozenset[int]] = {}
        self._root = Column()
        for rule in self._of[self._goal]:
            self._close(self._root, [(rule, 0, self._root)])
        self._root.accepting = self._goal in self._nullable
        # Whoever waits for the goal at the root: nobody; completing it there is acceptance.

    def start(self) -> State | None:
        return self._root

    def complete(self, state: State) -> bool:
        assert isinstance(state, Column)
        return state.accepting

    def advance(self, state: State, byte: int) -> State | None:
        assert isinstance(state, Column)
        key = (state, byte)
        if key not in self._next:
            if len(self._next) >= KEPT:
                self._next.clear()
                self._follow.clear()
            self._next[key] = self._scan(state, byte)
        return self._next[key]

    def following(self, state: State) -> frozenset[int]:
        assert isinstance(state, Column)
        if state not in self._follow:
            found: set[int] = set()
            for rule, dot, _, inside in state.scanning:
                found |= self._terminals[-1 - self._bodies[rule][dot]].following(inside)
            self._follow[state] = frozenset(found)
        return self._follow[state]

    def _scan(self, column: Column, byte: int) -> Column | None:
        kernel = set()
        for rule, dot, origin, inside in column.scanning:
            terminal = self._terminals[-1 - self._bodies[rule][dot]]
            after = terminal.advance(inside, byte)
            if after is None:
                continue
            kernel.add((rule, dot, origin, after))
            if terminal.complete(after):
                kernel.add((rule, dot + 1, origin, None))
        if not kernel:
            return None
        key: Kernel = frozenset(kernel)
        found = self._columns.get(key)
        if found is None:
            found = self._columns[key] = Column()
            found.scanning = [(r, d, o, inside) for r, d, o, inside in kernel if inside is not None]
            self._close(found, [(r, d, o) for r, d, o, inside in kernel if inside is None])
        return found

    def _close(self, column: Column, todo: list[tuple[int, int, Column]]) -> None:
        """Predict and complete until nothing new appears."""
        seen = set(todo)

        def add(item: tuple[int, int, Column]) -> None:
            if item not in seen:
                seen.add(item)
                todo.append(item)

        while todo:
            rule, dot, origin = todo.pop()
            if dot == len(self._bodies[rule]):
                # A rule that began in this very column is empty: whoever waits for it was moved on when it was
                # predicted.
                if origin is not column:
                    head = self._heads[rule]
                    column.accepting |= head == self._goal and origin is self._root
                    for waiting_rule, waiting_dot, waiting_origin in origin.waiting.get(head, ()):
                        add((waiting_rule, waiting_dot + 1, waiting_origin))
                continue
            symbol = self._bodies[rule][dot]
            if symbol < 0:
                first = self._terminals[-1 - symbol].start()
                column.scanning.append((rule, dot, origin, first))
                continue
            if symbol not in column.waiting:
                column.waiting[symbol] = []
                for prediction in self._of[symbol]:
                    add((prediction, 0, column))
            column.waiting[symbol].append((rule, dot, origin))
            if symbol in self._nullable:
                add((rule, dot + 1, origin))


def _closure(rules: Rules, known: set[str]) -> set[str]:
    """The nonterminals that have an alternative made only of `known` names and of each other, and `known`."""
    known = set(known)
    while True:
        new = {h for h, options in rules.items() if h not in known and any(known.issuperset(o) for o in options)}
        if not new:
            return known
        known |= new
