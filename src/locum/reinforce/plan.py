"""What a recipe makes of a batch of rollouts before any update."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from locum.reinforce.base import Mask, PerToken
from locum.tokens.rollouts import Rollouts

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A batch that is ready to be trained on: rows with at least one kept token, and what the stages made of them.

    Args:
        rollouts: with the columns of the old policy and the stages' signals.
        advantages, weight: per token, without gradient.
        keep: the tokens that enter the loss.
        count: what each row adds to the loss's denominator; rows that were dropped are shared out among those left.
        logs: figures of the static stages.
    """

    rollouts: Rollouts
    advantages: PerToken
    weight: PerToken
    keep: Mask
    count: Float[Tensor, " rows"]
    logs: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rollouts)

    def __getitem__(self, rows: Tensor | slice) -> "Plan":
        a, w, k, n = (x[rows] for x in (self.advantages, self.weight, self.keep, self.count))
        return Plan(self.rollouts[rows], a, w, k, n, self.logs)

    def trimmed(self) -> "Plan":
        """Without columns that are padding in every row."""
        rollouts = self.rollouts.trimmed()
        t = rollouts.mask.shape[1]
        return Plan(rollouts, self.advantages[:, :t], self.weight[:, :t], self.keep[:, :t], self.count, self.logs)
