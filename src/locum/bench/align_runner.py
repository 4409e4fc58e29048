"""Trains a language model with one method after the other and measures each along the way, on held-out prompts and pairs.

The base model is loaded once. Every training begins with a fresh LoRA adapter of the same weights and takes the same pairs
in the same order; the adapter is taken off at its end. The base without adapter is the reference.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from locum.align import DPO
from locum.align.base import Example, Method, PairBatch
from locum.align.data import encode, read_pairs
from locum.align.statistics import BASE, LOGP_REF, ModelScorer
from locum.align.trainer import Trainer, align_arguments
from locum.bench.align_measures import BASELINE
from locum.bench.align_observer import BLOCKS, Observer
from locum.bench.align_plan import SENTIMENT, TABLE, Plan
from locum.bench.align_table import run_table
from locum.bench.align_world import World
from locum.bench.engines import Tell, Unit
from locum.bench.machine import PeakMemory
from locum.bench.store import Row
from locum.method import names
from locum.models import load
from locum.models.training import LoRA
from locum.tasks import sentiment

__all__ = ["AlignRunner", "Prepared"]


@dataclass(eq=False)
class Prepared:
    """What a method is trained with, beyond the pairs.

    Args:
        method: with its parameters.
        examples: to train on.
        models: frozen models beside the reference: names of adapters.
        note: what a reader must know of it, beyond its parameters.
        shared_seconds: time of what was made before, for another run, and is used again.
    """

    method: Method
    examples: Sequence[Example]
    models: dict[str, str] = field(default_factory=dict)
    note: str = ""
    shared_seconds: float = 0.0


class AlignRunner:
    """Measures one unit at a time: a table world, or a training of the language model.

    Raises:
        UserError: for a model that cannot be had, or pairs that it cannot be trained on.
    """

    tell: Tell | None = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.environment: dict[str, Any] = {"threads": torch.get_num_threads()}
        if plan.on_model is None:
            return
        self.budget = plan.budgets[plan.on_model]
        self.lm = load(plan.model, dtype=plan.dtype, device=plan.device)
        self.environment |= {"dtype": str(self.lm.dtype).removeprefix("torch."), "device": str(self.lm.device)}
        if plan.rows is None:
            train, held_out = (list(read_pairs(path)) for path in sentiment.files())
            held_out = held_out[: plan.held_out]
            prompts = [{"prompt": text} for text in sentiment.prompts(held_out=True)[: plan.held_out]]
        else:
            train, held_out = plan.rows
        limit: dict[str, Any] = {"max_length": plan.max_length, "overlong": "drop"}
        self.pairs, seen = (encode(rows, self.lm.tokenizer, **limit) for rows in (train, held_out))
        asked = seen if plan.rows else encode(prompts, self.lm.tokenizer, blocks=(), **limit)
        self.observer = Observer(self.lm, asked, seen, plan.on_model == SENTIMENT, plan.new_tokens)
        self._started: dict[int, Row] = {}
        self.pairs_with_reference = [dict(pair) for pair in self.pairs]
        self.reference_seconds = 0.0
        self.rewrites: tuple[list[dict[str, Any]], float] | None = None  # the pairs with T-REG's column, and its time
        self._guides: dict[int, tuple[dict[str, torch.Tensor], float]] = {}  # DPO's adapters, by seed, and their time

    def __call__(self, unit: Unit) -> Row:
        budget = self.plan.budgets[unit.group]
        if unit.group == TABLE:
            world = World.of(unit.seed, budget.steps, budget.batch_size, budget.lr, self.plan.beta)
            return run_table(unit.method, world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what transformers will rename is no news to the user
            return self._train(unit)

    def make(self, name: str, **settings: Any) -> Method:
        """The method of a name, with the common beta where it has one."""
        cls = names("align")[name]
        common = {"beta": self.plan.beta} if "beta" in {f.name for f in fields(cls)} else {}
        made: Method = cls(**common, **settings)
        return made

    def _train(self, unit: Unit) -> Row:
        """A training of the language model, measured along the way."""
        start = self._start(unit)
        rank = self.plan.lora_rank
        # A fresh adapter, the same for every method.
        with LoRA(rank, 2.0 * rank).lent(self.lm.model, unit.seed) as model, PeakMemory(self.lm.device.type) as memory:
            began = time.perf_counter()
            prepared = self._prepared(unit, model)
            ready = time.perf_counter()
            watch = _Watch(self, unit, model)
            self._run(model, prepared, unit.seed, watch)
            if unit.method == BASELINE:
                self._guides[unit.seed] = _weights(model), watch.seconds
        points = [start, *watch.points]
        score = "accuracy" if start["reward"] is None else "reward"
        curve = {k: [p[k] for p in points] for k in ("step", "reward", "kl", "entropy", "accuracy", "length")}
        rewarded = score == "reward"
        return {
            "settings": f"{prepared.method}" + (f"; {prepared.note}" if prepared.note else ""),
            "score": score,
            "curve": {k: v if k != "reward" or rewarded else None for k, v in curve.items()},
            "by_prompt": {k: [p["by_prompt"][k] for p in points] for k in ("kl", "score")},
            "tokens": self._tokens(prepared),
            "seconds": watch.seconds,
            "preparation_seconds": ready - began + prepared.shared_seconds,
            "peak_memory_mb": memory.megabytes,
            "memory_how": memory.how,
            "samples": self.observer.samples(start, points[-1]),
        }

    def _prepared(self, unit: Unit, model: Any) -> Prepared:
        recipe = RECIPES.get(unit.method)
        if recipe is not None:
            return recipe(self, unit.seed, model)
        method = self.make(unit.method)
        if method.needs or method.frozen != ("ref",):  # it runs the reference anyway
            return Prepared(method, self.pairs)
        return Prepared(method, self.pairs_with_reference, shared_seconds=self.reference_seconds)

    def _run(self, model: Any, prepared: Prepared, seed: int, *callbacks: TrainerCallback) -> None:
        """A training with the common budget; what is trained is the model's active adapter."""
        budget = self.budget
        with tempfile.TemporaryDirectory() as folder:
            args = align_arguments(
                folder,
                max_steps=budget.steps,
                per_device_train_batch_size=budget.batch_size,
                learning_rate=budget.lr,
                seed=seed,
                data_seed=seed,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=self.lm.device.type == "cpu",
            )
            with torch.random.fork_rng():
                trainer = Trainer(
                    model,
                    prepared.method,
                    args,
                    list(prepared.examples),
                    models=prepared.models,
                    processing_class=self.lm.tokenizer,
                    callbacks=list(callbacks),
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()

    # what methods are given

    def guide(self, seed: int, model: Any, name: str = "guide") -> float:
        """DPO's adapter of the same seed, as another adapter of the model; gives the seconds that its training took before."""
        from peft import set_peft_model_state_dict

        if seed not in self._guides:  # its run is on the disk, its adapter is not
            seconds = self.trained(seed, model, name, DPO(self.plan.beta), self.pairs_with_reference)
            self._guides[seed] = _weights(model, name), seconds
            return 0.0
        weights, seconds = self._guides[seed]
        model.add_adapter(name, model.peft_config[model.active_adapter])
        set_peft_model_state_dict(model, weights, adapter_name=name)
        model.set_adapter(model.active_adapter)
        return seconds

    def trained(self, seed: int, model: Any, name: str, method: Method, examples: Sequence[Example]) -> float:
        """Train another adapter of the model with the common budget, from the start that all have; the seconds it took."""
        from peft import set_peft_model_state_dict

        active, began = model.active_adapter, time.perf_counter()
        model.add_adapter(name, model.peft_config[active])
        set_peft_model_state_dict(model, _weights(model, active), adapter_name=name)
        model.set_adapter(name)
        self._run(model, Prepared(method, examples), seed)
        model.set_adapter(active)
        return time.perf_counter() - began

    def _start(self, unit: Unit) -> Row:
        """The reference, before anything is trained; the same for all methods of a seed."""
        if unit.seed not in self._started:
            self.say(unit, 0.0, "measuring the reference")
            if not self.reference_seconds:
                self._score_pairs()
            self._started[unit.seed] = self.observer.reference(unit.seed)
        return self._started[unit.seed]

    def _score_pairs(self) -> None:
        """The reference's log-probabilities of all pairs, made once: methods that need no more of it do not run it."""
        began = time.perf_counter()
        for block in BLOCKS:
            values = self.observer.log_probs(self.lm.model, self.pairs, block)
            for row, of_row in zip(self.pairs_with_reference, values, strict=True):
                row[f"{block}_{LOGP_REF}"] = of_row.tolist()
        self.reference_seconds = time.perf_counter() - began

    def move(self, batch: PairBatch) -> PairBatch:
        return batch.to(self.lm.device)

    def _tokens(self, prepared: Prepared) -> float:
        """Tokens of prompts and responses that a training sees."""
        budget, rows = self.budget, prepared.examples
        each = [len(e["prompt_ids"]) + len(e[f"{block}_ids"]) for e in rows for block in prepared.method.blocks]
        return budget.steps * budget.batch_size * sum(each) / len(rows)

    def say(self, unit: Unit, share: float, what: str) -> None:
        if self.tell is not None:
            self.tell(unit, share, what)


class _Watch(TrainerCallback):
    """Takes the time of a training's steps alone, and measures the policy at the checkpoints between them."""

    def __init__(self, runner: AlignRunner, unit: Unit, model: Any) -> None:
        self.runner, self.unit, self.model = runner, unit, model
        self.points: list[Row] = []
        self.seconds = self._began = 0.0
        self.steps = runner.budget.steps
        n = runner.plan.checkpoints
        self.checkpoints = {round((i + 1) * self.steps / n) for i in range(n)} - {0}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began
        step = state.global_step
        if step in self.checkpoints:
            self._tell(step, f"measuring at step {step} of {self.steps}")
            self.points.append(self.runner.observer.measure(self.model, self.unit.seed, step))
        self._tell(step, f"step {step} of {self.steps}")

    def _tell(self, step: int, what: str) -> None:
        train, whole = self.runner.plan.seconds(self.unit.group)
        share = train * step / self.steps + (whole - train) * len(self.points) / len(self.checkpoints)
        self.runner.say(self.unit, share / whole, what)


def _weights(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return {k: x.detach().clone() for k, x in get_peft_model_state_dict(model, adapter_name=name).items()}


def _sft(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    examples = [{"prompt_ids": e["prompt_ids"], "response_ids": e["chosen_ids"]} for e in runner.pairs]
    return Prepared(runner.make("sft"), examples, note="imitates the chosen responses")


def _tgdpo(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    from locum.align.tgdpo import GuideReward

    seconds = runner.guide(seed, model)
    guide, ref = ModelScorer(model, "guide"), ModelScorer(model, BASE)
    signal = GuideReward(guide, ref, runner.plan.beta, move=runner.move)
    examples = signal.annotate(runner.pairs_with_reference)
    model.delete_adapter("guide")
    note = "its guide is DPO's run of the same seed"
    return Prepared(runner.make("tgdpo"), examples, note=note, shared_seconds=seconds + runner.reference_seconds)


def _treg(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    from locum.align.treg import RewriteReward

    if runner.rewrites is None:  # the base's, whatever the seed
        began = time.perf_counter()
        annotated = RewriteReward(runner.lm).annotate(runner.pairs_with_reference)
        runner.rewrites = annotated, time.perf_counter() - began
        return Prepared(runner.make("treg"), annotated, shared_seconds=runner.reference_seconds)
    examples, seconds = runner.rewrites
    return Prepared(runner.make("treg"), examples, shared_seconds=seconds + runner.reference_seconds)


def _cdpo(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    from locum.align.cdpo import ContrastiveEstimation

    adapters = {"positive": "chosen", "negative": "rejected"}
    for name, block in adapters.items():
        texts = [{"prompt_ids": e["prompt_ids"], "response_ids": e[f"{block}_ids"]} for e in runner.pairs]
        runner.trained(seed, model, name, runner.make("sft"), texts)
    right, wrong = (ModelScorer(model, name) for name in adapters)
    signal = ContrastiveEstimation(right, wrong, eos_ids=tuple(runner.lm.eos_ids), move=runner.move)
    examples = signal.annotate(runner.pairs_with_reference)
    for name in adapters:
        model.delete_adapter(name)
    note = "its positive and negative models are adapters trained on the chosen and on the rejected responses before"
    return Prepared(runner.make("cdpo"), examples, note=note, shared_seconds=runner.reference_seconds)


def _aligndistil(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    from locum.align.aligndistil import swapped

    beta = runner.plan.beta
    shared = runner.guide(seed, model, "dpo")
    runner.trained(seed, model, "reverse", DPO(beta), swapped(runner.pairs_with_reference))
    note = "its teachers are DPO's run of the same seed and an adapter trained on the pairs exchanged"
    models = {"dpo": "dpo", "reverse": "reverse"}
    return Prepared(runner.make("aligndistil", beta_0=beta), runner.pairs, models, note, shared)


#: name -> what it is given; every other method is trained on the pairs as it is
RECIPES: dict[str, Callable[[AlignRunner, int, Any], Prepared]] = {
    "sft": _sft,
    "tgdpo": _tgdpo,
    "treg": _treg,
    "cdpo": _cdpo,
    "aligndistil": _aligndistil,
}
