"""Coverage and width of 95 % intervals on model-made labels: ours beside ppi-python's, on the same replications.

    python benchmarks/dsl_coverage.py [--replications 500] [--splits 1]

A logistic regression on 2,000 documents, 300 of them with gold labels, whose surrogate is right on 80, 85 or 90 % of them and errs
where it hurts (`locum.tasks.annotations`). Beside them: the surrogate taken for a label, and gold labels alone. Of each way the
share of intervals that hold the true coefficient, their width over that of gold labels alone, and the seconds of a regression.
Written to benchmarks/results/dsl_coverage.json.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from locum.bench.machine import environment
from locum.infer import DSL
from locum.progress import Bar
from locum.tasks.annotations import Simulation

try:
    from ppi_py import ppi_logistic_ci
except ImportError:
    raise SystemExit("this needs the peer: pip install ppi-python") from None

ACCURACIES = (0.80, 0.85, 0.90)
NAMES = ("Intercept", "x1", "x2")
Interval = tuple[np.ndarray, np.ndarray]


def ways(seed: int, simulation: Simulation, splits: int) -> dict[str, tuple[Interval, float]]:
    """Of each way the interval and the seconds; those that stand beside ours come with it."""
    d = simulation.draw(seed)
    X, has = np.column_stack([np.ones(simulation.n), d["x1"], d["x2"]]), np.isfinite(d["y"])
    began = time.perf_counter()
    method = DSL("logistic", "generalized", splits=splits, seed=seed)
    found = method.fit_arrays({"y": d["y"], "X": X}, {"y": d["q"]}, d["prob"], features=X[:, 1:])
    took = time.perf_counter() - began
    out = {}
    beside = {name: found.fit.baselines[name] for name in ("surrogate only", "gold only")}
    for name, e in {"dsl": found.fit.dsl, **beside}.items():
        out[name] = ((e.theta - 1.959964 * e.se, e.theta + 1.959964 * e.se), took)
    for name, lam in (("ppi", 1.0), ("ppi++", None)):
        began = time.perf_counter()
        low, high = ppi_logistic_ci(X[has], d["y"][has], d["q"][has], X[~has], d["q"][~has], alpha=0.05, lam=lam)
        out[name] = ((low, high), time.perf_counter() - began)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dsl_coverage.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"benchmark": "dsl_coverage", **environment(), **vars(args), "out": args.out.name}
    found["accuracies"] = {}
    with Bar("coverage", len(ACCURACIES) * args.replications) as bar:
        for accuracy in ACCURACIES:
            simulation = Simulation(accuracy=accuracy)
            rows = []
            for seed in range(args.replications):
                rows.append(ways(seed, simulation, args.splits))
                bar.step(f"accuracy {accuracy:.0%}")
            found["accuracies"][f"{accuracy:.2f}"] = told(rows, np.array(simulation.beta))
    found |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "load": os.getloadavg()[0]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def told(rows: list[dict[str, tuple[Interval, float]]], truth: np.ndarray) -> dict[str, Any]:
    """Figures of one accuracy, printed as they are made."""
    ends = {way: np.array([r[way][0] for r in rows]) for way in rows[0]}  # [replications, 2, coefficients]
    gold = (ends["gold only"][:, 1] - ends["gold only"][:, 0]).mean(0)
    out: dict[str, Any] = {}
    for way, e in ends.items():
        inside = ((e[:, 0] <= truth) & (truth <= e[:, 1])).sum(0)
        each = [binomtest(int(k), len(e)).proportion_ci() for k in inside]
        out[way] = {
            "coverage": dict(zip(NAMES, (inside / len(e)).tolist(), strict=True)),
            "coverage_interval": {n: [c.low, c.high] for n, c in zip(NAMES, each, strict=True)},
            "width_over_gold": dict(zip(NAMES, ((e[:, 1] - e[:, 0]).mean(0) / gold).tolist(), strict=True)),
            "seconds": float(np.median([r[way][1] for r in rows])),
        }
        covered = " ".join(f"{k / len(e):.3f}" for k in inside)
        width = " ".join(f"{w:.2f}" for w in out[way]["width_over_gold"].values())
        print(f"{way:15} coverage {covered}, width over gold's {width}, {out[way]['seconds']:.3f} s", file=sys.stderr)
    return out


if __name__ == "__main__":
    main()
