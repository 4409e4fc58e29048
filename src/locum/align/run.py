"""From a model and a file of preference pairs to a trained model in a folder, in one call.

>>> from locum.align import TDPO2, LoRA, align
>>> align(TDPO2(), "smollm2-135m-instruct", "pairs.jsonl", "aligned", lora=LoRA())  # doctest: +SKIP

The data is read and checked before a model is loaded. A run that was stopped goes on with ``resume=True``: from the last
checkpoint (or round), with what was made before it.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback

from locum.align.base import Method
from locum.align.beside import train_beside
from locum.align.data import encode, read_pairs
from locum.align.driver import TextLabeller, run_rounds
from locum.align.recipes import annotated, ingredients
from locum.align.rounds import Online
from locum.align.rows import PAIR, Rows
from locum.align.statistics import BASE, ModelScorer, Scorer
from locum.align.trainer import METHOD_FILE, SIGNAL, Trainer, align_arguments, last_checkpoint
from locum.errors import UserError
from locum.method import to_dict, to_yaml
from locum.models import LM, load
from locum.models.training import LoRA

__all__ = ["Aligned", "LoRA", "align"]

log = logging.getLogger(__name__)
ASKED, RESULT = "run.json", "result.json"


@dataclass(frozen=True)
class Aligned:
    """What a run came to.

    Args:
        folder: the trained model, as `from_pretrained` reads it.
        figures: what was logged last, e.g. "loss" and "rewards/accuracies"; with "eval_" before it, on the held-out data.
        steps: optimizer steps.
        seconds: of this call.
        counts: how many examples were trained on, and how many were left out.
    """

    folder: Path
    figures: dict[str, float]
    steps: int
    seconds: float
    counts: dict[str, int]


def align(
    method: Method,
    model: str | LM,
    data: Any,
    out: str | Path,
    *,
    eval_data: Any = None,
    models: Mapping[str, str] | None = None,
    lora: LoRA | None = None,
    merge: bool = False,
    labeller: TextLabeller | None = None,
    rounds: int = 3,
    max_new_tokens: int = 128,
    max_length: int = 1024,
    overlong: str = "error",
    precompute_reference: bool = False,
    resume: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    **settings: Any,
) -> Aligned:
    """Train a model with a method on preference pairs.

    Args:
        method: any of the family.
        model: a name that `locum.models.load` knows, or an `LM`.
        data: what `locum.align.data.read_pairs` reads: JSONL, Parquet, a datasets folder or object, a list of rows.
        out: the folder of the result; checkpoints and what is made on the way lie in it too.
        eval_data: held-out pairs, as `data`.
        models: frozen models by name ("ref", "guide", "dpo", ...), each a name that `load` knows. Those that the method
            stands on and that are not here are trained from the same pairs first.
        lora: train adapters instead of all weights.
        merge: with LoRA: write whole weights with the adapters in them, instead of the adapters.
        labeller, rounds, max_new_tokens: of methods that sample in rounds.
        max_length: tokens of prompt and response; overlong: what happens to longer ones, "error", "truncate" or "drop".
        precompute_reference: score the reference once, before training; for methods that need no more of it.
        resume: go on with a run in the folder.
        dtype, device: of all models; a full training has float32 weights unless told otherwise (on CUDA with bfloat16 autocast).
        settings: transformers' training arguments: learning_rate, num_train_epochs, per_device_train_batch_size, seed, ...

    Raises: UserError for bad rows, models or settings, before any work is done; for a loss that is not finite in training.
    """
    began, out = time.perf_counter(), Path(out)
    _refuse(method, set(models or {}), labeller)
    blocks = PAIR if ingredients(method) else tuple(b for b in method.blocks if b in PAIR)
    rows = read_pairs(data, blocks=blocks)
    held_out = read_pairs(eval_data, blocks=blocks) if eval_data is not None else None
    if lora is None and dtype is None:  # steps of a full training are too small for bfloat16 weights
        dtype, settings = "float32", {"bf16": device != "cpu" and torch.cuda.is_available()} | settings
    args = align_arguments(out, **({"learning_rate": 1e-4} if lora else {}) | settings)
    if args.process_index == 0:
        asked = {"method": to_dict(method), "model": getattr(model, "name", model), "lora": lora and asdict(lora)}
        _begin(out, resume, asked)

    lm = load(model, dtype=dtype, device=device) if isinstance(model, str) else model
    columns = tuple(c for c in method.columns if all(f"{b}_{c}" in rows[0] for b in method.blocks))

    def encoded(some: Rows) -> list[dict[str, Any]]:
        return encode(some, lm.tokenizer, max_length, overlong=overlong, blocks=blocks, columns=columns)

    examples, evaluated = encoded(rows), encoded(held_out) if held_out is not None else None
    counts = {"examples": len(examples), "left_out": len(rows) - len(examples)}
    lm = LM(lora.on(lm.model, args.seed) if lora else lm.model, lm.tokenizer, lm.name)
    given: dict[str, Any] = {name: load(x, dtype=dtype, device=device).model for name, x in (models or {}).items()}
    for name, how in ingredients(method).items():
        if name not in given and (name in method.frozen or not columns):
            log.info("%s is trained from the pairs first", name)
            given[name] = train_beside(
                lm.model, name, how.method, how.rows(examples), args, processing_class=lm.tokenizer
            )
    if isinstance(method, Online):
        beside = {name: given[name] for name in method.frozen if name in given}
        asks: dict[str, Any] = {"rounds": rounds, "max_new_tokens": max_new_tokens, "processing_class": lm.tokenizer}
        results = run_rounds(method, lm.model, examples, labeller, args=args, models=beside, **asks)
        trainer, history = None, [row for result in results for row in result.history]
        steps = sum(max((row.get("step", 0) for row in result.history), default=0) for result in results)
    else:
        trainer = _on_pairs(method, lm, examples, evaluated, given, args, precompute_reference, resume)
        history, steps = trainer.state.log_history, trainer.state.global_step
    done = Aligned(out, _last(history), steps, time.perf_counter() - began, counts)
    _save(lm, args, trainer, merge and lora is not None)
    if args.should_save:
        (out / METHOD_FILE).write_text(to_yaml(method), "utf-8")
        _write(out / RESULT, {k: v for k, v in asdict(done).items() if k != "folder"})
    return done


def _refuse(method: Method, models: set[str], labeller: TextLabeller | None) -> None:
    """Say what cannot go together before anything is read."""
    name = type(method).__name__
    if isinstance(method, Online) and method.needs_labeller and labeller is None:
        raise UserError(f"{name} scores responses in rounds: give a labeller")
    known = {"ref", *method.frozen, *ingredients(method)}
    if unknown := models - known:
        raise UserError(f"{name} has no use for the model {min(unknown)!r}; it takes {', '.join(sorted(known))}")


def _on_pairs(
    method: Method,
    lm: LM,
    examples: list[dict[str, Any]],
    evaluated: list[dict[str, Any]] | None,
    given: Mapping[str, Any],
    args: Any,
    precompute_reference: bool,
    resume: bool,
) -> Trainer:
    """Train on given pairs, with the columns that the method needs; what it was measured on the held-out ones is logged."""
    out, pad = Path(args.output_dir), lm.tokenizer.pad_token_id or 0
    scorers = {name: _scorer(lm.model, model) for name, model in given.items()}
    scorers.setdefault("ref", _scorer(lm.model, BASE) if hasattr(lm.model, "peft_config") else ModelScorer(lm.model))
    with args.main_process_first(local=False, desc="columns"):  # the others read what the first has kept
        examples = annotated(method, examples, lm, scorers, out / "columns", pad)
        if evaluated is not None:
            evaluated = annotated(method, evaluated, lm, scorers, out / "columns-eval", pad)
    trainer = Trainer(
        lm.model,
        method,
        args,
        examples,
        evaluated,
        models={name: given[name] for name in method.frozen if name in given},
        processing_class=lm.tokenizer,
        precompute_reference=precompute_reference,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress)
    trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
    if evaluated is not None:
        trainer.evaluate()
    return trainer


def _begin(out: Path, resume: bool, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds another run, or this one where nobody asked to go on."""
    path, asked = out / ASKED, json.loads(json.dumps(asked))
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        if not resume:
            raise UserError(f"{str(out)!r} holds a run already: go on with --resume, or choose another folder")
        if different := [k for k in asked if before.get(k) != asked[k]]:
            raise UserError(
                f"{str(out)!r} holds a run with another {different[0]}: {before.get(different[0])!r}, "
                f"not {asked[different[0]]!r}"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is not empty and holds no run: choose another folder")
    _write(path, asked)


def _scorer(policy: Any, model: Any) -> Scorer:
    return ModelScorer(policy, model) if isinstance(model, str) else ModelScorer(model)


def _save(lm: LM, args: Any, trainer: Trainer | None, merge: bool) -> None:
    """The policy alone: adapters of models beside it, and what the method learned beside it, are no part of it."""
    policy = lm.model
    for name in list(getattr(policy, "peft_config", {})):
        if name != policy.active_adapter:
            policy.delete_adapter(name)
    if trainer is not None and not merge:  # every process has its part of sharded weights
        trainer.save_model(args.output_dir)
    elif args.should_save:
        policy = policy.merge_and_unload() if merge else policy
        weights = {k: x for k, x in policy.state_dict().items() if not k.startswith(f"{SIGNAL}.")}
        policy.save_pretrained(args.output_dir, state_dict=weights)
        lm.tokenizer.save_pretrained(args.output_dir)


class _Progress(ProgressCallback):
    """transformers' progress bar, with one short line of figures instead of a dict."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = _told(logs or {})
        if self.training_bar is not None and shown:
            line = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {line}")


def _told(row: Mapping[str, Any]) -> dict[str, float]:
    """What people want to know of what was logged: the loss and the method's figures, not clocks and counters."""
    own = ("loss", "eval_loss", "train_loss")
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and (k in own or "/" in k)}


def _last(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each figure that was logged."""
    found: dict[str, float] = {}
    for row in history:
        found |= _told(row)
    return found


def _write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
