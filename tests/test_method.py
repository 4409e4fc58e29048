"""Methods as values: one contract over all of them."""

import dataclasses
import math
import pickle

import pytest

from locum.errors import MissingExtra, UserError
from locum.method import from_dict, from_yaml, names, parameters, require, to_dict, to_yaml
from locum.paper import FAMILIES, catalogue

METHODS = [(family, name) for family in FAMILIES for name in names(family)]


def made(family, name):
    cls = names(family)[name]
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        pytest.skip(f"{cls.__name__} has no default for {', '.join(needed)}")
    return cls()


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_a_method_is_a_value(family, name):
    method = made(family, name)
    again = names(family)[name]()
    assert method == again
    assert hash(method) == hash(again)
    assert pickle.loads(pickle.dumps(method)) == method
    assert repr(method).startswith(type(method).__name__ + "(")
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_a_method_is_written_and_read(family, name):
    method = made(family, name)
    assert to_dict(method)["method"] == f"{family}.{name}"
    assert from_dict(to_dict(method)) == method
    assert from_yaml(to_yaml(method)) == method


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_every_parameter_is_explained(family, name):
    for field in parameters(names(family)[name]):
        assert field["help"], f"{name}.{field['name']} is missing from the docstring's Args"


def test_every_paper_with_code_has_a_main_class():
    for paper in catalogue():
        if paper.state != "planned":
            here = names(paper.family)
            assert f"locum.{paper.family}.{paper.slug}" in {here.module(n) for n in here}


@dataclasses.dataclass(frozen=True)
class Fade:
    fade: float = 0.98

    def __post_init__(self):
        require(self, "fade", 0 < self.fade <= 1, "in (0, 1]")


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0, math.nan])
def test_a_bad_value_is_named(value):
    with pytest.raises(UserError, match=rf"^Fade\.fade must be in \(0, 1\], got {value}$"):
        Fade(fade=value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "a key 'method'"),
        ({"method": "nothing"}, "write it as 'family.name'"),
        ({"method": "decod.plain"}, "unknown family 'decod': did you mean 'decode'"),
        ({"method": "decode.plan"}, "unknown method of decode 'plan'"),
        ({"method": "locum.errors.UserError"}, "unknown method"),
        ({"method": "locum.nowhere.Thing"}, "unknown method"),
    ],
)
def test_what_cannot_be_read_is_named(data, said):
    with pytest.raises(UserError, match=said):
        from_dict(data)


@pytest.mark.parametrize(("text", "said"), [("[1, 2", "not YAML"), ("- 1", "is a mapping"), ("", "is a mapping")])
def test_yaml_that_is_no_method(text, said):
    with pytest.raises(UserError, match=said):
        from_yaml(text)


def test_an_unknown_family():
    with pytest.raises(UserError, match="unknown family 'aline': did you mean 'align'"):
        names("aline")


def test_a_missing_extra_says_what_to_install():
    error = MissingExtra("--engine ray", "ray")
    assert str(error) == "--engine ray needs the extra 'ray': pip install 'locum[ray]'"
    assert isinstance(error, UserError)
