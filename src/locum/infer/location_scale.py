"""Distributions of programs that shift and scale noise: normals of every kind, Laplace, Student's t."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import random
from jax.scipy.special import gammaln
from jax.typing import ArrayLike

from locum.errors import UserError
from locum.infer.distribution_base import Branch, Distribution, Key, Number, check, floating, known

__all__ = ["laplace", "lognormal", "mv_normal", "normal", "student_t"]

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

    def log_prob(self, value: ArrayLike) -> jax.Array:
        z = (jnp.asarray(value) - self.loc) / self.scale
        return jnp.sum(self._log_density(z) - jnp.log(self.scale))

    @abstractmethod
    def _log_density(self, z: jax.Array) -> jax.Array:
        """The log-density at loc 0 and scale 1, lane by lane."""


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

    def sample(self, key: Key) -> jax.Array:
        dtype, shape = floating(self.loc, self.scale)
        return self.loc + self.scale * random.laplace(key, shape, dtype)

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


normal = Normal
mv_normal = MvNormal
lognormal = LogNormal
laplace = Laplace


def student_t(df: Number, loc: Number = 0.0, scale: Number = 1.0) -> StudentT:
    """Student's t, shifted and scaled."""
    return StudentT(loc, scale, df)
