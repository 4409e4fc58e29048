"""What cannot be right is refused before any work, in one sentence that names columns or rows."""

import warnings

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
sm = pytest.importorskip("statsmodels.api")
pytest.importorskip("formulaic")
from sklearn.base import BaseEstimator, RegressorMixin  # noqa: E402
from sklearn.linear_model import LogisticRegression, RidgeClassifier  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import DSL, Forest, Generalized, Linear  # noqa: E402
from locum.infer.equations import ConvergenceError  # noqa: E402

N = 200
NAN = float("nan")
GOLD = 80  # the first rows


def table(**columns):
    r = np.random.default_rng(0)
    x, z = r.normal(size=N), (r.random(N) < 0.5).astype(float)
    truth = (r.random(N) < 1 / (1 + np.exp(-x))).astype(float)
    out = pd.DataFrame(
        {
            "x": x,
            "z": z,
            "y": np.where(np.arange(N) < GOLD, truth, NAN),
            "llm": np.where(r.random(N) < 0.1, 1 - truth, truth),
            "p": GOLD / N,
            "g": np.resize(["a", "b", "c", "d"], N),
            "drawn": (np.arange(N) < GOLD).astype(int),
            "truth": truth,
        },
    )
    return out.assign(**columns)


def at(rows, value, base=0.4):
    """A column that has a value in some rows."""
    out = np.full(N, base, dtype=object if isinstance(value, str) else float)
    out[rows] = value
    return out


def gold_where(condition, value):
    """Gold labels with a value where a condition of the row holds."""

    def column(t):
        return t["y"].mask(t["y"].notna() & condition(t), value)

    return column


def fit(data, formula="y ~ x + z", predicted=None, moment="linear", learner="generalized", folds=5, **how):
    dsl = DSL(moment, learner, folds=folds, splits=1)
    return dsl.fit(data, formula, {"y": "llm"} if predicted is None else predicted, **how)


def refuse(said, data, *args, error=UserError, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(error, match=said) as caught:
            fit(data, *args, **how)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (at([3, 9], 0.0), r"sampling probabilities must be in \(0, 1\]: p has 0 in rows 3, 9$"),
        (at([7], -0.1), r"must be in \(0, 1\]: p has -0.1 in rows 7$"),
        (at(range(10, 20), 1.5), r"p has 1.5 in rows 10, 11, 12, 13, 14 and 5 more$"),
        (at([0], np.inf), r"p has inf in rows 0$"),
        (at([0], "often"), "sampling probabilities must be numbers: p has 'often'"),
        ([NAN] * N, r"nothing is left: 200 of 200 rows are left out for missing values in p \(200\)"),
    ],
)
def test_probabilities(column, said):
    refuse(said, table(p=column), prob="p")


@pytest.mark.parametrize(
    ("prob", "said"),
    [
        (0.0, r"must be in \(0, 1\]: prob has 0 in rows 0, 1, 2, 3, 4 and 195 more"),
        (1.2, r"must be in \(0, 1\]: prob has 1.2"),
        (NAN, r"must be in \(0, 1\]: prob has nan"),
        ([0.5] * 3, "prob must have one value for each of 200 rows, got 3"),
        ("often", "unknown column 'often'"),
        (np.where(np.arange(N) == 5, -1, 0.4), r"must be in \(0, 1\]: prob has -1 in rows 5"),
    ],
)
def test_given_probabilities(prob, said):
    refuse(said, table(), prob=prob)


def test_a_constant_far_from_the_share_of_labels_is_warned_of():
    with pytest.warns(UserWarning, match="80 of 200 rows have gold labels where 20 were to be expected .* in prob"):
        fit(table(), prob=0.1)
    with pytest.warns(UserWarning, match="80 of 200 rows have gold labels where 180 were to be expected .* in p$"):
        fit(table(p=0.9), prob="p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(table(), prob=0.42)
        fit(table())


@pytest.mark.parametrize(
    ("data", "how", "said"),
    [
        (
            table(y=lambda t: t["truth"].where((t.index < GOLD) | (t.index > 197))),
            {"labelled": "drawn"},
            "rows 198, 199 have a gold label in y although they were not sampled",
        ),
        (
            table(y=lambda t: t["y"].mask(t.index == 4)),
            {"labelled": "drawn"},
            "rows 4 were sampled for a gold label and have none in y",
        ),
        (table(drawn=2), {"labelled": "drawn"}, "the column drawn must be 0 or 1"),
        (table(drawn="yes"), {"labelled": "drawn"}, "the column drawn must be 0 or 1"),
        (table(y=NAN), {}, "no row has a gold label in y"),
        (table(drawn=0, y=NAN), {"labelled": "drawn"}, "no row has a gold label in y"),
        (table(), {"labelled": [True] * 5}, "labelled must have one value for each of 200 rows, got 5"),
        (
            table(w=lambda t: t["z"].where(t.index < 70), v="z"),
            {"formula": "y ~ x + w", "predicted": {"y": "llm", "w": "z"}},
            "rows 70, 71, 72, 73, 74 and 5 more have a gold label in y and not in the other predicted variables",
        ),
    ],
)
def test_labels(data, how, said):
    refuse(said, data, **how)


def test_rows_are_named_as_the_table_names_them():
    data = table(p=at([3], 0.0)).set_axis([f"doc{i}" for i in range(N)])
    refuse("p has 0 in rows doc3$", data, prob="p")


@pytest.mark.parametrize(
    ("rows", "how", "said"),
    [
        (9, {}, "there are 9 gold labels: too few for 5 folds, which need 10 or more"),
        (9, {"folds": 2, "formula": "y ~ x + C(k)"}, "there are 9 gold labels: too few for 1[01] coefficients"),
        (40, {"cluster": "pair"}, "the gold labels lie in 2 clusters: too few for 5 folds"),
        (40, {"cluster": "one"}, "the gold labels lie in 1 clusters: too few for 5 folds"),
    ],
)
def test_too_few_labels(rows, how, said):
    data = table(y=lambda t: t["truth"].where(t.index < rows), k=np.resize(np.arange(10), N), one=1)
    refuse(said, data.assign(pair=np.arange(N) // 20), **how)


@pytest.mark.parametrize(
    ("columns", "formula", "said"),
    [
        ({"w": lambda t: t["x"] + 2 * t["z"]}, "y ~ x + z + w", "columns x, z, w depend linearly on each other"),
        ({"w": 3.0}, "y ~ x + w", "columns Intercept, w depend linearly on each other: leave one out"),
        ({"w": 0.0}, "y ~ x + w", "the column w is 0 in every row that is known: leave it out"),
        ({"w": lambda t: t["x"] * 1e9}, "y ~ x + w", "columns x, w depend linearly"),
        ({}, "y ~ x + I(2 * x)", r"columns x, I\(2 \* x\) depend linearly"),
        ({"w": lambda t: t["g"]}, "y ~ g + w", r"columns g\[T.b\], w\[T.b\] depend|columns .*g\[T.b\].* depend"),
    ],
)
def test_columns_that_depend_on_each_other(columns, formula, said):
    refuse(said, table(**columns), formula)


@pytest.mark.parametrize(
    ("formula", "effects", "said"),
    [
        ("y ~ x + w", ["g"], "w does not vary within g: leave it out, or the fixed effects"),
        ("y ~ x + w + v", ["g", "half"], "v does not vary within g and half|w, v does not vary within g and half"),
        ("y ~ w", ["g"], "w does not vary within g"),
        ("y ~ x + I(x + w)", ["g"], r"columns x, I\(x \+ w\) depend linearly"),
        ("y ~ 1", ["g"], "has no column besides the fixed effects"),
        ("y ~ x", ["G"], "unknown column 'G': did you mean 'g'"),
    ],
)
def test_columns_within_fixed_effects(formula, effects, said):
    data = table(w=lambda t: t["g"].map({"a": 1, "b": 2, "c": 2, "d": 7}), half=np.arange(N) % 3)
    refuse(said, data.assign(v=data["w"] + data["half"]), formula, fixed_effects=effects)


def test_fixed_effects_are_for_lines():
    refuse(
        "fixed effects are for a linear regression, not for a logistic one",
        table(),
        moment="logistic",
        fixed_effects=["g"],
    )


# separation: every gold label known, so that it is the usual regression


def separated(**columns):
    data = table(**columns)
    return data.assign(y=data["truth"])


@pytest.mark.parametrize(
    ("truth", "formula", "named"),
    [
        (lambda t: (t["x"] > 0.3).astype(float), "y ~ x + z", "x"),
        (lambda t: t["truth"].mask(t["g"] == "c", 1.0), "y ~ x + C(g)", "C(g)[T.c]"),
        (lambda t: t["truth"].mask(t["g"] == "c", 0.0), "y ~ x + C(g)", "C(g)[T.c]"),
        (lambda t: t["truth"].mask(t["g"] == "a", 1.0), "y ~ x + C(g)", "C(g)[T.b], C(g)[T.c], C(g)[T.d]"),
        (lambda t: t["truth"].mask((t["g"] == "c") & (t["z"] == 1), 1.0), "y ~ C(g) * z", "C(g)[T.c]:z"),
    ],
)
def test_separation_is_named(truth, formula, named):
    data = separated(truth=truth)
    said = refuse("the outcome is separated by", data, formula, moment="logistic", prob=1.0, error=ConvergenceError)
    assert f"separated by {named}:" in said
    # Neither has it a finite solution elsewhere.
    from statsmodels.tools.sm_exceptions import PerfectSeparationError

    X = fit(data, formula, prob=1.0).problem.X
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            other = sm.Logit(data["y"], X).fit(disp=0, maxiter=200)
            assert not other.mle_retvals["converged"] or np.abs(other.params).max() > 10
        except (PerfectSeparationError, np.linalg.LinAlgError):
            pass


def test_a_category_whose_labels_are_all_alike():
    """Where few are labelled, corrected means lie outside what a category's coefficient can give, or gold alone fails."""
    rare = table(g=lambda t: np.where(t.index.isin([2, 5, 150, 170, 180, 190]), "rare", "usual"))
    rare = rare.assign(y=gold_where(lambda t: t["g"] == "rare", 1.0))
    unsure = rare.assign(llm=rare["llm"].mask(rare["g"] == "rare", 0.5).mask(rare.index.isin([2, 5]), 1.0))
    found = fit(unsure, "y ~ C(g)", moment="logistic", learner="identity")
    assert found.predict()[2] == pytest.approx(2 / 3)
    assert "separated by C(g)[T.usual]" in found.baselines()["gold only"].failed
    high = rare.assign(llm=rare["llm"].mask(rare["g"] == "rare", 1.0).mask(rare.index.isin([2, 5]), 0.0))
    refuse(
        r"C\(g\)\[T.usual\] grow without bound: with so few gold labels there",
        high,
        "y ~ C(g)",
        moment="logistic",
        learner="identity",
        error=ConvergenceError,
    )
    said = refuse("split 1 of 1: the coefficients", high, "y ~ C(g)", moment="logistic", learner="identity")
    assert "merge its categories, or label more" in said


# missing values


def test_rows_that_lack_something_are_left_out_with_a_warning():
    data = table(x=lambda t: t["x"].mask(t.index.isin([1, 5])), z=lambda t: t["z"].mask(t.index == 5))
    with pytest.warns(
        UserWarning, match=r"2 of 200 rows are left out for missing values in x \(2\), z \(1\): rows 1, 5"
    ):
        found = fit(data)
    assert found.nobs == N - 2
    assert found.problem.notes[0].startswith("2 of 200 rows are left out")
    clean = fit(data.dropna(subset=["x", "z"]))
    assert found.params.to_numpy() == pytest.approx(clean.params.to_numpy(), abs=1e-12)


@pytest.mark.parametrize("column", ["llm", "g", "p", "drawn", "c", "f"])
def test_every_column_that_is_used_must_be_there(column):
    r = np.random.default_rng(1)
    data = table(c=np.arange(N) // 4, f=r.normal(size=N))
    data[column] = data[column].astype(object).where(data.index != 190, None)
    with pytest.warns(UserWarning, match=rf"1 of 200 rows are left out for missing values in {column} \(1\): rows 190"):
        found = fit(data, "y ~ x + g", prob="p", labelled="drawn", cluster="c", features=["f"])
    assert found.nobs == N - 1


def test_nothing_is_left():
    refuse(r"nothing is left: 200 of 200 rows are left out for missing values in x \(200\)", table(x=NAN), prob="p")


@pytest.mark.parametrize(
    ("columns", "how", "said"),
    [
        ({"x": lambda t: t["x"].mask(t.index == 8, np.inf)}, {}, "the column x must be finite, and is not in rows 8"),
        ({"f": lambda t: t["x"].mask(t.index == 8, -np.inf)}, {"features": ["f"]}, "the column f must be finite"),
        ({"llm": lambda t: t["llm"].mask(t.index == 8, np.inf)}, {}, "the column llm must be finite"),
        (
            {"y": lambda t: t["y"].mask(t.index == 8, np.inf)},
            {},
            "gold labels of y must be finite, and are not in rows 8",
        ),
        ({"f": np.arange(N).astype(str)}, {"features": ["f"]}, "f has 200 different values: too many for a feature"),
        ({"llm": np.arange(N).astype(str)}, {}, "llm has 200 different values: too many for a feature"),
    ],
)
def test_columns_that_cannot_be_features(columns, how, said):
    refuse(said, table(**columns), **how)


def test_a_formula_may_have_categories_that_are_too_many_to_predict_from():
    data = table(state=np.resize([f"s{i}" for i in range(60)], N))
    data["y"] = data["truth"]
    found = fit(data, "y ~ x + C(state)", prob=1.0)
    assert "state has too many values to predict from" in found.problem.notes


# names


@pytest.mark.parametrize(
    ("args", "how", "said"),
    [
        (("y ~ X + z",), {}, "unknown column 'X': did you mean 'x'"),
        ((), {"predicted": {"y": "lmm"}}, "unknown column 'lmm': did you mean 'llm'"),
        ((), {"features": ["w"]}, "unknown column 'w'"),
        ((), {"cluster": "author"}, "unknown column 'author'"),
        ((), {"labelled": "draw"}, "unknown column 'draw': did you mean 'drawn'"),
        (("truth ~ x",), {}, "the formula 'truth ~ x' does not use the predicted variable y"),
        ((), {"predicted": {}}, "nothing is predicted"),
        ((), {"predicted": {"y": []}}, "the predicted variable y has no surrogate"),
        (("y x",), {}, "the formula 'y x' cannot be read|must be 'outcome ~ columns'"),
        (("y",), {}, "the formula 'y' must be 'outcome ~ columns'"),
        (("~ x + y",), {}, "the formula '~ x \\+ y' must be 'outcome ~ columns'"),
        (("y ~ (x",), {}, r"the formula 'y ~ \(x' cannot be read"),
        (("y + z ~ x",), {}, "must be 'outcome ~ columns', with one outcome"),
        (("y | z ~ x",), {}, "the formula"),
        (("",), {}, "the formula '' "),
        (("y ~ nothing(x)",), {}, "unknown column 'nothing'"),
        (("y ~ np.log(z - 2)",), {}, "cannot be evaluated: .*log"),
        (("y ~ x / 'a'",), {}, "the formula"),
        (("y ~ g + I(g + 1)",), {}, "cannot be evaluated"),
    ],
)
def test_names_and_formulas(args, how, said):
    refuse(said, table(), *args, **how)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DSL("logit"), "unknown moment 'logit': did you mean 'logistic'"),
        (lambda: DSL("ols"), "unknown moment 'ols'"),
        (lambda: DSL(Linear), "DSL.moment must be one of linear, logistic, multinomial, poisson or a Moment"),
        (lambda: DSL(3), "DSL.moment must be one of"),
        (lambda: DSL(learner="forrest"), "unknown learner 'forrest': did you mean 'forest'"),
        (lambda: DSL(learner=Forest), "DSL.learner must be one of forest, generalized, identity or a Learner"),
        (lambda: DSL(folds=1), "DSL.folds must be >= 2, got 1"),
        (lambda: DSL(splits=0), "DSL.splits must be >= 1, got 0"),
        (lambda: DSL(seed=-1), "DSL.seed must be >= 0, got -1"),
        (lambda: DSL(alpha=0.0), r"DSL.alpha must be in \(0, 1\), got 0"),
        (lambda: DSL(alpha=NAN), r"DSL.alpha must be in \(0, 1\), got nan"),
        (lambda: Forest(0), "Forest.trees must be >= 1, got 0"),
        (lambda: Forest(min_samples_leaf=0), "Forest.min_samples_leaf must be >= 1"),
        (lambda: Generalized(0.0), "Generalized.penalty must be finite and > 0, got 0"),
    ],
)
def test_methods(make, said):
    with pytest.raises(UserError, match=said):
        make()


# outcomes


@pytest.mark.parametrize(
    ("moment", "y", "said"),
    [
        ("logistic", lambda t: t["y"] * 2, "the outcome y must be 0 or 1 for a logistic regression, got 2"),
        ("logistic", lambda t: t["y"] * 0.5, "must be 0 or 1 for a logistic regression, got 0.5"),
        (
            "logistic",
            lambda t: t["y"].map({0: "no", 1: "yes"}),
            "the outcome y must be a number for a logistic regression, got '(no|yes)'",
        ),
        ("logistic", lambda t: t["y"] * 0, "the outcome y is 0 wherever it is known"),
        ("linear", lambda t: t["y"].map({0: "no", 1: "yes"}), "the outcome y must be a number for a linear regression"),
        ("poisson", lambda t: t["y"] - 3, "the outcome y must be >= 0 for a poisson regression, got -"),
        ("poisson", lambda t: t["y"].map({0: "no", 1: "yes"}), "the outcome y must be a number for a poisson"),
        ("poisson", lambda t: t["y"] * 0, "the outcome y is 0 wherever it is known"),
        ("multinomial", lambda t: t["y"] * 0, "the outcome y must have two classes or more, got 0"),
        (
            "multinomial",
            lambda t: t["y"].map({0: "no", 1: "no"}),
            "the outcome y must have two classes or more, got no",
        ),
        ("multinomial", lambda t: t["y"] + t["x"], "y has 80 different values: too many for classes"),
    ],
)
def test_outcomes(moment, y, said):
    refuse(said, table(y=y), moment=moment)


@pytest.mark.parametrize(
    ("moment", "formula", "said"),
    [
        ("logistic", "x ~ y", "the outcome x must be 0 or 1 for a logistic regression, got "),
        ("linear", "g ~ y", "the outcome g must be a number for a linear regression, got 'a'"),
        ("poisson", "x ~ y", "the outcome x must be >= 0"),
        ("multinomial", "I(y > 0) ~ x", r"the outcome of a multinomial regression must be a column, got"),
    ],
)
def test_outcomes_that_are_not_predicted(moment, formula, said):
    refuse(said, table(), formula, moment=moment)


def test_a_category_that_is_predicted_as_a_number():
    refuse(
        r"cannot be evaluated: .*outside.*; y must take predictions, any number: transform the column and its surrogate first",
        table(),
        "x ~ C(y)",
    )


# learners


class Broken(RegressorMixin, BaseEstimator):
    def fit(self, X, y):
        return self

    def predict(self, X):
        return np.full(len(X), NAN)


@pytest.mark.parametrize(
    ("learner", "how", "said"),
    [
        (
            LogisticRegression(),
            {"predicted": {"y": "llm"}, "number": True},
            "LogisticRegression is a classifier, and the gold label y is a number",
        ),
        (RidgeClassifier(), {}, "the learner RidgeClassifier must have predict_proba, to predict y"),
        (3, {}, "a learner must be a scikit-learn estimator with fit and predict, got 3"),
        ("identity", {"predicted": {"y": ["llm", "z"]}}, "the learner identity takes one surrogate of y, got 2"),
        (
            "identity",
            {"predicted": {"y": "g"}},
            "the learner identity takes a surrogate of y as it is, and that has not its values",
        ),
        (Broken(), {}, "the learner's predictions of y must be finite, got nan or infinity"),
    ],
)
def test_learners(learner, how, said):
    data = table()
    if how.pop("number", False):
        data["y"] = data["y"] + data["x"]
    refuse(said, data, learner=learner, **how)


# tables


def test_columns_of_one_name():
    data = pd.concat([table(), table()[["x"]]], axis=1)
    refuse("the table has 2 columns named x: rename them", data)
    assert fit(data, "y ~ z").nobs == N  # what is not used may have any name


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (table()[:0], "the data have no rows"),
        ({}, "the data have no rows"),
        ({"x": [1, 2], "y": [1]}, "the columns do not make a table"),
        (3, "data must be a data frame, a mapping of columns or a file, got int"),
        ("nowhere.csv", "nowhere.csv cannot be read: No such file"),
        ("table.docx", r"table.docx must be a .csv, .tsv, .parquet, .jsonl file"),
    ],
)
def test_tables(data, said):
    refuse(said, data)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "t.jsonl"])
def test_files_that_are_something_else(tmp_path, name):
    (tmp_path / name).write_text("" if name == "t.csv" else "{nothing")
    refuse(rf"{name} (is not a \.\w+ table|cannot be read)", tmp_path / name)


# arrays


def arrays(**how):
    t = table()
    X = np.column_stack([np.ones(N), t["x"], t["z"]])
    given = {
        "D": {"y": t["y"].to_numpy(), "X": X},
        "predicted": {"y": t["llm"].to_numpy()},
        "prob": 0.4,
        "features": X[:, 1:],
    }
    return DSL("logistic", "generalized", splits=1).fit_arrays(**(given | how))


X = np.column_stack([np.ones(N), np.arange(N) % 7, np.arange(N) % 2]).astype(float)
Y = table()["y"].to_numpy()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"predicted": {"y": np.ones(3)}}, r"the surrogate of y must have 200 rows, as y has, got \(3,\)"),
        ({"predicted": {"w": np.ones(N)}}, "w is predicted, and there is no such array among y, X"),
        ({"predicted": {}}, "nothing is predicted"),
        ({"features": np.ones((3, 1))}, r"features must have 200 rows, as y has, got \(3, 1\)"),
        ({"features": np.full((N, 1), NAN)}, "features must not be missing: it is in rows 0, 1, 2, 3, 4 and 195 more"),
        ({"clusters": np.ones(3)}, "clusters must have 200 rows"),
        ({"prob": np.full(3, 0.5)}, r"prob must be a number, or one for each of 200 rows, got \(3,\)"),
        ({"prob": 1.5}, r"must be in \(0, 1\]: prob has 1.5"),
        (
            {"labelled": np.arange(N) < 90},
            "rows 80, 81, 82, 83, 84 and 5 more were sampled for a gold label and have none in y",
        ),
        (
            {"labelled": np.arange(N) < 70},
            "rows 70, 71, 72, 73, 74 and 5 more have a gold label in y although they were not",
        ),
        ({"D": {"y": Y, "X": np.where(np.arange(N)[:, None] == 3, NAN, X)}}, "X must not be missing: it is in rows 3"),
        ({"D": {"y": Y * 2, "X": X}}, "the outcome y must be 0 or 1 for a logistic regression, got 2"),
        ({"D": {"y": Y, "X": X[:, [0, 1, 1]]}}, "columns theta 1, theta 2 depend linearly on each other"),
        ({"D": {"y": np.full(N, NAN), "X": X}}, "no row has a gold label in y"),
        ({"D": {"y": np.where(np.isnan(Y), None, "yes"), "X": X}}, "y must hold numbers"),
        ({"predicted": {"y": np.full(N, "yes")}}, "the surrogate of y must hold numbers"),
        ({"names": ["a"]}, "there must be a name for each of 3 coefficients, got 1"),
        (
            {"predicted": {"y": np.where(np.arange(N) == 2, NAN, 1.0)}},
            "the surrogate of y must not be missing: it is in rows 2",
        ),
    ],
)
def test_arrays(how, said):
    with pytest.raises(UserError, match=said):
        arrays(**how)


# what is only unusual


@pytest.mark.parametrize("moment", ["linear", "logistic", "poisson", "multinomial"])
def test_huge_columns_are_solved(moment):
    data = table()
    small = fit(data, moment=moment, learner="identity").fit.dsl
    huge = fit(data.assign(x=data["x"] * 1e9), moment=moment, learner="identity").fit.dsl
    scale = np.array([1, 1e9, 1])
    assert huge.theta * scale == pytest.approx(small.theta, rel=1e-6)
    assert huge.V * np.outer(scale, scale) == pytest.approx(small.V, rel=1e-6, abs=1e-12)
    fitted = fit(data.assign(x=data["x"] * 1e9), moment=moment).fit.dsl  # the learner sees it too
    assert fitted.theta * scale == pytest.approx(fit(data, moment=moment).fit.dsl.theta, rel=1e-4)


def test_columns_far_from_zero():
    data = table()
    near = fit(data, learner="identity").fit.dsl
    far = fit(data.assign(x=data["x"] + 1e4), learner="identity").fit.dsl
    assert far.theta[1:] == pytest.approx(near.theta[1:], rel=1e-6)
    assert far.se[1:] == pytest.approx(near.se[1:], rel=1e-5)
