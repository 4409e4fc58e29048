"""Training with any method of the family: a thin `transformers.Trainer`.

What it adds is the loss (statistics of a batch, then the method), the frozen models that the method names, and the
method's own parameters where it has some. Accelerate, FSDP, PEFT, trackers, checkpoints and resuming are transformers'.

    >>> from transformers import TrainingArguments
    >>> from locum.align import TDPO2, Trainer, read_pairs
    >>> trainer = Trainer(model, TDPO2(), TrainingArguments("out"), read_pairs("pairs.jsonl"),
    ...                   processing_class=tokenizer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
"""

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from locum.align.base import Example, Method, PairBatch, TokenStats
from locum.align.statistics import BASE, LOGP_REF, ModelScorer, Scorer, collate, statistics
from locum.errors import UserError
from locum.method import to_yaml
from locum.models.training import without_dropout

__all__ = ["Collator", "Trainer", "align_arguments", "last_checkpoint"]

SIGNAL = "locum_signal"  # the method's own parameters, as a part of the trained model
STATE, CHECKPOINT = "trainer_state.json", "checkpoint-"
SIGNAL_FILE, METHOD_FILE, BAD_BATCH = "signal.safetensors", "method.yaml", "bad_batch.safetensors"


def align_arguments(output_dir: str | Path, **settings: Any) -> transformers.TrainingArguments:
    """Training arguments with this family's defaults: AdamW at 1e-6, cosine, 10 % warm-up, one epoch; all can be given."""
    defaults: dict[str, Any] = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 10,
        "logging_first_step": True,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return transformers.TrainingArguments(str(output_dir), **defaults | settings)


@dataclass(frozen=True)
class Collator:
    """Examples of token ids to the tensors of a batch, for a data loader."""

    blocks: tuple[str, ...]
    columns: tuple[str, ...] = ()
    pad_id: int = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        columns = self.columns
        if f"{self.blocks[0]}_{LOGP_REF}" in examples[0]:
            columns = (*columns, LOGP_REF)
        batch = collate(examples, self.blocks, columns, self.pad_id)
        out = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "completion_mask": batch.completion_mask}
        return out | {f"column_{name}": x for name, x in batch.columns.items()}


class Trainer(transformers.Trainer):
    """Trains a causal language model with a method of the family.

    Args:
        model: the policy: a model, a PEFT model (its base is then the reference), or an `LM`.
        method: a method of `locum.align`.
        args: transformers' training arguments (`align_arguments` has this family's defaults).
        train_dataset, eval_dataset: examples of token ids (`locum.align.data.encode`), or rows with prompt, chosen, rejected.
        models: frozen models by the names in `method.frozen`; a string names an adapter of the policy. "ref" is by default
            the policy as it is now: its base for a PEFT model, a copy otherwise.
        processing_class: the tokenizer; needed for rows of text, and saved with the model.
        max_length: tokens of prompt and response, for rows of text.
        precompute_reference: score the reference once before training and keep its log-probabilities on the disk; only for
            methods that need no more of it.
        disable_dropout: policy and reference differ at the first step otherwise.
        kwargs: as transformers.Trainer's.

    Raises: UserError for a model or a column that the method needs and that is not there, before training starts; and in
        training when the loss is not finite, with the batch saved in the output folder.
    """

    train_dataset: Any

    def __init__(
        self,
        model: Any,
        method: Method,
        args: transformers.TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        models: Mapping[str, nn.Module | str] | None = None,
        processing_class: Any = None,
        max_length: int = 1024,
        precompute_reference: bool = False,
        disable_dropout: bool = True,
        **kwargs: Any,
    ) -> None:
        args = args or align_arguments("align-output")
        processing_class = processing_class if processing_class is not None else getattr(model, "tokenizer", None)
        model = getattr(model, "model", model) if type(model).__name__ == "LM" else model
        args.remove_unused_columns = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = (
                False  # the loss is made outside the model's forward: all its parameters are used
            )
        self.method = method
        self.max_length = max_length
        if disable_dropout:
            without_dropout(model)
        config = model.config.get_text_config()
        self.signal = method.signal(config.num_hidden_layers, config.hidden_size)
        frozen = _frozen(model, method, dict(models or {}))
        if self.signal is not None:
            model.add_module(SIGNAL, self.signal.to(model.device))
        pad = _pad_id(processing_class, model)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(method.blocks, method.columns, pad),
            train_dataset=self._examples(train_dataset, processing_class),
            eval_dataset=self._examples(eval_dataset, processing_class),
            processing_class=processing_class,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.frozen: dict[str, Scorer] = {name: self._scorer(given) for name, given in frozen.items()}
        self._logged: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        if precompute_reference:
            self._precompute()

    @property
    def scorers(self) -> dict[str, Scorer]:
        """The policy and the frozen models, by name."""
        return {"policy": ModelScorer(self.model), **self.frozen}

    def batch(self, inputs: Mapping[str, Tensor]) -> PairBatch:
        """The collator's tensors as a batch of the family."""
        columns = {k.removeprefix("column_"): x for k, x in inputs.items() if k.startswith("column_")}
        return PairBatch(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], len(self.method.blocks), columns
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = self.batch(inputs)
        s = statistics(self.method, batch, ModelScorer(model), self.frozen, self.signal)
        try:
            loss, logs = self.method(s)
        except UserError as error:
            raise UserError(self._keep(inputs, s, str(error))) from None
        if not bool(torch.isfinite(loss)):
            raise UserError(self._keep(inputs, s, f"the loss is {loss.item()}"))
        logged = self._logged["train" if model.training else "eval"]
        for name, value in logs.items():
            logged[name].append(value.float())
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        kind = "eval" if any(k.startswith("eval_") for k in logs) else "train"
        found, self._logged[kind] = self._logged[kind], defaultdict(list)
        if found:
            means = torch.stack([torch.stack(values).mean() for values in found.values()])
            means = self.accelerator.reduce(means.to(self.accelerator.device), reduction="mean")
            prefix = "eval_" if kind == "eval" else ""
            logs |= {f"{prefix}{name}": value for name, value in zip(found, means.tolist(), strict=True)}
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.signal is not None:
            own = [p for p in self.signal.parameters() if p.requires_grad]
            for p in own:  # hidden from the policy's groups, then added as groups of their own
                p.requires_grad_(False)
            super().create_optimizer(model)
            for p in own:
                p.requires_grad_(True)
            optimizer: Any = self.optimizer
            for group in self.signal.groups(self.args.learning_rate) if own else ():
                optimizer.add_param_group(group)
            return optimizer
        return super().create_optimizer(model)

    def _examples(self, dataset: Any, tokenizer: Any) -> Any:
        """Rows of text as examples of token ids; examples as they are."""
        if dataset is None or len(dataset) == 0 or "prompt_ids" in dataset[0]:
            return dataset
        if tokenizer is None:
            raise UserError("rows of text need a tokenizer: give processing_class, or examples with token ids")
        from locum.align.data import encode, read_pairs

        blocks, columns = self.method.blocks, self.method.columns
        return encode(read_pairs(dataset, blocks=blocks), tokenizer, self.max_length, blocks=blocks, columns=columns)

    def _scorer(self, given: nn.Module | str) -> Scorer:
        if isinstance(given, str):
            return ModelScorer(self.model, given)
        return ModelScorer(self.accelerator.prepare_model(given.to(self.args.device), evaluation_mode=True))

    def _precompute(self) -> None:
        """The reference's log-probabilities as a column of the data; a run that was stopped goes on where it was."""
        if self.method.needs or self.signal is not None or self.method.frozen != ("ref",):
            raise UserError(
                f"{type(self.method).__name__} needs more of the reference than log-probabilities of the tokens that came: "
                "leave precompute_reference out"
            )
        from locum.align.cache import with_reference

        with self.accelerator.main_process_first():
            for name in ("train", "eval"):
                if (data := getattr(self, f"{name}_dataset")) is not None:
                    where = Path(self.args.output_dir) / f"reference-{name}"
                    blocks, pad = self.method.blocks, self.data_collator.pad_id
                    known = with_reference(self.frozen["ref"], data, blocks, where, pad, self._move)
                    setattr(self, f"{name}_dataset", known)
        self.frozen.pop("ref")

    def _move(self, batch: PairBatch) -> PairBatch:
        return batch.to(self.args.device)

    def _keep(self, inputs: Mapping[str, Tensor], s: TokenStats, what: str) -> str:
        """Save a batch that has no loss; the sentence that says so."""
        path = Path(self.args.output_dir) / BAD_BATCH
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = {"stat_d": s.d, "stat_k": s.k, "stat_logp": s.logp} | {f"stat_{k}": x for k, x in s.columns.items()}
        tensors = dict(inputs) | {name: x for name, x in seen.items() if x is not None}
        save_file({k: x.detach().cpu().contiguous() for k, x in tensors.items() if torch.is_tensor(x)}, path)
        step = self.state.global_step + 1
        return f"training stopped at step {step}: {what}; the batch is saved in {path}"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The plain policy, as `from_pretrained` reads it; what the method learned beside it in files of their own."""
        folder = Path(output_dir or self.args.output_dir)
        if self.signal is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            own = {k.removeprefix(f"{SIGNAL}."): x for k, x in state_dict.items() if k.startswith(f"{SIGNAL}.")}
            state_dict = {k: x for k, x in state_dict.items() if not k.startswith(f"{SIGNAL}.")}
            if own and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({k: x.detach().cpu().contiguous() for k, x in own.items()}, folder / SIGNAL_FILE)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / METHOD_FILE).write_text(to_yaml(self.method), "utf-8")
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the same as JSON:
            (folder / "training_args.json").write_text(json.dumps(self.args.to_dict(), indent=1, default=str), "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / SIGNAL_FILE
        if self.signal is not None and path.exists():
            self.signal.load_state_dict(load_file(path))


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: its state is written last."""
    found = sorted(folder.glob(f"{CHECKPOINT}*"), key=lambda p: int(p.name.removeprefix(CHECKPOINT)), reverse=True)
    for path in found:
        try:
            json.loads((path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def _frozen(model: Any, method: Method, given: dict[str, Any]) -> dict[str, nn.Module | str]:
    """The frozen models of a method; the reference is made here where none is given."""
    if extra := set(given) - set(method.frozen):
        raise UserError(
            f"{type(method).__name__} uses the models {', '.join(method.frozen) or 'none'} beside the policy, "
            f"not {', '.join(sorted(extra))}"
        )
    found: dict[str, nn.Module | str] = {}
    for name in method.frozen:
        other = given.get(name)
        if other is None and name != "ref":
            raise UserError(f"{type(method).__name__} needs the model {name!r} beside the policy; none was given")
        if other is None:
            other = BASE if hasattr(model, "peft_config") else copy.deepcopy(model)
        if isinstance(other, str):
            found[name] = other
            continue
        other = getattr(other, "model", other) if type(other).__name__ == "LM" else other
        sizes = [m.get_output_embeddings().weight.shape[0] for m in (model, other)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the model {name!r} has a vocabulary of {sizes[1]} tokens and the policy one of {sizes[0]}; "
                "they must be the same"
            )
        found[name] = other.eval().requires_grad_(False)
    return found


def _pad_id(tokenizer: Any, model: Any) -> int:
    for source in (tokenizer, model.generation_config, model.config):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    return 0
