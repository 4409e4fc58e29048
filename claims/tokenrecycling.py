"""Token Recycling on a real model: tokens per forward against plain decoding and n-gram lookup, cold and hot.

SmolLM2-135M-Instruct, greedy, float32; the shipped prompts (4 free text, 4 code, 4 copy-heavy), 96 tokens each. Cold begins
every prompt with an empty table, hot carries the table from prompt to prompt, in an order drawn by the seed, so that its first prompt
is cold too. Plain decoding, lookup and the 80-node tree see all prompts; the smaller trees, which the criterion does not ask
for, see two of each group. Every text must be the plain one, token by token.

Beside it stands what a tree costs: ratio(N), the time of a forward of N tokens over that of one, measured here on a prefix of 256
tokens. (Tokens per forward) / ratio is the gain in time that this machine allows; none is claimed.
"""

import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any, Literal

import numpy as np

from locum import decode, models
from locum.bench.measures import mean_interval
from locum.bench.verify import Claim, Judgement
from locum.decode.base import Drafter
from locum.tasks import prompts

TOKENS, PREFIX, REPEATS = 96, 256, 5
SMALLER = (8, 16, 30)
Row = dict[str, Any]


def settings(smaller: Sequence[int]) -> dict[str, Drafter]:
    trees = {f"TR{n} {how}": decode.TokenRecycling(n) for n in (*smaller, 80) for how in ("cold", "hot")}
    return {"plain": decode.Plain(), "lookup": decode.Lookup(), **trees}


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> Row:
    lm, chosen = models.load(dtype="float32", device="cpu"), prompts()
    tokens = 12 if fast else TOKENS
    shuffled = np.random.default_rng(seed).permutation(len(chosen))
    # The first two of each group come also with the smaller trees; a fast run sees one of each group.
    first = {g: [i for i, p in enumerate(chosen) if p.group == g][: 1 if fast else 2] for g in ("free", "code", "copy")}
    some = {i for group in first.values() for i in group}
    order = [int(i) for i in shuffled if not fast or i in some]
    drafters = settings(() if fast else SMALLER)
    tables = {name: d.start(lm) for name, d in drafters.items() if name.endswith("hot")}
    rows: list[Row] = []
    for done, i in enumerate(order):
        prompt, plain = chosen[i], None
        row: Row = {"prompt": i, "group": prompt.group}
        for name, drafter in drafters.items():
            if name.startswith("TR") and "TR80" not in name and i not in some:
                continue
            progress(f"prompt {done + 1}, {name}", done, len(order))
            [out] = decode.generate(
                lm, prompt.text, drafter=drafter, state=tables.get(name), max_new_tokens=tokens, chat=True
            )
            plain = plain or out.ids
            row[name] = {
                "tokens": len(out.ids),
                "forwards": out.forwards,
                "seconds": out.seconds,
                "identical": out.ids == plain,
            }
        rows.append(row)
    progress("cost of a forward", len(order), len(order))
    return {"rows": rows, "ratio": costs(lm, 2 if fast else REPEATS)}


def costs(lm: models.LM, repeats: int) -> dict[str, float]:
    """Seconds of a forward of 1 + n tokens over those of one token, medians of alternating repeats."""
    session, sizes = lm.session(), (0, 8, 10, 16, 30, 80)
    session.prefill(list(range(1000, 1000 + PREFIX)))
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeats):
        for n in sizes:
            began = time.perf_counter()
            session.extend(list(range(2000, 2001 + n)), [-1] + [0] * n)
            seconds[n].append(time.perf_counter() - began)
            session.rewind(PREFIX)
    return {str(n): median(seconds[n]) / median(seconds[0]) for n in sizes}


def mat(row: Row, name: str) -> float:
    """Mean accepted tokens: tokens per forward of one prompt, its own first forward counted."""
    return float(row[name]["tokens"] / row[name]["forwards"])


def judge(seeds: list[Row]) -> Judgement:
    rows = [row for seed in seeds for row in seed["rows"]]
    free = [row for row in rows if row["group"] == "free"]
    differences = {
        "hot - cold": [mat(r, "TR80 hot") - mat(r, "TR80 cold") for r in rows],
        "cold - 1": [mat(r, "TR80 cold") - 1 for r in rows],
        "cold - lookup, free text": [mat(r, "TR80 cold") - mat(r, "lookup") for r in free],
        "hot - lookup, free text": [mat(r, "TR80 hot") - mat(r, "lookup") for r in free],
    }
    intervals = {name: mean_interval(values) for name, values in differences.items()}
    different = sorted(
        {name for r in rows for name, out in r.items() if isinstance(out, dict) and not out["identical"]}
    )
    verdict: Literal["holds", "fails", "inconclusive"]
    if different or (len(rows) >= 12 and any(high <= 0 for _, high in intervals.values())):
        verdict = "fails"
    elif len(rows) < 12 or any(low <= 0 for low, _ in intervals.values()):
        verdict = "inconclusive"
    else:
        verdict = "holds"

    ratios = {n: mean(seed["ratio"][n] for seed in seeds) for n in seeds[0]["ratio"]}
    table = {}
    for name in settings(SMALLER):
        seen = [r for r in rows if name in r]
        if seen:
            n = "0" if name == "plain" else "10" if name == "lookup" else name.split()[0][2:]
            tokens = sum(r[name]["tokens"] for r in seen)
            table[name] = {
                "prompts": len(seen),
                "mat": mean(mat(r, name) for r in seen),
                "mat_by_group": {
                    g: mean(mat(r, name) for r in seen if r["group"] == g) for g in ("free", "code", "copy")
                },
                "ratio": ratios[n],
                "mat_over_ratio": mean(mat(r, name) for r in seen) / ratios[n],
                "ms_per_token": 1000 * sum(r[name]["seconds"] for r in seen) / tokens,
            }
    cells = "; ".join(
        f"{k} {v['mat']:.2f}/{v['ratio']:.2f}={v['mat_over_ratio']:.2f} at {v['ms_per_token']:.0f} ms/token"
        for k, v in table.items()
    )
    found = ", ".join(f"{k} {mean(differences[k]):.2f} [{a:.2f}, {b:.2f}]" for k, (a, b) in intervals.items())
    same = f"texts differ from plain with {', '.join(different)}" if different else "every text is the plain one"
    figures = {
        "table": table,
        "ratio": ratios,
        "differences": {k: {"mean": mean(differences[k]), "interval": list(i)} for k, i in intervals.items()},
        "identical": not different,
    }
    return Judgement(verdict, f"{same}; MAT differences {found}; MAT/ratio(N): {cells}", figures)


claim = Claim(
    slug="tokenrecycling",
    statement="With the same greedy text, an 80-node recycled tree yields more tokens per forward (MAT) than plain decoding, more with "
    "a hot table than a cold one, and more than n-gram lookup on free text.",
    criterion="SmolLM2-135M-Instruct, float32, 12 prompts, 96 tokens: holds if every text is identical to plain greedy "
    "decoding and the 95 % paired bootstrap intervals over prompts of the mean differences MAT(TR80 hot) - MAT(TR80 cold) and "
    "MAT(TR80 cold) - 1, over all prompts, and MAT(TR80 cold) - MAT(lookup) and MAT(TR80 hot) - MAT(lookup), over the free-text "
    "prompts, all lie above 0. Fails if a text differs or an interval lies at or below 0; else inconclusive. Time is reported, not "
    "judged.",
    seeds=(0,),
    run=run,
    judge=judge,
)
