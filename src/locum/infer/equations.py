"""Estimating equations that mix two versions of a row, solved, with their sandwich variance.

A row's moment is a_i m(Dhat_i) + b_i m(D_i): Dhat is the row with predictions in it, D the one with gold labels, which only
some rows have. Design-based supervised learning is a = 1 - R/pi, b = R/pi; predictions alone are a = 1, b = 0; gold labels
alone are a = 0, b = R/pi. The moment of a row without a gold label is never computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from locum.errors import UserError
from locum.infer.base import Columns, Moment

__all__ = [
    "ConvergenceError",
    "Mixed",
    "Solution",
    "collinear",
    "grouped_sums",
    "inverse",
    "meat",
    "sandwich",
    "solve",
]

Array = np.ndarray
STEPS, HALVINGS, CLOSE = 100, 40, 1e-10
FLAT = 1e-6  # curvature, as a share of what it was, at which a root may lie at infinity
ILL = 1e12  # condition of the scaled Jacobian from which on its inverse says nothing


class ConvergenceError(UserError):
    """The estimating equation has no root that could be found."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Rows in two versions.

    Args:
        hat: all rows with predictions, or None where only gold labels count.
        a: weights of hat [rows].
        gold: the rows with gold labels, in the order of `at`; None for none.
        at: which rows those are.
        b: their weights.
    """

    hat: Columns | None
    a: Float[Array, " rows"]
    gold: Columns | None
    at: Int[Array, " gold"]
    b: Float[Array, " gold"]

    @property
    def rows(self) -> int:
        return len(self.a)

    @property
    def parts(self) -> list[tuple[Columns, Array]]:
        return [(D, w) for D, w in ((self.hat, self.a), (self.gold, self.b)) if D is not None]

    def scores(self, moment: Moment, theta: Float[Array, " p"]) -> Float[Array, "rows p"]:
        """The moment of each row."""
        out = np.zeros((self.rows, len(theta)))
        if self.hat is not None:
            out += self.a[:, None] * moment.m(theta, self.hat)
        if self.gold is not None:
            out[self.at] += self.b[:, None] * moment.m(theta, self.gold)
        return out

    def differences(self, moment: Moment, theta: Float[Array, " p"]) -> Float[Array, "gold p"]:
        """m(D) - m(Dhat) of the gold rows; 0 where only one of the two counts."""
        if self.hat is None or self.gold is None:
            return np.zeros((len(self.at), len(theta)))
        return moment.m(theta, self.gold) - moment.m(theta, {k: v[self.at] for k, v in self.hat.items()})

    def mean(self, moment: Moment, theta: Float[Array, " p"]) -> Float[Array, " p"]:
        return sum((w @ moment.m(theta, D) for D, w in self.parts), np.zeros(len(theta))) / self.rows

    def jacobian(self, moment: Moment, theta: Float[Array, " p"]) -> Float[Array, "p p"]:
        """The mean Jacobian."""
        whole = np.zeros((len(theta), len(theta)))
        return sum((moment.jac(theta, D, w) for D, w in self.parts), whole) / self.rows


@dataclass(frozen=True, eq=False)
class Solution:
    """A root, the rows' moments there, the mean Jacobian there, and m(D) - m(Dhat) of the gold rows."""

    theta: Float[Array, " p"]
    scores: Float[Array, "rows p"]
    J: Float[Array, "p p"]
    differences: Float[Array, "gold p"]


def solve(moment: Moment, mixed: Mixed, names: Sequence[str] = ()) -> Solution:
    """Newton's method with halved steps: exact in one step where the moment is linear in theta.

    Raises:
        ConvergenceError: when 100 steps find no root, or coefficients grow without bound.
        UserError: for columns that depend on each other.
    """
    theta = moment.start(mixed.parts[0][0])
    scale = np.sqrt((mixed.scores(moment, theta) ** 2).mean(0))  # the size of one row's moment
    scale[scale == 0] = 1
    value, first = mixed.mean(moment, theta) / scale, mixed.jacobian(moment, theta)
    step = inverse(first, names) @ (value * scale)
    for _ in range(STEPS):
        share = 1.0
        for _ in range(HALVINGS):
            ahead = theta - share * step
            there = mixed.mean(moment, ahead) / scale
            if np.linalg.norm(there) <= (1 - 1e-4 * share) * np.linalg.norm(value) or _near(there):
                break
            share /= 2
        else:
            break
        theta, value = ahead, there
        if _near(value):
            break
        try:
            step = inverse(mixed.jacobian(moment, theta), names) @ (value * scale)
        except UserError:
            break  # far out, where the curvature has vanished
    near, J = _near(value), mixed.jacobian(moment, theta)
    far = _unbounded(moment, mixed, theta, scale, inverse(first, names) @ J, near)
    if far is not None or not near:
        raise ConvergenceError(_no_root(names, far, near))
    theta = theta - inverse(J, names) @ mixed.mean(moment, theta)  # to the last digits
    return Solution(theta, mixed.scores(moment, theta), J, mixed.differences(moment, theta))


def meat(scores: Float[Array, "rows p"], clusters: Int[Array, " rows"] | None = None) -> Float[Array, "p p"]:
    """(1/N) sum of the outer products of the rows' moments, or of their sums by cluster."""
    each = scores if clusters is None else grouped_sums(scores, clusters)
    return each.T @ each / len(scores)


def grouped_sums(values: Float[Array, "rows p"], groups: Int[Array, " rows"]) -> Float[Array, "groups p"]:
    """Sums by group; groups are 0, 1, ..."""
    rows = np.arange(len(groups))
    return sparse.csr_matrix((np.ones(len(groups)), (groups, rows))) @ values


def sandwich(J: Float[Array, "p p"], Omega: Float[Array, "p p"], rows: int) -> Float[Array, "p p"]:
    """V = J^-1 Omega J^-T / N, arXiv 2306.04746; robust to heteroskedasticity (HC0)."""
    A = inverse(J)
    return A @ Omega @ A.T / rows


def collinear(X: Float[Array, "rows columns"], names: Sequence[str]) -> list[str]:
    """The names of columns that depend linearly on each other; none where they are independent."""
    size = np.sqrt((X**2).mean(0))
    if not (size > 0).all():
        return [names[int(np.argmin(size))]]
    gram = (X / size).T @ (X / size) / len(X)
    values, vectors = np.linalg.eigh(gram)
    if values[0] > 1e-12 * values[-1]:
        return []
    null = np.abs(vectors[:, 0])
    return [names[int(j)] for j in np.flatnonzero(null > 1e-3 * null.max())]


def inverse(J: Float[Array, "p p"], names: Sequence[str] = ()) -> Float[Array, "p p"]:
    """The inverse of a Jacobian, whatever the units of its rows and columns.

    Raises:
        ConvergenceError: when it is not finite.
        UserError: when it is singular, naming the columns.
    """
    if not np.isfinite(J).all():
        raise ConvergenceError("the estimating equation cannot be evaluated: its Jacobian is not finite")
    left, right = np.ones(len(J)), np.ones(len(J))
    for _ in range(10):  # until the largest number in each row and column is about 1
        scaled = np.abs(J * left[:, None] * right)
        high, wide = np.sqrt(scaled.max(1)), np.sqrt(scaled.max(0))
        left, right = left / np.where(high > 0, high, 1), right / np.where(wide > 0, wide, 1)
    scaled = J * left[:, None] * right
    _, s, rows = np.linalg.svd(scaled)
    if s[-1] * ILL < s[0] or s[0] == 0:
        which = _named(names, np.abs(rows[-1]), 1e-3)
        raise UserError(f"the coefficients of {which} cannot be told apart by these data: leave one out")
    return np.linalg.inv(scaled) * right[:, None] * left


def _named(names: Sequence[str], size: Array, share: float) -> str:
    """The names of the largest, down to a share of the largest of all."""
    return ", ".join(
        str(names[j]) if j < len(names) else str(j) for j in map(int, np.flatnonzero(size > share * size.max()))
    )


def _near(value: Array, close: float = CLOSE) -> bool:
    return bool(np.isfinite(value).all() and np.abs(value).max() < close)


def _unbounded(moment: Moment, mixed: Mixed, theta: Array, scale: Array, change: Array, near: bool) -> Array | None:
    """How much each coefficient has to do with it that the root lies at infinity, and Newton's method has gone its way.

    Along some direction the curvature has vanished, against what it was at first. Where the outcome is separated there is a
    root further out too: along theta itself if all rows are separated, else along that direction. Where there is none at all,
    corrected outcomes have a mean that no coefficients can give.

    Args:
        change: the Jacobian over what it was at first.
    """
    X = mixed.parts[0][0].get("X")
    if X is None or X.ndim != 2 or len(theta) % X.shape[1] or not np.isfinite(change).all():
        return None
    values, vectors = np.linalg.eig(change)
    if np.abs(values).min() > FLAT:
        return None
    flat = vectors[:, np.abs(values).argmin()].real
    flat *= 5 / np.abs(X @ flat.reshape(-1, X.shape[1]).T).max()  # no linear predictor moves by more
    spread = X.std(0) if X.shape[1] > 1 else np.ones(1)  # columns that vary are to blame, not the intercept
    spread = np.tile(spread, len(theta) // X.shape[1])
    for way in (theta / 2, flat, -flat):
        if near and _near(mixed.mean(moment, theta + way) / scale, 1e-6):
            return np.abs(way) * spread
    return None if near else np.abs(flat) * spread


def _no_root(names: Sequence[str], far: Array | None, near: bool) -> str:
    if far is None:
        return (
            f"the estimating equation has no root within {STEPS} steps: "
            "too few gold labels for so many coefficients, or sampling probabilities that are too small"
        )
    which = _named(names, far, 0.1)
    if near:
        return (
            f"the outcome is separated by {which}: the coefficients grow without bound; "
            "leave the column out, merge its categories, or label more"
        )
    return (
        f"the coefficients of {which} grow without bound: with so few gold labels there, corrected outcomes have a mean that "
        "no coefficients can give; merge its categories, or label more"
    )
