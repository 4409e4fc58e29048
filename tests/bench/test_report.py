"""The report: it loads nothing, escapes everything, and shows what was measured."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from locum.bench.charts import Bar, Difference, Line, Point, Spot, _spread, _ticks, bars, curves, differences, frontier
from locum.bench.compare import compare

sys.path.insert(0, str(Path(__file__).parent))
from fake import NASTY, FakeTask
from reading import Reader, assert_self_contained


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    result = compare(FakeTask(), name="a", runs=tmp_path_factory.mktemp("runs"))
    return result.report.read_text("utf-8")


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def test_it_loads_nothing_and_nothing_of_a_prompt_or_model_becomes_markup(page, read):
    assert_self_contained(page)
    assert NASTY in read.data["p"]  # the headline, as text


def test_the_samples_are_all_there(read):
    data = json.loads(read.data["script application/json"])
    assert data["methods"] == ["plain", "twice", "<i>odd</i>"]
    assert data["items"][1] == {"group": "rough", "text": f"item 1 {NASTY}"}
    sample = data["samples"]["twice"]["2"]
    assert sample["pieces"][0] == NASTY
    assert len(sample["pieces"]) == len(sample["step"]) == len(sample["depth"])


def test_failures_are_shown(page):
    assert "What failed" in page
    assert "RuntimeError: broken on" in page


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
    ranges = [
        (low, high, room) for low, high in ((0.9, 3.1), (1.0, 1.0), (0.0, 1e-6), (5, 5000)) for room in (0.05, 0.0)
    ]
    for low, high, room in [*ranges, (0.0, 0.0, 0.0), (0.0, 400.0, 0.0)]:
        ticks = _ticks(low, high, room)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 13
    heights = _spread([10, 11, 12, 100], 10, 110)
    assert all(b - a >= 19 for a, b in pairwise(heights))
    assert heights[-1] <= 110


def test_curves_have_a_line_each_and_intervals_as_whiskers_or_as_a_band():
    def line(name, n):
        return Line(
            name, 1, [Spot(i, i * i, (i * i - 1.0, i * i + 1.0) if i else None, f"{name} {i}") for i in range(n)]
        )

    few, many = curves([line("a<b", 4)], "x", "y"), curves([line("a<b", 20)], "x", "y", small=True)
    assert few.count('class="limits') == 3
    assert few.count("<circle") == 4
    assert "a&lt;b" in few
    assert many.count('class="band') == 1
    assert "limits" not in many
    assert 'class="label' not in many
    assert "<svg" not in curves([Line("a", 0, [])], "x", "y")
    assert 'class="zero"' in curves([Line("a", 1, [Spot(0.0, 1.0), Spot(1.0, 2.0)])], "x", "y", zero=True)


def test_differences_have_zero_in_sight():
    rows = [Difference("a<b", 1, 0.5, (0.25, 0.75), "+0.50"), Difference("c", 2, 0.75, None, "+0.75")]
    svg = differences(rows, "t")
    assert svg.count('class="zero"') == 1
    assert svg.count('class="limits') == 1
    assert "a&lt;b" in svg
    assert "<svg" not in differences([], "t")
