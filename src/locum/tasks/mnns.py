"""Minimum non-negative sum: choose a sign for each digit so that the signed sum is >= 0 and as small as can be.

A trace is the row of partial sums that one choice of signs runs through. With m digits there are 2^m traces, and 2^t ways
to have begun one after t digits: what a model must hold to find the answer in one pass is known exactly, and is counted
without listing traces:

    digits 2 1 4     t = 1:  2, -2     t = 2:  3, 1, -1, -3     answer 1 = -2 - 1 + 4, by the trace -2, -3, 1

Token ids: BOS, ARROW, EOS, FILLER, then the digits, then the sums from the least to the largest possible.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from locum.errors import UserError
from locum.method import require

__all__ = ["ARROW", "BOS", "EOS", "FILLER", "MNNS", "Traces", "small_model"]

BOS, ARROW, EOS, FILLER, DIGITS = range(5)  # DIGITS: the id of the least digit

Digits = Int[Tensor, "n length"]
RANKS = ("beam", "beam_minabs")


@dataclass(frozen=True, eq=False)
class Traces:
    """The best traces of each row of digits.

    Args:
        ids: token ids of the partial sums; anything where not kept.
        kept: false where a row has fewer traces than were asked for.
        answers: token id of the least non-negative final sum among those kept.
    """

    ids: Int[Tensor, "n many length"]
    kept: Bool[Tensor, "n many"]
    answers: Int[Tensor, " n"]


@dataclass(frozen=True)
class MNNS:
    """The task.

    Args:
        length: m, digits of a problem.
        low, high: the least and the largest digit; they may be negative.
    """

    length: int = 4
    low: int = 1
    high: int = 9

    def __post_init__(self) -> None:
        require(self, "length", self.length >= 1, ">= 1")
        require(self, "high", self.high >= self.low, f">= low, which is {self.low}")

    @property
    def span(self) -> int:
        """The largest sum, and less a sign the least."""
        return self.length * max(abs(self.low), abs(self.high))

    @property
    def vocab_size(self) -> int:
        """Special tokens, digits and sums."""
        return self.token(self.span) + 1

    def token(self, total: int) -> int:
        """The id of a sum."""
        return DIGITS + self.high - self.low + 1 + total + self.span

    def total(self, token: int) -> int | None:
        """The sum of an id; None for a token that is none."""
        value = token - self.token(0)
        return value if abs(value) <= self.span else None

    def inputs(self) -> Digits:
        """All rows of digits there are."""
        each = [torch.arange(self.low, self.high + 1)] * self.length
        return torch.cartesian_prod(*each).view(-1, self.length)

    def split(self, generator: torch.Generator, share: float = 0.8) -> tuple[Digits, Int[Tensor, "k length"]]:
        """All inputs as a share to train on and the rest; orders of the same digits are never on both sides."""
        if not 0 < share < 1:
            raise UserError(f"share must be in (0, 1), got {share}")
        inputs = self.inputs()
        groups, which = inputs.sort(-1).values.unique(dim=0, return_inverse=True)
        first = torch.randperm(len(groups), generator=generator) < round(share * len(groups))
        return inputs[first[which]], inputs[~first[which]]

    # What a model reads and writes.

    def prompts(self, digits: Digits, arrow: bool = False) -> Int[Tensor, "n prompt"]:
        """Token ids: BOS and the digits, with an ARROW behind them or without."""
        self._check(digits)
        ids = F.pad(digits - self.low + DIGITS, (1, 0), value=BOS)
        return F.pad(ids, (0, 1), value=ARROW) if arrow else ids

    def texts(self, digits: Digits) -> Int[Tensor, "n tokens"]:
        """Whole solutions in discrete tokens: prompt, ARROW, the first of the best traces, EOS."""
        trace = self.best(digits, 1).ids[:, 0]
        return F.pad(torch.cat([self.prompts(digits, arrow=True), trace], 1), (0, 1), value=EOS)

    # Answers.

    def frontier(self, digits: Digits) -> Float[Tensor, "n length V"]:
        """What all 2^m traces together say at each step: the share of them at each sum; at the last step the answer.

        The shares come from counts that are carried from step to step over the sums' range, 2 span + 1 numbers each.
        """
        counts = self._counts(digits)
        out = counts.new_zeros(*counts.shape[:2], self.vocab_size)
        sums = slice(self.token(-self.span), self.token(self.span) + 1)
        out[:, :-1, sums] = counts[:, :-1] / counts[:, :-1].sum(-1, keepdim=True)
        out[:, -1].scatter_(-1, self._answer(counts)[:, None], 1.0)
        return out

    def answers(self, digits: Digits) -> Int[Tensor, " n"]:
        """Token ids of the least non-negative final sums."""
        return self._answer(self._counts(digits))

    def traces(self, digits: Digits) -> Int[Tensor, "n many length"]:
        """Token ids of all 2^m traces, + before -, the first digit's sign changing last."""
        self._check(digits)
        return (_signs(self.length) * digits[:, None]).cumsum(-1) + self.token(0)

    def best(self, digits: Digits, many: int, rank: str = "beam") -> Traces:
        """The best traces; among equals the first.

        Args:
            many: how many are kept at most, >= 1.
            rank: "beam" keeps traces that end >= 0, the least first; "beam_minabs" those that end nearest to 0, of two at the
                same distance the one above it.
        """
        if many < 1:
            raise UserError(f"many must be >= 1, got {many}")
        if rank not in RANKS:
            raise UserError(f"rank must be one of {', '.join(RANKS)}, got {rank!r}")
        traces = self.traces(digits)
        final = traces[..., -1] - self.token(0)
        far = 4 * self.span + 4
        key = torch.where(final >= 0, final, far) if rank == "beam" else 2 * final.abs() + (final < 0)
        order = key.argsort(dim=-1, stable=True)[:, :many]
        ids, key = traces.gather(1, order[..., None].expand(-1, -1, self.length)), key.gather(1, order)
        kept = key < far
        final = final.gather(1, order)
        answers = torch.where(kept & (final >= 0), final, far).amin(-1) + self.token(0)
        return Traces(ids, kept, answers)

    def _counts(self, digits: Digits) -> Float[Tensor, "n length sums"]:
        """How many traces stand at each sum after each digit."""
        self._check(digits)
        n, width = len(digits), 2 * self.span + 1
        now = torch.zeros(n, width, device=digits.device)
        now[:, self.span] = 1
        at, steps = torch.arange(width, device=digits.device), []
        for digit in digits.unbind(1):
            plus, minus = at - digit[:, None], at + digit[:, None]
            now = _taken(now, plus) + _taken(now, minus)
            steps.append(now)
        return torch.stack(steps, 1)

    def _answer(self, counts: Float[Tensor, "n length sums"]) -> Int[Tensor, " n"]:
        return (counts[:, -1, self.span :] > 0).long().argmax(-1) + self.token(0)

    def _check(self, digits: Digits) -> None:
        if digits.shape[1] != self.length:
            raise UserError(f"a problem has {self.length} digits, got rows of {digits.shape[1]}")
        if len(digits) and not bool(((digits >= self.low) & (digits <= self.high)).all()):
            raise UserError(f"digits must be in {self.low}..{self.high}, got {int(digits.min())}..{int(digits.max())}")


def _taken(values: Float[Tensor, "n sums"], at: Int[Tensor, "n sums"]) -> Float[Tensor, "n sums"]:
    """values[i, at[i, j]], 0 outside."""
    inside = (at >= 0) & (at < values.shape[1])
    return torch.where(inside, values.gather(1, at.clamp(0, values.shape[1] - 1)), 0.0)


@functools.cache
def _signs(length: int) -> Int[Tensor, "many length"]:
    return torch.cartesian_prod(*[torch.tensor([1, -1])] * length).view(-1, length)


def small_model(
    task: MNNS, width: int = 32, layers: int = 2, heads: int = 2, seed: int = 0, scale: float = 0.02
) -> Any:
    """A new GPT-2 of that size over the task's tokens, without dropout; equal seeds give equal weights.

    `scale` is the standard deviation of its weights: GPT-2's own, which is meant for a width of 768. At a width of 32 a larger
    one learns faster.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=task.vocab_size,
        n_positions=2 * task.length + 4,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=scale,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()
