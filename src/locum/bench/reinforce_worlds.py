"""What recipes are trained on in a comparison, and how a policy is measured there: the digit chain, exactly, and texts, on samples.

A `Training` is one recipe with one seed, ready to be stepped. All trainings of a seed begin with the same policy and are
offered the same problems, whatever a recipe makes of them: those of a step and of a batch within it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locum.bench.reinforce_chain import learner
from locum.bench.reinforce_plan import Budget, Plan
from locum.bench.store import Row
from locum.errors import UserError
from locum.models import LM, load
from locum.models.training import LoRA, without_dropout
from locum.reinforce import Recipe, Run
from locum.reinforce.judge import Judge
from locum.reinforce.learner import Learner, Problem, Settings
from locum.reinforce.policy import CRITIC, reference_of
from locum.reinforce.problems import Deck
from locum.reinforce.rewards import from_name
from locum.reinforce.run import Texts, problems_of
from locum.tasks import gym_sums
from locum.tasks.chat import as_text
from locum.tasks.digit_chain import (
    FILLER,
    ChainPolicy,
    DigitChain,
    mean_entropy,
    mean_kl,
    mean_length,
    pretrained,
    success,
)
from locum.tokens.rollouts import Rollouts, uniforms
from locum.tokens.tiles import divergence, over_tiles, tile_entropy

__all__ = ["ChainWorld", "TextWorld", "Training"]

SHOWN = 12  # samples kept for the report
FORWARD, PASS = 16, 32  # completions of a forward with and without gradient, of a model that was named
TINY = 64  # and of a tiny one


@dataclass(frozen=True, eq=False)
class Training:
    """One recipe with one seed, ready to be stepped.

    Args:
        learner: what trains.
        problems: of a batch, given the step and the batch's number within it.
        measure: figures of the policy as it is: "reward", "best", "entropy", "kl", "length", None where there is none;
            "by_prompt" has the rewards they are means of, where they are of samples; "answers" has texts and rewards.
        prompts: the first held-out prompts, which "answers" belong to.
        note: what a reader must know of the samples.
    """

    learner: Learner
    problems: Callable[[int, int], Sequence[Problem]]
    measure: Callable[[], Row]
    prompts: list[str]
    note: str = ""


class ChainWorld:
    """The digit chain with hard and easy digits: every figure is exact."""

    device = "cpu"

    def __init__(self, budget: Budget) -> None:
        self.budget, self.task = budget, DigitChain.hetero()
        self.held_out = self.task.prompts(budget.held_out, torch.Generator().manual_seed(7))

    @contextmanager
    def training(self, recipe: Recipe, seed: int) -> Iterator[Training]:
        """A training of the warmed-up policy."""
        if "value" in recipe.needs:
            raise UserError(f"the recipe {recipe} needs a critic, and the digit chain's policy has none")
        b = self.budget
        teacher = learner(recipe, seed, self.task, b.steps, b.epochs, b.lr)
        start = pretrained(seed, self.task)

        def problems(step: int, batch: int) -> list[Problem]:
            g = torch.Generator().manual_seed(((1000 + seed) * (b.steps + 1) + step) * 1000 + batch)
            return [Problem(ids) for ids in self.task.prompts(b.prompts, g).tolist()]

        shown = [[str(d) for d in ids] for ids in self.held_out[:SHOWN].tolist()]
        prompts = [f"{' '.join(ds)}  the sum ends in {sum(map(int, ds)) % 10}" for ds in shown]
        note = "An answer is the running sums' last digits; a dot is a filler. Right is what ends with the sum's last digit."
        yield Training(teacher, problems, lambda: self._measure(teacher.policy, start), prompts, note)

    def _measure(self, policy: ChainPolicy, start: ChainPolicy) -> Row:
        right = success(policy, self.held_out)
        return {
            "reward": float(right.mean()),
            "best": float((1 - (1 - right) ** self.budget.answers).mean()),
            "entropy": mean_entropy(policy, self.held_out),
            "kl": mean_kl(policy, start, self.held_out),
            "length": mean_length(policy, self.held_out),
            "answers": self._answers(policy),
        }

    def _answers(self, policy: ChainPolicy) -> list[tuple[str, float]]:
        """One answer to each of the first prompts, drawn with the same random numbers whatever the policy."""
        asked, room = self.held_out[:SHOWN].tolist(), self.task.limit
        made = policy.generate(asked, 1, [room] * len(asked), uniforms(7, torch.arange(len(asked)), room))
        said = [" ".join("·" if token == FILLER else str(token) for token in row) for row in made.lists()]
        rewards = [self.task.score(ids, row) for ids, row in zip(asked, made.lists(), strict=True)]
        return list(zip(said, rewards, strict=True))


class TextWorld:
    """Problems whose answers can be checked, and a language model that answers them.

    Raises:
        UserError: for a model that cannot be had, or a reward that is not known.
    """

    making: gym_sums.Progress | None = None  # called while the tiny model of a seed is made, which is done once

    def __init__(self, plan: Plan, group: str) -> None:
        self.plan, self.budget = plan, plan.budgets[group]
        self.lm: LM | None = None
        self.judge = Judge(gym_sums.reward)
        if plan.model is not None:
            self.judge = Judge(from_name(plan.reward))
            # Steps of a full training are too small for bfloat16 weights.
            self.lm = load(plan.model, dtype=plan.dtype or (None if plan.lora_rank else "float32"), device=plan.device)
            without_dropout(self.lm.model)
        self._started: dict[int, Row] = {}

    @property
    def device(self) -> str:
        return "cpu" if self.lm is None else self.lm.device.type

    def source(self, seed: int) -> tuple[LM, list[Row], list[Row]]:
        """The model before training, problems to train on, and held-out ones."""
        if self.lm is None or self.plan.rows is None:
            lm, train, held_out = gym_sums.world(seed, held_out=self.budget.held_out, progress=self.making)
            return lm, [dict(row) for row in train], [dict(row) for row in held_out]
        return self.lm, *self.plan.rows

    @contextmanager
    def training(self, recipe: Recipe, seed: int) -> Iterator[Training]:
        """A training of the model, or of a fresh adapter on it."""
        b = self.budget
        lm, train, held_out = self.source(seed)
        longest = self.plan.max_prompt_length
        (asked, _), (seen, _) = (problems_of(lm, rows, longest) for rows in (train, held_out))
        if not asked or len(seen) < 2:
            raise UserError(f"nearly every prompt has more than {longest} tokens: set max_prompt_length higher")
        seen, deck, judge = seen[: b.held_out], Deck(asked, seed), Texts(lm, self.judge)
        rows = (TINY, 2 * TINY) if self.lm is None else (FORWARD, PASS)
        with self._policy(recipe, lm, seed) as (policy, reference):
            trained = [p for p in policy.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, b.lr, weight_decay=0.0)
            settings = Settings(b.epochs, rows_per_forward=rows[0], rows_per_pass=rows[1])
            run = Run(total=b.steps, room=b.new_tokens)
            teacher = Learner(recipe, policy, optimizer, judge, run, seed, settings=settings, reference=reference)
            observer = _Observer(policy, reference, judge, seen, b, rows[1], seed)

            def problems(step: int, batch: int) -> list[Problem]:
                return deck.take((step + batch * b.steps) * b.prompts, b.prompts)

            def measure() -> Row:
                if teacher.run.step > 0:
                    return observer.measure()
                if seed not in self._started:  # the same for all recipes
                    self._started[seed] = observer.measure()
                return self._started[seed]

            yield Training(teacher, problems, measure, [as_text(p.row["prompt"]) for p in seen[:SHOWN]])

    @contextmanager
    def _policy(self, recipe: Recipe, lm: LM, seed: int) -> Iterator[tuple[Any, Any]]:
        """The policy, and what opens the policy as it was at the start; at the end the model is what it was."""
        rank = self.plan.lora_rank
        if self.lm is None or not rank:
            model, start = copy.deepcopy(lm.model).requires_grad_(True), lm.model.eval().requires_grad_(False)
            yield self._made(recipe, LM(model, lm.tokenizer, lm.name), start)
            return
        try:
            with LoRA(rank, 2.0 * rank).lent(lm.model, seed) as adapted:
                yield self._made(recipe, LM(adapted, lm.tokenizer, lm.name), None)
        finally:
            lm.model._modules.pop(CRITIC, None)

    def _made(self, recipe: Recipe, lm: LM, start: Any) -> tuple[Any, Any]:
        policy = recipe.likelihood.policy(lm)
        if "value" in recipe.needs:
            policy.add_critic()
        return policy, reference_of(policy, start)


@dataclass(frozen=True, eq=False)
class _Observer:
    """Measures a policy on samples to held-out problems: the same random numbers at every checkpoint of every recipe.

    Args:
        policy: what is measured.
        reference: opens the policy as it was at the start.
        judge: rewards.
        problems: held-out ones.
        budget: how many answers, of how many tokens.
        rows: completions of one forward.
        seed: of the answers.
    """

    policy: Any
    reference: Callable[[], Any]
    judge: Texts
    problems: list[Problem]
    budget: Budget
    rows: int
    seed: int

    @torch.no_grad()
    def measure(self) -> Row:
        k, room = self.budget.answers, self.budget.new_tokens
        owner = [p for p in self.problems for _ in range(k)]
        draws = uniforms(-1 - self.seed, torch.arange(len(owner)), room)
        made = self.policy.generate([p.ids for p in self.problems], k, [room] * len(self.problems), draws)
        answers = made.lists()
        reward = self.judge(owner, answers).view(-1, k)
        group = torch.arange(len(owner), device=made.ids.device) // k
        rollouts = Rollouts.of([p.ids for p in owner], made, group)
        entropy, gap = self._laws(rollouts)
        lm = self.judge.lm
        return {
            "reward": float(reward.mean()),
            "best": float(reward.max(-1).values.mean()) if k > 1 else None,
            "entropy": float(entropy.mean()),
            "kl": float(gap.sum()) / len(owner),
            "length": float(rollouts.lengths.float().mean()),
            "by_prompt": reward.mean(-1).tolist(),
            "answers": [(lm.decode(answers[i * k]), float(reward[i, 0])) for i in range(min(SHOWN, len(reward)))],
        }

    def _laws(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """At each token that was said: the policy's entropy, and KL(policy || start)."""

        def tile(z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return tile_entropy(z), divergence(z, other)

        found = []
        for rows in torch.arange(len(rollouts), device=rollouts.device).split(self.rows):
            part = rollouts[rows].trimmed()
            now = self.policy.scores(part)
            with self.reference() as start:
                found.append(over_tiles(tile, [now, start.scores(part)]))
        entropy, gap = zip(*found, strict=True)
        return torch.cat(entropy), torch.cat(gap)
