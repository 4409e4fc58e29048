"""Estimating equations against statsmodels: weights, clusters, fixed effects, Newton's method, and roots that lie at infinity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pandas")
sm = pytest.importorskip("statsmodels.api")

from locum.errors import UserError  # noqa: E402
from locum.infer import Linear, Logistic, Multinomial, Poisson  # noqa: E402
from locum.infer.equations import (  # noqa: E402
    ConvergenceError,
    Mixed,
    collinear,
    grouped_sums,
    inverse,
    meat,
    sandwich,
    solve,
)
from locum.infer.within import effects, solve_within  # noqa: E402

N = 240
MOMENTS = {"linear": Linear(), "logistic": Logistic(), "poisson": Poisson(), "multinomial": Multinomial()}
PLAIN = {"cov_type": "HC0"}


def data(seed=0, n=N):
    """X with an intercept, and an outcome of each kind."""
    r = np.random.default_rng(seed)
    X = np.column_stack([np.ones(n), r.normal(size=n), r.random(n) < 0.4])
    eta = X @ [-0.4, 0.7, 0.5]
    classes = (eta[:, None] * [0, 1, -0.5] + r.gumbel(size=(n, 3))).argmax(1)
    ys = {
        "linear": eta + r.normal(size=n) * (1 + X[:, 2]),
        "logistic": (r.random(n) < 1 / (1 + np.exp(-eta))).astype(float),
        "poisson": r.poisson(np.exp(eta)).astype(float),
        "multinomial": np.eye(3)[classes],
    }
    return X, ys, r


def weighted(X, y, b):
    """Gold labels alone, with weights."""
    return Mixed(None, np.zeros(len(X)), {"X": X, "y": y}, np.arange(len(X)), b)


def mixed(kind, seed=0, moves=True):
    """Rows of which a third have gold labels, X predicted too: the mixture that the method solves."""
    X, ys, r = data(seed)
    at, b = np.sort(r.permutation(N)[: N // 3]), r.uniform(2, 4, N // 3)
    a = np.ones(N)
    a[at] -= b
    noise = r.normal(size=X.shape) * [0, 0.3, 0.3] * moves
    y = ys[kind] * 0.8 + 0.1
    return Mixed({"X": X + noise, "y": y}, a, {"X": X[at], "y": ys[kind][at]}, at, b)


def fitted(kind, X, y, **how):
    labels = y.argmax(1) if kind == "multinomial" else y
    model = {"linear": sm.OLS, "logistic": sm.Logit, "poisson": sm.Poisson, "multinomial": sm.MNLogit}[kind](labels, X)
    return model.fit(**how) if kind == "linear" else model.fit(disp=0, method="newton", tol=1e-14, **how)


@pytest.mark.parametrize("kind", MOMENTS)
def test_unweighted_it_is_the_regression_with_robust_errors(kind):
    X, ys, _ = data()
    found = solve(MOMENTS[kind], weighted(X, ys[kind], np.ones(N)))
    peer = fitted(kind, X, ys[kind])
    assert found.theta == pytest.approx(np.ravel(peer.params, order="F"), abs=1e-8)
    V = sandwich(found.J, meat(found.scores), N)
    if kind == "multinomial":  # statsmodels has no robust errors for it: from its own scores and Hessian
        scores = peer.model.score_obs(peer.params.ravel(order="F"))
        H = np.linalg.inv(peer.model.hessian(peer.params.ravel(order="F")))
        assert pytest.approx(H @ scores.T @ scores @ H, abs=1e-8) == V
    else:
        assert pytest.approx(fitted(kind, X, ys[kind], **PLAIN).cov_params(), abs=1e-8) == V


@pytest.mark.parametrize("kind", ["linear", "logistic", "poisson"])
def test_clusters(kind):
    X, ys, r = data(1)
    groups = r.integers(0, 30, N)
    found = solve(MOMENTS[kind], weighted(X, ys[kind], np.ones(N)))
    how = {"groups": groups, "use_correction": False, "df_correction": False}
    peer = fitted(kind, X, ys[kind], cov_type="cluster", cov_kwds=how)
    V = sandwich(found.J, meat(found.scores, np.unique(groups, return_inverse=True)[1]), N)
    assert pytest.approx(peer.cov_params(), abs=1e-8) == V


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_cluster_for_each_row_changes_nothing(kind):
    m = mixed(kind)
    found = solve(MOMENTS[kind], m)
    order = np.random.default_rng(0).permutation(N)
    assert meat(found.scores, order) == pytest.approx(meat(found.scores), abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "logistic", "poisson"])
def test_weights(kind):
    X, ys, r = data(2)
    b = r.uniform(1, 5, N)
    found = solve(MOMENTS[kind], weighted(X, ys[kind], b))
    family = {"logistic": sm.families.Binomial, "poisson": sm.families.Poisson}
    if kind == "linear":
        peer = sm.WLS(ys[kind], X, weights=b).fit(**PLAIN)
    else:
        peer = sm.GLM(ys[kind], X, family=family[kind](), var_weights=b).fit(tol=1e-14, maxiter=200, **PLAIN)
    assert found.theta == pytest.approx(peer.params, abs=1e-8)
    assert sandwich(found.J, meat(found.scores), N) == pytest.approx(peer.cov_params(), abs=1e-8)


def test_multinomial_of_two_classes_is_logistic():
    X, ys, _ = data(3)
    y = ys["logistic"]
    two = solve(Multinomial(), weighted(X, np.column_stack([1 - y, y]), np.ones(N)))
    one = solve(Logistic(), weighted(X, y, np.ones(N)))
    assert two.theta == pytest.approx(one.theta, abs=1e-10)
    assert pytest.approx(one.J, abs=1e-10) == two.J


@pytest.mark.parametrize("kind", MOMENTS)
def test_jacobians_against_finite_differences(kind):
    m, moment = mixed(kind), MOMENTS[kind]
    p = len(moment.start(m.hat))
    theta = np.random.default_rng(5).normal(size=p) * 0.3
    step = 1e-5 * np.eye(p)
    columns = [(m.mean(moment, theta + h) - m.mean(moment, theta - h)) / 2e-5 for h in step]
    assert m.jacobian(moment, theta) == pytest.approx(np.column_stack(columns), abs=1e-5)
    gradient = moment.gradient(theta, m.hat["X"])
    ahead = [(moment.predict(theta + h, m.hat["X"]) - moment.predict(theta - h, m.hat["X"])) / 2e-5 for h in step]
    assert gradient == pytest.approx(np.stack(ahead, -1), abs=1e-5)


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_root_is_one(kind):
    m, moment = mixed(kind, 4), MOMENTS[kind]
    found = solve(moment, m)
    assert np.abs(m.mean(moment, found.theta)).max() < 1e-12
    assert found.scores.mean(0) == pytest.approx(0, abs=1e-12)
    assert pytest.approx(m.jacobian(moment, found.theta), abs=1e-9) == found.J
    gold, hat = moment.m(found.theta, m.gold), moment.m(found.theta, {k: v[m.at] for k, v in m.hat.items()})
    assert found.differences == pytest.approx(gold - hat, abs=1e-12)


def test_predicted_columns_of_least_squares_in_closed_form():
    """J theta = c, arXiv 2306.04746, with weights of both versions."""
    m = mixed("linear", 6)
    sums = [((D["X"] * w[:, None]).T @ D["X"], (D["X"] * w[:, None]).T @ D["y"]) for D, w in m.parts]
    J, c = (sum(s[k] for s in sums) for k in (0, 1))
    assert solve(Linear(), m).theta == pytest.approx(np.linalg.solve(J, c), abs=1e-10)


@given(units=st.tuples(st.floats(-9, 9), st.floats(-9, 9)), seed=st.integers(0, 5))
def test_units_of_columns_do_not_matter(units, seed):
    scale = np.array([1.0, *(10.0**u for u in units)])
    for kind in ("linear", "logistic", "poisson"):
        X, ys, _ = data(seed)
        plain, other = (solve(MOMENTS[kind], weighted(Z, ys[kind], np.ones(N))) for Z in (X, X * scale))
        assert other.theta * scale == pytest.approx(plain.theta, rel=1e-6, abs=1e-9)
        V, W = (sandwich(s.J, meat(s.scores), N) for s in (plain, other))
        assert np.outer(scale, scale) * W == pytest.approx(V, rel=1e-6, abs=1e-12)


def test_units_of_the_outcome_do_not_matter():
    X, ys, _ = data(7)
    for factor in (1e-9, 1e9):
        line = solve(Linear(), weighted(X, ys["linear"] * factor, np.ones(N))).theta
        assert line == pytest.approx(factor * solve(Linear(), weighted(X, ys["linear"], np.ones(N))).theta, rel=1e-8)
        count = solve(Poisson(), weighted(X, ys["poisson"] * factor, np.ones(N))).theta
        assert count - [np.log(factor), 0, 0] == pytest.approx(
            solve(Poisson(), weighted(X, ys["poisson"], np.ones(N))).theta, rel=1e-6
        )
    far = solve(Linear(), weighted(X, ys["linear"] + 1e9, np.ones(N))).theta
    assert far - [1e9, 0, 0] == pytest.approx(
        solve(Linear(), weighted(X, ys["linear"], np.ones(N))).theta, rel=1e-5, abs=1e-6
    )


def test_an_inverse_needs_no_diagonal():
    J = np.array([[0.0, 2e9], [1e-9, 0.0]])  # as with instruments in another order
    assert inverse(J) @ J == pytest.approx(np.eye(2))


# fixed effects


def coded(r, counts, balanced):
    if balanced:
        cells = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij")).reshape(len(counts), -1)
        return [np.resize(c, (N // len(c)) * len(c)) for c in cells]
    return [np.minimum(r.geometric(0.3, N) - 1, k - 1) for k in counts]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("counts", [(8,), (8, 5), (6, 4, 3)])
def test_fixed_effects_are_the_regression_with_dummies(counts, balanced):
    m = mixed("linear", 8)
    r = np.random.default_rng(9)
    groups = coded(r, counts, balanced)
    n = len(groups[0])
    at = m.at[m.at < n]
    few = len(at)
    hat = {k: v[:n] for k, v in m.hat.items()}
    hat["y"] = hat["y"] + np.sin(groups[0]) * 3
    gold = {k: v[:few] for k, v in m.gold.items()}
    gold["y"] = gold["y"] + np.sin(groups[0][at]) * 3
    within = [{k: v[:, 1:] if k == "X" else v for k, v in D.items()} for D in (hat, gold)]
    found = solve_within(Mixed(within[0], m.a[:n], within[1], at, m.b[:few]), groups, ["x", "z"])

    dummies = np.column_stack([np.eye(k)[g][:, i > 0 :] for i, (k, g) in enumerate(zip(counts, groups, strict=True))])
    full = [D | {"X": np.column_stack([D["X"][:, 1:], d])} for D, d in ((hat, dummies), (gold, dummies[at]))]
    peer = solve(Linear(), Mixed(full[0], m.a[:n], full[1], at, m.b[:few]))
    assert found.theta == pytest.approx(peer.theta[:2], abs=1e-8)
    for clusters in (None, groups[0]):
        V = sandwich(found.J, meat(found.scores, clusters), n)
        assert pytest.approx(sandwich(peer.J, meat(peer.scores, clusters), n)[:2, :2], abs=1e-8) == V
    # what power rests on: the part of the variance that the draw of gold labels makes
    d, whole = m.b[:few, None] * found.differences, m.b[:few, None] * peer.differences
    assert sandwich(found.J, d.T @ d / n, n) == pytest.approx(
        sandwich(peer.J, whole.T @ whole / n, n)[:2, :2], abs=1e-8
    )


def test_fixed_effects_against_statsmodels():
    X, ys, r = data(10)
    groups = coded(r, (7, 5), balanced=False)
    one = np.ones(N)
    found = solve_within(weighted(X[:, 1:], ys["linear"], one), groups)
    dummies = np.column_stack([np.eye(7)[groups[0]], np.eye(5)[groups[1]][:, 1:]])
    peer = sm.OLS(ys["linear"], np.column_stack([X[:, 1:], dummies])).fit(**PLAIN)
    assert found.theta == pytest.approx(peer.params[:2], abs=1e-8)
    assert sandwich(found.J, meat(found.scores), N) == pytest.approx(peer.cov_params()[:2, :2], abs=1e-8)
    b = r.uniform(1, 3, N)
    found = solve_within(weighted(X[:, 1:], ys["linear"], b), groups)
    peer = sm.WLS(ys["linear"], np.column_stack([X[:, 1:], dummies]), weights=b).fit(**PLAIN)
    assert found.theta == pytest.approx(peer.params[:2], abs=1e-8)
    assert sandwich(found.J, meat(found.scores), N) == pytest.approx(peer.cov_params()[:2, :2], abs=1e-8)


def test_effects_that_few_rows_link():
    """A chain: each value of one group shares one row with the next of the other. Turns about move slowly along it."""
    r = np.random.default_rng(11)
    one, two = np.repeat(np.arange(12), 2), np.roll(np.repeat(np.arange(12), 2), 1)
    v = r.normal(size=(24, 2))
    G = np.column_stack([np.eye(12)[one], np.eye(12)[two]])
    exact = G @ np.linalg.lstsq(G, v, rcond=None)[0]
    assert effects(v, np.ones(24), [one, two]) == pytest.approx(exact, abs=1e-7)


def test_grouped_sums():
    values = np.arange(8.0).reshape(4, 2)
    assert grouped_sums(values, np.array([1, 0, 1, 1])).tolist() == [[2, 3], [10, 13]]


# what cannot be solved


ROWS = 200


@pytest.mark.parametrize(
    ("outcome", "named", "not_named"),
    [
        (lambda x, z, k: x > 0, ["x"], ["z", "k2"]),
        (lambda x, z, k: x > 1, ["x"], ["k2"]),
        (lambda x, z, k: np.where(k == 1, 1, z > 0.3 * x), ["z"], []),
    ],
)
def test_separation_names_the_column(outcome, named, not_named):
    r = np.random.default_rng(0)
    x, z = r.normal(size=(2, ROWS))
    k = r.integers(0, 3, ROWS)
    X = np.column_stack([np.ones(ROWS), x, z, k == 1, k == 2]).astype(float)
    y = outcome(x, z, k).astype(float)
    with pytest.raises(ConvergenceError, match="grow without bound") as error:
        solve(Logistic(), weighted(X, y, np.ones(ROWS)), ["Intercept", "x", "z", "k1", "k2"])
    said = str(error.value).split(":")[0]
    assert all(name in said for name in named), said
    assert not any(name in said for name in not_named), said


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("share", [0.3, 0.02])
@pytest.mark.parametrize("kind", ["logistic", "poisson"])
def test_separation_by_a_category(kind, which, share, value):
    if kind == "poisson" and value == 1:
        return
    r = np.random.default_rng(1)
    k = np.where(r.random(ROWS) < share, which, (which + 1 + r.integers(0, 2, ROWS)) % 3)
    x = r.normal(size=ROWS)
    X = np.column_stack([np.ones(ROWS), k == 1, k == 2, x]).astype(float)
    y = np.where(k == which, value, r.integers(0, 2, ROWS)).astype(float)
    with pytest.raises(ConvergenceError, match=f"separated by {'k1, k2' if which == 0 else f'k{which}'}:"):
        solve(MOMENTS[kind], weighted(X, y, np.ones(ROWS)), ["Intercept", "k1", "k2", "x"])


def test_separation_of_one_class_among_three():
    r = np.random.default_rng(2)
    x, z = r.normal(size=(2, ROWS))
    c = np.where(x > 0.5, 2, r.integers(0, 2, ROWS))
    names = [f"{c}: {n}" for c in "bc" for n in ("Intercept", "x", "z")]
    with pytest.raises(ConvergenceError, match="separated by c: x:"):
        solve(Multinomial(), weighted(np.column_stack([np.ones(ROWS), x, z]), np.eye(3)[c], np.ones(ROWS)), names)


def test_steep_is_not_separated():
    r = np.random.default_rng(3)
    x = r.normal(size=2000)
    X = np.column_stack([np.ones(2000), x])
    y = (r.random(2000) < 1 / (1 + np.exp(-12 * x))).astype(float)
    assert solve(Logistic(), weighted(X, y, np.ones(2000))).theta == pytest.approx(
        sm.Logit(y, X).fit(disp=0, tol=1e-14).params, rel=1e-7
    )
    rare = np.zeros(2000)
    rare[0] = 1
    assert solve(Logistic(), weighted(X[:, :1], rare, np.ones(2000))).theta[0] == pytest.approx(np.log(1 / 1999))


def test_a_mean_that_no_coefficient_gives():
    r = np.random.default_rng(4)
    k = np.arange(ROWS) < 4
    X = np.column_stack([np.ones(ROWS), k, r.normal(size=ROWS)]).astype(float)
    y = np.where(k, 1.5, r.integers(0, 2, ROWS))  # as the mean of pseudo-outcomes may be
    with pytest.raises(ConvergenceError, match=r"coefficients of k1 grow without bound: with so few gold labels"):
        solve(Logistic(), weighted(X, y, np.ones(ROWS)), ["Intercept", "k1", "x"])
    with pytest.raises(ConvergenceError, match=r"coefficients of k1 grow without bound: with so few gold labels"):
        solve(Poisson(), weighted(X, np.where(k, -1, y), np.ones(ROWS)), ["Intercept", "k1", "x"])


def test_columns_that_depend_on_each_other():
    r = np.random.default_rng(5)
    x, z = r.normal(size=(2, ROWS))
    names = ["Intercept", "x", "z", "sum"]
    X = np.column_stack([np.ones(ROWS), x, z, x + z])
    assert collinear(X, names) == ["x", "z", "sum"]
    assert collinear(X * [1, 1e9, 1, 1e-9], names) == ["x", "z", "sum"]
    assert collinear(X[:, :3] * [1, 1e9, 1e-9], names) == []
    assert collinear(X * [1, 1, 0, 1], names) == ["z"]
    with pytest.raises(UserError, match="coefficients of x, z, sum cannot be told apart"):
        solve(Linear(), weighted(X, x, np.ones(ROWS)), names)


def test_a_moment_that_is_not_finite():
    X = np.column_stack([np.ones(4), [1, 2, np.inf, 3]])
    with pytest.raises(ConvergenceError, match="not finite"):
        solve(Linear(), weighted(X, np.arange(4.0), np.ones(4)))
