"""Constraints on generated text: regular expressions, JSON schemas, grammars, and any Python function.

    Regex(r"\\d{4}-\\d{2}-\\d{2}")      JsonSchema({"type": "object", ...})      Grammar("start: ...")      Predicate(f)

Each is an automaton over bytes (`Constraint`); one more is a class with three methods.
"""

from locum.decode.constraints.base import Constraint, Literal, Repeat, State
from locum.decode.constraints.cfg import ContextFree
from locum.decode.constraints.grammar import Grammar
from locum.decode.constraints.predicate import Predicate
from locum.decode.constraints.regex import Regex
from locum.decode.constraints.schema import JsonSchema

__all__ = ["Constraint", "ContextFree", "Grammar", "JsonSchema", "Literal", "Predicate", "Regex", "Repeat", "State"]
