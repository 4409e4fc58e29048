"""Constraints: the languages they hold, and the promise that a state exists exactly if some valid text goes on from it."""

import json
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lark import Lark
from lark.exceptions import UnexpectedInput

from locum.decode.constraints import Constraint, Grammar, JsonSchema, Literal, Predicate, Regex, Repeat
from locum.decode.constraints.gate import Gate
from locum.errors import UserError
from locum.models.vocabulary import Vocabulary

BRACKETS = 'start: "(" start ")" start | '
DOCUMENT = """
start: value
value: object | array | ESCAPED_STRING | SIGNED_NUMBER | "true" | "null"
array: "[" [value ("," value)*] "]"
object: "{" [pair ("," pair)*] "}"
pair: ESCAPED_STRING ":" value
%import common.ESCAPED_STRING
%import common.SIGNED_NUMBER
%import common.WS
%ignore WS
"""


def check_promise(constraint: Constraint, alphabet: str, length: int, valid) -> None:
    """Every text up to `length`: valid exactly if accepted, and hopeful exactly if it begins a valid one of that length."""
    texts = ["".join(t) for n in range(length + 1) for t in product(alphabet, repeat=n)]
    good = {t for t in texts if valid(t)}
    hopeful = {t[:n] for t in good for n in range(len(t) + 1)}
    for text in texts:
        assert constraint.accepts(text) == (text in good), text
        state = constraint.run(constraint.start(), text.encode())
        assert (state is not None) == (text in hopeful), text
        if state is not None:
            follow = {b for b in range(256) if constraint.advance(state, b) is not None}
            assert constraint.following(state) == follow


@pytest.mark.parametrize(
    "pattern", ["a(b|c)?", "(ab){1,2}|c", "[^a]b|ca", "(?i:aB)c?", "a{0,2}?c", "^ab?$", "a|ab|abc|b{2}", "(?:a|bc)c"]
)
def test_regex_agrees_with_re_on_all_short_texts(pattern):
    check_promise(Regex(pattern), "abc", 4, lambda t: re.fullmatch(pattern, t))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"\d{4}-(0[1-9]|1[0-2])", "2024-12", "2024-13"),
        (r"é+", "éé", "e"),
        (r"[^é]", "è", "é"),
        (r".", "😀", "\n"),
        (r"[α-ω]{2}", "λω", "λa"),
        (r"\u4e2d.", "中文", "文中"),
        (r"a\$", "a$", "a"),
    ],
)
def test_regex_over_utf8(pattern, yes, no):
    constraint = Regex(pattern)
    assert constraint.accepts(yes)
    assert not constraint.accepts(no)
    for n in range(len(yes.encode())):
        assert constraint.run(constraint.start(), yes.encode()[:n]) is not None


@given(st.binary(max_size=6))
def test_any_characters_means_any_utf8(text):
    try:
        text.decode()
        good = True
    except UnicodeDecodeError:
        good = False
    assert Regex(r"[\s\S]*").accepts(text) == good


def test_a_lead_byte_is_refused_if_no_character_of_it_is_left():
    constraint = Regex("[é]")  # C3 A9
    assert constraint.following(constraint.start()) == {0xC3}
    assert constraint.following(constraint.advance(constraint.start(), 0xC3)) == {0xA9}


def test_brackets_and_their_promise():
    def balanced(text):
        while "()" in text:
            text = text.replace("()", "")
        return not text

    grammar = Grammar(BRACKETS)
    texts = ["".join(t) for n in range(9) for t in product("()", repeat=n)]
    for text in texts:
        assert grammar.accepts(text) == balanced(text)
        hopeful = all(text[:n].count("(") >= text[:n].count(")") for n in range(len(text) + 1))
        assert (grammar.run(grammar.start(), text.encode()) is not None) == hopeful


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" start "b" | "c"',
        'start: start "a" | "b" [start] "c"',
        'start: x x\nx: "a" x | y\ny: | "b"',
        'start: A "c"? | "a" "b"\nA: /a+b?/',
        'start: "a" dead | "b" start?\ndead: "c" dead',
    ],
)
def test_grammar_agrees_with_lark_on_all_short_texts(grammar):
    lark = Lark(grammar, parser="earley", lexer="dynamic_complete")

    def valid(text):
        try:
            lark.parse(text)
        except UnexpectedInput:
            return False
        return True

    constraint = Grammar(grammar)
    for n in range(6):
        for text in map("".join, product("abc", repeat=n)):
            # Lark cannot read the empty text with some of its parsers' settings; it is checked where rules say it.
            if text:
                assert constraint.accepts(text) == valid(text), text
                alive = constraint.run(constraint.start(), text.encode()) is not None
                if any(valid(text + more) for k in range(3) for more in map("".join, product("abc", repeat=k))):
                    assert alive


def test_a_rule_that_never_ends_gives_no_hope():
    constraint = Grammar('start: "a" dead | "b"\ndead: "c" dead')
    assert constraint.following(constraint.start()) == {ord("b")}


def test_states_of_a_grammar_are_shared():
    constraint = Grammar('start: "[" NUMBER ("," NUMBER)* "]"\nNUMBER: /[0-9]+/')
    one, many = (constraint.run(constraint.start(), t) for t in (b"[1,3,2", b"[1,4,5,6,7,8"))
    assert one is many


atoms = st.none() | st.just(True) | st.integers() | st.text(st.characters(codec="utf-8"))
keys = st.text("ab", max_size=2)


@given(st.recursive(atoms, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=6))
def test_json_of_any_value(value):
    text = json.dumps(value)
    assert JSON_GRAMMAR.accepts(text)
    assert ANY_JSON.accepts(text)
    assert not ANY_JSON.accepts(text + "]")


JSON_GRAMMAR, ANY_JSON = Grammar(DOCUMENT), JsonSchema(True)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 1000},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["x", "y", 3]}, "minItems": 1, "maxItems": 3},
        "friend": {"$ref": "#"},
    },
    "required": ["name"],
}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (PERSON, [{"name": "b"}, {"name": "ü\n\"", "age": None, "tags": ["x", 3], "friend": {"name": "q"}}],
         [{}, {"name": ""}, {"name": "b" * 1001}, {"name": "b", "tags": []}, {"name": "b", "tags": ["x"] * 4}, {"name": "b", "z": 1}]),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
         [{}, {"a": None}, {"a": None, "b": 1, "c": 2}, {"b": 1}], [{"a": 1}, {"b": "x"}, {"b": 1, "a": None}]),
        ({"anyOf": [{"const": {"k": 1.5}}, {"type": "boolean"}]}, [True, False], [{"k": 2}, 1]),
        ({"type": "string", "pattern": "^[a-c]{2}$"}, ["ab"], ["abc", "a"]),
        ({"type": "string", "pattern": "[a-c]{2}", "maxLength": 4}, ["ab", "zabz"], ["zzabz", "a"]),
        ({"type": "number"}, [0, -1.5, 1e-9, 12], ["1", None]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [[1, 2], [1, 2, 3]], [[], [1]]),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 0}, [[]], [[1]]),
        ({"type": "integer", "enum": [1, "a", 2.5]}, [1], ["a", 2.5]),
    ],
)  # fmt: skip
def test_schemas(schema, yes, no):
    constraint = JsonSchema(json.dumps(schema))
    for values, want in ((yes, True), (no, False)):
        for value in values:
            for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
                assert constraint.accepts(text) is want, text


@pytest.mark.parametrize("text", ["[1,]", "01", '"\\ud800"', "{'a':1}", '"\n"', "[1  ,2]"])
def test_what_is_not_json_is_refused(text):
    assert not ANY_JSON.accepts(text)


def test_predicates_on_text_see_whole_characters_once_per_token():
    seen = []

    def prefix(text):
        seen.append(text)
        return "äöü".startswith(text)

    constraint = Predicate(lambda t: t == "äöü", prefix)
    state = constraint.run(constraint.start(), "äö".encode()[:3])
    assert seen == ["", "ä"]
    assert constraint.run(state, b"\xff") is None
    assert constraint.accepts("äöü")
    assert not constraint.accepts("äö")
    assert Predicate(str.isdigit).accepts("12")


def test_repeat_and_literal():
    check_promise(Repeat(Regex("ab|c"), 1, 2), "abc", 4, lambda t: re.fullmatch("(ab|c){1,2}", t))
    check_promise(Literal(b"ab"), "ab", 3, lambda t: t == "ab")


def test_gate_remembers_and_counts():
    asked = []
    constraint = Predicate(lambda t: t == "ab", lambda t: asked.append(t) or "ab".startswith(t))
    gate = Gate(constraint, Vocabulary((b"a", b"b", b"ab", None)), frozenset({3}))
    asked.clear()
    for _ in range(3):
        assert [gate.accept(gate.start, t) for t in range(4)] == [True, False, True, False]
    assert gate.accept(gate.after(gate.start, 2), 3)
    assert asked == ["a", "b", "ab"]
    assert (gate.asked, gate.answered) == (13, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex("("), r"regular expression '\(' does not parse: .* position 0"),
        (lambda: Regex("a{2,1}"), "does not parse: .* position 2"),
        (lambda: Regex(r"(a)\1"), "cannot become an automaton"),
        (lambda: Regex("a(?!b)"), "look-ahead is not supported"),
        (lambda: Regex(r"\bfoo"), "cannot become an automaton"),
        (lambda: Regex(r"[^\s\S]"), "has no valid text"),
        (lambda: Grammar("start: ("), "grammar does not parse: .* line 1"),
        (lambda: Grammar('foo: "a"'), "grammar does not parse: .*start"),
        (lambda: Grammar('start: start "a"'), "grammar has no valid text"),
        (lambda: Grammar("start: B"), "grammar does not parse: .*B"),
        (lambda: Grammar("start: /(?<!a)b/"), "cannot become an automaton"),
        (lambda: Grammar("start: /a(/"), "grammar does not parse"),
        (lambda: JsonSchema('{"type":'), "JSON schema does not parse at line 1, column 9"),
        (lambda: JsonSchema({"allOf": []}), "keyword 'allOf' at # is not supported"),
        (lambda: JsonSchema({"items": {"minimum": 3}}), "keyword 'minimum' at #/items is not supported"),
        (lambda: JsonSchema({"anyOf": [True], "type": "null"}), "keyword 'type' beside 'anyOf'"),
        (lambda: JsonSchema({"type": "text"}), "type at # must be one of .*, got 'text'"),
        (lambda: JsonSchema({"$ref": "#/x"}), "'#/x' at # points to nothing"),
        (lambda: JsonSchema({"$ref": "http://x"}), "must be local"),
        (lambda: JsonSchema({"items": 3}), "at #/items must be an object or a boolean, got 3"),
        (lambda: JsonSchema({"type": "string", "pattern": "("}), r"pattern at #, '\(' does not parse"),
        (lambda: JsonSchema({"minItems": -1}), "minItems at # must be a whole number >= 0, got -1"),
        (lambda: JsonSchema({"enum": []}), "JSON schema has no valid text"),
        (lambda: JsonSchema({"type": "array", "minItems": 3, "maxItems": 2}), "JSON schema has no valid text"),
        (lambda: JsonSchema({"type": "object", "required": ["a"]}), "requires the key 'a'"),
        (
            lambda: JsonSchema({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}),
            "no valid text",
        ),
    ],
)
def test_bad_constraints_are_one_sentence(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
