"""Simulated annotations: laws, designs, and what cannot be drawn."""

import numpy as np
import pytest

from locum.errors import UserError
from locum.tasks.annotations import Simulation

MANY = 200_000


def within(share, expected, count):
    assert abs(share - expected) < 4.5 * (0.25 / count) ** 0.5


def test_variables_and_truth_have_their_laws():
    c = Simulation(n=MANY).draw(0)
    assert c["x1"].mean() == pytest.approx(0, abs=0.01)
    assert c["x1"].std() == pytest.approx(1, abs=0.01)
    within(c["x2"].mean(), 0.5, MANY)
    for low in np.arange(-2, 2, 0.5):
        for x2 in (0, 1):
            here = (c["x1"] > low) & (c["x1"] < low + 0.1) & (c["x2"] == x2)
            within(c["truth"][here].mean(), 1 / (1 + np.exp(0.5 - 0.8 * (low + 0.05) - 0.6 * x2)), here.sum())


@pytest.mark.parametrize(("x2", "truth", "rate"), [(1, 1, 0.20), (1, 0, 0.02), (0, 1, 0.02), (0, 0, 0.16)])
def test_differential_errors(x2, truth, rate):
    c = Simulation(n=MANY).draw(1)
    here = (c["x2"] == x2) & (c["truth"] == truth)
    within((c["q"] != c["truth"])[here].mean(), rate, here.sum())
    within((c["q"] == c["truth"]).mean(), 0.89, MANY / 4)


@pytest.mark.parametrize("accuracy", [0.7, 0.8, 0.95])
def test_differential_errors_of_any_number(accuracy):
    c = Simulation(n=MANY, accuracy=accuracy).draw(1)
    wrong = c["q"] != c["truth"]
    within(1 - wrong.mean(), accuracy, MANY)
    rates = [wrong[(c["x2"] == x2) & (c["truth"] == truth)].mean() for x2, truth in ((1, 1), (0, 0))]
    assert rates[0] / rates[1] == pytest.approx(0.20 / 0.16, rel=0.1)


@pytest.mark.parametrize(("surrogate", "accuracy"), [("coin", 0.5), (0.8, 0.8), (1, 1.0)])
def test_errors_that_are_the_same_for_all(surrogate, accuracy):
    c = Simulation(n=MANY, surrogate=surrogate).draw(2)
    for here in (c["truth"] == 0, c["truth"] == 1, c["x2"] == 1):
        within((c["q"] == c["truth"])[here].mean(), accuracy, here.sum())


def test_designs():
    c = Simulation().draw(3)
    drawn = ~np.isnan(c["y"])
    assert drawn.sum() == 300
    assert set(c["prob"]) == {0.15}
    assert (c["y"][drawn] == c["truth"][drawn]).all()
    c = Simulation(n=MANY, design="unequal").draw(3)
    drawn = ~np.isnan(c["y"])
    assert sorted(set(c["prob"])) == pytest.approx([0.1, 0.3])
    for x2, prob in ((0, 0.1), (1, 0.3)):
        assert c["prob"][c["x2"] == x2] == pytest.approx(prob)
        within(drawn[c["x2"] == x2].mean(), prob, MANY / 2)


def test_a_seed_is_a_draw():
    one, again, other = (Simulation().draw(seed) for seed in (4, 4, 5))
    assert all(np.array_equal(one[k], again[k], equal_nan=True) for k in one)
    assert not np.array_equal(one["x1"], other["x1"])
    # The same documents and truths, whatever the model says of them.
    assert np.array_equal(one["truth"], Simulation(surrogate="coin").draw(4)["truth"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 0}, "Simulation.n must be >= 1, got 0"),
        ({"gold": 0}, "Simulation.gold must be from 1 to 2000, the number of documents, got 0"),
        ({"gold": 2001}, "Simulation.gold must be from 1 to 2000"),
        ({"design": "half"}, "Simulation.design must be equal or unequal, got 'half'"),
        ({"surrogate": "good"}, "Simulation.surrogate must be differential, coin, or a share"),
        ({"surrogate": 1.5}, "Simulation.surrogate must be differential, coin, or a share"),
        ({"accuracy": 0.4}, r"Simulation.accuracy must be in \(0.5, 1\]"),
        ({"accuracy": 0.8, "surrogate": "coin"}, "Simulation.accuracy must be .* for the differential surrogate alone"),
        ({"beta": (1.0, 2.0, float("nan"))}, "Simulation.beta must be three finite numbers"),
    ],
)
def test_what_cannot_be_drawn(fields, said):
    with pytest.raises(UserError, match=said):
        Simulation(**fields)
