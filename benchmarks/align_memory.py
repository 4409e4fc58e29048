"""Peak extra memory and value of per-token statistics in tiles, against the plain form that holds whole logits.

    python benchmarks/align_memory.py [--rows 4] [--length 512] [--vocab 49152] [--hidden 576] [--dtype float32]

Forward and backward, from hidden states and an LM head: "log_ratio" (what DPO needs: log-probabilities of the tokens
under policy and reference), "forward_kl" (those and KL(ref || pi), what TDPO needs) and "distillation" (KL(pi || p*) to
a teacher between two models, what AlignDistil needs). Each form runs in a process of its own, which measures what it
needed beyond its inputs, gradients of hidden states and head included. Written to benchmarks/results/align_memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locum.bench.machine import PeakMemory, environment
from locum.tokens.tiles import Scores, divergence, kl_of, log_prob, over_tiles

ALPHA = 1.5  # the distillation's teacher: z_a + ALPHA (z_a - z_b)


def plain_log_ratio(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        ref = F.linear(r, w).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    return F.linear(h, w).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] - ref


def plain_forward_kl(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    logp = F.linear(h, w).float().log_softmax(-1)
    with torch.no_grad():
        logr = F.linear(r, w).float().log_softmax(-1)
    d = logp.gather(-1, ids[:, None])[:, 0] - logr.gather(-1, ids[:, None])[:, 0]
    return d + (logr.exp() * (logr - logp)).sum(-1)


def plain_distillation(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        a, b = F.linear(r, w).float(), F.linear(r.flip(-1), w).float()
        teacher = (a + ALPHA * (a - b)).log_softmax(-1)
    logp = F.linear(h, w).float().log_softmax(-1)
    return (logp.exp() * (logp - teacher)).sum(-1)


def tiled_log_ratio(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        ref = over_tiles(log_prob, [Scores(r, w)], ids)[0]
    return over_tiles(log_prob, [Scores(h, w)], ids)[0] - ref


def tiled_forward_kl(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    def both(zr: Tensor, z: Tensor, i: Tensor) -> Tensor:
        return log_prob(z, i) - log_prob(zr, i) + divergence(zr, z)

    return over_tiles(both, [Scores(r, w.detach()), Scores(h, w)], ids)[0]


def tiled_distillation(h: Tensor, r: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    def one(a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return kl_of(z.log_softmax(-1), (a + ALPHA * (a - b)).log_softmax(-1))

    fixed = w.detach()
    return over_tiles(one, [Scores(r, fixed), Scores(r.flip(-1), fixed), Scores(h, w)])[0]


FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "log_ratio": {"plain": plain_log_ratio, "tiles": tiled_log_ratio},
    "forward_kl": {"plain": plain_forward_kl, "tiles": tiled_forward_kl},
    "distillation": {"plain": plain_distillation, "tiles": tiled_distillation},
}


def measure(what: str, form: str, rows: int, length: int, vocab: int, hidden: int, dtype: str, device: str) -> Any:
    """What one form needs and gives, in this process."""
    g = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    n = rows * length
    h, r = (torch.randn(n, hidden, generator=g).to(device, kind) for _ in range(2))
    w = (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(device, kind).requires_grad_()
    ids = torch.randint(vocab, (n,), generator=g).to(device)
    h.requires_grad_()
    fn = FORMS[what][form]
    fn(h[:8], r[:8], w, ids[:8]).sum().backward()  # libraries' own buffers, off the record
    h.grad = w.grad = None
    with PeakMemory(device) as memory:
        values = fn(h, r, w, ids)
        values.mean().backward()
    assert h.grad is not None
    assert w.grad is not None
    grads = {"hidden": h.grad.float().norm().item(), "head": w.grad.float().norm().item()}
    return {"megabytes": memory.megabytes, "how": memory.how, "mean": values.double().mean().item(), "gradients": grads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "FORM"), help="one form, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "align_memory.json")
    args = parser.parse_args()
    sizes = {k: getattr(args, k) for k in ("rows", "length", "vocab", "hidden", "dtype", "device")}
    if args.only:
        print(json.dumps(measure(*args.only, **sizes)))
        return
    found = []
    for what, forms in FORMS.items():
        row: dict[str, Any] = {"statistic": what}
        for form in forms:
            command = [sys.executable, __file__, "--only", what, form]
            command += [part for k, v in sizes.items() for part in (f"--{k}", str(v))]
            # Freed tensors go back to the system at once, so that the peak is what was alive, not what malloc kept.
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
            row[form] = json.loads(done.stdout.splitlines()[-1])
        row["ratio"] = row["tiles"]["megabytes"] / row["plain"]["megabytes"]
        found.append(row)
        print(
            f"{what}: tiles {row['tiles']['megabytes']:.0f} MB, plain {row['plain']['megabytes']:.0f} MB, "
            f"ratio {row['ratio']:.3f}; mean {row['tiles']['mean']:.6f} and {row['plain']['mean']:.6f}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "align_memory", **environment(), "sizes": sizes, "load": os.getloadavg()[0], "rows": found}
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
