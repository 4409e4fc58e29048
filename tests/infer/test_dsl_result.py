"""What a result can be asked: its table, comparisons, means, what more labels would bring, and its file."""

import json

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
sm = pytest.importorskip("statsmodels.api")
pytest.importorskip("formulaic")
from scipy import stats  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import DSL, Forest, Generalized, Result  # noqa: E402
from locum.infer.estimates import alike  # noqa: E402

N = 1200
NAN = float("nan")


def table(seed=0, n=N, share=0.25, noise=0.1):
    r = np.random.default_rng(seed)
    x, z = r.normal(size=n), (r.random(n) < 0.5).astype(float)
    truth = (r.random(n) < 1 / (1 + np.exp(0.5 - 0.8 * x - 0.6 * z))).astype(float)
    llm = np.where(r.random(n) < noise, 1 - truth, truth)
    drawn = r.random(n) < share
    return pd.DataFrame(
        {"x": x, "z": z, "truth": truth, "y": np.where(drawn, truth, NAN), "llm": llm, "author": r.integers(0, 200, n)}
    )


@pytest.fixture(scope="module")
def data():
    return table()


@pytest.fixture(scope="module")
def result(data):
    return DSL("logistic", "generalized", splits=3).fit(data, "y ~ x + z", {"y": "llm"}, prob=0.25)


def test_it_reads_like_statsmodels(result, data):
    assert isinstance(result, Result)
    assert list(result.params.index) == ["Intercept", "x", "z"]
    V = result.cov_params()
    assert result.bse.to_numpy() == pytest.approx(np.sqrt(np.diag(V)))
    z = result.params / result.bse
    assert result.tvalues.to_numpy() == pytest.approx(z.to_numpy())
    assert result.pvalues.to_numpy() == pytest.approx(2 * stats.norm.sf(np.abs(z)))
    for alpha in (None, 0.05, 0.1):
        reach = stats.norm.isf((alpha or 0.05) / 2) * result.bse
        limits = result.conf_int() if alpha is None else result.conf_int(alpha)
        assert limits.to_numpy() == pytest.approx(
            np.column_stack([result.params - reach, result.params + reach]), abs=1e-12
        )
    assert result.estimate.equals(result.params)
    assert (result.nobs, result.ngold) == (N, data["y"].notna().sum())
    assert result.cost.seconds > 0
    assert "gold labels of 1200 rows" in repr(result)
    wide = DSL("logistic", "generalized", splits=3, alpha=0.5).fit(data, "y ~ x + z", {"y": "llm"}, prob=0.25)
    assert (np.diff(wide.conf_int()) < np.diff(result.conf_int())).all()


def test_with_all_labels_its_figures_are_those_of_statsmodels(data):
    found = DSL("logistic", "identity").fit(data.assign(y=data["truth"]), "y ~ x + z", {"y": "llm"}, prob=1.0)
    other = sm.Logit(data["truth"], sm.add_constant(data[["x", "z"]])).fit(disp=0, cov_type="HC0", tol=1e-14)
    for name in ("params", "bse", "tvalues", "pvalues"):
        assert getattr(found, name).to_numpy() == pytest.approx(getattr(other, name).to_numpy(), abs=1e-8)
    assert found.conf_int(0.1).to_numpy() == pytest.approx(other.conf_int(0.1).to_numpy(), abs=1e-8)
    assert found.predict().to_numpy() == pytest.approx(other.predict(), abs=1e-8)
    rows = data[["x", "z"]][:50]
    frame = other.get_prediction(sm.add_constant(rows)).summary_frame(alpha=0.1)
    mine = found.predict(rows, alpha=0.1)
    assert mine["mean"].to_numpy() == pytest.approx(frame["predicted"].to_numpy(), abs=1e-8)
    se = (mine["upper"] - mine["lower"]) / 2 / stats.norm.isf(0.05)
    assert se.to_numpy() == pytest.approx(frame["se"].to_numpy(), abs=1e-6)


def test_summary(result):
    text = str(result.summary())
    for part in ("Logistic", "DSL", "robust (HC0)", "1,200", "Intercept", "x", "gold only", "surrogate only"):
        assert part in text, part
    assert f"{result.params['x']:.4f}" in text
    assert f"{result.conf_int().loc['x', 'lower']:.3f}" in text
    assert "[0.025" in text
    assert "[0.05" in str(result.summary(alpha=0.1))
    assert "tabular" in result.summary().as_latex()
    assert "<table" in result.summary().as_html()
    assert "Intercept" in result.summary().as_csv()
    assert "gold rows look" in " ".join(text.split())


def test_summary_tells_what_was_done(data):
    holes = data.assign(x=data["x"].mask(data.index < 7))
    with pytest.warns(
        UserWarning, match=r"7 of 1200 rows are left out for missing values in x \(7\): rows 0, 1, 2, 3, 4 and 2 more"
    ):
        found = DSL("logistic", Generalized(), splits=1).fit(holes, "y ~ x", {"y": "llm"}, cluster="author")
    text = " ".join(str(found.summary()).split())
    assert "7 of 1200 rows are left out for missing values in x (7)" in text
    assert "clustered" in text
    assert found.nobs == N - 7


def test_a_summary_of_what_failed(data):
    rare = data.assign(g=np.where(data["y"].isna() & (data["x"] > 1.5), "b", "a"))  # no gold label in b
    found = DSL("linear", "identity").fit(rare, "y ~ x + g", {"y": "llm"}, prob=0.25)
    assert "cannot be told apart" in found.baselines()["gold only"].failed
    assert "gold only" in str(found.summary())
    told = found.to_dict()
    assert "failed" in told["baselines"]["gold only"]
    assert found.check().figures["labels_worth"] is None
    assert np.isnan(found.compare()[("gold only", "coef")]).all()


def test_compare(result):
    table = result.compare()
    assert list(table.columns.get_level_values(0).unique()) == ["dsl", *result.baselines()]
    assert table[("dsl", "coef")].equals(result.params.rename(("dsl", "coef")))
    for name, e in result.baselines().items():
        assert table[(name, "coef")].to_numpy() == pytest.approx(e.theta)
        assert table[(name, "std err")].to_numpy() == pytest.approx(e.se)


def test_baselines_are_what_they_say(result, data):
    X = sm.add_constant(data[["x", "z"]])
    naive = sm.Logit(data["llm"], X).fit(disp=0, cov_type="HC0", tol=1e-14)
    assert result.baselines()["surrogate only"].theta == pytest.approx(naive.params.to_numpy(), abs=1e-8)
    assert result.baselines()["surrogate only"].se == pytest.approx(naive.bse.to_numpy(), abs=1e-8)
    gold = data["y"].notna()
    alone = sm.Logit(data["y"][gold], X[gold]).fit(disp=0, cov_type="HC0", tol=1e-14)
    assert result.baselines()["gold only"].theta == pytest.approx(alone.params.to_numpy(), abs=1e-8)
    assert result.baselines()["gold only"].se == pytest.approx(alone.bse.to_numpy(), abs=1e-8)


def test_predict(result, data):
    mean = result.predict()
    assert mean.to_numpy() == pytest.approx(
        1 / (1 + np.exp(-sm.add_constant(data[["x", "z"]]).to_numpy() @ result.params.to_numpy()))
    )
    rows = pd.DataFrame({"x": [0.0, 1.0, NAN], "z": [1, 0, 1]}, index=["a", "b", "c"])
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        two = result.predict(rows, alpha=0.05)
    assert list(two.index) == ["a", "b"]
    assert (two["lower"] < two["mean"]).all()
    assert (two["mean"] < two["upper"]).all()
    with pytest.raises(UserError, match="unknown column 'z'"):
        result.predict({"x": [1.0]})
    with pytest.raises(UserError, match=r"alpha must be in \(0, 1\), got 2"):
        result.predict(alpha=2)


def test_predict_codes_rows_as_the_data_were(data):
    coded = data.assign(g=np.resize(["a", "b", "c"], N))
    found = DSL("linear", "identity").fit(coded, "y ~ scale(x) + C(g)", {"y": "llm"}, prob=0.25)
    some = coded.iloc[[3, 4]]  # these alone have another mean, and lack a level
    assert found.predict(some).to_numpy() == pytest.approx(found.predict().to_numpy()[[3, 4]])
    with pytest.raises(UserError, match="cannot be evaluated"):
        found.predict({"x": [0.0], "g": ["new"]})


def test_predict_of_classes_and_of_predicted_columns(data):
    text = data.assign(y=data["y"].map({0: "no", 1: "yes"}), llm=data["llm"].map({0: "no", 1: "yes"}))
    found = DSL("multinomial", "identity").fit(text, "y ~ x", {"y": "llm"}, prob=0.25)
    mean = found.predict()
    assert list(mean.columns) == ["no", "yes"]
    assert mean.to_numpy().sum(1) == pytest.approx(1)
    two = DSL("logistic", "identity").fit(data, "y ~ x", {"y": "llm"}, prob=0.25)
    assert mean["yes"].to_numpy() == pytest.approx(two.predict().to_numpy(), abs=1e-8)
    column = DSL("linear", "identity").fit(data, "x ~ y + z", {"y": "llm"}, prob=0.25)
    with pytest.raises(UserError, match="explanatory variables are predicted here: give a table"):
        column.predict()
    assert len(column.predict({"y": [0, 1], "z": [1, 1]})) == 2
    within = DSL("linear", "identity").fit(data, "y ~ x", {"y": "llm"}, prob=0.25, fixed_effects=["z"])
    with pytest.raises(UserError, match="with fixed effects means cannot be predicted"):
        within.predict()


# power


@pytest.mark.parametrize("how", [{}, {"cluster": "author"}, {"fixed_effects": ["z"]}])
@pytest.mark.parametrize("splits", [1, 4])
def test_power_at_the_present_number_is_the_present_error(data, how, splits):
    moment = "linear" if "fixed_effects" in how else "logistic"
    found = DSL(moment, "generalized", splits=splits).fit(data, "y ~ x", {"y": "llm"}, prob=0.25, **how)
    assert found.power([found.ngold]).to_numpy()[0] == pytest.approx(found.bse.to_numpy(), rel=1e-9)


def test_power_shrinks_as_it_should(result):
    table = result.power()
    assert table.index.name == "gold labels"
    assert table.index[-1] <= N
    assert (np.diff(table.to_numpy(), axis=0) < 0).all()
    n = result.ngold
    more = result.power([n, 2 * n, N]).to_numpy()
    assert (more[0] / more[1] <= 2**0.5 + 1e-9).all()  # never faster than by the root
    assert (more[0] / more[2] <= (N / n) ** 0.5 + 1e-9).all()


def test_power_by_hand():
    """One split, a mean: Omega_1 = mean of (R / pi^2) (y - g)^2, the rest stays."""
    data = table(3, 400)
    found = DSL("linear", "identity").fit(data, "y ~ 1", {"y": "llm"}, prob=0.25)
    y, g, R = data["truth"].to_numpy(), data["llm"].to_numpy(), data["y"].notna().to_numpy()
    first = (R / 0.25**2 * (y - g) ** 2).mean()
    pseudo = g + R / 0.25 * (y - g)
    whole = ((pseudo - pseudo.mean()) ** 2).mean()
    expected = np.sqrt((first / 2 + whole - first) / 400)
    assert found.power([2 * found.ngold])["Intercept"].iloc[0] == pytest.approx(expected, rel=1e-9)


def drawn_unequally(seed, factor):
    """As `table`, its gold labels drawn with probabilities that differ, `factor` times as large but at most 1."""
    data = table(seed, 3000, share=1.0)
    prob = np.minimum(factor * np.where(data["x"] > 0, 0.3, 0.05), 1.0)
    labelled = np.random.default_rng(1000 + seed).random(3000) < prob
    return data.assign(y=data["y"].where(labelled), p=prob)


@pytest.mark.parametrize("factor", [2.0, 6.0, 20.0])
def test_probabilities_that_grow_stop_at_one(factor):
    few, many = [], []
    for seed in range(30):
        found = DSL("linear", "identity").fit(drawn_unequally(seed, 1.0), "y ~ x", {"y": "llm"}, prob="p")
        after = drawn_unequally(seed, factor)
        labels = min(round(found.ngold * after["p"].sum() / found.method.probabilities(found.problem).sum()), 3000)
        few.append(found.power([labels])["x"].iloc[0])
        many.append(DSL("linear", "identity").fit(after, "y ~ x", {"y": "llm"}, prob="p").bse["x"])
    assert np.mean(few) == pytest.approx(np.mean(many), rel=0.05)


def test_many_probabilities_are_grouped():
    prob = np.random.default_rng(0).uniform(0.1, 1, 1000)
    values, codes = alike(prob)
    assert len(values) == 50
    assert np.bincount(codes).tolist() == [20] * 50
    assert values[codes] == pytest.approx(prob, abs=0.03)
    assert (np.diff(values) > 0).all()
    few, codes = alike(np.array([0.5, 0.1, 0.5]))
    assert (few.tolist(), codes.tolist()) == ([0.1, 0.5], [1, 0, 1])


def test_power_foretells_the_error_of_a_larger_sample():
    few, many = [], []
    for seed in range(30):
        data = table(seed, 3000, share=0.1)
        how = {"formula": "y ~ x", "predicted": {"y": "llm"}}
        found = DSL("linear", "identity").fit(data, **how)
        few.append(found.power([4 * found.ngold])["x"].iloc[0])
        many.append(DSL("linear", "identity").fit(table(seed, 3000, share=0.4), **how).bse["x"])
    assert np.mean(few) == pytest.approx(np.mean(many), rel=0.05)


def test_labels_needed(result):
    n = result.ngold
    target = result.power([2 * n])["x"].iloc[0]
    count = result.labels_needed("x", se=target)
    assert abs(count - 2 * n) <= 1
    table = result.power([count - 1, count])["x"]
    assert table.iloc[1] <= target < table.iloc[0]
    assert result.labels_needed("x", se=1e-6) is None
    assert result.labels_needed("x", se=10.0) == 1
    effect = result.labels_needed("x", effect=(1.959964 + 0.841621) * target)
    assert abs(effect - count) <= 1
    assert result.labels_needed("x", effect=-(1.959964 + 0.841621) * target) == effect


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda r: r.power([0]), "the number of gold labels must be from 1 to 1200, the number of rows, got 0"),
        (lambda r: r.power([1201]), "from 1 to 1200, the number of rows, got 1201"),
        (lambda r: r.labels_needed("X", se=1), "unknown coefficient 'X': did you mean 'x'"),
        (lambda r: r.labels_needed("x"), "one of the two"),
        (lambda r: r.labels_needed("x", se=1, effect=1), "one of the two"),
        (lambda r: r.labels_needed("x", se=0.0), "the standard error must be > 0, got 0"),
        (lambda r: r.labels_needed("x", effect=0.0), "the effect must not be 0"),
        (lambda r: r.labels_needed("x", effect=1, power=1.5), r"power must be in \(0, 1\), got 1.5"),
        (lambda r: r.conf_int(0), r"alpha must be in \(0, 1\), got 0"),
        (lambda r: r.summary(alpha=1), r"alpha must be in \(0, 1\), got 1"),
    ],
)
def test_bad_questions(result, call, said):
    with pytest.raises(UserError, match=said):
        call(result)


def test_check_tells_what_predictions_are_worth(data):
    good = DSL("logistic", "generalized", splits=1).fit(data, "y ~ x + z", {"y": "llm"}, prob=0.25).check()
    coin = data.assign(llm=np.random.default_rng(0).integers(0, 2, N))
    poor = DSL("logistic", "generalized", splits=1).fit(coin, "y ~ x + z", {"y": "llm"}, prob=0.25).check()
    assert good.figures["accuracy y"] == pytest.approx(0.9, abs=0.05)
    assert poor.figures["accuracy y"] == pytest.approx(0.5, abs=0.08)
    assert good.figures["labels_worth"] > 1.5 > 1.2 > poor.figures["labels_worth"]
    assert good.figures["explained y"] > 0.4 > poor.figures["explained y"]
    assert f"does the work of {good.figures['labels_worth']:.2f}" in good.text


def test_save(result, tmp_path):
    result.save(tmp_path / "result.json")
    told = json.loads((tmp_path / "result.json").read_text())
    assert told == json.loads(json.dumps(result.to_dict()))
    assert told["params"] == pytest.approx(result.params.to_dict())
    assert told["bse"] == pytest.approx(result.bse.to_dict())
    assert np.array(told["cov_params"]) == pytest.approx(result.cov_params().to_numpy())
    assert told["conf_int"]["x"] == pytest.approx(result.conf_int().loc["x"].tolist())
    assert (told["nobs"], told["ngold"]) == (N, result.ngold)
    assert set(told["baselines"]) == {"surrogate only", "gold only", "predictions only", "weighting only"}
    assert told["check"]["passed"] is True
    result.save(str(tmp_path / "other.json"))


def test_the_forest_is_of_use(data):
    """Where errors hang together with x in no linear way, trees find them and a line does not."""
    r = np.random.default_rng(0)
    bent = table(5, 4000)
    bent["llm"] = np.where(np.abs(bent["x"]) < 0.7, 1 - bent["truth"], bent["truth"])
    bent["llm"] = np.where(r.random(4000) < 0.05, 1 - bent["llm"], bent["llm"])
    errors = {
        learner: DSL("logistic", Forest(50) if learner == "forest" else learner, splits=1)
        .fit(bent, "y ~ x + z", {"y": "llm"}, prob=0.25)
        .bse["x"]
        for learner in ("forest", "generalized")
    }
    assert errors["forest"] < 0.85 * errors["generalized"]


def test_a_summary_says_when_nothing_was_fitted(data):
    found = DSL("logistic", "identity").fit(data, "y ~ x", {"y": "llm"})
    assert "none fitted" in str(found.summary())
    assert found.cost.counts["fitted predictors"] == 0


def test_a_check_of_estimated_probabilities_says_that_it_is_weak(data):
    how = {"formula": "y ~ x", "predicted": {"y": "llm"}}
    known, estimated = (DSL("logistic", "identity").fit(data, **how, prob=p).check().text for p in (None, "estimate"))
    assert "says little" in estimated
    assert "says little" not in known
