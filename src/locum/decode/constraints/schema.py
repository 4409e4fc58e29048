"""JSON schemas as constraints: a small compiler from schema to grammar."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from locum.decode.constraints.base import Constraint, Literal, Repeat, State
from locum.decode.constraints.cfg import ContextFree
from locum.decode.constraints.regex import ByteAutomaton, Regex, from_machine, machine
from locum.errors import UserError

_PLAIN = r'[^"\\\x00-\x1f]'
_HEX = "[0-9A-Fa-f]"
_BASIC = rf"\\u([0-9A-Ca-cE-Fe-f]{_HEX}{{3}}|[Dd][0-7]{_HEX}{{2}})"
_PAIR = rf"\\u[Dd][89ABab]{_HEX}{{2}}\\u[Dd][C-Fc-f]{_HEX}{{2}}"  # two halves of one character
_CHARACTER = rf'{_PLAIN}|\\["\\/bfnrt]|{_BASIC}|{_PAIR}'
_INTEGER = r"-?(0|[1-9][0-9]*)"
_NUMBER = _INTEGER + r"(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_KNOWN = _NOTES | {"type", "enum", "const", "anyOf", "$ref"} | set().union(*_KEYWORDS.values())


class JsonSchema(ContextFree):
    """JSON texts that a schema allows.

    Keywords: type, enum, const, anyOf, local $ref, properties, required, additionalProperties, items, minItems,
    maxItems, minLength, maxLength, pattern; notes such as title are passed over, and any other keyword is refused by
    name.

    Every text that is accepted is valid; of the valid texts these are left out, so that the language stays context
    free: keys come in the order of `properties`; keys that are not listed come after them, and only if
    `additionalProperties` is given (or `properties` is not); constants are written as `json.dumps` writes them; strings
    with a `pattern` and additional keys are written without escapes.

    Args:
        schema: the schema, as JSON text or as the value that text stands for.
        whitespace: what may stand after an opening bracket, a comma or a colon and before a closing bracket; a regular
            expression. Endless white space invites a model to ramble, so the default is at most one blank.

    Raises: UserError for a schema that is not JSON (with the position), has an unsupported keyword, or no valid text.
    """

    def __init__(self, schema: str | bool | Mapping[str, Any], whitespace: str = " ?") -> None:
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"JSON schema does not parse at line {error.lineno}, column {error.colno}: {error.msg}"
                ) from error
        compiler = _Compiler(schema, whitespace)
        start = compiler.value(schema, "#")
        try:
            super().__init__(compiler.rules, compiler.terminals, start)
        except UserError as error:
            raise UserError("JSON schema has no valid text: nothing can satisfy it") from error


class _Compiler:
    """Rules are named by the place in the schema that they come from."""

    def __init__(self, root: Any, whitespace: str) -> None:
        self.root = root
        self.rules: dict[str, list[tuple[str, ...]]] = {}
        self.terminals: dict[str, Constraint] = {}
        space = ByteAutomaton(machine(whitespace, "white space"), "white space")
        first = space.start()
        self.rules["_"] = [()] if first is not None and space.complete(first) else []
        if first is not None and space.following(first):
            filled = machine(whitespace) & machine(r"[\s\S]+")
            self.rules["_"].append((self.terminal("SPACE", lambda: from_machine(filled, "white space")),))

    def terminal(self, name: str, make: Callable[[], Constraint]) -> str:
        if name not in self.terminals:
            self.terminals[name] = make()
        return name

    def literal(self, text: str) -> str:
        return self.terminal(repr(text), lambda: Literal(text.encode()))

    def constant(self, value: Any) -> str:
        return self.literal(json.dumps(value, ensure_ascii=False))

    def value(self, schema: Any, place: str) -> str:
        """The name of the rule for a schema; its rules are made when first asked for, so that a schema may hold
        itself."""
        if place in self.rules:
            return place
        self.rules[place] = []
        self.rules[place] = self.options(schema, place)
        return place

    def options(self, schema: Any, place: str) -> list[tuple[str, ...]]:
        if schema is True or schema == {}:
            return [(self.typed(name, {}, "any"),) for name in _TYPES if name != "integer"]
        if schema is False:
            return []
        if not isinstance(schema, Mapping):
            raise UserError(f"JSON schema at {place} must be an object or a boolean, got {schema!r}")
        for keyword in schema:
            if keyword not in _KNOWN:
                raise UserError(f"JSON schema keyword {keyword!r} at {place} is not supported")
        if "$ref" in schema:
            self.alone(schema, "$ref", place)
            return [(self.value(self.resolve(schema["$ref"], place), str(schema["$ref"])),)]
        if "anyOf" in schema:
            self.alone(schema, "anyOf", place)
            return [(self.value(s, f"{place}/anyOf/{i}"),) for i, s in enumerate(schema["anyOf"])]
        if "const" in schema or "enum" in schema:
            keyword = "const" if "const" in schema else "enum"
            self.alone(schema, keyword, place, also="type")
            values = [schema["const"]] if keyword == "const" else schema["enum"]
            names = self.types(schema, place)
            return [(self.constant(v),) for v in values if any(_is(v, name) for name in names)]
        return [(self.typed(name, schema, place),) for name in self.types(schema, place)]

    def alone(self, schema: Mapping[str, Any], keyword: str, place: str, also: str = "") -> None:
        for other in schema.keys() - _NOTES - {keyword, also}:
            raise UserError(f"JSON schema keyword {other!r} beside {keyword!r} at {place} is not supported")

    def types(self, schema: Mapping[str, Any], place: str) -> tuple[str, ...]:
        given = schema.get("type", [name for name in _TYPES if name != "integer"])
        names = tuple(given) if isinstance(given, list | tuple) else (given,)
        for name in names:
            if name not in _TYPES:
                raise UserError(f"JSON schema type at {place} must be one of {', '.join(_TYPES)}, got {name!r}")
        return names

    def resolve(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise UserError(f"JSON schema $ref at {place} must be local (begin with '#'), got {reference!r}")
        found = self.root
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise UserError(f"JSON schema $ref {reference!r} at {place} points to nothing") from None
        return found

    def typed(self, name: str, schema: Mapping[str, Any], place: str) -> str:
        """The rule for values of one type."""
        rule = f"{place} {name}"
        if rule in self.rules:
            return rule
        self.rules[rule] = []
        options: list[tuple[str, ...]]
        match name:
            case "null":
                options = [(self.literal("null"),)]
            case "boolean":
                options = [(self.literal("true"),), (self.literal("false"),)]
            case "integer":
                options = [(self.terminal("INTEGER", lambda: Regex(_INTEGER)),)]
            case "number":
                options = [(self.terminal("NUMBER", lambda: Regex(_NUMBER)),)]
            case "string":
                options = self.string(schema, place)
            case "array":
                options = self.array(schema, place)
            case _:
                options = self.object(schema, place)
        self.rules[rule] = options
        return rule

    def string(self, schema: Mapping[str, Any], place: str) -> list[tuple[str, ...]]:
        low, high = _bounds(schema, "minLength", "maxLength", place)
        if "pattern" not in schema:
            character = self.terminal("CHARACTER", lambda: Regex(_CHARACTER))
            inner: Constraint = Repeat(self.terminals[character], low, high)
        else:
            what, body = f"JSON schema pattern at {place},", str(schema["pattern"])
            # A pattern may match anywhere in the string unless it is anchored.
            left = "" if body.startswith("^") else r"[\s\S]*"
            right = "" if re.search(r"(?<!\\)(\\\\)*\$$", body) else r"[\s\S]*"
            machine(body, what)  # so that an error shows the pattern as it was written
            body = body[not left : len(body) - (not right)]
            found = machine(f"{left}(?:{body}){right}", what) & machine(f"({_PLAIN})*")
            if low or high is not None:
                found &= machine(f"[\\s\\S]{{{low},{'' if high is None else high}}}")
            inner = from_machine(found, f"JSON schema pattern at {place}")
        return [(self.terminal(f"TEXT {place}", lambda: Quoted(inner)),)]

    def array(self, schema: Mapping[str, Any], place: str) -> list[tuple[str, ...]]:
        low, high = _bounds(schema, "minItems", "maxItems", place)
        item, comma = (self.value(schema.get("items", True), f"{place}/items"),), self.literal(",")
        more = f"{place} more items"
        if high is None:
            self.rules[more] = [(), (more, comma, "_", *item)]
        else:
            for left in range(high + 1):
                self.rules[f"{more} {left}"] = [(), (comma, "_", *item, f"{more} {left - 1}")] if left else [()]
        least = max(low, 1)
        filled = item + (comma, "_", *item) * (least - 1) + ((more,) if high is None else (f"{more} {high - least}",))
        return self.bracket("[", "]", empty=low == 0, filled=[filled] if high is None or high >= least else [])

    def object(self, schema: Mapping[str, Any], place: str) -> list[tuple[str, ...]]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        for key in required:
            if key not in properties:
                raise UserError(f"JSON schema requires the key {key!r} at {place} but properties does not describe it")
        comma = self.literal(",")
        more, tail = schema.get("additionalProperties", "properties" not in schema), f"{place} more keys"
        # Rules "first i": no member is written yet and i is the next that may be; "after i": some are.
        self.rules[f"{place} first {len(properties)}"] = []
        self.rules[f"{place} after {len(properties)}"] = [(tail,)]
        self.rules[tail] = [()]
        if more is not False:
            key = self.terminal(f"KEY {place}", lambda: _other_key(list(properties)))
            extra = (key, self.literal(":"), "_", self.value(more, f"{place}/additionalProperties"))
            self.rules[f"{place} first {len(properties)}"] = [(*extra, tail)]
            self.rules[tail].append((tail, comma, "_", *extra))
        for i, (key, sub) in enumerate(properties.items()):
            name = self.literal(json.dumps(key, ensure_ascii=False) + ":")
            member = (name, "_", self.value(sub, f"{place}/properties/{key}"), f"{place} after {i + 1}")
            for state, options in ((f"{place} first", [member]), (f"{place} after", [(comma, "_", *member)])):
                skip: list[tuple[str, ...]] = [] if key in required else [(f"{state} {i + 1}",)]
                self.rules[f"{state} {i}"] = [*options, *skip]
        return self.bracket("{", "}", empty=not required, filled=[(f"{place} first 0",)])

    def bracket(self, left: str, right: str, empty: bool, filled: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        opening, closing = self.literal(left), self.literal(right)
        return [(opening, "_", *f, "_", closing) for f in filled] + ([(opening, "_", closing)] if empty else [])


@dataclass(frozen=True)
class Quoted(Constraint):
    """A text between double quotes; the inner automaton must not accept a bare quote where it may end."""

    inner: Constraint

    def start(self) -> State | None:
        return "before"

    def advance(self, state: State, byte: int) -> State | None:
        if isinstance(state, str):
            return (self.inner.start(),) if state == "before" and byte == ord('"') else None
        assert isinstance(state, tuple)
        inside = self.inner.advance(state[0], byte)
        if inside is not None:
            return (inside,)
        return "after" if byte == ord('"') and self.inner.complete(state[0]) else None

    def complete(self, state: State) -> bool:
        return state == "after"


def _other_key(listed: list[str]) -> Constraint:
    keys = machine(f'"({_PLAIN})*"')
    for key in listed:
        keys -= machine(re.escape(f'"{key}"'))
    return from_machine(keys, "JSON schema key")


def _bounds(schema: Mapping[str, Any], low: str, high: str, place: str) -> tuple[int, int | None]:
    for keyword in (low, high):
        value = schema.get(keyword, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"JSON schema {keyword} at {place} must be a whole number >= 0, got {value!r}")
    return schema.get(low, 0), schema.get(high)


def _is(value: Any, name: str) -> bool:
    """Whether a value is of a JSON type."""
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list | tuple)
        case _:
            return isinstance(value, Mapping)
