"""Design-based supervised learning: exact properties (arXiv 2306.04746), hand numbers, and what goes in by any door."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pd = pytest.importorskip("pandas")
sm = pytest.importorskip("statsmodels.api")
pytest.importorskip("formulaic")
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier  # noqa: E402
from sklearn.linear_model import LinearRegression, LogisticRegression  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import DSL, Forest, Generalized, Linear, Logistic, Moment  # noqa: E402
from locum.infer.base import Columns  # noqa: E402
from locum.infer.dsl import fold_of, pseudo_outcome  # noqa: E402
from locum.infer.equations import Mixed, solve  # noqa: E402
from locum.infer.estimates import Estimates, combined  # noqa: E402
from locum.infer.learners import Fold, Learner  # noqa: E402
from locum.infer.problem import design_test, from_arrays  # noqa: E402

N = 300
KINDS = ("linear", "logistic", "poisson", "multinomial")
NAN = float("nan")


def table(kind="linear", seed=0, n=N, share=0.3, poison=NAN):
    """Rows with a surrogate, of which some have a gold label; `truth` is what the expert would say of all."""
    r = np.random.default_rng(seed)
    x, z = r.normal(size=n), (r.random(n) < 0.4).astype(float)
    eta = -0.3 + 0.6 * x + 0.5 * z
    if kind == "linear":
        truth = eta + r.normal(size=n)
        surrogate = truth + r.normal(size=n) * 0.5 + 0.3 * z
    elif kind == "poisson":
        truth = r.poisson(np.exp(eta)).astype(float)
        surrogate = truth + r.poisson(0.3 + 0.2 * z)
    elif kind == "logistic":
        truth = (r.random(n) < 1 / (1 + np.exp(-eta))).astype(float)
        surrogate = np.where(r.random(n) < 0.1 + 0.1 * z, 1 - truth, truth)
    else:
        truth = np.array(["bad", "fair", "good"])[(eta[:, None] * [0, 1, 2] + r.gumbel(size=(n, 3))).argmax(1)]
        surrogate = np.where(r.random(n) < 0.2, r.permutation(truth), truth)
    prob = share * np.where(z > 0, 1.4, 0.7)
    drawn = r.random(n) < prob
    y = np.where(drawn, truth, None) if kind == "multinomial" else np.where(drawn, truth, poison)
    return pd.DataFrame(
        {"x": x, "z": z, "y": y, "llm": surrogate, "prob": prob, "drawn": drawn.astype(int), "truth": truth}
    )


def arrays(data, moment="linear", learner="identity", prob="prob", **how):
    """A table as arrays: the outcome alone is predicted."""
    X = np.column_stack([np.ones(len(data)), data["x"], data["z"]])
    dsl = DSL(moment, learner, splits=1)
    p = data[prob].to_numpy() if isinstance(prob, str) else prob
    return dsl, from_arrays(
        dsl.estimand,
        {"y": data["y"].to_numpy(), "X": X},
        {"y": data["llm"].to_numpy()},
        p,
        None,
        how.get("features", X[:, 1:]),
        how.get("clusters"),
        lambda columns: columns,
        (),
    )


def fit(kind, data, formula="y ~ x + z", predicted=None, prob="prob", learner="generalized", splits=1, seed=0, **how):
    dsl = DSL(moment=kind, learner=learner, splits=splits, seed=seed)
    return dsl.fit(data, formula, predicted or {"y": "llm"}, prob=prob, **how)


def peer(kind, data, **how):
    """The regression that a gold label for every row would have given, from statsmodels."""
    X = sm.add_constant(data[["x", "z"]].to_numpy())
    if kind == "linear":
        return sm.OLS(data["truth"].to_numpy(), X).fit(**how)
    model = {"logistic": sm.Logit, "poisson": sm.Poisson, "multinomial": sm.MNLogit}[kind]
    y = pd.Categorical(data["truth"]).codes if kind == "multinomial" else data["truth"].to_numpy()
    return model(y, X).fit(disp=0, method="newton", tol=1e-14, **how)


def same(one, other, within=1e-8):
    assert one.theta == pytest.approx(other.theta, abs=within)
    assert pytest.approx(other.V, abs=within) == one.V


# 1, 2: all labelled, or predictions that are right


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_labelled_is_the_usual_regression(kind):
    data = table(kind)
    data["y"] = data["truth"]
    data["llm"] = np.random.default_rng(1).permutation(data["llm"])  # any predictions
    found = fit(kind, data, prob=1.0)
    assert found.params.to_numpy() == pytest.approx(np.ravel(peer(kind, data).params, order="F"), abs=1e-8)
    if kind != "multinomial":
        assert found.cov_params().to_numpy() == pytest.approx(peer(kind, data, cov_type="HC0").cov_params(), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_right_predictions_are_the_usual_regression(kind):
    data = table(kind)
    data["llm"] = data["truth"]
    found = fit(kind, data, learner="identity")
    assert found.params.to_numpy() == pytest.approx(np.ravel(peer(kind, data).params, order="F"), abs=1e-8)
    if kind != "multinomial":
        assert found.cov_params().to_numpy() == pytest.approx(peer(kind, data, cov_type="HC0").cov_params(), abs=1e-8)
    same(found.fit.dsl, found.baselines()["surrogate only"])


@pytest.mark.parametrize("kind", ["linear", "logistic", "poisson"])
def test_predictions_of_zero_are_weighting_alone(kind):
    data = table(kind)
    data["llm"] = 0.0
    found = fit(kind, data, learner="identity")
    same(found.fit.dsl, found.baselines()["weighting only"], 1e-12)
    y = np.where(data["drawn"] == 1, data["truth"] / data["prob"], 0.0)
    X = sm.add_constant(data[["x", "z"]].to_numpy())
    if kind == "linear":
        assert found.params.to_numpy() == pytest.approx(np.linalg.lstsq(X, y, rcond=None)[0], abs=1e-10)


def test_gold_alone_is_weighted():
    data = table("logistic")
    gold = data[data["drawn"] == 1]
    X = sm.add_constant(gold[["x", "z"]].to_numpy())
    glm = sm.GLM(gold["truth"].to_numpy(), X, sm.families.Binomial(), var_weights=1 / gold["prob"].to_numpy())
    other = glm.fit(tol=1e-14, maxiter=200, cov_type="HC0")
    found = fit("logistic", data).baselines()["gold only"]
    assert found.theta == pytest.approx(other.params, abs=1e-8)
    assert pytest.approx(other.cov_params(), abs=1e-8) == found.V


# 3, 5, 6: the mean


def test_hand_case():
    """arXiv 2306.04746, eq. 1 with g = (.2, .8, .5, .1), R = (1, 0, 1, 0), pi = .5, Y = (1, -, 0, -)."""
    g, y = np.array([0.2, 0.8, 0.5, 0.1]), np.array([1, NAN, 0, NAN])
    drawn, prob = np.array([True, False, True, False]), np.full(4, 0.5)
    assert pseudo_outcome(g, y, drawn, prob) == pytest.approx([1.8, 0.8, -0.5, 0.1], abs=1e-12)
    dsl = DSL(learner="identity")
    problem = from_arrays(
        Linear(), {"y": y, "X": np.ones((4, 1))}, {"y": g}, 0.5, None, None, None, lambda columns: columns, ()
    )
    found = dsl.estimate(problem).dsl
    assert found.theta == pytest.approx([0.55], abs=1e-6)
    assert found.V.item() == pytest.approx(0.183125, abs=1e-6)
    assert found.se == pytest.approx([0.427931], abs=1e-6)
    result = dsl.run(problem, "mean")  # four rows will do where nothing is fitted
    assert result.params["theta 0"] == pytest.approx(0.55)
    assert result.pvalues["theta 0"] == pytest.approx(0.19871, abs=1e-5)  # two-sided: z = 1.28525


def test_equal_probabilities_are_the_prediction_powered_mean():
    data = table("logistic")
    gold = data["drawn"] == 1
    found = fit("logistic", data, "y ~ 1", prob=None, learner="identity")
    mean = data["llm"].mean() + (data["truth"] - data["llm"])[gold].mean()
    assert 1 / (1 + np.exp(-found.params["Intercept"])) == pytest.approx(mean, abs=1e-10)
    found = fit("linear", data, "y ~ 1", prob=None, learner="identity")
    assert found.params["Intercept"] == pytest.approx(mean, abs=1e-12)
    ppi = pytest.importorskip("ppi_py")
    y, q = data[gold]["truth"].to_numpy(), data["llm"].to_numpy()
    other = ppi.ppi_mean_pointestimate(y, q[gold], q, lam=1)  # with the whole sample as unlabelled
    assert found.params["Intercept"] == pytest.approx(float(np.ravel(other)[0]), abs=1e-12)


def test_group_means_are_the_regression_on_their_indicators():
    data = table("linear").assign(g=lambda t: np.where(t["x"] > 0.4, "c", np.where(t["z"] > 0, "b", "a")))
    found = fit("linear", data, "y ~ 0 + C(g)", learner="identity")
    g, y, R = data["llm"].to_numpy(), data["truth"].to_numpy(), data["drawn"].to_numpy()
    pseudo = g + R / data["prob"].to_numpy() * (y - g)
    for level in "abc":
        part = pseudo[data["g"] == level]
        name = next(n for n in found.params.index if f"[{level}]" in n or f"[T.{level}]" in n)
        assert found.params[name] == pytest.approx(part.mean(), abs=1e-10)
        assert found.bse[name] == pytest.approx(part.std() / len(part) ** 0.5, abs=1e-10)
        alone = fit("linear", data[data["g"] == level], "y ~ 1", learner="identity")
        assert alone.params.iloc[0] == pytest.approx(found.params[name], abs=1e-10)
        assert alone.bse.iloc[0] == pytest.approx(found.bse[name], abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_general_form_is_the_regression_on_pseudo_outcomes(kind):
    data = table(kind)
    levels = ["bad", "fair", "good"]
    y, q = (
        (np.stack([data[c] == v for v in levels], 1) if kind == "multinomial" else data[c].to_numpy()).astype(float)
        for c in ("truth", "llm")
    )
    R, prob = data["drawn"].to_numpy(bool), data["prob"].to_numpy()
    if kind == "multinomial":
        pseudo = np.column_stack([pseudo_outcome(q[:, k], y[:, k], R, prob) for k in range(3)])
    else:
        pseudo = pseudo_outcome(q, y, R, prob)
    dsl = DSL(kind, "identity")
    X = np.column_stack([np.ones(N), data["x"], data["z"]])
    direct = solve(dsl.estimand, Mixed({"X": X, "y": pseudo}, np.ones(N), None, np.arange(0), np.zeros(0)))
    found = fit(kind, data, learner="identity").fit
    assert found.dsl.theta == pytest.approx(direct.theta, abs=1e-8)
    A = np.linalg.inv(direct.J)
    assert pytest.approx(A @ direct.scores.T @ direct.scores @ A.T / N**2, abs=1e-8) == found.dsl.V


# 4: every way in which labels could have been drawn


def designs(prob):
    for pattern in itertools.product([False, True], repeat=len(prob)):
        R = np.array(pattern)
        yield R, float(np.prod(np.where(R, prob, 1 - prob)))


SIX = np.random.default_rng(6)
SIX_X = np.column_stack([np.ones(6), SIX.normal(size=6)])
SIX_HAT = SIX_X + [0, 1] * SIX.normal(size=(6, 2))
SIX_Y, SIX_G, SIX_P = SIX.normal(size=6), SIX.normal(size=6), SIX.uniform(0.2, 0.9, 6)


def test_unbiased_over_all_designs():
    ols = np.linalg.pinv(SIX_X)
    mean = sum(chance * ols @ pseudo_outcome(SIX_G, SIX_Y, R, SIX_P) for R, chance in designs(SIX_P))
    assert mean == pytest.approx(ols @ SIX_Y, abs=1e-10)


def mixture(R):
    a = 1 - R / SIX_P
    at = np.flatnonzero(R)
    return Mixed({"X": SIX_HAT, "y": SIX_G}, a, {"X": SIX_X[at], "y": SIX_Y[at]}, at, 1 / SIX_P[at])


def test_unbiased_over_all_designs_through_the_solver():
    mean = np.zeros(2)
    for R, chance in designs(SIX_P):
        at = np.flatnonzero(R)
        gold = {"X": SIX_X[at], "y": SIX_Y[at]}
        m = Mixed({"X": SIX_X, "y": SIX_G}, 1 - R / SIX_P, gold, at, 1 / SIX_P[at])
        mean += chance * solve(Linear(), m).theta
    assert mean == pytest.approx(np.linalg.lstsq(SIX_X, SIX_Y, rcond=None)[0], abs=1e-10)


@pytest.mark.parametrize("moment", [Linear(), Logistic()])
def test_moments_and_jacobians_are_unbiased_with_predicted_columns(moment):
    """J and c apart: their quotient is not unbiased, they are. For any moment the same at any theta."""
    for theta in np.array([[0.0, 0.0], [0.4, -0.7]]):
        value = sum(chance * mixture(R).mean(moment, theta) for R, chance in designs(SIX_P))
        J = sum(chance * mixture(R).jacobian(moment, theta) for R, chance in designs(SIX_P))
        D = {"X": SIX_X, "y": SIX_Y}
        assert value == pytest.approx(moment.m(theta, D).mean(0), abs=1e-10)
        assert pytest.approx(moment.jac(theta, D, np.ones(6)) / 6, abs=1e-10) == J


def test_the_variance_of_weighting_is_that_of_the_design_and_the_rows():
    """Over all designs the mean of Omega is E[m m'] + E[(1 / pi - 1) (m - mhat)(m - mhat)']."""
    theta, D = np.array([0.2, 0.5]), {"X": SIX_X, "y": SIX_Y}
    found = np.zeros((2, 2))
    for R, chance in designs(SIX_P):
        s = mixture(R).scores(Linear(), theta)
        found += chance * s.T @ s / 6
    m, hat = Linear().m(theta, D), Linear().m(theta, {"X": SIX_HAT, "y": SIX_G})
    d = m - hat
    assert found == pytest.approx((m.T @ m + (d * (1 / SIX_P - 1)[:, None]).T @ d) / 6, abs=1e-10)


# 7: what must not matter


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS))
def test_the_order_of_rows_does_not_matter(seed, kind):
    data = table(kind)
    other = data.sample(frac=1, random_state=seed % 2**32)
    one, two = (fit(kind, t, learner="identity") for t in (data, other))
    same(one.fit.dsl, two.fit.dsl)
    for name, e in one.baselines().items():
        assert e.theta == pytest.approx(two.baselines()[name].theta, abs=1e-8, nan_ok=True)
    assert one.check().figures["design_chi2"] == pytest.approx(two.check().figures["design_chi2"], abs=1e-6)


@settings(max_examples=8)
@given(
    slope=st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3),
    shift=st.floats(-10, 10),
    kind=st.sampled_from(KINDS),
)
def test_recoding_a_column_recodes_its_coefficient(slope, shift, kind):
    data = table(kind)
    one = fit(kind, data, learner="identity").fit.dsl
    two = fit(kind, data.assign(x=slope * data["x"] + shift), learner="identity").fit.dsl
    back = np.array([[1, shift, 0], [0, slope, 0], [0, 0, 1.0]])  # old coefficients from new ones
    back = np.kron(np.eye(len(one.theta) // 3), back)
    assert back @ two.theta == pytest.approx(one.theta, rel=1e-6, abs=1e-7)
    assert back @ two.V @ back.T == pytest.approx(one.V, rel=1e-5, abs=1e-7)


@settings(max_examples=5)
@given(constant=st.floats(-100, 100))
def test_a_constant_added_to_predictions_changes_no_mean(constant):
    data = table("linear")
    one = fit("linear", data, "y ~ 1", prob=None, learner="identity").fit.dsl
    two = fit("linear", data.assign(llm=data["llm"] + constant), "y ~ 1", prob=None, learner="identity").fit.dsl
    assert two.theta == pytest.approx(one.theta, abs=1e-9)  # with pi = n / N the mean of R / pi is 1


# 8, 10: what is not known is not read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predicted", ["outcome", "column"])
def test_nothing_is_read_where_there_is_no_label(kind, predicted):
    data = table(kind)
    name, formula = ("y", "y ~ x + z") if predicted == "outcome" else ("w", "truth ~ x + w")
    if predicted == "column":
        data["w"] = np.where(data["drawn"] == 1, data["z"], NAN)
        data["llm_w"] = np.where(np.random.default_rng(0).random(N) < 0.1, 1 - data["z"], data["z"])
    found = fit(kind, data, formula, {name: "llm" if name == "y" else "llm_w"}, features=["z"] if name == "y" else [])
    assert np.isfinite(found.params).all()
    assert np.isfinite(found.cov_params().to_numpy()).all()
    for e in found.baselines().values():
        assert np.isfinite(e.theta).all() or e.failed
    assert not any(np.isnan(v).any() for v in found.fit.predictions.values())
    if kind == "multinomial":
        return
    # The same through arrays, where a trap sees whatever the moment is handed.
    seen = []

    class Trap(type(DSL(kind).estimand)):
        def m(self, theta, D):
            seen.extend(np.isnan(v).any() for v in D.values())
            return super().m(theta, D)

    X = np.column_stack([np.ones(N), data["x"], data["z"]])
    DSL(Trap(), "generalized", splits=1).fit_arrays(
        {"y": data["y"].to_numpy(), "X": X}, {"y": data["llm"].to_numpy()}, data["prob"].to_numpy()
    )
    assert seen
    assert not any(seen)


def test_a_label_where_none_was_drawn_is_refused():
    data = table("linear")
    data.loc[data["drawn"] == 0, "y"] = np.random.default_rng(0).permutation(data.loc[data["drawn"] == 0, "truth"])
    with pytest.raises(UserError, match="have a gold label in y although they were not sampled"):
        fit("linear", data, labelled="drawn")


# 9: clusters


@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_for_each_row_changes_nothing(kind):
    data = table(kind).assign(row=np.random.default_rng(0).permutation(N))
    same(fit(kind, data, learner="identity").fit.dsl, fit(kind, data, learner="identity", cluster="row").fit.dsl, 1e-12)


def test_clusters_against_statsmodels():
    data = table("logistic").assign(author=lambda t: np.random.default_rng(0).integers(0, 40, N).astype(str))
    data["y"] = data["truth"]
    how = {"groups": pd.factorize(data["author"])[0], "use_correction": False, "df_correction": False}
    other = peer("logistic", data, cov_type="cluster", cov_kwds=how)
    found = fit("logistic", data, prob=1.0, cluster="author")
    assert found.cov_params().to_numpy() == pytest.approx(other.cov_params(), abs=1e-8)


# Cross-fitting


@dataclass(frozen=True)
class Memory(Learner):
    """Knows the labels of the rows (by the feature in a column) that it was fitted on, and -99 of others."""

    column: int = 1

    def predict(self, fold: Fold) -> Any:
        known = dict(zip(fold.features[:, self.column], fold.labels, strict=True))
        return np.array([known.get(key, -99.0) for key in fold.asked[:, self.column]])


def test_no_row_is_predicted_from_its_own_label():
    data = table("linear").assign(id=np.arange(N) + 0.5)
    found = fit("linear", data, learner=Memory(3), splits=3, features=["id"])
    assert (found.fit.predictions["y"] == -99).all()


def test_no_row_is_predicted_from_its_cluster():
    data = table("linear").assign(author=np.random.default_rng(0).integers(0, 40, N) + 0.5)
    leaks = fit("linear", data, learner=Memory(3), features=["author"])
    assert (leaks.fit.predictions["y"] != -99).any()
    found = fit("linear", data, learner=Memory(3), splits=3, features=["author"], cluster="author")
    assert (found.fit.predictions["y"] == -99).all()


@pytest.mark.parametrize("clustered", [False, True])
def test_folds(clustered):
    clusters = np.random.default_rng(0).integers(0, 50, N) if clustered else None
    _, problem = arrays(table("linear"), clusters=clusters)
    fold = fold_of(problem, 5, np.random.default_rng(1))
    sizes, gold = np.bincount(fold), np.bincount(fold[problem.at])
    if clustered:
        assert all(len(set(fold[problem.clusters == c])) == 1 for c in range(50))
        assert gold.min() > 0
    else:
        assert np.ptp(sizes) <= 2
        assert np.ptp(gold) <= 1


@pytest.mark.parametrize("learner", ["forest", "generalized"])
def test_seeds_and_processes(learner):
    data = table("logistic")
    learner = Forest(3) if learner == "forest" else learner
    one = fit("logistic", data, splits=2, learner=learner)
    again = fit("logistic", data, splits=2, learner=learner)
    spread = fit("logistic", data, splits=2, learner=learner, jobs=2)
    other = fit("logistic", data, splits=2, learner=learner, seed=1, progress=True)
    assert one.params.equals(again.params)
    assert one.cov_params().equals(again.cov_params())
    assert one.params.equals(spread.params)
    assert one.cov_params().equals(spread.cov_params())
    assert not one.params.equals(other.params)
    assert one.cost.counts == {"gold labels": one.ngold, "rows": N, "fitted predictors": 10}


def test_splits_are_combined_by_medians():
    r = np.random.default_rng(0)
    halves = r.normal(size=(5, 3, 3))
    splits = [Estimates(r.normal(size=3), A @ A.T) for A in halves]
    theta = np.median([s.theta for s in splits], axis=0)
    found = combined(splits)
    assert found.theta == pytest.approx(theta)
    diagonal = np.median([np.diag(s.V) + (s.theta - theta) ** 2 for s in splits], axis=0)
    assert np.diag(found.V) == pytest.approx(diagonal)
    assert pytest.approx(found.V.T, abs=0) == found.V
    assert np.linalg.eigvalsh(found.V).min() > -1e-12


def test_made_positive_a_matrix_keeps_its_diagonal():
    r = np.random.default_rng(3)
    bent = 0
    for _ in range(200):  # medians of few rank-one matrices are seldom positive semi-definite
        splits = [Estimates(np.zeros(4), np.outer(v, v)) for v in r.normal(size=(3, 4))]
        raw = np.median([s.V for s in splits], axis=0)
        bent += np.linalg.eigvalsh(raw).min() < -1e-6
        V = combined(splits).V
        assert np.diag(V) == pytest.approx(np.diag(raw))
        assert np.linalg.eigvalsh(V).min() > -1e-10
    assert bent > 50


def test_one_split_is_itself():
    data = table("linear")
    _, problem = arrays(data)
    found = DSL("linear", "generalized", splits=1).estimate(problem)
    assert np.linalg.inv(found.J[0]) @ found.Omega[0] @ np.linalg.inv(found.J[0]).T / N == pytest.approx(found.dsl.V)


# Predicted explanatory variables, several variables, classes


def predicted_columns(seed=0, n=N):
    data = table("linear", seed, n)
    r = np.random.default_rng(seed + 100)
    gold = data["drawn"] == 1
    data["kind"] = r.choice(["news", "blog", "post"], n)
    data["llm_kind"] = np.where(r.random(n) < 0.15, r.permutation(data["kind"]), data["kind"])
    data["w"], data["llm_w"] = data["z"], np.where(r.random(n) < 0.1, 1 - data["z"], data["z"])
    return data.assign(true_w=data["w"], true_kind=data["kind"], w=data["w"].where(gold), kind=data["kind"].where(gold))


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_predicted_columns_with_all_labels_are_the_usual_regression(kind):
    data = predicted_columns()
    data["y"] = data["truth"] if kind == "linear" else (data["truth"] > 0).astype(float)
    data["w"], data["truth"] = data["true_w"], data["y"]
    found = fit(kind, data, "y ~ x + w", {"w": "llm_w", "y": "llm"}, prob=1.0)
    assert found.params.to_numpy() == pytest.approx(peer(kind, data).params, abs=1e-8)
    assert found.cov_params().to_numpy() == pytest.approx(peer(kind, data, cov_type="HC0").cov_params(), abs=1e-8)


@pytest.mark.parametrize("formula", ["y ~ x + w", "truth ~ x * w", "y ~ x + kind", "truth ~ w + C(kind)"])
def test_right_predictions_of_columns(formula):
    """With surrogates that are right, coefficients are those of all labels, whatever is predicted."""
    data = predicted_columns(1)
    predicted = {c: f"right_{c}" for c in ("y", "w", "kind") if c in formula}
    data = data.assign(right_y=data["truth"], right_w=data["true_w"], right_kind=data["true_kind"])
    found = fit("linear", data, formula, predicted, learner="identity")
    full = data.assign(y=data["truth"], w=data["true_w"], kind=data["true_kind"])
    other = fit("linear", full, formula, predicted, prob=1.0, learner="identity")
    same(found.fit.dsl, other.fit.dsl)
    assert list(found.params.index) == list(other.params.index)
    assert "weighting only" not in found.baselines()


def test_several_predicted_variables_and_surrogates():
    data = predicted_columns(2, 600)
    data["second"] = data["truth"] + 1
    found = fit("linear", data, "y ~ x + w", {"y": ["llm", "second"], "w": "llm_w"}, splits=2)
    assert found.cost.counts["fitted predictors"] == 2 * 5 * 2
    assert set(found.fit.predictions) == {"y", "w"}
    assert found.params["w"] == pytest.approx(0.5, abs=4 * found.bse["w"])
    explained = found.check().figures["explained y"]
    assert explained > 0.95  # the second surrogate is the label itself, moved


def test_predicted_columns_are_unbiased_where_surrogates_are_not():
    data = predicted_columns(3, 4000)
    found = fit("linear", data, "truth ~ x + w", {"w": "llm_w"})
    full = sm.OLS(data["truth"], sm.add_constant(data[["x", "true_w"]])).fit()
    assert np.abs((found.params.to_numpy() - full.params.to_numpy()) / found.bse.to_numpy()).max() < 3
    naive = found.baselines()["surrogate only"]
    assert naive.theta[2] < full.params.iloc[2] - 1.5 * naive.se[2]  # attenuated


def test_text_labels():
    data = table("multinomial", n=900)
    found = fit("multinomial", data, learner="generalized")
    assert list(found.params.index) == [f"{c}: {n}" for c in ("fair", "good") for n in ("Intercept", "x", "z")]
    other = np.ravel(peer("multinomial", data).params, order="F")
    assert np.abs((found.params.to_numpy() - other) / found.bse.to_numpy()).max() < 3.5
    assert {"surrogate only", "gold only", "predictions only", "weighting only"} == set(found.baselines())
    assert found.check().figures["accuracy y"] > 0.7
    for categories in (["bad", "fair", "good"], ["good", "fair", "bad", "unused"]):
        cast = data.assign(y=pd.Categorical(data["y"], categories), llm=pd.Categorical(data["llm"], categories))
        assert fit("multinomial", cast).params.to_numpy() == pytest.approx(found.params.to_numpy(), abs=1e-12)


def test_a_surrogate_that_says_something_else_is_predicted_from():
    data = table("multinomial", n=600)
    data.loc[data.index[::9], "llm"] = "cannot say"
    found = fit("multinomial", data)
    assert "surrogate only" not in found.baselines()
    assert any("no gold label of y is cannot say, as llm says" in note for note in found.problem.notes)
    with pytest.raises(UserError, match="identity takes a surrogate of y as it is"):
        fit("multinomial", data, learner="identity")


def test_numbered_classes():
    data = table("multinomial", n=600)
    code = {"bad": 0, "fair": 1, "good": 2}
    numbered = data.assign(y=data["y"].map(code), llm=data["llm"].map(code))
    one, two = (fit("multinomial", t) for t in (data, numbered))
    assert two.params.to_numpy() == pytest.approx(one.params.to_numpy(), abs=1e-10)
    assert "surrogate only" in two.baselines()


# Tables of any kind


def test_kinds_of_columns():
    data = table("logistic")
    plain = fit("logistic", data).params.to_numpy()
    gold = data["drawn"] == 1
    nullable = data.assign(
        y=data["y"].astype("Int64"),
        z=data["z"].astype("boolean"),
        llm=data["llm"].astype("Int8"),
        x=data["x"].astype("Float64"),
        prob=data["prob"].astype("Float64"),
    )
    booleans = data.assign(y=data["truth"].astype(bool).astype(object).where(gold, None), llm=data["llm"].astype(bool))
    objects = data.assign(y=data["y"].astype(object), llm=data["llm"].astype(int).astype(object))
    arrow = data.convert_dtypes(dtype_backend="pyarrow")
    for other in (nullable, booleans, objects, arrow, data.to_dict("list"), data.set_index(np.repeat([3, 4], N // 2))):
        assert fit("logistic", other, "y ~ x + z").params.to_numpy() == pytest.approx(plain, abs=1e-10)


def test_files(tmp_path):
    data = table("linear")
    data["group"] = np.where(data["x"] > 0, "high", "low")
    formula = "y ~ x + C(group)"
    plain = fit("linear", data, formula)
    data.to_csv(tmp_path / "t.csv", index=False)
    data.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    data.to_parquet(tmp_path / "t.parquet")
    data.to_json(tmp_path / "t.jsonl", orient="records", lines=True, double_precision=15)
    for name in ("t.csv", "t.tsv", "t.parquet", "t.jsonl"):
        for path in (tmp_path / name, str(tmp_path / name)):
            assert fit("linear", path, formula).params.to_numpy() == pytest.approx(plain.params.to_numpy(), abs=1e-9)


@pytest.mark.parametrize(
    ("formula", "names"),
    [
        ("y ~ x + np.log(size)", ["Intercept", "x", "np.log(size)"]),
        ("y ~ x * z", ["Intercept", "x", "z", "x:z"]),
        ("y ~ 0 + C(g)", ["C(g)[a]", "C(g)[b]", "C(g)[c]"]),
        ("y ~ C(g):x", ["Intercept", "C(g)[a]:x", "C(g)[b]:x", "C(g)[c]:x"]),
        ("y ~ x + I(x**2)", ["Intercept", "x", "I(x ** 2)"]),
        ("y ~ scale(x) + g", ["Intercept", "scale(x)", "g[T.b]", "g[T.c]"]),
        ("y ~ x - 1", ["x"]),
        ("y ~ 1", ["Intercept"]),
        ("y ~ `a column`", ["Intercept", "a column"]),
        ("`the label` ~ x", ["Intercept", "x"]),
        ("np.log(positive) ~ x", ["Intercept", "x"]),
    ],
)
def test_formulas(formula, names):
    data = table("linear").assign(size=lambda t: np.exp(t["x"]) + 1, g=np.resize(["a", "b", "c"], N), right=1.0)
    data["a column"], data["the label"], data["positive"] = data["x"] ** 3, data["y"], np.exp(data["y"])
    gold = next((c for c in ("the label", "positive") if c in formula), "y")
    data["right"] = np.exp(data["truth"]) if gold == "positive" else data["truth"]
    found = fit("linear", data, formula, {gold: "right"}, learner="identity")
    assert list(found.params.index) == names
    other = sm.OLS(data["truth"].to_numpy(), found.problem.X).fit(cov_type="HC0")  # as the surrogate is right
    assert found.params.to_numpy() == pytest.approx(other.params, abs=1e-8)
    assert found.bse.to_numpy() == pytest.approx(other.bse, abs=1e-8)
    assert ("weighting only" in found.baselines()) == (gold != "positive")


def test_a_simpler_way_that_fails_spoils_nothing():
    """A surrogate of 0 has no logarithm: predictions from it may have one."""
    data = table("linear")
    data["y"], data["llm"] = np.exp(data["y"]), np.where(data["llm"] > -2, np.exp(data["llm"]), 0.0)
    found = fit("linear", data, "np.log(y) ~ x", learner=Forest(5))
    assert "cannot be evaluated" in found.baselines()["surrogate only"].failed
    assert np.isfinite(found.params).all()


def test_a_quoted_outcome_may_have_classes():
    data = table("multinomial").rename(columns={"y": "the label"})
    plain = fit("multinomial", table("multinomial"))
    found = fit("multinomial", data, "`the label` ~ x + z", {"the label": "llm"})
    assert found.params.to_numpy() == pytest.approx(plain.params.to_numpy(), abs=1e-12)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
def test_fixed_effects_are_dummies(ways, balanced):
    data = table("linear")
    r = np.random.default_rng(5)
    data["state"] = np.resize(list("abcdef"), N) if balanced else r.choice(list("abcdef"), N, p=[0.4, 0.2, *[0.1] * 4])
    data["year"] = np.repeat(np.arange(5), N // 5) if balanced else r.choice(5, N, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    data["llm"] = data["llm"] + data["year"] * 0.2
    effects = ["state", "year"][:ways]
    found = fit("linear", data, learner="identity", fixed_effects=effects)
    dummies = fit("linear", data, "y ~ x + z" + "".join(f" + C({e})" for e in effects), learner="identity")
    for one, other in [(found.fit.dsl, dummies.fit.dsl)] + [
        (e, dummies.baselines()[name]) for name, e in found.baselines().items()
    ]:
        keep = [list(dummies.params.index).index(n) for n in ("x", "z")]
        assert one.theta == pytest.approx(other.theta[keep], abs=1e-8)
        assert pytest.approx(other.V[np.ix_(keep, keep)], abs=1e-8) == one.V
    assert found.power([found.ngold, 200]).to_numpy() == pytest.approx(
        dummies.power([found.ngold, 200])[["x", "z"]].to_numpy(), abs=1e-8
    )


def test_one_name_needs_no_list():
    data = table("linear").assign(state=np.resize(list("abc"), N))
    one = fit("linear", data, "y ~ x", features="prob", fixed_effects="state")
    assert one.params.equals(fit("linear", data, "y ~ x", features=["prob"], fixed_effects=["state"]).params)


# Probabilities


def test_prob_may_be_a_column_a_number_or_an_array():
    data = table("linear")
    column = fit("linear", data).fit.dsl
    same(fit("linear", data, prob=data["prob"].to_numpy()).fit.dsl, column, 0)
    same(fit("linear", data, prob=data["prob"].tolist()).fit.dsl, column, 0)
    share = data["drawn"].mean()
    same(fit("linear", data, prob=None).fit.dsl, fit("linear", data, prob=float(share)).fit.dsl, 1e-12)
    same(fit("linear", data, labelled="drawn").fit.dsl, column, 0)
    same(fit("linear", data, labelled=data["drawn"].to_numpy(bool)).fit.dsl, column, 0)


def test_estimated_probabilities_are_said_to_be():
    data = table("linear", n=2000)
    found = fit("linear", data, prob="estimate")
    assert any("probabilities were estimated" in note for note in found.problem.notes)
    true = data["prob"].to_numpy()
    assert np.corrcoef(found.problem.prob, true)[0, 1] > 0.95
    assert "probabilities were estimated" in str(found.summary())


def test_normalised_probabilities():
    """As the R package has them: pi times (n / N) / mean(pi)."""
    data = table("linear")
    factor = (data["drawn"].mean()) / data["prob"].mean()
    normal = DSL("linear", "identity", normalize_prob=True).fit(data, "y ~ x + z", {"y": "llm"}, prob="prob")
    found = fit("linear", data, prob=data["prob"].to_numpy() * factor, learner="identity")
    same(normal.fit.dsl, found.fit.dsl, 1e-12)
    assert factor != pytest.approx(1, abs=0.01)
    assert normal.check().figures["design_p"] == pytest.approx(found.check().figures["design_p"], abs=1e-9)


# Learners


@pytest.mark.parametrize(
    "learner",
    [
        LogisticRegression(),
        RandomForestClassifier(5),
        make_pipeline(StandardScaler(), KNeighborsClassifier()),
        LinearRegression(),
        GradientBoostingRegressor(n_estimators=4),
        Forest(3, min_samples_leaf=2),
        Generalized(0.1),
    ],
    ids=lambda v: type(v).__name__,
)
def test_learners(learner):
    data = table("logistic")
    found = fit("logistic", data, learner=learner, splits=2)
    again = fit("logistic", data, learner=learner, splits=2)
    assert found.params.equals(again.params)
    assert np.isfinite(found.bse).all()
    assert np.isfinite(fit("multinomial", table("multinomial"), learner=learner).params).all()


@pytest.mark.parametrize("learner", ["generalized", LogisticRegression(), RandomForestClassifier(5)])
def test_a_fold_of_one_class(learner):
    r = np.random.default_rng(0)
    n = 400
    data = pd.DataFrame({"x": r.normal(size=n), "llm": (r.random(n) < 0.1).astype(float)})
    data["y"] = np.where(np.arange(n) < 20, 0.0, NAN)
    data.loc[3, "y"] = 1.0  # the folds without it know one class alone
    data = data.sample(frac=1, random_state=0)
    assert np.isfinite(fit("linear", data, "y ~ x", prob=None, learner=learner).params).all()
    text = data.assign(y=data["y"].map({0.0: "no", 1.0: "yes"}), llm=data["llm"].map({0.0: "no", 1.0: "yes"}))
    found = DSL("multinomial", learner, splits=1)
    problem = found.fit(text, "y ~ 1", {"y": "llm"})
    assert problem.fit.predictions["y"].sum(1) == pytest.approx(1)


# Moments of your own


class Ratio(Moment):
    """A ratio of means: mean(y - theta * size) = 0."""

    def m(self, theta: Any, D: Columns) -> Any:
        return (D["y"] - theta[0] * D["size"])[:, None]

    def jac(self, theta: Any, D: Columns, weights: Any) -> Any:
        return np.array([[-(weights @ D["size"])]])

    def start(self, D: Columns) -> Any:
        return np.zeros(1)


class Instruments(Moment):
    """Instrumental variables, as many as columns: mean(Z (y - X theta)) = 0."""

    def m(self, theta: Any, D: Columns) -> Any:
        return D["Z"] * (D["y"] - D["X"] @ theta)[:, None]

    def jac(self, theta: Any, D: Columns, weights: Any) -> Any:
        return -(D["Z"] * weights[:, None]).T @ D["X"]

    def start(self, D: Columns) -> Any:
        return np.zeros(D["X"].shape[1])


def test_a_ratio_of_means():
    data = table("linear")
    size = np.exp(data["x"].to_numpy())
    found = DSL(Ratio(), "identity").fit_arrays(
        {"y": data["y"].to_numpy(), "size": size},
        {"y": data["llm"].to_numpy()},
        data["prob"].to_numpy(),
        names=["ratio"],
    )
    R = data["drawn"].to_numpy(bool)
    pseudo = pseudo_outcome(data["llm"].to_numpy(), data["truth"].to_numpy(), R, data["prob"].to_numpy())
    ratio = pseudo.mean() / size.mean()
    assert found.params["ratio"] == pytest.approx(ratio, abs=1e-12)
    assert found.bse["ratio"] == pytest.approx(np.sqrt(((pseudo - ratio * size) ** 2).mean() / N) / size.mean())
    with pytest.raises(UserError, match="only a regression"):
        found.predict()
    assert "ratio" in str(found.summary())


def test_instrumental_variables_with_a_predicted_instrument():
    r = np.random.default_rng(0)
    n = 3000
    hidden, z = r.normal(size=n), r.normal(size=n)
    x = z + hidden + r.normal(size=n)
    y = 0.7 * x - hidden + r.normal(size=n)
    drawn = r.random(n) < 0.3
    guess = z + r.normal(size=n) * 0.3

    def design(D):
        one = np.ones(len(D["y"]))
        return {"y": D["y"], "X": np.column_stack([one, D["x"]]), "Z": np.column_stack([D["z"], one])}  # in any order

    D = {"y": y, "x": x, "z": np.where(drawn, z, NAN)}
    found = DSL(Instruments(), Generalized(), splits=1).fit_arrays(
        D, {"z": guess}, 0.3, features=np.column_stack([x, y]), design=design, names=["one", "x"]
    )
    assert found.params["x"] == pytest.approx(0.7, abs=4 * found.bse["x"])
    assert found.bse["x"] < 0.1
    full = DSL(Instruments(), "identity").fit_arrays(D | {"z": z}, {"z": guess}, 1.0, design=design, names=["one", "x"])
    Z, X = np.column_stack([z, np.ones(n)]), np.column_stack([np.ones(n), x])
    assert full.params.to_numpy() == pytest.approx(np.linalg.solve(Z.T @ X, Z.T @ y), abs=1e-8)


def test_arrays_are_the_formula():
    data = table("logistic")
    X = np.column_stack([np.ones(N), data["x"], data["z"]])
    one = fit("logistic", data, splits=2)
    two = DSL("logistic", "generalized", splits=2).fit_arrays(
        {"y": data["y"].to_numpy(), "X": X},
        {"y": data["llm"].to_numpy()},
        data["prob"].to_numpy(),
        features=X[:, 1:],
        names=["Intercept", "x", "z"],
    )
    same(one.fit.dsl, two.fit.dsl, 1e-12)
    assert two.compare().to_numpy() == pytest.approx(one.compare().to_numpy(), abs=1e-10)
    text = table("multinomial")
    Y = pd.get_dummies(text["truth"]).to_numpy(float)
    three = DSL("multinomial", "identity").fit_arrays(
        {"y": np.where(text[["drawn"]] == 1, Y, NAN), "X": X},
        {"y": pd.get_dummies(text["llm"]).to_numpy(float)},
        text["prob"].to_numpy(),
    )
    assert three.params.to_numpy() == pytest.approx(fit("multinomial", text, learner="identity").params.to_numpy())


# The certificate


def test_the_design_check_passes_true_samples_and_fails_convenient_ones():
    r = np.random.default_rng(0)
    honest, easy = [], []
    n = 400
    for _ in range(150):
        x, z = r.normal(size=n), (r.random(n) < 0.4).astype(float)
        F = np.column_stack([x + r.normal(size=n), x, z])
        unequal, half = np.where(z > 0, 0.4, 0.2), np.full(n, 0.25)
        honest += [
            design_test(F, unequal, np.flatnonzero(r.random(n) < unequal)),
            design_test(F, half, np.flatnonzero(r.random(n) < half)),
            design_test(F, half, r.permutation(n)[: n // 4]),
        ]
        at = np.flatnonzero(r.random(n) < 0.5 / (1 + np.exp(-2 * x)))
        easy.append(design_test(F, np.full(n, len(at) / n), at))
    assert {rank for _, rank, _ in honest} == {3}
    p = np.array([p for _, _, p in honest])
    assert 0.02 < (p < 0.05).mean() < 0.08  # of 450 samples: 0.05 +- 2.9 standard errors
    assert 0.06 < (p < 0.1).mean() < 0.14
    assert (p >= 0.001).mean() > 0.99
    assert np.mean([p >= 0.001 for _, _, p in easy]) < 0.02


def test_the_check_of_a_result():
    data = table("logistic", n=600)
    good = fit("logistic", data)
    assert good.check()
    assert "gold rows look as their probabilities say" in good.check().text
    bad = fit("logistic", data.assign(y=np.where(data["x"] > 0, data["truth"], NAN)), prob=None)
    assert not bad.check()
    assert "cannot be relied on" in bad.check().text
    assert "cannot be relied on" in " ".join(str(bad.summary()).split())


def test_the_check_sees_small_columns_beside_huge_ones():
    data = table("linear", n=600)
    data["y"] = np.where(data["x"] > 0.5, data["truth"], NAN)  # a convenience sample
    data["huge"] = np.random.default_rng(0).normal(size=600) * 1e9
    assert not fit("linear", data, "y ~ z", prob=None, features=["x", "huge"], learner="identity").check()
