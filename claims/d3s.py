"""D3S against GRPO on the digit chain: what a policy has learnt from so many trained tokens.

A warmed-up policy is trained by GRPO, and by GRPO with D3S (4 to 8 rows of each of 16 groups, then 32 to 128 rows of the batch,
0.2 to all of their tokens), with the same seeds. Trained tokens are counted as often as the optimiser goes over them: twice,
as a batch is learnt from twice. pass@1 is exact, after every second step, and interpolated between. Beside the criterion,
without a gate: the same with every trained token counted once; pass@1 at equal steps, where D3S is behind on this task (Adam
hides the larger gradient, and every token of a chain matters); the variance of the advantages that are trained on.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from locum.bench.measures import sign_test
from locum.bench.reinforce_chain import train
from locum.bench.verify import Claim, Judgement
from locum.reinforce import D3S, Recipe
from locum.tasks.digit_chain import DigitChain

BUDGETS, STEPS, EPOCHS, PROMPTS, ROWS = (5_000, 10_000, 20_000, 40_000), 60, 2, 16, 128
EVERY, AT = 2, (2, 16, 30, 44, 60)  # steps
USEFUL = 0.95
ARMS = {
    "GRPO": Recipe("grpo"),
    "D3S": Recipe("grpo", (D3S(rows=(4, 8), shares=(2, 8), tokens=(0.2, 1.0), scope="group+batch"),)),
}


def at_budgets(curve: list[dict[str, Any]], passes: int) -> list[float | None]:
    """pass@1 after so many trained tokens, each counted `passes` times less often; None where there were never so many."""
    tokens = [x["trained"] / passes for x in curve]
    found = [float(np.interp(b, tokens, [x["pass_at_1"] for x in curve])) for b in BUDGETS]
    return [x if b <= tokens[-1] else None for x, b in zip(found, BUDGETS, strict=True)]


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    task = replace(DigitChain.hetero(3), warm_steps=5) if fast else DigitChain.hetero()
    steps = 2 if fast else STEPS
    row: dict[str, Any] = {"fast": fast}
    for done, (name, recipe) in enumerate(ARMS.items()):
        progress(name, done, len(ARMS))
        curve, _ = train(recipe, seed, task, steps, EPOCHS, PROMPTS, every=EVERY)
        row[name] = {
            "at_tokens": at_budgets(curve, 1),
            "at_tokens_counted_once": at_budgets(curve, EPOCHS),
            "at_steps": [x["pass_at_1"] for x in curve if x["step"] in AT],
            "trained": [x["trained"] for x in curve],
            "live_rows": [ROWS * (1 - x["level_groups"]) for x in curve[1:]],  # of the whole batch
        }
    row["D3S"] |= {
        "selected_rows": [x["d3s/selected_rows"] for x in curve[1:]],
        "variance": [x["d3s/variance"] for x in curve[1:]],
        "variance_of_all": [x["d3s/variance_before"] for x in curve[1:]],
        "useful_rows": [x["d3s/useful_rows"] for x in curve[1:]],
        "offered_rows": [x["d3s/offered_rows"] for x in curve[1:]],
    }
    return row


def useful(row: dict[str, Any], among: str) -> float:
    """Of the rows that D3S chose, the share whose advantage is not 0: mean over steps with at least as many such rows as chosen.

    Args:
        among: such rows of what the selection across the batch chose from, or "live_rows", of the whole batch: rows that
            their own group's selection has left out are no longer there to be chosen.
    """
    arm = row["D3S"]
    steps = zip(arm["useful_rows"], arm["selected_rows"], arm[among], strict=True)
    found = [share for share, chosen, live in steps if chosen <= live + 1e-6]
    return mean(found) if found else 0.0


def judge(rows: list[dict[str, Any]]) -> Judgement:
    def gaps(what: str) -> list[list[float]]:
        """D3S less GRPO by seed, for each budget; nan where one of the two never got there."""
        pairs = [zip(r["D3S"][what], r["GRPO"][what], strict=True) for r in rows]
        return [[float("nan") if None in pair else pair[0] - pair[1] for pair in at] for at in zip(*pairs, strict=True)]

    def means(name: str, what: str) -> list[float | None]:
        return [None if None in x else mean(x) for x in zip(*(r[name][what] for r in rows), strict=True)]

    p = [sign_test(g) for g in gaps("at_tokens")]
    shares, in_batch = ([useful(r, among) for r in rows] for among in ("offered_rows", "live_rows"))
    figures: dict[str, Any] = {
        "p": p,
        "wins": {
            what: [sum(d > 0 for d in g) for g in gaps(what)]
            for what in ("at_tokens", "at_tokens_counted_once", "at_steps")
        },
        "useful_rows": shares,
        "useful_rows_in_batch": in_batch,
        "useful_rows_grpo": mean(x / ROWS for r in rows for x in r["GRPO"]["live_rows"]),
        "D3S": {what: means("D3S", what) for what in rows[0]["D3S"]},
        "GRPO": {what: means("GRPO", what) for what in rows[0]["GRPO"]},
    }
    if any(r["fast"] for r in rows):
        return Judgement("inconclusive", "a fast run is over before 5000 tokens were trained on", figures)

    def shown(what: str) -> str:
        return " against ".join(
            "/".join("-" if x is None else f"{x:.3f}" for x in figures[name][what]) for name in ("D3S", "GRPO")
        )

    def wins(what: str) -> str:
        return "/".join(map(str, figures["wins"][what]))

    variance, of_all = (
        [figures["D3S"][what][at // EVERY - 1] for at in AT] for what in ("variance", "variance_of_all")
    )
    measured = (
        f"pass@1 of D3S against GRPO after 5k/10k/20k/40k trained tokens (each pass counted) {shown('at_tokens')}, ahead in "
        f"{wins('at_tokens')} of {len(rows)} seeds; tokens counted once per rollout {shown('at_tokens_counted_once')}, ahead in "
        f"{wins('at_tokens_counted_once')}; at equal steps {'/'.join(map(str, AT))} {shown('at_steps')}, ahead in "
        f"{wins('at_steps')}, with {figures['D3S']['trained'][-1] / figures['GRPO']['trained'][-1]:.2f} of the trained tokens; "
        f"rows whose advantage is not 0: {100 * mean(shares):.1f} % of the rows chosen (least in a seed "
        f"{100 * min(shares):.1f} %; {100 * min(in_batch):.1f} % over the steps with enough of them in the whole batch), "
        f"{100 * figures['useful_rows_grpo']:.1f} % of GRPO's; variance of the advantages chosen at these steps "
        f"{'/'.join(f'{x:.2f}' for x in variance)}, of all {'/'.join(f'{x:.2f}' for x in of_all)}"
    )
    holds = all(x <= 0.04 for x in p) and min(shares) >= USEFUL
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="d3s",
    statement="Trained on the rollouts whose advantages vary most, and on their tokens of large advantage times entropy, a policy "
    "has learnt more than by GRPO after as many trained tokens.",
    criterion="Holds if on the digit chain (hetero, 16 prompts x 8, 60 steps of 2 updates, Adam 1e-3) pass@1 at 5k, 10k, 20k and "
    "40k trained tokens (interpolated; a token counts once for each update that it is part of) is higher with D3S than with GRPO "
    "in at least 7 of 8 seeds at each (paired one-sided sign test, p <= 0.04), and over the steps in which the selection across "
    "the batch has enough rows to choose from whose advantage is not 0, at least 95 % of those chosen are such rows, in every "
    "seed. Fails otherwise.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
