"""A method's fields as flags of the command line."""

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from locum.cli.command import read
from locum.errors import UserError, unknown
from locum.method import from_yaml, names

__all__ = ["chosen_method", "flags_of", "method_name", "read_method", "text_file"]


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


def read_method(
    options: type, command: str, args: Sequence[str], chosen: str, known: Sequence[str], does: str
) -> tuple[Any, Any]:
    """A command's general options and its method, from flags: those of the options, and of the chosen method's fields.

    Args:
        options: the dataclass of the general ones.
        chosen: a method's name, or a .yaml file that holds one.
        known: the names that the command takes.
        does: what the command does, for its help: "Continue a text".

    Raises: UserError for an unknown name or a file that holds no method of these.
    """
    if chosen.endswith((".yaml", ".yml")):
        return read(options, command, args), from_yaml(text_file(Path(chosen), "method file"))
    if chosen.lower() not in known:
        raise unknown(f"method of {command}", chosen, known)
    make, build = flags_of(names(command)[chosen.lower()], taken={f.name for f in dataclasses.fields(options)})

    def both(general: options, method: make) -> tuple[Any, Any]:  # type: ignore[valid-type]
        return general, method

    both.__doc__ = f"{does} with one method, here {chosen} (of {', '.join(sorted(known))})."
    general, fields = read(both, command, args)
    return general, build(fields)


def text_file(path: Path, what: str) -> str:
    """The text of a file that the user named.

    Raises: UserError when it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
