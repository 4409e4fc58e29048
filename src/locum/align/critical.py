"""Critical tokens by rollout: the expensive truth that contrastive estimation stands in for (arXiv 2411.19943, section 2).

From the prefix that ends with token t of a wrong response sample n continuations; q_t is the share of them that are right.
The critical token is the first t with q_t = 0 and q_u < 5 % for all u > t. A whole response costs n continuations per
token, so prefixes are taken from the end backwards, many at a time, and those before the last one that could still be
saved are never asked for.

    >>> critical_index(torch.tensor([9, 4, 0, 2, 1, 0]), n=64)
    (2, False)
    >>> [pass_at_k(4, 1, k) for k in (1, 2, 4)]
    [0.25, 0.5, 1.0]

With a language model `rollout` is, for example,

    lambda prefixes: [r.ids for r in sample_responses(lm, prefixes, generator=g, batch_size=256)]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Int
from torch import Tensor

from locum.align.base import Example, PairBatch
from locum.align.statistics import Scorer, collate
from locum.errors import UserError
from locum.method import require

__all__ = ["Critical", "Rollouts", "critical_index", "pass_at_k"]

Rollout = Callable[[Sequence[list[int]]], Sequence[Sequence[int]]]  # texts of token ids -> one continuation of each
Verifier = Callable[[Example, Sequence[list[int]]], Sequence[bool]]  # a problem and whole responses -> which are right


@dataclass(frozen=True, eq=False)
class Critical:
    """Which token doomed a response.

    Args:
        index: its place in the response, from 0; None where no prefix had only wrong continuations.
        fallback: every such prefix had a later one that could still be saved; `index` is the last of them.
        counts: right continuations of the prefixes that end with token `start`, `start` + 1, ..., the last.
    """

    index: int | None
    fallback: bool
    counts: Int[Tensor, " prefixes"]
    start: int


def critical_index(counts: Int[Tensor, " T"], n: int = 64, share: float = 0.05) -> tuple[int | None, bool]:
    """The critical token from the number of right continuations, of n, of the prefix that ends with each token.

    The first count of 0 after the last count of at least `share` of n. If there is none, the last 0 before it, and True;
    (None, False) without any 0.
    """
    never = (counts == 0).nonzero()[:, 0]
    saved = (counts / n >= share).nonzero()[:, 0]
    after = never[never > saved[-1]] if len(saved) else never
    if len(after):
        return int(after[0]), False
    return (int(never[-1]), True) if len(never) else (None, False)


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(at least one of k draws without replacement is right) when c of n samples are: 1 - C(n - c, k) / C(n, k)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f"pass_at_k: c must be in 0..n and k in 1..n, got n = {n}, c = {c}, k = {k}")
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Labels the tokens of responses by sampling on from their prefixes.

    Args:
        rollout: goes on from texts (prompt and response so far), one continuation each, sampled at the policy's law.
        correct: which whole responses to a problem are right.
        n: continuations per prefix. Paper 64.
        share: below this share of right continuations a prefix counts as lost, in (0, 1]. Paper 0.05.
        eos_ids: tokens that end a response; a prefix that ends with one is not continued.
        prefixes: how many are handed to `rollout` at a time, n texts each.
    """

    rollout: Rollout
    correct: Verifier
    n: int = 64
    share: float = 0.05
    eos_ids: tuple[int, ...] = ()
    prefixes: int = 16

    def __post_init__(self) -> None:
        require(self, "n", self.n >= 1, ">= 1")
        require(self, "share", 0 < self.share <= 1, "in (0, 1]")
        require(self, "prefixes", self.prefixes >= 1, ">= 1")

    def critical(self, example: Example, block: str = "response") -> Critical:
        """The critical token of a wrong response."""
        ids = list(example[f"{block}_ids"])
        if not ids:
            raise UserError(f"{block}_ids holds no token, so none of it can be critical")
        counts, start, settled = torch.zeros(0, dtype=torch.long), len(ids), False
        while start > 0 and not settled:
            begin = max(0, start - self.prefixes)
            new = self.count(example, [ids[: t + 1] for t in range(begin, start)])
            counts, start = torch.cat([new, counts]), begin
            index, fallback = critical_index(counts, self.n, self.share)
            settled = index is not None and bool((counts / self.n >= self.share).any())
        return Critical(None if index is None else start + index, fallback, counts, start)

    def count(self, example: Example, beginnings: Sequence[Sequence[int]]) -> Int[Tensor, " prefixes"]:
        """How many of n continuations of each beginning of a response are right."""
        prompt = list(example["prompt_ids"])
        over = [bool(y) and y[-1] in self.eos_ids for y in beginnings]
        todo = [list(y) for y, done in zip(beginnings, over, strict=True) if not done for _ in range(self.n)]
        rest = self.rollout([prompt + y for y in todo]) if todo else []
        whole = [y + list(more) for y, more in zip(todo, rest, strict=True)]
        whole += [list(y) for y, done in zip(beginnings, over, strict=True) if done]
        right = torch.tensor([bool(x) for x in self.correct(example, whole)], dtype=torch.long)
        counts, ended = torch.zeros(len(beginnings), dtype=torch.long), torch.tensor(over, dtype=torch.bool)
        counts[~ended] = right[: len(todo)].view(-1, self.n).sum(-1)
        counts[ended] = self.n * right[len(todo) :]
        return counts

    @torch.no_grad()
    def count_without(
        self,
        example: Example,
        at: int,
        policy: Scorer,
        block: str = "response",
        generator: torch.Generator | None = None,
        move: Callable[[PairBatch], PairBatch] = lambda batch: batch,
    ) -> int:
        """How many of n responses are right when token `at` is another one.

        The token is drawn from the policy's own law with the response's token taken out, and the rest sampled on. With
        `pass_at_k` this says what the token cost. `move` puts a batch on the policy's device.
        """
        ids = list(example[f"{block}_ids"])
        batch = move(collate([dict(example) | {f"{block}_ids": ids[: at + 1]}], (block,)))
        scores = policy(batch)
        law = scores.logits(scores.hidden[-1:])[0].cpu().clone()
        law[ids[at]] = -torch.inf
        drawn = torch.multinomial(law.softmax(-1), self.n, replacement=True, generator=generator).tolist()
        one_each = Rollouts(self.rollout, self.correct, 1, self.share, self.eos_ids)
        return int(one_each.count(example, [[*ids[:at], token] for token in drawn]).sum())
