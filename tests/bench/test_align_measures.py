"""The comparison at equal KL, on curves whose answer is known."""

import pytest

from locum.bench.align_measures import MEASURES, along_kl, at_levels, score_limits
from locum.bench.measures import summary


def raw(kl, reward, **more):
    curve = {"step": list(range(len(kl))), "kl": kl, "reward": reward, "accuracy": [0.5] * len(kl), "entropy": kl}
    cost = {"tokens": 100, "seconds": 2.0, "preparation_seconds": 0.0, "peak_memory_mb": None}
    return {"score": "reward", "curve": curve | {"length": kl}, **cost, **more}


def line(mine, theirs, method="mine"):
    return {"method": method, "raw": mine, "refs": {} if theirs is None else {"dpo": theirs}}


def by_prompt(kl, scores):
    """A raw line whose prompts have these scores at each checkpoint."""
    means = [sum(s) / len(s) for s in scores]
    return raw(kl, means, by_prompt={"kl": [[k] * len(s) for k, s in zip(kl, scores, strict=True)], "score": scores})


def figures(*lines):
    found = summary(list(lines), MEASURES)
    return {key: value for section in found.values() for key, value in section.items()}


def test_at_equal_kl_the_steeper_curve_is_ahead_however_far_each_went():
    slow_but_steep, fast = raw([0.0, 1.0, 2.0], [1.0, 2.5, 4.0]), raw([0.0, 4.0, 8.0], [1.0, 5.0, 9.0])
    found = figures(line(slow_but_steep, fast))
    # Levels 0.5, 1, 1.5, 2 of the common KL 2: gains 1.5 k against 1 k, mean k = 1.25.
    assert found["vs_dpo"] == pytest.approx(0.5 * 1.25, abs=1e-12)
    assert found["gain_vs_dpo"] == pytest.approx(1.5, abs=1e-12)
    assert found["reward"] == 4.0
    assert found["gained"] == 3.0
    assert found["kl"] == 2.0
    back = figures(line(fast, slow_but_steep))
    assert back["vs_dpo"] == pytest.approx(-0.5 * 1.25, abs=1e-12)
    assert back["reward"] == 9.0  # it went further, and that is not what decides


def test_the_baseline_is_itself():
    dpo = raw([0.0, 1.0], [0.0, 1.0])
    found = figures(line(dpo, dpo, "dpo"), line(dpo, dpo, "dpo"))
    assert found["vs_dpo"] == 0
    assert found["gain_vs_dpo"] == 1
    assert found["vs_dpo_interval"] is None


def test_a_policy_that_never_moved_is_not_compared():
    found = figures(line(raw([0.0, 1e-6], [0.0, 0.3]), raw([0.0, 1.0], [0.0, 1.0])))
    assert found["vs_dpo"] is None
    assert found["vs_dpo_interval"] is None
    assert figures(line(raw([0.0, 1.0], [0.0, 1.0]), None))["vs_dpo"] is None


def test_the_interval_over_seeds_is_of_the_paired_difference():
    lines = []
    for offset, gap in ((0.0, 0.1), (50.0, 0.2), (-50.0, 0.3)):  # worlds apart, yet each pair is near
        mine, theirs = raw([0.0, 1.0], [offset, offset + 1 + gap]), raw([0.0, 1.0], [offset, offset + 1.0])
        lines.append(line(mine, theirs))
    found = figures(*lines)
    assert found["vs_dpo"] == pytest.approx(0.2 * 0.625, abs=1e-9)
    low, high = found["vs_dpo_interval"]
    assert 0.1 * 0.625 - 1e-9 <= low < found["vs_dpo"] < high <= 0.3 * 0.625 + 1e-9
    assert figures(lines[0])["vs_dpo_interval"] is None  # one exact figure has no interval


def test_the_interval_over_prompts_is_paired_prompt_by_prompt():
    start = [0.9, -0.9, 0.5, -0.5]
    dpo = by_prompt([0.0, 1.0], [start, [s + 0.1 for s in start]])
    surely = by_prompt([0.0, 1.0], [start, [s + 0.3 for s in start]])
    low, high = figures(line(surely, dpo))["vs_dpo_interval"]
    assert (low, high) == (pytest.approx(0.2 * 0.625), pytest.approx(0.2 * 0.625))  # the same on every prompt
    chance = by_prompt([0.0, 1.0], [start, [1.0, -1.0, 1.0, -1.0]])
    low, high = figures(line(chance, dpo))["vs_dpo_interval"]
    assert low < 0 < high


def test_a_gain_of_dpo_that_may_be_chance_is_no_yardstick():
    noisy = by_prompt([0.0, 1.0], [[0.0] * 4, [1.0, -0.9, 1.0, -0.9]])
    found = figures(line(by_prompt([0.0, 1.0], [[0.0] * 4, [0.5] * 4]), noisy))
    assert found["vs_dpo"] is not None
    assert found["gain_vs_dpo"] is None


def test_levels_are_read_off_between_checkpoints():
    assert at_levels(([0.0, 1.0, 3.0], [0.0, 2.0, 3.0]), [0.5, 2.0, 4.0]) == [1.0, 2.5, None]


def test_along_kl_ends_where_the_first_of_them_ends():
    rows = along_kl([line(raw([0.0, 2.0], [0.0, 4.0]), raw([0.0, 4.0], [0.0, 4.0]))] * 2, levels=4)
    assert [(kl, gap) for kl, gap, _ in rows] == [(0.5, 0.5), (1.0, 1.0), (1.5, 1.5), (2.0, 2.0)]
    assert rows[0][2] == (0.5, 0.5)
    assert along_kl([line(raw([0.0, 2.0], [0.0, 4.0]), None)]) == []


def test_the_gain_s_interval_is_over_seeds_or_over_prompts():
    one = by_prompt([0.0, 1.0], [[0.0, 1.0], [1.0, 3.0]])
    assert score_limits([line(one, one)], 0) is None
    assert score_limits([line(one, one)], 1) == (1.0, 2.0)
    worlds = [line(raw([0.0, 1.0], [x, x + 1]), None) for x in (0.0, 10.0)]
    assert score_limits(worlds, 1) == (1.0, 1.0)
