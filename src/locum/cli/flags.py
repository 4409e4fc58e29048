"""A method's fields as flags of the command line."""

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from locum.method import names

__all__ = ["chosen_method", "flags_of", "method_name"]


def flags_of(cls: type, taken: set[str]) -> tuple[type, Callable[[Any], Any]]:
    """A dataclass with the method's fields as flags, and what makes the method of it.

    A field that holds drafters is given by their names. A field named like a general option, one of `taken`, gets the
    method's name in front.
    """
    hints, renamed = typing.get_type_hints(cls), {}
    flags: list[tuple[str, Any, Any]] = []
    inner: dict[str, tuple[Any, ...]] = {}  # flag -> the drafters of its default
    docs = cls.__doc__ or ""
    for f in (f for f in dataclasses.fields(cls) if f.init):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        flag = f"{cls.__name__.lower()}_{f.name}" if f.name in taken else f.name
        renamed[flag] = f.name
        docs = re.sub(rf"^(\s+){f.name}:", rf"\1{flag}:", docs, flags=re.MULTILINE)
        if dataclasses.is_dataclass(hints[f.name]):
            inner[flag] = (value,)
            flags.append((flag, str, dataclasses.field(default=method_name(value))))
        elif value and isinstance(value, tuple) and all(map(dataclasses.is_dataclass, value)):
            inner[flag] = value
            flags.append((flag, tuple[str, ...], dataclasses.field(default=tuple(map(method_name, value)))))
        elif value is dataclasses.MISSING:
            flags.append((flag, hints[f.name], dataclasses.field()))
        else:
            flags.append((flag, hints[f.name], dataclasses.field(default=value)))
    made = dataclasses.make_dataclass(cls.__name__, flags, namespace={"__doc__": docs}, frozen=True)

    def build(values: Any) -> Any:
        fields = {}
        for flag, *_ in flags:
            given = getattr(values, flag)
            if flag in inner:  # a drafter whose name was not changed keeps the parameters it has there
                known = {method_name(v): v for v in inner[flag]}
                found = [known.get(n) or names("decode", "Drafter")[n]() for n in _listed(given)]
                given = found[0] if isinstance(given, str) else tuple(found)
            fields[renamed[flag]] = given
        return cls(**fields)

    return made, build


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def method_name(method: Any) -> str:
    """The name by which a method is called: its class's, in lower case."""
    return type(method).__name__.lower()


def chosen_method(args: Sequence[str]) -> str | None:
    """The method that the arguments name, before they are read as a whole."""
    for at, arg in enumerate(args):
        if arg == "--method" and at + 1 < len(args):
            return args[at + 1]
        if arg.startswith("--method="):
            return arg.removeprefix("--method=")
    return None
