"""Reading preference data in the ecosystem's form, and finding all bad rows before anything else is done.

A row has "prompt", and for each block of the method ("chosen", "rejected") a response: strings, or conversations, which
are lists of {"role", "content"}. Where there is no prompt, or a string beside conversations, chosen and rejected hold the
whole of it, and what both begin with is the prompt. Rows for methods that sample need the prompt alone.

A bad row is named by its line in the file, from 1; rows of a table or a list are counted from 0.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from locum.errors import MissingExtra, UserError

__all__ = ["PAIR", "BadRow", "Faults", "Rows", "first_line", "read_pairs"]

PAIR = ("chosen", "rejected")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN = 10  # bad rows that a message names


class BadRow(ValueError):
    """What is wrong with one row."""


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """Checked rows.

    Args:
        rows: prompt and responses, all strings or all lists of messages, and the row's other columns.
        numbers: where each stands in its source.
        blocks: the responses that were checked.
        source, unit: what messages call the source and the numbers, such as "pairs.jsonl" and "line".
    """

    rows: list[dict[str, Any]]
    numbers: list[int]
    blocks: tuple[str, ...] = PAIR
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


def read_pairs(
    source: Any, needs_different: bool = True, blocks: Sequence[str] = PAIR, split: str | None = None
) -> Rows:
    """The rows of a data set, checked.

    Args:
        source: a .jsonl or .parquet file, a folder that `datasets` saved, a `datasets.Dataset`, or an iterable of dicts.
        needs_different: whether a pair of equal responses is a bad row.
        blocks: the responses that a row must have; none for methods that sample their own.
        split: which part of a data set that has parts.

    Raises: UserError for a source that cannot be read or holds no rows, and for bad rows, all in one.
    """
    if isinstance(source, Rows):
        if absent := [b for b in blocks if b not in source.blocks]:
            raise UserError(f"{source.source} was read without {absent[0]!r}: name it in read_pairs' blocks")
        return source
    name, unit, found = _open(source, split)
    faults = Faults(name, unit)
    rows, numbers = [], []
    for number, row in found:
        try:
            if isinstance(row, BadRow):
                raise row
            rows.append(_checked(row, blocks, needs_different))
            numbers.append(number)
        except BadRow as fault:
            faults.add(number, fault)
    faults.check()
    if not rows:
        raise UserError(f"{name} is empty: give at least one row")
    return Rows(rows, numbers, tuple(blocks), name, unit)


def _open(source: Any, split: str | None) -> tuple[str, str, Iterable[tuple[int, Any]]]:
    """The source's name, what its numbers count, and its numbered rows; a `BadRow` stands for a line that is no row."""
    name = "the data"
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        if not path.exists():
            raise UserError(
                f"data {name!r} does not exist: give a .jsonl or .parquet file, or a folder that datasets saved"
            )
        if path.is_dir():
            source = _datasets(path)
        elif path.suffix == ".parquet":
            source = _parquet(path)
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


def _datasets(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError:
        raise MissingExtra("a folder of datasets", "align") from None
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"data {str(path)!r} cannot be read: {first_line(error)}") from None


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise MissingExtra("a Parquet file", "align") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f"data {str(path)!r} cannot be read: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checked(row: Any, blocks: Sequence[str], needs_different: bool) -> dict[str, Any]:
    """The row with a prompt of its own and clean messages."""
    if not isinstance(row, Mapping):
        raise BadRow(f"must be an object with prompt, {', '.join(blocks)}, got {type(row).__name__}")
    for name in blocks:
        if row.get(name) is None:
            raise BadRow(f"has no {name!r}")
    out = dict(row)
    prompt, sides = row.get("prompt"), (tuple(blocks) if len(blocks) > 1 else PAIR)
    wholes = [row[name] for name in sides if row.get(name) is not None]
    talks = all(isinstance(w, Sequence) and not isinstance(w, str) for w in wholes)
    if len(wholes) == len(sides) and (prompt is None or (isinstance(prompt, str) and talks)):
        out |= _split_off([_text_or_messages(w, name) for w, name in zip(wholes, sides, strict=True)], sides)
    elif prompt is None:
        raise BadRow("has no 'prompt'")
    for name in ("prompt", *blocks):
        out[name] = _text_or_messages(out[name], name)
        if isinstance(out[name], str) is not isinstance(out["prompt"], str):
            raise BadRow(f"prompt and {name} must both be strings or both lists of messages")
        if not out[name] or (isinstance(out[name], str) and not out[name].strip()):
            raise BadRow(f"{name} is empty")
    if not isinstance(out["prompt"], str):
        if out["prompt"][-1]["role"] == "assistant":
            raise BadRow("the prompt's last message is the assistant's; it must be one to answer to")
        for name in blocks:
            if roles := [m["role"] for m in out[name] if m["role"] != "assistant"]:
                raise BadRow(f"{name} holds a message of the role {roles[0]!r}; a response is the assistant's alone")
    if needs_different:
        for one, other in itertools.combinations(blocks, 2):
            if out[one] == out[other]:
                raise BadRow(f"{one} and {other} are the same")
    return out


def _text_or_messages(value: Any, name: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise BadRow(f"{name} must be a string or a list of messages, got {type(value).__name__}")
    return [_message(m, name) for m in value]


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


def _split_off(texts: list[Any], blocks: Sequence[str]) -> dict[str, Any]:
    """Prompt and responses of texts that hold both: what all begin with is the prompt."""
    kinds = {isinstance(t, str) for t in texts}
    if len(kinds) > 1:
        raise BadRow(f"{' and '.join(blocks)} must both be strings or both lists of messages")
    if empty := [name for name, t in zip(blocks, texts, strict=True) if not t]:
        raise BadRow(f"{empty[0]} is empty")
    last = min(len(t) for t in texts) - 1  # a response keeps its last message or character
    n = next((i for i in range(last + 1) if any(t[i] != texts[0][i] for t in texts)), None)
    if n and texts[0][n - 1] == " ":
        n -= 1  # a space belongs to the word behind it
    n = last if n is None else n
    if not n:
        raise BadRow(f"has no 'prompt', and {' and '.join(blocks)} begin with nothing in common")
    return {"prompt": texts[0][:n]} | {name: t[n:] for name, t in zip(blocks, texts, strict=True)}
