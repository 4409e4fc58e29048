"""Training a language model in rounds: sample, label, train, again and again.

>>> from locum.align import SELM
>>> from locum.align.driver import run_rounds
>>> from locum.models import load
>>> from locum.tasks import sentiment
>>> done = run_rounds(SELM(), load(), sentiment.files()[0], my_labeller, rounds=3)  # doctest: +SKIP
>>> done[-1].policy, done[-1].logs["explore/best"]  # doctest: +SKIP

What rounds leave on the disk stands in `locum.align.round_store`.
"""

import copy
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from locum.align.base import Example
from locum.align.cache import fingerprint
from locum.align.data import encode, read_pairs
from locum.align.round_store import RoundFolder, RoundResult, same_as_before
from locum.align.round_trainer import RoundTrainer, TextLabeller, text_of
from locum.align.rounds import Online, Round
from locum.align.rows import PAIR
from locum.align.trainer import align_arguments
from locum.errors import UserError
from locum.method import to_dict

__all__ = ["RoundResult", "TextLabeller", "run_rounds"]

log = logging.getLogger(__name__)


def run_rounds(
    method: Any,
    model: Any,
    prompts: Any,
    labeller: TextLabeller | None = None,
    *,
    rounds: int = 3,
    args: Any = None,
    prompts_per_round: int | None = None,
    max_new_tokens: int = 256,
    sample_batch_size: int = 16,
    max_length: int = 1024,
    **settings: Any,
) -> list[RoundResult]:
    """Train a language model in rounds: sample, label, train, again and again. The model is trained in place.

    A killed run goes on when it is called again with the same arguments and the model as it was at the very start. A
    finished round is never repeated; one that had its examples goes on from the trainer's last checkpoint (`save_steps` in
    `args`), as if it had not been stopped.

    Args:
        method: a method that makes its own data, such as `SELM` or `RTO`.
        model: the start policy: a model, a PEFT model, or an `LM`.
        prompts: examples with "prompt_ids", or rows of text with "prompt"; with the pair "chosen" and "rejected" too, for
            methods that use it.
        labeller: (prompts, responses) -> a score for each, higher is better; for methods that ask for one.
        rounds: how many.
        args: training arguments of one round (`locum.align.trainer.align_arguments`); everything lies in their output folder.
        prompts_per_round: they are shuffled, and used again when all were; by default every round has an equal share.
        max_new_tokens: of a response.
        sample_batch_size: prompts sampled at a time.
        max_length: tokens of prompt and response, for rows of text.
        settings: whatever else `locum.align.trainer.Trainer` takes: models, processing_class, callbacks.

    Raises: UserError for a method that makes no data of its own, or a folder in which other rounds were begun.
    """
    if not isinstance(method, Online):
        raise UserError(
            f"{type(method).__name__} trains on data that it is given; rounds need a method that samples, such as SELM or RTO"
        )
    for name, value in (("rounds", rounds), ("prompts_per_round", prompts_per_round)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    args = copy.copy(args) if args is not None else align_arguments("align-output")
    out = Path(args.output_dir)
    trainer = RoundTrainer(model, method, args, rounds, **settings)
    pool = _prompts(prompts, method, trainer.processing_class, max_length)
    asked = {
        "method": to_dict(method),
        "rounds": rounds,
        "prompts": fingerprint(pool),
        "prompts_per_round": prompts_per_round,
        "max_new_tokens": max_new_tokens,
        "seed": args.seed,
    }
    with trainer.accelerator.main_process_first():
        same_as_before(out, asked)
    folders = [RoundFolder(out, index) for index in range(rounds)]
    done = [result for result in itertools.takewhile(bool, (folder.result() for folder in folders)) if result]
    if done:
        trainer.go_on_from(done[-1].policy)
        trainer.first_steps = done[-1].first_steps
    for folder in folders[len(done) :]:
        trainer.begin_round()
        if not folder.is_collected:
            mine = _share(pool, folder.index, rounds, prompts_per_round, args.seed)
            round = trainer.round(folder.index, labeller, max_new_tokens, sample_batch_size)
            _collect(method, trainer, mine, round, folder)
        done.append(_train(trainer, folder))
    return done


def _prompts(prompts: Any, method: Any, tokenizer: Any, max_length: int) -> list[Example]:
    if not isinstance(prompts, str | Path) and len(prompts) and "prompt_ids" in prompts[0]:
        return list(prompts)
    if tokenizer is None:
        raise UserError("rows of text need a tokenizer: give processing_class, or examples with token ids")
    blocks = PAIR if set(PAIR) <= set(method.blocks) else ()
    return list(encode(read_pairs(prompts, False, blocks), tokenizer, max_length, blocks=blocks))


def _share(pool: Sequence[Example], index: int, rounds: int, each: int | None, seed: int) -> list[Example]:
    """The prompts of a round: its part of the shuffled pool, or the next ones of one shuffled pass after another."""
    n = len(pool)
    start, end = (
        (index * n // rounds, (index + 1) * n // rounds) if each is None else (index * each, (index + 1) * each)
    )
    if start == end:
        raise UserError(
            f"{n} prompts are too few for equal shares in {rounds} rounds; give prompts_per_round to use them again"
        )
    passes = {
        p: torch.randperm(n, generator=torch.Generator().manual_seed(seed + p)).tolist()
        for p in range(start // n, (end - 1) // n + 1)
    }
    return [pool[passes[i // n][i % n]] for i in range(start, end)]


def _collect(method: Online, trainer: Any, prompts: list[Example], round: Round, folder: RoundFolder) -> None:
    """Make the round's examples and put them on the disk."""
    began = time.perf_counter()
    with trainer.accelerator.autocast():  # so that the policy's log-probabilities are those that it has in training
        examples = method.collect(round, prompts)
    round.logs["seconds/collecting"] = time.perf_counter() - began
    if trainer.accelerator.is_main_process:
        if trainer.processing_class is not None:  # what people want to read
            blocks = ("prompt", *trainer.method.blocks)
            examples = [{**e, **{b: text_of(e, b, trainer.processing_class) for b in blocks}} for e in examples]
        folder.collect(examples, round.logs)
    trainer.accelerator.wait_for_everyone()


def _train(trainer: Any, folder: RoundFolder) -> RoundResult:
    """Train on the round's examples and finish the round."""
    examples, logs, began = folder.examples(), folder.logs(), time.perf_counter()
    history: list[dict[str, Any]] = []
    if examples:
        history = trainer.train_round(folder.index, examples, folder.training, logs)
    else:
        log.warning("round %d has no example to train on: its policy is the one it began with", folder.index)
    logs["seconds/training"] = time.perf_counter() - began
    logs["share/sampling"] = logs.get("seconds/sampling", 0.0) / (logs["seconds/collecting"] + logs["seconds/training"])
    trainer.end_round(folder.policy)
    if trainer.accelerator.is_main_process:
        folder.finish(logs, history, trainer.first_steps)
    trainer.accelerator.wait_for_everyone()
    return RoundResult(folder.index, folder.path, logs, history, trainer.first_steps)
