"""What design-based supervised learning found, as people who know statsmodels expect it."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from locum.errors import UserError, unknown
from locum.files import write_atomically
from locum.infer.base import Check, Cost, Result
from locum.infer.equations import inverse
from locum.infer.estimates import Estimates, Fit
from locum.infer.moments import Regression
from locum.infer.problem import Problem, design_test
from locum.infer.tables import complete, have_columns, pd, read_table

if TYPE_CHECKING:
    from statsmodels.iolib.summary import Summary

__all__ = ["DSLResult"]

Array = np.ndarray
SUSPICIOUS = 0.001  # p-value of the design below which the probabilities are not believed


class DSLResult(Result):
    """Coefficients that are valid whatever the surrogates' errors, with what simpler ways say beside them.

    `params`, `bse`, `tvalues`, `pvalues`, `conf_int()`, `cov_params()`, `predict()`, `summary()` are as in statsmodels; p-values
    are two-sided and from the normal distribution. `compare()` puts naive and gold-only estimates beside, `power()` and
    `labels_needed()` tell what more gold labels would bring, `check()` whether the sample looks as its probabilities say.
    `method` is the `DSL` that made it.
    """

    def __init__(self, method: Any, problem: Problem, title: str, fit: Fit, seconds: float) -> None:
        self.method, self.problem, self.title, self.fit = method, problem, title, fit
        counts = {"gold labels": len(problem.at), "rows": problem.size, "fitted predictors": fit.fits}
        self.cost = Cost(seconds, counts)

    @property
    def estimate(self) -> "pd.Series":
        """The coefficients."""
        return self.params

    @property
    def params(self) -> "pd.Series":
        return pd.Series(self.fit.dsl.theta, self._names, name="coef")

    @property
    def bse(self) -> "pd.Series":
        """Standard errors."""
        return pd.Series(self.fit.dsl.se, self._names, name="std err")

    @property
    def tvalues(self) -> "pd.Series":
        return (self.params / self.bse).rename("z")

    @property
    def pvalues(self) -> "pd.Series":
        return pd.Series(2 * stats.norm.sf(np.abs(self.tvalues)), self._names, name="P>|z|")

    @property
    def nobs(self) -> int:
        return self.problem.size

    @property
    def ngold(self) -> int:
        return len(self.problem.at)

    @property
    def _names(self) -> list[str]:
        return list(self.problem.names)

    def conf_int(self, alpha: float | None = None) -> "pd.DataFrame":
        """Intervals that cover with probability 1 - alpha, the method's own when left out."""
        low, high = self._limits(self.fit.dsl, alpha)
        return pd.DataFrame({"lower": low, "upper": high}, self._names)

    def cov_params(self) -> "pd.DataFrame":
        return pd.DataFrame(self.fit.dsl.V, self._names, self._names)

    def _limits(self, found: Estimates, alpha: float | None = None) -> tuple[Array, Array]:
        alpha = self.method.alpha if alpha is None else alpha
        if not 0 < alpha < 1:
            raise UserError(f"alpha must be in (0, 1), got {alpha}")
        reach = stats.norm.isf(alpha / 2) * found.se
        return found.theta - reach, found.theta + reach

    def baselines(self) -> Mapping[str, Estimates]:
        """What simpler ways say of the same data: surrogates taken for labels, gold rows alone, and so on."""
        return self.fit.baselines

    def compare(self) -> "pd.DataFrame":
        """Coefficients and standard errors of the method and of simpler ways, side by side."""
        everyone = {"dsl": self.fit.dsl, **self.fit.baselines}
        head = [(name, what) for name in everyone for what in ("coef", "std err")]
        body = np.column_stack([column for e in everyone.values() for column in (e.theta, e.se)])
        return pd.DataFrame(body, self._names, pd.MultiIndex.from_tuples(head))

    def predict(self, data: Any = None, alpha: float | None = None) -> "pd.Series | pd.DataFrame":
        """Means at rows of a table, or of the data themselves when left out. Rows that lack a value are left out.

        Args:
            data: a table with the formula's columns, gold ones for predicted explanatory variables.
            alpha: also give intervals that cover the mean with probability 1 - alpha (not of a multinomial regression).
        """
        moment, theta = self.method.estimand, self.fit.dsl.theta
        if not isinstance(moment, Regression) or self.problem.matrix is None:
            raise UserError("only a regression that was given as a formula can predict")
        if self.problem.effects:
            raise UserError("with fixed effects means cannot be predicted: the effects are taken out, not estimated")
        if data is None:
            if self.problem.X is None:
                raise UserError("explanatory variables are predicted here: give a table that has them")
            X, index = self.problem.X, None
        else:
            table = read_table(data)
            have_columns(table, self.problem.explanatory)
            table, _ = complete(table, self.problem.explanatory)
            X, index = self.problem.matrix(table), table.index
        mean = moment.predict(theta, X)
        if mean.ndim == 2:
            return pd.DataFrame(mean, index, list(self.problem.levels))
        if alpha is None:
            return pd.Series(mean, index, name="mean")
        if not 0 < alpha < 1:
            raise UserError(f"alpha must be in (0, 1), got {alpha}")
        G = moment.gradient(theta, X)
        reach = stats.norm.isf(alpha / 2) * np.sqrt(np.einsum("ij,jk,ik->i", G, self.fit.dsl.V, G))
        return pd.DataFrame({"mean": mean, "lower": mean - reach, "upper": mean + reach}, index)

    def power(self, labels: Sequence[int] | None = None) -> "pd.DataFrame":
        """Standard errors to be expected with other numbers of gold labels, drawn in the same proportions.

        Probabilities keep their proportions, and none goes past 1.

        Args:
            labels: how many in all; from half to eight times the present number when left out, at most one for each row.
        """
        n, N = self.ngold, self.nobs
        if labels is None:
            labels = sorted({min(round(n * k), N) for k in (0.5, 1, 1.5, 2, 3, 4, 8) if n * k >= 1})
        for count in labels:
            if not 0 < count <= N:
                raise UserError(f"the number of gold labels must be from 1 to {N}, the number of rows, got {count}")
        table = pd.DataFrame([self._se(count / n) for count in labels], columns=self._names)
        return table.set_axis(pd.Index(labels, name="gold labels"))

    def labels_needed(
        self, coefficient: str, se: float | None = None, effect: float | None = None, power: float = 0.8
    ) -> int | None:
        """How many gold labels in all bring a coefficient's standard error down to `se`, or find an `effect` of this size.

        Args:
            coefficient: its name.
            se: the standard error that is wanted.
            effect: the true size that is to be told from 0 at level alpha, in place of `se`.
            power: with what probability.

        Returns:
            The number; None where labels for every row would not do.
        """
        if coefficient not in self.problem.names:
            raise unknown("coefficient", coefficient, self.problem.names)
        if (se is None) == (effect is None):
            raise UserError("say which standard error is wanted, or which effect is to be found: one of the two")
        if not 0 < power < 1:
            raise UserError(f"power must be in (0, 1), got {power}")
        if effect == 0:
            raise UserError("the effect must not be 0: none is told from 0 by any number of labels")
        if effect is not None:
            se = abs(effect) / (stats.norm.isf(self.method.alpha / 2) + stats.norm.ppf(power))
        assert se is not None
        if not se > 0:
            raise UserError(f"the standard error must be > 0, got {se}")
        at = self._names.index(coefficient)
        low, high = 0, self.nobs
        if self._se(high / self.ngold)[at] > se:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._se(middle / self.ngold)[at] <= se else (middle, high)
        return high

    def _se(self, rho: float) -> Array:
        """Standard errors with rho times the gold labels: Omega(rho) = Omega_1(rho) + (Omega - Omega_1), median over splits.

        Omega_1 is a mean of (R / pi)(1 / pi)(m - mhat)(m - mhat)', where the second pi is the one to come. As the difference is
        an estimate, it may fall below 0 for many labels; an error never falls faster than by the root of the largest growth.
        """
        now, moving = self._variances
        grown = self._growth(rho)
        variances = now + (moving * (1 / grown - 1)[None, :, None]).sum(1)
        variances = np.maximum(variances, now / max(grown.max(), 1.0))
        scale = self.fit.dsl.se / np.sqrt(np.median(now, axis=0))  # what drawing folds anew adds
        return scale * np.sqrt(np.median(variances, axis=0))

    @cached_property
    def _variances(self) -> tuple[Array, Array]:
        """Of each split: N times the coefficients' variances [splits, p], and Omega_1's part of them by probability."""
        A = np.stack([inverse(J) for J in self.fit.J])
        now = np.einsum("sij,sjk,sik->si", A, self.fit.Omega, A)
        return now, np.einsum("sij,sujk,sik->sui", A, self.fit.Omega_1, A)

    def _growth(self, rho: float) -> Array:
        """By how much each probability grows with rho times the labels: as much as the others, until it is 1."""
        prob, most = self.method.probabilities(self.problem), 1 / self.fit.prob
        if rho <= 1 or prob.max() * rho <= 1:
            return np.full(len(most), rho)
        wanted, low, high = min(rho * prob.sum(), len(prob)), rho, 1 / prob.min()
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(middle * prob, 1).sum() < wanted else (low, middle)
        return np.maximum(np.minimum(high, most), 1.0)

    def check(self) -> Check:
        """Whether the gold rows look drawn with the probabilities given, and how well predictions stand in for gold labels.

        Weighted by R / pi, the gold rows must have the means of all rows in surrogates and features: a chi-square test of the
        differences, against their variance under independent draws. Labels that were taken where it was easy fail it, as a rule.
        """
        problem = self.problem
        features = np.column_stack([v.features for v in problem.predicted.values()])
        chi2, rank, p = design_test(features, self.method.probabilities(problem), problem.at)
        figures: dict[str, Any] = {"design_chi2": chi2, "design_df": rank, "design_p": p} | self._stand_in_figures()
        said = (
            f"the {self.ngold} gold rows look as their probabilities say (chi-square {chi2:.1f} on {rank}, p = {p:.2g})"
            if p >= SUSPICIOUS
            else f"the {self.ngold} gold rows do not look drawn with these probabilities (chi-square {chi2:.1f} on {rank}, "
            f"p = {p:.1g}): the intervals cannot be relied on"
        )
        worth = figures["labels_worth"]
        more = f"; one gold label does the work of {worth:.2f} used alone" if worth is not None else ""
        fitted = "; as these were fitted to the very rows, that says little" if problem.estimated else ""
        return Check(p >= SUSPICIOUS, said + fitted + more, figures)

    def _stand_in_figures(self) -> dict[str, Any]:
        """How much of gold labels' variation predictions and surrogates explain, and what a gold label gains by it."""
        out: dict[str, Any] = {}
        w = 1 / self.method.probabilities(self.problem)[self.problem.at]
        for name, variable in self.problem.predicted.items():
            y = variable.labels
            centre = np.average(y, axis=0, weights=w)
            total = float(w @ ((y - centre) ** 2).reshape(len(y), -1).sum(1))
            rest = float(w @ ((y - self.fit.predictions[name]) ** 2).reshape(len(y), -1).sum(1))
            out[f"explained {name}"] = 1 - rest / total if total > 0 else None
            if variable.stand_in is not None and variable.kind != "number":
                q = variable.stand_in[self.problem.at]
                right = q.argmax(1) == y.argmax(1) if y.ndim == 2 else (q > 0.5) == (y > 0.5)
                out[f"accuracy {name}"] = float(np.average(right, weights=w))
        gold = self.fit.baselines["gold only"]
        out["labels_worth"] = None if gold.failed else float(np.median((gold.se / self.fit.dsl.se) ** 2))
        return out

    def summary(self, alpha: float | None = None) -> "Summary":
        """The table that a regression's readers know, as text, LaTeX, HTML or CSV; simpler ways' estimates stand below it.

        Raises:
            MissingExtra: without statsmodels, whose tables these are.
        """
        from locum.infer.dsl_summary import summary_of

        return summary_of(self, self.method.alpha if alpha is None else alpha)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data."""
        low, high = self._limits(self.fit.dsl)
        check = self.check()

        def told(e: Estimates) -> dict[str, Any]:
            if e.failed:
                return {"failed": e.failed}
            return {"params": _named(self._names, e.theta), "bse": _named(self._names, e.se)}

        return {
            "model": self.title,
            "names": self._names,
            **told(self.fit.dsl),
            "pvalues": _named(self._names, self.pvalues),
            "conf_int": {n: [a, b] for n, a, b in zip(self._names, low.tolist(), high.tolist(), strict=True)},
            "alpha": self.method.alpha,
            "cov_params": self.fit.dsl.V.tolist(),
            "nobs": self.nobs,
            "ngold": self.ngold,
            "baselines": {name: told(e) for name, e in self.fit.baselines.items()},
            "check": {"passed": check.passed, "text": check.text, "figures": dict(check.figures)},
            "notes": list(self.problem.notes),
            "seconds": self.cost.seconds,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    def __repr__(self) -> str:
        return f"<DSLResult of {self.title}: {self.ngold} gold labels of {self.nobs} rows>"


def _named(names: Sequence[str], values: Any) -> dict[str, float]:
    return dict(zip(names, map(float, values), strict=True))
