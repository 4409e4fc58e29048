"""Drawing the documents that an expert labels, and documents as parts of larger units."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pd = pytest.importorskip("pandas")
pytest.importorskip("formulaic")

from locum.errors import UserError  # noqa: E402
from locum.infer import DSL, by_unit, draw_labels  # noqa: E402


def documents(n=400, seed=0):
    r = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": np.arange(n),
            "party": r.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]),
            "unsure": r.random(n) ** 2 + 0.01,
        }
    )


def shares(data, count, draws, **how):
    """How often each row is drawn."""
    return np.mean([draw_labels(data, count, seed=s, **how)["labelled"] for s in range(draws)], axis=0)


@pytest.mark.parametrize("how", [{}, {"strata": "party"}, {"strata": "party", "equal": True}, {"size": "unsure"}])
@pytest.mark.parametrize("count", [1, 30, 137, 400])
def test_as_many_are_drawn_as_are_wanted(how, count):
    if "strata" in how and count < 3:
        return
    data = documents()
    drawn = draw_labels(data, count, **how)
    assert drawn["labelled"].sum() == count
    assert drawn["prob"].sum() == pytest.approx(count)
    assert ((drawn["prob"] > 0) & (drawn["prob"] <= 1)).all()
    assert list(drawn.columns) == [*data.columns, "prob", "labelled"]
    assert set(drawn["labelled"]) <= {0, 1}
    assert "prob" not in data


@pytest.mark.parametrize("how", [{}, {"strata": "party"}, {"strata": "party", "equal": True}, {"size": "unsure"}])
def test_rows_are_drawn_as_often_as_they_say(how):
    data = documents(60)
    prob = draw_labels(data, 20, **how)["prob"].to_numpy()
    seen = shares(data, 20, 600, **how)
    assert np.abs(seen - prob).max() < 4.5 * np.sqrt(0.25 / 600)
    z = (seen - prob)[prob < 1] / np.sqrt((prob * (1 - prob))[prob < 1] / 600)
    assert np.mean(z**2) < 1.6  # as it should be on average, 1 at most


def test_strata():
    data = documents()
    counts = data["party"].value_counts()
    drawn = draw_labels(data, 60, strata="party")
    by = drawn.groupby("party")
    assert ((by["labelled"].sum() - 60 * counts / 400).abs() < 1).all()
    assert by["prob"].first().to_dict() == pytest.approx((by["labelled"].sum() / counts).to_dict())
    assert draw_labels(data, 60, strata="party", equal=True).groupby("party")["labelled"].sum().to_dict() == {
        "a": 20,
        "b": 20,
        "c": 20,
    }
    few = draw_labels(data, 3 * 60, strata="party", equal=True).groupby("party")["labelled"].sum()
    assert few["c"] == counts["c"] < 60  # all that there are, and the rest shared out
    assert few.sum() == 180
    gaps = data.assign(party=data["party"].where(data["party"] != "c"))  # missing is a stratum too
    assert draw_labels(gaps, 40, strata="party")["labelled"].sum() == 40


def test_sizes_have_a_floor():
    data = pd.DataFrame({"unsure": [1.0] * 50 + [0.0] * 50})
    drawn = draw_labels(data, 20, size="unsure", floor=0.25)
    assert drawn["prob"].to_numpy() == pytest.approx([0.35] * 50 + [0.05] * 50)
    more = draw_labels(data, 80, size="unsure", floor=0.25)  # more than those of a size > 0
    assert more["prob"].to_numpy() == pytest.approx([1.0] * 50 + [0.6] * 50)
    assert more["labelled"].sum() == 80
    huge = draw_labels(pd.DataFrame({"unsure": [1e9, 1, 1, 1]}), 2, size="unsure")
    assert huge["prob"].to_numpy() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert huge["labelled"].iloc[0] == 1


@settings(max_examples=20)
@given(
    sizes=st.lists(st.floats(0, 1e6), min_size=2, max_size=30).filter(lambda v: sum(v) > 1e-3),
    share=st.floats(0.05, 1),
    floor=st.floats(0.01, 1),
)
def test_any_sizes(sizes, share, floor):
    count = max(1, int(share * len(sizes)))
    drawn = draw_labels({"s": sizes}, count, size="s", floor=floor)
    prob = drawn["prob"].to_numpy()
    assert drawn["labelled"].sum() == count
    assert prob.sum() == pytest.approx(count)
    assert (prob >= floor * count / len(sizes) - 1e-9).all()
    assert (prob <= 1).all()
    assert (np.diff(prob[np.argsort(sizes, kind="stable")]) >= -1e-9).all()  # larger ones are not less likely


def test_seeds():
    data = documents()
    assert draw_labels(data, 50).equals(draw_labels(data, 50))
    assert not draw_labels(data, 50).equals(draw_labels(data, 50, seed=1))


def test_what_is_drawn_can_be_fitted():
    r = np.random.default_rng(0)
    data = documents(1000).assign(x=r.normal(size=1000), truth=lambda t: t["x"] + r.normal(size=1000))
    data["llm"] = data["truth"] + data["unsure"] * r.normal(size=1000)
    for how in ({}, {"strata": "party"}, {"size": "unsure"}):
        drawn = draw_labels(data, 150, **how)
        drawn["y"] = drawn["truth"].where(drawn["labelled"] == 1)
        found = DSL(learner="identity").fit(drawn, "y ~ x", {"y": "llm"}, prob="prob", labelled="labelled")
        assert abs(found.params["x"] - 1) < 4 * found.bse["x"]
        assert found.check()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"count": 0}, "count must be from 1 to 400, the number of rows, got 0"),
        ({"count": 401}, "count must be from 1 to 400"),
        ({"strata": "party", "size": "unsure"}, "give strata or size, not both: party and unsure"),
        ({"equal": True}, "say which column they are"),
        ({"strata": "partei"}, "unknown column 'partei': did you mean 'party'"),
        ({"size": "party"}, "the column party must hold numbers"),
        ({"size": "bad"}, "the column bad must hold numbers >= 0, and does not in rows 7$"),
        ({"size": "gaps"}, "the column gaps must hold numbers >= 0, and does not in rows 3, 9$"),
        ({"size": "nothing"}, "the column nothing must not be 0 in all rows"),
        ({"floor": 0.0, "size": "unsure"}, r"floor must be in \(0, 1\], got 0"),
        ({"count": 2, "strata": "party"}, "2 labels are too few for 3 strata"),
    ],
)
def test_bad_draws(how, said):
    data = documents().assign(nothing=0.0, bad=1.0, gaps=1.0)
    data.loc[7, "bad"], data.loc[[3, 9], "gaps"] = -1.0, np.nan
    with pytest.raises(UserError, match=said):
        draw_labels(data, **({"count": 30} | how))


def test_a_drawn_table_is_not_drawn_from_again():
    with pytest.raises(UserError, match="has a column prob already"):
        draw_labels(draw_labels(documents(), 30), 30)


# units


def authors():
    return pd.DataFrame(
        {
            "author": ["ann", "bob", "ann", "cy", "ann", "bob"],
            "y": [1.0, np.nan, 0.0, np.nan, np.nan, 1.0],
            "llm": [1, 0, 1, 1, 0, 0],
            "p": [0.5, 0.2, 0.5, 0.1, 0.5, 1.0],
            "age": [40, 50, 40, 60, 40, 50],
        }
    )


def test_units():
    out = by_unit(authors(), "author", {"y": "llm"}, "p", keep=["age"])
    assert out["author"].tolist() == ["ann", "bob", "cy"]
    assert out["y"].tolist()[:2] == [0.5, 1.0]
    assert np.isnan(out["y"][2])
    assert out["llm"].tolist() == pytest.approx([2 / 3, 0, 1])
    assert out["prob"].tolist() == pytest.approx([1 - 0.5**3, 1.0, 0.1])
    assert out["age"].tolist() == [40, 50, 60]


def test_units_of_rows_drawn_alike():
    out = by_unit(authors(), "author", {"y": ["llm", "age"]})
    assert out["prob"].tolist() == pytest.approx([1 - 0.5**3, 1 - 0.5**2, 0.5])
    assert list(out.columns) == ["author", "y", "llm", "age", "prob"]


def test_units_have_the_probability_that_one_of_their_rows_is_drawn():
    r = np.random.default_rng(0)
    rows = pd.DataFrame({"u": np.repeat(np.arange(5), [1, 2, 3, 5, 9]), "p": r.uniform(0.05, 0.4, 20), "llm": 0.0})
    prob = by_unit(rows.assign(y=np.nan), "u", {"y": "llm"}, "p")["prob"].to_numpy()
    drawn = r.random((4000, 20)) < rows["p"].to_numpy()
    seen = np.array([drawn[:, rows["u"] == u].any(1).mean() for u in range(5)])
    assert np.abs(seen - prob).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"unit": "autor"}, "unknown column 'autor': did you mean 'author'"),
        ({"predicted": {"y": "text"}}, "the column text must hold numbers, for each unit gets one number of its rows"),
        ({"prob": "zero"}, r"sampling probabilities must be in \(0, 1\]: zero has 0 in rows 2"),
        ({"prob": "text"}, "the column text must hold numbers"),
        ({"keep": ["llm"]}, "the column llm must be the same in all rows of one author: it is not in ann"),
    ],
)
def test_bad_units(how, said):
    data = authors().assign(text="t", zero=[1, 1, 0, 1, 1, 1])
    with pytest.raises(UserError, match=said):
        by_unit(data, **({"unit": "author", "predicted": {"y": "llm"}, "prob": "p"} | how))
