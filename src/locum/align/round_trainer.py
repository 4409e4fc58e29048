"""The family's trainer for methods that go in rounds: trained again and again, each time on what the round has brought.

Where a method renews its reference, every round is a training of its own: the policy as it is becomes the reference, and
optimizer and learning rate begin anew. Where it does not, all rounds are one training: optimizer and schedule go on.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.logging import tqdm

from locum.align.base import Example
from locum.align.rounds import Round
from locum.align.trainer import SIGNAL, Trainer, last_checkpoint
from locum.errors import UserError
from locum.models import LM
from locum.models.sampling import sample_responses
from locum.tokens.sampling import Sampling

__all__ = ["RoundTrainer", "TextLabeller", "text_of"]

TextLabeller = Callable[[list[str], list[str]], Sequence[float]]  # prompts and responses -> scores, higher is better
REFERENCE = "reference"  # the adapter that holds the reference of a PEFT model


class RoundTrainer(Trainer):
    """A `Trainer` for some rounds.

    Args:
        model, method, args, models, settings: as `Trainer`'s. A method that renews its reference takes no model "ref".
        rounds: how many there will be; the learning rate's schedule is drawn over all of them where it goes on.
    """

    def __init__(
        self,
        model: Any,
        method: Any,
        args: transformers.TrainingArguments,
        rounds: int,
        models: Mapping[str, nn.Module | str] | None = None,
        **settings: Any,
    ) -> None:
        self.rounds, self.renews = rounds, method.renews_reference
        self.first_steps: int | None = None  # of the first round; the schedule is as long as all rounds like it
        self._state_of: Path | None = None
        self._news: dict[str, float] = {}
        models = dict(models or {})
        if settings.get("precompute_reference"):
            raise UserError("the data of rounds is not there before they begin: leave precompute_reference out")
        if self.renews:
            if "ref" in models:
                raise UserError(
                    f"{type(method).__name__} takes the policy at a round's start as reference: give no model 'ref'"
                )
            inner = getattr(model, "model", model) if type(model).__name__ == "LM" else model
            if hasattr(inner, "peft_config"):
                models["ref"] = _another_adapter(inner)
        super().__init__(model, method, args, models=models, **settings)
        self.add_callback(_Begin(self))

    def go_on_from(self, folder: Path) -> None:
        """Take the policy that `end_round` left, and for a training that goes on its optimizer."""
        self._load_from_checkpoint(str(folder))
        self._state_of = None if self.renews else folder

    def begin_round(self) -> None:
        """Renew the reference, where the method asks for it: it has the policy's weights until the next round."""
        if not self.renews:
            return
        self.optimizer = self.lr_scheduler = None
        scorer: Any = self.frozen["ref"]
        if scorer.adapter is None:
            weights = self.model.state_dict()
            scorer.model.load_state_dict({k: x for k, x in weights.items() if not k.startswith(f"{SIGNAL}.")})
        else:
            _copy_adapter(self.model, scorer.adapter)

    def round(self, index: int, labeller: TextLabeller | None, max_new_tokens: int, batch_size: int) -> Round:
        """A round of the policy as it is now; its `logs` are filled as it is used. The same for the same seed and index.

        With several processes each samples a part of the prompts, and the first one asks the labeller.

        Args:
            labeller: of texts.
            max_new_tokens: of a response.
            batch_size: prompts sampled at a time.
        """
        from accelerate.utils import broadcast_object_list, gather_object

        here = self.accelerator
        lm = LM(self.model, self.processing_class)
        logs: dict[str, float] = {}
        seen: set[tuple[int, ...]] = set()
        drawn = {"responses": 0, "tokens": 0, "truncated": 0}

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            began = time.perf_counter()
            yield
            logs[name] = logs.get(name, 0.0) + time.perf_counter() - began

        def sample(examples: Sequence[Example], temperature: float, generator: torch.Generator) -> list[Example]:
            seed = int(torch.randint(2**62, (), generator=generator)) + here.process_index
            mine = range(here.process_index, len(examples), here.num_processes)
            hidden = self.args.disable_tqdm or not here.is_main_process
            with (
                timed("seconds/sampling"),
                tqdm(total=len(mine), desc=f"round {index}: sampling", disable=hidden) as bar,
            ):
                found = sample_responses(
                    lm,
                    [examples[i]["prompt_ids"] for i in mine],
                    Sampling(temperature),
                    max_new_tokens=max_new_tokens,
                    generator=torch.Generator().manual_seed(seed),
                    batch_size=batch_size,
                    progress=lambda done, _: bar.update(done - bar.n),
                )
                rows = sorted(gather_object([(i, r.ids, r.truncated) for i, r in zip(mine, found, strict=True)]))
            seen.update(tuple(ids) for _, ids, _ in rows)
            for name, more in (
                ("responses", len(rows)),
                ("tokens", sum(len(ids) for _, ids, _ in rows)),
                ("truncated", sum(cut for *_, cut in rows)),
            ):
                drawn[name] += more
            n = drawn["responses"]
            logs.update({"distinct": len(seen) / n, "length": drawn["tokens"] / n, "truncated": drawn["truncated"] / n})
            return [
                {**e, "response_ids": ids, "truncated": cut} for e, (_, ids, cut) in zip(examples, rows, strict=True)
            ]

        def label(examples: Sequence[Example]) -> list[float]:
            assert labeller is not None
            if self.processing_class is None:
                raise UserError("a labeller reads texts: give the tokenizer as processing_class")
            texts = ([text_of(e, name, self.processing_class) for e in examples] for name in ("prompt", "response"))
            with timed("seconds/labelling"):
                asked = [labeller(*texts) if here.is_main_process else None]
                [scores] = broadcast_object_list(asked)
            if len(scores) != len(examples):
                raise UserError(f"the labeller gave {len(scores)} scores for {len(examples)} responses")
            return [float(x) for x in scores]

        return Round(
            index=index,
            scorers=self.scorers,
            sampler=sample,
            labeller=label if labeller is not None else None,
            generator=torch.Generator().manual_seed(self.args.seed * 2**32 + index),
            signal=self.signal,
            pad_id=self.data_collator.pad_id,
            batch_size=self.args.per_device_eval_batch_size,
            move=self._move,
            logs=logs,
        )

    def train_round(
        self, index: int, examples: Sequence[Example], folder: Path, logs: Mapping[str, float]
    ) -> list[dict[str, Any]]:
        """Train on a round's examples, from the last whole checkpoint in the folder if there is one; what was logged.

        Args:
            logs: what was measured while the examples were made; trackers get it as "round/...".
        """
        self._news = {"round": index} | {f"round/{name}": x for name, x in logs.items()}
        self.train_dataset = examples
        self.args.output_dir = str(folder)
        transformers.set_seed(self.args.seed + index)  # the same order of the data, killed and gone on or not
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:  # it has the optimizer
            self._state_of = None
        self.train(resume_from_checkpoint=checkpoint)
        if self.model_wrapped is self.model:  # or every round would wrap its forward once more
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return self.state.log_history

    def end_round(self, folder: Path) -> None:
        """Save what the next round begins with."""
        self.save_model(str(folder))
        if not self.renews and self.optimizer is not None:
            self._save_optimizer_and_scheduler(str(folder))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.renews:
            return super().create_scheduler(num_training_steps, optimizer)
        self.first_steps = self.first_steps or num_training_steps
        schedule = super().create_scheduler(self.first_steps * self.rounds, optimizer)
        self._created_lr_scheduler = False  # transformers makes a new one for each training otherwise
        return schedule

    def at_begin(self) -> None:
        """When a training has its optimizer: the state of the round before for it, and the round's figures to trackers."""
        if self._state_of is not None:
            self._load_optimizer_and_scheduler(str(self._state_of))
            self._state_of = None
        self.log(dict(self._news))


def text_of(example: Example, block: str, tokenizer: Any) -> str:
    """The prompt as the data gave it, where it is a text; else what the token ids say."""
    if block == "prompt" and isinstance(example.get("prompt"), str):
        return example["prompt"]
    return tokenizer.decode(list(example[f"{block}_ids"]), skip_special_tokens=True)


class _Begin(transformers.TrainerCallback):
    """Tells the trainer when its optimizer is there."""

    def __init__(self, trainer: RoundTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.at_begin()


def _another_adapter(model: Any) -> str:
    """A second adapter like the active one, for the reference."""
    if REFERENCE in model.peft_config:
        raise UserError(f"the model has an adapter {REFERENCE!r} already; rounds keep their reference under that name")
    active = model.active_adapter
    model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[active]))
    model.set_adapter(active)
    _copy_adapter(model, REFERENCE)
    return REFERENCE


def _copy_adapter(model: Any, name: str) -> None:
    """Put the active adapter's weights into another one."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    set_peft_model_state_dict(model, {k: x.detach().clone() for k, x in weights.items()}, adapter_name=name)
