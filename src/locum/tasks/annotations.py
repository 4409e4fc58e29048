"""Documents that a model has annotated and an expert a few of: simulated, so that the true coefficients are known.

A document has two explanatory variables, x1 ~ N(0, 1) and x2 ~ Bernoulli(1/2), and what an expert would say of it is

    truth ~ Bernoulli(1 / (1 + exp(-(b0 + b1 x1 + b2 x2))))

The model's annotation differs from it by an error of one of three kinds: "differential", whose rates hang on x2 and on the
truth, so that it passes for right (89 % of the time) and moves every coefficient; an accuracy, the same for all; "coin",
which says nothing at all. Experts label documents drawn at random: "equal", so many of all, or "unequal", each by itself with
a probability three times as high where x2 = 1.

>>> simulation = Simulation(n=2000, gold=300)
>>> columns = simulation.draw(seed=0)
>>> sorted(columns), int((~np.isnan(columns["y"])).sum())
(['prob', 'q', 'truth', 'x1', 'x2', 'y'], 300)
"""

from dataclasses import dataclass

import numpy as np

from locum.method import require

__all__ = ["Simulation"]

# Pr(error) where x2 = 0 and x2 = 1, by what is true: 0, 1. arXiv 2306.04746 calls such errors differential.
DIFFERENTIAL = ((0.16, 0.02), (0.02, 0.20))


@dataclass(frozen=True)
class Simulation:
    """What is drawn.

    Args:
        n: documents; >= 2.
        gold: how many have an expert's label, in the mean where the design is unequal; from 1 to n, to 2/3 n where it is.
        design: "equal" or "unequal".
        surrogate: "differential", "coin", or the model's accuracy in [0, 1].
        beta: the true coefficients of 1, x1 and x2.
    """

    n: int = 2000
    gold: int = 300
    design: str = "equal"
    surrogate: str | float = "differential"
    beta: tuple[float, float, float] = (-0.5, 0.8, 0.6)

    def __post_init__(self) -> None:
        require(self, "n", self.n >= 2, ">= 2")
        require(self, "design", self.design in ("equal", "unequal"), "equal or unequal")
        most = self.n if self.design == "equal" else 2 * self.n // 3
        require(self, "gold", 1 <= self.gold <= most, f"from 1 to {most}")
        named = self.surrogate in ("differential", "coin")
        rate = not isinstance(self.surrogate, str) and 0 <= self.surrogate <= 1
        require(self, "surrogate", named or rate, "differential, coin, or an accuracy in [0, 1]")
        require(self, "beta", len(self.beta) == 3 and bool(np.isfinite(self.beta).all()), "three finite numbers")

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """Columns of n rows: x1, x2, the model's annotation q, the expert's y (nan where there is none), prob, truth."""
        r = np.random.default_rng(seed)
        x1, x2 = r.normal(size=self.n), (r.random(self.n) < 0.5).astype(float)
        eta = self.beta[0] + self.beta[1] * x1 + self.beta[2] * x2
        truth = (r.random(self.n) < 1 / (1 + np.exp(-eta))).astype(float)
        llm = np.where(r.random(self.n) < self._errors(x2, truth), 1 - truth, truth)
        if self.design == "equal":
            prob, drawn = np.full(self.n, self.gold / self.n), np.zeros(self.n, dtype=bool)
            drawn[r.permutation(self.n)[: self.gold]] = True
        else:
            prob = np.where(x2 == 1, 1.5, 0.5) * self.gold / self.n
            drawn = r.random(self.n) < prob
        return {"x1": x1, "x2": x2, "q": llm, "y": np.where(drawn, truth, np.nan), "prob": prob, "truth": truth}

    def _errors(self, x2: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """How likely each annotation is to be wrong."""
        if self.surrogate == "differential":
            return np.array(DIFFERENTIAL)[x2.astype(int), truth.astype(int)]
        return np.full(self.n, 0.5 if self.surrogate == "coin" else 1 - float(self.surrogate))
