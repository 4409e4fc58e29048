"""What claims on the digit chain share: training a warmed-up policy by a recipe, and exact figures on the way."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from locum.reinforce import Recipe, Run
from locum.reinforce.learner import Learner, Problem, Settings
from locum.tasks.digit_chain import ChainPolicy, DigitChain, mean_entropy, pass_at_1, pretrained
from locum.tokens.sampling import Sampling

HELD_OUT = 400  # prompts that exact figures are a mean over


def learner(recipe: Recipe, seed: int, task: DigitChain, steps: int, epochs: int, lr: float = 1e-3) -> Learner:
    """A learner on a copy of the warmed-up policy, which is the reference; draws depend on the seed alone, so arms are paired."""
    policy = pretrained(seed, task)

    def reward(problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([task.score(p.ids, c) for p, c in zip(problems, completions, strict=True)])

    settings = Settings(epochs=epochs, rows_per_forward=4096, rows_per_pass=4096, max_grad_norm=None)
    optimizer = torch.optim.Adam(policy.parameters(), lr)
    run = Run(total=steps, room=task.limit)
    sampling = Sampling(temperature=1.0)
    return Learner(
        recipe, policy, optimizer, reward, run, seed, sampling, settings, lambda: nullcontext(pretrained(seed, task))
    )


def train(
    recipe: Recipe | str,
    seed: int,
    task: DigitChain,
    steps: int = 60,
    epochs: int = 2,
    prompts: int = 16,
    lr: float = 1e-3,
    every: int = 5,
    tell: Callable[[int], None] = lambda step: None,
) -> tuple[list[dict[str, Any]], ChainPolicy]:
    """Train, and measure before the first step and after every few: pass@1 and entropy exactly, tokens so far.

    Each row holds "step", "pass_at_1", "entropy", "trained" and "sampled" (tokens so far), and the last step's figures.
    """
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    trained = sampled = 0.0
    teacher = learner(recipe, seed, task, steps, epochs, lr)
    asked, held_out = (
        torch.Generator().manual_seed(1000 + seed),
        task.prompts(HELD_OUT, torch.Generator().manual_seed(7)),
    )
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            policy = teacher.policy
            now = {"pass_at_1": pass_at_1(policy, held_out), "entropy": mean_entropy(policy, held_out)}
            rows.append({"step": step, "trained": trained, "sampled": sampled} | now | figures)
        if step < steps:
            tell(step)
            figures = teacher.step([Problem(p) for p in task.prompts(prompts, asked).tolist()])
            figures = {k: v for k, v in figures.items() if "second" not in k}
            trained += figures.get("trained_tokens", 0.0)
            sampled += figures["sampled_tokens"]
    return rows, teacher.policy
