"""Distributions of programs with finite or countable support: flips, categories, integers, counts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.scipy.special import gammaln, logsumexp, xlogy
from jax.typing import ArrayLike

from locum.errors import UserError
from locum.infer.distribution_base import Branch, Distribution, Key, Number, check

__all__ = ["categorical", "flip", "integers", "poisson"]

_TINY = 1e-7  # how far the logarithm of a flip keeps from 0 and 1; its probability itself is left as it is


@dataclass(frozen=True, eq=False)
class Flip(Distribution):
    """True with probability p."""

    p: Number
    name: ClassVar[str] = "flip"
    coupled: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "in [0, 1]", p=self.p)

    @property
    def values(self) -> np.ndarray:
        return np.array([False, True])

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.p)

    def sample(self, key: Key) -> jax.Array:
        return random.bernoulli(key, jax.lax.stop_gradient(self.p), self.shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        p = jnp.clip(self.p, _TINY, 1 - _TINY)
        return jnp.sum(jnp.where(jnp.asarray(value).astype(bool), jnp.log(p), jnp.log1p(-p)))

    def weights(self) -> jax.Array:
        p = jnp.asarray(self.p)
        return jnp.stack([1 - p, p], -1)

    def measure_valued(self, key: Key) -> tuple[jax.Array, list[Branch]]:
        draw = self.sample(key)
        return draw, [Branch(self.p, jnp.where(draw, 1.0, -1.0), None, ~draw)]

    lanewise = measure_valued  # with two values, both are the same difference


@dataclass(frozen=True, eq=False)
class Categorical(Distribution):
    """0 .. K-1 by *logits* along the last axis (unnormalised log-probabilities, never probabilities)."""

    logits: Number
    name: ClassVar[str] = "categorical"

    def refuse(self) -> None:
        if not jnp.shape(self.logits):
            raise UserError(f"categorical: logits must be an array [..., values], got {self.logits!r}")

    @property
    def values(self) -> np.ndarray:
        return np.arange(jnp.shape(self.logits)[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.logits)[:-1]

    def sample(self, key: Key) -> jax.Array:
        return random.categorical(key, jax.lax.stop_gradient(jnp.asarray(self.logits)))

    def log_prob(self, value: ArrayLike) -> jax.Array:
        logits = jnp.asarray(self.logits)
        chosen = jnp.take_along_axis(logits, jnp.asarray(value, int)[..., None], -1)[..., 0]
        return jnp.sum(chosen - logsumexp(logits, -1))

    def weights(self) -> jax.Array:
        return jax.nn.softmax(jnp.asarray(self.logits), -1)


@dataclass(frozen=True, eq=False)
class Integers(Distribution):
    """low .. high - 1, each as likely."""

    low: int
    high: int
    name: ClassVar[str] = "integers"

    def refuse(self) -> None:
        if not self.low < self.high:
            raise UserError(f"integers: high must be above low, got low {self.low} and high {self.high}")

    @property
    def values(self) -> np.ndarray:
        return np.arange(self.low, self.high)

    def sample(self, key: Key) -> jax.Array:
        return random.randint(key, (), self.low, self.high)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        inside = (jnp.asarray(value) >= self.low) & (jnp.asarray(value) < self.high)
        return jnp.sum(jnp.where(inside, -math.log(self.high - self.low), -jnp.inf))

    def weights(self) -> jax.Array:
        return jnp.full(self.high - self.low, 1 / (self.high - self.low))


@dataclass(frozen=True, eq=False)
class Poisson(Distribution):
    """Poisson, mean rate. Its draws need jax's default kind of key."""

    rate: Number
    name: ClassVar[str] = "poisson"
    coupled: ClassVar[bool] = True

    def refuse(self) -> None:
        check(self.name, "> 0", rate=self.rate)

    @property
    def shape(self) -> tuple[int, ...]:
        return jnp.shape(self.rate)

    def sample(self, key: Key) -> jax.Array:
        return random.poisson(key, jax.lax.stop_gradient(self.rate), self.shape)

    def log_prob(self, value: ArrayLike) -> jax.Array:
        value = jnp.asarray(value, float)
        log = xlogy(value, self.rate) - self.rate - gammaln(value + 1)
        return jnp.sum(jnp.where(value >= 0, log, -jnp.inf))

    def measure_valued(self, key: Key) -> tuple[jax.Array, list[Branch]]:
        draw = self.sample(key)
        return draw, [Branch(self.rate, 1.0, draw + 1, None)]


flip = Flip
categorical = Categorical
integers = Integers
poisson = Poisson
