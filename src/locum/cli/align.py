"""``locum align``: the flags are the general ones below and the fields of the chosen method."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from locum.cli.command import Command, calm, console, emit, quiet_stdout, table
from locum.cli.flags import chosen_method, method_name, read_method
from locum.errors import UserError
from locum.method import names, require

__all__ = ["Align"]

DEFAULT, MODEL = "tdpo2", "smollm2-135m-instruct"


@dataclass(frozen=True)
class Options:
    """What every method takes.

    Args:
        data: preference pairs: .jsonl or .parquet with prompt, chosen and rejected (texts, or lists of messages), or a folder
            that `datasets` saved.
        out: the folder of the trained model; `from_pretrained` reads it.
        method: how to train; its own parameters are flags too (locum align --method NAME --help). A .yaml file that holds a
            method will do as well.
        model: a shipped name, a path, or a hub name.
        models: models beside the policy, each as name=model: ref, guide, dpo, ... What the method stands on and is not given is
            trained from the same pairs first.
        eval_data: held-out pairs, measured at the end.
        lora: train low-rank adapters instead of all weights.
        lora_rank: their rank.
        lora_alpha: scale of what they add, over the rank.
        merge: with --lora: write whole weights instead of the adapters.
        learning_rate: 1e-6 when left out, 1e-4 with --lora.
        epochs: times that the pairs are gone through.
        max_steps: optimizer steps instead.
        batch_size: pairs at a time, on each device.
        accumulate: batches that make a step together.
        max_length: tokens of prompt and response together.
        overlong: what happens to a longer pair: error, truncate (its responses), or drop.
        precompute_reference: score the reference once before training; for methods that need no more of it.
        gradient_checkpointing: less memory for more time.
        reward: who scores responses, for methods that sample: vader, or a reward model's path or hub name.
        rounds: how often methods that sample do so.
        max_new_tokens: of a sampled response.
        seed: fixes every random choice.
        save_steps: steps between checkpoints.
        logging_steps: steps between figures.
        report_to: a tracker that transformers knows, e.g. tensorboard or wandb.
        resume: go on with a run that was stopped.
        dtype: the models' type, e.g. float32 or bfloat16; when left out float32, with --lora the device's usual one.
        device: e.g. cpu or cuda; the best there is when left out.
        json: print one JSON document.
    """

    data: Path
    out: Path
    method: str = DEFAULT
    model: str = MODEL
    models: tuple[str, ...] = ()
    eval_data: Path | None = None
    lora: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    merge: bool = False
    learning_rate: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 1024
    overlong: Literal["error", "truncate", "drop"] = "error"
    precompute_reference: bool = False
    gradient_checkpointing: bool = False
    reward: str | None = None
    rounds: int = 3
    max_new_tokens: int = 128
    seed: int = 0
    save_steps: int = 100
    logging_steps: int = 10
    report_to: str = "none"
    resume: bool = False
    dtype: str | None = None
    device: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in (
            "lora_rank",
            "batch_size",
            "accumulate",
            "rounds",
            "max_new_tokens",
            "save_steps",
            "logging_steps",
        ):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        require(self, "max_length", self.max_length > 1, "> 1")
        require(self, "max_steps", self.max_steps is None or self.max_steps >= 1, ">= 1")
        require(self, "seed", self.seed >= 0, ">= 0")
        for name in ("learning_rate", "epochs", "lora_alpha"):
            value = getattr(self, name)
            require(self, name, value is None or 0 < value < float("inf"), "finite and > 0")
        if self.merge and not self.lora:
            raise UserError("--merge puts adapters into the weights: it needs --lora")

    @property
    def beside(self) -> dict[str, str]:
        """name -> model."""
        pairs = [given.partition("=") for given in self.models]
        if bad := [given for given, (name, _, model) in zip(self.models, pairs, strict=True) if not name or not model]:
            raise UserError(f"--models takes name=model, got {bad[0]!r}")
        return {name: model for name, _, model in pairs}

    def training(self) -> dict[str, Any]:
        """As transformers' training arguments."""
        settings: dict[str, Any] = {
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_checkpointing": self.gradient_checkpointing,
            "seed": self.seed,
            "save_steps": self.save_steps,
            "logging_steps": self.logging_steps,
            "report_to": self.report_to,
        }
        given = {"learning_rate": self.learning_rate, "max_steps": self.max_steps}
        settings |= {k: v for k, v in given.items() if v is not None}
        if self.device == "cpu":
            settings["use_cpu"] = True
        return settings


@dataclass(frozen=True)
class Align(Command):
    """Train a model on preference pairs with one method.

    Args:
        options: what every method takes.
        method: the method itself.
    """

    name: ClassVar[str] = "align"
    options: Options
    method: Any

    @classmethod
    def read(cls, args: Sequence[str]) -> "Align":
        known = names("align", "Method")
        chosen = chosen_method(args) or DEFAULT
        return cls(*read_method(Options, cls.name, args, chosen, list(known), "Train a model on preference pairs"))

    def run(self) -> int:
        o = self.options
        with quiet_stdout(o.json):
            from locum.align.labels import labeller
            from locum.align.run import LoRA, align

            calm("locum.align")
            done = align(
                self.method,
                o.model,
                str(o.data),
                o.out,
                eval_data=None if o.eval_data is None else str(o.eval_data),
                models=o.beside,
                lora=LoRA(o.lora_rank, o.lora_alpha) if o.lora else None,
                merge=o.merge,
                labeller=labeller(o.reward, o.device or "cpu") if o.reward else None,
                rounds=o.rounds,
                max_new_tokens=o.max_new_tokens,
                max_length=o.max_length,
                overlong=o.overlong,
                precompute_reference=o.precompute_reference,
                resume=o.resume,
                dtype=o.dtype,
                device=o.device,
                **o.training(),
            )
        if os.environ.get("RANK", "0") != "0":  # of several processes, one tells
            return 0
        if o.json:
            head = {"method": method_name(self.method), "model": o.model, "out": str(done.folder)}
            emit(head | {"steps": done.steps, "seconds": done.seconds, "counts": done.counts, "figures": done.figures})
            return 0
        grid = table("figure", "value")
        for name, value in done.figures.items():
            grid.add_row(name, f"{value:.4g}")
        out = console()
        out.print(grid)
        out.print(f"{done.steps} steps on {done.counts['examples']} examples in {done.seconds:.0f} s: {done.folder}")
        return 0
