"""Pieces of a recipe as text, like "d3s(tokens=(0.2, 1.0))" and "hapo.clip": names and plain values, never code."""

import re
from collections.abc import Collection
from dataclasses import fields

from locum.errors import UserError, unknown
from locum.method import names, settings
from locum.reinforce.base import Piece

__all__ = ["name_of", "piece_of", "term"]


def term(piece: Piece) -> str:
    """As `Recipe.read` reads it: the name, and the fields that are not at their defaults."""
    default = type(piece)()
    given = [
        f"{f.name}={getattr(piece, f.name)!r}"
        for f in fields(piece)
        if getattr(piece, f.name) != getattr(default, f.name)
    ]
    return name_of(piece) + (f"({', '.join(given)})" if given else "")


def name_of(piece: Piece) -> str:
    return type(piece).__name__.lower()


def piece_of(text: str, baselines: Collection[str]) -> Piece:
    """The piece that a term names.

    Raises: UserError for a name, a field or a value that is not there.
    """
    found = re.fullmatch(r"(\w+)(?:\.(\w+))?(?:\((.*)\))?", text, re.DOTALL)
    if found is None:
        raise UserError(f"cannot read {text!r}: write a name, or a name with settings like clip(low=0.1)")
    known = names("reinforce", "Piece")
    name = (found[1] + (found[2] or "")).lower()
    if name not in known:
        if name in baselines:
            raise UserError(f"the baseline {name} comes first in a recipe, not behind other terms")
        raise unknown("piece of a recipe", text.split("(")[0], [*baselines, *known])
    cls = known[name]
    return cls(**settings(text, cls))
