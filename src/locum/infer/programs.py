"""Generative programs: plain Python functions, run in one of two ways.

A program is a function ``program(sample, params, *args)``. Where it draws it calls its first argument with an address and a
distribution (or a site: a distribution with a gradient strategy):

    def program(sample, params):
        z = sample("z", normal(0.0, 1.0))
        return sample("x", normal(z, params["scale"]))

`simulate` draws all of it and gives the choices by address, their joint log-density and what the program returned;
`assess` takes the choices instead and says how likely they are. Each address is used once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.extend.core import get_opaque_trace_state

from locum.errors import UserError
from locum.infer.distribution_base import Distribution, Key
from locum.infer.strategies import Site, default_strategy

__all__ = ["Program", "Run", "Sampler", "Trace", "as_sampler", "assess", "interpret", "simulate"]

Program = Callable[..., Any]
Choices = Mapping[str, Any]


class Sampler:
    """What an expectation program is called with, here in its plain form: each site is drawn, strategies play no part.

    Site number i of a run draws with ``fold_in(key, i)``. A site must be reached while Python runs the program itself: in the
    body of a scan or a vmap the same number would stand for many draws, so it is refused there.
    """

    anchor: Any = None  # what `constant` gives instead of the parameters at hand

    def __init__(self, key: Key) -> None:
        self.key, self.count = key, 0
        self._home = get_opaque_trace_state()

    def __call__(self, *what: Any) -> Any:
        """``sample(address, site)`` or ``sample(site)``: a draw. A bare distribution takes `default_strategy`."""
        drawn = what[-1] if what else None
        if isinstance(drawn, Distribution):
            drawn = Site(drawn, default_strategy(drawn))
        if len(what) > 2 or not isinstance(drawn, Site):
            raise UserError(f"sample takes (address, site) or (site), a site being a distribution, got {what!r}")
        return self._draw(drawn, *self._next(repr(what[0]) if len(what) == 2 else "without address"))

    def iid(self, program: Callable[["Sampler"], Any], n: int) -> Any:
        """n independent runs of ``program(sample)``, its results stacked along a new first axis."""
        if n == 1:  # no key of its own, so that one particle is the program itself
            return jax.tree.map(lambda x: jnp.asarray(x)[None], program(self))
        _, key = self._next("iid")
        return jax.vmap(lambda key: program(type(self)(key)))(random.split(key, n))

    def constant(self, params: Any) -> Any:
        """The parameters without gradient. `audit` holds them where they are while it moves the others."""
        return lax.stop_gradient(params if self.anchor is None else self.anchor)

    def fresh_key(self) -> Key:
        """A key of the run's own, for draws that no gradient is to pass through."""
        return self._next("fresh_key")[1]

    def _next(self, name: str) -> tuple[int, Key]:
        if get_opaque_trace_state() != self._home:
            raise UserError(
                f"the site {name} lies inside lax.scan, cond, while_loop, vmap, jit or grad within the program, where it cannot "
                "be drawn: unroll the loop in Python, use one vector site before it, or use sample.iid for particles"
            )
        self.count += 1
        return self.count - 1, random.fold_in(self.key, self.count - 1)

    def _draw(self, site: Site, index: int, key: Key) -> Any:
        return site.distribution.sample(key)


def as_sampler(sample_or_key: Any) -> Sampler:
    """The sampler of an expectation program as it is, or a plain one for a key."""
    if isinstance(sample_or_key, Sampler):
        return sample_or_key
    if not isinstance(sample_or_key, jax.Array):
        raise UserError(f"expected a PRNG key or the sampler of an expectation program, got {sample_or_key!r}")
    return Sampler(sample_or_key)


class Trace(NamedTuple):
    """A simulated run: choices by address, their joint log-density, and the value the program returned."""

    choices: dict[str, Any]
    log_prob: jax.Array
    value: Any


class Run(NamedTuple):
    """A run in which some choices were given: all choices, the log-densities of the drawn and of the given ones, the value."""

    choices: dict[str, Any]
    log_drawn: jax.Array
    log_given: jax.Array
    value: Any


class _Interpreter:
    """The `sample` of a generative program: given choices are taken, others drawn, and all are weighed."""

    def __init__(self, sampler: Sampler | None, given: Choices) -> None:
        self.sampler, self.given = sampler, given
        self.choices: dict[str, Any] = {}
        self.log = {True: jnp.zeros(()), False: jnp.zeros(())}  # of given and of drawn choices

    def __call__(self, *what: Any) -> Any:
        if len(what) != 2 or not isinstance(what[0], str) or not isinstance(what[1], Site | Distribution):
            raise UserError(f"in a generative program sample takes (address, distribution or site), got {what!r}")
        address, drawn = what
        if address in self.choices:
            raise UserError(f"the address {address!r} is used twice in one run: each site needs an address of its own")
        distribution = drawn.distribution if isinstance(drawn, Site) else drawn
        known = address in self.given
        if not known and self.sampler is None:
            raise UserError(f"no value for the address {address!r} (given: {_listed(self.given)})")
        value = self.given[address] if known or self.sampler is None else self.sampler(address, drawn)
        value = jnp.asarray(value) if isinstance(value, list | tuple) else value
        self.choices[address] = value
        self.log[known] = self.log[known] + distribution.log_prob(value)
        return value

    def iid(self, *_: Any) -> Any:
        raise UserError("sample.iid belongs to expectation programs: in a generative program use a vector site")


def interpret(program: Program, sampler: Sampler | None, given: Choices, *args: Any) -> Run:
    """Run a program with some choices given and the others drawn by `sampler` (None: none may be missing).

    Raises:
        UserError: for an address that is used twice, that is missing, or that was given and never reached; it is named.
    """
    interpreter = _Interpreter(sampler, given)
    value = program(interpreter, *args)
    if extra := [address for address in given if address not in interpreter.choices]:
        reached = _listed(interpreter.choices)
        raise UserError(
            f"the program has no site at the address {extra[0]!r}, which was given a value (it has: {reached})"
        )
    return Run(interpreter.choices, interpreter.log[False], interpreter.log[True], value)


def simulate(program: Program, sample_or_key: Any, *args: Any) -> Trace:
    """Run a program forward, with a key, or inside an expectation program, whose sites the program's then become."""
    run = interpret(program, as_sampler(sample_or_key), {}, *args)
    return Trace(run.choices, run.log_drawn, run.value)


def assess(program: Program, choices: Choices, *args: Any) -> tuple[jax.Array, Any]:
    """The joint log-density of choices, one for every address, and the value the program then returns."""
    run = interpret(program, None, choices, *args)
    return run.log_given, run.value


def _listed(choices: Choices) -> str:
    return ", ".join(map(repr, choices)) or "none"
