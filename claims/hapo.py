"""HAPO against DAPO on the digit chain whose digits differ in entropy, at the same rollouts and the same learning rate.

Both train the same warmed-up policy for 60 steps of 16 prompts x 8 answers, two updates a step, and neither samples other
prompts in the place of level groups, so that both are given the same number of answers. pass@1 is exact. The criterion leaves
alone: each part by itself, all without the temperature, the sign of the paper's code, statistics of the whole batch, two
higher learning rates for both, entropy, and DAPO's pass@1 at the number of tokens that HAPO sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from locum.bench.measures import sign_test
from locum.bench.reinforce_chain import train
from locum.bench.verify import Claim, Judgement
from locum.reinforce import (
    HAPO,
    HAPOAdvantage,
    HAPOClip,
    HAPORedistribute,
    HAPOTemperature,
    Informative,
    Piece,
    Recipe,
)
from locum.tasks.digit_chain import DigitChain

STEPS, LR = 60, 1e-3
RATES = (2e-3, 4e-3)
STATS = "minibatch"
ARMS: dict[str, tuple[Piece, ...]] = {
    "DAPO": (),
    "HAPO": (HAPO(stats=STATS),),
    "temperature": (HAPOTemperature(),),
    "advantage": (HAPOAdvantage(),),
    "redistribute": (HAPORedistribute(stats=STATS),),
    "clip": (HAPOClip(stats=STATS),),
    "all but temperature": (HAPO(tau=0.0, stats=STATS),),
    "code's sign": (HAPO(stats=STATS, reference_sign=True),),
    "batch statistics": (HAPO(),),
}
RUNS = [(name, LR) for name in ARMS] + [(name, lr) for lr in RATES for name in ("DAPO", "HAPO")]


def name_of(arm: str, lr: float) -> str:
    return arm if lr == LR else f"{arm}, rate {lr:g}"


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    task = replace(DigitChain.hetero(length=2), warm_steps=1) if fast else DigitChain.hetero()
    steps, prompts = (2, 2) if fast else (STEPS, 16)
    row: dict[str, Any] = {"fast": fast}
    for done, (arm, lr) in enumerate(RUNS):
        progress(name_of(arm, lr), done, len(RUNS))
        recipe = Recipe("dapo", (*ARMS[arm], Informative(max_batches=1)))
        every = steps // (12 if arm == "DAPO" and not fast else 2)
        points, _ = train(recipe, seed, task, steps, epochs=2, prompts=prompts, lr=lr, every=every)
        keys = ("step", "pass_at_1", "entropy", "sampled", "trained")
        row[name_of(arm, lr)] = {key: [point[key] for point in points] for key in keys}
    return row


def at_tokens(curve: dict[str, list[float]], tokens: float) -> float:
    """pass@1 where so many tokens had been sampled, between the points that were measured."""
    return float(np.interp(tokens, curve["sampled"], curve["pass_at_1"]))


def test(differences: Sequence[float]) -> dict[str, float]:
    wins = sum(d > 0 for d in differences)
    return {"mean": mean(differences), "wins": wins, "p_sign": sign_test(differences)}


def judge(rows: list[dict[str, Any]]) -> Judgement:
    names = [name_of(*r) for r in RUNS]

    def values(name: str, key: str = "pass_at_1", share: float = 1.0) -> list[float]:
        """At the end, or after a share of the steps."""
        curves = [row[name] for row in rows]
        return [c[key][c["step"].index(share * c["step"][-1])] for c in curves]

    def gain(name: str, over: str = "DAPO", key: str = "pass_at_1", share: float = 1.0) -> list[float]:
        return [a - b for a, b in zip(values(name, key, share), values(over, key, share), strict=True)]

    main = gain("HAPO")
    p_t = float(ttest_rel(values("HAPO"), values("DAPO")).pvalue)
    dapo = [at_tokens(row["DAPO"], row["HAPO"]["sampled"][-1]) for row in rows]
    figures: dict[str, Any] = {
        "gain": test(main) | {"p_t": p_t, "each": main},
        "gain_halfway": test(gain("HAPO", share=0.5)),
        "gain_at_equal_tokens": test([a - b for a, b in zip(values("HAPO"), dapo, strict=True)]),
        "gain_of": {name: test(gain(name)) for name in names[2 : len(ARMS)]},
        "gain_by_rate": {lr: test(gain(name_of("HAPO", lr), name_of("DAPO", lr))) for lr in (LR, *RATES)},
        "entropy_over_dapo": {name: test(gain(name, key="entropy")) for name in names[1 : len(ARMS)]},
    }
    for name in names:
        figures[name] = {key: mean(values(name, key)) for key in ("pass_at_1", "entropy", "sampled", "trained")}
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends long before the two have parted", figures)

    def shown(key: str, lr: float = LR) -> str:
        dapo, hapo = (figures[name_of(arm, lr)][key] for arm in ("DAPO", "HAPO"))
        return f"DAPO {dapo:.3f}, HAPO {hapo:.3f}"

    def won(found: dict[str, float]) -> str:
        return f"{found['mean']:+.3f} ({found['wins']})"

    measured = (
        f"pass@1 after {STEPS} steps: {shown('pass_at_1')}; gain {mean(main):+.3f}, ahead in {figures['gain']['wins']} of "
        f"{len(rows)} seeds (paired t test p = {p_t:.1g}); halfway {won(figures['gain_halfway'])}, at equal sampled tokens "
        f"{won(figures['gain_at_equal_tokens'])}; gain over DAPO (seeds ahead) of other settings: "
        + ", ".join(f"{name} {won(found)}" for name, found in figures["gain_of"].items())
        + f"; entropy at the end {shown('entropy')}; pass@1 at higher learning rates: "
        + ", ".join(f"{lr:g} {shown('pass_at_1', lr)} ({figures['gain_by_rate'][lr]['wins']})" for lr in RATES)
    )
    holds = figures["gain"]["p_sign"] < 0.06 and mean(main) > 0 and p_t < 0.05
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="hapo",
    statement="On the digit chain with hard and easy digits, HAPO answers better than DAPO after 60 steps of as many sampled "
    "answers, at the same learning rate (1e-3).",
    criterion="Holds if over 10 seeds exact pass@1 after 60 steps (16 prompts x 8 answers, 2 updates each, statistics per "
    "minibatch, tau 0.1) is higher than DAPO's in at least 8 (one-sided sign test p < 0.06), and the mean difference is "
    "positive with p < 0.05 in a paired two-sided t test. Fails otherwise.",
    seeds=tuple(range(10)),
    run=run,
    judge=judge,
)
