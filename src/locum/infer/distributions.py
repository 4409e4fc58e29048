"""Distributions of programs. Those of `locum.infer.location_scale` and `locum.infer.discrete` are given on here.

Arrays as parameters make a vector site: independent lanes drawn at once, with one joint log-density.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.special import gammaln, xlogy
from jax.typing import ArrayLike

from locum.errors import UserError
from locum.infer.discrete import categorical, flip, integers, poisson
from locum.infer.distribution_base import Distribution, Key, Number, check, floating, known
from locum.infer.location_scale import laplace, lognormal, mv_normal, normal, student_t

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


uniform = Uniform
exponential = Exponential


gamma = Gamma
beta = Beta
dirichlet = Dirichlet
