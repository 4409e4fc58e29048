"""Stochastic densities: distributions over choices whose density is only estimated, without bias.

A density answers two questions, with `sample` an expectation program's sampler (whose sites its own become) or a key:

    random_weighted(sample, params, *args) -> (log xi, choices)          choices ~ q   and  E[1 / xi | choices] = 1 / q
    estimate_logpdf(sample, choices, params, *args) -> log zeta          E[zeta] = q(choices)

For a program whose every address is a choice both are its exact log-density. `marginal` forgets some addresses of a program,
`normalize` turns an unnormalised one into an approximate posterior; both lean on importance sampling:

    weight w(u) = target(u) / proposal(u),    Zhat = mean of w(u_i)
    u_i ~ proposal:                                E[Zhat] = Z
    one u_i from the normalised target, rest ~ proposal:   E[1 / Zhat] = 1 / Z

Where the target or the proposal is itself a stochastic density, xi or zeta takes the place of its density: the rule that
belongs to how the choice came about, so that both equations still hold.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from locum.errors import UserError
from locum.infer.discrete import categorical
from locum.infer.programs import Program, Sampler, as_sampler, assess, interpret, simulate
from locum.infer.strategies import Strategy, site

__all__ = ["SIR", "Density", "Exact", "Marginal", "Normalized", "as_density", "marginal", "normalize"]

Choices = Mapping[str, Any]


class Density(ABC):
    """A distribution over choices by address."""

    @abstractmethod
    def random_weighted(self, sample: Any, params: Any, *args: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Choices, and log xi with E[1 / xi | choices] = 1 / density."""

    @abstractmethod
    def estimate_logpdf(self, sample: Any, choices: Choices, params: Any, *args: Any) -> jax.Array:
        """log zeta with E[zeta] = density of the choices."""


@dataclass(frozen=True)
class Exact(Density):
    """A program, all of whose addresses are choices.

    Args:
        program: ``program(sample, params, *args)``.
    """

    program: Program

    def random_weighted(self, sample: Any, params: Any, *args: Any) -> tuple[jax.Array, dict[str, Any]]:
        trace = simulate(self.program, sample, params, *args)
        return trace.log_prob, trace.choices

    def estimate_logpdf(self, sample: Any, choices: Choices, params: Any, *args: Any) -> jax.Array:
        return assess(self.program, choices, params, *args)[0]


def as_density(program: Density | Program) -> Density:
    """A density as it is, a program as an exact one."""
    return program if isinstance(program, Density) else Exact(program)


@dataclass(frozen=True)
class SIR:
    """Sampling importance resampling: how `marginal` and `normalize` estimate a normaliser.

    Args:
        particles: how many.
        proposal: a program or density over what is missing, called with ``(sample, params, given, *args)``, `given` being the
            choices that are known. None: the target's own program with those addresses forced, so that the weight is
            their density alone.
        resample: strategy of the site that picks a particle; None: the default of categorical sites.
    """

    particles: int = 1
    proposal: Density | Program | None = None
    resample: Strategy | None = None

    def __post_init__(self) -> None:
        if isinstance(self.particles, bool) or not isinstance(self.particles, int) or self.particles < 1:
            raise UserError(f"SIR.particles must be an integer >= 1, got {self.particles!r}")

    def fresh(self, sample: Sampler, target: "_Target", n: int) -> tuple[jax.Array, dict[str, Any], jax.Array]:
        """n particles from the proposal: log weights [n], the choices, stacked, and log target [n]."""

        def one(sample: Sampler) -> tuple[jax.Array, dict[str, Any], jax.Array]:
            if self.proposal is None:
                run = interpret(target.program(), sample, target.given, *target.args)
                free = {a: v for a, v in run.choices.items() if a not in target.given}
                return run.log_given, free, run.log_given + run.log_drawn
            params, *rest = target.args
            log_xi, free = as_density(self.proposal).random_weighted(sample, params, target.given, *rest)
            log_target = target.log(sample, free)
            return log_target - log_xi, free, log_target

        return sample.iid(one, n)

    def retained(self, sample: Sampler, target: "_Target", free: Choices, log_target: jax.Array) -> jax.Array:
        """The log weight of a particle that is there already."""
        if self.proposal is None:
            return interpret(_split(target.program(), target.given), None, {**free, **target.given}, *target.args).value
        params, *rest = target.args
        return log_target - as_density(self.proposal).estimate_logpdf(sample, free, params, target.given, *rest)

    def log_z_retaining(self, sample: Sampler, target: "_Target", free: Choices, log_target: jax.Array) -> jax.Array:
        """log Zhat of one retained particle and fresh ones."""
        log_w = self.retained(sample, target, free, log_target)[None]
        if self.particles > 1:
            log_w = jnp.concatenate([log_w, self.fresh(sample, target, self.particles - 1)[0]])
        return _log_mean_exp(log_w)


@dataclass(frozen=True)
class _Target:
    """A density with some of its choices given: an unnormalised one over the others."""

    density: Density
    given: Choices
    args: tuple[Any, ...]  # params first

    def log(self, sample: Sampler, free: Choices) -> jax.Array:
        return self.density.estimate_logpdf(sample, {**free, **self.given}, *self.args)

    def program(self) -> Program:
        if not isinstance(self.density, Exact):
            raise UserError(f"SIR needs a proposal for a {type(self.density).__name__}: only a program can be its own")
        return self.density.program


@dataclass(frozen=True)
class Marginal(Density):
    """A density that keeps some addresses of another and forgets the rest. Made by `marginal`.

    Args:
        keep: the addresses that stay.
        inner: what is marginalised.
        algorithm: how the forgotten ones are averaged over.
    """

    keep: tuple[str, ...]
    inner: Density
    algorithm: SIR = SIR()

    def random_weighted(self, sample: Any, params: Any, *args: Any) -> tuple[jax.Array, dict[str, Any]]:
        sample = as_sampler(sample)
        log_joint, choices = self.inner.random_weighted(sample, params, *args)
        if missing := [a for a in self.keep if a not in choices]:
            raise UserError(
                f"marginal: the program has no address {missing[0]!r} to keep (it has: {', '.join(choices)})"
            )
        kept = {a: choices[a] for a in self.keep}
        free = {a: v for a, v in choices.items() if a not in kept}
        target = _Target(self.inner, kept, (params, *args))
        return self.algorithm.log_z_retaining(sample, target, free, log_joint), kept

    def estimate_logpdf(self, sample: Any, choices: Choices, params: Any, *args: Any) -> jax.Array:
        if set(choices) != set(self.keep):
            raise UserError(
                f"marginal: it has the addresses {', '.join(self.keep)}, got {', '.join(choices) or 'none'}"
            )
        target = _Target(self.inner, dict(choices), (params, *args))
        return _log_mean_exp(self.algorithm.fresh(as_sampler(sample), target, self.algorithm.particles)[0])


@dataclass(frozen=True)
class Normalized(Density):
    """The distribution that importance resampling draws from: an approximation of a normalised target. Made by `normalize`.

    Args:
        target: the unnormalised density, over what is not given.
        algorithm: particles and proposal.
        given: the choices that are known, by address.
    """

    target: Density
    algorithm: SIR
    given: Choices

    def random_weighted(self, sample: Any, params: Any, *args: Any) -> tuple[jax.Array, dict[str, Any]]:
        sample, algorithm = as_sampler(sample), self.algorithm
        target = _Target(self.target, self.given, (params, *args))
        log_w, free, log_target = algorithm.fresh(sample, target, algorithm.particles)
        if algorithm.particles == 1:
            at: Any = 0
        else:
            picked = categorical(log_w)
            at = sample(picked if algorithm.resample is None else site(picked, algorithm.resample))
        return log_target[at] - _log_mean_exp(log_w), jax.tree.map(lambda x: x[at], free)

    def estimate_logpdf(self, sample: Any, choices: Choices, params: Any, *args: Any) -> jax.Array:
        sample = as_sampler(sample)
        target = _Target(self.target, self.given, (params, *args))
        log_target = target.log(sample, choices)
        return log_target - self.algorithm.log_z_retaining(sample, target, choices, log_target)


def marginal(keep: str | tuple[str, ...], program: Density | Program, algorithm: SIR | None = None) -> Marginal:
    """The density of some addresses of a program or density. By default one particle from the program itself."""
    return Marginal((keep,) if isinstance(keep, str) else tuple(keep), as_density(program), algorithm or SIR())


def normalize(target: Density | Program, algorithm: SIR, given: Choices | None = None) -> Normalized:
    """The posterior of a program given some of its choices, as far as `algorithm` approximates it."""
    return Normalized(as_density(target), algorithm, dict(given or {}))


def _split(program: Program, given: Choices) -> Callable[..., jax.Array]:
    """The program, returning the joint log-density of the given addresses alone."""

    def only(sample: Any, *args: Any) -> jax.Array:
        log = jnp.zeros(())

        def weighed(address: str, drawn: Any) -> Any:
            nonlocal log
            value = sample(address, drawn)
            if address in given:
                log = log + getattr(drawn, "distribution", drawn).log_prob(value)
            return value

        program(weighed, *args)
        return log

    return only


def _log_mean_exp(log_w: jax.Array) -> jax.Array:
    return logsumexp(log_w, 0) - jnp.log(log_w.shape[0])
