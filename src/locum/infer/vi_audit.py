"""Whether a stochastic gradient is unbiased, and how noisy it is: estimates held against finite differences of the value.

The value of an expectation program is drawn without any gradient strategy, so a difference of two mean values owes nothing to
the strategies. Both sides use the same keys, which keeps the noise of their difference small.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from locum.errors import UserError
from locum.infer.base import Check
from locum.infer.distribution_base import Key

__all__ = ["as_parameters", "audit", "gradient_noise", "leaf_names", "mean_value"]

_CHUNK = 10_000  # draws at once
_LIMIT = 4.0  # standard errors


@runtime_checkable
class Estimates(Protocol):
    """What an `Expectation` can do."""

    def anchored(self, params: Any) -> "Estimates": ...
    def value(self, key: Key, params: Any, *args: Any) -> jax.Array: ...
    def surrogate(self, key: Key, params: Any, *args: Any) -> jax.Array: ...
    def values(self, key: Key, params: Any, *args: Any, samples: int = 64) -> jax.Array: ...


def leaf_names(params: Any) -> list[str]:
    """The parameters' names, as one would index them: ``params['mu'][0]``."""
    return [f"params{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def as_parameters(params: Any) -> Any:
    """The same tree with arrays as leaves.

    Raises:
        UserError: for a tree without leaves, or a leaf that is not a finite floating-point number or array.
    """
    if not jax.tree.leaves(params):
        raise UserError(f"params must hold at least one number or array, got {params!r}")
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        kind = jnp.result_type(leaf) if isinstance(leaf, int | float | np.ndarray | np.generic | jax.Array) else None
        if kind is None or not jnp.issubdtype(kind, jnp.floating):
            raise UserError(f"{name} must be a floating-point number or array (write 1.0 for 1), got {leaf!r}")
        if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise UserError(f"{name} must be finite, got {leaf!r}")
    return jax.tree.map(jnp.asarray, params)


def mean_value(e: Estimates, key: Key, params: Any, *args: Any, draws: int) -> tuple[float, float]:
    """The mean value and its standard error."""
    n = min(draws, _CHUNK)
    chunks = -(-draws // n)
    values = jax.jit(lambda key: lax.map(lambda k: e.values(k, params, *args, samples=n), random.split(key, chunks)))
    got = np.asarray(values(key), np.float64).ravel()
    return float(got.mean()), float(got.std() / len(got) ** 0.5)


def gradient_noise(e: Estimates, key: Key, params: Any, *args: Any, draws: int = 4096) -> tuple[float, float, float]:
    """Of a single draw: the gradient's standard deviation (root of the variances' sum), the value's, and the mean value."""

    def one(key: Key) -> tuple[jax.Array, Any]:
        return jax.value_and_grad(lambda params: e.surrogate(key, params, *args))(params)

    value, grad = jax.jit(jax.vmap(one))(random.split(key, draws))
    spread = sum(float(np.asarray(g, np.float64).var(0).sum()) for g in jax.tree.leaves(grad))
    value = np.asarray(value, np.float64)
    return spread**0.5, float(value.std()), float(value.mean())


def audit(
    e: Estimates,
    key: Key,
    params: Any,
    *args: Any,
    samples: int = 100_000,
    directions: int = 3,
    step: float = 0.05,
) -> Check:
    """Whether the gradient is the gradient of the value: in random directions, against central differences.

    It finds wrong rules and Reparam sites that feed a branch. The difference is that of two steps extrapolated; by how much
    the two disagree counts as its own error, beside the standard error of the mean.

    Args:
        e: an expectation.
        key: for draws and directions.
        params: where.
        args: what the program takes beside.
        samples: draws per direction.
        directions: how many.
        step: length of the longer step in parameter space.
    """
    params = as_parameters(params)
    for name, n in (("samples", samples), ("directions", directions)):
        if n < 1:
            raise UserError(f"audit: {name} must be >= 1, got {n}")
    if not 0 < step < float("inf"):
        raise UserError(f"audit: step must be finite and > 0, got {step}")
    held = e.anchored(params)
    leaves, tree = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]

    def along(direction: jax.Array) -> Any:
        parts = jnp.split(direction, np.cumsum(sizes)[:-1])
        return tree.unflatten([p.reshape(leaf.shape).astype(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)])

    def one(key: Key, d: Any) -> jax.Array:
        def at(h: float) -> jax.Array:
            return held.value(key, jax.tree.map(lambda p, t: p + h * t, params, d), *args)

        slope = jax.jvp(lambda params: e.surrogate(key, params, *args), (params,), (d,))[1]
        wide, narrow = (at(step) - at(-step)) / (2 * step), (at(step / 2) - at(-step / 2)) / step
        return jnp.stack([slope, wide, narrow])

    n = min(samples, _CHUNK)
    chunks = -(-samples // n)

    @jax.jit
    def draws(key: Key, d: Any) -> jax.Array:
        return lax.map(lambda k: jax.vmap(one, in_axes=(0, None))(random.split(k, n), d), random.split(key, chunks))

    rows = []
    for i in range(directions):
        way = random.normal(random.fold_in(key, 2 * i), (sum(sizes),))
        got = np.asarray(draws(random.fold_in(key, 2 * i + 1), along(way / jnp.linalg.norm(way))), np.float64)
        slope, wide, narrow = got.reshape(-1, 3).T
        gap = slope - (4 * narrow - wide) / 3
        own = abs((narrow - wide).mean()) / 3 + 1e-4 * (1 + abs(slope.mean()))
        error = (gap.std() ** 2 / len(gap) + own**2) ** 0.5
        rows.append(
            {"gradient": slope.mean(), "difference": (slope - gap).mean(), "error": error, "z": gap.mean() / error}
        )
    rows = [{name: float(x) for name, x in row.items()} for row in rows]
    worst = max(rows, key=lambda row: abs(row["z"]) if np.isfinite(row["z"]) else np.inf)
    passed = bool(abs(worst["z"]) < _LIMIT)
    text = (
        f"the gradient {'agrees' if passed else 'does not agree'} with finite differences of the value in {directions} random "
        f"directions: at worst {worst['gradient']:.4g} against {worst['difference']:.4g}, {abs(worst['z']):.1f} errors apart "
        f"(limit {_LIMIT:g})"
    )
    return Check(passed, text, {"directions": rows, "samples": n * chunks, "step": step})
