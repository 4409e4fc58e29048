"""Which documents an expert is to label, drawn with known probabilities; and documents as parts of larger units.

>>> table = {"text": list("abcdefgh"), "unsure": [0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1]}
>>> drawn = draw_labels(table, 4, size="unsure")
>>> print(drawn["prob"].round(2).tolist(), int(drawn["labelled"].sum()))
[0.83, 0.83, 0.83, 0.83, 0.17, 0.17, 0.17, 0.17] 4
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from locum.errors import UserError
from locum.infer.problem import some
from locum.infer.tables import have_columns, pd, plain, read_table

__all__ = ["by_unit", "draw_labels"]

Array = np.ndarray


def draw_labels(
    data: Any,
    count: int,
    strata: str | None = None,
    size: str | None = None,
    floor: float = 0.1,
    equal: bool = False,
    seed: int = 0,
) -> "pd.DataFrame":
    """Draw rows for gold labels: the table with two columns more, "prob" and "labelled", as `DSL.fit` takes them.

    Args:
        data: a table, or a file; one row per document.
        count: how many rows are to be labelled.
        strata: a column: so many of each of its values as its share of the rows.
        size: a column of numbers > 0: probabilities in proportion, for instance how unsure the surrogate is, sqrt(q (1 - q)).
        floor: with size: no probability is below this share of the mean one; in (0, 1]. Small ones make wide intervals.
        equal: with strata: as many of each value, in place of in proportion.
        seed: fixes the draw.

    Raises:
        UserError: for more labels than rows, a column that is not there, or sizes that are not > 0.
    """
    table, draw = read_table(data), np.random.default_rng(seed)
    N = len(table)
    if not 0 < count <= N:
        raise UserError(f"count must be from 1 to {N}, the number of rows, got {count}")
    if strata is not None and size is not None:
        raise UserError(f"give strata or size, not both: {strata} and {size}")
    if equal and strata is None:
        raise UserError("equal numbers are drawn of each of the strata: say which column they are")
    if not 0 < floor <= 1:
        raise UserError(f"floor must be in (0, 1], got {floor}")
    have_columns(table, [name for name in (strata, size) if name is not None])
    for name in ("prob", "labelled"):
        if name in table:
            raise UserError(f"the table has a column {name} already: rename it")
    if strata is not None:
        prob, chosen = _stratified(pd.factorize(table[strata], use_na_sentinel=False)[0], count, equal, draw)
    elif size is not None:
        prob = _in_proportion(_sizes(table, size), count, floor)
        chosen = _systematic(prob, draw)
    else:
        prob, chosen = np.full(N, count / N), np.zeros(N, dtype=bool)
        chosen[draw.permutation(N)[:count]] = True
    return table.assign(prob=prob, labelled=chosen.astype(int))


def by_unit(
    data: Any,
    unit: str,
    predicted: Mapping[str, str | Sequence[str]],
    prob: str | None = None,
    keep: Sequence[str] = (),
) -> "pd.DataFrame":
    """Documents as units: the analysis is of authors, say, and the labels are of their texts.

    Gold labels become their mean over a unit's labelled rows, surrogates their mean over all of its rows, and a unit's
    probability is that of at least one of its rows, 1 - prod (1 - prob).

    Args:
        data: a table, or a file.
        unit: the column that says which unit a row belongs to.
        predicted: gold column -> surrogate or surrogates, as in `DSL.fit`; numbers, all of them.
        prob: the column of the rows' probabilities; when left out, all were alike.
        keep: columns that say something of the unit: the same in all of its rows.

    Raises:
        UserError: for a column that is not there, not a number, or not the same within a unit.
    """
    table = read_table(data)
    surrogates = [s for many in predicted.values() for s in ([many] if isinstance(many, str) else many)]
    have_columns(table, [unit, *predicted, *surrogates, *keep, *([prob] if prob else [])])
    for name in [*predicted, *surrogates, *([prob] if prob else [])]:
        if plain(table[name]).dtype.kind not in "biuf":
            raise UserError(f"the column {name} must hold numbers, for each unit gets one number of its rows")
    chance = (
        plain(table[prob]).astype(float) if prob else np.full(len(table), table[next(iter(predicted))].notna().mean())
    )
    if (bad := ~((chance > 0) & (chance <= 1))).any():
        raise UserError(
            f"sampling probabilities must be in (0, 1]: {prob or 'prob'} has {chance[bad][0]:g} in rows {some(table.index[bad])}"
        )
    groups = table.groupby(unit, sort=False)
    for name in keep:
        if (varies := groups[name].nunique(dropna=False) > 1).any():
            raise UserError(
                f"the column {name} must be the same in all rows of one {unit}: it is not in {some(varies.index[varies])}"
            )
    out = groups[[*predicted, *surrogates]].mean().join(groups[list(keep)].first())
    none = table.assign(_log=np.log1p(-np.minimum(chance, 1 - 1e-16))).groupby(unit, sort=False)["_log"].sum()
    return out.assign(prob=-np.expm1(none)).reset_index()


def _stratified(
    codes: Array, count: int, equal: bool, draw: np.random.Generator
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Probabilities and a draw, a number of each stratum."""
    sizes = np.bincount(codes)
    wanted = np.full(len(sizes), count / len(sizes)) if equal else count * sizes / len(codes)
    numbers = np.minimum(np.floor(wanted).astype(int), sizes)
    # What rounding left over goes to the largest remainders; every stratum needs a row, or its probability were 0.
    while numbers.sum() < count:
        room = np.where(numbers < sizes, wanted - numbers, -np.inf)
        numbers[int(np.argmax(room))] += 1
    if (numbers == 0).any():
        raise UserError(
            f"{count} labels are too few for {len(sizes)} strata: each needs one at least, so merge the small ones"
        )
    rank = np.empty(len(codes), dtype=int)  # of a row among those of its stratum, in random order
    order = np.lexsort((draw.random(len(codes)), codes))
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (numbers / sizes)[codes], rank < numbers[codes]


def _sizes(table: Any, column: str) -> Float[Array, " rows"]:
    sizes = plain(table[column])
    if sizes.dtype.kind not in "biuf":
        raise UserError(f"the column {column} must hold numbers > 0, got {sizes[0]!r}")
    sizes = sizes.astype(float)
    if (bad := ~((sizes >= 0) & np.isfinite(sizes))).any():
        raise UserError(f"the column {column} must hold numbers >= 0, and does not in rows {some(table.index[bad])}")
    if not sizes.any():
        raise UserError(f"the column {column} must not be 0 in all rows")
    return sizes


def _in_proportion(sizes: Float[Array, " rows"], count: int, floor: float) -> Float[Array, " rows"]:
    """Probabilities in proportion to sizes, none above 1 or below the floor, that add up to count."""
    least = floor * count / len(sizes)
    sizes = np.maximum(sizes / sizes.max(), 1e-9)  # those of 0 come last, but come where all others are not enough
    low, high = 0.0, 2 / sizes.min()
    for _ in range(200):  # the sum grows with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if np.clip(factor * sizes, least, 1).sum() < count else (low, factor)
    prob = np.clip(high * sizes, least, 1)
    free = (prob > least) & (prob < 1)
    if free.any():
        prob[free] = np.minimum(prob[free] * (count - prob[~free].sum()) / prob[free].sum(), 1)
    return prob


def _systematic(prob: Float[Array, " rows"], draw: np.random.Generator) -> Bool[Array, " rows"]:
    """A draw of fixed size with exactly these probabilities: every whole step along their sum, in random order."""
    order = draw.permutation(len(prob))
    steps = np.floor(np.cumsum(prob[order]) + draw.random())
    chosen = np.zeros(len(prob), dtype=bool)
    chosen[order] = np.diff(steps, prepend=0) > 0
    return chosen
