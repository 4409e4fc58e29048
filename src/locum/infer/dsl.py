"""Using Imperfect Surrogates for Downstream Inference: Design-based Supervised Learning for Social Science Applications of Large Language Models

Expensive: an expert's label for every document
Stands in: a model's labels for all, an expert's for a random few of known probability, joined without bias
Check: intervals cover at their nominal rate whatever the model's errors, and are narrower when it is good

Row i has explanatory variables X_i, surrogate labels Q_i, and a gold label Y_i that is seen only if R_i = 1. Which rows an
expert labels was drawn with a known probability pi_i = Pr(R_i = 1 | Q_i, X_i) > 0: that is all that is assumed. A predictor
g_k, fitted on gold rows outside fold k, joins both kinds of label into a pseudo-outcome (eq. 1)

    Y~_i = g_k(Q_i, X_i) + (R_i / pi_i) (Y_i - g_k(Q_i, X_i))        for i in fold k

whose mean over the draw of R is Y_i, whatever g is: g decides the width of an interval, never where it lies. In general, with
D_i the row with gold values and Dhat_i the row with predictions in their place, theta solves

    (1/N) sum_i m~_i(theta) = 0,      m~_i = (1 - R_i / pi_i) m(Dhat_i; theta) + (R_i / pi_i) m(D_i; theta)

which for a regression whose outcome alone is predicted is that regression on Y~. Predicted columns may be outcomes or
explanatory variables. The variance is the sandwich V = J^-1 Omega J^-T / N, Omega = mean of m~ m~', summed by cluster before
where errors are clustered; that g was estimated adds nothing to it.

Folds are drawn anew `splits` times, by cluster where there are any. Coefficients are the medians over splits, the variance is
the median of V_s + (theta_s - theta)(theta_s - theta)'. Beside it stand, always, what one would have had without it: surrogates
taken for labels, gold rows alone (weighted by 1 / pi), predictions alone, and weighting without predictions.

Labels chosen because they were at hand have no known probability; nothing here makes up for that. Rows whose labels were drawn
alike need no `prob`.

Shapes: X [N, p], predictions [N] or [N, classes], coefficients [p]; errors in the units of the coefficients.
Cost: splits x folds fits on gold rows; then O(N p^2) per split. Nothing of size N x N.
Traps: pi that is wrong makes everything wrong, while g may be anything; Y~ lies outside [0, 1], and must not be clipped; a g
that has seen the row it predicts makes intervals too narrow.

Example:
    >>> import numpy as np
    >>> from locum.infer import DSL
    >>> r = np.random.default_rng(0)
    >>> x, expert = r.normal(size=2000), r.random(2000) < 0.15
    >>> y = (r.random(2000) < 1 / (1 + np.exp(-x))).astype(float)          # what an expert would say
    >>> model = np.where(r.random(2000) < np.where(x > 0, 0.3, 0.05), 1 - y, y)   # what a model says: wrong where x is large
    >>> data = {"x": x, "model": model, "y": np.where(expert, y, np.nan)}
    >>> result = DSL(moment="logistic", learner="generalized").fit(data, "y ~ x", predicted={"y": "model"})
    >>> for way, found in {"dsl": result.fit.dsl, **result.baselines()}.items():
    ...     print(f"{way:17} {found.theta[1]:.2f} +/- {found.se[1]:.2f}")
    dsl               1.01 +/- 0.13
    surrogate only    0.55 +/- 0.05
    gold only         1.07 +/- 0.15
    predictions only  0.98 +/- 0.03
    weighting only    1.09 +/- 0.26

Authors: Egami, Hinck, Stewart, Wei
Year: 2023
Venue: NeurIPS 2023
arXiv: 2306.04746
"""  # noqa: E501 - the title is as long as it is

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from locum.errors import UserError, unknown
from locum.infer.base import Columns, Estimator, Moment
from locum.infer.equations import ConvergenceError, Mixed, Solution, meat, sandwich, solve
from locum.infer.estimates import Estimates, Fit, alike, combined
from locum.infer.learners import Fold, Forest, Generalized, Identity, Learner, learner_of
from locum.infer.moments import Linear, Logistic, Multinomial, Poisson
from locum.infer.problem import Problem, from_arrays
from locum.infer.within import solve_within
from locum.method import require
from locum.progress import Bar

if TYPE_CHECKING:  # brings pandas
    from locum.infer.dsl_result import DSLResult

__all__ = ["DSL", "fold_of", "pseudo_outcome", "simpler"]

Array = np.ndarray
MOMENTS: dict[str, type[Moment]] = {
    "linear": Linear,
    "logistic": Logistic,
    "multinomial": Multinomial,
    "poisson": Poisson,
}
BASELINES = ("surrogate only", "gold only", "predictions only", "weighting only")
LEARNERS: dict[str, type[Learner]] = {"forest": Forest, "generalized": Generalized, "identity": Identity}


def pseudo_outcome(
    g: Float[Array, " rows"], y: Float[Array, " rows"], labelled: Bool[Array, " rows"], prob: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """Y~ of eq. 1: predictions, corrected where there is a gold label. What y holds elsewhere is not read."""
    out = g.astype(float)
    out[labelled] += (y[labelled] - g[labelled]) / prob[labelled]
    return out


@dataclass(frozen=True)
class DSL(Estimator):
    """Regression on labels that a model made, valid whatever its errors, because a random few were made by an expert.

    Args:
        moment: what is estimated: "linear", "logistic", "multinomial", "poisson", or a `Moment` of your own.
        learner: how gold labels are predicted: "forest", "generalized", "identity" (the surrogate as it is), a `Learner`, or any
            scikit-learn regressor or classifier.
        folds: parts of the cross-fitting; >= 2.
        splits: how often it is done anew; >= 1. The paper does it once, its software ten times.
        alpha: intervals cover with probability 1 - alpha; in (0, 1).
        normalize_prob: scale the probabilities so that their mean is the share of gold rows.
        seed: fixes folds and learners; >= 0.
    """

    moment: Any = "linear"
    learner: Any = "forest"
    folds: int = 5
    splits: int = 10
    alpha: float = 0.05
    normalize_prob: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "folds", self.folds >= 2, ">= 2")
        require(self, "splits", self.splits >= 1, ">= 1")
        require(self, "alpha", 0 < self.alpha < 1, "in (0, 1)")
        require(self, "seed", self.seed >= 0, ">= 0")
        for field, named, kind in (("moment", MOMENTS, Moment), ("learner", LEARNERS, Learner)):
            value = getattr(self, field)
            if isinstance(value, str) and value not in named:
                raise unknown(field, value, named)
            if isinstance(value, type) or (field == "moment" and not isinstance(value, str | kind)):
                require(self, field, False, f"one of {', '.join(named)} or a {kind.__name__}")

    def fit(
        self,
        data: Any,
        formula: str,
        predicted: Mapping[str, str | Sequence[str]],
        prob: Any = None,
        labelled: Any = None,
        features: Sequence[str] = (),
        cluster: str | None = None,
        fixed_effects: Sequence[str] = (),
        jobs: int = 1,
        progress: bool = False,
    ) -> "DSLResult":
        """Estimate the coefficients of a formula.

        Args:
            data: a data frame, a mapping of columns, or a .csv, .tsv, .parquet or .jsonl file; one row per document.
            formula: "y ~ x1 + C(x2)" with gold columns' names, as in R; C() makes a column categorical, 1 is the mean alone.
            predicted: gold column -> its surrogate or surrogates. A gold column has values where an expert labelled, and is
                missing elsewhere; it may be the outcome or an explanatory variable.
            prob: the probability with which a row was drawn for a gold label: a column, a number, or one per row. When left out,
                all rows had the same. "estimate": from a logistic regression on surrogates and features; the guarantee then rests
                on that regression.
            labelled: a column (or one mark per row) of 0 and 1: whether the row was drawn; when left out, where gold labels are.
            features: further columns to predict from. Surrogates and the formula's observed columns are used anyway.
            cluster: a column: errors are independent between its values only, and folds are made of whole clusters.
            fixed_effects: columns, an effect for each of whose values is taken out (linear regressions).
            jobs: processes among which splits are shared.
            progress: show how far it is.

        Raises:
            UserError: for data that cannot be right, before anything is fitted.
            ConvergenceError: when a regression has no finite solution.
        """
        from locum.infer.formulas import from_formula

        moment = self.estimand
        problem = from_formula(data, formula, moment, predicted, prob, labelled, features, cluster, fixed_effects)
        return self.run(problem, f"{type(moment).__name__.lower()}: {formula}", jobs, progress)

    def fit_arrays(
        self,
        D: Columns,
        predicted: Mapping[str, Any],
        prob: Any = None,
        labelled: Any = None,
        features: Any = None,
        clusters: Any = None,
        design: Callable[[Columns], Columns] | None = None,
        names: Sequence[str] = (),
        jobs: int = 1,
        progress: bool = False,
    ) -> "DSLResult":
        """Estimate from arrays, also for a moment of your own.

        Args:
            D: arrays by name, N rows each: what the moment reads, the built-in ones "y" and "X". Gold labels are nan (or indicators
                all nan) in rows without one.
            predicted: name in D -> its surrogates [N] or [N, k]; the first is the one that stands in.
            prob, jobs, progress: as in `fit`.
            labelled: which rows were drawn [N]; when left out, where gold labels are.
            features: further columns [N, f] to predict from; "X" is not one unless you put it here.
            clusters: a label of each row's cluster [N].
            design: makes what the moment reads of D, where it is not D: for instance an X whose columns are predicted.
            names: of the coefficients.
        """
        problem = from_arrays(
            self.estimand, D, predicted, prob, labelled, features, clusters, design or (lambda columns: columns), names
        )
        return self.run(problem, type(self.estimand).__name__.lower(), jobs, progress)

    @property
    def estimand(self) -> Moment:
        """The moment itself, where it was named."""
        return MOMENTS[self.moment]() if isinstance(self.moment, str) else self.moment

    @property
    def predictor(self) -> Learner:
        """The learner itself, where it was named."""
        return LEARNERS[self.learner]() if isinstance(self.learner, str) else learner_of(self.learner)

    def run(self, problem: Problem, title: str, jobs: int = 1, progress: bool = False) -> "DSLResult":
        """Estimate what a problem describes."""
        from locum.infer.dsl_result import DSLResult

        began = time.perf_counter()
        n, fitted = len(problem.at), not isinstance(self.predictor, Identity)
        if fitted and n < 2 * self.folds:
            raise UserError(
                f"there are {n} gold labels: too few for {self.folds} folds, which need {2 * self.folds} or more"
            )
        if n <= len(problem.names):
            raise UserError(f"there are {n} gold labels: too few for {len(problem.names)} coefficients")
        for name, variable in problem.predicted.items():
            self.predictor.check(variable.kind, name, variable.surrogates)
            if variable.stand_in is None and not fitted:
                raise UserError(
                    f"the learner identity takes a surrogate of {name} as it is, and that has not its values"
                )
        groups = problem.clusters
        if fitted and groups is not None and len(set(groups[problem.at])) < self.folds:
            raise UserError(
                f"the gold labels lie in {len(set(groups[problem.at]))} clusters: too few for {self.folds} folds"
            )
        found = self.estimate(problem, jobs, progress)
        return DSLResult(self, problem, title, found, time.perf_counter() - began)

    def estimate(self, problem: Problem, jobs: int = 1, progress: bool = False) -> Fit:
        """The arithmetic of `run`: the algorithm of the paper, and what stands beside it."""
        weights = 1 / self.probabilities(problem)[problem.at]
        count = 1 if isinstance(self.predictor, Identity) else self.splits  # where nothing is fitted nothing differs
        done = list(self._each(problem, range(count), weights, jobs, progress))
        others = {
            name: combined([d.alone for d in done])
            if name == "predictions only"
            else simpler(name, problem, self.estimand, weights)
            for name in BASELINES
        }
        return Fit(
            combined([d.dsl for d in done]),
            {name: found for name, found in others.items() if found is not None},
            np.stack([d.Omega for d in done]),
            np.stack([d.Omega_1 for d in done]),
            np.stack([d.J for d in done]),
            alike(1 / weights)[0],
            {name: np.median([d.predictions[name] for d in done], axis=0) for name in problem.predicted},
            0 if isinstance(self.predictor, Identity) else count * self.folds * len(problem.predicted),
        )

    def probabilities(self, problem: Problem) -> Float[Array, " rows"]:
        """Those of the problem, scaled where they are to be."""
        scale = len(problem.at) / problem.prob.sum() if self.normalize_prob else 1.0
        return problem.prob * scale

    def _each(self, problem: Problem, splits: range, weights: Array, jobs: int, progress: bool) -> Iterator["_Split"]:
        """Split after split, shown as they end."""
        made: Iterator[_Split] = (self._split(problem, s, weights) for s in splits)
        if jobs > 1 and len(splits) > 1:
            from joblib import Parallel, delayed

            made = Parallel(jobs, return_as="generator")(delayed(self._split)(problem, s, weights) for s in splits)
        if not progress:
            yield from made
            return
        with Bar("dsl", len(splits)) as bar:
            for split in made:
                bar.step(f"{len(problem.at)} gold labels of {problem.size} rows")
                yield split

    def _split(self, problem: Problem, split: int, weights: Array) -> "_Split":
        """Cross-fit once, and solve."""
        g = {name: self._cross_fitted(problem, name, split) for name in problem.predicted}
        hat, ones = problem.rows(g, slice(None)), np.ones(problem.size)
        a = ones.copy()
        a[problem.at] -= weights
        try:
            found = _solve(problem, self.estimand, Mixed(hat, a, problem.gold, problem.at, weights))
        except ConvergenceError as error:
            raise ConvergenceError(f"split {split + 1} of {self.splits}: {error}") from None
        d = weights[:, None] * found.differences
        alone = _try(problem, self.estimand, lambda: Mixed(hat, ones, None, problem.at, weights))
        g = {name: values[problem.at] for name, values in g.items()}
        groups = alike(1 / weights)[1]
        Omega_1 = np.stack([x.T @ x for x in (d[groups == k] for k in range(groups.max() + 1))]) / problem.size
        return _Split(_estimates(problem, found), meat(found.scores, problem.clusters), Omega_1, found.J, g, alone)

    def _cross_fitted(self, problem: Problem, name: str, split: int) -> Float[Array, "rows *classes"]:
        """g of every row, from gold rows in other folds than its own."""
        learner, variable, seed = self.predictor, problem.predicted[name], [self.seed, split]
        kind, labels, features = variable.kind, variable.labels, variable.features
        if isinstance(learner, Identity):
            return learner.predict(Fold(features[problem.at], labels, features, kind, 0))
        fold = fold_of(problem, self.folds, np.random.default_rng(seed))
        out = np.empty((problem.size, *labels.shape[1:]))
        for k in range(self.folds):
            train = fold[problem.at] != k
            rows = np.flatnonzero(fold == k)
            number = int(np.random.default_rng([*seed, k]).integers(2**31))
            here = Fold(features[problem.at[train]], labels[train], features[rows], kind, number)
            out[rows] = learner.predict(here)
        if not np.isfinite(out).all():
            raise UserError(f"the learner's predictions of {name} must be finite, got nan or infinity")
        return out


@dataclass(frozen=True, eq=False)
class _Split:
    dsl: Estimates
    Omega: Array
    Omega_1: Array
    J: Array
    predictions: Mapping[str, Array]
    alone: Estimates


def fold_of(problem: Problem, count: int, draw: np.random.Generator) -> Int[Array, " rows"]:
    """A random part of equal size for each row, or for each cluster; gold ones are dealt out apart, so that none goes short."""
    if problem.clusters is None:
        units, gold = np.arange(problem.size), problem.at
    else:
        units, gold = problem.clusters, np.unique(problem.clusters[problem.at])
    of_unit = np.empty(units.max() + 1, dtype=np.int64)
    rest = np.setdiff1d(np.arange(len(of_unit)), gold)
    for some_units in (gold, rest):
        of_unit[draw.permutation(some_units)] = np.arange(len(some_units)) % count
    return of_unit[units]


def simpler(name: str, problem: Problem, moment: Moment, weights: Float[Array, " gold"]) -> Estimates | None:
    """What one would have had without the method, for a baseline that fits no predictor; None where it has no meaning.

    Args:
        name: of the baseline.
        weights: 1 / pi of the gold rows.
    """
    at, none, ones = problem.at, np.zeros(problem.size), np.ones(problem.size)
    stand_ins = {k: v.stand_in for k, v in problem.predicted.items() if v.stand_in is not None}
    if name == "gold only":
        return _try(problem, moment, lambda: Mixed(None, none, problem.gold, at, weights))
    if name == "surrogate only" and len(stand_ins) == len(problem.predicted):
        return _try(problem, moment, lambda: Mixed(problem.rows(stand_ins, slice(None)), ones, None, at, weights))
    if name == "weighting only" and problem.outcome_only:
        ones[at] -= weights
        return _try(
            problem, moment, lambda: Mixed(problem.rows(problem.zeros, slice(None)), ones, problem.gold, at, weights)
        )
    return None


def _solve(problem: Problem, moment: Moment, mixed: Mixed) -> Solution:
    if problem.effects:
        return solve_within(mixed, problem.effects, problem.names)
    return solve(moment, mixed, problem.names)


def _try(problem: Problem, moment: Moment, mixed: Callable[[], Mixed]) -> Estimates:
    """Estimates of a simpler way, which may fail without spoiling the rest."""
    try:
        return _estimates(problem, _solve(problem, moment, mixed()))
    except UserError as error:
        nothing = np.full(len(problem.names), np.nan)
        return Estimates(nothing, np.full((len(nothing), len(nothing)), np.nan), str(error))


def _estimates(problem: Problem, found: Solution) -> Estimates:
    return Estimates(found.theta, sandwich(found.J, meat(found.scores, problem.clusters), problem.size))
