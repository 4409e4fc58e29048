"""From lines to figures, with numbers worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locum.bench.decode_measures import MEASURES
from locum.bench.measures import aggregate, interval, median, paired, ratio, sign_test, total

BY_KEY = {m.key: m for m in MEASURES}


def line(ids, rate, greedy=True, refs=None, **raw):
    base = {"ids": ids, "tokens": len(ids), "tokens_per_second": rate, "greedy": greedy, "log_likelihood": -1.0}
    base |= {
        "forwards": len(ids),
        "accepted": 0,
        "seconds": len(ids) / rate,
        "draft_seconds": 0.0,
        "peak_memory_mb": 1.0,
    }
    row = {"method": "m", "group": "g", "seed": 0, "raw": base | raw}
    return row | {"refs": {k: line(*v)["raw"] for k, v in (refs or {}).items()}}


def test_ratios_are_of_pairs_and_their_median_is_reported():
    # The machine is twice as slow for the second and third prompt; the pairs are 2, 3 and 4.
    pairs = [(20, 10), (15, 5), (20, 5)]
    lines = [line([1], a, refs={"plain": ([1], b), "transformers": ([1], b)}) for a, b in pairs]
    assert BY_KEY["vs_plain"].of(lines) == 3.0
    assert BY_KEY["tokens_per_second"].of(lines) == 20.0
    low, high = BY_KEY["vs_plain"].interval(lines)
    assert 2.0 <= low <= 3.0 <= high <= 4.0


def test_tokens_per_forward_is_a_ratio_of_sums():
    lines = [line([1] * 10, 1.0, forwards=2), line([1] * 2, 1.0, forwards=2)]
    assert BY_KEY["tokens_per_forward"].of(lines) == 3.0  # 12 / 4, not (5 + 1) / 2 = 3 by luck:
    assert ratio("tokens", "forwards")([line([1] * 9, 1.0, forwards=1), line([1], 1.0, forwards=4)]) == 2.0


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "agreement"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], True, 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], False, 0.5),
        ([1, 2], [1, 2, 3, 4], False, 0.5),
        ([1, 2, 3, 4], [1, 2], False, 0.5),
        ([9], [1], False, 0.0),
    ],
)
def test_identical_to_greedy(ours, theirs, same, agreement):
    lines = [line(ours, 1.0, refs={"transformers": (theirs, 1.0)}), line([7], 1.0, refs={"transformers": ([7], 1.0)})]
    assert BY_KEY["identical_to_greedy"].of(lines) is same
    assert BY_KEY["agreement"].of(lines[:1]) == agreement
    assert BY_KEY["law"].of(lines) is None


def test_sampled_text_is_not_compared_to_greedy():
    lines = [line([1], 1.0, greedy=False, refs={"transformers": ([2], 1.0)})]
    assert BY_KEY["identical_to_greedy"].of(lines) is None
    assert BY_KEY["law"].of(lines) == "exact law"


def test_what_is_not_known_is_none():
    lines = [line([1], 1.0, draft_seconds=None, peak_memory_mb=None)]
    assert BY_KEY["draft_share"].of(lines) is None
    assert BY_KEY["peak_memory_mb"].of(lines) is None
    assert BY_KEY["vs_plain"].of(lines) is None
    assert paired("tokens_per_second", "plain")(lines[0]) is None
    assert median(lambda _: None)(lines) is None
    assert total("absent")(lines) is None


def test_a_row_of_failures_only_has_no_figures_but_an_error():
    bad = {"method": "m", "group": "g", "seed": 0, "error": "E: x", "refs": {}}
    [row] = aggregate([bad], MEASURES)
    assert row["error"] == "E: x"
    assert set(row) == {"method", "group", "seed", "quality", "cost", "fidelity", "ratios", "error"}
    assert row["ratios"]["vs_plain"] is None
    assert {"seconds", "tokens_per_second"} <= set(row["cost"])
    assert {"identical_to_greedy", "tokens_per_forward"} <= set(row["fidelity"])


def test_every_measure_says_what_it_is():
    assert len(BY_KEY) == len(MEASURES)
    for m in MEASURES:
        assert m.title
        assert len(m.how) > 10
        assert m.better in ("higher", "lower", "yes", "")


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=12))
def test_an_interval_lies_within_the_values_and_repeats(values):
    limits = interval(values)
    assert min(values) <= limits[0] <= limits[1] <= max(values)
    assert interval(values) == limits


def test_no_interval_of_one_value():
    assert interval([1.0]) is None


def test_the_sign_test_by_hand():
    """7 wins of 8: (8 + 1) / 256; a tie and a nan are no wins."""
    assert sign_test([1.0] * 7 + [-5.0]) == pytest.approx(9 / 256, abs=1e-12)
    assert sign_test([1.0] * 7 + [0.0]) == sign_test([1.0] * 7 + [float("nan")]) == pytest.approx(9 / 256, abs=1e-12)
    assert sign_test([1.0] * 8) == pytest.approx(1 / 256, abs=1e-12)
    assert sign_test([-1.0] * 8) == 1.0
