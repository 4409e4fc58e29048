"""What a policy said, as tensors: texts that were begun by a prefix and gone on with by the policy.

A row is one text. Its prefix (a prompt, or a prompt and what was said before) lies against the completion from the left,
the completion against it from the right, so that padding is outside on both sides:

    prefix [B, P]   . . x x x | y y y e . . .   ids [B, T]

`group` says which rows were drawn from one prefix and are compared with each other; rows of a group need not be adjacent
and groups need not be of one size. A row's reward is nan where there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from locum.errors import UserError

__all__ = ["Generated", "Rollouts", "pad_left", "seeds", "uniforms"]

PerToken = Float[Tensor, "rows tokens"]


@dataclass(frozen=True, eq=False)
class Generated:
    """Completions as they come from a sampler, row by row.

    Args:
        ids: 0 outside the mask.
        mask: true up to the end of each completion, its end of sequence included; no row is empty.
        ended: false where a completion ran into its limit.
        facts: what else belongs to each row, by name: tensors of any shape whose first axis is the rows.
    """

    ids: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows tokens"]
    ended: Bool[Tensor, " rows"]
    facts: Mapping[str, Tensor] = field(default_factory=dict)

    def lists(self) -> list[list[int]]:
        """The tokens of each completion."""
        return [ids[:n] for ids, n in zip(self.ids.tolist(), self.mask.sum(-1).tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Texts of a policy, and what is known of them.

    Args:
        prefix, prefix_mask: token ids padded on the left; true on real tokens.
        ids, mask: the completion, padded on the right; true on its tokens.
        group: rows of one group were drawn from one prefix.
        reward: one number per row, nan where there is none.
        columns: numbers per completion token, by name ("old_logp", "entropy", "ref_logp", ...); 0 outside the mask.
        facts: what is known of each row, by name ("prompt", "ended", ...): tensors whose first axis is the rows.
    """

    prefix: Int[Tensor, "rows _P"]
    prefix_mask: Bool[Tensor, "rows _P"]
    ids: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows tokens"]
    group: Int[Tensor, " rows"]
    reward: Float[Tensor, " rows"]
    columns: Mapping[str, PerToken] = field(default_factory=dict)
    facts: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> "Rollouts":
        """Some of the rows, in the order given; columns that are padding in all of them stay."""
        return self._each(lambda x: x[rows])

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Tokens of each completion."""
        return self.mask.sum(-1)

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The completions' tokens, row by row."""
        return self.ids[self.mask]

    def texts(self) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"], Bool[Tensor, "rows _L1"]]:
        """Whole texts: ids, attention mask, and where (one column less) a completion token is predicted."""
        where = torch.cat([torch.zeros_like(self.prefix_mask), self.mask], 1)[:, 1:]
        return torch.cat([self.prefix, self.ids], 1), torch.cat([self.prefix_mask, self.mask], 1), where

    def spread(self, values: Float[Tensor, " n"]) -> PerToken:
        """Numbers of the completions' tokens, row by row, put at their places; 0 elsewhere. Gradients flow."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)

    def with_columns(self, **columns: PerToken) -> "Rollouts":
        """With these columns too."""
        return replace(self, columns={**self.columns, **columns})

    def with_facts(self, **facts: Tensor) -> "Rollouts":
        """With these numbers per row too."""
        return replace(self, facts={**self.facts, **facts})

    def with_reward(self, reward: Float[Tensor, " rows"]) -> "Rollouts":
        """With these rewards."""
        return replace(self, reward=reward.to(self.device))

    def to(self, device: torch.device | str) -> "Rollouts":
        """All of it on a device."""
        return self._each(lambda x: x.to(device))

    def _each(self, fn: Callable[[Tensor], Tensor]) -> "Rollouts":
        """With a function applied to every tensor."""
        return Rollouts(
            fn(self.prefix),
            fn(self.prefix_mask),
            fn(self.ids),
            fn(self.mask),
            fn(self.group),
            fn(self.reward),
            columns={name: fn(x) for name, x in self.columns.items()},
            facts={name: fn(x) for name, x in self.facts.items()},
        )

    def trimmed(self) -> "Rollouts":
        """Without columns that are padding in every row."""
        begin = int((~self.prefix_mask.any(0)).long().cumprod(0).sum()) if len(self) else 0
        end = int(self.lengths.max()) if len(self) else 0
        return replace(
            self,
            prefix=self.prefix[:, begin:],
            prefix_mask=self.prefix_mask[:, begin:],
            ids=self.ids[:, :end],
            mask=self.mask[:, :end],
            columns={name: x[:, :end] for name, x in self.columns.items()},
        )

    @staticmethod
    def join(parts: Sequence["Rollouts"]) -> "Rollouts":
        """One after the other, padded to one width. Group numbers are taken as they are."""
        if not parts:
            raise UserError("there are no rollouts to join")
        begin, end = max(p.prefix.shape[1] for p in parts), max(p.ids.shape[1] for p in parts)

        def left(x: Tensor) -> Tensor:
            return F.pad(x, (begin - x.shape[1], 0))

        def right(x: Tensor) -> Tensor:
            return F.pad(x, (0, end - x.shape[1]))

        return Rollouts(
            torch.cat([left(p.prefix) for p in parts]),
            torch.cat([left(p.prefix_mask) for p in parts]),
            torch.cat([right(p.ids) for p in parts]),
            torch.cat([right(p.mask) for p in parts]),
            torch.cat([p.group for p in parts]),
            torch.cat([p.reward for p in parts]),
            columns={name: torch.cat([right(p.columns[name]) for p in parts]) for name in parts[0].columns},
            facts={name: torch.cat([p.facts[name] for p in parts]) for name in parts[0].facts},
        )

    @staticmethod
    def of(
        prefixes: Sequence[Sequence[int]], made: Generated, group: Int[Tensor, " rows"], reward: Tensor | None = None
    ) -> "Rollouts":
        """Rows from their prefixes (one per row) and completions."""
        prefix, prefix_mask = pad_left(prefixes, made.ids.device)
        if reward is None:
            reward = torch.full((len(made.ids),), torch.nan, device=made.ids.device)
        facts = {"ended": made.ended, **made.facts}
        return Rollouts(prefix, prefix_mask, made.ids, made.mask, group, reward, facts=facts)


def pad_left(
    texts: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "rows P"], Bool[Tensor, "rows P"]]:
    """Token ids padded on the left with 0, and true on the real ones."""
    width = max((len(t) for t in texts), default=0)
    ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in texts], dtype=torch.long, device=device)
    mask = torch.arange(width, device=device) >= width - torch.tensor([len(t) for t in texts], device=device)[:, None]
    return ids.view(len(texts), width), mask


def uniforms(seed: int, rows: Int[Tensor, " rows"], columns: int) -> Float[Tensor, "rows columns"]:
    """Numbers in [0, 1) that depend on the seed, a row's number and the column alone, not on what else is drawn beside them.

    So a text is drawn the same whatever batch, process or resumed run it is drawn in. A hash of the three (the finaliser of
    SplitMix64), 24 bits of it in float32.
    """
    at = torch.arange(columns, device=rows.device)
    x = _mixed(_mixed(torch.full_like(rows, seed)) ^ rows)[:, None] ^ at
    return (_mixed(x) >> 16 & 0xFFFFFF).float() / (1 << 24)


def seeds(draws: Float[Tensor, "rows _T"]) -> Int[Tensor, " rows"]:
    """A whole number per row, made of its first two draws: what further draws of that row can depend on, as `rows` of `uniforms`."""
    digits = (draws[:, :2].double() * (1 << 24)).long()
    return digits[:, 0] * (1 << 24) + digits[:, -1]


def _mixed(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """A one-to-one scrambling of 64-bit integers (they wrap)."""
    x = x + -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted right as unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)
