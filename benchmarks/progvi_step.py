"""Time of a step of variational inference: ours beside one written by hand in JAX, NumPyro's SVI and, where it is, GenJAX.

    python benchmarks/progvi_step.py [--rounds 25] [--steps 500] [--samples 64]

The cone with the naive guide, 64 samples, value and gradient of the ELBO and a plain SGD update, all compiled, on one CPU
device. "site by site" writes x and y apart, as the model does; "as a vector" draws both as one, in our model and by hand. A
round times each way in turn, first and last alternating, in two forms: `call`, one compiled step called from Python over and
over, and `loop`, all steps in one compiled loop. Ratios are of neighbours in a round. Written to
benchmarks/results/progvi_step.json; below 1 the first is faster.
"""

import argparse
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from locum.bench.machine import environment
from locum.infer import vi
from locum.infer.vi_programs import CONE_DATA, cone_model, cone_naive_guide

Step = Callable[[Any, Any], tuple[Any, Any]]  # key, state -> state, value
START, RATE = (3.0, 0.0, 1.0, 1.0), 1e-3


def log_normal(x: Any, mean: Any, scale: Any) -> Any:
    z = (x - mean) / scale
    return -0.5 * z * z - jnp.log(scale) - 0.5 * math.log(2 * math.pi)


def by_hand(samples: int) -> Step:
    """x and y apart."""

    def step(key: Any, p: Any) -> tuple[Any, Any]:
        noise = random.normal(key, (2, samples))

        def elbo(p: Any) -> Any:
            sx, sy = jnp.exp(p[2]), jnp.exp(p[3])
            x, y = p[0] + sx * noise[0], p[1] + sy * noise[1]
            r = x * x + y * y
            log_p = log_normal(x, 0.0, 10.0) + log_normal(y, 0.0, 10.0) + log_normal(CONE_DATA["z"], r, 0.1 + r / 100)
            return jnp.mean(log_p - log_normal(x, p[0], sx) - log_normal(y, p[1], sy))

        value, grad = jax.value_and_grad(elbo)(p)
        return p + RATE * grad, value

    return step


def vector_by_hand(samples: int) -> Step:
    """x and y as one vector."""

    def step(key: Any, p: Any) -> tuple[Any, Any]:
        noise = random.normal(key, (samples, 2))

        def elbo(p: Any) -> Any:
            scale = jnp.exp(p[2:])
            xy = p[:2] + scale * noise
            r = jnp.sum(xy * xy, 1)
            log_p = jnp.sum(log_normal(xy, 0.0, 10.0), 1) + log_normal(CONE_DATA["z"], r, 0.1 + r / 100)
            return jnp.mean(log_p - jnp.sum(log_normal(xy, p[:2], scale), 1))

        value, grad = jax.value_and_grad(elbo)(p)
        return p + RATE * grad, value

    return step


def ours(model: Any, guide: Any, samples: int) -> Step:
    e = vi.expectation(vi.ELBO()(model, guide, CONE_DATA))

    def step(key: Any, p: Any) -> tuple[Any, Any]:
        value, grad = e.estimate(key, p, samples=samples)
        return p + RATE * grad, value

    return step


def vector_model(sample: Any, params: Any) -> None:
    xy = sample("xy", vi.normal(jnp.zeros(2), 10.0))
    r = jnp.sum(xy * xy)
    sample("z", vi.normal(r, 0.1 + r / 100))


def vector_guide(sample: Any, params: Any) -> None:
    sample("xy", vi.normal_reparam(params[:2], jnp.exp(params[2:])))


def numpyro_step(samples: int) -> tuple[Step, Any]:
    """SVI's own update with Trace_ELBO and its SGD; its state in place of the parameters."""
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    def model() -> None:
        x = numpyro.sample("x", dist.Normal(0.0, 10.0))
        y = numpyro.sample("y", dist.Normal(0.0, 10.0))
        r = x * x + y * y
        numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=CONE_DATA["z"])

    def guide() -> None:
        p = numpyro.param("p", jnp.array(START))
        numpyro.sample("x", dist.Normal(p[0], jnp.exp(p[2])))
        numpyro.sample("y", dist.Normal(p[1], jnp.exp(p[3])))

    svi = SVI(model, guide, numpyro.optim.SGD(RATE), Trace_ELBO(num_particles=samples))
    state = svi.init(random.key(0))

    def step(key: Any, state: Any) -> tuple[Any, Any]:
        state, loss = svi.update(state._replace(rng_key=key))
        return state, -loss

    return step, state


def genjax_step(samples: int) -> Step:
    """GenJAX's gradient estimate of its own ELBO, side by side for all samples. It gives no value beside the gradient."""
    from genjax import gen, normal
    from genjax.adev import normal_reparam
    from genjax.inference.vi import elbo_factory
    from genjax.pjax import modular_vmap, seed

    @gen
    def model() -> Any:
        x = normal(0.0, 10.0) @ "x"
        y = normal(0.0, 10.0) @ "y"
        r = x * x + y * y
        return normal(r, 0.1 + r / 100) @ "z"

    @gen
    def guide(constraint: Any, p: Any) -> Any:
        x = normal_reparam(p[0], jnp.exp(p[2])) @ "x"
        normal_reparam(p[1], jnp.exp(p[3])) @ "y"
        return x

    elbo = elbo_factory(model, guide, dict(CONE_DATA))
    estimate = seed(modular_vmap(elbo.grad_estimate, in_axes=(None,), axis_size=samples))

    def step(key: Any, p: Any) -> tuple[Any, Any]:
        return p + RATE * estimate(key, p).mean(0), jnp.zeros(())

    return step


def timed(step: Step, start: Any, steps: int) -> dict[str, Callable[[], float]]:
    """Microseconds per step in both forms, compiled before."""
    once = jax.jit(step)
    loop = jax.jit(lambda keys, state: lax.scan(lambda state, key: step(key, state), state, keys))
    keys = random.split(random.key(1), steps)
    key = keys[0]

    def call() -> float:
        state, began = start, time.perf_counter()
        for _ in range(steps):
            state, value = once(key, state)
        jax.block_until_ready((state, value))
        return 1e6 * (time.perf_counter() - began) / steps

    def together() -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(keys, start))
        return 1e6 * (time.perf_counter() - began) / steps

    for form in (call, together):
        form()
    return {"call": call, "loop": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "progvi_step.json")
    args = parser.parse_args()
    n, start = args.samples, jnp.array(START)
    ways: dict[str, tuple[Step, Any]] = {
        "locum, site by site": (ours(cone_model, cone_naive_guide, n), start),
        "by hand, site by site": (by_hand(n), start),
        "locum, as a vector": (ours(vector_model, vector_guide, n), start),
        "by hand, as a vector": (vector_by_hand(n), start),
    }
    if importlib.util.find_spec("numpyro"):
        ways["numpyro"] = numpyro_step(n)
    if importlib.util.find_spec("genjax"):
        ways["genjax"] = (genjax_step(n), start)
    ready = {name: timed(*way, args.steps) for name, way in ways.items()}
    micros: dict[str, dict[str, list[float]]] = {form: {name: [] for name in ways} for form in ("call", "loop")}
    for turn in range(args.rounds):
        for form, seen in micros.items():
            for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
                seen[name].append(ready[name][form]())
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    pairs = [
        ("locum, site by site", other) for other in ("by hand, site by site", "numpyro", "genjax") if other in ways
    ]
    pairs += [("locum, as a vector", "by hand, as a vector"), ("locum, site by site", "by hand, as a vector")]
    for form, seen in micros.items():
        for name, each in seen.items():
            print(f"{form} {name}: {median(each):.1f} us ({min(each):.1f} to {max(each):.1f})", flush=True)
        ratios[form] = {}
        for above, below in pairs:
            each = sorted(a / b for a, b in zip(seen[above], seen[below], strict=True))
            q1, q3 = each[len(each) // 4], each[-1 - len(each) // 4]
            ratios[form][f"{above} / {below}"] = {
                "median": median(each),
                "q1": q1,
                "q3": q3,
                "min": each[0],
                "max": each[-1],
            }
            print(f"{form} {above} / {below}: {median(each):.3f} (quartiles {q1:.3f} to {q3:.3f})", flush=True)
    about = environment()
    for package in ("jax", "numpyro", "genjax"):
        if importlib.util.find_spec(package):
            about["versions"][package] = metadata.version(package)
    found = {
        "benchmark": "progvi_step",
        **about,
        "device": str(jax.devices()[0]),
        "samples": n,
        "load": os.getloadavg()[0],
        "ratios": ratios,
        "microseconds": micros,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
