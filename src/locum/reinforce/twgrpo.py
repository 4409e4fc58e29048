"""Reinforcing Video Reasoning with Focused Thinking

Expensive: Labels of which reasoning tokens inform, and rewards for single steps.
Stands in: How much a group's next-token laws disagree at a position, and partial credit on questions with several answers.
Check: Weights are one where the group agrees, and groups without variance become rare.

Three parts, together or alone: a weight per position, a reward for partly right answers, and questions turned round so that
they have several answers.

Weights. A group's rows i are compared at the same column t. With l[i,t,v] the old policy's log-probabilities, and -log V where
row i has ended,

    divergence "code"   D[t] = mean_i sum_v (exp(x) - x - 1),   x = mean over rows of l[t,v], less l[i,t,v], within +-11
    divergence "kl"     D[t] = mean_i KL(pi_i || the rows' mean law)
    w[t] = 1 + (alpha - 1) (D[t] - min D) / (max D - min D + 1e-8)      in [1, alpha], for all rows of the group

and the loss is the mean over tokens of w times GRPO's clipped loss, clip 0.2 and 0.28. "code" is what the released models were
trained with, "kl" what the paper describes (a Jensen-Shannon divergence, at most log G). Scope "all" takes min and max over all
columns of the group; scope "valid" (ours) over those in which min_rows rows are still going on, and w = 1 in the others.

Reward (`SoftChoice`). S, the options that are named in <answer>, split at commas, Y the right ones: |S|/|Y| if S is a nonempty
subset of Y, else 0. `locum.reinforce.rewards.Format` gives the other half of the paper's reward.

Questions (`invert_question`). With probability 1/2 a question with one right option is negated, k of its wrong options, k uniform
in 1..n-1, become right ones beside the one that was right, and all are shuffled. What no rule can negate is left as it is.

Shapes: weights [rows, tokens], without unit, column "twgrpo_divergence" the same (D of the row's group at each of its tokens). Cost:
the output layer once more; logits of a group exist for a few columns at a time, in float32.

Traps. Positions are compared by number, not by meaning: it suits answers that follow a template. With scope "all" a column that
only one row reaches has a large D, often the largest (on the digit chain in 42 % of the groups that end so): the other columns are
squeezed towards 1 and the last token gets alpha; scope "valid" cures that. Disagreement is not importance everywhere: on the digit
chain pass@1 after 60 steps is 0.336 with alpha 1, 0.329 with 1.7 and 0.298 with 4 (means of 8 seeds). Tokens ruled out by the sampler
count with probability exp(-50). No gradient flows through weights (in the released code one does).

Example:
    >>> import torch
    >>> from random import Random
    >>> from locum.reinforce.twgrpo import Question, SoftChoice, disagreement, invert_question
    >>> from locum.tokens.tiles import Scores
    >>> one, other = [[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9], [0.8, 0.2]]  # two rows of three tokens
    >>> disagreement(Scores(torch.tensor(one + other).log()), torch.ones(2, 3, dtype=torch.bool)).numpy().round(4)
    array([0.    , 1.3333, 0.1345], dtype=float32)
    >>> SoftChoice()([""] * 3, ["<answer>A</answer>", "<answer>C, A</answer>", "<answer>A, B</answer>"], answer=["A,C"] * 3)
    [0.5, 1.0, 0.0]
    >>> asked = Question("What did the cook do?", ("sang", "cooked", "slept", "left"), right=(1,))
    >>> turned = invert_question(asked, Random(3), share=1.0)
    >>> turned.text, turned.options, turned.answer
    ("What didn't the cook do?", ('slept', 'cooked', 'left', 'sang'), 'A,C,D')

Authors: Dang, Wu, Wang, Lin, Zhu, Chen, Zheng, Wang, Chua
Year: 2025
Venue: ECCV 2026
arXiv: 2505.24718
"""

import re
import string
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.advantages import GroupNormalised
from locum.reinforce.base import Choice, PerToken, Run, Stage, Weigh
from locum.reinforce.grader import last_tag
from locum.reinforce.losses import Clip, TokenMean
from locum.tokens import tiles
from locum.tokens.groups import index, members
from locum.tokens.rollouts import Rollouts
from locum.tokens.tiles import Scores

__all__ = ["TWGRPO", "Question", "SoftChoice", "disagreement", "invert_question", "invert_questions", "negated"]

FAR = 11.0  # nats: a log-probability is not farther than this from the group's mean
NEVER = -50.0  # log-probability of what is ruled out

Laws = Float[Tensor, "rows columns V"]


@dataclass(frozen=True)
class TWGRPO(Weigh):
    """A weight per position: how much the group's next-token laws disagree there.

    Args:
        alpha: the largest weight; >= 1, and 1 is the host. Paper 1.7, its code 1.4.
        divergence: "code" (the released models) or "kl".
        scope: the columns that are compared: "all", or "valid", those that at least min_rows rows reach.
        min_rows: >= 1; for scope "valid".
    """

    alpha: float = 1.7
    divergence: str = "code"
    scope: str = "all"
    min_rows: int = 2

    def __post_init__(self) -> None:
        require(self, "alpha", 1 <= self.alpha < torch.inf, "finite and >= 1")
        require(self, "divergence", self.divergence in DIVERGENCES, '"code" or "kl"')
        require(self, "scope", self.scope in ("all", "valid"), '"all" or "valid"')
        require(self, "min_rows", self.min_rows >= 1, ">= 1")

    @property
    def setting(self) -> tuple[Stage, ...]:
        return (Clip(0.2, 0.28), TokenMean(), GroupNormalised(eps=1e-4))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"}) if self.alpha > 1 else frozenset()

    @torch.no_grad()
    def observe(self, scores: Scores, rollouts: Rollouts) -> dict[str, PerToken]:
        owner = rollouts.group[:, None].expand_as(rollouts.mask)[rollouts.mask]
        found = torch.zeros(rollouts.mask.shape, device=rollouts.device, dtype=scores.logits(scores.hidden[:0]).dtype)
        for rows, tokens in zip(members(rollouts.group), members(owner), strict=True):
            one = Scores(scores.hidden[tokens], scores.head, scores.bias)
            found[rows] = disagreement(one, rollouts.mask[rows], self.divergence)
        return {"twgrpo_divergence": found * rollouts.mask}

    def __call__(self, rollouts: Rollouts, advantages: PerToken, run: Run) -> Choice:
        if self.alpha == 1:
            return Choice()
        d, mask = rollouts.columns["twgrpo_divergence"], rollouts.mask
        group, n = index(rollouts.group)
        if bool((group.bincount(minlength=n) == 1).any()):
            warnings.warn("a group has one row only, which agrees with itself: its weights are 1", stacklevel=2)
        table = d.new_zeros(n, d.shape[1])
        reach = table.index_add(0, group, mask.to(d.dtype))  # rows of the group in which there is such a column
        # All of them have the same D there, and it is >= 0.
        table = table.scatter_reduce(0, group[:, None].expand_as(d), d * mask, "amax")
        compared = reach >= (self.min_rows if self.scope == "valid" else 1)
        low = torch.where(compared, table, torch.inf).amin(-1, keepdim=True)
        high = torch.where(compared, table, -torch.inf).amax(-1, keepdim=True)
        share = torch.where(compared, (table - low) / (high - low + 1e-8), 0.0)
        weight = torch.where(mask, (1 + (self.alpha - 1) * share)[group], 0.0).to(advantages.dtype)
        tokens = mask.sum().clamp(min=1)
        logs = {"divergence": d, "weight": weight}
        return Choice(weight, logs={f"twgrpo/{k}": float(x[mask].sum() / tokens) for k, x in logs.items()})


@torch.no_grad()
def disagreement(scores: Scores, mask: Bool[Tensor, "rows tokens"], kind: str = "code") -> Float[Tensor, " tokens"]:
    """D of each column of one group, a few columns at a time; 0 beyond the longest row.

    Args:
        scores: at the true entries of the mask, row by row.
        kind: "code" or "kl".
    """
    size, number = scores.vocab_size, mask.flatten().cumsum(0).view(mask.shape) - 1
    parts = []
    for at in mask.any(0).nonzero()[:, 0].split(max(1, tiles.TILE // (len(mask) * size))):
        here = mask[:, at]
        said = scores.logits(scores.hidden[number[:, at][here]]).log_softmax(-1).clamp_(min=NEVER)
        if here.all():
            laws = said.view(*here.shape, size)
        else:
            laws = said.new_full((*here.shape, size), -log(size))
            laws[here] = said
        parts.append(DIVERGENCES[kind](laws))
    found = torch.cat(parts) if parts else scores.logits(scores.hidden[:0]).sum(-1)
    return torch.cat([found, found.new_zeros(mask.shape[1] - len(found))])


# Both are told from differences to the first row, so that laws that are equal give 0 and not rounding.


def _code(laws: Laws) -> Float[Tensor, " columns"]:
    gap = laws - laws[0]
    gap = torch.sub(gap.mean(0), gap, out=gap).clamp_(-FAR, FAR)
    return gap.expm1().sub_(gap).sum(-1).mean(0)


def _kl(laws: Laws) -> Float[Tensor, " columns"]:
    gap = laws - laws[0]
    gap -= gap.exp().mean(0).log_()
    return gap.mul_(laws.exp()).sum(-1).mean(0).clamp_(min=0)


DIVERGENCES: dict[str, Callable[[Laws], Float[Tensor, " columns"]]] = {"code": _code, "kl": _kl}


# Partial credit.


@dataclass(frozen=True)
class SoftChoice:
    """|S|/|Y| where the options S that were named are some of the right ones Y and no other, else 0.

    Called with texts and the column "answer": the right options, as a list or as text with commas. Named is what stands in the
    last <answer>, or the whole text, split at commas; spaces, repetitions and empty parts do not count.

    Args:
        partial: without it only S = Y is rewarded.
        casefold: small letters are as good as capitals.
        verifier: asked first, ``(completion, answer) -> bool``; where it says yes the reward is 1.
    """

    partial: bool = True
    casefold: bool = False
    verifier: Callable[[str, Any], bool] | None = None

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        if "answer" not in columns:
            raise UserError("the reward SoftChoice needs the column 'answer' in the data: the right options, as 'A,C'")
        return [self.of(text, answer) for text, answer in zip(completions, columns["answer"], strict=True)]

    def of(self, text: str, answer: str | Iterable[str]) -> float:
        """The reward of one text. Raises: UserError where no option is right."""
        right = self.options(answer if isinstance(answer, str) else ",".join(answer))
        if not right:
            raise UserError(f"the column 'answer' must name at least one right option, got {answer!r}")
        if self.verifier is not None and self.verifier(text, answer):
            return 1.0
        tagged = last_tag(text)
        named = self.options(text if tagged is None else tagged)
        if not named or not named <= right:
            return 0.0
        return len(named) / len(right) if self.partial else float(named == right)

    def options(self, text: str) -> frozenset[str]:
        """The options that a text names."""
        text = "".join(text.split())
        return frozenset(filter(None, (text.casefold() if self.casefold else text).split(",")))


# Questions turned round.

AUXILIARIES = {
    "did": "didn't",
    "does": "doesn't",
    "do": "don't",
    "is": "isn't",
    "are": "aren't",
    "was": "wasn't",
    "were": "weren't",
}
PHRASES = {r"\b(what) happened\b": r"\1 didn't happen", r"\b(what) will\b": r"\1 won't"}
NEGATIVE = re.compile(r"n['’]t\b|\b(not|never|cannot|except)\b", re.IGNORECASE)
SUFFIX = (
    "Think between <think> and </think>. Then write the letters of all right options, separated by commas, between <answer> "
    "and </answer>."
)


@dataclass(frozen=True)
class Question:
    """A question with options.

    Args:
        text: the question.
        options: at most 26, named A, B, C, ...
        right: numbers of the right ones, from 0; at least one.
    """

    text: str
    options: tuple[str, ...]
    right: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self, "options", len(self.options) <= 26, "at most 26 texts")
        fine = bool(self.right) and set(self.right) <= set(range(len(self.options)))
        require(self, "right", fine, f"at least one number below {len(self.options)}")

    @property
    def answer(self) -> str:
        """The letters of the right options: "A,C"."""
        return ",".join(string.ascii_uppercase[i] for i in sorted(set(self.right)))

    @property
    def prompt(self) -> str:
        """The question, its options by letter, and how to answer."""
        lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, self.options, strict=False)]
        return "\n".join([self.text, *lines, SUFFIX])


def negated(text: str) -> str | None:
    """The question with its second word, or "what happened" or "what will", negated; None where no rule applies."""
    if NEGATIVE.search(text):
        return None
    words = re.match(r"(\s*\S+\s+)(\S+)(.*)", text, re.DOTALL)
    if words is not None and words[2].lower() in AUXILIARIES:
        return words[1] + AUXILIARIES[words[2].lower()] + words[3]
    for pattern, instead in PHRASES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return re.sub(pattern, instead, text, count=1, flags=re.IGNORECASE)
    return None


def invert_question(item: Question, rng: Random, share: float = 0.5) -> Question:
    """With probability `share` the question's negation, whose right options were wrong ones and one of whose was right; else itself.

    It is itself as well where no rule negates it, where there are not two options, or not one right one.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share must be in [0, 1], got {share!r}")
    text, n = negated(item.text), len(item.options)
    if text is None or n < 2 or len(item.right) != 1 or rng.random() >= share:
        return item
    wrong = [i for i in range(n) if i != item.right[0]]
    kept = [*rng.sample(wrong, rng.randint(1, n - 1)), item.right[0]]
    rng.shuffle(kept)
    right = tuple(place for place, i in enumerate(kept) if i != item.right[0])
    return Question(text, tuple(item.options[i] for i in kept), right)


def invert_questions(
    items: Iterable[Question], rng: Random, share: float = 0.5
) -> tuple[list[Question], dict[str, int]]:
    """`invert_question` of each, and how many were "inverted", "kept" as it fell, or left because they "cannot" be inverted."""
    made, counts = [], {"inverted": 0, "kept": 0, "cannot": 0}
    for item in items:
        made.append(invert_question(item, rng, share))
        can = negated(item.text) is not None and len(item.options) > 1 and len(item.right) == 1
        counts["cannot" if not can else "kept" if made[-1] is item else "inverted"] += 1
    return made, counts
