"""Our beam search against transformers' `generate(num_beams=k, length_penalty=0)`: same model, same texts, alternating.

    python benchmarks/beam_vs_transformers.py [--beams 5] [--new-tokens 48] [--pairs 5]

The end-of-sequence token is off, so both do the same number of steps; the texts are compared. Written to
benchmarks/results/beam_vs_transformers.json; a ratio above 1 means ours is faster.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from locum.bench.machine import environment
from locum.decode.beam import beam_search
from locum.models import LM, load

SHORT = "Write two sentences about the sea."
LONG = "Summarise this text in one sentence. " + 12 * (
    "The tide tables of the harbour had been kept by the same family for a hundred years, and nobody else could read "
    "the small signs in the margin that told where the sand had moved. "
)


def ours(lm: LM, ids: list[int], beams: int, steps: int) -> list[int]:
    found = beam_search(lm.session(), ids, beams=beams, max_new_tokens=steps)
    return list(found[0].ids)


def theirs(lm: LM, ids: list[int], beams: int, steps: int) -> list[int]:
    out = lm.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=steps,
        length_penalty=0.0,
        early_stopping=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def timed(search: Callable[..., list[int]], *args: Any) -> tuple[float, list[int]]:
    start = time.perf_counter()
    ids = search(*args)
    return time.perf_counter() - start, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "beam_vs_transformers.json")
    args = parser.parse_args()
    lm = load(args.model)
    rows = []
    for name, text in (("short", SHORT), ("long", LONG)):
        ids = lm.chat(text)
        same = ours(lm, ids, args.beams, 4) == theirs(lm, ids, args.beams, 4)  # warms up both
        seconds: list[tuple[float, float]] = []
        for i in range(args.pairs):
            order = (ours, theirs) if i % 2 == 0 else (theirs, ours)
            got = {f: timed(f, lm, ids, args.beams, args.new_tokens) for f in order}
            seconds.append((got[ours][0], got[theirs][0]))
            same = same and got[ours][1] == got[theirs][1]
        ratios = sorted(t / o for o, t in seconds)
        row = {
            "prompt": name,
            "prompt_tokens": len(ids),
            "beams": args.beams,
            "new_tokens": args.new_tokens,
            "dtype": str(lm.dtype),
            "identical_text": same,
            "seconds": [{"ours": round(o, 3), "transformers": round(t, 3)} for o, t in seconds],
            "ratio": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        }
        rows.append(row)
        r = row["ratio"]
        print(
            f"{name} prompt ({len(ids)} tokens), {args.beams} beams x {args.new_tokens} tokens: ours is "
            f"{r['median']:.2f}x transformers ({r['min']:.2f} to {r['max']:.2f}), identical text: {same}",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        busy = {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
        result = {"benchmark": "beam_vs_transformers", **environment(), **busy, "rows": rows}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
