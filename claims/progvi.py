"""Five variational objectives on the cone, and three gradient strategies for the same discrete choice on small images.

The cone: x, y ~ N(0, 10), z ~ N(x^2 + y^2, 0.1 + (x^2 + y^2) / 100), z = 5 seen. ELBO and IWELBO take a guide of two independent
normals, started at means (3, 0) and log standard deviations (1, 1); HVI, IWHVI and DIWHVI one whose auxiliary angle is
forgotten by `marginal`, its log standard deviations started at 1. Plain SGD 1e-3, 5000 steps of 64 samples. The images: up to
two spots on 8 x 8 pixels, presence drawn by ENUM, MVD or REINFORCE and all else alike, 2000 steps of Adam 3e-3; the variance
of one draw's gradient is measured for the three where the MVD run ended, on the same keys. Figures that the criterion leaves
alone: the paper's values, and the gradient's variance of every run at its own end.
"""

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import jax
import numpy as np
from jax import random

from locum.bench.verify import Claim, Judgement
from locum.infer import vi
from locum.infer.vi_audit import gradient_noise
from locum.infer.vi_programs import (
    CONE_DATA,
    CONE_LOG_EVIDENCE,
    CONE_OBJECTIVES,
    air_guide,
    air_images,
    air_model,
    air_start,
    cone_model,
)

DRAWS, IMAGES, AIR_STEPS = 50_000, 512, 2000
PAPER = {"ELBO": -8.08, "IWELBO(5)": -7.79, "HVI": -9.75, "IWHVI(5)": -8.18, "DIWHVI(5,5)": -7.33}
STRATEGIES: dict[str, Callable[..., Any]] = {"ENUM": vi.flip_enum, "MVD": vi.flip_mvd, "REINFORCE": vi.flip_reinforce}


def cone(name: str, seed: int, steps: int, draws: int) -> dict[str, float]:
    objective, guide, start = CONE_OBJECTIVES[name]
    method = vi.ProgVI(objective, steps=steps, seed=seed)
    result = method.fit(cone_model, guide, jax.numpy.array(start), CONE_DATA, progress=False)
    value, error = result.value(draws)
    return {"value": value, "error": error, "ms_per_step": result.cost.counts["ms_per_step"]}


def squared_errors(result: Any, params: Any, key: Any, chunks: int) -> np.ndarray:
    """Of single draws of the gradient: the squared distance from the mean of all, one per draw."""
    e, args = result.expectation, result.args
    one = jax.jit(jax.vmap(lambda key: e.value_and_grad(key, params, *args)[1]))
    grads = [jax.tree.leaves(one(random.split(k, 1024))) for k in random.split(key, chunks)]
    flat = np.concatenate([np.concatenate([np.reshape(x, (1024, -1)) for x in g], 1) for g in grads])
    return ((flat - flat.mean(0)) ** 2).sum(1).astype(np.float64)


def air(seed: int, steps: int, draws: int, tell: Callable[[str], None]) -> dict[str, Any]:
    images = air_images(random.key(10_000 + seed), IMAGES)
    start, results = air_start(random.key(20_000 + seed)), {}
    method = vi.ProgVI(vi.PerDatum(), steps=steps, optimizer="adam", learning_rate=3e-3, seed=seed)
    for name, flips in STRATEGIES.items():
        tell(name)
        data = {"image": images}
        results[name] = method.fit(air_model, air_guide(flips), start, data, args=(images,), progress=False)
    at, key = results["MVD"].params, random.key(30_000 + seed)
    noise = {name: squared_errors(result, at, key, 8) for name, result in results.items()}
    found: dict[str, Any] = {}
    for name, result in results.items():
        value, error = result.value(draws)
        own = gradient_noise(result.expectation, key, result.params, *result.args)[0]
        found[name] = {"value": value, "error": error, "variance": noise[name].mean(), "variance_at_own_end": own**2}
    for less, more in (("ENUM", "MVD"), ("MVD", "REINFORCE")):
        gap = noise[more] - noise[less]  # same keys, so in pairs
        found[f"{more} - {less}"] = {"gap": gap.mean(), "error": gap.std() / len(gap) ** 0.5}
    return found


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    names = list(CONE_OBJECTIVES)[:1] if fast else list(CONE_OBJECTIVES)
    row: dict[str, Any] = {"fast": fast, "cone": {}}
    for done, name in enumerate(names):
        progress(name, done, len(names) + 3)
        row["cone"][name] = cone(name, seed, 100 if fast else 5000, 1000 if fast else DRAWS)
    if not fast:
        row["air"] = air(seed, AIR_STEPS, DRAWS, lambda name: progress(name, len(names), len(names) + 3))
    return row


def judge(rows: list[dict[str, Any]]) -> Judgement:
    if any(row["fast"] for row in rows):
        return Judgement(
            "inconclusive", "a fast run ends before anything has been learnt", {"cone": [r["cone"] for r in rows]}
        )
    pooled = {}
    for name in CONE_OBJECTIVES:
        each = [row["cone"][name] for row in rows]
        error = sum(e["error"] ** 2 for e in each) ** 0.5 / len(each)
        pooled[name] = (mean(e["value"] for e in each), error)

    def above(more: str, less: str) -> float:
        (a, e1), (b, e2) = pooled[more], pooled[less]
        return (a - b) / (e1**2 + e2**2) ** 0.5

    ok = {
        "naive ELBO in -8.1 +- 0.15": all(abs(row["cone"]["ELBO"]["value"] + 8.1) <= 0.15 for row in rows),
        "IWELBO(5) > ELBO": all(row["cone"]["IWELBO(5)"]["value"] > row["cone"]["ELBO"]["value"] for row in rows),
        "HVI < IWHVI(5) by > 4 errors": above("IWHVI(5)", "HVI") > 4,
        "IWHVI(5) < DIWHVI(5,5) by > 4 errors": above("DIWHVI(5,5)", "IWHVI(5)") > 4,
        "DIWHVI(5,5) > -7.6": all(row["cone"]["DIWHVI(5,5)"]["value"] > -7.6 for row in rows),
        "all below log p(z)": all(e["value"] < CONE_LOG_EVIDENCE for row in rows for e in row["cone"].values()),
    }
    gaps = {}
    for less, more in (("ENUM", "MVD"), ("MVD", "REINFORCE")):
        pairs = [row["air"][f"{more} - {less}"] for row in rows]
        gap, error = mean(p["gap"] for p in pairs), sum(p["error"] ** 2 for p in pairs) ** 0.5 / len(pairs)
        gaps[f"variance {more} - {less}"] = (gap, error)
        ok[f"variance {less} {'<=' if less == 'ENUM' else '<'} {more}"] = gap > (-2 if less == "ENUM" else 2) * error
        ahead = [row["air"][less]["value"] - row["air"][more]["value"] for row in rows]
        drawn = sum(row["air"][m]["error"] ** 2 for row in rows for m in (less, more)) ** 0.5 / len(rows)
        error = max(stdev(ahead) / len(rows) ** 0.5, drawn)
        gaps[f"ELBO {less} - {more}"] = (mean(ahead), error)
        ok[f"ELBO {less} >= {more} within 2 errors"] = mean(ahead) > -2 * error
    figures: dict[str, Any] = {"criteria": ok, "cone": pooled, "air": gaps, "paper": PAPER}
    for name in STRATEGIES:
        figures[name] = {k: mean(row["air"][name][k] for row in rows) for k in rows[0]["air"][name]}
    values = ", ".join(f"{name} {value:.3f} (paper {PAPER[name]})" for name, (value, _) in pooled.items())
    air_values = ", ".join(
        f"{name} variance {figures[name]['variance']:.0f} and ELBO {figures[name]['value']:.2f}" for name in STRATEGIES
    )
    failed = [name for name, passed in ok.items() if not passed]
    measured = f"cone: {values}; images: {air_values}" + (f"; not met: {', '.join(failed)}" if failed else "")
    return Judgement("fails" if failed else "holds", measured, figures)


claim = Claim(
    slug="progvi",
    statement="One transformation gives working gradients for objectives that need hand-derived estimators elsewhere: on the "
    "cone the five objectives reach their known order and values, and for a discrete choice enumeration and measure-valued "
    "derivatives have less gradient variance than REINFORCE, at no cost in the objective after equal steps.",
    criterion="Holds if over 3 seeds, final means over 50000 draws: naive ELBO within 0.15 of -8.1 and IWELBO(5) above it in "
    "every seed; HVI < IWHVI(5) < DIWHVI(5,5), each gap > 4 standard errors; DIWHVI(5,5) above -7.6 and every objective below "
    "log p(z) = -5.323 in every seed; on the images the variance of one draw's gradient is ENUM <= MVD (within 2 standard "
    "errors) < REINFORCE (by more than 2), and the final ELBO in the reverse order within 2 standard errors. Fails otherwise.",
    seeds=(0, 1, 2),
    run=run,
    judge=judge,
)
