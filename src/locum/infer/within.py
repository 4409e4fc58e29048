"""Fixed effects: least squares with an effect for each value of some groups, without a column for any of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from locum.infer.equations import CLOSE, ConvergenceError, Mixed, Solution, inverse

__all__ = ["effects", "solve_within"]

Array = np.ndarray


def solve_within(mixed: Mixed, groups: Sequence[Int[Array, " rows"]], names: Sequence[str] = ()) -> Solution:
    """Least squares with an effect for each value of each of the groups, without a column for any of them.

    With G the indicators, w_i = a_i + b_i and A~ = a Ahat + b A for A = X and y, the effects are profiled out: h(v) are the
    effects that the equations G'(v - w G f) = 0 give each row, and

        J = sum (a Xhat Xhat' + b X X') - X~' h(X~),    c = sum (a Xhat yhat + b X y) - X~' h(y~)

    The moments returned are those of theta alone, effects taken out, so that the sandwich is that of the full regression.
    """
    X, y, w = _tilde(mixed, "X"), _tilde(mixed, "y"), _tilde(mixed, None)
    hX, hy = effects(X, w, groups), effects(y[:, None], w, groups)[:, 0]
    J = sum((D["X"] * v[:, None]).T @ D["X"] for D, v in mixed.parts) - X.T @ hX
    c = sum((D["X"] * v[:, None]).T @ D["y"] for D, v in mixed.parts) - X.T @ hy
    theta = inverse(J / mixed.rows, names) @ (c / mixed.rows)
    f = hy - hX @ theta
    scores = -hX * (y - X @ theta - w * f)[:, None]
    differences = np.zeros((len(mixed.at), len(theta)))
    versions = ((mixed.hat, mixed.a, slice(None), -1), (mixed.gold, mixed.b, mixed.at, 1))
    for D, v, at, sign in versions:
        if D is None:
            continue
        rest = (D["y"] - D["X"] @ theta - f[at])[:, None]
        scores[at] += v[:, None] * D["X"] * rest
        if mixed.hat is not None and mixed.gold is not None:
            here = mixed.at if sign < 0 else slice(None)
            differences += sign * (D["X"][here] * rest[here] - hX[mixed.at] * rest[here])
    return Solution(theta, scores, -J / mixed.rows, differences)


def effects(
    v: Float[Array, "rows k"], w: Float[Array, " rows"], groups: Sequence[Int[Array, " rows"]]
) -> Float[Array, "rows k"]:
    """The sum of the groups' effects at each row, where G'(v - w G f) = 0: group by group in turn, until nothing moves."""
    sums = [sparse.csr_matrix((np.ones(len(g)), (g, np.arange(len(g))))) for g in groups]
    weight = [np.maximum(S @ w, 0.0)[:, None] for S in sums]
    f = [np.zeros((S.shape[0], v.shape[1])) for S in sums]
    tolerance = CLOSE * (np.abs(v).max(0) + 1e-300)
    for _ in range(10_000):
        moved = 0.0
        for k, S in enumerate(sums):
            others = sum((f[j][h] for j, h in enumerate(groups) if j != k), np.zeros_like(v))
            new = np.divide(S @ (v - w[:, None] * others), weight[k], out=np.zeros_like(f[k]), where=weight[k] > 0)
            moved = max(moved, float((np.abs(new - f[k]).max(0) / tolerance).max()))
            f[k] = new
        if len(groups) == 1 or moved <= 1:
            return sum((f[k][g] for k, g in enumerate(groups)), np.zeros_like(v))
    raise ConvergenceError("the fixed effects did not settle in 10,000 turns: too few rows link their groups")


def _tilde(mixed: Mixed, key: str | None) -> Array:
    """a Ahat + b A for A = X or y, or a + b."""
    shape = (mixed.rows, *mixed.parts[0][0]["X"].shape[1:]) if key == "X" else (mixed.rows,)
    out = np.zeros(shape)
    for D, w, at in ((mixed.hat, mixed.a, slice(None)), (mixed.gold, mixed.b, mixed.at)):
        if D is not None:
            out[at] += w if key is None else (w[:, None] if key == "X" else w) * D[key]
    return out
