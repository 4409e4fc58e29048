"""Probabilistic Programming with Programmable Variational Inference

Expensive: Exact expectations inside a variational objective, and a gradient derived by hand for each.
Stands in: A program transformation that gives one unbiased gradient for any mix of strategies.
Check: The mean estimate is the exact gradient for every mix, and a step costs little more than one coded by hand.

An objective is an *expectation program*: a function f(sample, params, *args) whose value is random and whose expectation is
what is to be maximised. Each site of it carries a gradient strategy (`locum.infer.strategies`). One run of f gives a
surrogate scalar S: its value is an unbiased estimate of E f, its gradient in params an unbiased estimate of grad E f.
Ordinary automatic differentiation does the rest, so jit, vmap and grad apply as to any function.

With k(v) the run in which a site takes the value v, sg the stop-gradient, and each rule unbiased given the earlier draws, the
whole is unbiased by the law of iterated expectations:

    Reparam     S = k(g(noise; theta))                  one run; k must be continuous in the draw
    Reinforce   S = l + sg(l - b) (log p - sg log p)    one run; l = k(v), b a baseline
    Enum        S = sum_v p(v) k(v)                     one run for each value
    MVD         S = l + D (theta - sg theta)            one more run, D = c sg(k(v+) - k(v-))

How a rule gets at k. A site of the last two kinds stops the program (an exception that only the engine sees), and k(v) is the
program run again from its start with this site's value put in. Site number i draws with fold_in(key, i), so a second run
makes the same earlier choices; under jit the compiler merges what the runs share. (Of many samples side by side the normal noise
is drawn in one go, `locum.infer.side_by_side`: on small programs that is most of the cost.) A Reinforce site needs no second run,
since its multiplier is the final value of whatever run it is part of: the sum over runs of an Enum or MVD site further on is
linear in them. The side of an MVD that is not the draw is run for its value alone, later sites drawn plainly.

Generative functions (`locum.infer.programs`), random densities for marginals and normalised posteriors
(`locum.infer.densities`) and objectives (`locum.infer.objectives`) are made of such programs; `ProgVI` fits with them.

Traps. Everything is *maximised*. A Reparam site that feeds a branch, a comparison or a discrete density is biased, and no type
or shape shows it: `audit` compares the gradient with finite differences of the value. No site may lie inside lax.scan, cond,
while_loop or an inner vmap: there one key would serve many draws. Flips keep 1e-7 from 0 and 1 in their logarithm only.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from locum.infer import vi
    >>> def cost(sample, theta):
    ...     b = sample("b", vi.flip_enum(theta))
    ...     return jnp.where(b, 0.0, -theta / 2)
    >>> value, gradient = vi.expectation(cost).value_and_grad(jax.random.key(0), 0.3)
    >>> print(f"{value:.3f} {gradient:.3f}")
    -0.105 -0.200

Authors: Becker, Lew, Wang, Ghavami, Huot, Rinard, Mansinghka
Year: 2024
Venue: PLDI 2024
arXiv: 2406.15742
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtyping import Float

from locum.errors import MissingExtra, UserError

try:
    import jax
    import jax.numpy as jnp
    from jax import lax
except ImportError:
    raise MissingExtra("locum.infer.ProgVI", "vi") from None

from locum.infer.base import Estimator
from locum.infer.densities import Density
from locum.infer.distribution_base import Key
from locum.infer.objectives import ELBO, Objective
from locum.infer.programs import Program, Sampler
from locum.infer.side_by_side import Wanted, side_by_side, survey
from locum.infer.strategies import Reinforce, Replayed, Site, Strategy
from locum.infer.vi_audit import as_parameters
from locum.infer.vi_fit import VIResult, ascend
from locum.method import require

__all__ = ["ProgVI", "Expectation", "expectation"]  # noqa: RUF022 - the first is the paper's

_MANY = 100  # replayed sites on one path from which tracing, quadratic in them, is worth a warning


class _Stop(BaseException):
    """A site that runs the rest of the program itself has been reached."""

    def __init__(self, site: Site, index: int, key: Key) -> None:
        self.site, self.index, self.key = site, index, key


@dataclass(frozen=True)
class _Rules:
    """What all runs of one evaluation share."""

    strategy: Strategy | None  # takes the place of a site's own wherever it can
    anchor: Any

    def of(self, site: Site) -> Strategy:
        possible = self.strategy is not None and not self.strategy.why_not(site.distribution)
        return self.strategy if self.strategy is not None and possible else site.strategy


_Score = tuple[jax.Array, Any]  # log p - sg log p of a Reinforce site, and its baseline


class _Replay(Sampler):
    """One run of an expectation program: sites with a forced value take it, others are drawn as their strategy says."""

    def __init__(
        self,
        key: Key,
        rules: _Rules,
        plain: bool,
        forced: Mapping[int, Any],
        noise: Mapping[int, Any],
        inner: bool = False,
    ) -> None:
        super().__init__(key)
        self.rules, self.plain, self.forced, self.noise, self.inner = rules, plain, forced, noise, inner
        self.anchor = rules.anchor
        self.scores: list[_Score] = []
        self.wanted = Wanted()

    def fresh_key(self) -> Key:
        self.wanted.keys = True
        return super().fresh_key()

    def _draw(self, site: Site, index: int, key: Key) -> Any:
        if index in self.forced:
            return self.forced[index]
        strategy, law = self.rules.of(site), site.distribution
        if isinstance(strategy, Replayed) and self.inner:
            self.wanted.replays = True  # this run is a survey then, and its values do not matter
        elif isinstance(strategy, Replayed) and not self.plain:
            raise _Stop(site, index, key)
        if index in self.noise:
            value = law.shaped(self.noise[index])
        else:
            value = law.sample(key)
            self.wanted.note(index, law)
        if isinstance(strategy, Reinforce) and not self.plain:
            value = lax.stop_gradient(value)
            log = law.log_prob(value)
            self.scores.append((log - lax.stop_gradient(log), 0.0 if strategy.baseline is None else strategy.baseline))
        return value

    def iid(self, program: Callable[[Sampler], Any], n: int) -> Any:
        """Side by side where every site answers at once; otherwise one after the other, as sites of this very run.

        Either way a Reinforce site's multiplier is the final value of the whole program.
        """
        if n == 1:
            return super().iid(program, n)
        start, key = self._next("iid")

        def one(key: Key, noise: Mapping[int, Any]) -> tuple[Any, list[_Score], Wanted]:
            sampler = _Replay(key, self.rules, self.plain, {}, noise, inner=True)
            return program(sampler), sampler.scores, sampler.wanted

        self.wanted.keys, wanted = True, survey(one, key)
        if not wanted.replays:
            values, scores = side_by_side(one, key, n, wanted)
            self.scores += scores
            return values
        self.count = start
        runs = [program(self) for _ in range(n)]
        return jax.tree.map(lambda *each: jnp.stack([jnp.asarray(x) for x in each]), *runs)


@dataclass(frozen=True, eq=False)
class Expectation:
    """The expectation of a program's value, as estimates of it and of its gradient in the parameters.

    Args:
        program: ``f(sample, params, *args)``, a real number.
        strategy: takes the place of every site's own where it can, e.g. ``Reinforce()`` to compare with.
        anchor: where `sample.constant` holds the parameters, instead of at those that are passed.
    """

    program: Callable[..., Any]
    strategy: Strategy | None = None
    anchor: Any = None

    def value(self, key: Key, params: Any, *args: Any) -> jax.Array:
        """A single draw of the program's value; strategies play no part."""
        return self._run(key, {}, True, params, args)

    def surrogate(self, key: Key, params: Any, *args: Any) -> jax.Array:
        """A scalar whose value estimates the expectation and whose gradient in `params` estimates its gradient."""
        return self._run(key, {}, False, params, args)

    def value_and_grad(self, key: Key, params: Any, *args: Any) -> tuple[jax.Array, Any]:
        """Both estimates from a single draw."""
        return jax.value_and_grad(lambda params: self.surrogate(key, params, *args))(params)

    def estimate(self, key: Key, params: Any, *args: Any, samples: int = 64) -> tuple[jax.Array, Any]:
        """Both estimates as means over independent draws, side by side."""

        def mean(params: Any) -> jax.Array:
            return jnp.mean(self._many(key, samples, False, params, args))

        return jax.value_and_grad(mean)(params)

    def anchored(self, params: Any) -> "Expectation":
        """The same expectation, with what programs hold constant held at these parameters."""
        return replace(self, anchor=params)

    def values(self, key: Key, params: Any, *args: Any, samples: int = 64) -> Float[jax.Array, " samples"]:
        """Independent draws of the program's value, side by side."""
        return self._many(key, samples, True, params, args)

    def _many(self, key: Key, n: int, plain: bool, params: Any, args: tuple[Any, ...]) -> jax.Array:
        def one(key: Key, noise: Mapping[int, Any]) -> tuple[jax.Array, tuple[()], Wanted]:
            wanted = Wanted()
            return self._run(key, {}, plain, params, args, noise, wanted), (), wanted

        return side_by_side(one, key, n, survey(one, key))[0]

    def _run(
        self,
        key: Key,
        forced: Mapping[int, Any],
        plain: bool,
        params: Any,
        args: tuple[Any, ...],
        noise: Mapping[int, Any] = MappingProxyType({}),
        wanted: Wanted | None = None,
    ) -> jax.Array:
        rules = _Rules(self.strategy, self.anchor)
        sampler = _Replay(key, rules, plain, forced, noise)
        sampler.wanted = wanted or sampler.wanted
        try:
            value = _scalar(self.program(sampler, params, *args))
        except _Stop as stop:
            site, index, own_key = stop.site, stop.index, stop.key
        except RecursionError:
            raise UserError(
                f"the program has too many sites that are run again from the start ({len(forced)} before Python's stack was "
                "full): use vector sites, or Reinforce"
            ) from None
        else:
            total = value
            for score, baseline in sampler.scores:
                total = total + jnp.sum(lax.stop_gradient(value - baseline) * score)
            return total
        sampler.wanted.keys = True
        if len(forced) == _MANY:
            warnings.warn(f"more than {_MANY} sites are run again from the start: use vector sites", stacklevel=2)

        def rest(value: Any) -> jax.Array:
            return self._run(key, {**forced, index: value}, plain, params, args, noise)

        def others(value: Any) -> jax.Array:
            return lax.stop_gradient(self._run(key, {**forced, index: value}, True, params, args, noise))

        strategy = rules.of(site)
        assert isinstance(strategy, Replayed)
        return strategy.surrogate(site.distribution, own_key, rest, others)


def expectation(program: Callable[..., Any]) -> Expectation:
    """The expectation of ``program(sample, params, *args)``, with its gradient. Works as a decorator."""
    return Expectation(program)


def _scalar(value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape or jnp.iscomplexobj(value):
        raise UserError(f"an expectation program must return one real number, got shape {value.shape} of {value.dtype}")
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


@dataclass(frozen=True)
class ProgVI(Estimator):
    """Fit a guide, and a model's parameters, by gradient ascent on a variational objective.

    Args:
        objective: what is maximised.
        steps: of the optimizer. Paper 5000 to 6000 on the cone.
        samples: draws in each step, side by side. Paper 64.
        optimizer: "sgd" (plain ascent) or "adam".
        learning_rate: > 0. Paper 1e-3 on the cone, 1e-4 with Adam on images.
        seed: of all that is drawn.
    """

    objective: Objective = field(default_factory=ELBO)
    steps: int = 5000
    samples: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "objective", isinstance(self.objective, Objective), "an objective such as ELBO()")
        for name in ("steps", "samples"):
            value = getattr(self, name)
            require(self, name, isinstance(value, int) and value >= 1, "an integer >= 1")
        require(self, "optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'")
        require(self, "learning_rate", 0 < self.learning_rate < float("inf"), "finite and > 0")
        require(self, "seed", isinstance(self.seed, int) and 0 <= self.seed < 2**32, "an integer in [0, 2^32)")

    def fit(
        self,
        model: Density | Program,
        guide: Density | Program,
        params: Any,
        data: Mapping[str, Any] | None = None,
        *,
        args: tuple[Any, ...] = (),
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> VIResult:
        """Maximise the objective in `params`.

        Args:
            model: program or density over all choices, ``model(sample, params, *args)``.
            guide: the same over the choices that are not in `data`.
            params: where to start: any tree (dicts, tuples, ...) of floating-point numbers and arrays, shared by both.
            data: the model's observed choices by address.
            args: what both take beside the parameters.
            checkpoint: a file that is written on the way and from which the same call goes on.
            progress: whether to show how far it is.
        """
        params, data = as_parameters(params), dict(data or {})

        def program(sample: Sampler, params: Any, data: Mapping[str, Any], *args: Any) -> jax.Array:
            return self.objective(model, guide, data)(sample, params, *args)

        return ascend(self, expectation(program), params, (data, *args), checkpoint, progress)
