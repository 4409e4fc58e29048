"""The report: it loads nothing, escapes everything, and shows what was measured."""

import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from locum.bench.charts import Bar, Point, _spread, _ticks, bars, frontier
from locum.bench.compare import compare

sys.path.insert(0, str(Path(__file__).parent))
from fake import NASTY, FakeTask


class Reader(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.data: dict[str, str] = {}
        self.inside = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag != "script" else f"script {dict(attrs).get('type', '')}"

    def handle_data(self, data):
        self.data[self.inside] = self.data.get(self.inside, "") + data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    result = compare(FakeTask(), name="a", runs=tmp_path_factory.mktemp("runs"))
    return result.report.read_text("utf-8")


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


def test_it_loads_nothing(page, read):
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.[a-z]", page)
    for tag, attrs in read.tags:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attrs), (tag, attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")


def test_nothing_of_a_prompt_or_model_becomes_markup(read):
    tags = [t for t, _ in read.tags]
    assert tags.count("script") == 2  # the data and the page's own
    assert "img" not in tags
    for tag, attrs in read.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    assert NASTY in read.data["p"]  # the headline, as text


def test_the_samples_are_all_there(read):
    data = json.loads(read.data["script application/json"])
    assert data["methods"] == ["plain", "twice", "<i>odd</i>"]
    assert data["items"][1] == {"group": "rough", "text": f"item 1 {NASTY}"}
    sample = data["samples"]["twice"]["2"]
    assert sample["pieces"][0] == NASTY
    assert len(sample["pieces"]) == len(sample["step"]) == len(sample["depth"])


def test_the_page_s_own_script_writes_text_only(page):
    script = page[page.rindex("<script>") :]
    assert "innerHTML" not in script
    assert "document.write" not in script
    assert "insertAdjacentHTML" not in script


def test_failures_are_shown(page):
    assert "What failed" in page
    assert "RuntimeError: broken on" in page


def test_template_is_filled_whole(page):
    assert not re.search(r"\$[a-z{]", page)


def test_charts_with_one_point_and_with_none():
    assert "<svg" not in frontier([], "x", "y")
    one = frontier([Point("a<b", "ours", 1.0, 1.0)], "x", "y", ideal="i")
    assert "a&lt;b" in one
    assert "nan" not in one
    assert "failed" in bars({"g": [Bar("m", "ours", None, None)]}, "t")


def test_the_frontier_holds_whom_none_beats():
    svg = frontier(
        [Point(n, "ours", x, y) for n, x, y in (("a", 1, 3), ("b", 2, 2), ("c", 3, 1), ("d", 1, 1))], "x", "y"
    )
    path = re.search(r'class="frontier" d="M([^"]*)"', svg)[1]
    assert len(path.split("L")) == 3  # d is beaten by all others


def test_ticks_enclose_and_labels_keep_apart():
    for low, high in ((0.9, 3.1), (1.0, 1.0), (0.0, 1e-6), (5, 5000)):
        ticks = _ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 13
    heights = _spread([10, 11, 12, 100], 10, 110)
    assert all(b - a >= 19 for a, b in pairwise(heights))
    assert heights[-1] <= 110
