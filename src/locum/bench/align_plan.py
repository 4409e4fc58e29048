"""What a comparison of preference methods is asked to do, worked out: groups, budgets, the language model's settings, pairs."""

from collections.abc import Mapping
from dataclasses import dataclass

from locum.bench.store import Row

__all__ = ["BUDGETS", "DATA", "SENTIMENT", "TABLE", "Budget", "Plan"]

TABLE, SENTIMENT, DATA = "token-mdp", "sentiment", "data"  # the groups: tables, shipped pairs, a user's own


@dataclass(frozen=True)
class Budget:
    """What every method of a group has: trainings, steps, pairs per step, learning rate."""

    seeds: int
    steps: int
    batch_size: int
    lr: float


BUDGETS = {TABLE: Budget(3, 400, 64, 0.02), SENTIMENT: Budget(1, 48, 8, 3e-4), DATA: Budget(1, 48, 8, 3e-4)}


@dataclass(frozen=True)
class Plan:
    """What the runner needs to know.

    Args:
        budgets: by group, in order.
        beta: of every method that has one.
        model, lora_rank, checkpoints, held_out, new_tokens, max_length, dtype, device: of the language model.
        rows: a user's own pairs, to train on and held out; None for the shipped ones.
    """

    budgets: Mapping[str, Budget]
    beta: float
    model: str
    lora_rank: int
    checkpoints: int
    held_out: int
    new_tokens: int
    max_length: int
    dtype: str | None
    device: str | None
    rows: tuple[list[Row], list[Row]] | None = None

    @property
    def on_model(self) -> str | None:
        """The group that a language model is trained on; None where there is none."""
        return next((group for group in self.budgets if group != TABLE), None)

    def seconds(self, group: str) -> tuple[float, float]:
        """How long a training takes on two cores, about, and with all that is measured along it."""
        budget = self.budgets[group]
        if group == TABLE:
            return 0.008 * budget.steps, 0.008 * budget.steps
        train = 0.35 * budget.steps * budget.batch_size
        return train, train + 0.5 * self.checkpoints * self.held_out
