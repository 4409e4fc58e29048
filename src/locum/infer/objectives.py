"""Variational objectives as expectation programs. Every one of them is to be *maximised*.

``objective(model, guide, data)`` is a program ``f(sample, params, *args)`` for `expectation`. Model and guide are programs or
stochastic densities over choices by address; both are called with the same params and args, and a model that has no parameters
ignores them. `data` are the model's observed choices; the guide draws all others. With a `marginal` guide ELBO is the
hierarchical objective of the literature (HVI with one inner particle, IWHVI with more) and IWELBO the doubly
importance-weighted one (DIWHVI): random densities make them lower bounds of the same log-evidence.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.scipy.special import logsumexp

from locum.errors import UserError
from locum.infer.densities import SIR, Density, Exact, as_density, normalize
from locum.infer.programs import Program, Sampler
from locum.method import require

__all__ = ["ELBO", "IWELBO", "Objective", "PerDatum", "Renyi", "Sleep", "WakePhi", "WakeTheta"]

Choices = Mapping[str, Any]


class Objective(ABC):
    """A functional of model and guide."""

    @abstractmethod
    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        """The expectation program ``f(sample, params, *args)``."""

    def __call__(
        self, model: Density | Program, guide: Density | Program, data: Choices | None = None
    ) -> Callable[..., jax.Array]:
        return self.program(as_density(model), as_density(guide), dict(data or {}))


def _log_weight(model: Density, guide: Density, data: Choices, sample: Sampler, *args: Any) -> jax.Array:
    """log model - log guide at a draw of the guide's."""
    log_q, z = guide.random_weighted(sample, *args)
    return model.estimate_logpdf(sample, _joined(z, data), *args) - log_q


def _joined(z: Choices, data: Choices) -> dict[str, Any]:
    if both := z.keys() & data.keys():
        raise UserError(f"the guide draws the address {min(both)!r}, which the data fix")
    return {**z, **data}


@dataclass(frozen=True)
class ELBO(Objective):
    """E_q [ log p(z, x) - log q(z) ].

    Args:
        stick_the_landing: leave out the gradient of log q in its own parameters, whose mean is zero; for guides with an exact
            density only. The variance then vanishes as q reaches the posterior.
    """

    stick_the_landing: bool = False

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        if self.stick_the_landing and not isinstance(guide, Exact):
            raise UserError(f"ELBO.stick_the_landing needs a guide with an exact density, got {type(guide).__name__}")

        def f(sample: Sampler, params: Any, *args: Any) -> jax.Array:
            if not self.stick_the_landing:
                return _log_weight(model, guide, data, sample, params, *args)
            _, z = guide.random_weighted(sample, params, *args)
            log_q = guide.estimate_logpdf(sample, z, lax.stop_gradient(params), *args)
            return model.estimate_logpdf(sample, _joined(z, data), params, *args) - log_q

        return f


@dataclass(frozen=True)
class IWELBO(Objective):
    """E log mean of K importance weights p(z_k, x) / q(z_k): no less than the ELBO, at most log p(x).

    Args:
        particles: K; 1 is the ELBO.
    """

    particles: int = 5

    def __post_init__(self) -> None:
        require(self, "particles", self.particles >= 1, ">= 1")

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        return _weighted(model, guide, data, self.particles, 1.0)


@dataclass(frozen=True)
class Renyi(Objective):
    """E log mean of K weights to the power 1 - alpha, over 1 - alpha: the variational Renyi bound's estimate.

    Args:
        alpha: the order, not 1 (the limit there is `ELBO`); 0 is `IWELBO`.
        particles: K.
    """

    alpha: float = 0.5
    particles: int = 5

    def __post_init__(self) -> None:
        require(self, "alpha", abs(self.alpha) < float("inf") and self.alpha != 1, "finite and not 1")
        require(self, "particles", self.particles >= 1, ">= 1")

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        return _weighted(model, guide, data, self.particles, 1 - self.alpha)


def _weighted(model: Density, guide: Density, data: Choices, n: int, power: float) -> Callable[..., jax.Array]:
    def f(sample: Sampler, *args: Any) -> jax.Array:
        log_w = sample.iid(lambda sample: _log_weight(model, guide, data, sample, *args), n)
        return (logsumexp(power * log_w) - jnp.log(n)) / power

    return f


def _posterior_draw(
    model: Density, guide: Density, data: Choices, n: int, sample: Sampler, params: Any, *args: Any
) -> dict[str, Any]:
    """A choice of the latents by importance resampling from the guide, as data: no gradient passes through it."""
    algorithm = SIR(n, _Blind(guide))
    key, still = sample.fresh_key(), sample.constant(params)
    return lax.stop_gradient(normalize(model, algorithm, data).random_weighted(key, still, *args)[1])


@dataclass(frozen=True)
class _Blind(Density):
    """A guide as a proposal: it is not told the data."""

    guide: Density

    def random_weighted(self, sample: Any, params: Any, *args: Any) -> tuple[jax.Array, dict[str, Any]]:
        return self.guide.random_weighted(sample, params, *args[1:])

    def estimate_logpdf(self, sample: Any, choices: Choices, params: Any, *args: Any) -> jax.Array:
        return self.guide.estimate_logpdf(sample, choices, params, *args[1:])


@dataclass(frozen=True)
class PerDatum(Objective):
    """The mean of an objective over many data: each run takes one of them at random, so that a step's samples are a minibatch.

    The arrays in `data` and args have the data along their first axis; args are meant for a guide that reads what it infers from.

    Args:
        objective: what each datum is worth.
    """

    objective: Objective = field(default_factory=ELBO)

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        def f(sample: Sampler, params: Any, *args: Any) -> jax.Array:
            sizes = {len(x) if jnp.ndim(x) else None for x in jax.tree.leaves((data, args))}
            if len(sizes) != 1 or None in sizes:
                raise UserError(
                    f"PerDatum: data and args must be arrays with as many data along the first axis, got {sizes}"
                )
            i = random.randint(sample.fresh_key(), (), 0, sizes.pop())
            datum, mine = jax.tree.map(lambda x: jnp.asarray(x)[i], (data, args))
            return self.objective.program(model, guide, datum)(sample, params, *mine)

        return f


@dataclass(frozen=True)
class WakeTheta(Objective):
    """E log p(z, x), z resampled from K draws of the guide and held constant: moves the model alone.

    Args:
        particles: K.
    """

    particles: int = 5

    def __post_init__(self) -> None:
        require(self, "particles", self.particles >= 1, ">= 1")

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        def f(sample: Sampler, *args: Any) -> jax.Array:
            z = _posterior_draw(model, guide, data, self.particles, sample, *args)
            return model.estimate_logpdf(sample, _joined(z, data), *args)

        return f


@dataclass(frozen=True)
class WakePhi(Objective):
    """E log q(z), z resampled from K draws of the guide and held constant: moves the guide alone.

    Args:
        particles: K.
    """

    particles: int = 5

    def __post_init__(self) -> None:
        require(self, "particles", self.particles >= 1, ">= 1")

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        def f(sample: Sampler, *args: Any) -> jax.Array:
            z = _posterior_draw(model, guide, data, self.particles, sample, *args)
            return guide.estimate_logpdf(sample, z, *args)

        return f


@dataclass(frozen=True)
class Sleep(Objective):
    """E log q(z; x), both simulated from the model and held constant: moves the guide alone.

    The names in `data` say which of the model's choices are observations; their values play no part.

    Args:
        guide_args: from the simulated observations, by address, the guide's args; None: it gets those of the model.
    """

    guide_args: Callable[[dict[str, Any]], tuple[Any, ...]] | None = None

    def program(self, model: Density, guide: Density, data: Choices) -> Callable[..., jax.Array]:
        def f(sample: Sampler, params: Any, *args: Any) -> jax.Array:
            key, still = sample.fresh_key(), sample.constant(params)
            dream = lax.stop_gradient(model.random_weighted(key, still, *args)[1])
            seen, z = {a: dream[a] for a in data}, {a: v for a, v in dream.items() if a not in data}
            mine = args if self.guide_args is None else self.guide_args(seen)
            return guide.estimate_logpdf(sample, z, params, *mine)

        return f
