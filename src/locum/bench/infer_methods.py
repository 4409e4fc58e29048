"""Ways to run a regression on labels that a model made, by name: ours, the simpler ones, and those of ppi-python."""

import importlib.util
import re
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from locum.errors import MissingExtra, UserError, unknown
from locum.infer.base import Moment
from locum.method import settings

if TYPE_CHECKING:
    from locum.infer.dsl import DSL
    from locum.infer.problem import Problem

__all__ = ["BASELINE", "METHODS", "PEERS", "Found", "Way", "has_peer", "way_of"]

Array = np.ndarray
BASELINE = "gold"
SIMPLER = {"gold": "gold only", "naive": "surrogate only", "weighting": "weighting only"}
CROSS_FITTED = ("dsl", "predictions")
PEERS = {"ppi": 1.0, "ppi++": None}  # how much predictions count; None: as much as makes the interval narrowest
METHODS = ("gold", "dsl", *PEERS, "weighting", "predictions", "naive")
SETTINGS = ("learner", "folds", "splits", "normalize_prob")  # what of DSL's a method's text may set
LEARNER = "generalized"
SAID = {
    "gold": "the regression on rows with gold labels alone, weighted by 1 / probability",
    "naive": "the regression on the surrogate as if it were the gold label",
    "weighting": "gold labels by 1 / probability in place of the outcome, 0 elsewhere: no surrogate is used",
    "ppi": "prediction-powered inference of ppi-python: the surrogate is the prediction",
    "ppi++": "ppi-python with its tuning: the surrogate counts as much as makes the intervals narrowest",
}


@dataclass(frozen=True, eq=False)
class Found:
    """One regression: coefficients and standard errors, nan where it `failed`; wall time, and predictors that were fitted."""

    theta: Float[Array, " p"]
    se: Float[Array, " p"]
    seconds: float
    fits: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Way:
    """A method as it was asked for.

    Args:
        text: how it was written.
        name: of the method.
        given: its settings, where it is cross-fitted.
    """

    text: str
    name: str
    given: tuple[tuple[str, Any], ...] = ()

    z: ClassVar[float] = 1.959963984540054  # a 95 % interval reaches so many standard errors

    @cached_property
    def dsl(self) -> "DSL":
        from locum.infer.dsl import DSL

        return DSL(**({"learner": LEARNER} | dict(self.given)))

    @property
    def kind(self) -> Literal["ours", "peer", "plain"]:
        return "ours" if self.name == "dsl" else "peer" if self.name in PEERS else "plain"

    @property
    def said(self) -> str:
        """What it does, in one line."""
        if self.name not in CROSS_FITTED:
            return SAID[self.name]
        how = f"{self.dsl.splits} x {self.dsl.folds} folds, learner {self.dsl.learner}"
        if self.name == "dsl":
            return f"design-based supervised learning: {how}"
        return f"the regression on predictions of gold labels, uncorrected: {how}"

    def unfit(self, problem: "Problem", moment: Moment, alike: bool) -> str:
        """What alone it takes, where it cannot be used on such a problem; "" when it can. `alike`: all rows have one probability."""
        if self.name in PEERS:
            if not alike:
                return "equal probabilities"
            if type(moment).__name__ not in ("Linear", "Logistic"):
                return "linear and logistic regressions"
            if problem.clusters is not None:
                return "independent rows"
        if not problem.outcome_only and self.name in (*PEERS, "weighting"):
            return "a surrogate of the outcome"
        if self.name in (*PEERS, "naive") and any(v.stand_in is None for v in problem.predicted.values()):
            return "surrogates with the gold label's values"
        return ""

    def estimate(self, problem: "Problem", moment: Moment) -> dict[str, Found]:
        """The regression, by this method's name; what came out beside it, by the names of those methods."""
        from locum.infer.dsl import simpler

        began = time.perf_counter()
        if self.name in SIMPLER:
            found = simpler(SIMPLER[self.name], problem, moment, 1 / problem.prob[problem.at])
            assert found is not None
            return {self.name: Found(found.theta, found.se, time.perf_counter() - began, failed=found.failed)}
        p = len(problem.names)
        nothing = np.full(p, np.nan)
        try:
            if self.name in PEERS:
                low, high = _ppi(problem, type(moment).__name__, PEERS[self.name])
                spent = time.perf_counter() - began
                return {self.name: Found((low + high) / 2, (high - low) / 2 / self.z, spent)}
            fit = replace(self.dsl, moment=moment).estimate(problem)
        except (UserError, ArithmeticError, np.linalg.LinAlgError) as error:
            return {self.name: Found(nothing, nothing, time.perf_counter() - began, failed=str(error))}
        spent = time.perf_counter() - began
        alone = fit.baselines["predictions only"]
        return {
            "dsl": Found(fit.dsl.theta, fit.dsl.se, spent, fit.fits),
            "predictions": Found(alone.theta, alone.se, spent, fit.fits, alone.failed),
        }


def _ppi(problem: "Problem", moment: str, tuning: float | None) -> tuple[Array, Array]:
    """The 95 % intervals of ppi-python. Labelled and unlabelled rows are apart there."""
    import ppi_py

    [variable] = problem.predicted.values()
    assert variable.stand_in is not None
    columns = problem.rows({problem.outcome: variable.stand_in}, slice(None))
    X, q, at = columns["X"], columns["y"], problem.at
    rest = np.setdiff1d(np.arange(problem.size), at)
    made = ppi_py.ppi_logistic_ci if moment == "Logistic" else ppi_py.ppi_ols_ci
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what scikit-learn will rename is no news to the user
        low, high = made(X[at], problem.gold["y"], q[at], X[rest], q[rest], alpha=0.05, lam=tuning)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ArithmeticError("its intervals are not finite")
    return low, high


def has_peer() -> bool:
    """Whether ppi-python is installed."""
    return importlib.util.find_spec("ppi_py") is not None


def way_of(text: str) -> Way:
    """The method that a text names, like "gold" or "dsl(learner=forest, folds=3)".

    Raises:
        UserError: for a name, a setting or a value that is not there.
        MissingExtra: for a peer that is not installed.
    """
    text = " ".join(text.split())
    name = text.partition("(")[0].strip().lower()
    if name not in METHODS:
        raise unknown("method of infer", name, METHODS)
    if name in PEERS and not has_peer():
        raise MissingExtra(f"the method {name}", "peers")
    if "(" not in text:
        return Way(name, name)
    if name not in CROSS_FITTED:
        raise UserError(f"the method {name} has no settings, got {text!r}")
    if not re.fullmatch(r"[^()]+\(.*\)", text):
        raise UserError(f"cannot read {text!r}: write a name, or a name with settings like dsl(folds=3)")
    from locum.infer.dsl import DSL

    given = settings(text, DSL, words=True)
    if strange := set(given) - set(SETTINGS):
        raise unknown(f"setting of {name} in a comparison", min(strange), SETTINGS)
    way = Way(f"{name}{text[text.index('(') :]}", name, tuple(sorted(given.items())))
    _ = way.dsl
    return way
