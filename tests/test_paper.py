"""The catalogue: 44 papers, each once, each complete."""

import re
import tomllib

import pytest

from locum.errors import UserError
from locum.paper import FAMILIES, ROOT, catalogue, find, module_paths, parse

DOCSTRING = """A Title: with a colon

    Expensive: reading
      every page.
    Stands in: a summary
    Check: read one.

    The equation: s = f(p).

    Check the shapes too.

    Example:
        >>> 1 + 1
        2

    Authors: Noone, van Someone
    Year: 2030
    Venue: Nowhere 2030
    arXiv: 3001.00001
"""


def test_there_are_44_papers_in_ten_families():
    papers = catalogue()
    assert len(papers) == len({p.slug for p in papers}) == 44
    count = {f: sum(p.family == f for p in papers) for f in FAMILIES}
    assert list(count.values()) == [8, 7, 5, 7, 5, 2, 4, 2, 3, 1]


def test_a_paper_with_code_has_left_the_list_of_planned_ones():
    planned = tomllib.loads((ROOT / "planned.toml").read_text("utf-8"))
    coded = {p.slug for p in catalogue() if p.state != "planned"}
    assert not coded & planned.keys()


@pytest.mark.parametrize("paper", catalogue(), ids=lambda p: p.slug)
def test_every_entry_is_complete(paper):
    assert paper.title
    assert paper.venue
    assert paper.authors
    assert all(paper.authors)
    assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
    assert 2017 <= paper.year <= 2030
    for sentence in (paper.expensive, paper.stands_in, paper.check):
        assert len(sentence) > 10
        assert "\n" not in sentence
    assert paper.bibtex().startswith(f"@article{{{paper.slug},")


@pytest.mark.parametrize(
    "path", [p for f in FAMILIES for p in module_paths(f)], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_a_file_named_like_a_paper_describes_it(path):
    paper = find(path.stem, default=None)
    assert paper is None or (paper.state != "planned" and paper.family == path.parent.name)


def test_a_docstring_is_read_entry_by_entry():
    paper = parse(DOCSTRING, "title", "align")
    assert paper.title == "A Title: with a colon"
    assert paper.expensive == "Reading every page"
    assert paper.stands_in == "A summary"
    assert paper.check == "Read one"
    assert paper.authors == ("Noone", "van Someone")
    assert paper.year == 2030
    assert paper.venue == "Nowhere 2030"
    assert paper.arxiv == "3001.00001"
    assert paper.text == "The equation: s = f(p).\n\nCheck the shapes too."
    assert paper.example == ">>> 1 + 1\n2"


def test_a_module_that_is_no_paper_and_one_that_is_half_of_one():
    assert parse("Shared machinery.", "base", "align") is None
    with pytest.raises(ValueError, match="lacks the entries Stands in, Check"):
        parse("T\n\nExpensive: x", "half", "align")


def test_a_misspelt_slug_is_answered_with_the_nearest():
    assert find("TDPO").slug == "tdpo"
    with pytest.raises(UserError, match="unknown paper 'spectre': did you mean 'spectr'"):
        find("spectre")


def test_the_promised_form():
    keys = ["slug", "title", "arxiv", "year", "family", "expensive", "stands_in", "check", "state", "claim"]
    for paper in catalogue():
        form = paper.to_json()
        assert list(form) == keys
        assert form["state"] in ("planned", "coded", "verified")
        assert (form["claim"] is not None) == (form["state"] == "verified")
        assert form["claim"] is None or form["claim"].keys() == {"verdict", "date"}
