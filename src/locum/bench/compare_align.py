"""``locum compare align``: preference methods with one budget, on tables where all is exact and on a language model."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from locum.bench.align_measures import BASELINE, MEASURES
from locum.bench.align_plan import BUDGETS, DATA, SENTIMENT, TABLE, Budget, Plan
from locum.bench.align_report import align_part
from locum.bench.compare import Task
from locum.bench.engines import Runner, Unit
from locum.bench.headline import in_words, verdict
from locum.bench.measures import Measure
from locum.bench.report import Page, Part
from locum.bench.store import Row, fingerprint
from locum.errors import UserError, unknown
from locum.method import names, require

__all__ = ["AlignTask", "align_methods"]

ORDER = ("dpo", "sft", "tdpo1", "tdpo2", "tgdpo", "treg", "sparsepo", "cdpo", "aligndistil", "selm", "rto")
TABLES_ONLY = ("selm", "rto", "onlinealigndistil")  # rounds of sampling and labelling: another budget than pairs
SAME = ("onlinetgdpo", "simporeg")  # what is compared under another name, or has no reference to stay near to
NEW_TOKENS = {TABLE: 0, SENTIMENT: 28, DATA: 64}  # a table's responses have one length


def align_methods() -> list[str]:
    """All methods that can be compared."""
    known = [m for m in names("align") if m not in SAME]
    return [*(m for m in ORDER if m in known), *sorted(set(known) - set(ORDER))]


@dataclass(frozen=True)
class AlignTask(Task):
    """Preference methods with the same pairs, steps, batches, learning rates, optimizer and start.

    Args:
        methods: which to compare: dpo, sft, tdpo1, tdpo2, tgdpo, treg, sparsepo, cdpo, aligndistil; on token-mdp also selm, rto and
            onlinealigndistil, which sample on their own; or "all". DPO always runs: the others are measured against it.
        task: "token-mdp", small worlds whose reward and KL are exact; "sentiment", a language model that goes on with a sentence
            and is rewarded by VADER; or both.
        model: the language model: a shipped name, a path, or a hub name. Trained with LoRA.
        data: your own pairs in place of the tasks: .jsonl or .parquet with prompt, chosen and rejected. Nobody rewards samples
            there: methods are compared by the share of held-out pairs that they tell right.
        seeds: trainings of each method, >= 1; when left out, 3 on token-mdp and 1 of a language model.
        steps: steps of each training, >= 1; when left out, 400 and 48.
        batch_size: pairs per step, >= 1; when left out, 64 and 8.
        lr: learning rate, > 0; when left out, 0.02 and 3e-4.
        beta: pull towards the reference, > 0; of every method that has one.
        lora_rank: rank of the trained adapter of a language model, >= 1.
        checkpoints: how often a language model is measured along its training, >= 1.
        held_out: most prompts that it is measured on, >= 2; of your own pairs a fifth at most is held out.
        max_new_tokens: limit of a sampled response, >= 1; when left out, 28 on sentiment and 64 on your own pairs.
        max_length: tokens of prompt and response of your own pairs; longer ones are left out.
        dtype: the language model's type, e.g. float32 or bfloat16; the device's usual one when left out.
        device: e.g. cpu or cuda; the best there is when left out.
    """

    family: ClassVar[str] = "align"
    measures: ClassVar[tuple[Measure, ...]] = MEASURES
    references: ClassVar[tuple[str, ...]] = (BASELINE,)
    main: ClassVar[str] = "vs_dpo"
    timed: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    note: ClassVar[str] = (
        "Every method has the same pairs, steps, batches, learning rate, optimizer and start; selm, rto and onlinealigndistil "
        "sample besides, and selm and rto have their samples labelled, so that they know more. Methods move away from the "
        "reference at different speeds, so the column against DPO compares at equal KL. Point at a column's head to see how it "
        "is computed, at a method's name to see its settings."
    )

    methods: tuple[str, ...] = ("dpo", "tdpo2", "tgdpo")
    task: Literal["both", "token-mdp", "sentiment"] = "both"
    model: str = "smollm2-135m-instruct"
    data: str | None = None
    seeds: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    beta: float = 0.1
    lora_rank: int = 16
    checkpoints: int = 4
    held_out: int = 64
    max_new_tokens: int | None = None
    max_length: int = 512
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, ">= 1")
        require(self, "lr", self.lr is None or 0 < self.lr < float("inf"), "finite and > 0")
        require(self, "beta", 0 < self.beta < float("inf"), "finite and > 0")
        for name, least in (("lora_rank", 1), ("checkpoints", 1), ("held_out", 2), ("max_length", 2)):
            require(self, name, getattr(self, name) >= least, f">= {least}")
        require(self, "model", bool(self.model.strip()), "a model's name or path")
        if self.task not in ("both", TABLE, SENTIMENT):
            raise unknown("task of align", self.task, ("both", TABLE, SENTIMENT))
        if self.data is not None and self.task != "both":
            raise UserError(f"give --data or --task {self.task}, not both: your own pairs take the tasks' place")
        for method in self.methods:
            if method.lower() not in (*align_methods(), "all"):
                raise unknown("method of align", method, [*align_methods(), "all"])
        for method in self.chosen if set(self.groups) != {TABLE} else ():
            if method in TABLES_ONLY and "all" not in self.methods:
                raise UserError(
                    f"method {method} samples and labels in rounds, which is another budget than pairs: compare it with --task {TABLE}"
                )
        _ = self.rows  # read now, so that a bad file is refused now, and sent along to a worker

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The methods that run, in the order of the table."""
        asked = {m.lower() for m in self.methods}
        return tuple(m for m in align_methods() if not asked or "all" in asked or m in asked or m in self.references)

    @property
    def groups(self) -> tuple[str, ...]:
        """What the methods are compared on."""
        if self.data is not None:
            return (DATA,)
        return (TABLE, SENTIMENT) if self.task == "both" else (self.task,)

    def budget(self, group: str) -> Budget:
        """What every method has on a group."""
        usual = BUDGETS[group]
        return Budget(
            self.seeds or usual.seeds,
            self.steps or usual.steps,
            self.batch_size or usual.batch_size,
            self.lr or usual.lr,
        )

    @property
    def new_tokens(self) -> int:
        """Limit of a sampled response."""
        return self.max_new_tokens or NEW_TOKENS[self.groups[-1]]

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]] | None:
        """Your own pairs, to train on and held out; no prompt is in both. None where there are none.

        Raises:
            UserError: for a file that cannot be read, bad rows, or too few prompts.
        """
        if self.data is None:
            return None
        from locum.align.data import read_pairs  # brings torch

        rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in read_pairs(self.data)]
        by_prompt: dict[str, list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
        few = min(self.held_out, len(rows) // 5)
        held_out: list[Row] = []
        for prompt in random.Random(0).sample(sorted(by_prompt), len(by_prompt)):
            if len(held_out) < few and len(held_out) + len(by_prompt[prompt]) <= len(rows) // 2:
                held_out += by_prompt.pop(prompt)
        if len(held_out) < 2:
            raise UserError(
                f"{self.data} has {len(rows)} pairs over {len(by_prompt)} prompts: too few to hold two of them out, give 10 or more"
            )
        return [row for group in by_prompt.values() for row in group], held_out

    @property
    def columns(self) -> tuple[str, ...]:
        score = () if self.groups == (DATA,) else ("reward",)
        memory = ("peak_memory_mb",) if self.groups != (TABLE,) else ()
        return *score, "kl", "vs_dpo", "accuracy", "tokens_per_second", "seconds", "time_vs_dpo", *memory

    @property
    def cores(self) -> int:
        import torch

        return torch.get_num_threads()

    @property
    def gpus(self) -> int:
        import torch

        wanted = torch.cuda.is_available() if self.device is None else self.device.startswith("cuda")
        return int(wanted and self.groups != (TABLE,))

    def config(self) -> Row:
        budgets = {g: self.budget(g) for g in self.groups}
        told = [f"{g}: {b.steps} steps of {b.batch_size} pairs, {in_words(b.seeds)}" for g, b in budgets.items()]
        models = [self.model] if self.groups != (TABLE,) else []
        return {
            "family": self.family,
            "task": "; ".join(told),
            "model": " and ".join([*models, *(["table policies"] if TABLE in self.groups else [])]),
            "methods": list(self.chosen),
            "budgets": {g: vars(b) for g, b in budgets.items()},
            "beta": self.beta,
            "language_model": None if self.groups == (TABLE,) else self._language_model(),
            "data": None if self.rows is None else fingerprint(str(self.data), *self.rows),
        }

    def _language_model(self) -> Row:
        keys = ("model", "lora_rank", "checkpoints", "held_out", "max_length", "dtype", "device")
        return {k: getattr(self, k) for k in keys} | {"new_tokens": self.new_tokens}

    def units(self) -> list[Unit]:
        return [
            Unit(method, seed, item, group)
            for item, group in enumerate(self.groups)
            for seed in range(self.budget(group).seeds)
            for method in self.chosen
            if group == TABLE or method not in TABLES_ONLY
        ]

    def weight(self, unit: Unit) -> float:
        return self.plan.seconds(unit.group)[1]

    @property
    def plan(self) -> Plan:
        """What the runner needs to know."""
        keys = ("beta", "model", "lora_rank", "checkpoints", "held_out", "max_length", "dtype", "device", "rows")
        budgets = {group: self.budget(group) for group in self.groups}
        return Plan(budgets=budgets, new_tokens=self.new_tokens, **{k: getattr(self, k) for k in keys})

    def open(self) -> Runner:
        from locum.bench.align_runner import AlignRunner  # brings torch

        return AlignRunner(self.plan)

    def part(self, page: Page) -> Part:
        return align_part(page)

    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        """Group by group: the best method at equal KL, by how much, and whether that is more than chance."""
        said = [self._verdict(g, [r for r in groups if r["group"] == g]) for g in self.groups]
        return " ".join(s for s in said if s) or "Nothing to say yet: no method has been measured beside DPO."

    def _verdict(self, group: str, rows: Sequence[Row]) -> str:
        score = "accuracy on held-out pairs" if group == DATA else "reward"
        known = [r for r in rows if r["method"] != BASELINE and r["ratios"].get("vs_dpo") is not None]
        others = [r for r in known if r["method"] not in TABLES_ONLY]
        beyond = [f"{r['method']} {r['ratios']['vs_dpo']:+.3f}" for r in known if r["method"] in TABLES_ONLY]
        asides = f" Not on the same budget, with samples of their own: {', '.join(beyond)}." if beyond else ""
        if not others:
            return asides.strip()
        seeds = self.budget(group).seeds
        over = f"over {in_words(seeds)}" if group == TABLE else "over held-out prompts"
        return verdict(others, "vs_dpo", group, "DPO at equal KL", score, over, seeds) + asides

    def told(self, row: Row) -> str:
        return f"{row['method']} on {row['group']}, seed {row['seed']}"
