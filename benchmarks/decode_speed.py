"""Decoding speed against transformers, and where the time of a step goes.

    python benchmarks/decode_speed.py [--tokens 128] [--pairs 5] [--dtype float32] [--only plain,peers,auto,profile]

Every figure is a ratio of two runs that alternate A B A B in one process, with the median and the range over the pairs; times by
themselves say little on a shared machine. Results go to benchmarks/results/decode_speed.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from locum import decode, models, tasks
from locum.bench.machine import environment
from locum.models import LM

RESULTS = Path(__file__).with_name("results") / "decode_speed.json"
Run = Callable[[], list[int]]


def ours(
    lm: LM, ids: list[int], tokens: int, drafter: decode.Drafter, draft: LM | None = None, state: Any = None
) -> list[int]:
    return decode.generate(lm, [ids], drafter=drafter, draft=draft, max_new_tokens=tokens, state=state)[0].ids


def theirs(lm: LM, ids: list[int], tokens: int, **how: Any) -> list[int]:
    prompt = torch.tensor([ids], device=lm.device)
    mask = torch.ones_like(prompt)
    out = lm.model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **how)
    return out[0, len(ids) :].tolist()


def seconds_per_token(run: Run) -> tuple[float, list[int]]:
    began = time.perf_counter()
    ids = run()
    return (time.perf_counter() - began) / len(ids), ids


def alternate(a: Run, b: Run, pairs: int, warm: bool = True) -> dict[str, Any]:
    """How many times faster a is than b, pair by pair; the order within a pair changes from one to the next."""
    if warm:
        a(), b()
    ratios, times, same = [], [], True
    for i in range(pairs):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        x, y = seconds_per_token(first), seconds_per_token(second)
        (ta, ia), (tb, ib) = (x, y) if i % 2 == 0 else (y, x)
        same = same and ia == ib
        ratios.append(tb / ta)
        times.append((1e3 * ta, 1e3 * tb))
    return {
        "times_faster": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "ms_per_token": [round(statistics.median(t[i] for t in times), 2) for i in (0, 1)],
        "pairs": pairs,
        "same_tokens": same,
    }


def plain(lm: LM, tokens: int, pairs: int) -> dict[str, Any]:
    ids = lm.chat("Explain to a child how rainbows form, in detail.")
    return alternate(lambda: ours(lm, ids, tokens, decode.Plain()), lambda: theirs(lm, ids, tokens), pairs)


def peers(lm: LM, draft: LM, tokens: int, pairs: int) -> dict[str, Any]:
    """Our lookup and chain against transformers' prompt lookup and assisted generation, same lengths, one prompt of each group."""
    # transformers adapts the length of an assisted draft by default; "constant" keeps both at five.
    draft.model.generation_config.num_assistant_tokens = 5
    draft.model.generation_config.num_assistant_tokens_schedule = "constant"
    draft.model.generation_config.assistant_confidence_threshold = 0.0
    rows = {}
    for prompt in one_per_group():
        ids = lm.chat(prompt.text)
        rows[f"lookup {prompt.group}"] = alternate(
            lambda ids=ids: ours(lm, ids, tokens, decode.Lookup(length=10)),
            lambda ids=ids: theirs(lm, ids, tokens, prompt_lookup_num_tokens=10),
            pairs,
        )
        rows[f"chain {prompt.group}"] = alternate(
            lambda ids=ids: ours(lm, ids, tokens, decode.Chain(length=5), draft),
            lambda ids=ids: theirs(lm, ids, tokens, assistant_model=draft.model),
            pairs,
        )
    return rows


def auto(lm: LM, draft: LM, tokens: int, pairs: int) -> dict[str, Any]:
    """Auto against our plain decoder on every shipped prompt; the median over a group's prompts of each prompt's median."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, prompt in enumerate(tasks.prompts()):
        ids = lm.chat(prompt.text)
        figures = alternate(
            lambda ids=ids: ours(lm, ids, tokens, decode.Auto(), draft),
            lambda ids=ids: ours(lm, ids, tokens, decode.Plain()),
            pairs,
            warm=number == 0,
        )
        rows.setdefault(prompt.group, []).append(figures)
    return {
        group: {
            "times_faster": statistics.median(f["times_faster"] for f in figures),
            "same_tokens": all(f["same_tokens"] for f in figures),
            "prompts": figures,
        }
        for group, figures in rows.items()
    }


def one_per_group() -> list[Any]:
    first: dict[str, Any] = {}
    for prompt in tasks.prompts():
        first.setdefault(prompt.group, prompt)
    return list(first.values())


@torch.inference_mode()
def profile(lm: LM, repeats: int = 9) -> dict[str, Any]:
    """A plain step taken apart, next to the time that reading the weights alone takes on this machine."""
    weights = list(lm.model.parameters())  # tied weights count once
    size = sum(w.numel() * w.element_size() for w in weights)

    def median_ms(run: Callable[[], Any]) -> float:
        run()
        return 1e3 * statistics.median(timed(run) for _ in range(repeats))

    session = lm.session(512)
    session.prefill(list(range(5, 261)))

    def step() -> None:
        session.extend([7], [-1])
        session.commit([])

    from locum.models.lean import _linear

    layers = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {n: torch.randn(1, n, dtype=lm.dtype, device=lm.device) for n in {layer.in_features for layer in layers}}

    def products() -> None:
        for layer in layers:
            _linear(inputs[layer.in_features], layer)

    flat = torch.ones(size // 4, device=lm.device)
    whole, matrices, read = median_ms(step), median_ms(products), median_ms(flat.sum)
    generation = decode.generate(lm, [list(range(5, 261))], max_new_tokens=32)[0]
    loop = 1e3 * statistics.median(s.seconds for s in generation.steps)
    return {
        "bytes_read_per_token": size,
        "ms": {
            "one step of the decoder": round(loop, 2),
            "of which the model's forward": round(whole, 2),
            "of which matrix products": round(matrices, 2),
            "reading as many bytes once": round(read, 2),
        },
        "share_of_step": {
            "matrix products": round(matrices / loop, 3),
            "rest of the forward (attention, norms, rotary, calls)": round((whole - matrices) / loop, 3),
            "rest of the decoder": round((loop - whole) / loop, 3),
        },
        "step_over_bare_read": round(loop / read, 2),
    }


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--auto-pairs", type=int, default=3)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--only", default="profile,plain,peers,auto")
    args = parser.parse_args()
    lm, draft = models.load(dtype=args.dtype), models.load("smollm2-draft", dtype=args.dtype)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "profile": lambda: profile(lm),
        "plain": lambda: plain(lm, args.tokens, args.pairs),
        "peers": lambda: peers(lm, draft, args.tokens, args.pairs),
        "auto": lambda: auto(lm, draft, args.tokens, args.auto_pairs),
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    section = kept.setdefault(str(lm.dtype).removeprefix("torch."), {})
    section |= environment()
    for name in args.only.split(","):
        section[name] = parts[name]()
        print(name, json.dumps(section[name], indent=1), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
