"""Trains by one recipe after the other, and measures each along the way."""

import math
import warnings
from functools import partial
from typing import Any

import torch

from locum.bench.engines import Tell, Unit
from locum.bench.machine import PeakMemory
from locum.bench.reinforce_plan import CHAIN, Plan, recipe_of
from locum.bench.reinforce_worlds import ChainWorld, TextWorld, Training
from locum.bench.store import Row
from locum.method import to_yaml

__all__ = ["LOGGED", "ReinforceRunner"]

MEASURED = ("reward", "best", "entropy", "kl", "length")
LOGGED = (  # figures of a step that are kept
    "reward",
    "length",
    "level_groups",
    "kept_rows",
    "kept_tokens",
    "clipped_low",
    "clipped_high",
    "kl",
)
PHASES = ("rollout", "old_policy", "update")


class ReinforceRunner:
    """Measures one unit at a time: a training.

    Raises:
        UserError: for a model that cannot be had, or a reward that is not known.
    """

    tell: Tell | None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.worlds = {
            group: ChainWorld(budget) if group == CHAIN else TextWorld(plan, group)
            for group, budget in plan.budgets.items()
        }
        self.environment: dict[str, Any] = {"threads": torch.get_num_threads()}
        if plan.model is not None:
            [lm] = {w.lm for w in self.worlds.values() if isinstance(w, TextWorld) and w.lm is not None}
            self.environment |= {"dtype": str(lm.dtype).removeprefix("torch."), "device": str(lm.device)}

    def __call__(self, unit: Unit) -> Row:
        world, recipe = self.worlds[unit.group], recipe_of(unit.method, self.plan.group_size)
        with warnings.catch_warnings(), PeakMemory(world.device) as memory:
            warnings.simplefilter("ignore", FutureWarning)  # what transformers will rename is no news to the user
            if isinstance(world, TextWorld):
                world.making = lambda what, done, whole: self._say(unit, 0, f"{what}, {done} of {whole}")
            with world.training(recipe, unit.seed) as training:
                row = self._train(unit, training)
        if isinstance(world, TextWorld):  # of the chain the exact figures take more than the training
            row |= {"peak_memory_mb": memory.megabytes, "memory_how": memory.how}
        drawn = {"pipeline": recipe.pipeline(), "yaml": to_yaml(recipe)}
        return {"settings": str(recipe), "recipe": drawn, **row}

    def _train(self, unit: Unit, training: Training) -> Row:
        budget, points = self.plan.budgets[unit.group], list[Row]()
        n = min(budget.checkpoints, budget.steps)
        checkpoints = {round(i * budget.steps / n) for i in range(n + 1)}
        log: dict[str, list[float | None]] = {name: [] for name in LOGGED}
        seconds = dict.fromkeys(PHASES, 0.0)
        spent = {"sampled": 0.0, "trained": 0.0}
        for step in range(budget.steps + 1):
            if step in checkpoints:
                self._say(unit, step, f"measuring at step {step} of {budget.steps}")
                points.append({"step": step} | spent | training.measure())
            if step == budget.steps:
                break
            self._say(unit, step, f"step {step + 1} of {budget.steps}")
            figures = training.learner.step(partial(training.problems, step))
            spent = {name: x + figures.get(f"{name}_tokens", 0.0) for name, x in spent.items()}
            for name, values in log.items():
                values.append(_short(figures.get(name)))
            for phase in PHASES:
                seconds[phase] += figures.get(f"seconds/{phase}", 0.0)
        first, last = points[0]["answers"], points[-1]["answers"]
        found = {
            "curve": {name: [p[name] for p in points] for name in ("step", *spent)}
            | {name: [_short(p[name]) for p in points] for name in MEASURED},
            "log": log,
            "sampled_tokens": spent["sampled"],
            "trained_tokens": spent["trained"],
            "seconds": sum(seconds.values()),
            "phases": seconds,
            "samples": [
                {"prompt": prompt, "before": a, "after": b, "reward": [x, y]}
                for prompt, (a, x), (b, y) in zip(training.prompts, first, last, strict=True)
            ],
            "samples_note": training.note,
        }
        if "by_prompt" in points[0]:
            found["by_prompt"] = {"reward": [p["by_prompt"] for p in points]}
        return found

    def _say(self, unit: Unit, step: int, what: str) -> None:
        if self.tell is not None:
            self.tell(unit, step / self.plan.budgets[unit.group].steps, what)


def _short(x: float | None) -> float | None:
    """Six digits; None where there is no finite figure."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")
