"""``locum compare reinforce``: recipes with one budget, on a task where all is exact and on texts that a program can check."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from locum.bench.compare import Task
from locum.bench.engines import Runner, Unit
from locum.bench.headline import in_words, verdict
from locum.bench.measures import Measure
from locum.bench.reinforce_measures import BASELINE, MEASURES
from locum.bench.reinforce_plan import BUDGETS, CHAIN, DATA, GYM, RECIPES, Budget, Plan, recipe_of
from locum.bench.reinforce_report import reinforce_part
from locum.bench.report import Page, Part
from locum.bench.store import Row, fingerprint
from locum.errors import UserError, unknown
from locum.method import require

__all__ = ["ReinforceTask"]

MODEL = "smollm2-135m-instruct"
TINY = "a tiny transformer"
SUMS, EASY = (
    "chain_sum",
    {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
)  # for a model that was named
TRAINED = ("lora_rank", "max_prompt_length", "dtype", "device")  # what is said of its training
SHORT = 16  # tokens that it has for such a sum


@dataclass(frozen=True)
class ReinforceTask(Task):
    """Recipes with the same problems, steps, learning rate, optimizer and start.

    Args:
        methods: recipes to compare, e.g. "dapo;hapo.clip + d3s(rows=(2, 4))": a baseline or a paper, then pieces. When left out a
            dozen on digit-chain (grpo, dr_grpo, dapo, gspo, rloo, d3s, hapo, thr, twgrpo, spochain, spotree and a combination)
            and fewer elsewhere. GRPO always runs: the others are measured against it.
        task: digit-chain, a small policy whose pass@1, entropy and KL are exact; gym-sums, a tiny transformer that writes out sums
            which reasoning-gym makes and checks; or both. When left out both, and gym-sums alone with a model that is named.
        model: a language model in the tiny one's place: a shipped name (smollm2-135m-instruct), a path, or a hub name.
        data: your own problems in place of the tasks: .jsonl or .parquet with prompt and what the reward reads.
        reward: of your own problems: math, exact, format, reasoning-gym:NAME, or your own as module:function or file.py:function.
        seeds: trainings of each recipe, >= 1; when left out 5 on digit-chain, 3 on gym-sums, 1 of a model that was named.
        steps: batches of rollouts, >= 1; when left out 60, 40 and 24.
        prompts: problems of a batch, >= 1; when left out 16, and 4 with a model that was named.
        group_size: completions of each problem, >= 2, for recipes whose completions are independent; 8 when left out.
        epochs: times that a batch is gone through, >= 1; when left out 2, and 1 with a model that was named.
        lr: learning rate, > 0; when left out 1e-3, 3e-4 and 1e-4.
        lora_rank: rank of the adapters that are trained of a model that was named; 0 trains all of its weights.
        checkpoints: how often the policy is measured along its training, >= 1; when left out 12, 8 and 3.
        held_out: problems that it is measured on, >= 2; of your own a fifth at most is held out. When left out 200, 128 and 32.
        answers: to each of them, k of "best of k", >= 1; when left out 8, 4 and 1.
        max_new_tokens: limit of a completion, >= 1; the digit chain has its own. When left out 30 on gym-sums, 16 there with a model
            that was named, 48 on your own problems.
        max_prompt_length: problems with more tokens are left out.
        dtype: that model's type, e.g. float32 or bfloat16; when left out the device's usual one, and float32 where all weights are trained.
        device: e.g. cpu or cuda; the best there is when left out.
    """

    family: ClassVar[str] = "reinforce"
    measures: ClassVar[tuple[Measure, ...]] = MEASURES
    references: ClassVar[tuple[str, ...]] = (BASELINE,)
    main: ClassVar[str] = "vs_grpo"
    timed: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    note: ClassVar[str] = (
        "Every recipe has the same problems, steps, learning rate, optimizer and start. Recipes sample and train on different "
        "amounts, so they are compared where both had spent the same: on sampled tokens first, then on trained ones, then at the "
        "end. Many recipes are compared at once, and the best of many is partly luck. Point at a column's head to see how it is "
        "computed, at a recipe's name to see it in full."
    )

    methods: tuple[str, ...] = ()
    task: Literal["both", "digit-chain", "gym-sums"] | None = None
    model: str | None = None
    data: str | None = None
    reward: str = "exact"
    seeds: int | None = None
    steps: int | None = None
    prompts: int | None = None
    group_size: int | None = None
    epochs: int | None = None
    lr: float | None = None
    lora_rank: int = 16
    checkpoints: int | None = None
    held_out: int | None = None
    answers: int | None = None
    max_new_tokens: int | None = None
    max_prompt_length: int = 1024
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "prompts", "epochs", "checkpoints", "answers", "max_new_tokens"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, ">= 1")
        for name in ("group_size", "held_out"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 2, ">= 2")
        require(self, "lr", self.lr is None or 0 < self.lr < float("inf"), "finite and > 0")
        require(self, "lora_rank", self.lora_rank >= 0, ">= 0")
        require(self, "max_prompt_length", self.max_prompt_length >= 1, ">= 1")
        require(self, "model", self.model is None or bool(self.model.strip()), "a model's name or path")
        if self.task not in (None, "both", CHAIN, GYM):
            raise unknown("task of reinforce", self.task, ("both", CHAIN, GYM))
        if self.data is not None and self.task is not None:
            raise UserError(f"give --data or --task {self.task}, not both: your own problems take the tasks' place")
        if self.model is not None and self.task in (CHAIN, "both"):
            raise UserError(f"the task {CHAIN} has a policy of its own: give --task {GYM} with --model {self.model}")
        for text in self.methods:
            recipe = recipe_of(text, self.group_size)
            if not {"entropy", "scores"} <= recipe.likelihood.provides:
                raise UserError(
                    f"the recipe {text} asks another kind of policy than one that writes from left to right, "
                    "and the tasks here have no other"
                )
        if self.data is not None:
            from locum.reinforce.rewards import from_name

            from_name(self.reward)
        _ = self.rows  # read now, so that a bad file is refused now, and sent along to a worker

    @property
    def groups(self) -> tuple[str, ...]:
        """What the recipes are compared on."""
        if self.data is not None:
            return (DATA,)
        task = self.task or (GYM if self.model is not None else "both")
        return (CHAIN, GYM) if task == "both" else (task,)

    @property
    def named(self) -> str | None:
        """The language model that is trained in a tiny one's place."""
        return (self.model or MODEL) if self.data is not None else self.model

    def recipes(self, group: str) -> tuple[str, ...]:
        """The recipes that run on a group, GRPO first."""
        usual = RECIPES[group] if self.named is None else RECIPES[DATA]
        asked = [" ".join(text.split()) for text in self.methods] or usual
        return tuple(dict.fromkeys((BASELINE, *asked)))

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The recipes that run, in the order of the table."""
        return tuple(dict.fromkeys(m for group in self.groups for m in self.recipes(group)))

    def budget(self, group: str) -> Budget:
        """What every recipe has on a group."""
        keys = ("seeds", "steps", "prompts", "epochs", "lr", "checkpoints", "held_out", "answers")
        given = {k: getattr(self, k) for k in keys if getattr(self, k) is not None}
        if self.max_new_tokens is not None and group != CHAIN:
            given["new_tokens"] = self.max_new_tokens
        if self.named is None:
            return replace(BUDGETS[group], **given)
        return replace(BUDGETS[DATA], **({"new_tokens": SHORT} if group == GYM else {}) | given)

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]] | None:
        """What a model that was named is trained on and measured on; no prompt is in both. None where there is none.

        Raises:
            UserError: for a file that cannot be read, bad rows, or too few prompts.
        """
        if self.named is None:
            return None
        from locum.reinforce.problems import held_out, read_problems, reasoning_gym_problems  # brings torch

        wanted = self.budget(self.groups[-1]).held_out
        made = self.data is None
        rows = read_problems(reasoning_gym_problems(SUMS, 10 * wanted, **EASY) if made else self.data)
        few = min(wanted, len(rows) // 5)
        if few < 2:
            raise UserError(f"{self.data} has {len(rows)} problems: too few to hold two of them out, give 10 or more")
        train, test = held_out(rows, few / len(rows))
        return [dict(row) for row in train], [dict(row) for row in test]

    @property
    def columns(self) -> tuple[str, ...]:
        return "reward", "area", "vs_grpo", "vs_grpo_trained", "sampled_tokens", "trained_tokens", "seconds"

    @property
    def cores(self) -> int:
        import torch

        return torch.get_num_threads()

    @property
    def gpus(self) -> int:
        import torch

        wanted = torch.cuda.is_available() if self.device is None else self.device.startswith("cuda")
        return int(wanted and self.named is not None)

    def config(self) -> Row:
        budgets = {g: self.budget(g) for g in self.groups}
        size = self.group_size or 8
        told = [
            f"{g}: {b.steps} steps of {b.prompts} x {size} completions, {in_words(b.seeds)}" for g, b in budgets.items()
        ]
        policies = {CHAIN: "a small table policy", GYM: self.named or TINY, DATA: str(self.named)}
        return {
            "family": self.family,
            "task": "; ".join(told),
            "model": " and ".join(policies[g] for g in self.groups),
            "methods": list(self.chosen),
            "recipes": {g: list(self.recipes(g)) for g in self.groups},
            "budgets": {g: vars(b) for g, b in budgets.items()},
            "group_size": self.group_size,
            "language_model": None
            if self.named is None
            else {"model": self.named} | {k: getattr(self, k) for k in TRAINED},
            "reward": None if self.data is None else self.reward,
            "data": None if self.rows is None else fingerprint(self.data or SUMS, *self.rows),
        }

    def units(self) -> list[Unit]:
        return [
            Unit(method, seed, item, group)
            for item, group in enumerate(self.groups)
            for seed in range(self.budget(group).seeds)
            for method in self.recipes(group)
        ]

    def weight(self, unit: Unit) -> float:
        return self.plan.seconds(unit.group)

    @property
    def plan(self) -> Plan:
        """What the runner needs to know."""
        keys = ("group_size", *TRAINED, "rows")
        budgets = {group: self.budget(group) for group in self.groups}
        reward = self.reward if self.data is not None else f"reasoning-gym:{SUMS}"
        return Plan(budgets=budgets, model=self.named, reward=reward, **{k: getattr(self, k) for k in keys})

    def open(self) -> Runner:
        from locum.bench.reinforce_runner import ReinforceRunner  # brings torch

        return ReinforceRunner(self.plan)

    def part(self, page: Page) -> Part:
        return reinforce_part(page)

    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        """Group by group: the best recipe at equal sampled tokens, by how much, and whether that is more than chance."""
        said = []
        for group in self.groups:
            known = [r for r in groups if r["group"] == group and r["method"] != BASELINE]
            known = [r for r in known if r["ratios"].get(self.main) is not None]
            seeds = self.budget(group).seeds
            over = f"over {in_words(seeds)}" if group == CHAIN else "over held-out problems"
            if known:
                said.append(verdict(known, self.main, group, "GRPO at equal sampled tokens", "reward", over, seeds))
        return " ".join(said) or "Nothing to say yet: no recipe has been measured beside GRPO."

    def told(self, row: Row) -> str:
        return f"{row['method']} on {row['group']}, seed {row['seed']}"
