"""What a comparison of reinforcement recipes is asked to do, worked out: groups, their usual recipes and budgets, settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from locum.bench.store import Row

__all__ = ["BUDGETS", "CHAIN", "DATA", "GYM", "RECIPES", "Budget", "Plan", "recipe_of"]

CHAIN, GYM, DATA = "digit-chain", "gym-sums", "data"  # the groups: exact, with a verifier, a user's own
COMBINED = "dapo + hapo.clip + d3s"
RECIPES = {  # what is compared unless one says otherwise; the baseline first
    CHAIN: (
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "rloo",
        "d3s",
        "hapo",
        "thr",
        "twgrpo",
        "spochain",
        "spotree",
        COMBINED,
    ),
    GYM: ("grpo", "dapo", "d3s", COMBINED),
    DATA: ("grpo", "rloo", "d3s"),
}


@dataclass(frozen=True)
class Budget:
    """What every recipe of a group has.

    Args:
        seeds: trainings.
        steps: batches of rollouts.
        prompts: of a batch.
        epochs: times that a batch is gone through.
        lr: learning rate of Adam.
        new_tokens: most tokens of a completion; 0 where the task has its own limit.
        checkpoints: how often the policy is measured after the start.
        held_out: prompts that it is measured on.
        answers: to each of them; k of "best of k".
    """

    seeds: int
    steps: int
    prompts: int
    epochs: int
    lr: float
    new_tokens: int
    checkpoints: int
    held_out: int
    answers: int


BUDGETS = {
    CHAIN: Budget(5, 60, 16, 2, 1e-3, 0, 12, 200, 8),
    GYM: Budget(3, 40, 16, 2, 3e-4, 30, 8, 128, 4),
    DATA: Budget(1, 24, 4, 1, 1e-4, 48, 3, 32, 1),
}


@dataclass(frozen=True)
class Plan:
    """What the runner needs to know.

    Args:
        budgets: by group, in order.
        group_size: completions of a prompt, for recipes with independent completions; the recipe's own if None.
        model: the language model; None for the tiny one of the group.
        reward: of that model's problems, by name.
        lora_rank: of the adapters that are trained of a model that was named; 0 for all of its weights.
        max_prompt_length: problems with more tokens are left out.
        dtype, device: of that model.
        rows: that model's problems, to train on and held out.
    """

    budgets: Mapping[str, Budget]
    group_size: int | None
    model: str | None
    reward: str
    lora_rank: int
    max_prompt_length: int
    dtype: str | None
    device: str | None
    rows: tuple[list[Row], list[Row]] | None = None

    def seconds(self, group: str) -> float:
        """How long a training takes on two cores, about."""
        budget = self.budgets[group]
        measured = (budget.checkpoints + 1) * budget.held_out * budget.answers
        if group == CHAIN:
            return 0.025 * budget.steps + 5e-5 * measured
        rows = budget.steps * budget.prompts * (self.group_size or 8)
        each = 0.3 if self.model is not None else 0.0007
        return each * ((1 + budget.epochs) * rows + measured)


def recipe_of(text: str, group_size: int | None) -> Any:
    """The recipe of a text, with groups of this size if it samples plain groups.

    Raises: UserError for a text that is no recipe.
    """
    from locum.reinforce import Flat, Recipe  # brings torch

    recipe = Recipe.read(text)
    return recipe | Flat(group_size) if group_size is not None and recipe.sample == Flat() else recipe
