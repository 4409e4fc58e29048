"""A method is a value: a frozen dataclass that is checked when made, printed, compared, and written to YAML.

Methods are named by their class, in lower case: ``decode.TokenRecycling`` is ``tokenrecycling``. The names of a family
are read off its source without importing it; a class is imported when it is asked for.
"""

import ast
import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import docstring_parser
import yaml

from locum.errors import UserError, unknown
from locum.paper import FAMILIES, ROOT, find, module_paths

__all__ = [
    "Names",
    "from_dict",
    "from_yaml",
    "names",
    "outside",
    "parameters",
    "require",
    "settings",
    "to_dict",
    "to_yaml",
]


def require(method: object, field: str, ok: bool, allowed: str) -> None:
    """Refuse a field that is out of range.

    Write ``ok`` so that it is false for nan (``x > 0``, never ``not x <= 0``).

    Raises:
        UserError: "FadePO.fade must be in (0, 1], got 1.5".
    """
    if not ok:
        raise UserError(f"{type(method).__name__}.{field} must be {allowed}, got {getattr(method, field)!r}")


def outside(text: str, marks: str) -> list[str]:
    """What stands between those of the marks that are in no bracket and no quotes.

    >>> outside("grpo, dapo + d3s(rows=(2, 4))", ",")
    ['grpo', 'dapo + d3s(rows=(2, 4))']
    """
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c in marks and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def settings(text: str, cls: type, words: bool = False) -> dict[str, Any]:
    """The settings in the brackets of a text like "clip(low=0.1, high=inf)": fields of a class by name, plain values, never code.

    Args:
        words: a bare word stands for itself, as in "dsl(learner=forest)".

    Raises:
        UserError: for settings without a name, a field that the class has not, or values that are not plain.
    """
    name, _, inside = text.partition("(")
    known = [f.name for f in _fields(cls)]
    try:
        call = ast.parse(f"f({inside.removesuffix(')')})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        given = {str(k.arg): _literal(k.value, words) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(f"cannot read the settings of {text!r}: they must be plain values") from None
    if call.args:
        raise UserError(f"write the settings of {name} by name, like {name}({known[0]}=...), got {text!r}")
    if strange := set(given) - set(known):
        raise unknown(f"field of {cls.__name__}", min(strange), known)
    return given


def _literal(node: ast.expr, words: bool) -> Any:
    """A plain value; inf too."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        return -_literal(node.operand, False)
    if isinstance(node, ast.Name) and node.id == "inf":
        return float("inf")
    return node.id if words and isinstance(node, ast.Name) else ast.literal_eval(node)


class Names(Mapping[str, type]):
    """The methods of one family: name -> class. Iterating imports nothing; looking one up imports its module."""

    def __init__(self, family: str, where: dict[str, tuple[str, str]]) -> None:
        self.family = family
        self._where = where  # name -> (module, class)

    def __getitem__(self, name: str) -> type:
        if name.lower() not in self._where:
            raise unknown(f"method of {self.family}", name, self._where)
        module, cls = self._where[name.lower()]
        return getattr(importlib.import_module(module), cls)

    def module(self, name: str) -> str:
        """The module that holds a method, e.g. ``"locum.decode.spectr"``."""
        return self._where[name.lower()][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._where


@functools.cache
def names(family: str, base: str | None = None) -> Names:
    """The methods of a family, by name.

    A method is a public frozen dataclass that derives from a class of the family's ``base.py``, or the main class of a
    paper's file: the first name of its ``__all__``.

    Args:
        family: one of `FAMILIES`.
        base: keep only classes that derive from this class of ``base.py``, e.g. ``"Drafter"``.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    base_file = ROOT / family / "base.py"
    bases = _classes(ast.parse(base_file.read_text("utf-8"), str(base_file))) if base_file.exists() else {}
    roots = {name for name, cls in bases.items() if base in (None, name) or base in _ancestors(cls, bases)}
    where: dict[str, tuple[str, str]] = {}
    for path in module_paths(family):
        tree = ast.parse(path.read_text("utf-8"), str(path))
        found = _classes(tree)
        main = found.get(next(iter(_exported(tree)), "")) if find(path.stem, default=None) else None
        for cls in found.values() if path != base_file else ():
            is_main = cls is main and base is None
            if _frozen(cls) and not cls.name.startswith("_") and (is_main or _ancestors(cls, found) & roots):
                where[cls.name.lower()] = (f"locum.{family}.{path.stem}", cls.name)
    return Names(family, where)


def parameters(cls: type) -> list[dict[str, Any]]:
    """The parameters of a method, for people: ``{"name", "type", "default", "help"}`` each, as plain data."""
    docs: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        docs |= {p.arg_name: p.description or "" for p in docstring_parser.parse(kind.__doc__ or "").params}
    return [
        {
            "name": f.name,
            "type": f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)),
            "default": _shown(f),
            "help": " ".join(docs.get(f.name, "").split()),
        }
        for f in _fields(cls)
    ]


def _shown(field: dataclasses.Field[Any]) -> Any:
    """The default as plain data, as text where it has no plain form, None where there is none."""
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    if value is dataclasses.MISSING:
        return None
    try:
        return _plain(value)
    except UserError:
        return str(value)


def to_dict(method: object) -> dict[str, Any]:
    """A method as plain data: ``{"method": "decode.tokenrecycling", <field>: <value>, ...}``, and those inside it too.

    Raises:
        UserError: for a field that has no plain form.
    """
    return {"method": _key(type(method)), **{f.name: _plain(getattr(method, f.name)) for f in _fields(type(method))}}


def from_dict(data: Mapping[str, Any]) -> Any:
    """The method that `to_dict` wrote. Fields left out take their defaults.

    Raises:
        UserError: for an unknown method or field, or a value out of range.
    """
    if "method" not in data:
        raise UserError(f"a method is written with a key 'method', got {', '.join(map(repr, data)) or 'no key'}")
    cls = _find_class(str(data["method"]))
    hints = typing.get_type_hints(cls)
    known = {f.name for f in _fields(cls)}
    values = {}
    for name, value in data.items():
        if name == "method":
            continue
        if name not in known:
            raise unknown(f"field of {cls.__name__}", name, known)
        values[name] = _value(value, hints[name])
    return cls(**values)


def to_yaml(method: object) -> str:
    """A method as YAML text; `from_yaml` reads it back."""
    return yaml.safe_dump(to_dict(method), sort_keys=False)


def from_yaml(text: str) -> Any:
    """The method that a YAML text describes.

    Raises:
        UserError: when the text is not YAML or not a method.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"this is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"a method in YAML is a mapping with a key 'method', got {type(data).__name__}")
    return from_dict(data)


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{cls.__name__} is not a method: it is no dataclass")
    return [f for f in dataclasses.fields(cls) if f.init]


def _key(cls: type) -> str:
    """``decode.plain`` for a method, the full dotted path for a plain dataclass of the package that is part of one."""
    parts = cls.__module__.split(".")
    if parts[0] == "locum" and len(parts) > 1 and parts[1] in FAMILIES and cls.__name__.lower() in names(parts[1]):
        return f"{parts[1]}.{cls.__name__.lower()}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _find_class(key: str) -> type:
    parts = key.split(".")
    if len(parts) == 2 and parts[0] != "locum":
        return names(parts[0])[parts[1]]
    if parts[0] == "locum" and len(parts) > 2:
        try:
            cls = getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])
        except (ImportError, AttributeError):
            cls = None
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            return cls
    raise UserError(f"unknown method {key!r}: write it as 'family.name', e.g. 'decode.tokenrecycling'")


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    raise UserError(f"{type(value).__name__} has no plain form, so the method that holds it cannot be written")


def _value(value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping) and "method" in value:
        return from_dict(value)
    if isinstance(value, list):
        inner = next(iter(a for a in typing.get_args(hint) if a is not Ellipsis), Any)
        items = [_value(v, inner) for v in value]
        return tuple(items) if _wants_tuple(hint) else items
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _wants_tuple(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_wants_tuple(a) for a in typing.get_args(hint))
    return hint is not list and typing.get_origin(hint) is not list


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _exported(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def _ancestors(cls: ast.ClassDef, module: dict[str, ast.ClassDef]) -> set[str]:
    """The names of a class's parents, followed as far as they lie in the same module."""
    direct = {_last_name(b) for b in cls.bases}
    return direct.union(*(_ancestors(module[d], module) for d in direct if d in module and d != cls.name))


def _frozen(cls: ast.ClassDef) -> bool:
    return any(
        isinstance(d, ast.Call)
        and _last_name(d.func) == "dataclass"
        and any(k.arg == "frozen" and isinstance(k.value, ast.Constant) and k.value.value is True for k in d.keywords)
        for d in cls.decorator_list
    )


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
