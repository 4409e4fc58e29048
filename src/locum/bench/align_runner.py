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
from locum.align.statistics import BASE, LOGP_REF, ModelScorer, collate, token_log_probs
from locum.align.trainer import Trainer, align_arguments
from locum.bench.align_measures import BASELINE
from locum.bench.align_table import World, run_table
from locum.bench.compare_align import SENTIMENT, TABLE, AlignTask
from locum.bench.engines import Tell, Unit
from locum.bench.machine import PeakMemory
from locum.bench.store import Row
from locum.method import names
from locum.models import LM, load
from locum.models.sampling import sample_responses
from locum.tasks import sentiment
from locum.tokens.tiles import divergence, over_tiles, tile_entropy

__all__ = ["AlignRunner", "Prepared"]

SAMPLED = 16  # prompts sampled at a time
SHOWN = 12  # samples kept for the report
BLOCKS = ("chosen", "rejected")


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

    def __init__(self, task: AlignTask) -> None:
        self.task = task
        self.environment: dict[str, Any] = {"threads": torch.get_num_threads()}
        if set(task.groups) == {TABLE}:
            return
        self.lm = load(task.model, dtype=task.dtype, device=task.device)
        self.environment |= {"dtype": str(self.lm.dtype).removeprefix("torch."), "device": str(self.lm.device)}
        if task.rows is None:
            train, held_out = (list(read_pairs(path)) for path in sentiment.files())
            held_out, prompts = held_out[: task.held_out], sentiment.prompts(held_out=True)[: task.held_out]
        else:
            train, held_out = task.rows
            prompts = [row["prompt"] for row in held_out]
        limit: dict[str, Any] = {"max_length": task.max_length, "overlong": "drop"}
        self.pairs = encode(train, self.lm.tokenizer, **limit)
        self.held_out = encode(held_out, self.lm.tokenizer, **limit)
        asked = [{"prompt": prompt} for prompt in prompts]
        self.prompts = encode(asked, self.lm.tokenizer, blocks=(), **limit)
        self._started: dict[int, Row] = {}
        self._held_out_reference: dict[str, list[torch.Tensor]] = {}
        self.pairs_with_reference = [dict(pair) for pair in self.pairs]
        self.reference_seconds = 0.0
        self.rewrites: tuple[list[dict[str, Any]], float] | None = None  # the pairs with T-REG's column, and its time
        self._guides: dict[int, tuple[dict[str, torch.Tensor], float]] = {}  # DPO's adapters, by seed, and their time

    def __call__(self, unit: Unit) -> Row:
        budget = self.task.budget(unit.group)
        if unit.group == TABLE:
            world = World.of(unit.seed, budget.steps, budget.batch_size, budget.lr, self.task.beta)
            return run_table(unit.method, world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what transformers will rename is no news to the user
            return self._train(unit)

    def make(self, name: str, **settings: Any) -> Method:
        """The method of a name, with the common beta where it has one."""
        cls = names("align")[name]
        common = {"beta": self.task.beta} if "beta" in {f.name for f in fields(cls)} else {}
        made: Method = cls(**common, **settings)
        return made

    def _train(self, unit: Unit) -> Row:
        """A training of the language model, measured along the way."""
        start = self._start(unit)
        model = self._adapted(unit.seed)
        began = time.perf_counter()
        try:
            with PeakMemory(self.lm.device.type) as memory:
                prepared = self._prepared(unit, model)
                ready = time.perf_counter()
                watch = _Watch(self, unit, model)
                self._run(model, prepared, unit.seed, watch)
                if unit.method == BASELINE:
                    self._guides[unit.seed] = _weights(model), watch.seconds
        finally:
            model.unload()  # the base as it was
            vars(self.lm.model).pop("peft_config", None)
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
            "samples": self._samples(start, points[-1]),
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
        budget = self.task.budget(self.task.groups[-1])
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

    def _adapted(self, seed: int) -> Any:
        """The base with a fresh adapter, the same for every method."""
        from peft import LoraConfig, get_peft_model

        rank = self.task.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(self.lm.model, config)

    # what methods are given

    def guide(self, seed: int, model: Any, name: str = "guide") -> float:
        """DPO's adapter of the same seed, as another adapter of the model; gives the seconds that its training took before."""
        from peft import set_peft_model_state_dict

        if seed not in self._guides:  # its run is on the disk, its adapter is not
            seconds = self.trained(seed, model, name, DPO(self.task.beta), self.pairs_with_reference)
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

    # what is measured

    def _start(self, unit: Unit) -> Row:
        """The reference, before anything is trained; the same for all methods of a seed."""
        if unit.seed not in self._started:
            self.say(unit, 0.0, "measuring the reference")
            if not self._held_out_reference:
                self._score_reference()
            self._started[unit.seed] = self.measure(self.lm.model, unit.seed, step=0)
        return self._started[unit.seed]

    def _score_reference(self) -> None:
        """The reference's log-probabilities of all responses, made once: methods that need no more of it do not run it."""
        for block in BLOCKS:
            self._held_out_reference[block] = self._log_probs(self.lm.model, self.held_out, block)
        began = time.perf_counter()
        for block in BLOCKS:
            values = self._log_probs(self.lm.model, self.pairs, block)
            for row, of_row in zip(self.pairs_with_reference, values, strict=True):
                row[f"{block}_{LOGP_REF}"] = of_row.tolist()
        self.reference_seconds = time.perf_counter() - began

    def measure(self, model: Any, seed: int, step: int) -> Row:
        """Samples to the held-out prompts, and what they and the held-out pairs say of the policy."""
        generator = torch.Generator().manual_seed(seed)  # the same random numbers at every checkpoint of every method
        policy = LM(model, self.lm.tokenizer, self.lm.name)
        drawn = sample_responses(
            policy,
            [e["prompt_ids"] for e in self.prompts],
            max_new_tokens=self.task.new_tokens,
            generator=generator,
            batch_size=SAMPLED,
        )
        texts, ids = self._ends([r.ids for r in drawn])
        examples = [{**e, "response_ids": y} for e, y in zip(self.prompts, ids, strict=True)]
        kl, entropy = self._laws(model, examples, reference=step > 0)
        rewards = sentiment.rewards(texts) if self.task.groups[-1] == SENTIMENT else None
        right = self._right(model) if step > 0 else [0.5] * len(self.held_out)
        return {
            "step": step,
            "reward": None if rewards is None else _mean(rewards),
            "kl": _mean(kl),
            "entropy": _mean(entropy),
            "length": _mean([len(y) for y in ids]),
            "accuracy": _mean(right),
            "by_prompt": {"kl": kl, "score": right if rewards is None else rewards},
            "texts": texts,
            "rewards": rewards,
        }

    def _ends(self, drawn: list[list[int]]) -> tuple[list[str], list[list[int]]]:
        """Responses as text and tokens; on sentiment up to the end of their first sentence."""
        decode: Callable[[list[int]], str] = self.lm.decode
        texts = [decode(ids) for ids in drawn]
        if self.task.groups[-1] != SENTIMENT:
            return texts, drawn
        cut, kept = [], []
        for text, ids in zip(texts, drawn, strict=True):
            first = sentiment.sentence(text)
            if first is None:
                cut.append(text)
                kept.append(ids)
                continue
            n = next(n for n in range(1, len(ids) + 1) if len(decode(ids[:n])) >= len(first))
            cut.append(first)
            kept.append(ids[:n])
        return cut, kept

    @torch.no_grad()
    def _laws(self, model: Any, examples: Sequence[Example], reference: bool) -> tuple[list[float], list[float]]:
        """KL(policy || reference) and the policy's entropy along each response: sums of what they are at each token."""
        kl, entropy = [], []
        for start in range(0, len(examples), SAMPLED):
            batch = self.move(collate(examples[start : start + SAMPLED], ("response",)))
            policy = ModelScorer(model)(batch)
            (surprise,) = over_tiles(tile_entropy, [policy])
            gap = torch.zeros_like(surprise)
            if reference:
                (gap,) = over_tiles(divergence, [policy, ModelScorer(model, BASE)(batch)])
            kl += batch.spread(gap).sum(-1).tolist()
            entropy += batch.spread(surprise).sum(-1).tolist()
        return kl, entropy

    def _right(self, model: Any) -> list[float]:
        """For each held-out pair 1 where the chosen response has the larger log-ratio to the reference, 1/2 for a tie."""
        margins = torch.zeros(len(self.held_out), dtype=torch.float64)
        for block, sign in (("chosen", 1), ("rejected", -1)):
            now = self._log_probs(model, self.held_out, block)
            gaps = [float((a - b).sum()) for a, b in zip(now, self._held_out_reference[block], strict=True)]
            margins += sign * torch.tensor(gaps, dtype=torch.float64)
        return (0.5 + 0.5 * margins.sign()).tolist()

    def _log_probs(self, model: Any, examples: Sequence[Example], block: str) -> list[torch.Tensor]:
        return token_log_probs(ModelScorer(model), examples, block, move=self.move)

    def _samples(self, start: Row, end: Row) -> list[Row]:
        rewards = zip(start["rewards"], end["rewards"], strict=True) if start["rewards"] else iter(())
        return [
            {"prompt": e["prompt"], "before": a, "after": b, "reward": list(next(rewards, ()))}
            for e, a, b in list(zip(self.prompts, start["texts"], end["texts"], strict=True))[:SHOWN]
        ]

    def move(self, batch: PairBatch) -> PairBatch:
        return batch.to(self.lm.device)

    def _tokens(self, prepared: Prepared) -> float:
        """Tokens of prompts and responses that a training sees."""
        budget, rows = self.task.budget(self.task.groups[-1]), prepared.examples
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
        self.steps = runner.task.budget(unit.group).steps
        n = runner.task.checkpoints
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
            self.points.append(self.runner.measure(self.model, self.unit.seed, step))
        self._tell(step, f"step {step} of {self.steps}")

    def _tell(self, step: int, what: str) -> None:
        train, whole = self.runner.task.parts(self.unit.group)
        share = train * step / self.steps + (whole - train) * len(self.points) / len(self.checkpoints)
        self.runner.say(self.unit, share / whole, what)


def _weights(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return {k: x.detach().clone() for k, x in get_peft_model_state_dict(model, adapter_name=name).items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sft(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    examples = [{"prompt_ids": e["prompt_ids"], "response_ids": e["chosen_ids"]} for e in runner.pairs]
    return Prepared(runner.make("sft"), examples, note="imitates the chosen responses")


def _tgdpo(runner: AlignRunner, seed: int, model: Any) -> Prepared:
    from locum.align.tgdpo import GuideReward

    seconds = runner.guide(seed, model)
    guide, ref = ModelScorer(model, "guide"), ModelScorer(model, BASE)
    signal = GuideReward(guide, ref, runner.task.beta, move=runner.move)
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

    beta = runner.task.beta
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
