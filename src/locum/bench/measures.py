"""From raw lines to figures. Each measure is one entry of a table that the terminal, the report and the JSON all read.

A raw line is what one method did on one item with one seed, plus ``line["refs"]``: what the references did beside it, in
the same pass. A speed is compared within a pass only, as a ratio, and the ratios' median is reported: a machine that is slow
for a minute is slow for both.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from locum.bench.store import Row

__all__ = [
    "PEAK_MEMORY",
    "Measure",
    "aggregate",
    "interval",
    "largest",
    "last",
    "mean",
    "mean_interval",
    "median",
    "paired",
    "paired_limits",
    "ratio",
    "raw",
    "sign_test",
    "summary",
    "total",
]

Value = float | bool | str | None


@dataclass(frozen=True)
class Measure:
    """One figure of a result.

    Args:
        key: its name in the JSON.
        section: the part of a result that it belongs to.
        title: column head.
        unit: what one of it is; "" for a pure number.
        better: which way is better; "" when neither is.
        how: one sentence on how it is computed.
        of: the figure over some lines, all of one method; None when there is none.
        each: the figure of one line, where the whole is a median over lines: from these the interval is drawn.
        digits: decimals shown; of a share, whose unit is "%", two more than its percentage shows.
        limits: the figure's interval over some lines, where it is made in another way.
        signed: a difference, shown with its sign.
        aside: shown in the family's own sections of a report, not in its first table.
    """

    key: str
    section: Literal["quality", "cost", "fidelity", "ratios"]
    title: str
    unit: str
    better: Literal["higher", "lower", "yes", ""]
    how: str
    of: Callable[[Sequence[Row]], Value]
    each: Callable[[Row], float | None] | None = None
    digits: int = 2
    limits: Callable[[Sequence[Row]], tuple[float, float] | None] | None = None
    signed: bool = False
    aside: bool = False

    def interval(self, lines: Sequence[Row]) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of the figure, where it is known; of a median over at least two lines, for instance."""
        if self.limits is not None:
            return self.limits(lines)
        return interval(_known(map(self.each, lines))) if self.each else None

    def shown(self, value: float) -> str:
        """A number as it is shown, without its unit but for a percentage."""
        if self.unit == "%":
            return f"{value * 100:.{self.digits - 2}f} %"
        return f"{value:{'+' if self.signed else ''}.{self.digits}f}"


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the median; None for fewer than two values. Same values, same interval."""
    return _bootstrap(values, np.median, 0.95, draws) if len(values) >= 2 else None


def mean_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, for claims; pass paired differences to compare. Same values, same interval."""
    return _bootstrap(values, np.mean, level, draws)


def sign_test(differences: Sequence[float]) -> float:
    """P(at least as many wins in coin tosses), one-sided, for paired differences where a win is > 0; a tie or nan is none.

    >>> round(sign_test([0.1, 0.4, 0.2, 0.1, -0.3, 0.2, 0.5, 0.1]), 4)  # 7 of 8
    0.0352
    """
    from scipy.stats import binomtest

    return float(binomtest(sum(d > 0 for d in differences), len(differences), alternative="greater").pvalue)


def _bootstrap(
    values: Sequence[float] | np.ndarray, statistic: Callable[..., Any], level: float, draws: int
) -> tuple[float, float]:
    data = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(statistic(data[chosen], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def median(each: Callable[[Row], float | None]) -> Callable[[Sequence[Row]], float | None]:
    """The median over lines of a figure of one line."""

    def of(lines: Sequence[Row]) -> float | None:
        values = _known(map(each, lines))
        return float(np.median(values)) if values else None

    return of


def mean(each: Callable[[Row], float | None]) -> Callable[[Sequence[Row]], float | None]:
    """The mean over lines of a figure of one line."""

    def of(lines: Sequence[Row]) -> float | None:
        values = _known(map(each, lines))
        return float(np.mean(values)) if values else None

    return of


def raw(name: str) -> Callable[[Row], float | None]:
    """A raw figure of one line."""
    return lambda line: line["raw"].get(name)


def last(name: str) -> Callable[[Row], float | None]:
    """A figure at the end of a training, from the curve of it in the raw line."""

    def each(line: Row) -> float | None:
        values = line["raw"]["curve"].get(name)
        return None if not values else values[-1]

    return each


def largest(name: str) -> Callable[[Sequence[Row]], float | None]:
    """The largest of a raw figure over lines."""

    def of(lines: Sequence[Row]) -> float | None:
        return max(_known(map(raw(name), lines)), default=None)

    return of


PEAK_MEMORY = Measure(
    "peak_memory_mb",
    "cost",
    "peak MB",
    "",
    "lower",
    "largest growth of memory in a training. CPU: resident memory of the process, peak less start, so memory that it already "
    "held does not count. CUDA: the allocator's peak less start",
    largest("peak_memory_mb"),
    digits=0,
)


def total(key: str) -> Callable[[Sequence[Row]], float | None]:
    """The sum over lines of a raw figure."""

    def of(lines: Sequence[Row]) -> float | None:
        values = _known(line["raw"].get(key) for line in lines)
        return float(sum(values)) if values else None

    return of


def ratio(upper: str, lower: str) -> Callable[[Sequence[Row]], float | None]:
    """A raw figure summed over lines, by another summed over the same lines; None where either is not known."""

    def of(lines: Sequence[Row]) -> float | None:
        if any(line["raw"].get(k) is None for line in lines for k in (upper, lower)):
            return None
        below = sum(line["raw"][lower] for line in lines)
        return float(sum(line["raw"][upper] for line in lines) / below) if below else None

    return of


def paired(rate: str, reference: str) -> Callable[[Row], float | None]:
    """A line's raw rate by the rate of the reference beside it."""

    def each(line: Row) -> float | None:
        beside = line["refs"].get(reference, {}).get(rate)
        return line["raw"][rate] / beside if beside and line["raw"].get(rate) is not None else None

    return each


def paired_limits(
    lines: Sequence[Row],
    difference: Callable[..., float | None],
    reference: str,
    draws: int = 1000,
) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean difference from a reference: over seeds where figures are exact, over prompts too else.

    Args:
        lines: of one method, one per seed. What was measured on samples has, in "by_prompt" of the raw line, tables by name of
            checkpoints x prompts.
        difference: of one line from the reference beside it; given prompts' numbers too, over those alone.
        reference: the method it is measured from, which has no interval itself.
    """
    lines = [line for line in lines if difference(line) is not None]
    if not lines or lines[0]["method"] == reference:
        return None
    if any("by_prompt" not in made for line in lines for made in (line["raw"], line["refs"][reference])):
        return mean_interval(_known(map(difference, lines))) if len(lines) > 1 else None
    rng = np.random.default_rng(0)
    n = len(next(iter(lines[0]["raw"]["by_prompt"].values()))[0])
    found = []
    for _ in range(draws):
        prompts = rng.integers(n, size=n)
        chosen = _known(difference(lines[i], prompts) for i in rng.integers(len(lines), size=len(lines)))
        found += [float(np.mean(chosen))] if chosen else []
    if len(found) < draws / 2:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def summary(lines: Sequence[Row], measures: Iterable[Measure]) -> dict[str, dict[str, Any]]:
    """Section -> key -> figure. A figure that has an interval carries it as ``<key>_interval``."""
    figures: dict[str, dict[str, Any]] = {"quality": {}, "cost": {}, "fidelity": {}, "ratios": {}}
    for measure in measures:
        figures[measure.section][measure.key] = measure.of(lines) if lines else None
        if measure.limits or (measure.section == "ratios" and measure.each):
            limits = measure.interval(lines) if lines else None
            figures[measure.section][f"{measure.key}_interval"] = list(limits) if limits else None
    return figures


def aggregate(
    lines: Sequence[Row], measures: Sequence[Measure], by: Sequence[str] = ("method", "group", "seed")
) -> list[Row]:
    """One row per combination of the `by` columns, in the order in which they first come; failed lines leave their error.

    A row is ``{"method", "group", "seed", "quality": {..}, "cost": {..}, "fidelity": {..}, "ratios": {..}}`` and, where a line
    failed, "error".
    """
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for line in lines:
        cells.setdefault(tuple(line[k] for k in by), []).append(line)
    rows = []
    for cell, members in cells.items():
        row = dict(zip(by, cell, strict=True)) | summary([m for m in members if "error" not in m], measures)
        if errors := [m["error"] for m in members if "error" in m]:
            row["error"] = errors[0]
        rows.append(row)
    return rows


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]
