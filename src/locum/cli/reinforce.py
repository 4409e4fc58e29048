"""``locum reinforce``: train on problems with checkable answers, by a recipe."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from locum.cli.command import Command, calm, console, emit, quiet_stdout, read, table
from locum.cli.flags import text_file
from locum.errors import UserError
from locum.method import from_yaml, require

__all__ = ["Reinforce"]

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Reinforce(Command):
    """Train a model on problems with checkable answers.

    Args:
        data: problems: .jsonl or .parquet with prompt (a text, or a list of messages) and what the reward reads, or a folder
            that `datasets` saved; gym:NAME makes problems of a reasoning-gym dataset.
        out: the folder of the trained model; `from_pretrained` reads it.
        recipe: a baseline or a paper, then pieces: "dapo + hapo.clip + d3s(tokens=(0.2, 1.0))". A .yaml file will do as well.
        reward: math, exact, format, choice, reasoning-gym:NAME, or your own function as module:function or file.py:function.
        model: a shipped name, a path, or a hub name.
        reference: for recipes with kl; the model as it is before training when left out.
        eval_data: held-out problems; with gym:NAME a part of them is held out by itself.
        problems: how many gym:NAME makes.
        lora: train low-rank adapters instead of all weights.
        lora_rank: their rank.
        lora_alpha: scale of what they add, over the rank.
        merge: with --lora: write whole weights instead of the adapters.
        steps: batches of rollouts.
        prompts: problems of a batch.
        group_size: completions of each problem; the recipe's own when left out.
        max_new_tokens: most tokens of a completion.
        max_prompt_length: problems with more tokens are left out.
        temperature: of sampling, and of the scores that are trained.
        top_p: sample from the smallest set of tokens with this mass.
        top_k: sample from so many most likely tokens.
        learning_rate: 1e-6 when left out, 1e-5 with --lora.
        schedule: of the learning rate.
        warmup: steps over which it grows.
        weight_decay: of AdamW.
        epochs: times that a batch is gone through.
        minibatches: optimizer steps of an epoch.
        rows_per_forward: completions of one training forward; what does not fit is accumulated.
        max_grad_norm: gradients are clipped to it.
        precision: what forwards run in.
        limit_s: seconds that the reward may take for a batch.
        on_error: what happens when the reward fails on a row: stop, or skip the row.
        vllm: sample with vLLM.
        seed: fixes every random choice.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations.
        eval_rows: held-out problems of an evaluation.
        report_to: a tracker that accelerate knows, e.g. tensorboard or wandb.
        resume: go on with a run that was stopped.
        dtype: the model's type, e.g. float32 or bfloat16; when left out float32, with --lora the device's usual one.
        device: e.g. cpu or cuda; the best there is when left out.
        json: print one JSON document.
    """

    name: ClassVar[str] = "reinforce"
    data: str
    out: Path
    recipe: str = "grpo"
    reward: str = "exact"
    model: str = MODEL
    reference: str | None = None
    eval_data: str | None = None
    problems: int = 1000
    lora: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    merge: bool = False
    steps: int = 100
    prompts: int = 16
    group_size: int | None = None
    max_new_tokens: int = 256
    max_prompt_length: int = 1024
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    learning_rate: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    rows_per_forward: int = 16
    max_grad_norm: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    limit_s: float = 60.0
    on_error: Literal["stop", "skip"] = "stop"
    vllm: bool = False
    seed: int = 0
    save_every: int = 50
    eval_every: int = 0
    eval_rows: int = 200
    report_to: str = "none"
    resume: bool = False
    dtype: str | None = None
    device: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("problems", "lora_rank", "max_prompt_length"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "lora_alpha", 0 < self.lora_alpha < float("inf"), "finite and > 0")
        require(self, "limit_s", 0 < self.limit_s < float("inf"), "finite and > 0")
        require(self, "temperature", 0 < self.temperature < float("inf"), "finite and > 0")
        require(self, "group_size", self.group_size is None or self.group_size >= 1, ">= 1")
        if self.merge and not self.lora:
            raise UserError("--merge puts adapters into the weights: it needs --lora")

    @classmethod
    def read(cls, args: Sequence[str]) -> "Reinforce":
        return read(cls, cls.name, args)

    def run(self) -> int:
        with quiet_stdout(self.json):
            recipe, settings = self._recipe(), self._arguments()
            from locum.models.training import LoRA
            from locum.reinforce.run import reinforce

            calm("locum.reinforce")
            train, held_out = self._data()
            done = reinforce(
                recipe,
                self.model,
                train,
                self.out,
                reward=self.reward,
                args=settings,
                eval_data=held_out,
                reference=self.reference,
                lora=LoRA(self.lora_rank, self.lora_alpha) if self.lora else None,
                merge=self.merge,
                limit_s=self.limit_s,
                on_error=self.on_error,
                max_prompt_length=self.max_prompt_length,
                engine=_vllm if self.vllm else None,
                resume=self.resume,
                dtype=self.dtype,
                device=self.device,
            )
        if os.environ.get("RANK", "0") != "0":  # of several processes, one tells
            return 0
        if self.json:
            head = {"recipe": str(recipe), "model": self.model, "out": str(done.folder), "steps": done.steps}
            emit(head | {"seconds": done.seconds, "counts": done.counts, "figures": done.figures})
            return 0
        grid = table("figure", "value")
        for name, value in sorted(done.figures.items()):
            grid.add_row(name, f"{value:.4g}")
        out = console()
        out.print(grid)
        out.print(f"{done.steps} steps on {done.counts['problems']} problems in {done.seconds:.0f} s: {done.folder}")
        return 0

    def _recipe(self) -> Any:
        from locum.reinforce import Autoregressive, Flat, Recipe

        if self.recipe.endswith((".yaml", ".yml")):
            recipe = from_yaml(text_file(Path(self.recipe), "recipe file"))
            if not isinstance(recipe, Recipe):
                raise UserError(f"recipe file {self.recipe} holds no recipe but a {type(recipe).__name__}")
        else:
            recipe = Recipe.read(self.recipe)
        if self.group_size is not None:
            recipe = recipe | Flat(self.group_size)
        if self.temperature != 1 and recipe.likelihood == Autoregressive():
            recipe = recipe | Autoregressive(self.temperature)
        return recipe

    def _arguments(self) -> Any:
        from locum.reinforce.learner import Settings
        from locum.reinforce.trainer import Arguments
        from locum.tokens.sampling import Sampling

        rate = (1e-5 if self.lora else 1e-6) if self.learning_rate is None else self.learning_rate
        rows = self.rows_per_forward
        return Arguments(
            steps=self.steps,
            prompts=self.prompts,
            max_new_tokens=self.max_new_tokens,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup=self.warmup,
            settings=Settings(self.epochs, self.minibatches, rows, 2 * rows, self.max_grad_norm),
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            seed=self.seed,
            save_every=self.save_every,
            eval_every=self.eval_every,
            eval_rows=self.eval_rows,
            precision=self.precision,
            report_to=self.report_to,
        )

    def _data(self) -> tuple[Any, Any]:
        if not self.data.startswith("gym:"):
            return self.data, self.eval_data
        from locum.reinforce.problems import held_out, reasoning_gym_problems

        rows = reasoning_gym_problems(self.data.removeprefix("gym:"), self.problems, self.seed)
        if self.eval_data is not None:
            return rows, self.eval_data
        return held_out(rows, 0.1, self.seed)


def _vllm(lm: Any) -> Any:
    from locum.reinforce.policy import VLLM

    return VLLM(lm)
