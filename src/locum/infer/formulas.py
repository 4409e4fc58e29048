"""From a table and a formula to the arrays of an estimating equation, with every mistake named before any work is done."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from locum.errors import UserError
from locum.infer.base import Moment
from locum.infer.design import Design, bare, indicators
from locum.infer.learners import Kind
from locum.infer.moments import Linear, Multinomial
from locum.infer.problem import (
    Predicted,
    Problem,
    check_columns,
    check_finite,
    check_labels,
    kind_of,
    probabilities,
    some,
)
from locum.infer.tables import (
    MOST_LEVELS,
    complete,
    features_of,
    formulaic,
    have_columns,
    pd,
    plain,
    read_table,
    with_arrays,
)
from locum.infer.within import effects

__all__ = ["from_formula"]

Array = np.ndarray


def from_formula(
    data: Any,
    formula: str,
    moment: Moment,
    predicted: Mapping[str, str | Sequence[str]],
    prob: Any = None,
    labelled: Any = None,
    features: Sequence[str] = (),
    cluster: str | None = None,
    fixed_effects: Sequence[str] = (),
) -> Problem:
    """The problem that a table and a formula describe; what the arguments mean is said at `DSL.fit`.

    Raises:
        UserError: for a column that is not there, labels or probabilities that cannot be, rows that lack something, columns
            that depend on each other: one sentence that names them.
    """
    table, parsed = read_table(data), _parsed(formula)
    surrogates = {gold: _several(names) for gold, names in predicted.items()}
    features, fixed_effects = _several(features), _several(fixed_effects)
    variables = sorted(map(str, parsed.required_variables))
    if not surrogates:
        raise UserError("nothing is predicted: say which column holds the gold labels and which their surrogates")
    if strange := [g for g in surrogates if g not in variables]:
        raise UserError(f"the formula {formula!r} does not use the predicted variable {', '.join(strange)}")
    if absent := [g for g, many in surrogates.items() if not many]:
        raise UserError(f"the predicted variable {', '.join(absent)} has no surrogate")
    if fixed_effects and not isinstance(moment, Linear):
        raise UserError(f"fixed effects are for a linear regression, not for a {type(moment).__name__.lower()} one")
    table, (prob, labelled) = with_arrays(table, prob=prob, labelled=labelled)
    estimated = isinstance(prob, str) and prob == "estimate" and prob not in table
    every = [s for many in surrogates.values() for s in many]
    wanted = [*variables, *every, *features, *fixed_effects]
    wanted += [c for c in (None if estimated else prob, labelled, cluster) if isinstance(c, str)]
    have_columns(table, wanted)
    table, notes = complete(table, [c for c in dict.fromkeys(wanted) if c not in surrogates])
    is_gold = _marked(table, list(surrogates), labelled)
    at = np.flatnonzero(is_gold)
    known = [v for v in variables if v not in surrogates]
    blocks = features_of(table, dict.fromkeys([*every, *known, *features]), {*every, *features})
    notes += [f"{v} has too many values to predict from" for v in known if v not in blocks]
    outcome = bare(str(parsed.lhs))
    found = {
        gold: _variable(table, gold, many, blocks, at, gold == outcome and isinstance(moment, Multinomial))
        for gold, many in surrogates.items()
    }
    design = Design(table, parsed, moment, found, at, bool(fixed_effects))
    check_columns(design.gold["X"] if design.moves else design.X, design.names)
    groups = tuple(_codes(table[g]) for g in fixed_effects)
    if groups:
        _check_within(design.X, groups, design.names, fixed_effects)
    notes += [_strange(gold, many[0], found[gold], table) for gold, many in surrogates.items() if found[gold].levels]
    if estimated:
        notes.append("probabilities were estimated: the guarantee rests on the regression that did it")
    return Problem(
        rows=design.rows,
        predicted=found,
        at=at,
        prob=probabilities(
            plain(table[prob]) if isinstance(prob, str) and not estimated else prob,
            is_gold,
            np.column_stack(list(blocks.values())),
            prob if isinstance(prob, str) else "prob",
            table.index,
        ),
        names=tuple(f"{c}: {n}" for c in design.levels[1:] for n in design.names) or tuple(design.names),
        outcome=outcome,
        levels=design.levels,
        outcome_only=not design.moves and outcome in found,
        estimated=estimated,
        clusters=_codes(table[cluster]) if cluster else None,
        effects=groups,
        notes=tuple(filter(None, notes)),
        explanatory=tuple(sorted(map(str, parsed.rhs.required_variables))),
        matrix=design.matrix,
        X=None if design.moves else design.X,
    )


def _parsed(formula: str) -> Any:
    wanted = f"the formula {formula!r} must be 'outcome ~ columns'"
    try:
        parsed = formulaic.Formula(formula)
        outcomes = list(parsed.lhs)
        _ = parsed.rhs.required_variables
    except AttributeError:
        raise UserError(wanted) from None
    except formulaic.errors.FormulaicError as error:
        raise UserError(f"the formula {formula!r} cannot be read: {str(error).splitlines()[0].rstrip('.')}") from None
    if len(outcomes) != 1:
        raise UserError(f"{wanted}, with one outcome")
    return parsed


def _marked(table: Any, columns: Sequence[str], labelled: str | None) -> Array:
    """Which rows have gold labels."""
    has = {c: table[c].notna().to_numpy() for c in columns}
    if labelled is None:
        marked = np.logical_and.reduce(list(has.values()))
    else:
        mark = plain(table[labelled])
        if mark.dtype.kind not in "biuf" or not np.isin(mark, (0, 1)).all():
            raise UserError(f"the column {labelled} must be 0 or 1: whether a row was sampled for a gold label")
        marked = mark.astype(bool)
    for column, there in has.items():
        check_labels(there, marked, column, labelled is None, table.index)
    return marked


def _variable(
    table: Any, gold: str, surrogates: Sequence[str], blocks: Mapping[str, Array], at: Array, as_classes: bool
) -> Predicted:
    """A predicted variable: its labels in numbers, and what it is predicted from."""
    labels, first = plain(table[gold])[at], plain(table[surrogates[0]])
    kind: Kind = "classes" if as_classes else kind_of(labels)
    rest = [block for name, block in blocks.items() if name not in surrogates]
    if kind != "classes":
        check_finite(labels.astype(float), gold, table.index[at])
        stand_in = first.astype(float) if first.dtype.kind in "biuf" else None
        inputs = [*(blocks[s] for s in surrogates), *rest]
        return Predicted(kind, labels.astype(float), np.column_stack(inputs), len(surrogates), stand_in)
    levels = tuple(sorted(set(labels), key=str))
    if len(levels) > MOST_LEVELS:
        raise UserError(f"{gold} has {len(levels)} different values: too many for classes (at most {MOST_LEVELS})")
    own = indicators(first, levels) if set(first) <= set(levels) else None
    inputs = [*([blocks[surrogates[0]]] if own is None else [own]), *(blocks[s] for s in surrogates[1:]), *rest]
    return Predicted("classes", indicators(labels, levels), np.column_stack(inputs), len(surrogates), own, levels)


def _strange(gold: str, surrogate: str, found: Predicted, table: Any) -> str:
    """What is to be said of a surrogate's classes that no gold label names."""
    said = plain(table[surrogate])
    alike = (said.dtype.kind in "biuf") == all(isinstance(level, float | int) for level in found.levels)
    other = sorted(set(said) - set(found.levels), key=str) if alike and found.stand_in is None else []
    return (
        f"no gold label of {gold} is {some(other)}, as {surrogate} says: these are predicted from alone"
        if other
        else ""
    )


def _several(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_within(X: Array, groups: Sequence[Array], names: Sequence[str], called: Sequence[str]) -> None:
    """Refuse columns that fixed effects leave nothing of, by name."""
    rest = X - effects(X, np.ones(len(X)), groups)
    if fixed := [n for n, r, x in zip(names, rest.T, X.T, strict=True) if np.abs(r).max() < 1e-7 * np.abs(x).max()]:
        raise UserError(
            f"{', '.join(fixed)} does not vary within {' and '.join(called)}: leave it out, or the fixed effects"
        )
    check_columns(rest, names)


def _codes(column: Any) -> Int[Array, " rows"]:
    return pd.factorize(column)[0].astype(np.int64)
