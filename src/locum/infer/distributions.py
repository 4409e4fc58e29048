"""Distributions of programs. Those of finite or countable support stand in `locum.infer.discrete` and are given on here.

Arrays as parameters make a vector site: independent lanes drawn at once, with one joint log-density.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.special import gammaln, xlogy
from jax.typing import ArrayLike

from locum.errors import UserError
from locum.infer.discrete import categorical, flip, integers, poisson
from locum.infer.distribution_base import Branch, Distribution, Key, Number, check, floating, known

__all__ = [
    "Distribution",
    "beta",
    "categorical",
    "dirichlet",
    "exponential",
    "flip",
    "gamma",
    "integers",
    "laplace",
    "lognormal",
    "mv_normal",
    "normal",
    "poisson",
    "student_t",
    "uniform",
]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class _LocationScale(Distribution):
    """loc + scale * noise, where the noise has no parameter."""

    loc: Number
    scale: Number
    smooth: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "> 0", scale=self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return floating(self.loc, self.scale)[1]

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.loc, self.scale)
        return self.loc + self.scale * self._noise(key, shape, dtype)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        z = (jnp.asarray(value) - self.loc) / self.scale
        return jnp.sum(self._log_density(z) - jnp.log(self.scale))

    def _noise(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        raise NotImplementedError

    def _log_density(self, z: jax.Array) -> jax.Array:
        raise NotImplementedError


class _Gaussian(Distribution):
    """A smooth function of standard normal noise."""

    smooth: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True

    def sample(self, key: Key) -> jax.Array:
        return self.shaped(random.normal(key, self.shape, self.dtype))


@dataclass(frozen=True, eq=False)
class Normal(_Gaussian, _LocationScale):
    """Normal, by mean and standard deviation."""

    name: ClassVar[str] = "normal"
    coupled: ClassVar[bool] = True

    @property
    def dtype(self) -> Any:
        return floating(self.loc, self.scale)[0]

    def shaped(self, noise: jax.Array) -> jax.Array:
        return self.loc + self.scale * noise

    def _log_density(self, z: jax.Array) -> jax.Array:
        return -0.5 * (z * z + _LOG_2PI)

    def measure_valued(self, key: Key) -> tuple[jax.Array, list[Branch]]:
        """Mean: Rayleigh noise w to either side. Scale: the double-sided Maxwell law m against m u, which is normal.

        The draw itself is loc + scale m u, so the scale's negative side is the draw.
        """
        dtype, shape = floating(self.loc, self.scale)
        near, far, ratio = random.split(key, 3)
        w = jnp.sqrt(2 * random.exponential(near, shape, dtype))
        u = random.uniform(ratio, shape, dtype, minval=-1.0)
        m = jnp.sqrt(jnp.sum(random.normal(far, (3, *shape), dtype) ** 2, 0)) * jnp.where(u < 0, -1, 1)
        loc, scale = jax.lax.stop_gradient((jnp.broadcast_to(self.loc, shape), jnp.broadcast_to(self.scale, shape)))
        mean = Branch(self.loc, 1 / (scale * math.sqrt(2 * math.pi)), loc + scale * w, loc - scale * w)
        spread = Branch(self.scale, 1 / scale, loc + scale * m, None)
        terms = [t for t in (mean, spread) if not known(t.parameter)]  # a plain number has no derivative
        return loc + scale * m * jnp.abs(u), terms


@dataclass(frozen=True, eq=False)
class Laplace(_LocationScale):
    """Laplace, variance 2 scale^2."""

    name: ClassVar[str] = "laplace"

    def _noise(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return random.laplace(key, shape, dtype)

    def _log_density(self, z: jax.Array) -> jax.Array:
        return -jnp.abs(z) - math.log(2)


@dataclass(frozen=True, eq=False)
class StudentT(_LocationScale):
    """Student's t, shifted and scaled; its degrees of freedom get an implicit gradient."""

    df: Number
    name: ClassVar[str] = "student_t"

    def refuse(self) -> None:
        check(self.name, "> 0", df=self.df, scale=self.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return floating(self.loc, self.scale, self.df)[1]

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.loc, self.scale, self.df)
        return self.loc + self.scale * random.t(key, jnp.asarray(self.df, dtype), shape, dtype)

    def _log_density(self, z: jax.Array) -> jax.Array:
        df = jnp.asarray(self.df)
        const = gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * jnp.log(df * math.pi)
        return const - (df + 1) / 2 * jnp.log1p(z * z / df)


@dataclass(frozen=True, eq=False)
class LogNormal(Normal):
    """exp of a normal."""

    name: ClassVar[str] = "lognormal"
    coupled: ClassVar[bool] = False

    def shaped(self, noise: jax.Array) -> jax.Array:
        return jnp.exp(self.loc + self.scale * noise)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        inside = jnp.asarray(value) > 0
        log = jnp.log(jnp.where(inside, value, 1.0))
        z = (log - self.loc) / self.scale
        return jnp.sum(jnp.where(inside, -0.5 * (z * z + _LOG_2PI) - jnp.log(self.scale) - log, -jnp.inf))


@dataclass(frozen=True, eq=False)
class MvNormal(_Gaussian):
    """Normal vector; `scale` is a vector of standard deviations or a lower triangular factor of the covariance."""

    mean: Number
    scale: ArrayLike  # [d], or [d, d] lower triangular
    name: ClassVar[str] = "mv_normal"

    def refuse(self) -> None:
        mean, scale = jnp.shape(self.mean), jnp.shape(self.scale)
        if len(mean) != 1 or scale not in (mean, mean * 2):
            raise UserError(
                f"mv_normal: mean must have shape [d] and scale [d] or [d, d], lower triangular, got {mean} and {scale}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.mean)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.mean, self.scale, 0.0)

    def shaped(self, noise: jax.Array) -> jax.Array:
        scale = jnp.asarray(self.scale)
        return self.mean + (scale * noise if scale.ndim == 1 else jnp.tril(scale) @ noise)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        scale, away = jnp.asarray(self.scale), value - jnp.asarray(self.mean)
        if scale.ndim == 1:
            z, spread = away / scale, scale
        else:
            z, spread = jax.scipy.linalg.solve_triangular(scale, away, lower=True), jnp.diagonal(scale)
        return jnp.sum(-0.5 * (z * z + _LOG_2PI) - jnp.log(jnp.abs(spread)))


@dataclass(frozen=True, eq=False)
class Uniform(Distribution):
    """Uniform between two bounds."""

    low: Number
    high: Number
    name: ClassVar[str] = "uniform"
    smooth: ClassVar[bool] = True

    def refuse(self) -> None:
        if known(self.low) and known(self.high) and not np.all(np.asarray(self.low) < np.asarray(self.high)):
            raise UserError(f"uniform: high must be above low, got low {self.low!r} and high {self.high!r}")

    @property
    def moving(self) -> bool:
        return not (known(self.low) and known(self.high))

    @property
    def shape(self) -> tuple[int, ...]:
        return floating(self.low, self.high)[1]

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.low, self.high)
        return self.low + (jnp.asarray(self.high) - self.low) * random.uniform(key, shape, dtype)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        value = jnp.asarray(value)
        inside = (value >= self.low) & (value <= self.high)
        return jnp.sum(jnp.where(inside, -jnp.log(jnp.asarray(self.high) - self.low), -jnp.inf))


@dataclass(frozen=True, eq=False)
class Gamma(Distribution):
    """Gamma, mean concentration / rate."""

    concentration: Number
    rate: Number
    name: ClassVar[str] = "gamma"
    smooth: ClassVar[bool] = True
    implicit: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "> 0", concentration=self.concentration, rate=self.rate)

    @property
    def shape(self) -> tuple[int, ...]:
        return floating(self.concentration, self.rate)[1]

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.concentration, self.rate)
        return random.gamma(key, jnp.asarray(self.concentration, dtype), shape, dtype) / self.rate

    def log_prob(self, value: ArrayLike) -> jax.Array:
        a, inside = jnp.asarray(self.concentration), jnp.asarray(value) > 0
        x = jnp.where(inside, value, 1.0)
        log = a * jnp.log(self.rate) + (a - 1) * jnp.log(x) - jnp.asarray(self.rate) * x - gammaln(a)
        return jnp.sum(jnp.where(inside, log, -jnp.inf))


@dataclass(frozen=True, eq=False)
class Exponential(Distribution):
    """Exponential, mean 1 / rate."""

    rate: Number
    name: ClassVar[str] = "exponential"
    smooth: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "> 0", rate=self.rate)

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.rate)

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.rate)
        return random.exponential(key, shape, dtype) / self.rate

    def log_prob(self, value: ArrayLike) -> jax.Array:
        log = jnp.log(self.rate) - jnp.asarray(self.rate) * value
        return jnp.sum(jnp.where(jnp.asarray(value) >= 0, log, -jnp.inf))


@dataclass(frozen=True, eq=False)
class Dirichlet(Distribution):
    """Dirichlet over the last axis."""

    concentration: Number
    name: ClassVar[str] = "dirichlet"
    smooth: ClassVar[bool] = True
    implicit: ClassVar[bool] = True

    def refuse(self) -> None:
        if not jnp.shape(self.concentration):
            raise UserError(f"dirichlet: concentration must be an array, got {self.concentration!r}")
        check(self.name, "> 0", concentration=self.concentration)

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.concentration)

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.concentration)
        return random.dirichlet(key, jnp.asarray(self.concentration, dtype), shape[:-1], dtype)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        a = jnp.asarray(self.concentration)
        return jnp.sum(jnp.sum(xlogy(a - 1, value) - gammaln(a), -1) + gammaln(jnp.sum(a, -1)))


@dataclass(frozen=True, eq=False)
class Beta(Distribution):
    """Beta, mean a / (a + b)."""

    a: Number
    b: Number
    name: ClassVar[str] = "beta"
    smooth: ClassVar[bool] = True
    implicit: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "> 0", a=self.a, b=self.b)

    @property
    def shape(self) -> tuple[int, ...]:
        return floating(self.a, self.b)[1]

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.a, self.b)
        return random.beta(key, jnp.asarray(self.a, dtype), jnp.asarray(self.b, dtype), shape, dtype)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        a, b = jnp.asarray(self.a), jnp.asarray(self.b)
        x = jnp.asarray(value)
        inside = (x > 0) & (x < 1)
        x = jnp.where(inside, x, 0.5)
        log = (a - 1) * jnp.log(x) + (b - 1) * jnp.log1p(-x) + gammaln(a + b) - gammaln(a) - gammaln(b)
        return jnp.sum(jnp.where(inside, log, -jnp.inf))


normal = Normal
mv_normal = MvNormal
uniform = Uniform
lognormal = LogNormal
exponential = Exponential
laplace = Laplace


def student_t(df: Number, loc: Number = 0.0, scale: Number = 1.0) -> StudentT:
    """Student's t, shifted and scaled."""
    return StudentT(loc, scale, df)


gamma = Gamma
beta = Beta
dirichlet = Dirichlet
