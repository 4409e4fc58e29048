"""Time of a GRPO training step: ours beside TRL's GRPOTrainer, on one model with one data set and the same settings.

    python benchmarks/grpo_step.py [--model tiny | smollm2-135m-instruct | PATH] [--prompts 8] [--group 8] [--tokens 64] [--steps 7]

A step samples the completions of a batch of prompts, asks the reward, makes the loss, its gradient, and moves the weights:
all that either trainer does between two batches. Steps alternate, in turn first and last, and the ratios are of neighbours.
No completion ends early, so that both sample and train the same number of tokens. Written to
benchmarks/results/grpo_step.json with tokens per second by phase of ours; below 1 ours is faster.
"""

import argparse
import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from locum.bench.machine import environment
from locum.models import LM, load
from locum.reinforce import Flat, GroupNormalised, Recipe
from locum.reinforce.judge import Judge
from locum.reinforce.learner import Settings
from locum.reinforce.policy import TextPolicy
from locum.reinforce.run import Texts, problems_of
from locum.reinforce.trainer import Arguments, Trainer


def tiny() -> LM:
    """Two layers of width 64 over bytes; its end of sequence is a token that it cannot say."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters)} | {"<pad>": 256, "<end>": 257}, merges=[])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=257,
        pad_token_id=256,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LM(LlamaForCausalLM(config), tokenizer, "tiny")


def endless(model: Any) -> None:
    """Make the end of sequence impossible, in the head of the model: completions run to their limit."""
    eos = model.generation_config.eos_token_id
    ids = torch.tensor([eos] if isinstance(eos, int) else eos)
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: out.index_fill(-1, ids.to(out.device), -1e4))


def reward(completions: list[str], **_: Any) -> list[float]:
    """The share of vowels."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1, help="updates of each batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grpo_step.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    lm = tiny() if args.model == "tiny" else load(args.model, dtype="float32")
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    rows = [{"prompt": f"Tell me something about the number {n}, and about {n + 7} too."} for n in range(100, 400)]
    size = args.prompts * args.group
    seconds: dict[str, list[float]] = {"locum": [], "trl": []}
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = copy.deepcopy(lm.model)
        config = trl.GRPOConfig(
            f"{folder}/trl",
            per_device_train_batch_size=size,
            num_generations=args.group,
            max_completion_length=args.tokens,
            num_iterations=args.epochs,
            learning_rate=1e-6,
            beta=0.0,
            loss_type="grpo",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=0,
        )
        other = trl.GRPOTrainer(
            theirs,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=lm.tokenizer,
        )
        ours = Trainer(
            Recipe("grpo", (Flat(args.group), GroupNormalised(eps=1e-4))),
            TextPolicy(lm),
            problems_of(lm, rows, 512)[0],
            Texts(lm, Judge(lambda prompts, completions, **_: reward(completions))),
            f"{folder}/locum",
            Arguments(
                steps=10_000,
                prompts=args.prompts,
                max_new_tokens=args.tokens,
                settings=Settings(epochs=args.epochs, rows_per_forward=size, rows_per_pass=size),
            ),
        )
        if args.model != "tiny":
            endless(theirs)
            endless(lm.model)
        batches = iter(other.get_train_dataloader())
        optimizer = other.create_optimizer()
        other.model.train()
        other.current_gradient_accumulation_steps = 1

        def trl_step() -> None:
            for _ in range(args.epochs):
                other.training_step(other.model, next(batches), None)
                torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        def our_step() -> None:
            figures = ours._step()
            assert figures["sampled_tokens"] == size * args.tokens, "a completion ended early"
            phases.append({k: v for k, v in figures.items() if "second" in k})

        steps = {"locum": our_step, "trl": trl_step}
        for step in steps.values():  # off the clock
            step()
        phases.clear()
        for turn in range(args.steps):
            for name in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
                began = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(seconds["locum"], seconds["trl"], strict=True))
    by_phase = {k: median(p[k] for p in phases) for k in phases[0]}
    print(f"locum / trl: {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(", ".join(f"{k} {v:.3g}" for k, v in by_phase.items()))
    key = f"{args.model}, {args.prompts} x {args.group} x {args.tokens} tokens, {args.epochs} update(s)"
    known = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"benchmark": "grpo_step"}
    known[key] = {
        **environment(),
        "ratio": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        "phases": by_phase,
        "threads": torch.get_num_threads(),
    }
    args.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
