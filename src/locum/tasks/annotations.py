"""Documents with a model's labels, an expert's for a few, and a regression on them whose coefficients are known.

>>> columns = Simulation(gold=300).draw(seed=0)
>>> sorted(columns), int(np.isfinite(columns["y"]).sum())
(['prob', 'q', 'truth', 'x1', 'x2', 'y'], 300)
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from locum.method import require

__all__ = ["Simulation"]

# How often the surrogate is wrong, by (x2, true label): often on 1 where x2 is 1, and on 0 where x2 is 0.
FLIPS = np.array([[0.16, 0.02], [0.02, 0.20]])
UNEQUAL = (0.1, 0.3)  # probability of a gold label, by x2


@dataclass(frozen=True)
class Simulation:
    """A logistic regression of a label on x1, normal, and x2, 0 or 1, with labels that a model made.

    Args:
        n: documents; >= 1.
        gold: of which so many get an expert's label, where all have the same probability of one; in [1, n].
        design: "equal" draws `gold` documents; "unequal" each by itself, with probability .1, and .3 where x2 is 1.
        surrogate: "differential": errors depend on x2 and on the true label; "coin": nothing to do with it; a number: errors fall
            anywhere, and this share of the labels is right.
        accuracy: of the differential surrogate: the share that is right; .89 when left out.
        beta: the intercept, and the coefficients of x1 and x2.
    """

    n: int = 2000
    gold: int = 300
    design: str = "equal"
    surrogate: str | float = "differential"
    accuracy: float | None = None
    beta: tuple[float, float, float] = (-0.5, 0.8, 0.6)

    def __post_init__(self) -> None:
        require(self, "n", self.n >= 1, ">= 1")
        require(self, "gold", 1 <= self.gold <= self.n, f"from 1 to {self.n}, the number of documents")
        require(self, "design", self.design in ("equal", "unequal"), "equal or unequal")
        known = self.surrogate in ("differential", "coin")
        share = not isinstance(self.surrogate, str) and 0 < self.surrogate <= 1
        require(self, "surrogate", known or share, "differential, coin, or a share in (0, 1]")
        fits = self.accuracy is None or (self.surrogate == "differential" and 0.5 < self.accuracy <= 1)
        require(self, "accuracy", fits, "in (0.5, 1], and for the differential surrogate alone")
        require(self, "beta", len(self.beta) == 3 and bool(np.isfinite(self.beta).all()), "three finite numbers")

    def draw(self, seed: int) -> dict[str, Float[np.ndarray, " n"]]:
        """One data set: "x1", "x2", "q" (the surrogate), "y" (gold, nan where there is none), "prob", "truth"."""
        r = np.random.default_rng(seed)
        x1, x2 = r.normal(size=self.n), (r.random(self.n) < 0.5).astype(float)
        truth = (r.random(self.n) < expit(self.beta[0] + self.beta[1] * x1 + self.beta[2] * x2)).astype(float)
        wrong = r.random(self.n) < self._flips(x2.astype(int), truth.astype(int))
        if self.design == "equal":
            prob = np.full(self.n, self.gold / self.n)
            labelled = np.zeros(self.n, dtype=bool)
            labelled[r.permutation(self.n)[: self.gold]] = True
        else:
            prob = np.array(UNEQUAL)[x2.astype(int)]
            labelled = r.random(self.n) < prob
        y = np.where(labelled, truth, np.nan)
        return {"x1": x1, "x2": x2, "q": np.where(wrong, 1 - truth, truth), "y": y, "prob": prob, "truth": truth}

    def _flips(self, x2: np.ndarray, truth: np.ndarray) -> Float[np.ndarray, " n"]:
        """The probability of an error, document by document."""
        if self.surrogate == "coin":
            return np.full(len(x2), 0.5)
        if not isinstance(self.surrogate, str):
            return np.full(len(x2), 1.0 - self.surrogate)
        scale = 1.0 if self.accuracy is None else (1 - self.accuracy) / self._errors
        return np.clip(scale * FLIPS[x2, truth], 0, 1)

    @property
    def _errors(self) -> float:
        """How often the differential surrogate is wrong, by quadrature over x1."""
        points, weights = np.polynomial.hermite_e.hermegauss(40)
        ones = [
            weights @ expit(self.beta[0] + self.beta[1] * points + self.beta[2] * k) / weights.sum() for k in (0, 1)
        ]
        return float(np.mean([(1 - p) * FLIPS[k, 0] + p * FLIPS[k, 1] for k, p in enumerate(ones)]))
