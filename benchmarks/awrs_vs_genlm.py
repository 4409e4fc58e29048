"""AWRS against the authors' library genlm-control: same model, prompt, constraint, particles and estimator, alternating.

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 genlm-control
    python benchmarks/awrs_vs_genlm.py --peer PEER/bin/python [--pairs 20] [--particles 5]

The peer runs in a process of its own, with its Hugging Face backend on the CPU in float32, the keys and values of the
prompt cached, and the same number of threads; it resamples by strata, as we do. What it remembers of the model is cleared
before every run, since all runs have one prompt. The posteriors are compared on the month, by weights pooled over runs,
with a permutation test over runs, and the estimates of P(valid) by their standard errors. Written to
benchmarks/results/awrs_vs_genlm.json; a ratio below 1 means that we take less time per token.
"""

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

QUESTION = "On which day of 2024 was the total solar eclipse? Write only the date as YYYY-MM-DD."
PATTERN = r"2024-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
LIMIT = 16
Run = dict[str, Any]  # seconds, tokens, checks, and (text, log weight) of each particle


def serve(folder: str, prompt: list[int], particles: int) -> None:
    """The peer: a line with a seed comes in, a line with a run goes out."""
    import torch
    from genlm.control import AWRS, BoolFSA, PromptedLLM

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lm = PromptedLLM.from_name(
        folder,
        backend="hf",
        eos_byte_strings=[b"<|im_end|>"],
        hf_opts={"torch_dtype": torch.float32, "device_map": "cpu"},
    )
    lm.prompt_ids = prompt
    allowed = BoolFSA.from_regex(PATTERN).coerce(lm, f=b"".join)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    async def one(seed: int) -> Run:
        lm.model.clear_cache()
        began = time.perf_counter()
        lm.model.cache_kv(prompt)
        found = await AWRS(lm, allowed, seed=seed).smc(
            n_particles=particles, ess_threshold=0.5, max_tokens=LIMIT + 1, resampling_method="stratified"
        )
        seconds = time.perf_counter() - began
        texts = [
            (b"".join(bytes(t) for t in context if isinstance(t, bytes)).decode(), float(w))
            for context, w in zip(found.contexts, found.log_weights, strict=True)
        ]
        return {"seconds": seconds, "tokens": sum(len(c) for c in found.contexts), "texts": texts}

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(loop.run_until_complete(one(int(line)))), flush=True)


class Peer:
    def __init__(self, python: str, folder: str, prompt: list[int], particles: int) -> None:
        command = [python, __file__, "--serve", folder, json.dumps(prompt), str(particles)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", '"')):  # the peer's libraries may talk
                return json.loads(line)
        raise SystemExit("the peer ended; its message is above")

    def __call__(self, seed: int) -> Run:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        return self._read()


def months(runs: list[Run]) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in runs:
        for text, log_weight in run["texts"]:
            if log_weight > -math.inf:
                found[text[5:7]] = found.get(text[5:7], 0.0) + math.exp(log_weight)
    return found


def normaliser(runs: list[Run]) -> tuple[float, float]:
    """Mean and standard error of the estimates of P(valid)."""
    import numpy as np

    z = np.array([np.mean([math.exp(w) for _, w in run["texts"]]) for run in runs])
    return float(z.mean()), float(z.std(ddof=1) / math.sqrt(len(z)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from locum.bench.machine import environment
    from locum.decode.awrs import AWRS
    from locum.decode.constraints import Regex
    from locum.models import cache_dir, load
    from locum.tasks.table_lm import distance

    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    lm = load("smollm2-135m-instruct")
    prompt, constraint = lm.chat(QUESTION), Regex(PATTERN)
    methods = {
        "black box": AWRS(n_particles=args.particles, estimator="auto"),
        "lookahead": AWRS(n_particles=args.particles, estimator="auto", lookahead=True),
    }

    def ours(name: str, seed: int) -> Run:
        began = time.perf_counter()
        found = methods[name].generate(lm, prompt, constraint, max_new_tokens=LIMIT, seed=seed)
        seconds = time.perf_counter() - began
        texts = [(c.text, c.log_weight) for c in found.completions]
        # The peer counts the tokens of the texts it returns, ends included; so do we.
        tokens = sum(len(c.ids) + 1 for c in found.completions)
        return {"seconds": seconds, "tokens": tokens, "texts": texts, "checks": found.checks / found.tokens}

    peer = Peer(args.peer, str(cache_dir() / "smollm2-135m-instruct"), prompt, args.particles)
    runs: dict[str, list[Run]] = {"genlm-control": [], **{name: [] for name in methods}}
    for seed in range(-1, args.pairs):  # the first of each is a warm-up
        for name in runs:
            run = peer(seed + 1000) if name == "genlm-control" else ours(name, seed + 1000)
            if seed >= 0:
                runs[name].append(run)
        print(f"{seed + 1}/{args.pairs}", file=sys.stderr)
    assert peer.process.stdin is not None
    peer.process.stdin.close()

    def per_token(run: Run) -> float:
        return run["seconds"] / run["tokens"]

    theirs, rng, rows = runs["genlm-control"], np.random.default_rng(0), {}
    for name, found in runs.items():
        z, error = normaliser(found)
        rows[name] = {"seconds_per_token": median(map(per_token, found)), "p_valid": z, "standard_error": error}
        if name == "genlm-control":
            continue
        ratios = [per_token(a) / per_token(b) for a, b in zip(found, theirs, strict=True)]
        far, both, n = distance(months(found), months(theirs)), [*found, *theirs], len(found)
        null = []
        for _ in range(2000):
            order = rng.permutation(len(both))
            null.append(distance(months([both[i] for i in order[:n]]), months([both[i] for i in order[n:]])))
        (z0, e0), (z1, e1) = normaliser(theirs), (z, error)
        rows[name] |= {
            "checks_per_token": float(np.mean([r["checks"] for r in found])),
            "ratio_of_seconds_per_token": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "total_variation_of_month": far,
            "permutation_p": float(np.mean([x >= far for x in null])),
            "p_valid_difference_in_standard_errors": abs(z1 - z0) / math.hypot(e0, e1),
        }
    return {
        "what": "AWRS with SMC, date in 2024, estimator auto, stratified resampling, float32, CPU",
        "particles": args.particles,
        "pairs": args.pairs,
        "threads": threads,
        "load_average": os.getloadavg(),
        "rows": rows,
        "peer": json.loads(
            subprocess.run([args.peer, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.splitlines()[
                -1
            ]
        ),
        **environment(),
    }


VERSIONS = (
    "import json; from importlib.metadata import version; "
    "print(json.dumps({p: version(p) for p in ('genlm-control', 'genlm-backend', 'torch', 'transformers')}))"
)


def main() -> None:
    if "--serve" in sys.argv:
        folder, prompt, particles = sys.argv[2:5]
        return serve(folder, json.loads(prompt), int(particles))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python with genlm-control")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--particles", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "awrs_vs_genlm.json")
    args = parser.parse_args()
    text = json.dumps(compare(args), indent=2) + "\n"
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text)
    print(text)
    return None


if __name__ == "__main__":
    main()
