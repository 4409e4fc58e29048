"""Coefficients with their covariance, of one way or of several splits together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Estimates", "Fit", "alike", "combined"]

Array = np.ndarray
GROUPS = 50  # probabilities that are told apart


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
        Omega, J: per split: the middle of the sandwich, and the Jacobian.
        Omega_1: per split, for `DSLResult.power`: the part of Omega that shrinks with more gold labels, by their probability.
        prob: these probabilities, ascending.
        predictions: predicted variable -> g at the gold rows, median over splits.
        fits: how many predictors were fitted.
    """

    dsl: Estimates
    baselines: Mapping[str, Estimates]
    Omega: Float[Array, "splits p p"]
    Omega_1: Float[Array, "splits k p p"]
    J: Float[Array, "splits p p"]
    prob: Float[Array, " k"]
    predictions: Mapping[str, Array]
    fits: int


def alike(prob: Float[Array, " gold"]) -> tuple[Float[Array, " k"], Int[Array, " gold"]]:
    """Rows grouped by their probability: the groups' probabilities, ascending, and which of them each row is in.

    Where there are more than `GROUPS` different ones, neighbours go together under their mean.
    """
    values, codes = np.unique(prob, return_inverse=True)
    if len(values) > GROUPS:
        codes = np.argsort(np.argsort(prob, kind="stable"), kind="stable") * GROUPS // len(prob)
        values = np.bincount(codes, prob) / np.bincount(codes)
    return values, codes.astype(np.int64)


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
