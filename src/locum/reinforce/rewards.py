r"""Rewards that come with the package, and the user's own by name.

A reward is any callable ``(prompts, completions, **columns) -> list of floats``: texts, one row each, and the other columns
of the data, a list each. What is here is a frozen dataclass that is checked when it is made. What a model wrote is read,
compared and parsed, never executed.

>>> from locum.reinforce.rewards import ExactAnswer, Format, Weighted
>>> reward = Weighted((ExactAnswer(), Format()), (1.0, 0.5))
>>> reward(["2 + 2 ="] * 3, ["4", "<think>Easy.</think><answer>4</answer>", "<answer>5</answer>"], answer=[4, 4, 4])
[1.0, 1.5, 0.0]
"""

import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from locum.errors import MissingExtra, UserError, unknown
from locum.method import require
from locum.reinforce.apart import grade
from locum.reinforce.grader import final_answer, last_tag
from locum.reinforce.twgrpo import SoftChoice
from locum.user_code import load_code

__all__ = ["ExactAnswer", "Format", "MathAnswer", "ReasoningGym", "Reward", "Weighted", "from_name", "gym"]

Reward = Callable[..., Sequence[float]]

INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # no further tag
THINK_ANSWER = rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*"


@dataclass(frozen=True)
class MathAnswer:
    r"""1.0 where a completion's answer equals the column "answer" as mathematics, else 0.0: 1/2 is 0.5 is ``\frac{1}{2}``.

    The answer stands in the last ``<answer>``, behind the last "####", or in the last ``\boxed``; without any of these it is
    what math-verify finds last in the text. The same holds for the column, which may hold numbers.

    Args:
        limit_s: seconds that an answer may take to compare; one that takes longer counts as wrong. > 0
        workers: processes that compare, >= 1.

    Raises: UserError where "answer" holds something that is no mathematics (`ExactAnswer` compares texts).
    """

    limit_s: float = 5.0
    workers: int = 2

    def __post_init__(self) -> None:
        _check_grading(self)
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtra("the reward MathAnswer", "reinforce")

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        gold = _column(self, "answer", columns)
        questions = [("math", str(a), c) for a, c in zip(gold, completions, strict=True)]
        return grade(questions, self.limit_s, self.workers)


@dataclass(frozen=True)
class ReasoningGym:
    """reasoning-gym's own score of an answer, from 0 to 1. The column "entry" holds the problem as JSON.

    `locum.reinforce.problems.reasoning_gym_problems` makes such problems. The answer stands in the last ``<answer>``, or is
    the whole text. An answer in a form that the grader cannot take counts as wrong.

    Args:
        dataset: its name in reasoning-gym, e.g. "chain_sum".
        limit_s: seconds that an answer may take to grade; one that takes longer counts as wrong. > 0
        workers: processes that grade, >= 1.
    """

    dataset: str
    limit_s: float = 10.0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.dataset not in gym():
            raise unknown("reasoning-gym dataset", self.dataset, gym())
        _check_grading(self)

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        found = zip(_column(self, "entry", columns), completions, strict=True)
        questions = [("gym", self.dataset, _entry(e), _tagged(c)) for e, c in found]
        return grade(questions, self.limit_s, self.workers)


@dataclass(frozen=True)
class ExactAnswer:
    """1.0 where a completion's answer and the column "answer" are the same text, else 0.0.

    The answer stands in the last ``<answer>``, behind the last "####", or is the whole text; in the column as well.

    Args:
        strip: white space at both ends does not count.
        casefold: nor do capitals.
    """

    strip: bool = True
    casefold: bool = False

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        gold = _column(self, "answer", columns)
        return [float(self._read(str(a)) == self._read(c)) for a, c in zip(gold, completions, strict=True)]

    def _read(self, text: str) -> str:
        answer = final_answer(text)
        answer = answer.strip() if self.strip else answer
        return answer.casefold() if self.casefold else answer


@dataclass(frozen=True)
class Format:
    """1.0 where a completion, from its first to its last character, has a form, else 0.0.

    Args:
        pattern: a regular expression; the dot matches line breaks too. By default ``<think>...</think>`` and then
            ``<answer>...</answer>``, each tag once, with nothing but white space around them.
    """

    pattern: str = THINK_ANSWER

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"Format.pattern {self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        form = re.compile(self.pattern, re.DOTALL)
        return [float(form.fullmatch(c) is not None) for c in completions]


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of rewards. A row that one of them gives none (None or nan) gets none.

    Args:
        parts: the rewards.
        weights: a finite number for each.
    """

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        require(self, "parts", bool(self.parts) and all(callable(p) for p in self.parts), "at least one callable")
        fine = len(self.weights) == len(self.parts) and all(math.isfinite(w) for w in self.weights)
        require(self, "weights", fine, f"{len(self.parts)} finite numbers, one for each part")

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        total = [0.0] * len(completions)
        for part, weight in zip(self.parts, self.weights, strict=True):
            given = list(part(prompts, completions, **columns))
            if len(given) != len(completions):
                raise UserError(f"{_name(part)} returned {len(given)} rewards for {len(completions)} rows")
            total = [t + weight * (math.nan if r is None else float(r)) for t, r in zip(total, given, strict=True)]
        return total


def from_name(text: str) -> Reward:
    """The reward that a command line names.

    "math", "exact", "format" and "choice" are `MathAnswer`, `ExactAnswer`, `Format` and TW-GRPO's `SoftChoice`;
    "reasoning-gym:chain_sum" is `ReasoningGym` on that dataset; "module:function" and "path/to/file.py:function" are the user's
    own, and importing them runs the user's code. Name nothing here that comes from data.

    Raises: UserError for a name that is not known, and for a function that cannot be had.
    """
    known: dict[str, Callable[[], Reward]] = {
        "math": MathAnswer,
        "exact": ExactAnswer,
        "format": Format,
        "choice": SoftChoice,
    }
    where, _, name = text.rpartition(":")
    if not where or not name:
        if text not in known:
            kinds = [*known, "reasoning-gym:DATASET", "MODULE:FUNCTION", "FILE.py:FUNCTION"]
            raise unknown("reward", text, kinds)
        return known[text]()
    if where == "reasoning-gym":
        return ReasoningGym(name)
    module = load_code(where, "the reward", "path/to/file.py:function")
    if not hasattr(module, name):
        own = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise unknown(f"function of {where}", name, own)
    found = getattr(module, name)
    if isinstance(found, type) or not callable(found):
        what = "a class; make one of it and name that" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UserError(f"reward {text!r} must be a function (prompts, completions, **columns) -> list, got {what}")
    return found


@functools.cache
def gym() -> dict[str, Any]:
    """reasoning-gym's datasets by name. Raises: MissingExtra without it."""
    try:
        import reasoning_gym  # noqa: F401  # registers them
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise MissingExtra("reasoning-gym", "reinforce") from None
    return DATASETS


def _check_grading(reward: Any) -> None:
    require(reward, "limit_s", 0 < reward.limit_s < math.inf, "> 0 and finite")
    require(reward, "workers", reward.workers >= 1, ">= 1")


def _column(reward: object, name: str, columns: dict[str, list[Any]]) -> list[Any]:
    if name not in columns:
        has = f"it has {', '.join(map(repr, columns))}" if columns else "it has none beside the prompt"
        raise UserError(f"the reward {type(reward).__name__} needs the column {name!r} in the data; {has}")
    if any(value is None for value in columns[name]):
        raise UserError(f"the reward {type(reward).__name__} needs a value in the column {name!r}, got None")
    return columns[name]


def _tagged(completion: str) -> str:
    """reasoning-gym's own way: the last <answer>, else everything."""
    answer = last_tag(completion)
    return (completion if answer is None else answer).strip()


def _entry(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise UserError(f"the column 'entry' holds no JSON ({error.msg} at column {error.colno})") from None


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
