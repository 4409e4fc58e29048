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
from transformers.trainer_utils import get_last_checkpoint

from locum.align.base import Method
from locum.align.beside import train_beside
from locum.align.data import encode, read_pairs
from locum.align.driver import TextLabeller, run_rounds
from locum.align.recipes import annotated, ingredients
from locum.align.rounds import Online
from locum.align.rows import PAIR
from locum.align.statistics import BASE, ModelScorer, Scorer
from locum.align.trainer import Trainer, align_arguments
from locum.errors import MissingExtra, UserError
from locum.method import require, to_dict
from locum.models import LM, load

__all__ = ["Aligned", "LoRA", "align"]

log = logging.getLogger(__name__)
ASKED, RESULT = "run.json", "result.json"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on all linear layers but the head.

    Args:
        rank: >= 1.
        alpha: scale of what they add, over the rank; > 0.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        require(self, "rank", self.rank >= 1, ">= 1")
        require(self, "alpha", self.alpha > 0, "> 0")

    def on(self, model: Any, seed: int = 0) -> Any:
        """A PEFT model with fresh adapters; the same for the same seed."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise MissingExtra("LoRA", "align") from None
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)


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
    online = isinstance(method, Online)
    if isinstance(method, Online) and method.needs_labeller and labeller is None:
        raise UserError(f"{type(method).__name__} scores responses in rounds: give a labeller")
    known = {"ref", *method.frozen, *ingredients(method)}
    if unknown := set(models or {}) - known:
        raise UserError(
            f"{type(method).__name__} has no use for the model {min(unknown)!r}; it takes {', '.join(sorted(known))}"
        )
    reads = tuple(b for b in method.blocks if b in PAIR) or (PAIR if ingredients(method) else ())
    rows = read_pairs(data, blocks=PAIR if ingredients(method) else reads)
    held_out = read_pairs(eval_data, blocks=rows.blocks) if eval_data is not None else None
    if lora is None and dtype is None:  # steps of a full training are too small for bfloat16 weights
        dtype, settings = "float32", {"bf16": device != "cpu" and torch.cuda.is_available()} | settings
    args = align_arguments(out, **({"learning_rate": 1e-4} if lora else {}) | settings)
    _begin(
        out, resume, {"method": to_dict(method), "model": getattr(model, "name", model), "lora": lora and asdict(lora)}
    )

    lm = load(model, dtype=dtype, device=device) if isinstance(model, str) else model
    columns = tuple(c for c in method.columns if all(f"{b}_{c}" in rows[0] for b in method.blocks))
    examples, evaluated = (
        encode(x, lm.tokenizer, max_length, overlong=overlong, blocks=rows.blocks, columns=columns)
        if x is not None
        else None
        for x in (rows, held_out)
    )
    assert examples is not None
    counts = {"examples": len(examples), "left_out": len(rows) - len(examples)}
    policy = lora.on(lm.model, args.seed) if lora else lm.model
    lm = LM(policy, lm.tokenizer, lm.name)
    given: dict[str, Any] = {name: load(x, dtype=dtype, device=device).model for name, x in (models or {}).items()}
    for name, how in ingredients(method).items():
        if name not in given and not (columns and name not in method.frozen):
            log.info("%s is trained from the pairs first", name)
            given[name] = train_beside(
                policy, name, how.method, how.rows(examples), args, processing_class=lm.tokenizer
            )
    beside = {name: given[name] for name in method.frozen if name in given}
    common: dict[str, Any] = {"models": beside, "processing_class": lm.tokenizer}
    if online:
        results = run_rounds(
            method, policy, examples, labeller, rounds=rounds, args=args, max_new_tokens=max_new_tokens, **common
        )
        history = [row for result in results for row in result.history]
        steps = sum(max((row.get("step", 0) for row in result.history), default=0) for result in results)
        trainer = None
    else:
        pad = lm.tokenizer.pad_token_id or 0
        scorers = {"ref": _reference(policy, given), **{n: _scorer(policy, m) for n, m in given.items() if n != "ref"}}
        examples = annotated(method, examples, lm, scorers, out / "columns", pad)
        if evaluated is not None:
            evaluated = annotated(method, evaluated, lm, scorers, out / "columns-eval", pad)
        trainer = Trainer(
            policy, method, args, examples, evaluated, precompute_reference=precompute_reference, **common
        )
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Progress)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if resume and out.is_dir() else None)
        if evaluated is not None:
            trainer.evaluate()
        history, steps = trainer.state.log_history, trainer.state.global_step
    _save(policy, lm, out, trainer, merge and lora is not None)
    figures = _last(history)
    done = Aligned(out, figures, steps, time.perf_counter() - began, counts)
    if args.should_save:
        _write(out / RESULT, {"figures": figures, "steps": steps, "seconds": done.seconds, "counts": counts})
    return done


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


def _reference(policy: Any, given: Mapping[str, Any]) -> Scorer:
    if "ref" in given:
        return _scorer(policy, given["ref"])
    return ModelScorer(policy, BASE) if hasattr(policy, "peft_config") else ModelScorer(policy)


def _scorer(policy: Any, model: Any) -> Scorer:
    return ModelScorer(policy, model) if isinstance(model, str) else ModelScorer(model)


def _save(policy: Any, lm: LM, out: Path, trainer: Trainer | None, merge: bool) -> None:
    """The policy alone: adapters of models beside it, and what the method learned beside it, are no part of it."""
    for name in list(getattr(policy, "peft_config", {})):
        if name != policy.active_adapter:
            policy.delete_adapter(name)
    if trainer is not None and not merge:
        trainer.save_model(str(out))
        return
    if trainer is not None and not trainer.args.should_save:
        return
    plain = policy.merge_and_unload() if merge else policy
    weights = {k: x for k, x in plain.state_dict().items() if not k.startswith("locum_signal.")}
    plain.save_pretrained(str(out), state_dict=weights)
    lm.tokenizer.save_pretrained(str(out))


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
