"""From rows of text to examples of token ids, the same ids as TRL's DPOTrainer makes of them.

Prompt and response are tokenised together, and the response begins where this differs from the prompt alone. Plain text
gets an end-of-sequence token at its end; a conversation ends as its chat template ends it (for many, with a line break
behind the end of the turn, which is then the response's last token).

>>> from locum.align.data import encode, read_pairs
>>> from locum.models import load
>>> from locum.tasks import sentiment
>>> tokenizer = load("smollm2-135m-instruct").tokenizer
>>> example = encode(read_pairs(sentiment.files()[0]), tokenizer)[0]
>>> sorted(example)
['chosen', 'chosen_ids', 'prompt', 'prompt_ids', 'rejected', 'rejected_ids']
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from locum.align.rows import PAIR, read_pairs
from locum.errors import UserError
from locum.tasks.chat import as_text, render, template_settings
from locum.tasks.rows import BadRow, Faults, Rows

__all__ = ["Rows", "encode", "read_pairs"]

CHUNK = 1024  # rows whose texts are tokenised at a time

log = logging.getLogger(__name__)


def encode(
    rows: Any,
    tokenizer: Any,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    overlong: str = "error",
    blocks: Sequence[str] = PAIR,
    columns: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows as examples: "prompt_ids", "<block>_ids", the texts for people, and the columns per response token.

    Prompts are never cut. What is too long is an error that names the rows, or:
    "truncate" cuts responses at their end to fit, with their columns (too long prompts stay an error);
    "drop" leaves such rows out and says how many.

    Args:
        rows: what `read_pairs` gives or reads.
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens of a prompt; by default all but one of `max_length`.
        blocks: the responses; none for prompts alone.
        columns: "<block>_<column>" must hold a number per response token, the end of sequence included.

    Raises: UserError for all bad rows at once, and for a tokenizer that cannot do it.
    """
    if not max_length > 1:
        raise UserError(f"max_length must be > 1, got {max_length!r}")
    room = max_length - bool(blocks)
    longest = room if max_prompt_length is None else max_prompt_length
    if not 0 < longest <= room:
        raise UserError(f"max_prompt_length must be from 1 to {room} (max_length is {max_length}), got {longest!r}")
    if overlong not in ("error", "truncate", "drop"):
        raise UserError(f"overlong must be one of error, truncate, drop, got {overlong!r}")
    rows = read_pairs(rows, blocks=blocks)
    faults = Faults(rows.source, rows.unit)
    limits = _Limits(max_length, longest, overlong)
    examples: list[dict[str, Any]] = []
    cut = 0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        for number, row, (prompt, *whole) in _tokenised(part, tokenizer, blocks, faults):
            try:
                shared = min((_shared(prompt, ids) for ids in whole), default=len(prompt))
                cut += shared < len(prompt)
                example = _example(row, prompt[:shared], [ids[shared:] for ids in whole], blocks, columns)
                if limits.fit(example, blocks, columns):
                    examples.append(example)
            except BadRow as fault:
                faults.add(number, fault)
    faults.check()
    if limits.dropped:
        log.warning("%s: %d of %d rows are too long and left out", rows.source, limits.dropped, len(rows))
    if cut:
        log.warning(
            "%s: in %d of %d rows the prompt's last tokens merge with the response's", rows.source, cut, len(rows)
        )
    if not examples:
        raise UserError(f"{rows.source}: every row is longer than {max_length} tokens; give a higher max_length")
    return examples


@dataclass
class _Limits:
    """What to do with a row that is too long."""

    length: int
    prompt: int
    overlong: str
    dropped: int = 0

    def fit(self, example: dict[str, Any], blocks: Sequence[str], columns: Sequence[str]) -> bool:
        """Make a response fit, or say that the example is left out. Raises: BadRow for one that must not be too long."""
        prompt = len(example["prompt_ids"])
        longest = max((len(example[f"{b}_ids"]) for b in blocks), default=0)
        if prompt <= self.prompt and prompt + longest <= self.length:
            return True
        if self.overlong == "drop":
            self.dropped += 1
            return False
        if prompt > self.prompt:
            raise BadRow(f"the prompt has {prompt} tokens, more than {self.prompt}")
        if self.overlong == "error":
            raise BadRow(f"prompt and response have {prompt + longest} tokens, more than {self.length}")
        for name in (f"{b}_{c}" for b in blocks for c in ("ids", *columns)):
            example[name] = example[name][: self.length - prompt]
        return True


def _tokenised(
    rows: Rows, tokenizer: Any, blocks: Sequence[str], faults: Faults
) -> Iterator[tuple[int, dict[str, Any], list[list[int]]]]:
    """Each row with the ids of its prompt, and of its prompt and response for each block. Two calls of the tokenizer."""
    texts: dict[bool, list[str]] = {False: [], True: []}  # by whether the tokenizer adds its special tokens
    good = []
    for number, row in zip(rows.numbers, rows, strict=True):
        plain = isinstance(row["prompt"], str)
        try:
            texts[plain] += _plain(row, tokenizer, blocks) if plain else _rendered(row, tokenizer, blocks)
            good.append((number, row, plain))
        except BadRow as fault:
            faults.add(number, fault)
    ids = {
        plain: iter(tokenizer(t, add_special_tokens=plain, return_attention_mask=False, verbose=False)["input_ids"])
        for plain, t in texts.items()
        if t
    }
    for number, row, plain in good:
        yield number, row, list(itertools.islice(ids[plain], 1 + len(blocks)))


def _plain(row: Mapping[str, Any], tokenizer: Any, blocks: Sequence[str]) -> list[str]:
    end = tokenizer.eos_token
    if blocks and end is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, and plain text needs one at its end: set tokenizer.eos_token"
        )
    whole = [row["prompt"] + row[b] for b in blocks]
    return [row["prompt"], *(text if text.endswith(end) else text + end for text in whole)]


def _rendered(row: Mapping[str, Any], tokenizer: Any, blocks: Sequence[str]) -> list[str]:
    settings = template_settings(row)
    return [
        render(tokenizer, row["prompt"], add_generation_prompt=True, **settings),
        *(render(tokenizer, row["prompt"] + row[b], **settings) for b in blocks),
    ]


def _shared(prompt: list[int], whole: list[int]) -> int:
    """How many tokens both begin with."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )


def _example(
    row: Mapping[str, Any], prompt: list[int], responses: list[list[int]], blocks: Sequence[str], columns: Sequence[str]
) -> dict[str, Any]:
    if not prompt:
        raise BadRow("nothing of the prompt is left in front of the response")
    example: dict[str, Any] = {"prompt_ids": prompt, "prompt": as_text(row["prompt"])}
    for block, ids in zip(blocks, responses, strict=True):
        if not ids:
            raise BadRow(f"{block} has no tokens of its own")
        example |= {f"{block}_ids": ids, block: as_text(row[block])}
        for column in columns:
            example[f"{block}_{column}"] = _numbers(row, f"{block}_{column}", len(ids))
    return example


def _numbers(row: Mapping[str, Any], name: str, tokens: int) -> np.ndarray:
    if row.get(name) is None:
        raise BadRow(f"has no {name!r}")
    try:
        values = np.asarray(row[name], dtype=np.float32)
    except (TypeError, ValueError):
        raise BadRow(f"{name} must be a list of numbers") from None
    if values.shape != (tokens,):
        raise BadRow(f"{name} has {values.size} values for {tokens} response tokens")
    if not np.isfinite(values).all():
        raise BadRow(f"{name} holds a value that is not finite")
    return values
