"""What a design-based estimator works on: arrays, checked once, wherever they came from."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

from locum.errors import UserError
from locum.infer.base import Columns, Moment
from locum.infer.equations import collinear
from locum.infer.learners import Kind
from locum.infer.moments import Regression

__all__ = [
    "Predicted",
    "Problem",
    "Rows",
    "check_columns",
    "check_finite",
    "check_labels",
    "design_test",
    "from_arrays",
    "kind_of",
    "probabilities",
    "some",
]

Array = np.ndarray
MANY = 5  # rows that an error names
Rows = Callable[[Mapping[str, Array], Any], Columns]


@dataclass(frozen=True, eq=False)
class Predicted:
    """A variable that has gold labels in some rows and a surrogate in all.

    Args:
        kind: what a gold label is.
        labels: at the gold rows, [n] or indicators [n, classes].
        features: what it is predicted from [N, f], the surrogate first.
        surrogates: how many surrogates there are.
        stand_in: the first surrogate in the form of the labels [N] or [N, classes]; None where it has not that form.
        levels: the classes.
    """

    kind: Kind
    labels: Shaped[Array, "gold *classes"]
    features: Float[Array, "rows f"]
    surrogates: int
    stand_in: Shaped[Array, "rows *classes"] | None
    levels: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be estimated, as arrays; N rows, n of them with gold labels.

    Args:
        rows: ``rows(values, at)``: the columns D of the rows `at`, predicted variables having these values.
        predicted: the variables that are, by name.
        at: the gold rows [n].
        prob: probability of being a gold row [N].
        names: of the coefficients [p].
        outcome: the outcome's name. levels: its classes.
        outcome_only: whether nothing but the outcome is predicted, and that as it is, not some function of it.
        estimated: whether `prob` was estimated from the same rows.
        clusters, effects: codes [N] of clusters, and of each kind of fixed effect.
        notes: what was done to the data.
        explanatory: the columns of a table that X is made of.
        matrix: ``matrix(table)``: X of other rows, for predictions. X: of these, where nothing in it is predicted.
    """

    rows: Rows
    predicted: Mapping[str, Predicted]
    at: Int[Array, " gold"]
    prob: Float[Array, " rows"]
    names: tuple[str, ...]
    outcome: str = "y"
    levels: tuple[Any, ...] = ()
    outcome_only: bool = True
    estimated: bool = False
    clusters: Int[Array, " rows"] | None = None
    effects: tuple[Int[Array, " rows"], ...] = ()
    notes: tuple[str, ...] = ()
    explanatory: tuple[str, ...] = ()
    matrix: Callable[[Any], Array] | None = field(default=None, repr=False)
    X: Float[Array, "rows columns"] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return len(self.prob)

    @property
    def zeros(self) -> dict[str, Array]:
        """A prediction of 0 everywhere."""
        return {k: np.zeros((self.size, *v.labels.shape[1:])) for k, v in self.predicted.items()}

    @property
    def gold(self) -> Columns:
        """The gold rows with their labels."""
        return self.rows({name: p.labels for name, p in self.predicted.items()}, self.at)


def some(values: Iterable[Any]) -> str:
    """The first few of many, in words.

    >>> some(range(9))
    '0, 1, 2, 3, 4 and 4 more'
    """
    listed = [str(v) for v in values]
    more = len(listed) - MANY
    return ", ".join(listed[:MANY]) + (f" and {more} more" if more > 0 else "")


def from_arrays(
    moment: Moment,
    D: Columns,
    predicted: Mapping[str, Any],
    prob: Any,
    labelled: Any,
    features: Any,
    clusters: Any,
    design: Callable[[Columns], Columns],
    names: Sequence[str],
) -> Problem:
    """The problem that arrays describe; what the arguments mean is said at `DSL.fit_arrays`.

    Raises:
        UserError: for arrays of unlike length, values that are missing, labels or probabilities that cannot be.
    """
    D = {name: np.asarray(values) for name, values in D.items()}
    Q = {name: np.asarray(values) for name, values in predicted.items()}
    if absent := [name for name in Q if name not in D]:
        raise UserError(f"{', '.join(absent)} is predicted, and there is no such array among {', '.join(D)}")
    if not Q:
        raise UserError("nothing is predicted: say which array holds gold labels and what its surrogates are")
    N, first = len(next(iter(D.values()))), next(iter(D))
    given = {"labelled": labelled, "features": features, "clusters": clusters}
    given = {k: np.asarray(v) for k, v in given.items() if v is not None}
    for name, values in [*D.items(), *((f"the surrogate of {k}", v) for k, v in Q.items()), *given.items()]:
        if values.ndim == 0 or len(values) != N:
            raise UserError(f"{name} must have {N} rows, as {first} has, got {values.shape}")
        if values.dtype.kind == "f" and name not in Q and np.isnan(values).any():
            gaps = np.flatnonzero(np.isnan(values).reshape(N, -1).any(1))
            raise UserError(f"{name} must not be missing: it is in rows {some(gaps)}")
    for name in Q:
        Q[name], D[name] = _numbers(Q[name], f"the surrogate of {name}"), _numbers(D[name], name)
    has = {name: _known(D[name]) for name in Q}
    is_gold: Array = np.logical_and.reduce(list(has.values())) if labelled is None else given["labelled"].astype(bool)
    for name, there in has.items():
        check_labels(there, is_gold, name, labelled is None, np.arange(N))
    at = np.flatnonzero(is_gold)
    extra = [] if features is None else [_numbers(given["features"], "features").reshape(N, -1)]
    blocks = {k: v.reshape(N, -1) for k, v in Q.items()}
    variables = {}
    for name, own in blocks.items():
        labels = D[name][at]
        check_finite(labels, name, at)
        inputs = np.column_stack([own, *(b for k, b in blocks.items() if k != name), *extra])
        if not np.isfinite(inputs).all():
            bad = some(np.flatnonzero(~np.isfinite(inputs).all(1)))
            raise UserError(f"surrogates and features of {name} must be finite: rows {bad}")
        if labels.ndim == 2:
            stand_in = own if own.shape[1] == labels.shape[1] else None
            variables[name] = Predicted("classes", labels, inputs, 1, stand_in)
        else:
            variables[name] = Predicted(kind_of(labels), labels, inputs, own.shape[1], own[:, 0])

    def rows(values: Mapping[str, Array], which: Any) -> Columns:
        return design({name: values[name] if name in Q else D[name][which] for name in D})

    gold = rows({name: v.labels for name, v in variables.items()}, at)
    if isinstance(moment, Regression) and gold["y"].ndim == 1:
        moment.outcome(gold["y"], "y")
    p = len(moment.start(gold))
    names = tuple(map(str, names)) or tuple(f"theta {j}" for j in range(p))
    if len(names) != p:
        raise UserError(f"there must be a name for each of {p} coefficients, got {len(names)}")
    if isinstance(moment, Regression):
        zeros = {k: np.zeros((N, *v.labels.shape[1:])) for k, v in variables.items()}
        known = rows(zeros, slice(None)) if set(Q) == {"y"} else gold
        check_columns(known["X"], names[: known["X"].shape[1]])
    return Problem(
        rows=rows,
        predicted=variables,
        at=at,
        prob=probabilities(prob, is_gold, np.column_stack([*blocks.values(), *extra])),
        names=names,
        outcome_only=set(Q) == {"y"},
        estimated=isinstance(prob, str),
        clusters=np.unique(given["clusters"], return_inverse=True)[1].astype(np.int64) if "clusters" in given else None,
    )


def check_labels(
    there: Bool[Array, " rows"], is_gold: Bool[Array, " rows"], name: str, found: bool, index: Any
) -> None:
    """Gold labels are where rows were sampled, and nowhere else.

    Args:
        found: the sampled rows were found by their labels, those that have all of them.
    """
    lacks, extra = is_gold & ~there, ~is_gold & there
    if extra.any() and found:
        raise UserError(
            f"rows {some(index[extra])} have a gold label in {name} and not in the other predicted variables"
        )
    if not is_gold.any():
        raise UserError(f"no row has a gold label in {name}")
    if lacks.any():
        raise UserError(f"rows {some(index[lacks])} were sampled for a gold label and have none in {name}")
    if extra.any():
        raise UserError(
            f"rows {some(index[extra])} have a gold label in {name} although they were not sampled: "
            "only labels drawn with a known probability can be used"
        )


def check_finite(labels: Float[Array, "gold *classes"], name: str, index: Any) -> None:
    """Refuse gold labels that are infinite."""
    if (bad := ~np.isfinite(labels).reshape(len(labels), -1).all(1)).any():
        raise UserError(f"gold labels of {name} must be finite, and are not in rows {some(index[bad])}")


def _known(values: Array) -> Bool[Array, " rows"]:
    gaps: Array = np.isnan(values).reshape(len(values), -1)
    return np.asarray(~gaps.any(1))


def _numbers(values: Array, name: str) -> Array:
    try:
        return values.astype(float)
    except (TypeError, ValueError):
        raise UserError(f"{name} must hold numbers, as all arrays do: tables may hold text") from None


def kind_of(gold: Shaped[Array, " gold"]) -> Kind:
    """What gold labels are."""
    if gold.dtype.kind not in "biuf":
        return "classes"
    return "binary" if np.isin(gold, (0, 1)).all() else "number"


def check_columns(X: Float[Array, "rows columns"], names: Sequence[str]) -> None:
    """Refuse columns that depend on each other, by name."""
    if bad := collinear(X, names):
        if len(bad) == 1:
            raise UserError(f"the column {bad[0]} is 0 in every row that is known: leave it out")
        raise UserError(f"the columns {', '.join(bad)} depend linearly on each other: leave one out")


def probabilities(
    prob: Any, is_gold: Bool[Array, " rows"], features: Float[Array, "rows f"], name: str = "prob", index: Any = None
) -> Float[Array, " rows"]:
    """The probability of each row to be sampled, checked."""
    n, N = int(is_gold.sum()), len(is_gold)
    if prob is None:
        return np.full(N, n / N)
    if isinstance(prob, str):
        return _estimated(is_gold, features)
    given = np.asarray(prob)
    if given.shape not in ((), (N,)):
        raise UserError(f"{name} must be a number, or one for each of {N} rows, got {given.shape}")
    values = np.broadcast_to(given, (N,))
    if values.dtype.kind not in "biuf":
        raise UserError(f"sampling probabilities must be numbers: {name} has {values[0]!r}")
    values = values.astype(float)
    bad = ~((values > 0) & (values <= 1))
    if bad.any():
        which = np.flatnonzero(bad) if index is None else index[bad]
        raise UserError(
            f"sampling probabilities must be in (0, 1]: {name} has {values[bad][0]:g} in rows {some(which)}"
        )
    spread = np.sqrt((1 / values - 1).sum())
    excess = (is_gold / values).sum() - N
    if spread > 0 and abs(excess) > 4 * spread:
        warnings.warn(
            f"{n} of {N} rows have gold labels where {values.sum():.0f} were to be expected of the probabilities in {name}",
            stacklevel=4,
        )
    return values


def design_test(
    features: Float[Array, "rows f"], prob: Float[Array, " rows"], at: Int[Array, " gold"]
) -> tuple[float, int, float]:
    """Whether the rows `at` look drawn with these probabilities: chi-square, its degrees of freedom, and p.

    Weighted by R / pi they must have the features' means over all rows; differences have a variance under independent draws.
    """
    F = features[:, np.sort(np.unique(features.round(12), axis=1, return_index=True)[1])]
    F = F - F.mean(0)
    F = F[:, F.std(0) > 0]
    F = F / F.std(0)
    excess = -np.ones(len(prob))
    excess[at] += 1 / prob[at]
    difference, variance = excess @ F, (F * np.maximum(1 / prob - 1, 0)[:, None]).T @ F
    values, vectors = np.linalg.eigh(variance)
    told = values > 1e-10 * values.max(initial=0)  # other directions repeat these
    chi2, rank = float(((difference @ vectors)[told] ** 2 / values[told]).sum()), int(told.sum())
    return chi2, rank, float(stats.chi2.sf(chi2, rank)) if rank else 1.0


def _estimated(is_gold: Array, features: Array) -> Array:
    """Probabilities from a logistic regression of being sampled on the features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if is_gold.all():
        return np.ones(len(is_gold))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=1000))
    return np.clip(model.fit(features, is_gold).predict_proba(features)[:, 1], 1e-3, 1.0)
