"""Time of one regression on model-made labels: ours beside ppi-python's, and beside statsmodels' on gold labels alone.

    python benchmarks/dsl_speed.py [--runs 5]

The same data for all: a logistic and a linear regression on 10 covariates, 100,000 documents, 1,000 of them with gold labels,
surrogates as they are (nothing is fitted); then ours with what it does besides: 10 times 5 predictors fitted and cross-fitted
on a table by formula, and a million documents. Runs alternate, in turn first and last, and ratios are of neighbours; below 1
ours is faster. Written to benchmarks/results/dsl_speed.json.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.api as sm

from locum.bench.machine import environment
from locum.infer import DSL

try:
    from ppi_py import ppi_logistic_ci, ppi_ols_ci
except ImportError:
    raise SystemExit("this needs the peer: pip install ppi-python") from None

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def documents(rows: int, covariates: int, gold: int, seed: int = 0) -> Data:
    """X with an intercept, all gold labels, surrogates that err more where the first covariate is large, and who is labelled."""
    r = np.random.default_rng(seed)
    X = np.column_stack([np.ones(rows), r.normal(size=(rows, covariates))])
    y = (r.random(rows) < 1 / (1 + np.exp(-X @ np.linspace(-0.5, 0.5, covariates + 1)))).astype(float)
    q = np.where(r.random(rows) < 0.1 + 0.08 * (X[:, 1] > 0), 1 - y, y)
    labelled = np.zeros(rows, dtype=bool)
    labelled[r.permutation(rows)[:gold]] = True
    return X, y, q, labelled


def ours(moment: str, data: Data) -> Callable[[], Any]:
    X, y, q, labelled = data
    D = {"y": np.where(labelled, y, np.nan), "X": X}
    return lambda: DSL(moment, "identity").fit_arrays(D, {"y": q})


def ppi(moment: str, data: Data) -> Callable[[], Any]:
    X, y, q, has = data
    interval = ppi_logistic_ci if moment == "logistic" else ppi_ols_ci
    return lambda: interval(X[has], y[has], q[has], X[~has], q[~has], alpha=0.05)


def statsmodels(moment: str, data: Data) -> Callable[[], Any]:
    """Gold labels for every row: what the peers' own regressions take for as many rows."""
    X, y, _, _ = data
    model = sm.Logit if moment == "logistic" else sm.OLS
    more = {"disp": 0} if moment == "logistic" else {}
    return lambda: model(y, X).fit(cov_type="HC0", **more)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dsl_speed.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    data = documents(100_000, 10, 1000)
    found: dict[str, Any] = {"benchmark": "dsl_speed", **environment(), "ratios": {}, "seconds": {}}
    for moment in ("linear", "logistic"):
        makers = {"dsl": ours, "ppi-python": ppi, "statsmodels": statsmodels}
        works = {name: make(moment, data) for name, make in makers.items()}
        for work in works.values():
            work()  # off the clock
        taken: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(args.runs):
            for name in list(works) if turn % 2 == 0 else list(works)[::-1]:
                taken[name].append(seconds(works[name]))
        for peer in ("ppi-python", "statsmodels"):
            each = sorted(a / b for a, b in zip(taken["dsl"], taken[peer], strict=True))
            key = f"{moment}: dsl / {peer}"
            found["ratios"][key] = {"median": median(each), "min": each[0], "max": each[-1]}
            print(f"{key}: {median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})", flush=True)
        found["seconds"][moment] = taken
    X, y, q, labelled = data
    table = pd.DataFrame(X[:, 1:], columns=[f"x{j}" for j in range(1, X.shape[1])])
    table = table.assign(y=np.where(labelled, y, np.nan), q=q)
    formula = f"y ~ {' + '.join(c for c in table if c.startswith('x'))}"
    for moment in ("linear", "logistic"):
        whole = [
            seconds(lambda m=moment: DSL(m, "generalized").fit(table, formula, {"y": "q"}, progress=True))
            for _ in range(args.runs)
        ]
        found["seconds"][f"{moment}, cross-fitted, 100,000 documents by formula"] = whole
        print(f"{moment}, 10 x 5 predictors, 100,000 documents by formula: {median(whole):.1f} s", flush=True)
    million = documents(1_000_000, 19, 1000)
    for moment in ("linear", "logistic"):
        each = [seconds(ours(moment, million)) for _ in range(2)]
        found["seconds"][f"{moment}, 1,000,000 documents, 20 columns"] = each
        print(f"{moment}, a million documents, 20 columns: {median(each):.1f} s", flush=True)
    found |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "load": os.getloadavg()[0]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
