"""Runs a regression in one way on a block of replications, and keeps what every replication said."""

import statistics
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from locum.bench.engines import Tell, Unit
from locum.bench.infer_methods import BASELINE, CROSS_FITTED, Found, Way, way_of
from locum.bench.infer_worlds import World
from locum.bench.store import Row
from locum.errors import UserError

__all__ = ["InferRunner"]

PACKAGES = ("scikit-learn", "statsmodels", "ppi-python")


class InferRunner:
    """Measures one unit at a time: a method on the replications of a seed.

    Args:
        worlds: by group.
        replications: of a seed.
        jobs: processes that share the replications of a method that is cross-fitted.
    """

    tell: Tell | None = None

    def __init__(self, worlds: Mapping[str, World], replications: int, jobs: int) -> None:
        self.worlds, self.replications, self.jobs = worlds, replications, jobs
        # Predictions alone come out of the same fits: they are kept until they are asked for.
        self._kept: dict[tuple[str, int, tuple[Any, ...]], list[tuple[int, dict[str, Found]]]] = {}
        found = {}
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        self.environment: dict[str, Any] = {"packages": found, "jobs": jobs}

    def __call__(self, unit: Unit) -> Row:
        way, world = way_of(unit.method), self.worlds[unit.group]
        done = []
        for labels, found in self._results(way, world, unit):
            done.append((labels, found[way.name]))
            if self.tell is not None:
                share = len(done) / self.replications
                self.tell(unit, share, f"replication {len(done)} of {self.replications}")
        results = [found for _, found in done]
        if all(f.failed for f in results):
            raise UserError(f"none of {len(results)} regressions has a result: {results[0].failed}")
        made: Row = {
            "settings": way.said,
            "names": list(world.problem(unit.seed, 0).names),
            "truth": _short(world.truth),
            "estimate": [None if f.failed else _short(f.theta) for f in results],
            "se": [None if f.failed else _short(f.se) for f in results],
            "gold_labels": 0.0 if way.name == "naive" else statistics.mean(labels for labels, _ in done),
            "seconds": statistics.median(f.seconds for f in results),
            "fits": max(f.fits for f in results),
            "failures": sorted({f.failed for f in results if f.failed})[:3],
        }
        return made | ({"surrogate": world.surrogate(unit.seed)} if way.name == BASELINE else {})

    def _results(self, way: Way, world: World, unit: Unit) -> Iterator[tuple[int, dict[str, Found]]]:
        """Gold labels and what came out, replication by replication."""
        key = (unit.group, unit.seed, way.given)
        if way.name in CROSS_FITTED and key in self._kept:
            yield from self._kept.pop(key)
            return
        kept = []
        calls = ((way, world, unit.seed, i) for i in range(self.replications))
        if self.jobs > 1 and way.name in CROSS_FITTED:
            from joblib import Parallel, delayed

            made = Parallel(self.jobs, return_as="generator")(delayed(_replicate)(*call) for call in calls)
        else:
            made = (_replicate(*call) for call in calls)
        for result in made:
            kept.append(result)
            yield result
        if way.name in CROSS_FITTED:
            self._kept = {k: v for k, v in self._kept.items() if k[:2] == key[:2]} | {key: kept}


def _replicate(way: Way, world: World, seed: int, replication: int) -> tuple[int, dict[str, Found]]:
    problem = world.problem(seed, replication)
    return len(problem.at), way.estimate(problem, world.moment)


def _short(values: Any) -> list[float]:
    """Six digits."""
    return [float(f"{x:.6g}") for x in np.asarray(values)]
