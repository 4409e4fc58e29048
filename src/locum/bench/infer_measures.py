"""What is said of a way to run a regression on a model's labels: the one table of its measures.

A raw line is a block of replications. It holds "names" and "truth" of the coefficients, "estimate" and "se" of every
replication (None where a method had no result), "seconds" and "labels" of each, "fits" of one. Replications of the same seed
and group are the same data for every method, so errors are compared pairwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from locum.bench.infer_methods import BASELINE, Way
from locum.bench.measures import Measure, mean, median, raw
from locum.bench.store import Row

__all__ = ["ENOUGH", "MEASURES", "NOMINAL", "Drawn", "beside", "binomial", "covers", "drawn", "versus"]

Array = np.ndarray
NOMINAL = 0.95
ENOUGH = 0.93  # coverage that is taken for nominal however many replications there are
DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a method said of some replications; nan where it had no result."""

    names: tuple[str, ...]
    error: Float[Array, "replications p"]
    se: Float[Array, "replications p"]

    @property
    def covered(self) -> Bool[Array, "replications p"]:
        """Whether an interval holds the truth; one that is not there does not."""
        return np.abs(self.error) <= Way.z * self.se

    @property
    def known(self) -> Bool[Array, " replications"]:
        return np.isfinite(self.error).all(1) & np.isfinite(self.se).all(1)


def drawn(made: Sequence[Row]) -> Drawn:
    """The replications of some raw figures, one after the other."""
    names = tuple(made[0]["names"])

    def table(m: Row, key: str) -> Array:
        return np.array([[np.nan] * len(names) if row is None else row for row in m[key]], dtype=float)

    error = [table(m, "estimate") - np.asarray(m["truth"]) for m in made]
    return Drawn(names, np.concatenate(error), np.concatenate([table(m, "se") for m in made]))


def _mine(lines: Sequence[Row]) -> Drawn:
    return drawn([line["raw"] for line in lines])


def beside(lines: Sequence[Row]) -> tuple[Drawn, Drawn] | None:
    """A method and gold labels alone, on the replications where both had a result; None where they were not together."""
    if any(BASELINE not in line["refs"] for line in lines):
        return None
    mine, gold = _mine(lines), drawn([line["refs"][BASELINE] for line in lines])
    both = mine.known & gold.known
    if both.sum() < 2:
        return None
    return Drawn(mine.names, mine.error[both], mine.se[both]), Drawn(gold.names, gold.error[both], gold.se[both])


def binomial(hits: float, n: int, level: float = NOMINAL) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a probability."""
    from scipy.stats import beta

    rest = (1 - level) / 2
    low = beta.ppf(rest, hits, n - hits + 1) if hits > 0 else 0.0
    high = beta.isf(rest, hits + 1, n - hits) if hits < n else 1.0
    return float(low), float(high)


def covers(found: Drawn) -> Bool[Array, " p"]:
    """Which coefficients are covered at the nominal rate, as far as so many replications can tell.

    One is not when its coverage is less than `ENOUGH` and its binomial interval lies below the nominal rate. As all
    coefficients are looked at, the intervals are at the level 1 - 0.05 / coefficients.
    """
    n, p = found.covered.shape
    hits = found.covered.sum(0)
    reach = [binomial(float(h), n, 1 - (1 - NOMINAL) / p)[1] for h in hits]
    return (hits / n >= ENOUGH) | (np.asarray(reach) >= NOMINAL)


def versus(mine: Drawn, gold: Drawn, weights: Float[Array, "... replications"]) -> Float[Array, " ..."]:
    """Root mean square error in units of that of gold labels alone, coefficient by coefficient."""
    square = (weights @ mine.error**2) / (weights @ gold.error**2)
    return np.asarray(np.sqrt(square.mean(-1)))


def _versus(lines: Sequence[Row]) -> float | None:
    pair = beside(lines)
    return None if pair is None else float(versus(*pair, np.ones(len(pair[0].error))))


def _limits(lines: Sequence[Row]) -> tuple[float, float] | None:
    """95 % bootstrap over replications, both methods drawn together."""
    pair = beside(lines)
    if pair is None or lines[0]["method"] == BASELINE:
        return None
    n = len(pair[0].error)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    low, high = np.quantile(versus(*pair, weights), [0.025, 0.975])
    return float(low), float(high)


def _covers(lines: Sequence[Row]) -> bool:
    return bool(covers(_mine(lines)).all())


def _coverage(lines: Sequence[Row]) -> float:
    return float(_mine(lines).covered.mean())


def _coverage_limits(lines: Sequence[Row]) -> tuple[float, float]:
    covered = _mine(lines).covered
    return binomial(float(covered.mean(1).sum()), len(covered))


def _worst(lines: Sequence[Row]) -> float:
    return float(_mine(lines).covered.mean(0).min())


def _worst_limits(lines: Sequence[Row]) -> tuple[float, float]:
    covered = _mine(lines).covered
    return binomial(float(covered.sum(0).min()), len(covered))


def _of_known(figure: Callable[[Drawn], float]) -> Callable[[Sequence[Row]], float | None]:
    """A figure of the replications that have a result."""

    def of(lines: Sequence[Row]) -> float | None:
        found = _mine(lines)
        some = Drawn(found.names, found.error[found.known], found.se[found.known])
        return float(figure(some)) if found.known.any() else None

    return of


def _bias(found: Drawn) -> float:
    return float((np.abs(found.error.mean(0)) / found.se.mean(0)).max())


def _width(found: Drawn) -> float:
    return float(2 * Way.z * found.se.mean())


def _rmse(found: Drawn) -> float:
    return float(np.sqrt((found.error**2).mean()))


def _width_versus(lines: Sequence[Row]) -> float | None:
    pair = beside(lines)
    return None if pair is None else float((pair[0].se.mean(0) / pair[1].se.mean(0)).mean())


def _worth(lines: Sequence[Row]) -> float | None:
    """The variance of gold labels' estimates by the method's; None for one whose intervals miss: a label is worth nothing there."""
    pair = beside(lines)
    if pair is None or not _covers(lines):
        return None
    mine, gold = (found.error.var(0) for found in pair)
    return float(np.exp(np.log(gold / mine).mean())) if (mine > 0).all() else None


def _failed(lines: Sequence[Row]) -> float:
    return float(1 - _mine(lines).known.mean())


MEASURES = (
    Measure(
        "covers", "fidelity", "covers", "", "yes",
        "whether the 95 % intervals of every coefficient hold the truth at their rate, as far as so many replications can tell: no "
        f"where a coefficient's coverage is below {ENOUGH:.0%} and its binomial interval, at level 1 - 0.05/coefficients, below 95 %",
        _covers,
    ),
    Measure(
        "coverage", "fidelity", "coverage", "%", "",
        "share of 95 % intervals that hold the truth, mean over coefficients; nominal is 95 %. With its binomial interval, in which a "
        "replication counts once. A replication without a result does not cover",
        _coverage, digits=3, limits=_coverage_limits,
    ),
    Measure(
        "worst", "fidelity", "worst covered", "%", "", "coverage of the coefficient that is covered least, with its binomial interval",
        _worst, digits=3, limits=_worst_limits,
    ),
    Measure(
        "vs_gold", "ratios", "error vs gold alone", "×", "lower",
        "root mean square error by that of gold labels alone on the same replications: per coefficient, then the root of the mean "
        "square over coefficients. 95 % bootstrap interval over replications. Of a method that does not cover it says nothing good",
        _versus, limits=_limits,
    ),
    Measure(
        "bias", "quality", "bias", "s.e.", "",
        "mean error by the mean standard error that the method claims, of the coefficient where it is largest. 0 is best, but with n "
        "replications chance alone gives about 1/√n to each coefficient",
        _of_known(_bias),
    ),
    Measure(
        "width_vs_gold", "ratios", "width vs gold", "×", "lower",
        "mean width of an interval by that of gold labels alone, mean over coefficients", _width_versus,
    ),
    Measure(
        "labels_worth", "fidelity", "labels worth", "×", "higher",
        "variance of the estimates of gold labels alone by the method's, geometric mean over coefficients: one gold label does the "
        "work of so many used alone. None for a method that does not cover",
        _worth,
    ),
    Measure(
        "width", "quality", "width", "", "lower", "mean width of a 95 % interval, over coefficients and replications",
        _of_known(_width), digits=3, aside=True,
    ),
    Measure(
        "rmse", "quality", "RMSE", "", "lower", "root mean square error over coefficients and replications",
        _of_known(_rmse), digits=3, aside=True,
    ),
    Measure(
        "gold_labels", "cost", "gold labels", "", "lower", "gold labels that a regression uses, mean over replications",
        mean(raw("gold_labels")), digits=0,
    ),
    Measure(
        "seconds", "cost", "sec. each", "s", "lower",
        "wall time of one regression, median over replications. Predictions alone come out of the same cross-fitting as dsl, and take "
        "as long",
        median(raw("seconds")), digits=3,
    ),
    Measure("fits", "cost", "fits", "", "lower", "predictors fitted for one regression", mean(raw("fits")), digits=0, aside=True),
    Measure(
        "failed", "fidelity", "no result", "%", "lower", "share of replications in which the regression had no finite solution",
        _failed, digits=3, aside=True,
    ),
)  # fmt: skip
