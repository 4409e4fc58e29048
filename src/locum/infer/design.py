"""A formula on a table, evaluated for any values of the variables that are predicted."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from locum.errors import UserError
from locum.infer.base import Columns, Moment
from locum.infer.moments import Multinomial, Regression
from locum.infer.problem import Predicted, some
from locum.infer.tables import pd, plain

__all__ = ["Design", "bare", "indicators"]

Array = np.ndarray


class Design:
    """A formula on a table: rows with any values of the predicted variables, and X of other tables.

    How columns are coded (levels, transformations with a memory) is fixed once, on gold labels taken in turn where there is
    none, so that it does not depend on predictions.
    """

    def __init__(
        self,
        table: Any,
        parsed: Any,
        moment: Moment,
        found: Mapping[str, Predicted],
        at: Int[Array, " gold"],
        within: bool,
    ) -> None:
        self.table, self.parsed, self.found = table, parsed, found
        self.outcome = bare(str(parsed.lhs))
        self.moves = bool(set(map(str, parsed.rhs.required_variables)) & set(found))
        filled = self._with({k: np.resize(v.labels, (len(table), *v.labels.shape[1:])) for k, v in found.items()})
        whole = self._evaluated(parsed.rhs, filled)
        self._coding = whole.model_spec
        names = [str(name) for name in whole.model_spec.column_names]
        self._kept = [j for j, name in enumerate(names) if not (within and name == "Intercept")]
        self.names = [names[j] for j in self._kept]
        if not self.names:
            raise UserError(f"the formula {self._text} has no column besides the fixed effects")
        self.X = np.asarray(whole, dtype=float)[:, self._kept]
        if (bad := ~np.isfinite(self.X)).any():
            which, rows = self.names[int(bad.any(0).argmax())], some(table.index[bad.any(1)])
            raise UserError(f"the formula's column {which} must be finite, and is not in rows {rows}")
        self.levels: tuple[Any, ...] = ()
        self._seen: Array | None = None  # the outcome, where it is a column that is not predicted
        if isinstance(moment, Multinomial):
            self._classes()
        elif self.outcome in table and self.outcome not in found:
            self._seen = _checked(moment, plain(table[self.outcome]), self.outcome)
        else:
            predicted = found.get(self.outcome)
            labels = (
                plain(table[self.outcome])[at] if predicted and predicted.kind == "classes" else self.gold_at(at)["y"]
            )
            _checked(moment, labels, self.outcome)
        self.gold = self.gold_at(at)

    @property
    def _text(self) -> str:
        return f"{self.parsed.lhs} ~ {self.parsed.rhs}"

    def _classes(self) -> None:
        """The classes of a multinomial outcome."""
        if self.outcome in self.found:
            self.levels = self.found[self.outcome].levels
        elif self.outcome in self.table:
            column = plain(self.table[self.outcome])
            self.levels = tuple(sorted(set(column), key=str))
            self._seen = indicators(column, self.levels)
        else:
            raise UserError(f"the outcome of a multinomial regression must be a column, got {self.outcome}")
        if len(self.levels) < 2:
            raise UserError(f"the outcome {self.outcome} must have two classes or more, got {some(self.levels)}")

    def _evaluated(self, side: Any, frame: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # levels that were not there before
                return side.get_model_matrix(frame, context={}, output="numpy", na_action="raise")
        except Exception as error:  # whatever a user's expression raises
            said = textwrap.shorten(str(error), 160).rstrip(".")
            hint = ""
            if inside := sorted(set(self.found) & set(map(str, side.required_variables)) - {bare(str(side))}):
                hint = f"; {', '.join(inside)} must take predictions, any number: transform the column and its surrogate first"
            raise UserError(f"the formula {self._text} cannot be evaluated: {said}{hint}") from None

    def _with(self, values: Mapping[str, Array], at: Any = slice(None)) -> Any:
        """Rows of the table with these values of the predicted variables: of classes, the likeliest."""

        def column(name: str) -> Any:
            p = self.found[name]
            if p.kind != "classes":
                return values[name]
            return pd.Categorical.from_codes(values[name].argmax(1), categories=list(p.levels))

        return self.table.iloc[at].assign(**{name: column(name) for name in self.found})

    def matrix(self, frame: Any) -> Float[Array, "rows columns"]:
        """X of a table, coded as it was first."""
        return np.asarray(self._evaluated(self._coding, frame), dtype=float)[:, self._kept]

    def rows(self, values: Mapping[str, Array], at: Any) -> Columns:
        """``Problem.rows``."""
        direct = self._seen is not None or self.outcome in self.found
        frame = self._with(values, at) if self.moves or not direct else None
        if self._seen is not None:
            y = self._seen[at]
        elif direct:
            y = values[self.outcome]
        else:
            y = np.asarray(self._evaluated(self.parsed.lhs, frame), dtype=float).ravel()
        return {"y": y, "X": self.matrix(frame) if self.moves else self.X[at]}

    def gold_at(self, at: Int[Array, " gold"]) -> Columns:
        return self.rows({k: v.labels for k, v in self.found.items()}, at)


def indicators(values: Array, levels: Sequence[Any]) -> Float[Array, "rows classes"]:
    return np.column_stack([values == level for level in levels]).astype(float)


def _checked(moment: Moment, y: Array, name: str) -> Array:
    return moment.outcome(y, name) if isinstance(moment, Regression) else y


def bare(name: str) -> str:
    """A column's name out of its quotes."""
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] == "`" and "`" not in name[1:-1] else name
