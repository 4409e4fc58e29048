"""From a model, problems and a reward to a trained model in a folder, in one call.

>>> from locum.reinforce import reinforce
>>> reinforce("dapo + hapo.clip + d3s", "smollm2-135m-instruct", "problems.jsonl", "out", reward="math")  # doctest: +SKIP

Recipe, data and reward are read and checked before a model is loaded. A run that was stopped goes on with ``resume=True``.
"""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locum.errors import UserError
from locum.files import write_atomically
from locum.method import to_yaml
from locum.models import LM, load, require_same_vocabulary
from locum.models.training import LoRA, without_dropout
from locum.reinforce.judge import Judge
from locum.reinforce.learner import Problem
from locum.reinforce.policy import CRITIC, reference_of
from locum.reinforce.problems import encode, read_problems
from locum.reinforce.recipe import Recipe
from locum.reinforce.rewards import from_name
from locum.reinforce.trainer import Arguments, Trainer
from locum.tasks.chat import as_text, template_settings

__all__ = ["Reinforced", "Texts", "problems_of", "reinforce"]

RESULT, RECIPE, PROBLEMS = "result.json", "recipe.yaml", "reward_problems.jsonl"


@dataclass(frozen=True)
class Reinforced:
    """What a run came to.

    Args:
        folder: the trained model, as `from_pretrained` reads it; "log.jsonl" in it has the figures of every step.
        figures: of the last step; "eval/reward" on the held-out problems.
        steps: batches of rollouts.
        seconds: of this call.
        counts: problems trained on, held out, and left out because they are too long; rows without a reward.
    """

    folder: Path
    figures: dict[str, float]
    steps: int
    seconds: float
    counts: dict[str, int]


class Texts:
    """A judge of texts, asked with token ids; rows without a reward are written down.

    Args:
        lm: whose tokenizer makes texts.
        judge: what is asked.
        kept: a file of lines of JSON, one for each row without a reward; None for none.
    """

    def __init__(self, lm: LM, judge: Judge, kept: Path | None = None) -> None:
        self.lm, self.judge, self.kept, self.failed = lm, judge, kept, 0

    def __call__(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]]) -> Tensor:
        rows = [p.row for p in problems]
        prompts = [as_text(row["prompt"]) for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"} if rows else {}
        judged = self.judge(prompts, [self.lm.decode(ids) for ids in completions], columns)
        self.failed += len(judged.problems)
        if self.kept is not None and judged.problems:
            with self.kept.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in judged.problems)
        return judged.rewards


def reinforce(
    recipe: Recipe | str,
    model: str | LM,
    data: Any,
    out: str | Path,
    *,
    reward: str | Callable[..., Any],
    args: Arguments | None = None,
    eval_data: Any = None,
    reference: str | LM | None = None,
    lora: LoRA | None = None,
    merge: bool = False,
    limit_s: float = 60.0,
    on_error: str = "stop",
    max_prompt_length: int = 1024,
    engine: Callable[[LM], Any] | None = None,
    resume: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    tell: Callable[[dict[str, float]], None] | None = None,
) -> Reinforced:
    """Train a model by a recipe on problems whose answers can be checked.

    Args:
        recipe: a `Recipe`, or the text of one.
        model: a name that `locum.models.load` knows, or an `LM`.
        data: what `read_problems` reads: rows with "prompt", and columns for the reward.
        out: the folder of the result; checkpoints lie in it too.
        reward: a name that `rewards.from_name` knows, or a function ``(prompts, completions, **columns) -> floats``.
        args: how long, how fast; `Arguments()` unless given.
        eval_data: held-out problems, as `data`.
        reference: for recipes that need one; the model as it is before training unless given.
        lora: train adapters instead of all weights; the reference is then the model without them.
        merge: with LoRA: write whole weights with the adapters in them, instead of the adapters.
        limit_s, on_error: what happens to a reward that takes long or fails (`Judge`).
        max_prompt_length: tokens; problems with a longer prompt are left out and counted.
        engine: makes what samples in the model's place, e.g. `locum.models.vllm`.
        resume: go on with a run in the folder.
        dtype, device: of the model; a full training has float32 weights unless told otherwise.
        tell: called with the figures of each step.

    Raises: UserError for a bad recipe, data, reward or folder, before any work is done; and for what stops a run, after
        its state was kept.
    """
    began, out = time.perf_counter(), Path(out)
    recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
    args = args or Arguments()
    judge = Judge(from_name(reward) if isinstance(reward, str) else reward, limit_s, on_error)
    rows = read_problems(data)
    held_out = read_problems(eval_data) if eval_data is not None else None
    if merge and lora is None:
        raise UserError("merge puts adapters into the weights: it needs lora")
    if lora is None and dtype is None:  # steps of a full training are too small for bfloat16 weights
        dtype = "float32"
    lm = load(model, dtype=dtype, device=device) if isinstance(model, str) else model
    problems, long = problems_of(lm, rows, max_prompt_length)
    evaluated = problems_of(lm, held_out, max_prompt_length)[0] if held_out is not None else []
    if not problems:
        raise UserError(f"every prompt has more than {max_prompt_length} tokens: set max_prompt_length higher")
    without_dropout(lm.model)
    frozen = _frozen(recipe, lm, reference, lora, {"dtype": dtype, "device": device})
    name = lm.name
    if lora is not None:
        lm = LM(lora.on(lm.model, args.seed), lm.tokenizer, lm.name)
    policy = recipe.likelihood.policy(lm, engine(lm) if engine is not None else None)
    opened = None
    if "ref_logp" in recipe.needs:
        opened = reference_of(policy, frozen.model.eval().requires_grad_(False) if frozen is not None else None)
    graded = Texts(lm, judge, out / PROBLEMS)
    asked = {"model": name, "lora": lora and asdict(lora), "reward": reward if isinstance(reward, str) else str(reward)}
    trainer = Trainer(
        recipe,
        policy,
        problems,
        graded,
        out,
        args,
        eval_problems=evaluated,
        reference=opened,
        asked=asked,
        tell=tell,
    )
    figures = trainer.train(resume)
    counts = {"problems": len(problems), "held_out": len(evaluated), "too_long": long, "without_reward": graded.failed}
    done = Reinforced(out, figures, args.steps, time.perf_counter() - began, counts)
    if trainer.accelerator.is_main_process:
        _save(trainer.accelerator.unwrap_model(trainer.module), lm, out, merge)
        write_atomically(out / RECIPE, to_yaml(recipe))
        write_atomically(out / RESULT, json.dumps({**asdict(done), "folder": str(out)}, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return done


def _frozen(recipe: Recipe, lm: LM, given: str | LM | None, lora: LoRA | None, how: dict[str, Any]) -> LM | None:
    """The reference as a model of its own; None for a recipe without, and where it is the model less its adapters."""
    if "ref_logp" not in recipe.needs:
        if given is not None:
            raise UserError(f"the recipe {recipe} has no use for a reference: add kl to it, or leave the reference out")
        return None
    if given is None:
        return None if lora is not None else LM(copy.deepcopy(lm.model), lm.tokenizer, "reference")
    frozen = load(given, **how) if isinstance(given, str) else given
    require_same_vocabulary(lm, frozen, "reference")
    return frozen


def problems_of(lm: LM, rows: Sequence[Mapping[str, Any]], longest: int) -> tuple[list[Problem], int]:
    """Rows as problems for a model, and how many were left out because their prompts have more tokens than `longest`."""
    problems = [Problem(encode(lm, row["prompt"], **template_settings(row)), row) for row in rows]
    kept = [p for p in problems if len(p.ids) <= longest]
    return kept, len(problems) - len(kept)


@torch.no_grad()
def _save(model: Any, lm: LM, out: Path, merge: bool) -> None:
    """The policy alone; a critic is no part of it."""
    policy = model.merge_and_unload() if merge else model
    weights = {k: x for k, x in policy.state_dict().items() if f"{CRITIC}." not in k}
    policy.save_pretrained(out, state_dict=weights)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(out)
