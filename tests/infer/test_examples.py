"""The examples in the family's docstrings print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "extra"), [("dsl", "pandas"), ("labels", "pandas"), ("problem", None), ("progvi", "jax")]
)
def test_examples_print_what_they_say(module, extra):
    if extra is not None:
        pytest.importorskip(extra)
    done = doctest.testmod(importlib.import_module(f"locum.infer.{module}"))
    assert done.attempted > 0
    assert done.failed == 0
