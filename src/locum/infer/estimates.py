"""Coefficients with their covariance, of one way or of several splits together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Estimates", "Fit", "combined"]

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Estimates:
    """Coefficients and their covariance matrix; `failed` says why there are none."""

    theta: Float[Array, " p"]
    V: Float[Array, "p p"]
    failed: str = ""

    @property
    def se(self) -> Float[Array, " p"]:
        return np.sqrt(np.diag(self.V))


@dataclass(frozen=True, eq=False)
class Fit:
    """What the arithmetic gives, before it is dressed for people.

    Args:
        dsl: the estimates.
        baselines: those of simpler ways, by name.
        Omega, Omega_1, J: per split, for `DSLResult.power`: the whole middle of the sandwich, its part that shrinks with more
            gold labels, and the Jacobian.
        predictions: predicted variable -> g at the gold rows, median over splits.
        fits: how many predictors were fitted.
    """

    dsl: Estimates
    baselines: Mapping[str, Estimates]
    Omega: Float[Array, "splits p p"]
    Omega_1: Float[Array, "splits p p"]
    J: Float[Array, "splits p p"]
    predictions: Mapping[str, Array]
    fits: int


def combined(splits: Sequence[Estimates]) -> Estimates:
    """Splits as one: medians of coefficients and of V_s + (theta_s - theta)(theta_s - theta)', made positive semi-definite."""
    if failed := [s for s in splits if s.failed]:
        return failed[0]
    theta = np.median([s.theta for s in splits], axis=0)
    V = np.median([s.V + np.outer(s.theta - theta, s.theta - theta) for s in splits], axis=0)
    V = (V + V.T) / 2
    errors = np.sqrt(np.diag(V))
    units = np.outer(errors, errors) + 1e-300  # as correlations, so that no unit is too small to see
    values, vectors = np.linalg.eigh(V / units)
    if values[0] < -1e-12:
        near = (vectors * np.maximum(values, 0)) @ vectors.T
        scale = np.sqrt(np.diag(near))
        V = near / np.outer(scale, scale) * units  # the standard errors stay
    return Estimates(theta, V)
