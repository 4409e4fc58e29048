"""Time of the arithmetic between log-probabilities and a loss, without any model.

    python benchmarks/reinforce_loss.py [--rows 128] [--tokens 2048]

Forward and backward of GRPO's loss beside TRL's `GRPOTrainer._compute_loss`, which is handed the same log-probabilities;
what a paper's pieces add to a batch's preparation and loss over DAPO's; and D3S's selection at 1024 x 4096. Runs alternate;
ratios are of neighbours. Written to benchmarks/results/reinforce_loss.json.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from datasets import Dataset
from grpo_step import tiny

from locum.bench.machine import environment
from locum.reinforce import D3S, Plan, Recipe, Run
from locum.tokens.rollouts import Rollouts


def batch(rows: int, tokens: int, group: int = 8) -> tuple[Rollouts, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(tokens) < torch.randint(tokens // 4, tokens + 1, (rows, 1), generator=g)
    prefix = torch.zeros(rows, 1, dtype=torch.long)
    old = -torch.rand(rows, tokens, generator=g) * 3
    entropy = torch.rand(rows, tokens, generator=g) * 3
    rollouts = Rollouts(
        prefix,
        prefix == 0,
        torch.zeros(rows, tokens, dtype=torch.long),
        mask,
        torch.arange(rows) // group,
        torch.randint(2, (rows,), generator=g).float(),
        {"old_logp": old, "entropy": entropy},
        {"row": torch.arange(rows)},
    )
    return rollouts, old + 0.1 * torch.randn(rows, tokens, generator=g)


def ratios(a: Callable[[], Any], b: Callable[[], Any], times: int) -> dict[str, float]:
    """a over b, and the milliseconds of both."""
    a(), b()
    found: list[tuple[float, float]] = []
    for turn in range(times):
        seconds = {}
        for fn in (a, b) if turn % 2 == 0 else (b, a):
            began = time.perf_counter()
            fn()
            seconds[fn] = time.perf_counter() - began
        found.append((seconds[a], seconds[b]))
    each = sorted(x / y for x, y in found)
    ms = [1000 * median(column) for column in zip(*found, strict=True)]
    return {"median": median(each), "min": each[0], "max": each[-1], "ms": ms[0], "ms_peer": ms[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reinforce_loss.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rollouts, logp = batch(args.rows, args.tokens)
    run = Run(total=10, room=args.tokens)

    def learn(recipe: Recipe, plan: Plan) -> None:
        """Forward and backward of the loss."""
        at, width = plan.rollouts.facts["row"], plan.keep.shape[1]
        x = logp[at, :width].requires_grad_()
        recipe.loss(plan, {"logp": x})[0].backward()

    def loss(text: str) -> Callable[[], None]:
        """A loss, on a plan that is made already."""
        recipe = Recipe.read(text)
        plan = recipe.prepare(rollouts, run)
        return lambda: learn(recipe, plan)

    def whole(text: str) -> Callable[[], None]:
        """Preparation of a batch, then the loss."""
        recipe = Recipe.read(text)
        return lambda: learn(recipe, recipe.prepare(rollouts, run))

    with tempfile.TemporaryDirectory() as folder:
        lm = tiny()
        other = trl.GRPOTrainer(
            lm.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(folder, beta=0.0, loss_type="grpo", report_to="none", bf16=False),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
            processing_class=lm.tokenizer,
        )
    other.current_gradient_accumulation_steps = 1
    other.model.train()
    advantages = torch.randn(args.rows)

    def theirs() -> None:
        x = logp.clone().requires_grad_()
        other._get_per_token_logps_and_entropies = lambda *_, **__: (x, rollouts.columns["entropy"], None)
        inputs = {"prompt_ids": rollouts.prefix, "prompt_mask": rollouts.prefix_mask.long()}
        inputs |= {"completion_ids": rollouts.ids, "completion_mask": rollouts.mask.long()}
        inputs |= {"advantages": advantages, "old_per_token_logps": rollouts.columns["old_logp"]}
        other._compute_loss(other.model, inputs).backward()

    found = {"grpo loss / TRL's": ratios(loss("grpo"), theirs, args.times)}
    for text in ("dapo + hapo.advantage", "dapo + hapo.redistribute + hapo.clip", "dapo + d3s"):
        found[f"{text} / dapo, prepared"] = ratios(whole(text), whole("dapo"), args.times)
    many, _ = batch(1024, 4096)
    each = Recipe("grpo").advantage(many)
    stage = D3S()
    seconds = []
    for _ in range(args.times):
        began = time.perf_counter()
        stage(many, each, run)
        seconds.append(time.perf_counter() - began)
    found["d3s selection, 1024 x 4096"] = {"ms": 1000 * median(seconds)}
    for name, figures in found.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items()), flush=True)
    args.out.write_text(
        json.dumps(
            {"benchmark": "reinforce_loss", "rows": args.rows, "tokens": args.tokens, **environment(), **found},
            indent=1,
        )
        + "\n",
        "utf-8",
    )


if __name__ == "__main__":
    main()
