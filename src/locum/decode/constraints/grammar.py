"""Grammars in Lark's notation as constraints: Lark reads them, `ContextFree` recognises."""

import re

from lark import Lark
from lark.exceptions import UnexpectedInput

from locum.decode.constraints.base import Constraint
from locum.decode.constraints.cfg import ContextFree
from locum.decode.constraints.regex import from_machine, machine
from locum.errors import UserError

#: Lark's common.ESCAPED_STRING looks behind itself to find its end; this is the same set of strings without that.
_ESCAPED_STRING = (r".*?(?<!\\)(\\\\)*?", r"(?:[^\"\\\n]|\\[^\n])*")
_IGNORED = "%ignored"


class Grammar(ContextFree):
    """Texts of a context-free grammar in Lark's EBNF, `%import common.NUMBER` and `%ignore` included.

    Terminals are regular expressions, and a text is valid if it can be cut into terminals in some way: there is no
    lexer and no longest-match rule (Lark's own Earley parser with the lexer "dynamic_complete" has the same language).
    Priorities do not matter for validity and are ignored.

    Raises: UserError for a grammar that does not parse (with line and column), whose terminals are not regular, or that
        has no text.
    """

    def __init__(self, text: str, start: str = "start") -> None:
        try:
            lark = Lark(text, start=start, parser="earley", lexer="dynamic_complete", maybe_placeholders=False)
        except UnexpectedInput as error:
            raise UserError(f"grammar does not parse at line {error.line}, column {error.column}") from error
        except Exception as error:  # Lark lets the errors of its regular expression engine through, of whatever class
            raise UserError(f"grammar does not parse: {_first_line(error)}") from error
        used = {symbol.name for rule in lark.rules for symbol in rule.expansion if symbol.is_term}
        used |= set(lark.ignore_tokens)
        terminals: dict[str, Constraint] = {}
        for terminal in lark.terminals:
            if terminal.name in used:
                pattern = terminal.pattern.to_regexp().replace(*_ESCAPED_STRING)
                what = f"grammar terminal {terminal.name}"
                terminals[terminal.name] = from_machine(machine(pattern, what), what)
        if missing := used - terminals.keys():
            raise UserError(f"grammar declares the terminal {min(missing)} without a pattern")
        gap = (_IGNORED,) if lark.ignore_tokens else ()
        rules: dict[str, list[tuple[str, ...]]] = {"%start": [(start, *gap)]}
        for rule in lark.rules:
            body: list[str] = []
            for symbol in rule.expansion:
                body += [*gap, symbol.name] if symbol.is_term else [symbol.name]
            rules.setdefault(rule.origin.name, []).append(tuple(body))
        if gap:
            rules[_IGNORED] = [(), *((_IGNORED, name) for name in lark.ignore_tokens)]
        super().__init__(rules, terminals, "%start")


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
