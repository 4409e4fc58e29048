"""Errors that a user can cause, each one sentence: the thing, its value, and what is allowed."""

import difflib
from collections.abc import Iterable

__all__ = ["MissingExtra", "UserError", "unknown"]

_MANY = 20  # more names than this are not listed when one of them is near


class UserError(ValueError):
    """What was asked for cannot be done as asked; the message says how to ask. The command line exits with code 2."""


class MissingExtra(UserError, ImportError):
    """A package that only some methods need is absent.

    Args:
        what: the thing that needs it, as the user named it, e.g. ``"--engine ray"``.
        extra: the extra of this package that brings it, e.g. ``"ray"``.
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra {extra!r}: pip install 'locum[{extra}]'")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not there, with the nearest one that is.

    >>> print(unknown("method", "tokenrecyling", ["plain", "tokenrecycling"]))
    unknown method 'tokenrecyling': did you mean 'tokenrecycling'? (known: plain, tokenrecycling)
    """
    options = sorted(known)
    near = difflib.get_close_matches(name.lower(), options, n=1)
    if near and len(options) > _MANY:
        return UserError(f"unknown {kind} {name!r}: did you mean {near[0]!r}?")
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}(known: {', '.join(options) or 'none'})")
