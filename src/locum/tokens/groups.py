"""Statistics of groups of rows. A group is a number; its rows need not be adjacent, and groups need not be of one size.

A row whose value is nan (a reward that could not be had) belongs to no group: it neither counts nor is counted.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Groups", "group_stats", "index", "members"]

PerRow = Float[Tensor, " rows"]


def index(group: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], int]:
    """Each row's group as 0, 1, 2, ..., and how many groups there are."""
    found, inverse = group.unique(return_inverse=True)
    return inverse, len(found)


def members(group: Int[Tensor, " rows"]) -> tuple[Int[Tensor, " _"], ...]:
    """The rows of each group, in the order of the groups' numbers."""
    inverse, n = index(group)
    return inverse.argsort(stable=True).split(inverse.bincount(minlength=n).tolist())


@dataclass(frozen=True, eq=False)
class Groups:
    """What each row's group is like: everything is told per row.

    Args:
        count: rows of the group that have a value.
        mean, sd: of their values, weighted where weights were given.
        level: true where all values of the group are one and the same (within 1e-12), so that nothing is learnt from it.
        known: true where the row has a value.
    """

    count: PerRow
    mean: PerRow
    sd: PerRow
    level: Bool[Tensor, " rows"]
    known: Bool[Tensor, " rows"]


def group_stats(value: PerRow, group: Int[Tensor, " rows"], ddof: int = 0, weight: PerRow | None = None) -> Groups:
    """Mean and standard deviation over the rows of each group.

    Args:
        value: nan where there is none.
        ddof: 1 divides the squares by one less than the count (not with weights).
        weight: what each row counts; 1 unless given.
    """
    inverse, n = index(group)
    known = ~value.isnan()
    one = known.to(value.dtype)
    weight = one if weight is None else weight * one
    value = torch.where(known, value, 0.0)

    def per_row(x: Tensor) -> Tensor:
        return x.new_zeros(n).index_add_(0, inverse, x)[inverse]

    count, mass = per_row(one), per_row(weight)
    mean = per_row(weight * value) / mass.clamp(min=torch.finfo(value.dtype).tiny)
    spread = per_row(weight * (value - mean).square())
    inf = torch.inf
    top = value.new_full((n,), -inf).scatter_reduce_(0, inverse, torch.where(known, value, -inf), "amax")[inverse]
    low = value.new_full((n,), inf).scatter_reduce_(0, inverse, torch.where(known, value, inf), "amin")[inverse]
    sd = (spread / (mass - ddof).clamp(min=1 if ddof else torch.finfo(value.dtype).tiny)).sqrt()
    return Groups(count, mean, sd, ~(top - low >= 1e-12), known)
