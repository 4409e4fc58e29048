"""Signals made before training: one number per response token, written into the data as a column.

Such a signal is worked out once for a data set, by models that need not be in memory when the policy trains. (What a
batch itself gives, from inside the reference's forward, is a `locum.align.base.Signal`.)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.align.base import Example, PerToken, TokenStats
from locum.errors import UserError

__all__ = ["R_HAT", "TokenSignal", "bounded"]

R_HAT = "r_hat"  # the column of rewards per token, of whatever origin


class TokenSignal(ABC):
    """Where a column comes from: a guide model, contrastive prompts, contrastive models. `column` is its name."""

    column: ClassVar[str]

    @abstractmethod
    def values(self, examples: Sequence[Example], block: str) -> list[Float[Tensor, " _"]]:
        """One number per response token of one block, one tensor per example."""

    def annotate(
        self, examples: Sequence[Example], blocks: Sequence[str] = ("chosen", "rejected")
    ) -> list[dict[str, Any]]:
        """Copies of the examples with "<block>_<column>" added, as lists: ready for `collate` and for a data set's row.

        Raises: UserError for a value per token too many or too few, or one that is nan or inf, naming the example.
        """
        annotated = [dict(example) for example in examples]
        for block in blocks:
            for number, (example, row) in enumerate(zip(annotated, self.values(examples, block), strict=True)):
                name, tokens = f"{block}_{self.column}", len(example[f"{block}_ids"])
                if len(row) != tokens:
                    raise UserError(f"example {number} has {len(row)} values of {name} for {tokens} response tokens")
                if not torch.isfinite(row).all():
                    at = int((~torch.isfinite(row)).nonzero()[0])
                    raise UserError(
                        f"example {number} has {name} {float(row[at])} at its response token {at}; it must be finite"
                    )
                example[name] = row.tolist()
        return annotated


def bounded(s: TokenStats, column: str, low: float, high: float) -> PerToken:
    """A column of a batch whose numbers at response tokens must lie in [low, high].

    Raises: UserError naming the column, its first number outside (nan too) and the batch's row.
    """
    x = s.columns[column]
    outside = s.mask & ~((x >= low) & (x <= high))
    if outside.any():
        row, at = outside.nonzero()[0].tolist()
        raise UserError(
            f"the column {column!r} must lie in [{low:g}, {high:g}]; row {row} of the batch has {x[row, at].item():g}"
        )
    return x
