"""Reading rows of data in the ecosystem's forms, and finding all bad ones before anything else is done.

A source is a JSONL or Parquet file, a folder that `datasets` saved, a `datasets.Dataset`, or dicts. What a row must hold is
for its reader to check; a text in it is a string, or a conversation: a list of {"role", "content"}.

A bad row is named by its line in the file, from 1; rows of a table or a list are counted from 0.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from locum.errors import MissingExtra, UserError

__all__ = ["BadRow", "Faults", "Rows", "check_prompt", "first_line", "read_rows", "text_or_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 10  # bad rows that a message names


class BadRow(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """Checked rows.

    Args:
        rows: each with all its columns, its texts checked.
        numbers: where each stands in its source.
        blocks: the responses that were checked, for data that has them.
        source, unit: what messages call the source and the numbers, such as "pairs.jsonl" and "line".
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    blocks: tuple[str, ...] = ()
    source: str = "the data"
    unit: str = "row"

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Any] | Rows":
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index], numbers=self.numbers[index])
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows, in the order given."""
        return replace(self, rows=[self.rows[i] for i in indices], numbers=[self.numbers[i] for i in indices])


@dataclass(eq=False)
class Faults:
    """Bad rows, collected to be named together."""

    source: str
    unit: str
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, what: object) -> None:
        self.found.append((number, str(what)))

    def check(self) -> None:
        if not self.found:
            return
        n = len(self.found)
        named = "; ".join(f"{self.unit} {number}: {what}" for number, what in sorted(self.found)[:SHOWN])
        rest = f"; and {n - SHOWN} more" if n > SHOWN else ""
        raise UserError(f"{self.source} has {n} {self.unit}{'s' * (n > 1)} that cannot be used: {named}{rest}")


def read_rows(
    source: Any,
    check: Callable[[Any], dict[str, Any]],
    split: str | None = None,
    blocks: Sequence[str] = (),
    extra: str = "align",
) -> Rows:
    """The rows of a data set, each as `check` makes it.

    Args:
        source: a .jsonl or .parquet file, a folder that `datasets` saved, a `datasets.Dataset`, or an iterable of dicts.
        check: makes a row of what was found; raises `BadRow` for one that cannot be used.
        split: which part of a data set that has parts.
        blocks: what `check` makes sure of, to be kept with the rows.
        extra: the extra that brings `datasets`, for the message where it is missing.

    Raises: UserError for a source that cannot be read or holds no rows, and for bad rows, all in one.
    """
    name, unit, found = _open(source, split, extra)
    faults = Faults(name, unit)
    rows, numbers = [], []
    for number, row in found:
        try:
            if isinstance(row, BadRow):
                raise row
            rows.append(check(row))
            numbers.append(number)
        except BadRow as fault:
            faults.add(number, fault)
    faults.check()
    if not rows:
        raise UserError(f"{name} is empty: give at least one row")
    return Rows(rows, numbers, tuple(blocks), name, unit)


def _open(source: Any, split: str | None, extra: str) -> tuple[str, str, Iterable[tuple[int, Any]]]:
    """The source's name, what its numbers count, and its numbered rows; a `BadRow` stands for a line that is no row."""
    name = "the data"
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        if not path.exists():
            raise UserError(
                f"data {name!r} does not exist: give a .jsonl or .parquet file, or a folder that datasets saved"
            )
        if path.is_dir():
            source = _datasets(path, extra)
        elif path.suffix == ".parquet":
            source = _parquet(path, extra)
        elif path.suffix == ".jsonl":
            return name, "line", _lines(path)
        else:
            raise UserError(f"data {name!r} must be a .jsonl or .parquet file, or a folder that datasets saved")
    if isinstance(source, Mapping):  # a datasets.DatasetDict
        if split not in source:
            asked = "name one of its splits" if split is None else f"it has no split {split!r}"
            raise UserError(f"{name} has several parts, and {asked}: {', '.join(map(str, source))}")
        name, source = f"{name} ({split})", source[split]
    if hasattr(source, "with_format"):  # as Python values, whatever the data set is set to give
        source = source.with_format(None)
        source = source.to_list() if hasattr(source, "to_list") else source
    if not isinstance(source, Iterable):
        raise UserError(f"data must be a path, a datasets.Dataset or a list of dicts, got {type(source).__name__}")
    return name, "row", enumerate(source)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig")
                    if line.strip():
                        yield number, json.loads(line)
                except UnicodeDecodeError:
                    yield number, BadRow("is not UTF-8")
                except json.JSONDecodeError as error:
                    yield number, BadRow(f"is not JSON ({error.msg} at column {error.colno})")
    except OSError as error:
        raise UserError(f"data {str(path)!r} cannot be read: {error.strerror}") from None


def _datasets(path: Path, extra: str) -> Any:
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError:
        raise MissingExtra("a folder of datasets", extra) from None
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"data {str(path)!r} cannot be read: {first_line(error)}") from None


def _parquet(path: Path, extra: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise MissingExtra("a Parquet file", extra) from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f"data {str(path)!r} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def text_or_messages(value: Any, name: str) -> str | list[dict[str, Any]]:
    """A text as it is, messages without keys that hold nothing. Raises: BadRow for anything else, and for an empty one."""
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRow(f"{name} must be a string or a list of messages, got {type(value).__name__}")
    if not (value.strip() if isinstance(value, str) else value):
        raise BadRow(f"{name} is empty")
    return value if isinstance(value, str) else [_message(m, name) for m in value]


def check_prompt(prompt: str | list[dict[str, Any]]) -> None:
    """Raises: BadRow for a conversation that has been answered already."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise BadRow("the prompt's last message is the assistant's; it must be one to answer to")


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"a message of {name} must have role and content, got {type(message).__name__}")
    clean = {k: v for k, v in message.items() if v is not None}  # a table has all columns in every row
    if clean.get("role") not in ROLES:
        raise BadRow(f"a message of {name} has the role {message.get('role')!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(clean.get("content", "" if "tool_calls" in clean else None), str):
        raise BadRow(f"a message of {name} must have a text as content, got {type(message.get('content')).__name__}")
    if not clean.get("content", "").strip() and "tool_calls" not in clean:
        raise BadRow(f"a message of {name} is empty")
    return clean
