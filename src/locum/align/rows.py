"""Preference data, read in the ecosystem's form.

A row has "prompt", and for each block of the method ("chosen", "rejected") a response: strings, or conversations, which
are lists of {"role", "content"}. Where there is no prompt, or a string beside conversations, chosen and rejected hold the
whole of it, and what both begin with is the prompt. Rows for methods that sample need the prompt alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from locum.errors import UserError
from locum.tasks.rows import BadRow, Rows, check_prompt, read_rows, text_or_messages

__all__ = ["PAIR", "Rows", "read_pairs"]

PAIR = ("chosen", "rejected")


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
    return read_rows(source, partial(_checked, blocks=blocks, needs_different=needs_different), split, blocks)


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
        out |= _split_off([text_or_messages(w, name) for w, name in zip(wholes, sides, strict=True)], sides)
    elif prompt is None:
        raise BadRow("has no 'prompt'")
    for name in ("prompt", *blocks):
        out[name] = text_or_messages(out[name], name)
        if isinstance(out[name], str) is not isinstance(out["prompt"], str):
            raise BadRow(f"prompt and {name} must both be strings or both lists of messages")
    check_prompt(out["prompt"])
    if not isinstance(out["prompt"], str):
        for name in blocks:
            if roles := [m["role"] for m in out[name] if m["role"] != "assistant"]:
                raise BadRow(f"{name} holds a message of the role {roles[0]!r}; a response is the assistant's alone")
    if needs_different:
        for one, other in itertools.combinations(blocks, 2):
            if out[one] == out[other]:
                raise BadRow(f"{one} and {other} are the same")
    return out


def _split_off(texts: list[Any], blocks: Sequence[str]) -> dict[str, Any]:
    """Prompt and responses of texts that hold both: what all begin with is the prompt."""
    kinds = {isinstance(t, str) for t in texts}
    if len(kinds) > 1:
        raise BadRow(f"{' and '.join(blocks)} must both be strings or both lists of messages")
    last = min(len(t) for t in texts) - 1  # a response keeps its last message or character
    n = next((i for i in range(last + 1) if any(t[i] != texts[0][i] for t in texts)), None)
    if n and texts[0][n - 1] == " ":
        n -= 1  # a space belongs to the word behind it
    n = last if n is None else n
    if not n:
        raise BadRow(f"has no 'prompt', and {' and '.join(blocks)} begin with nothing in common")
    return {"prompt": texts[0][:n]} | {name: t[n:] for name, t in zip(blocks, texts, strict=True)}
