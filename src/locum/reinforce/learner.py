"""One optimisation step after another: collect rollouts, ask the old policy once, prepare, update in minibatches.

A `Learner` is the loop that a script would write; `locum.reinforce.trainer.Trainer` puts it on Accelerate, with data, checkpoints
and trackers. What it samples depends on the seed, the step and a prompt's place in it alone: not on batch sizes, not on
processes, not on whether the run was stopped in between.

    learner = Learner(Recipe.read("grpo + d3s"), policy, optimizer, reward, seed=0, total=60, room=16)
    for step in range(60):
        figures = learner.step(problems)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locum.errors import UserError
from locum.reinforce.base import Asked, PerToken, Run
from locum.reinforce.old_policy import columns_of, old_policy
from locum.reinforce.plan import Plan
from locum.reinforce.recipe import Recipe
from locum.tokens.groups import group_stats
from locum.tokens.rollouts import Rollouts, seeds, uniforms
from locum.tokens.sampling import Sampling

__all__ = ["Alone", "Learner", "Problem", "Settings"]

FAR = 1 << 20  # more prompts than a step has


@dataclass(frozen=True, eq=False)
class Problem:
    """A prompt as token ids, and whatever its reward is told from."""

    ids: Sequence[int]
    row: Any = None


Reward = Callable[[Sequence[Problem], Sequence[Sequence[int]]], Float[Tensor, " rows"]]
Prompts = Callable[[int], Sequence[Problem]]  # the number of a batch within the step -> its problems


@dataclass(frozen=True)
class Settings:
    """How a batch of rollouts is learnt from.

    Args:
        epochs: times that a batch is gone through.
        minibatches: optimiser steps of an epoch.
        rows_per_forward: completions of one training forward; what does not fit is accumulated.
        rows_per_pass: completions of one forward without gradient.
        max_grad_norm: gradients are clipped to it; None for never.
    """

    epochs: int = 1
    minibatches: int = 1
    rows_per_forward: int = 64
    rows_per_pass: int = 64
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "rows_per_forward", "rows_per_pass"):
            if not getattr(self, name) >= 1:
                raise UserError(f"Settings.{name} must be >= 1, got {getattr(self, name)!r}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"Settings.max_grad_norm must be > 0 or None, got {self.max_grad_norm!r}")


class Alone:
    """One process: what a learner asks of several (`locum.reinforce.trainer` has the others)."""

    rank, world = 0, 1

    def join(self, rollouts: Rollouts | None) -> Rollouts | None:
        """The rollouts of all processes."""
        return rollouts

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return x

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        loss.backward()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around one of several backward passes of an optimiser step."""
        return nullcontext()

    def ready(self, parameters: Sequence[Tensor]) -> None:
        """Make the gradients those of all processes, where they are not yet."""


@dataclass
class Learner:
    """Trains a policy by a recipe.

    Args:
        recipe: what to do.
        policy: what the recipe's likelihood asks; with a critic in `policy.critic` for advantages that need one.
        optimizer: over the policy's parameters.
        reward: ``(problems, completions as token ids) -> reward per row``; nan where there is none.
        run: where the run stands.
        seed: of all draws.
        sampling: the law that completions are drawn from.
        settings: how a batch is learnt from.
        reference: opens a context whose value is the reference policy; for recipes that need one.
        processes: the others.
    """

    recipe: Recipe
    policy: Any
    optimizer: Any
    reward: Reward
    run: Run = field(default_factory=Run)
    seed: int = 0
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    settings: Settings = field(default_factory=Settings)
    reference: Callable[[], AbstractContextManager[Any]] | None = None
    processes: Any = field(default_factory=Alone)
    changed: bool = field(default=False, init=False)  # whether the step that is on has changed the policy already

    def __post_init__(self) -> None:
        if "ref_logp" in self.recipe.needs and self.reference is None:
            raise UserError(f"the recipe {self.recipe} needs a reference policy, and there is none")
        if self.sampling.greedy:
            raise UserError("rollouts must be sampled: the temperature is 0")

    def step(self, problems: Sequence[Problem] | Prompts) -> dict[str, float]:
        """One batch of rollouts and all that is learnt from it; figures to log.

        Args:
            problems: of the step; a function where a recipe that filters groups may ask for more of them.
        """
        clock, self.changed = _Clock(), False
        with clock("rollout"):
            rollouts, figures = self.collect(problems if callable(problems) else lambda batch: problems)
        if rollouts is not None:
            figures |= self.learn(rollouts, clock)
        self.run.step += 1
        return figures | clock.figures(figures)

    @property
    def _seed(self) -> int:
        """Of the draws of this step."""
        return self.seed * 1_000_003 + self.run.step

    # Rollouts.

    def collect(self, problems: Prompts) -> tuple[Rollouts | None, dict[str, float]]:
        """The step's rollouts of all processes; None where no group is worth training on."""
        wanted, kept, sampled, parts = 0, 0, 0, list[Rollouts]()
        sums: dict[str, float] = {}
        filtered = self.recipe.filter
        for batch in range(filtered.max_batches if filtered is not None else 1):
            mine, figures, groups = self._together(list(problems(batch)), batch)
            wanted = wanted or groups
            sampled += groups
            sums = {name: sums.get(name, 0.0) + figures.get(name, 0.0) for name in {*sums, *figures}}
            if mine is not None and len(mine):
                parts.append(mine)
            kept = int(self.processes.total(torch.tensor(sum(_prompts(p) for p in parts))))
            if kept >= wanted:
                break
        rollouts = self.processes.join(Rollouts.join(parts) if parts else None)
        names = sorted(sums)
        summed = self.processes.total(torch.tensor([sums[n] for n in names], dtype=torch.float64)).tolist()
        figures = dict(zip(names, summed, strict=True)) | {
            "prompts": float(sampled),
            "kept_prompts": float(min(kept, wanted)),
        }
        rows = figures.pop("rows_sampled")
        figures["reward"] = figures.pop("reward_sum") / max(1.0, figures.pop("rewards"))
        figures["length"] = figures.pop("length_sum") / max(1.0, rows)
        figures["level_groups"] = figures.pop("level_rows") / max(1.0, rows)
        figures["ended"] = figures.pop("ended_rows") / max(1.0, rows)
        return (_first(rollouts, wanted) if rollouts is not None else None), figures

    def _together(self, problems: list[Problem], batch: int) -> tuple[Rollouts | None, dict[str, float], int]:
        """A batch of prompts in all processes. Where one of them fails all stop, so that none waits for it."""
        failure: UserError | None = None
        try:
            found = self._batch(problems, batch)
        except UserError as error:
            failure = error
        failed = int(self.processes.total(torch.tensor(int(failure is not None))))
        if failure is not None:
            raise failure
        if failed:
            raise UserError(
                f"{failed} of {self.processes.world} processes stopped in step {self.run.step}; they say why"
            )
        return found

    def _batch(self, problems: list[Problem], batch: int) -> tuple[Rollouts | None, dict[str, float], int]:
        """This process's part of one batch of prompts."""
        numbers = torch.arange(len(problems))[self.processes.rank :: self.processes.world]
        mine = [problems[i] for i in numbers.tolist()]
        zero = dict.fromkeys(("rows_sampled", "reward_sum", "rewards", "length_sum", "level_rows", "ended_rows"), 0.0)
        if not mine:
            return None, zero, len(problems)
        numbers = numbers + batch * FAR
        memory = self.run.memory.get("temperature", {})
        heat = self.recipe.temperature.heat(memory) if self.recipe.temperature is not None else None

        def generate(prefixes: Sequence[Sequence[int]], copies: int, room: Sequence[int], rows: Tensor) -> Any:
            draws = uniforms(self._seed, rows, max(room))
            ask = (self.policy, prefixes, copies, room, draws, heat, self.sampling)
            return self.recipe.likelihood.generate(*ask)

        def reward(owner: Sequence[int], completions: Sequence[Sequence[int]]) -> Tensor:
            return self.reward([mine[i] for i in owner], completions)

        def columns(rollouts: Rollouts, want: frozenset[str]) -> dict[str, PerToken]:
            return columns_of(self.recipe.likelihood, self.policy, rollouts, want, self.settings.rows_per_pass)

        ask = Asked(generate, reward, columns, self.run.room, numbers)
        rollouts, figures = self.recipe.sample(ask, [p.ids for p in mine])
        level = group_stats(rollouts.reward, rollouts.group).level
        known = ~rollouts.reward.isnan()
        figures = zero | figures
        figures |= {
            "rows_sampled": float(len(rollouts)),
            "reward_sum": float(rollouts.reward[known].sum()),
            "rewards": float(known.sum()),
            "length_sum": float(rollouts.lengths.sum()),
            "level_rows": float(level.sum()),
            "ended_rows": float(rollouts.facts["ended"].sum()),
        }
        if self.recipe.filter is not None:
            rollouts = rollouts[self.recipe.filter(self.recipe.shaped(rollouts))]
        # Numbers that no other batch and no other process has.
        prompt = numbers.to(rollouts.device)[rollouts.facts["prompt"]]
        group = (batch * self.processes.world + self.processes.rank) * FAR * FAR + rollouts.group
        return replace(rollouts, group=group).with_facts(prompt=prompt), figures, len(problems)

    # Updates.

    def learn(self, rollouts: Rollouts, clock: "_Clock | None" = None) -> dict[str, float]:
        """All updates on a batch of rollouts; figures to log."""
        clock, recipe, s = clock or _Clock(), self.recipe, self.settings
        want = recipe.needs - {"scores"}
        if s.epochs * s.minibatches > 1 or recipe.likelihood.redraws:
            want |= {"old_logp"}
        want -= recipe.sample.makes  # known since the rows were sampled
        # Whatever processes and batches the rows come from and go to, they are in one order here.
        order = torch.arange(len(rollouts), device=rollouts.device)
        numbers = seeds(uniforms(-1 - self._seed, order, 2))
        asked: list[Plan] = []  # of the policy as it is before any update
        with clock("old policy"):
            for epoch in range(s.epochs if recipe.likelihood.redraws else 1):
                facts = {"number": numbers, "epoch": torch.full_like(rollouts.group, epoch)}
                seen = self._asked(rollouts.with_facts(**facts), want)
                asked.append(recipe.prepare(seen, self.run))
        figures: dict[str, float] = {}
        for epoch in range(s.epochs):
            with clock("update"):
                before = figures.get("trained_tokens", 0.0)
                figures |= self._epoch(asked[epoch % len(asked)], epoch)
                figures["trained_tokens"] += before
        for stage in recipe.stages:
            kept = stage.remember(seen, self.run.memory.get(stage.slot, {}))
            if kept:
                self.run.memory[stage.slot] = kept
        return figures | dict(asked[-1].logs)

    def _asked(self, rollouts: Rollouts, want: frozenset[str]) -> Rollouts:
        """What the recipe needs of the old policy: each process asks for its own share of whole groups, all get everything."""
        observed = any("scores" in stage.needs for stage in self.recipe.stages)
        if not want and not observed:
            return rollouts
        p = self.processes
        if p.world == 1:
            return old_policy(self.recipe, self.policy, rollouts, want, self.settings.rows_per_pass, self.reference)
        groups = rollouts.group.unique()
        mine = torch.isin(rollouts.group, groups[p.rank :: p.world]).nonzero()[:, 0]
        part = rollouts[mine].with_facts(row=mine)
        if len(mine):
            part = old_policy(self.recipe, self.policy, part, want, self.settings.rows_per_pass, self.reference)
        whole = p.join(part)
        assert whole is not None
        return whole[whole.facts["row"].argsort()]

    def _epoch(self, plan: Plan, epoch: int) -> dict[str, float]:
        """One pass over a plan."""
        s = self.settings
        order = torch.arange(len(plan))
        if s.minibatches > 1:
            draws = uniforms(self.seed ^ 0x5EED, torch.tensor([self.run.step * 4096 + epoch]), max(1, len(plan)))[0]
            order = draws[: len(plan)].argsort()
        sums: dict[str, float] = {}
        for rows in order.tensor_split(s.minibatches):
            if len(rows):
                found = self._update(self.recipe.batch(plan, rows.to(plan.rollouts.device)))
                sums = {name: sums.get(name, 0.0) + x for name, x in found.items()}
        if not sums:
            return {"trained_tokens": 0.0, "loss": 0.0}
        tokens, steps = max(1.0, sums.pop("tokens")), sums.pop("steps")
        per_step = {name: sums.pop(name) / steps for name in ("loss", "grad_norm")}
        return {name: x / tokens for name, x in sums.items()} | per_step | {"trained_tokens": tokens}

    def _update(self, plan: Plan) -> dict[str, float]:
        """One optimiser step on these rows, which all processes share out among themselves."""
        p, s = self.processes, self.settings
        total = plan.count.sum()
        # Rows of like length go together, dealt to the processes in turn, so that all have the same number of forwards.
        order = plan.rollouts.lengths.argsort(stable=True)
        forwards = -(-len(order) // (s.rows_per_forward * p.world))
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for i, rows in enumerate(order[p.rank :: p.world].tensor_split(forwards)):
            idle = len(rows) == 0  # more processes than rows: a forward that adds nothing keeps them together
            part = plan[rows if not idle else order[:1]].trimmed()
            with p.accumulate(last=i == forwards - 1):
                columns = self.recipe.likelihood.columns(self.policy, part.rollouts, self.recipe.live | {"logp"})
                loss, logs = self.recipe.loss(part, columns, total)
                p.backward(loss * (0.0 if idle else float(p.world)))
            logs["loss"] = loss.detach()
            counted = 0.0 if idle else 1.0  # an idle process names the same figures
            sums = {name: sums.get(name, torch.zeros(())) + counted * x.double().cpu() for name, x in logs.items()}
        parameters = [x for group in self.optimizer.param_groups for x in group["params"]]
        p.ready(parameters)
        limit = float("inf") if s.max_grad_norm is None else s.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if norm != norm or norm == float("inf"):
            raise UserError(f"the gradient's norm is {norm} in step {self.run.step}: nothing was changed by it")
        names = sorted(sums)
        summed = dict(zip(names, p.total(torch.stack([sums[n] for n in names])).tolist(), strict=True))
        patience = self.recipe.clip.patience
        if patience is not None:
            summed["passed_over"] = float(summed["ratio"] > patience * summed["tokens"]) * summed["tokens"]
        if not summed.get("passed_over"):
            self.changed = True
            self.optimizer.step()
        return summed | {"grad_norm": norm, "steps": 1.0}


def _prompts(rollouts: Rollouts) -> int:
    return len(rollouts.facts["prompt"].unique())


def _first(rollouts: Rollouts, prompts: int) -> Rollouts:
    """In the order of the prompts, and so many of them at most."""
    number = rollouts.facts["prompt"]
    rollouts = rollouts[number.argsort(stable=True)]
    number = rollouts.facts["prompt"]
    return rollouts[number <= number.unique()[:prompts][-1]]


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def figures(self, counted: dict[str, float]) -> dict[str, float]:
        """Seconds of each phase, and tokens per second of sampling and of training."""
        out = {f"seconds/{phase.replace(' ', '_')}": x for phase, x in self.seconds.items()}
        pairs = (("rollout", "sampled_tokens"), ("update", "trained_tokens"))
        return out | {
            f"tokens_per_second/{phase}": counted.get(name, 0.0) / max(1e-9, self.seconds[phase])
            for phase, name in pairs
            if phase in self.seconds
        }
