"""Regressions as moments: m(D; theta) = X (y - mu(X theta)), affine in y, whatever y is.

An outcome may be a pseudo-outcome: any real number, also outside [0, 1] for a logistic regression and below 0 for a Poisson
one. No likelihood is evaluated, only moments, so that nothing has to be clipped.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy.special import expit, softmax

from locum.errors import UserError
from locum.infer.base import Columns, Moment

__all__ = ["Linear", "Logistic", "Multinomial", "Poisson", "Regression"]

Array = np.ndarray


class Regression(Moment):
    """A regression of "y" on "X" whose mean is a function of X theta."""

    title: ClassVar[str]

    @abstractmethod
    def mean(self, eta: Array) -> Array:
        """The mean at the linear predictor eta."""

    @abstractmethod
    def slope(self, eta: Array) -> Array:
        """Its derivative."""

    def outcome(self, y: Array, name: str) -> Array:
        """Gold labels as the moment reads them.

        Raises:
            UserError: for labels that this regression cannot have, naming the column and the first of them.
        """
        if y.dtype.kind not in "biuf":
            raise UserError(f"the outcome {name} must be a number for a {self.title} regression, got {y[0]!r}")
        return y.astype(float)

    def m(self, theta: Float[Array, " p"], D: Columns) -> Float[Array, "rows p"]:
        return D["X"] * (D["y"] - self.mean(D["X"] @ theta))[:, None]

    def jac(self, theta: Float[Array, " p"], D: Columns, weights: Float[Array, " rows"]) -> Float[Array, "p p"]:
        X = D["X"]
        return -(X * (weights * self.slope(X @ theta))[:, None]).T @ X

    def start(self, D: Columns) -> Float[Array, " p"]:
        return np.zeros(D["X"].shape[1])

    def predict(self, theta: Float[Array, " p"], X: Float[Array, "rows columns"]) -> Float[Array, "rows ..."]:
        """Means at rows of X."""
        return self.mean(X @ theta)

    def gradient(self, theta: Float[Array, " p"], X: Float[Array, "rows columns"]) -> Float[Array, "rows ..."]:
        """Derivatives of the means by theta: a last axis more than `predict` has."""
        return X * self.slope(X @ theta)[:, None]


@dataclass(frozen=True)
class Linear(Regression):
    """Least squares: the mean is X theta."""

    title = "linear"

    def mean(self, eta: Array) -> Array:
        return eta

    def slope(self, eta: Array) -> Array:
        return np.ones_like(eta)


@dataclass(frozen=True)
class Logistic(Regression):
    """Logistic regression of an outcome that is 0 or 1."""

    title = "logistic"

    def outcome(self, y: Array, name: str) -> Array:
        y = super().outcome(y, name)
        if (bad := y[(y != 0) & (y != 1)]).size:
            raise UserError(f"the outcome {name} must be 0 or 1 for a logistic regression, got {bad[0]:g}")
        if y.min() == y.max():
            raise UserError(
                f"the outcome {name} is {y[0]:g} wherever it is known: a logistic regression needs both 0 and 1"
            )
        return y

    def mean(self, eta: Array) -> Array:
        return expit(eta)

    def slope(self, eta: Array) -> Array:
        p = expit(eta)
        return p * (1 - p)


@dataclass(frozen=True)
class Poisson(Regression):
    """Poisson regression of a count, or of anything that is not negative: the mean is exp(X theta)."""

    title = "poisson"

    def outcome(self, y: Array, name: str) -> Array:
        y = super().outcome(y, name)
        if (bad := y[~(y >= 0)]).size:
            raise UserError(f"the outcome {name} must be >= 0 for a poisson regression, got {bad[0]:g}")
        if not y.any():
            raise UserError(f"the outcome {name} is 0 wherever it is known: a poisson regression needs more than that")
        return y

    def mean(self, eta: Array) -> Array:
        with np.errstate(over="ignore"):  # a step of Newton's method that went too far is halved
            return np.exp(eta)

    def slope(self, eta: Array) -> Array:
        return self.mean(eta)

    def start(self, D: Columns) -> Float[Array, " p"]:
        X, mean = (
            D["X"],
            float(np.mean(D["y"])),
        )  # the mean of all rows, as near as X comes: so units of y do not matter
        return np.linalg.lstsq(X.T @ X, X.sum(0) * np.log(mean), rcond=None)[0] if mean > 0 else super().start(D)


@dataclass(frozen=True)
class Multinomial(Regression):
    """Multinomial logistic regression: y [rows, classes] are indicators or probabilities, the first class is the base.

    theta holds the coefficients of the second class, then of the third, and so on.
    """

    title = "multinomial"

    def mean(self, eta: Array) -> Array:
        return softmax(eta, axis=-1)

    def slope(self, eta: Array) -> Array:
        """Derivatives of the means [rows, classes] by eta [rows, classes]: [rows, classes, classes]."""
        P = self.mean(eta)
        return np.einsum("nc,cd->ncd", P, np.eye(P.shape[1])) - P[:, :, None] * P[:, None, :]

    def outcome(self, y: Array, name: str) -> Array:
        return y

    def m(self, theta: Float[Array, " p"], D: Columns) -> Float[Array, "rows p"]:
        rest = (D["y"] - self.predict(theta, D["X"]))[:, 1:]
        return (rest[:, :, None] * D["X"][:, None, :]).reshape(len(rest), -1)

    def jac(self, theta: Float[Array, " p"], D: Columns, weights: Float[Array, " rows"]) -> Float[Array, "p p"]:
        X, P = D["X"], self.predict(theta, D["X"])[:, 1:]
        classes, columns = P.shape[1], X.shape[1]
        J = np.empty((classes, columns, classes, columns))
        for c in range(classes):  # [rows, p] is all that is held, never a block per row
            for d in range(c + 1):
                J[c, :, d] = -(X * (weights * P[:, c] * ((c == d) - P[:, d]))[:, None]).T @ X
                J[d, :, c] = J[c, :, d]
        return J.reshape(classes * columns, -1)

    def start(self, D: Columns) -> Float[Array, " p"]:
        return np.zeros((D["y"].shape[1] - 1) * D["X"].shape[1])

    def predict(self, theta: Float[Array, " p"], X: Float[Array, "rows columns"]) -> Float[Array, "rows classes"]:
        eta = X @ theta.reshape(-1, X.shape[1]).T
        return self.mean(np.column_stack([np.zeros(len(X)), eta]))

    def gradient(self, theta: Float[Array, " p"], X: Float[Array, "rows columns"]) -> Float[Array, "rows classes p"]:
        eta = np.column_stack([np.zeros(len(X)), X @ theta.reshape(-1, X.shape[1]).T])
        by_eta = self.slope(eta)[:, :, 1:]
        return np.einsum("ncd,nk->ncdk", by_eta, X).reshape(len(X), eta.shape[1], -1)
