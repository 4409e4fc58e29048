"""Peak extra memory and time of TW-GRPO's disagreement of a group, a few columns at a time, against the whole group at once.

    python benchmarks/twgrpo_memory.py [--rows 8] [--length 512] [--vocab 50000] [--hidden 64] [--rounds 3]

From hidden states and an LM head to one number per column. "whole" holds the log-probabilities [rows, length, vocab] of the
group and what is made of them, as a direct reading of the formula does; "columns" is `locum.reinforce.twgrpo.disagreement`.
Each runs in a process of its own, in turns; memory is what it needed beyond its inputs. Written to
benchmarks/results/twgrpo_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from locum.bench.machine import PeakMemory, environment
from locum.reinforce.twgrpo import disagreement
from locum.tokens.tiles import Scores


def whole(scores: Scores, mask: Bool[Tensor, "rows tokens"], kind: str) -> Float[Tensor, " tokens"]:
    """Everything at once."""
    assert scores.head is not None
    v = len(scores.head)
    laws = torch.full((*mask.shape, v), -log(v), device=mask.device)
    laws[mask] = F.linear(scores.hidden, scores.head).float().log_softmax(-1)
    if kind == "kl":
        centre = laws.exp().mean(0).log()
        return (laws.exp() * (laws - centre)).sum(-1).mean(0)
    delta = (laws.mean(0) - laws).clamp(-11, 11)
    return (delta.exp() - delta - 1).sum(-1).mean(0)


FORMS = {"whole": whole, "columns": disagreement}


@torch.no_grad()
def measure(form: str, kind: str, rows: int, length: int, vocab: int, hidden: int, device: str) -> dict[str, Any]:
    """What one form needs and gives, in this process; rows end at different columns."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(length) < torch.linspace(length // 2, length, rows).long()[:, None]
    h = torch.randn(int(mask.sum()), hidden, generator=g)
    w = torch.randn(vocab, hidden, generator=g) / hidden**0.5
    scores, mask = Scores(h.to(device), w.to(device)), mask.to(device)
    few = mask[:, :2]
    FORMS[form](
        Scores(scores.hidden[: int(few.sum())], scores.head), few, kind
    )  # libraries' own buffers, off the record
    with PeakMemory(device) as memory:
        began = time.perf_counter()
        found = FORMS[form](scores, mask, kind)
        mean = found.double().mean().item()  # waits for the device
        seconds = time.perf_counter() - began
    return {"megabytes": memory.megabytes, "how": memory.how, "seconds": seconds, "mean": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs=2, metavar=("FORM", "KIND"), help="one form, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "twgrpo_memory.json")
    args = parser.parse_args()
    sizes = {k: getattr(args, k) for k in ("rows", "length", "vocab", "hidden", "device")}
    if args.only:
        print(json.dumps(measure(*args.only, **sizes)))
        return
    found = []
    for kind in ("code", "kl"):
        runs: dict[str, list[Any]] = {form: [] for form in FORMS}
        for _ in range(args.rounds):
            for form in FORMS:
                command = [sys.executable, __file__, "--only", form, kind]
                command += [part for k, v in sizes.items() for part in (f"--{k}", str(v))]
                # Freed tensors go back to the system at once, so that the peak is what was alive, not what malloc kept.
                env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
                runs[form].append(json.loads(done.stdout.splitlines()[-1]))
        pairs = list(zip(runs["columns"], runs["whole"], strict=True))
        ratios = {k: sorted(ours[k] / theirs[k] for ours, theirs in pairs) for k in ("megabytes", "seconds")}
        found.append({"divergence": kind, "runs": runs, "ratios": ratios})
        print(
            f"{kind}: columns {median(r['megabytes'] for r in runs['columns']):.0f} MB, whole "
            f"{median(r['megabytes'] for r in runs['whole']):.0f} MB, ratio {median(ratios['megabytes']):.3f}; time "
            f"{median(ratios['seconds']):.2f} of whole's ({ratios['seconds'][0]:.2f} to {ratios['seconds'][-1]:.2f}); mean "
            f"{runs['columns'][0]['mean']:.6f} and {runs['whole'][0]['mean']:.6f}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "twgrpo_memory", **environment(), "sizes": sizes, "load": os.getloadavg()[0], "rows": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
