"""A user's table: reading and writing files, columns as numbers, features, rows that lack something."""

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from locum.errors import MissingExtra, UserError, unknown
from locum.files import write_atomically
from locum.infer.problem import some

try:
    import formulaic
    import pandas as pd
except ImportError:
    raise MissingExtra("locum.infer.DSL", "infer") from None

__all__ = [
    "MOST_LEVELS",
    "complete",
    "features_of",
    "formulaic",
    "pd",
    "plain",
    "read_table",
    "with_arrays",
    "write_with",
]

Array = np.ndarray
MOST_LEVELS = 50  # values of what is no number
SEPARATOR = {".csv": ",", ".tsv": "\t"}
FORMATS = (*SEPARATOR, ".parquet", ".jsonl")


def read_table(data: Any) -> "pd.DataFrame":
    """A data frame as it is, a mapping of columns, or a .csv, .tsv, .parquet, .jsonl file.

    Raises:
        UserError: for a file that cannot be read, or one without rows.
    """
    table = data if isinstance(data, pd.DataFrame) else _read(data)
    if not len(table):
        raise UserError("the data have no rows")
    return table


def _read(data: Any) -> Any:
    if isinstance(data, Mapping):
        try:
            return pd.DataFrame(dict(data))
        except ValueError as error:
            raise UserError(f"the columns do not make a table: {error}") from None
    if not isinstance(data, str | Path):
        raise UserError(f"data must be a data frame, a mapping of columns or a file, got {type(data).__name__}")
    path = Path(data)
    check_format(path)
    readers: dict[str, Callable[[Path], Any]] = {
        ".parquet": pd.read_parquet,
        ".jsonl": lambda p: pd.read_json(p, lines=True),
    }
    return _read_file(path, readers.get(path.suffix, lambda p: pd.read_csv(p, sep=SEPARATOR[p.suffix])))


def _read_file(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a {path.suffix} table: {' '.join(str(error).split())}") from None


def check_format(path: Path) -> None:
    """Refuse a file whose name ends like none of the formats, or like one that cannot be read here."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path} must be a {', '.join(FORMATS)} file")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingExtra("a .parquet file", "infer") from None


def write_with(source: Path, target: Path, columns: "pd.DataFrame") -> None:
    """Write a file's table anew with columns more, in the format of the new file's suffix.

    Where both files are of one kind its cells are copied as they stand: 007 stays 007, and NA stays NA.

    Raises:
        UserError: for a format that is not known, or columns that the table has.
    """
    check_format(target)
    table = _cells(source) if _sort(source) == _sort(target) else read_table(source)
    if both := [str(c) for c in columns if c in table]:
        raise UserError(f"the table {source} has a column {both[0]} already: rename it")
    whole = pd.concat([table, columns.set_axis(table.index)], axis=1)
    if target.suffix == ".parquet":
        held = io.BytesIO()
        whole.to_parquet(held, index=False)
        write_atomically(target, held.getvalue())
    elif target.suffix == ".jsonl":
        write_atomically(
            target,
            whole.to_json(orient="records", lines=True, force_ascii=False, double_precision=15, date_format="iso"),
        )
    else:
        write_atomically(target, whole.to_csv(sep=SEPARATOR[target.suffix], index=False))


def _sort(path: Path) -> str:
    return "text" if path.suffix in SEPARATOR else path.suffix


def _cells(path: Path) -> Any:
    """A file's table with its cells as they are written, where they are text; the rows are those of `read_table`."""
    if path.suffix in SEPARATOR:
        return _read_file(path, lambda p: pd.read_csv(p, sep=SEPARATOR[p.suffix], dtype=str, keep_default_na=False))
    if path.suffix == ".jsonl":
        return _read_file(
            path, lambda p: pd.DataFrame(map(json.loads, filter(str.strip, p.open(encoding="utf-8"))), dtype=object)
        )
    return read_table(path)


def have_columns(table: Any, names: Iterable[str]) -> None:
    """Refuse names that no column has, or more than one."""
    for name in names:
        if name not in table:
            raise unknown("column", name, map(str, table.columns))
        if (table.columns == name).sum() > 1:
            raise UserError(f"the table has {(table.columns == name).sum()} columns named {name}: rename them")


def with_arrays(table: Any, **given: Any) -> tuple[Any, list[Any]]:
    """The table with given arrays as columns of those names; what was given, arrays as the names of their columns.

    A name that the table has already gets an underscore.
    """
    out = []
    for name, value in given.items():
        if value is None or np.ndim(value) == 0:
            out.append(value)
            continue
        if len(value) != len(table):
            raise UserError(f"{name} must have one value for each of {len(table)} rows, got {len(value)}")
        while name in table:
            name = f"{name}_"
        table = table.assign(**{name: np.asarray(value)})
        out.append(name)
    return table, out


def complete(table: Any, columns: Sequence[str]) -> tuple[Any, list[str]]:
    """The rows that have all that should be known of every row, and what is to be said of the others."""
    absent = table[list(columns)].isna()
    lacking = absent.any(axis=1)
    if not lacking.any():
        return table, []
    which = ", ".join(f"{c} ({int(absent[c].sum())})" for c in columns if absent[c].any())
    note = f"{int(lacking.sum())} of {len(table)} rows are left out for missing values in {which}"
    if lacking.all():
        raise UserError(f"nothing is left: {note}")
    warnings.warn(f"{note}: rows {some(table.index[lacking])}", stacklevel=4)
    return table[~lacking], [note]


def plain(column: Any) -> Array:
    """A column as numbers, or as objects."""
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column.to_numpy() if isinstance(column.dtype, np.dtype) else column.to_numpy(float, na_value=np.nan)
    values = column.to_numpy(dtype=object)
    there = ~pd.isna(values)
    told = column.dtype == object and there.any()  # a category is one, also where its name is a number
    if told and all(isinstance(v, bool | int | float | np.number | np.bool_) for v in values[there]):  # with gaps
        numbers = np.full(len(values), np.nan)
        numbers[there] = values[there].astype(float)
        return numbers
    return values


def features_of(table: Any, columns: Iterable[str], wanted: Iterable[str]) -> dict[str, Array]:
    """Columns as blocks of numbers [N, k]: what is no number becomes indicators of its values.

    What has too many values for that is left out, unless it was wanted by name: that is an error.
    """
    out: dict[str, Array] = {}
    for name in columns:
        column = plain(table[name])
        if column.dtype.kind not in "biuf":
            levels = sorted(pd.unique(column), key=str)
            if len(levels) > MOST_LEVELS and name not in wanted:
                continue
            if len(levels) > MOST_LEVELS:
                raise UserError(
                    f"the column {name} has {len(levels)} different values: too many for a feature (at most {MOST_LEVELS})"
                )
            out[name] = np.column_stack([column == level for level in levels]).astype(float)
            continue
        out[name] = column.astype(float)[:, None]
        if (bad := ~np.isfinite(out[name][:, 0])).any():
            raise UserError(f"the column {name} must be finite, and is not in rows {some(table.index[bad])}")
    return out
