"""Where ways to run a regression on a model's labels are compared: replications of which the truth is known.

Simulated regimes, and a user's own table: with gold labels in all of its rows, of which few are shown each time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from locum.bench.store import Row
from locum.errors import UserError
from locum.infer.base import Moment

if TYPE_CHECKING:
    from locum.infer.problem import Problem
    from locum.tasks.annotations import Simulation

__all__ = ["DATA", "REGIMES", "OwnTable", "Simulated", "World", "errors_of"]

Array = np.ndarray
DATA = "data"  # the group of a user's own table
REGIMES: dict[str, dict[str, Any]] = {  # what is simulated: how labels are drawn, and how the surrogate errs
    "differential errors": {"design": "equal", "surrogate": "differential"},
    "unequal probabilities": {"design": "unequal", "surrogate": "differential"},
    "useless surrogate": {"design": "equal", "surrogate": "coin"},
    "good surrogate": {"design": "equal", "surrogate": 0.9},
}
MANY = 10_000  # replications of a seed
PARTS = 8  # columns by which the surrogate's errors are shown


class World(ABC):
    """Replications of one regression.

    `moment` is what is estimated, `truth` the coefficients that an interval ought to hold, `alike` whether all rows have the same
    probability of a gold label.
    """

    moment: Moment
    alike: bool

    @property
    @abstractmethod
    def truth(self) -> Float[Array, " p"]: ...

    @abstractmethod
    def problem(self, seed: int, replication: int) -> "Problem":
        """The data of a replication, gold labels where they were drawn."""

    @abstractmethod
    def surrogate(self, seed: int) -> list[Row]:
        """How the surrogate of the outcome errs, as `errors_of` tells; nothing where it is of something else."""


@dataclass(frozen=True)
class Simulated(World):
    """One of the `REGIMES`: a logistic regression on two columns, whose coefficients are known."""

    regime: str
    rows: int
    labels: int

    @cached_property
    def moment(self) -> Moment:  # type: ignore[override]
        from locum.infer.moments import Logistic

        return Logistic()

    @cached_property
    def simulation(self) -> "Simulation":
        from locum.tasks.annotations import Simulation

        return Simulation(n=self.rows, gold=self.labels, **REGIMES[self.regime])

    @property
    def alike(self) -> bool:  # type: ignore[override]
        return self.simulation.design == "equal"

    @property
    def truth(self) -> Float[Array, " p"]:
        return np.asarray(self.simulation.beta)

    def problem(self, seed: int, replication: int) -> "Problem":
        from locum.infer.problem import from_arrays

        drawn = self.simulation.draw(seed * MANY + replication)
        X = np.column_stack([np.ones(self.rows), drawn["x1"], drawn["x2"]])
        columns, surrogates, features = {"y": drawn["y"], "X": X}, {"y": drawn["q"]}, X[:, 1:]
        return from_arrays(
            self.moment,
            columns,
            surrogates,
            drawn["prob"],
            None,
            features,
            None,
            lambda D: D,
            ("Intercept", "x1", "x2"),
        )

    def surrogate(self, seed: int) -> list[Row]:
        drawn = self.simulation.draw(seed * MANY)
        return errors_of(drawn["truth"], drawn["q"], {name: drawn[name] for name in ("x1", "x2")})


@dataclass(frozen=True)
class OwnTable(World):
    """A user's table.

    Args:
        table: a data frame.
        formula, predicted, gold, features, cluster: as in `DSL.fit`.
        labels: gold labels that are shown each time.
        moment: what is estimated.
    """

    table: Any
    formula: str
    gold: str
    predicted: tuple[str, ...]
    features: tuple[str, ...]
    cluster: str | None
    labels: int
    moment: Moment

    alike = True

    @cached_property
    def whole(self) -> "Problem":
        """The problem with all gold labels."""
        from locum.infer.formulas import from_formula

        found = from_formula(
            self.table, self.formula, self.moment, {self.gold: self.predicted}, 1.0, None, self.features, self.cluster
        )
        N, p = found.size, len(found.names)
        if not p < self.labels < N:
            raise UserError(
                f"the number of gold labels to show must be more than {p}, the coefficients, and less than {N}, the rows that have "
                f"one, got {self.labels}"
            )
        return found

    @cached_property
    def truth(self) -> Float[Array, " p"]:
        """What all gold labels together give."""
        from locum.infer.dsl import simpler

        found = simpler("gold only", self.whole, self.moment, np.ones(self.whole.size))
        assert found is not None
        if found.failed:
            raise UserError(f"the regression on all gold labels has no result: {found.failed}")
        return found.theta

    def problem(self, seed: int, replication: int) -> "Problem":
        N = self.whole.size
        at = np.sort(np.random.default_rng([seed, replication]).choice(N, self.labels, replace=False))
        shown = {k: replace(v, labels=v.labels[at]) for k, v in self.whole.predicted.items()}
        return replace(self.whole, at=at, prob=np.full(N, self.labels / N), predicted=shown)

    def surrogate(self, seed: int) -> list[Row]:
        [variable] = self.whole.predicted.values()
        if variable.stand_in is None or not self.whole.outcome_only:
            return []
        return errors_of(variable.labels, variable.stand_in, _columns(self.whole))


def _columns(problem: "Problem") -> dict[str, Array]:
    """The explanatory columns by name, as far as every coefficient has one of its own."""
    X = problem.rows(problem.zeros, slice(None))["X"]
    return dict(zip(problem.names, X.T, strict=True)) if X.shape[1] == len(problem.names) else {}


def errors_of(
    gold: Shaped[Array, "rows *classes"], stand_in: Shaped[Array, "rows *classes"], columns: Mapping[str, Array]
) -> list[Row]:
    """How a surrogate errs, in all rows and in parts of them: by columns of two values, or below and above the median.

    A row has "part", "share" of the rows, and of a label that is 0 or 1 "gold", the share of ones, "invented", P(it says 1 | 0),
    "missed", P(it says 0 | 1), and "right"; of classes "right"; of a number "bias" and "spread", mean and standard deviation of
    surrogate less gold, and their correlation "r".
    """
    parts: dict[str, Array] = {"all rows": np.ones(len(gold), dtype=bool)}
    for name, x in columns.items():
        values = np.unique(x)
        if len(values) == 2:
            parts |= {f"{name} = {v:g}": x == v for v in values}
        elif len(values) > 2:
            parts |= {f"{name} below its median": x < np.median(x), f"{name} above": x >= np.median(x)}
        if len(parts) > PARTS:
            break
    return [
        {"part": name, "share": float(rows.mean()), **_errors(gold[rows], stand_in[rows])}
        for name, rows in parts.items()
        if rows.any()
    ]


def _errors(gold: Array, stand_in: Array) -> dict[str, float | None]:
    if gold.ndim == 2:
        return {"right": float((gold.argmax(1) == stand_in.argmax(1)).mean())}
    if not (np.isin(gold, (0, 1)).all() and np.isin(stand_in, (0, 1)).all()):
        error = stand_in - gold
        varies = gold.std() > 0 and stand_in.std() > 0
        r = float(np.corrcoef(gold, stand_in)[0, 1]) if varies else None
        return {"bias": float(error.mean()), "spread": float(error.std()), "r": r}
    zero, one = stand_in[gold == 0], stand_in[gold == 1]
    return {
        "gold": float(gold.mean()),
        "invented": float(zero.mean()) if len(zero) else None,
        "missed": float(1 - one.mean()) if len(one) else None,
        "right": float((gold == stand_in).mean()),
    }
