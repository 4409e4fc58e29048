"""Stochastic gradient ascent on an expectation: compiled chunks of steps, checkpoints, and the result with its certificate.

Step t draws with fold_in(key, t), so a run that is cut short and goes on makes the same steps, bit for bit.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random

from locum.errors import UserError
from locum.infer.base import Check, Cost, Result
from locum.infer.strategies import Reinforce
from locum.infer.vi_audit import audit, gradient_noise, leaf_names, mean_value
from locum.infer.vi_checkpoint import State, digest, read, resume, write
from locum.method import from_dict, to_dict
from locum.progress import Bar

__all__ = ["Fitted", "VIResult", "ascend"]

_CHUNK = 1000  # steps in one call of compiled code, at most
_PACE = 0.5  # seconds that a call should take: as long does Ctrl-C wait
_SAVE = 10.0  # seconds between two checkpoints
_DRAWS = 20_000  # for the objective at the end
_OBJECTIVE, _AUDIT, _NOISE, _START = range(2**31 - 4, 2**31)  # keys of what comes after the steps


class Fitted(NamedTuple):
    """The parameters, and the objective there: a mean over draws with its standard error."""

    params: Any
    objective: float
    error: float


@dataclass(eq=False)
class VIResult(Result):
    """What `ProgVI.fit` found.

    Args:
        method: the `ProgVI` that did it.
        expectation: the objective with model, guide and data, as an `Expectation`.
        args: what the expectation takes beside the parameters: the data, then the programs' args.
        start: the parameters at the start.
        params: at the end.
        trace: the objective's estimate at each step.
        cost: of the steps: seconds, steps, samples, ms per step.
        interrupted: whether Ctrl-C ended it.
        state: what a checkpoint holds.
    """

    method: Any
    expectation: Any
    args: tuple[Any, ...]
    start: Any
    params: Any
    trace: np.ndarray
    cost: Cost
    interrupted: bool
    state: "State"

    @cached_property
    def estimate(self) -> Fitted:
        """Parameters, and the objective there over 20000 draws."""
        return Fitted(self.params, *self.value())

    def value(self, draws: int = _DRAWS) -> tuple[float, float]:
        """The objective at the fitted parameters, and its standard error."""
        return mean_value(self.expectation, self._key(_OBJECTIVE), self.params, *self.args, draws=draws)

    def check(self, samples: int = 20_000) -> Check:
        """Whether the gradient is unbiased where the fit ended: `audit`, in three random directions."""
        return audit(self.expectation, self._key(_AUDIT), self.params, *self.args, samples=samples)

    def baselines(self) -> dict[str, Any]:
        """The noise of a single draw's gradient beside that of REINFORCE at every site, and the objective at the start."""
        known = {}
        for name, e in {
            "as written": self.expectation,
            "Reinforce at every site": replace(self.expectation, strategy=Reinforce()),
        }.items():
            gradient, value, mean = gradient_noise(e, self._key(_NOISE), self.params, *self.args)
            known[name] = {"gradient_sd": gradient, "value_sd": value, "value": mean}
        at_start = mean_value(self.expectation, self._key(_START), self.start, *self.args, draws=_DRAWS)
        return known | {"at the start": dict(zip(("value", "error"), at_start, strict=True))}

    def to_json(self) -> dict[str, Any]:
        """The result as plain data; figures that are not finite are null."""
        params = dict(zip(leaf_names(self.params), map(np.asarray, jax.tree.leaves(self.params)), strict=True))
        return {
            "method": to_dict(self.method),
            "params": {name: value.tolist() for name, value in params.items()},
            "objective": self.estimate.objective,
            "error": self.estimate.error,
            "trace": [float(v) if np.isfinite(v) else None for v in self.trace],
            "interrupted": self.interrupted,
            "cost": {"seconds": self.cost.seconds, **self.cost.counts},
        }

    def save(self, path: str | Path) -> None:
        """Write it in the form of a checkpoint, from which `load` or a longer `fit` goes on."""
        write(Path(path), self.state, self.method)

    @staticmethod
    def load(
        path: str | Path, model: Any, guide: Any, params: Any, data: Any, *, args: tuple[Any, ...] = ()
    ) -> "VIResult":
        """What `save` or an unfinished run wrote, for the same programs, starting parameters and data."""
        about = read(Path(path))[0]
        method = replace(from_dict(about["method"]), steps=about["steps"])
        return method.fit(model, guide, params, data, args=args, checkpoint=path, progress=False)

    def _key(self, purpose: int) -> Any:
        return random.fold_in(random.key(self.method.seed), purpose)


def ascend(
    method: Any, expectation: Any, params: Any, args: tuple[Any, ...], checkpoint: str | Path | None, progress: bool
) -> VIResult:
    """Run the steps of `method` that `checkpoint` does not hold yet."""
    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[method.optimizer](method.learning_rate)
    about = {"leaves": leaf_names(params), "input": digest((params, args))}
    state = State(about, params, optimizer.init(params), [])
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        resume(state, path, method)
    run = _compiled(method, expectation, optimizer, args)
    interrupted, saved, n = False, time.monotonic(), min(10, _CHUNK)
    title = f"fit {type(method.objective).__name__}"
    with Bar(title, method.steps) if progress and state.steps < method.steps else nullcontext() as bar:
        try:
            while state.steps < method.steps:
                n = min(n, method.steps - state.steps)
                n, seconds = _advance(state, run, n)
                if bar is not None:
                    bar.at(state.steps, f"{state.trace[-1].mean():.4g}")
                if path is not None and time.monotonic() - saved > _SAVE and state.steps < method.steps:
                    write(path, state, method)
                    saved = time.monotonic()
                n = int(np.clip(n * _PACE / max(seconds, 1e-9), 1, min(4 * n, _CHUNK)))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if path is not None and (state.steps or not path.exists()):
                write(path, state, method)
    trace = np.concatenate(state.trace) if state.trace else np.zeros(0, np.float32)
    counts = {"steps": state.steps, "samples": state.steps * method.samples, "ms_per_step": state.ms_per_step}
    return VIResult(
        method, expectation, args, params, state.params, trace, Cost(state.seconds, counts), interrupted, state
    )


def _advance(state: State, run: Callable[..., Any], n: int) -> tuple[int, float]:
    """n more steps; how many were done, and the seconds of it."""
    began = time.perf_counter()
    params, optimizer, values, bad, flags = jax.block_until_ready(run(state.params, state.optimizer, state.steps, n))
    seconds = time.perf_counter() - began
    done = int(bad) - state.steps if int(bad) >= 0 else n
    if state.steps:  # the first call compiles
        state.ms_per_step = 1000 * seconds / n
    state.params, state.optimizer = params, optimizer
    state.trace.append(np.asarray(values)[:done])
    state.steps, state.seconds = state.steps + done, state.seconds + seconds
    if int(bad) >= 0:
        finite = np.asarray(flags)
        wrong = [name for name, ok in zip(state.about["leaves"], finite[1:], strict=True) if not ok]
        what = "the objective" if not finite[0] else f"the gradient of {wrong[0]}"
        also = f" (the gradient of {', '.join(wrong)} as well)" if not finite[0] and wrong else ""
        raise UserError(
            f"{what} is not finite at step {int(bad)}{also}: lower learning_rate, start elsewhere, or keep scales away from 0"
        )
    return n, seconds


def _compiled(method: Any, expectation: Any, optimizer: Any, args: tuple[Any, ...]) -> Callable[..., Any]:
    """run(params, optimizer state, first step, steps) -> both, the values, the first bad step or -1, what was finite then."""
    leaves, tree = jax.tree.flatten(args)
    moving = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, moving, strict=True) if array]

    @jax.jit
    def run(params: Any, state: Any, first: Any, n: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        args = tree.unflatten([next(given) if array else leaf for leaf, array in zip(leaves, moving, strict=True)])
        key = random.key(method.seed)

        def step(i: Any, carry: Any) -> Any:
            params, state, values, bad, flags = carry
            value, grad = expectation.estimate(random.fold_in(key, i), params, *args, samples=method.samples)
            finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in (value, *jax.tree.leaves(grad))])
            going = bad < 0
            good = going & jnp.all(finite)
            updates, new_state = optimizer.update(jax.tree.map(jnp.negative, grad), state, params)
            new = optax.apply_updates(params, updates)
            params, state = jax.tree.map(lambda a, b: jnp.where(good, a, b), (new, new_state), (params, state))
            flags = jnp.where(going, finite, flags)
            return params, state, values.at[i - first].set(value), jnp.where(going & ~good, i, bad), flags

        values = jnp.zeros(_CHUNK, jnp.result_type(*jax.tree.leaves(params), 0.0))
        flags = jnp.ones(1 + len(jax.tree.leaves(params)), bool)
        return lax.fori_loop(first, first + n, step, (params, state, values, jnp.asarray(-1), flags))

    return lambda params, state, first, n: run(params, state, first, n, arrays)
