"""Gradient strategies: how the derivative of an expectation passes through one site, and the sites that pair them.

With k(v) the rest of the program as a surrogate (its value an unbiased estimate, its gradient an unbiased gradient) when
the site takes the value v, sg the stop-gradient, and p the site's density:

    Reparam     k(g(noise; theta))
    Reinforce   l + sg(l - b) (log p(v) - sg log p(v)),            l = k(v), b the baseline
    Enum        sum_v p(v) k(v)
    MVD         l + D (theta - sg theta),                          D = c sg(k(v+) - k(v-)), from a draw of the site's own

The first two need the rest of the program once, so such a site is answered on the spot; the others run it several times.
The side of an MVD that is not the draw is only wanted as a value: there every later site is drawn plainly, so n such sites
cost n + 1 runs, not 2^n. A vector site goes lane by lane: one lane at a time takes its other values, the others stay.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from locum.errors import UserError
from locum.infer import distributions as d
from locum.infer.distribution_base import Branch, Distribution, Key

__all__ = [
    "MVD",
    "Enum",
    "Reinforce",
    "Reparam",
    "Replayed",
    "Site",
    "Strategy",
    "beta_implicit",
    "beta_reinforce",
    "categorical_enum",
    "categorical_reinforce",
    "default_strategy",
    "dirichlet_implicit",
    "dirichlet_reinforce",
    "exponential_reinforce",
    "exponential_reparam",
    "flip_enum",
    "flip_mvd",
    "flip_reinforce",
    "gamma_implicit",
    "gamma_reinforce",
    "integers_enum",
    "integers_reinforce",
    "laplace_reinforce",
    "laplace_reparam",
    "lognormal_reinforce",
    "lognormal_reparam",
    "mv_normal_reinforce",
    "mv_normal_reparam",
    "normal_mvd",
    "normal_reinforce",
    "normal_reparam",
    "poisson_mvd",
    "poisson_reinforce",
    "site",
    "student_t_reinforce",
    "student_t_reparam",
    "uniform_reparam",
]

_FEW = 16  # a bare site with at most this many values is enumerated
Rest = Callable[[Any], jax.Array]  # a value of the site -> the rest of the program, a scalar


class Strategy(ABC):
    """How the gradient passes through a site."""

    @abstractmethod
    def why_not(self, distribution: Distribution) -> str:
        """Why the strategy cannot be used with a distribution; empty if it can."""


class Replayed(Strategy):
    """A strategy that runs the rest of the program more than once."""

    @abstractmethod
    def surrogate(self, distribution: Distribution, key: Key, rest: Rest, plain: Rest) -> jax.Array:
        """The program from this site on: its value with the gradient's terms.

        Args:
            rest: the rest of the program as a surrogate.
            plain: the rest as a value without gradient, later sites drawn plainly.
        """


@dataclass(frozen=True)
class Reparam(Strategy):
    """The draw as a smooth function of the parameters and of noise that has none (implicitly for gamma, beta, dirichlet).

    The rest of the program must be continuous in the draw: where it feeds a branch, a comparison or a discrete density, the
    gradient is silently biased. `audit` finds that.
    """

    def why_not(self, distribution: Distribution) -> str:
        return "" if distribution.smooth else "its draw is no smooth function of its parameters"


@dataclass(frozen=True)
class Reinforce(Strategy):
    """The score function: the final value times the gradient of log p.

    Args:
        baseline: what is taken off the final value before; any number or array that does not depend on this draw.
    """

    baseline: ArrayLike | None = None

    def why_not(self, distribution: Distribution) -> str:
        return "the ends of its support move with its parameters" if distribution.moving else ""


@dataclass(frozen=True)
class Enum(Replayed):
    """All values of a single site, weighted; for a vector site, all values of each lane given the others' draw.

    Args:
        vectorised: run the values side by side (vmap) instead of one after the other.
    """

    vectorised: bool = False

    def why_not(self, distribution: Distribution) -> str:
        return "" if distribution.values is not None else "it has infinitely many values"

    def surrogate(self, distribution: Distribution, key: Key, rest: Rest, plain: Rest) -> jax.Array:
        assert distribution.values is not None
        if distribution.shape:
            return _by_branches(*distribution.lanewise(key), rest, plain, self.vectorised)
        weights, values = distribution.weights(), distribution.values
        if self.vectorised:
            return jnp.sum(weights * jax.vmap(rest)(jnp.asarray(values)))
        return sum((weights[i] * rest(v) for i, v in enumerate(values)), start=jnp.zeros((), weights.dtype))


@dataclass(frozen=True)
class MVD(Replayed):
    """Measure-valued: the derivative as a difference of two runs with coupled draws.

    For flips (either side of the coin), normals (in the mean: Rayleigh steps to either side; in the scale: a double-sided
    Maxwell step) and Poissons (one more). The program may jump.

    Args:
        vectorised: run the other draws side by side (vmap) instead of one after the other.
    """

    vectorised: bool = False

    def why_not(self, distribution: Distribution) -> str:
        return (
            "" if distribution.coupled else "no coupled pair of draws is known for it (it is for flip, normal, poisson)"
        )

    def surrogate(self, distribution: Distribution, key: Key, rest: Rest, plain: Rest) -> jax.Array:
        return _by_branches(*distribution.measure_valued(key), rest, plain, self.vectorised)


def _by_branches(draw: jax.Array, branches: list[Branch], rest: Rest, plain: Rest, vectorised: bool) -> jax.Array:
    """l + sum over branches and lanes of constant (k(plus) - k(minus)) (parameter - sg parameter)."""
    draw = lax.stop_gradient(draw)
    total = rest(draw)
    here = lax.stop_gradient(total)

    def side(other: jax.Array | None) -> jax.Array:
        """The rest of the program with one lane moved, per lane."""
        if other is None:
            return jnp.full(draw.shape, here)
        one = jnp.eye(draw.size, dtype=bool).reshape(draw.size, *draw.shape)
        moved = jnp.where(one, jnp.broadcast_to(other, draw.shape).astype(draw.dtype), draw)
        values = jax.vmap(plain)(moved) if vectorised else jnp.stack([plain(v) for v in moved])
        return values.reshape(draw.shape)

    for b in branches:
        worth = lax.stop_gradient(b.constant * (side(b.plus) - side(b.minus)))
        total = total + jnp.sum(worth * (b.parameter - lax.stop_gradient(jnp.asarray(b.parameter))))
    return total


@dataclass(frozen=True, eq=False)
class Site:
    """A distribution with a strategy: what an expectation program samples from."""

    distribution: Distribution
    strategy: Strategy


def site(distribution: Distribution, strategy: Strategy) -> Site:
    """Pair a distribution with a strategy.

    Raises:
        UserError: for a pair that gives no gradient, with the reason.
    """
    if reason := strategy.why_not(distribution):
        raise UserError(f"{distribution.name} cannot take the strategy {type(strategy).__name__}: {reason}")
    return Site(distribution, strategy)


def default_strategy(distribution: Distribution) -> Strategy:
    """What a bare distribution gets: Reparam if its draw is smooth, Enum up to 16 values, Reinforce for the rest."""
    if distribution.smooth:
        return Reparam()
    few = distribution.values is not None and len(distribution.values) <= _FEW
    return Enum() if few else Reinforce()


def _pair(distribution: Callable[..., Distribution], strategy: type[Any]) -> Callable[..., Site]:
    options = set(strategy.__dataclass_fields__)

    def make(*parameters: Any, **named: Any) -> Site:
        chosen = {name: named.pop(name) for name in options & named.keys()}
        return site(distribution(*parameters, **named), strategy(**chosen))

    make.__doc__ = f"A site of this distribution with {strategy.__name__}; the strategy's own arguments by name."
    return make


# A distribution and a strategy in one call, which takes the arguments of both.
normal_reparam = _pair(d.normal, Reparam)
mv_normal_reparam = _pair(d.mv_normal, Reparam)
uniform_reparam = _pair(d.uniform, Reparam)
lognormal_reparam = _pair(d.lognormal, Reparam)
exponential_reparam = _pair(d.exponential, Reparam)
laplace_reparam = _pair(d.laplace, Reparam)
student_t_reparam = _pair(d.student_t, Reparam)
gamma_implicit = _pair(d.gamma, Reparam)
beta_implicit = _pair(d.beta, Reparam)
dirichlet_implicit = _pair(d.dirichlet, Reparam)
normal_reinforce = _pair(d.normal, Reinforce)
mv_normal_reinforce = _pair(d.mv_normal, Reinforce)
lognormal_reinforce = _pair(d.lognormal, Reinforce)
exponential_reinforce = _pair(d.exponential, Reinforce)
laplace_reinforce = _pair(d.laplace, Reinforce)
student_t_reinforce = _pair(d.student_t, Reinforce)
gamma_reinforce = _pair(d.gamma, Reinforce)
beta_reinforce = _pair(d.beta, Reinforce)
dirichlet_reinforce = _pair(d.dirichlet, Reinforce)
flip_reinforce = _pair(d.flip, Reinforce)
categorical_reinforce = _pair(d.categorical, Reinforce)
integers_reinforce = _pair(d.integers, Reinforce)
poisson_reinforce = _pair(d.poisson, Reinforce)
flip_enum = _pair(d.flip, Enum)
categorical_enum = _pair(d.categorical, Enum)
integers_enum = _pair(d.integers, Enum)
flip_mvd = _pair(d.flip, MVD)
normal_mvd = _pair(d.normal, MVD)
poisson_mvd = _pair(d.poisson, MVD)
