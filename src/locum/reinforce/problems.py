"""Problems to train on: rows with a prompt, and columns that the reward reads.

>>> from locum.reinforce.problems import held_out, reasoning_gym_problems
>>> problems = reasoning_gym_problems("chain_sum", size=100, seed=0)
>>> problems[0]["prompt"], problems[0]["answer"]
('State the final answer to the following arithmetic problem: 1663 - 5242 - 9376 - 8961 + 7634 =', '-14282')
>>> train, test = held_out(problems, fraction=0.1, seed=0)
>>> (len(train), len(test))
(90, 10)
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from locum.errors import UserError, unknown
from locum.reinforce.grader import packed, unpacked
from locum.reinforce.rewards import gym
from locum.tasks.chat import as_text, encode, template_settings
from locum.tasks.rows import BadRow, Rows, check_prompt, first_line, read_rows, text_or_messages

__all__ = ["Deck", "encode", "held_out", "read_problems", "reasoning_gym_problems", "template_settings"]

T = TypeVar("T")
TAKEN = ("prompts", "completions")  # what a reward is given beside the columns


def read_problems(source: Any, split: str | None = None) -> Rows:
    """The problems of a data set, checked: a sequence of dicts.

    "prompt" is a text, or a conversation that ends with a message to answer to. The other columns are the same in all rows;
    they are kept as they are, and a reward gets them. In conversations "tools" and "chat_template_kwargs" are for the chat
    template: ``encode(lm, row["prompt"], **template_settings(row))``.

    Args:
        source: a .jsonl or .parquet file, a folder that `datasets` saved, a `datasets.Dataset`, or an iterable of dicts.
        split: which part of a data set that has parts.

    Raises: UserError for a source that cannot be read or holds no rows, and for bad rows, all in one.
    """
    if isinstance(source, Rows):
        return source
    first: list[dict[str, Any]] = []

    def checked(row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise BadRow(f"must be an object with prompt, got {type(row).__name__}")
        if row.get("prompt") is None:
            raise BadRow("has no 'prompt'")
        if taken := [name for name in TAKEN if name in row]:
            raise BadRow(f"has a column {taken[0]!r}, a name that rewards use themselves")
        prompt = text_or_messages(row["prompt"], "prompt")
        check_prompt(prompt)
        if not isinstance(prompt, str):
            template_settings(row)  # they must be readable
        first[:] = first or [dict(row)]
        if differing := sorted(map(str, first[0].keys() ^ row.keys())):
            has = "has no" if differing[0] in first[0] else "has a column"
            raise BadRow(f"{has} {differing[0]!r}, other than the first row")
        return {**row, "prompt": prompt}

    return read_rows(source, checked, split, extra="reinforce")


def reasoning_gym_problems(name: str, size: int, seed: int = 0, **config: Any) -> list[dict[str, Any]]:
    """Problems that reasoning-gym makes, for the reward `ReasoningGym(name)`.

    Their columns: "prompt", "answer" (None where there is more than one right answer), "entry" (what the grader needs, as
    JSON) and "dataset" (the name).

    Args:
        name: one of reasoning-gym's datasets, e.g. "chain_sum".
        size: how many problems, >= 1. They may repeat.
        seed: of their numbers.
        config: settings of the dataset, e.g. ``min_terms=2``.

    Raises: UserError for a name or settings that reasoning-gym refuses; MissingExtra without it.
    """
    if name not in gym():
        raise unknown("reasoning-gym dataset", name, gym())
    if not size >= 1:
        raise UserError(f"size must be >= 1, got {size}")
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
    except Exception as error:
        raise UserError(f"reasoning-gym's {name} refuses its settings: {first_line(error)}") from None
    return [_problem(name, dataset[i], config) for i in range(size)]


def _problem(name: str, entry: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    whole = entry | {"config": config} if config else entry
    try:
        text = json.dumps(packed(whole))
        kept = unpacked(json.loads(text)) == whole
    except (TypeError, ValueError):
        kept, text = False, ""
    if not kept:
        raise UserError(f"problems of reasoning-gym's {name} cannot be kept as JSON with these settings: {config}")
    return {"prompt": entry["question"], "answer": entry["answer"], "entry": text, "dataset": name}


def held_out(rows: Any, fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Rows to train on and rows to test on, drawn so that no prompt is in both; each in their old order.

    Prompts that differ in white space alone are the same.

    Args:
        rows: what `read_problems` gives or reads.
        fraction: of the rows, to test on; in (0, 1). As near to it as whole prompts allow, and at least one prompt.
        seed: of the draw.

    Raises: UserError for a fraction out of range, and for rows that have one prompt alone.
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction must be in (0, 1), got {fraction}")
    rows = read_problems(rows)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(" ".join(as_text(row["prompt"]).split()), []).append(i)
    if len(groups) < 2:
        raise UserError(f"{rows.source} has one prompt alone: there is none to hold out")
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    chosen: set[int] = set(drawn[0])
    for group in drawn[1:-1]:  # one prompt is left to train on
        if len(chosen) + len(group) / 2 <= fraction * len(rows):
            chosen.update(group)
    order = range(len(rows))
    return rows.take([i for i in order if i not in chosen]), rows.take([i for i in order if i in chosen])


@dataclass
class Deck(Generic[T]):
    """Problems without an end: all of them in an order that depends on the seed, then all again in another.

    Args:
        problems: at least one.
        seed: of the orders.
    """

    problems: Sequence[T]
    seed: int = 0
    _turn: tuple[int, list[int]] = field(default=(-1, []), init=False)  # the last time round, and its order

    def take(self, start: int, count: int) -> list[T]:
        """The next `count` after `start` of them."""
        taken = []
        for at in range(start, start + count):
            turn, place = divmod(at, len(self.problems))
            if self._turn[0] != turn:
                g = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                self._turn = turn, torch.randperm(len(self.problems), generator=g).tolist()
            taken.append(self.problems[self._turn[1][place]])
        return taken
