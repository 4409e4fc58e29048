"""Time of a training step: our DPO beside TRL's DPOTrainer, and TDPO2 beside our DPO; same model, batch and machine.

    python benchmarks/align_step.py [--model smollm2-135m-instruct] [--pairs 4] [--steps 5] [--lora]

A step is what each trainer's own `training_step` does on one batch (forward of policy and reference, loss, backward), then
the optimizer's. The batch is of the shipped sentiment pairs, tokenised by TRL for all. Steps alternate, in turn first and
last, and the ratios are of neighbours. Written to benchmarks/results/align_step.json; below 1 the first is faster.
"""

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from datasets import Dataset

from locum.align import DPO, TDPO1, TDPO2
from locum.align.integrations.trl import DPOTrainer
from locum.align.run import LoRA
from locum.align.trainer import Trainer, align_arguments
from locum.bench.machine import environment
from locum.models import load
from locum.tasks import sentiment


def trainers(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One trainer each, on copies of one model, all with the same reference and data."""
    lm = load(args.model, dtype=args.dtype)
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in sentiment.pairs()]
    common = {
        "per_device_train_batch_size": args.pairs,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": False,
        "seed": 0,
    }
    config = trl.DPOConfig(folder, gradient_checkpointing=False, **common)
    data: Any = {"train_dataset": Dataset.from_list(rows), "processing_class": lm.tokenizer}

    def policy() -> Any:
        model = copy.deepcopy(lm.model)
        return LoRA().on(model) if args.lora else model

    def reference() -> Any:
        return None if args.lora else copy.deepcopy(lm.model)

    made = {"trl": trl.DPOTrainer(policy(), args=config, ref_model=reference(), **data)}
    made["dpo in trl"] = DPOTrainer(policy(), args=config, ref_model=reference(), method=DPO(), **data)
    examples = list(made["trl"].train_dataset)
    for method in (DPO(), TDPO1(), TDPO2()):
        name = type(method).__name__.lower()
        made[name] = Trainer(
            policy(), method, align_arguments(folder, **common), examples, processing_class=lm.tokenizer
        )
    return made


def step(trainer: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds and loss of one step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = trainer.training_step(trainer.model, dict(batch))
    optimizer.step()
    optimizer.zero_grad()
    value = float(loss)
    return time.perf_counter() - began, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "align_step.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory() as folder:
        made = trainers(args, folder)
        batches = {
            name: t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(args.pairs)]))
            for name, t in made.items()
        }
        shape = list(batches["trl"]["input_ids"].shape)
        assert all(torch.equal(b["input_ids"], batches["trl"]["input_ids"]) for b in batches.values())
        responses = int(batches["trl"]["completion_mask"].sum())
        optimizers = {name: t.create_optimizer() for name, t in made.items()}
        for t in made.values():
            t.model.train()
            t.current_gradient_accumulation_steps = 1  # set by the training loop otherwise
        first = {name: step(t, batches[name], optimizers[name])[1] for name, t in made.items()}  # off the clock
        print(f"batch {shape}, {responses} response tokens; losses at the start: {first}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(args.steps):
            order = list(made) if turn % 2 == 0 else list(made)[::-1]
            for name in order:
                seconds[name].append(step(made[name], batches[name], optimizers[name])[0])
    ratios = {}
    for above, below in (("dpo", "trl"), ("dpo in trl", "trl"), ("tdpo1", "dpo"), ("tdpo2", "dpo")):
        each = sorted(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        ratios[f"{above} / {below}"] = {"median": median(each), "min": each[0], "max": each[-1]}
        print(f"{above} / {below}: {median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})", flush=True)
    key = "lora" if args.lora else "full"
    known = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"benchmark": "align_step"}
    known[key] = {
        **environment(),
        "model": args.model,
        "batch": shape,
        "response_tokens": responses,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "device": str(next(made["trl"].model.parameters()).device),
        "seconds": seconds,
        "ratios": ratios,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
